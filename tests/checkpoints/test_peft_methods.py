"""Every method of PEFT beside LoRA against what PEFT itself merges, in float64: weights and biases."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftConfig, get_peft_model
from peft_adapters import ATTENTION, assert_merges_as_peft, randomised, trained
from safetensors.torch import load_file, save_file
from torch import nn

import wdanalysis as wd
from wdanalysis.checkpoints import open_checkpoint
from wdanalysis.errors import CheckpointError

FORMULAS: dict[str, Callable[[], PeftConfig]] = {
    "LoHa": lambda: peft.LoHaConfig(
        r=4, alpha=3, target_modules=[*ATTENTION, "conv1", "conv2", "pointwise"], rank_pattern={"v_proj": 3}
    ),
    "LoHa, Tucker": lambda: peft.LoHaConfig(
        r=4, alpha=3, target_modules=["conv1", "conv2"], use_effective_conv2d=True
    ),
    "LoKr": lambda: peft.LoKrConfig(r=4, alpha=3, target_modules=[*ATTENTION, "conv1", "conv2", "pointwise"]),
    "LoKr, both": lambda: peft.LoKrConfig(r=1, alpha=3, target_modules=ATTENTION, decompose_both=True),
    "LoKr, Tucker": lambda: peft.LoKrConfig(
        r=1, alpha=3, target_modules=["conv2"], use_effective_conv2d=True
    ),
    "IA³": lambda: peft.IA3Config(
        target_modules=[*ATTENTION, "c_attn", "conv2", "conv3"], feedforward_modules=["down_proj", "conv3"]
    ),
    "IA³, expression": lambda: peft.IA3Config(
        target_modules=r".*(q_proj|down_proj)", feedforward_modules=r".*down_proj"
    ),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, target_modules=[*ATTENTION, "conv2", "embed_tokens"]),
    "OFT, exact": lambda: peft.OFTConfig(
        oft_block_size=8, target_modules=ATTENTION, use_cayley_neumann=False
    ),
    "OFT, three terms": lambda: peft.OFTConfig(
        oft_block_size=8, target_modules=ATTENTION, num_cayley_neumann_terms=3
    ),
    "OFT, seven terms": lambda: peft.OFTConfig(
        oft_block_size=4, target_modules=ATTENTION, num_cayley_neumann_terms=7
    ),
    "OFT, shared": lambda: peft.OFTConfig(oft_block_size=4, target_modules=ATTENTION, block_share=True),
    "COFT": lambda: peft.OFTConfig(oft_block_size=4, target_modules=ATTENTION, coft=True, eps=0.05),
    "AdaLoRA": lambda: peft.AdaLoraConfig(
        init_r=4, lora_alpha=3, total_step=10, target_modules=[*ATTENTION, "c_attn", "conv2"]
    ),
    "LN tuning": lambda: peft.LNTuningConfig(target_modules=["norm", "q_proj"]),
    "trained tokens": lambda: peft.TrainableTokensConfig(
        token_indices=[3, 7], target_modules=["embed_tokens"]
    ),
}


@pytest.mark.parametrize("config", FORMULAS.values(), ids=FORMULAS)
def test_the_formula_of_a_method_gives_what_peft_merges(
    tmp_path: Path, config: Callable[[], PeftConfig]
) -> None:
    assert_merges_as_peft(tmp_path, *trained(tmp_path, config()))


GENERAL: dict[str, Callable[[], PeftConfig]] = {
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=ATTENTION),
    "HRA": lambda: peft.HRAConfig(r=4, target_modules=[*ATTENTION, "conv2"]),
    "VB-LoRA": lambda: peft.VBLoRAConfig(
        vector_length=4, num_vectors=8, topk=2, r=2, target_modules=ATTENTION
    ),
    "RandLora": lambda: peft.RandLoraConfig(r=4, target_modules=ATTENTION),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=9, target_modules=ATTENTION),
    "MiSS": lambda: peft.MissConfig(r=4, target_modules=ATTENTION),
    "MiSS as Bone": lambda: peft.MissConfig(r=8, target_modules=["q_proj"], init_weights="bat"),
    "C3A": lambda: peft.C3AConfig(block_size=8, target_modules=ATTENTION),
    "WaveFT": lambda: peft.WaveFTConfig(n_frequency=9, target_modules=ATTENTION),
    "RoAd": lambda: peft.RoadConfig(group_size=4, target_modules=ATTENTION),
    "SHiRA": lambda: peft.ShiraConfig(r=2, target_modules=ATTENTION),
    "DeLoRA": lambda: peft.DeloraConfig(r=4, target_modules=ATTENTION),
    "GraLoRA": lambda: peft.GraloraConfig(r=4, gralora_k=2, target_modules=ATTENTION),
    "HiRA": lambda: peft.HiraConfig(r=4, target_modules=[*ATTENTION, "conv2", "embed_tokens"]),
    "PVeRA": lambda: peft.PveraConfig(r=4, target_modules=ATTENTION),
    "OSF": lambda: peft.OSFConfig(target_modules=ATTENTION),
    "GLoRA": lambda: peft.GloraConfig(r=4, target_modules=ATTENTION),
    "PEANuT": lambda: peft.PeanutConfig(r=4, target_modules=ATTENTION),
    "DEFT": lambda: peft.DeftConfig(r=4, target_modules=ATTENTION),
    "AdaMSS": lambda: peft.AdamssConfig(r=4, target_modules=["q_proj"]),
    "SuperTuning": lambda: peft.SupertuningConfig(target_modules=ATTENTION),
}


@pytest.mark.parametrize("config", GENERAL.values(), ids=GENERAL)
def test_any_other_method_gives_what_peft_merges(tmp_path: Path, config: Callable[[], PeftConfig]) -> None:
    assert_merges_as_peft(tmp_path, *trained(tmp_path, config()))


def test_a_method_that_decomposes_the_weight_in_float32_does_so_here(tmp_path: Path) -> None:
    config = peft.PsoftConfig(r=4, target_modules=ATTENTION)
    assert_merges_as_peft(tmp_path, *trained(tmp_path, config, load_as=torch.float32), rtol=1e-6)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("name", ["LoKr", "HRA"])
def test_formulas_are_measured_as_the_model_that_peft_merges(
    tmp_path: Path, name: str, axis: wd.Axis
) -> None:
    base, adapter, merged = trained(tmp_path, (FORMULAS | GENERAL)[name]())
    before = load_file(base)
    metrics = wd.compare(base, {name: adapter}, modules="proj", axis=axis).metrics
    assert len(metrics) == 6
    for row in metrics.itertuples():
        assert row.delta_m == pytest.approx(wd.delta_m(before[row.name], merged[row.name], axis), rel=1e-9)
        assert row.delta_d == pytest.approx(wd.delta_d(before[row.name], merged[row.name], axis), rel=1e-9)
    assert open_checkpoint(adapter).method == name


def test_adalora_stays_low_rank_and_keeps_the_rank_that_each_module_was_left_with(tmp_path: Path) -> None:
    base, adapter, _ = trained(tmp_path, FORMULAS["AdaLoRA"]())
    tensors = load_file(adapter / "adapter_model.safetensors")
    module = "base_model.model.layers.0.q_proj"
    kept = [True, False, False, True]
    for part in ("A", "E"):
        tensors[f"{module}.lora_{part}"] = tensors[f"{module}.lora_{part}"][kept].contiguous()
    tensors[f"{module}.lora_B"] = tensors[f"{module}.lora_B"][:, kept].contiguous()
    save_file(tensors, adapter / "adapter_model.safetensors")
    (update,) = (u for u in open_checkpoint(adapter).updates if u.module == "layers.0.q_proj")
    assert update.rank == 2
    A, B, E = (tensors[f"{module}.lora_{part}"].double() for part in "ABE")
    w0 = load_file(base)["layers.0.q_proj.weight"]
    expected = wd.delta_d(
        w0, w0 + B @ (A * E) * 3 / (4 + 1e-5)
    )  # the scale stays that of the rank at the start
    row = wd.compare(base, adapter, modules=r"layers\.0\.q_proj").metrics.iloc[0]
    assert row.delta_d == pytest.approx(expected, rel=1e-9)


def test_a_module_to_which_peft_gives_nothing_is_named(tmp_path: Path) -> None:
    base, adapter, _ = trained(tmp_path, GENERAL["HRA"]())
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.layers.0.q_proj.hra_u"
    save_file({**tensors, key: torch.ones(9, 4)}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapts layers\.0\.q_proj by HRA, which does not fit"):
        wd.compare(base, adapter, modules="all")


def test_modules_that_depend_on_the_order_of_the_model_are_refused(tmp_path: Path) -> None:
    _, adapter, _ = trained(tmp_path, peft.TinyLoraConfig(target_modules=ATTENTION))
    with pytest.raises(CheckpointError, match=r"type TINYLORA, which deals its vectors out .* in the order"):
        open_checkpoint(adapter)


def test_nothing_that_the_configuration_names_is_run_or_fetched(tmp_path: Path) -> None:
    base, adapter, merged = trained(tmp_path, GENERAL["HRA"]())
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    config["auto_mapping"] = {"base_model_class": "Evil", "parent_library": "no_such_module"}
    config["base_model_name_or_path"] = "somebody/no-such-model"
    path.write_text(json.dumps({**config, "modules_to_save": ["layers"], "revision": "none"}))
    assert_merges_as_peft(tmp_path, base, adapter, merged)


def test_without_peft_the_methods_that_need_it_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter, _ = trained(tmp_path, GENERAL["HRA"]())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(CheckpointError, match=r"type HRA, which PEFT itself is needed to read; install it"):
        open_checkpoint(adapter)


MEMORY_OF_MODULES = """
import resource, sys
import wdanalysis as wd

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

folder = sys.argv[1]
compare = lambda modules: wd.compare(folder + "/base.safetensors", folder + "/adapter", modules=modules)
compare(r"layers\\.[0-5]\\.q_proj")
before = peak()
compare("all")
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_modules_that_peft_merges(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.ModuleDict({"q_proj": nn.Linear(1024, 1024, bias=False)}) for _ in range(40)
            )

    model = get_peft_model(Wide(), peft.HRAConfig(r=4, target_modules=["q_proj"]))
    names = {f"layers.{n}.q_proj.weight": torch.randn(1024, 1024) for n in range(40)}
    save_file(names, tmp_path / "base.safetensors")
    randomised(model).save_pretrained(str(tmp_path / "adapter"))
    run = [sys.executable, "-c", MEMORY_OF_MODULES, str(tmp_path)]
    grown = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert grown < 160 << 20  # of 34 more modules that take 272 MiB in float64, and as much in PEFT's copies

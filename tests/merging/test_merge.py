"""A merged model has the weights that PEFT merges in float64, and nothing else of the base has changed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from checkpoint_files import write_lora
from peft import LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from quantised_files import WEIGHT, gaussian, write_quantised
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

import wdanalysis as wd
from wdanalysis.cli.merge import merge as merge_command
from wdanalysis.decomposition import Axis
from wdanalysis.errors import CheckpointError, ComparisonError, OutputError, WdAnalysisError
from wdanalysis.merging import merged_weights
from wdanalysis.merging.merge import merge
from wdanalysis.training.injection import AdapterConfig, inject
from wdanalysis.training.peft_folder import save_adapter

Weights = dict[str, torch.Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(24, 24), nn.Linear(24, 16)
        self.attn = nn.ModuleDict({"c_attn": Conv1D(30, 24)})
        self.conv = nn.Conv2d(3, 8, 2)


class Model(nn.Module):
    """One module of each kind that is merged, and a buffer that is no float."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(40, 24)
        self.layers = nn.ModuleList([Block() for _ in range(2)])
        self.norm = nn.LayerNorm(24)
        self.register_buffer("position_ids", torch.arange(7))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(tokens)


LINEAR = ["q_proj", "v_proj", "c_attn"]
ALL = [*LINEAR, "conv", "embed_tokens"]
CONFIGS: dict[str, PeftConfig] = {
    "LoRA": LoraConfig(r=4, lora_alpha=6, target_modules=ALL),
    "rsLoRA": LoraConfig(r=4, lora_alpha=6, target_modules=ALL, use_rslora=True),
    "patterns": LoraConfig(
        r=4, target_modules=ALL, rank_pattern={"layers.1.q_proj": 7}, alpha_pattern={"v_proj": 3}
    ),
    "DoRA": LoraConfig(r=4, lora_alpha=6, target_modules=ALL, use_dora=True),
    "VeRA": VeraConfig(r=4, target_modules=LINEAR),
}


CONFIG = {"model_type": "gpt2", "torch_dtype": "float32"}  # c_attn is stored as in × out


def base_weights() -> Weights:
    torch.manual_seed(0)
    return {name: weight.clone() for name, weight in Model().state_dict().items()}


def write_base(folder: Path, weights: Weights, shards: int = 1) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    names = list(weights)
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt", "note": "ours"})
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        share = names[number::shards]
        save_file({name: weights[name] for name in share}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(share, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_adapter(folder: Path, weights: Weights, config: PeftConfig) -> Path:
    """Save an adapter that was moved from its start."""
    model = Model()
    model.load_state_dict(weights)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_magnitude" in name:
                weight.mul_(1 + 0.1 * torch.randn_like(weight))
            elif "lora_" in name or "vera_lambda" in name or "modules_to_save" in name:
                weight.add_(0.1 * torch.randn_like(weight))
    adapted.save_pretrained(str(folder))
    return folder


def merged_by_peft(weights: Weights, adapter: Path) -> Weights:
    model = Model().double()
    model.load_state_dict({name: weight.double() for name, weight in weights.items()})
    return dict(PeftModel.from_pretrained(model, str(adapter)).double().merge_and_unload().state_dict())


@pytest.fixture(params=CONFIGS)
def checkpoints(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Weights]:
    """A base, an adapter, and the weights that PEFT merges of them in float64."""
    weights = base_weights()
    base = write_base(tmp_path / "base", weights)
    adapter = write_adapter(tmp_path / "adapter", weights, CONFIGS[request.param])
    return base, adapter, merged_by_peft(weights, adapter)


@pytest.fixture
def dora(tmp_path: Path) -> tuple[Path, Path]:
    weights = base_weights()
    return (
        write_base(tmp_path / "base", weights),
        write_adapter(tmp_path / "adapter", weights, CONFIGS["DoRA"]),
    )


def test_every_tensor_is_what_peft_merges_in_float64(
    checkpoints: tuple[Path, Path, Weights], tmp_path: Path
) -> None:
    base, adapter, expected = checkpoints
    merge(base, adapter, tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert merged.keys() == expected.keys()
    for name, weight in merged.items():
        assert weight.dtype == (torch.int64 if name == "position_ids" else torch.float32)
        torch.testing.assert_close(weight.double(), expected[name].double(), rtol=1e-6, atol=1e-6, msg=name)


def test_small_blocks_merge_to_the_same_weights(
    checkpoints: tuple[Path, Path, Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, expected = checkpoints
    monkeypatch.setattr(merged_weights, "BLOCK_BYTES", 500)
    merge(base, adapter, tmp_path / "merged")
    for name, weight in load_file(tmp_path / "merged/model.safetensors").items():
        torch.testing.assert_close(weight.double(), expected[name].double(), rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("axis", ["out", "in"])
def test_comparing_the_merged_model_equals_comparing_the_adapter(
    checkpoints: tuple[Path, Path, Weights], tmp_path: Path, axis: Any
) -> None:
    base, adapter, _ = checkpoints
    merge(base, adapter, tmp_path / "merged")
    tuned = {"adapter": adapter, "merged": tmp_path / "merged"}
    metrics = wd.compare(base, tuned, modules="all", axis=axis).metrics
    by_method = {method: rows.set_index("name") for method, rows in metrics.groupby("method")}
    for name, row in by_method["adapter"].iterrows():
        merged = by_method["merged"].loc[name]
        assert merged["delta_m"] == pytest.approx(row["delta_m"], rel=1e-4), name
        assert merged["delta_d"] == pytest.approx(row["delta_d"], rel=1e-4), name


@pytest.mark.parametrize(
    ("option", "dtype"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_the_merged_weight_is_rounded_once_to_the_dtype_asked_for(
    dora: tuple[Path, Path], tmp_path: Path, option: Any, dtype: torch.dtype
) -> None:
    merge(*dora, tmp_path / "exact")
    merge(*dora, tmp_path / "rounded", dtype=option)
    exact = load_file(tmp_path / "exact/model.safetensors")
    for name, weight in load_file(tmp_path / "rounded/model.safetensors").items():
        assert torch.equal(weight, exact[name] if name == "position_ids" else exact[name].to(dtype)), name
    assert json.loads((tmp_path / "rounded/config.json").read_text()) == CONFIG | {"torch_dtype": option}


def test_a_base_in_bfloat16_stays_so_and_is_merged_in_float32(tmp_path: Path) -> None:
    weights = {n: w.bfloat16() if w.is_floating_point() else w for n, w in base_weights().items()}
    base = write_base(tmp_path / "base", weights)
    adapter = write_adapter(tmp_path / "adapter", weights, CONFIGS["DoRA"])
    expected = merged_by_peft(weights, adapter)
    merge(base, adapter, tmp_path / "merged")
    for name, weight in load_file(tmp_path / "merged/model.safetensors").items():
        assert weight.dtype == weights[name].dtype
        if weight.is_floating_point():
            half_ulp = 2.0**-8 * expected[name].abs() * (1 + 1e-4) + 1e-7
            assert ((weight.double() - expected[name]).abs() <= half_ulp).all(), name


def test_shards_metadata_configuration_and_tokenizer_are_the_bases(tmp_path: Path) -> None:
    weights = base_weights()
    base = write_base(tmp_path / "base", weights, shards=3)
    adapter = write_adapter(tmp_path / "adapter", weights, CONFIGS["LoRA"])
    merged = merge(base, adapter, tmp_path / "merged")
    assert [path.name for path in merged.files] == sorted(path.name for path in base.glob("model-*"))
    for path in merged.files:
        assert load_file(path).keys() == load_file(base / path.name).keys()
    index, of_base = (
        json.loads((folder / "model.safetensors.index.json").read_text())
        for folder in (tmp_path / "merged", base)
    )
    assert index["weight_map"] == of_base["weight_map"]
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in weights.values())
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "merged" / name).read_text() == (base / name).read_text()


def test_metadata_of_the_base_is_kept(dora: tuple[Path, Path], tmp_path: Path) -> None:
    merge(*dora, tmp_path / "merged")
    with safe_open(tmp_path / "merged/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "ours"}


def test_a_base_of_torch_save_becomes_safetensors(dora: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = dora
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    merge(base, adapter, tmp_path / "of_safetensors")
    (base / "model.safetensors").unlink()
    merge(base, adapter, tmp_path / "of_bin")
    first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("of_safetensors", "of_bin")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_modules_to_save_replace_the_bases_tensors(tmp_path: Path) -> None:
    weights = base_weights()
    base = write_base(tmp_path / "base", weights)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["v_proj", "norm"])
    adapter = write_adapter(tmp_path / "adapter", weights, config)
    expected = merged_by_peft(weights, adapter)
    report = merge(base, adapter, tmp_path / "merged")
    assert (report.matrices, report.replaced) == (2, 6)
    for name, weight in load_file(tmp_path / "merged/model.safetensors").items():
        torch.testing.assert_close(weight.double(), expected[name].double(), rtol=1e-6, atol=1e-6, msg=name)
    assert not torch.equal(expected["norm.weight"].float(), weights["norm.weight"])


def test_all_zero_rows_stay_zero_and_finite_in_a_merged_dora(tmp_path: Path) -> None:
    weights = base_weights()
    for name in ("layers.0.q_proj.weight", "layers.0.attn.c_attn.weight"):
        weights[name].zero_()
    base = write_base(tmp_path / "base", weights)
    model = Model()
    model.load_state_dict(weights)
    get_peft_model(model, CONFIGS["DoRA"]).save_pretrained(str(tmp_path / "adapter"))  # B is zero: V = W0
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    for name in ("layers.0.q_proj.weight", "layers.0.attn.c_attn.weight"):
        assert (merged[name] == 0).all()
    assert all(weight.isfinite().all() for weight in merged.values())


def llama(tmp_path: Path, *, tied: bool) -> tuple[LlamaForCausalLM, Path]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=32,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    return model, tmp_path / "base"


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_the_merged_model_with_the_adapters_outputs(tmp_path: Path, tied: bool) -> None:
    model, base = llama(tmp_path, tied=tied)
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], use_dora=True, init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = adapted(tokens).logits
    adapted.save_pretrained(str(tmp_path / "adapter"))
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-5)


OURS = {
    "DVoRA": AdapterConfig("dvora", rank=6, targets="q,down"),
    "DoRA along the inputs": AdapterConfig("dora", rank=3, targets="q,down", axis="in"),
    "DVoRA along the inputs": AdapterConfig("dvora", rank=6, targets="q,down", axis="in"),
    "magnitudes alone on some": AdapterConfig("dora", rank=3, targets="q", magnitude_targets="q,o,up"),
}


@pytest.mark.parametrize("config", OURS.values(), ids=OURS)
def test_what_our_training_saves_merges_to_its_outputs(tmp_path: Path, config: AdapterConfig) -> None:
    model, base = llama(tmp_path, tied=False)
    inject(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.rand_like(parameter))
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = model.eval()(tokens).logits
    save_adapter(model, tmp_path / "adapter", base_name=str(base))
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["DoRA along the inputs", "DVoRA along the inputs"])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_magnitudes_along_the_inputs_compare_as_their_merged_model_does(
    tmp_path: Path, kind: str, axis: Axis
) -> None:
    model, base = llama(tmp_path, tied=False)
    inject(model, OURS[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.rand_like(parameter))
    save_adapter(model, tmp_path / "adapter", base_name=str(base))
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    tuned = {"adapter": tmp_path / "adapter", "merged": tmp_path / "merged"}
    compared = wd.compare(base, tuned, axis=axis, modules="q,down", spectra=True)
    for table, columns in (
        (compared.metrics, ["delta_m", "delta_d", "update_norm"]),
        (compared.spectra.matrices, ["update_s1", "tuned_s1", "stable_rank"]),
    ):
        by_method = table.set_index(["method", "name"])[columns]
        pd.testing.assert_frame_equal(by_method.loc["adapter"], by_method.loc["merged"], rtol=1e-4)


MEMORY_OF_MERGING = """
import resource, sys
from pathlib import Path
from wdanalysis.merging.merge import merge

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

folder, before = Path(sys.argv[1]), peak()
merge(folder / "base.safetensors", folder / "adapter.safetensors", folder / "merged", alpha=2, dtype="bfloat16")
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_holds_blocks_and_not_the_model(tmp_path: Path) -> None:
    base = {f"layers.{layer}.q_proj.weight": torch.ones(4096, 2048) for layer in range(4)}
    save_file(base, tmp_path / "base.safetensors")
    factors = {
        f"base_model.model.layers.{layer}.q_proj.lora_{factor}.weight": torch.ones(shape)
        for layer in range(4)
        for factor, shape in (("A", (2, 2048)), ("B", (4096, 2)))
    }
    save_file(factors, tmp_path / "adapter.safetensors")
    command = [sys.executable, "-c", MEMORY_OF_MERGING, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    matrix, model = 4096 * 2048 * 4, 4 * 4096 * 2048 * 4
    assert int(done.stdout) < 2 * matrix < model


# --- what is refused ----------------------------------------------------------------------------------------


def test_a_model_that_is_there_is_replaced_only_by_force(dora: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    merge(*dora, out)
    (out / "stale.txt").write_text("old")
    with pytest.raises(OutputError, match="already holds a model; give force to replace it"):
        merge(*dora, out)
    merge(*dora, out, force=True)
    assert not (out / "stale.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged"]


def test_a_folder_of_something_else_is_never_replaced(dora: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds no model"):
        merge(*dora, tmp_path / "notes", force=True)
    for out in (dora[0], tmp_path):
        with pytest.raises(OutputError, match="which is to be merged"):
            merge(*dora, out, force=True)


def test_what_was_there_stays_when_merging_fails(dora: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    merge(*dora, out)
    before = (out / "model.safetensors").read_bytes()
    tensors = load_file(dora[1] / "adapter_model.safetensors")
    name = next(name for name in tensors if "v_proj.lora_A" in name)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, dora[1] / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"v_proj .* infinite or NaN"):
        merge(*dora, out, force=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged"]


def test_numbers_beyond_float16_are_named(tmp_path: Path) -> None:
    weights = base_weights()
    weights["norm.weight"][0] = 1e5
    base = write_base(tmp_path / "base", weights)
    adapter = write_adapter(tmp_path / "adapter", weights, CONFIGS["LoRA"])
    with pytest.raises(
        CheckpointError, match=r"norm\.weight .* beyond the range of float16; merge as bfloat16"
    ):
        merge(base, adapter, tmp_path / "merged", dtype="float16")


def without(*names: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: weight for name, weight in weights.items() if name not in names}


REFUSED: dict[str, tuple[Callable[[Weights], Weights], dict[str, Any], type[WdAnalysisError], str]] = {
    "a module that is not in the base": (
        without("layers.1.q_proj.weight"), {}, CheckpointError, r"layers\.1\.q_proj, which .* is not in",
    ),
    "a module of another shape": (
        lambda weights: weights | {"layers.0.q_proj.weight": torch.ones(3, 5)}, {}, ComparisonError, "3 × 5",
    ),
    "a quantised module": (
        lambda weights: weights | {"layers.0.q_proj.weight": torch.ones(24, 24, dtype=torch.int8)}, {},
        CheckpointError, r"q_proj\.weight in .* is stored as I8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_named(dora: tuple[Path, Path], tmp_path: Path, case: str) -> None:
    change, settings, error, message = REFUSED[case]
    base, adapter = dora
    save_file(change(load_file(base / "model.safetensors")), base / "model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | settings))
    with pytest.raises(error, match=message):
        merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_base_and_adapter_are_told_apart(dora: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = dora
    with pytest.raises(CheckpointError, match="is an adapter; BASE must be the model"):
        merge(adapter, adapter, tmp_path / "merged")
    with pytest.raises(CheckpointError, match="is no adapter"):
        merge(base, base, tmp_path / "merged")


def test_the_command_says_what_it_merged(dora: tuple[Path, Path], tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(merge_command)
    base, adapter = dora
    result = CliRunner().invoke(
        app, [str(base), str(adapter), str(tmp_path / "merged"), "--dtype", "bfloat16"]
    )
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'merged'}: DoRA merged into 9 matrices" in result.stdout
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert merged["layers.0.q_proj.weight"].dtype == torch.bfloat16


def test_a_quantised_base_is_merged_dequantised(tmp_path: Path) -> None:
    """In the type that its format calculates in, and config.json says no more that it is quantised."""
    codes, scale = gaussian(8, 6).mul(1000).to(torch.float8_e4m3fn), torch.tensor(0.01)
    settings = {"quant_method": "fp8"}
    base = write_quantised(tmp_path / "base", {WEIGHT: codes, f"{WEIGHT}_scale": scale}, settings)
    adapter = write_lora(tmp_path / "lora", {WEIGHT: gaussian(8, 6)})
    merged = merge(base, adapter, tmp_path / "merged")
    A, B = load_file(adapter / "adapter_model.safetensors").values()
    assert any("is quantised; the merged model has the dequantised weights" in note for note in merged.notes)
    weight = load_file(merged.files[0])
    torch.testing.assert_close(weight[WEIGHT], codes.float() * scale + 2 * B @ A)
    assert set(weight) == {WEIGHT}
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())

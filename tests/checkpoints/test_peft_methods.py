"""Every method of PEFT against what PEFT itself merges, in float64: weights and biases, module by module."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from wdanalysis.merging.merge import merge

State = Mapping[str, torch.Tensor]


class Attention(nn.Module):
    """Square and oblong matrices, all with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(16, 16), nn.Linear(16, 8)
        self.down_proj = nn.Linear(24, 16)


class Model(nn.Module):
    """Every kind of module that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(20, 16)
        self.layers = nn.ModuleList([Attention(), Attention()])
        self.h = nn.ModuleList([nn.ModuleDict({"attn": nn.ModuleDict({"c_attn": Conv1D(24, 8)})})])
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(4, 8, 3), nn.Conv2d(4, 8, 3), nn.Conv3d(4, 8, 2)
        self.pointwise = nn.Conv2d(4, 8, 1)
        self.norm = nn.LayerNorm(16)


def randomised(model: nn.Module, seed: int = 1) -> nn.Module:
    """Move every factor away from where it started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def trained(
    folder: Path,
    config: PeftConfig,
    make: Callable[[], nn.Module] = Model,
    load_as: torch.dtype = torch.float64,
) -> tuple[Path, Path, State]:
    """A base in float64, an adapter that PEFT saved, and what PEFT merges from the two in float64."""
    torch.manual_seed(0)
    start = {name: tensor.float() for name, tensor in make().state_dict().items()}
    save_file({name: tensor.double() for name, tensor in start.items()}, folder / "base.safetensors")
    model = make()
    model.load_state_dict(start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = randomised(get_peft_model(model, config))
        adapted.save_pretrained(str(folder / "adapter"))
        exact = make().to(load_as)
        exact.load_state_dict({name: tensor.to(load_as) for name, tensor in start.items()})
        loaded = PeftModel.from_pretrained(
            exact, str(folder / "adapter"), autocast_adapter_dtype=False
        ).double()
        merged = {name: tensor.clone() for name, tensor in loaded.merge_and_unload().state_dict().items()}
    return folder / "base.safetensors", folder / "adapter", merged


def assert_merges_as_peft(folder: Path, base: Path, adapter: Path, merged: State, rtol: float = 1e-9) -> None:
    result = merge(base, adapter, folder / "merged")
    found = load_file(result.files[0])
    assert found.keys() == merged.keys()
    for name, tensor in merged.items():
        np.testing.assert_allclose(found[name].numpy(), tensor.numpy(), rtol=rtol, atol=rtol, err_msg=name)
    before = load_file(base)
    assert any((before[name] != tensor).any() for name, tensor in merged.items())


ATTENTION = ["q_proj", "v_proj", "down_proj"]

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

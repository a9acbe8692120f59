"""Adapters that PEFT makes of a small model with every kind of module, and what PEFT merges from them in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
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
        for module in loaded.modules():  # repeated layers share a weight, into which PEFT merges every update
            if isinstance(
                weight := getattr(getattr(module, "base_layer", None), "weight", None), nn.Parameter
            ):
                module.base_layer.weight = nn.Parameter(weight.detach().clone())
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

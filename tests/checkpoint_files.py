"""Small checkpoints for tests: a LLaMA-like model with two layers, and changed copies of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

ROLES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")
CONFIG = {"model_type": "llama", "num_hidden_layers": 3, "num_attention_heads": 2}


def llama(layers: int = 3, size: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """A LLaMA-like state dict with projections, embeddings and norms."""
    generator = torch.Generator().manual_seed(seed)
    weights = {"model.embed_tokens.weight": torch.randn(20, size, generator=generator)}
    for layer in range(layers):
        for role in ROLES:
            weights[f"model.layers.{layer}.{role}.weight"] = torch.randn(size, size, generator=generator)
        weights[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(size)
    return weights


def moved(
    weights: Mapping[str, torch.Tensor], size: float = 0.01, only: str = "", seed: int = 1
) -> dict[str, torch.Tensor]:
    """A copy in which the tensors whose name contains `only` have moved."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: weight + size * torch.randn(weight.shape, generator=generator)
        if only in name
        else weight.clone()
        for name, weight in weights.items()
    }


def write(path: Path, weights: Mapping[str, torch.Tensor]) -> Path:
    """A safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path)
    return path


def write_model(folder: Path, weights: Mapping[str, torch.Tensor]) -> Path:
    """A Hugging Face folder."""
    write(folder / "model.safetensors", weights)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def write_steps(
    folder: Path, weights: Mapping[str, torch.Tensor], steps: tuple[int, ...] = (10, 20, 30)
) -> Path:
    """A Trainer's folder: at every step the weights are a little farther away."""
    for step in steps:
        write_model(folder / f"checkpoint-{step}", moved(weights, size=step / 1000, seed=step))
    return folder


def write_lora(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    *,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    r: int = 2,
    seed: int = 2,
) -> Path:
    """A PEFT LoRA adapter."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module.endswith(targets):
            out, inputs = weight.shape
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(r, inputs, generator=generator)
            tensors[f"base_model.model.{module}.lora_B.weight"] = 0.01 * torch.randn(
                out, r, generator=generator
            )
    write(folder / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": list(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder

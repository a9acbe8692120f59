"""A model of one quantised matrix, written in any layout, and what we read of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from wdanalysis.checkpoints import open_checkpoint
from wdanalysis.checkpoints.dtypes import to_torch
from wdanalysis.checkpoints.tensors import StoredTensor

MODULE = "model.layers.0.self_attn.q_proj"
WEIGHT = f"{MODULE}.weight"


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Weights like those of a model."""
    return (0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def write_quantised(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any] | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    key: str = "quantization_config",
) -> Path:
    """A Hugging Face folder with these tensors and this quantisation."""
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata=dict(metadata) if metadata else None)
    config = {"model_type": "llama", "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps(config | ({key: dict(settings)} if settings else {})))
    return folder


def read_whole(tensor: StoredTensor) -> torch.Tensor:
    """All rows of a tensor at once."""
    return to_torch(tensor.read_rows(0, tensor.rows)).reshape(tensor.shape)


def read_in_blocks(tensor: StoredTensor, rows: int = 3) -> torch.Tensor:
    """A few rows of a tensor at a time, which must give the same."""
    blocks = [
        to_torch(tensor.read_rows(start, min(start + rows, tensor.rows)))
        for start in range(0, tensor.rows, rows)
    ]
    return torch.cat(blocks).reshape(tensor.shape)


def the_weight(folder: Path, name: str = WEIGHT) -> StoredTensor:
    """The one matrix of a folder."""
    return open_checkpoint(folder).tensors[name]


def check(
    folder: Path, expected: torch.Tensor, precision: str, name: str = WEIGHT, *, rtol: float = 0
) -> StoredTensor:
    """What we read, whole and in blocks, is the very number that the library gives, in its own type."""
    tensor = the_weight(folder, name)
    read = read_whole(tensor)
    assert tensor.precision == precision
    assert tensor.shape == tuple(expected.shape)
    assert read.dtype == expected.dtype
    torch.testing.assert_close(read_in_blocks(tensor), read, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(read, expected, rtol=rtol, atol=0, equal_nan=True)
    return tensor

"""Small models and checkpoints for the tests of reading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def save() -> Callable[..., Path]:
    """Write a checkpoint of one 2 × 2 matrix, filled with `value`, to a file and make its folder."""

    def write(path: Path, value: float = 0.0, name: str = "w") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: torch.full((2, 2), float(value))}
        if path.suffix == ".safetensors":
            save_file(tensors, path)
        else:
            torch.save(tensors, path)
        return path

    return write

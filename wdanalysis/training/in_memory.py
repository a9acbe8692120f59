"""Tensors of a model in memory, described as those of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wdanalysis.checkpoints.tensors import StoredTensor
from wdanalysis.errors import TrainingError

IN_MEMORY = Path("the model in training")
"""Stands for the file."""

STORAGE: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
"""The names of the dtypes that can be measured."""


def stored(name: str, tensor: Tensor) -> StoredTensor:
    """Describe a tensor in memory as one of a checkpoint; its rows are read as they are at that time.

    Raises
    ------
    TrainingError
        It is not of a float dtype of 16 bits or more.
    """
    if tensor.dtype not in STORAGE:
        raise TrainingError(f"{name} is {tensor.dtype}, of which no magnitude and direction can be taken.")

    def read(start: int, stop: int, buffer: NDArray[np.uint8] | None) -> NDArray[Any]:
        rows = (tensor if tensor.ndim else tensor[None])[start:stop].detach().cpu().contiguous()
        rows = rows.reshape(stop - start, -1)
        if rows.dtype == torch.bfloat16:
            bits: NDArray[Any] = rows.view(torch.int16).numpy().view(np.uint16)
            return bits
        floats: NDArray[Any] = rows.numpy()
        return floats

    return StoredTensor(name, tuple(tensor.shape), STORAGE[tensor.dtype], IN_MEMORY, read)

"""Files that `torch.save` wrote (`.bin`, `.pt`, `.pth`, `.ckpt`), read without running code that they hold.

torch is imported when the first such file is opened, and not before. A file in torch's zip format is
memory-mapped, so that rows are paged in when they are read; the older format cannot be mapped and stays in
memory while it is open.
"""

from __future__ import annotations

import pickle
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wdanalysis.checkpoints.dtypes import FLOATS, from_torch, of_torch
from wdanalysis.checkpoints.safetensors_files import is_lfs_pointer
from wdanalysis.checkpoints.storage import LocalFile
from wdanalysis.checkpoints.tensors import StoredTensor, WeightsFile
from wdanalysis.errors import CheckpointError

if TYPE_CHECKING:
    import torch

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training scripts nest the state dict."""

ZIP_MAGIC = b"PK\x03\x04"


def read_torch(path: Path) -> WeightsFile:
    """Describe every tensor of a state dict that `torch.save` wrote, flat or nested under one of `WRAPPERS`.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    CheckpointError
        The file needs code to be read, is truncated or is no state dict.
    """
    import torch

    content: Any = _load(path)
    notes = []
    while isinstance(content, dict) and not any(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if wrapper is None:
            break
        if others := [str(key) for key in content if key != wrapper]:
            notes.append(f"{path.name}: read {wrapper!r} and left out {', '.join(others)}.")
        content = content[wrapper]
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__} instead of a state dict; save `model.state_dict()`."
        )

    readers = {
        str(name): _Rows(path, str(name), value.detach())
        for name, value in content.items()
        if isinstance(value, torch.Tensor) and value.layout is torch.strided
    }
    tensors = {
        name: StoredTensor(name, tuple(rows.tensor.shape), of_torch(rows.tensor.dtype), path, rows, rows.raw)
        for name, rows in readers.items()
    }
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; save `model.state_dict()` instead.")
    if others := [str(name) for name in content if str(name) not in tensors]:
        notes.append(f"{path.name}: left out {', '.join(others)}, which are not dense tensors.")
    return WeightsFile(path, "PyTorch", tensors, notes=tuple(notes))


@dataclass(frozen=True)
class _Rows:
    """`RowReader` of one tensor that torch holds."""

    path: Path
    name: str
    tensor: torch.Tensor

    def __call__(self, start: int, stop: int, buffer: NDArray[np.uint8] | None) -> NDArray[Any]:
        if (dtype := of_torch(self.tensor.dtype)) not in FLOATS:
            raise CheckpointError(
                f"Tensor {self.name!r} in {self.path} is stored as {dtype}, "
                f"and only {', '.join(FLOATS)} can be compared; save it in one of these."
            )
        tensor = self.tensor if self.tensor.dim() else self.tensor.reshape(1)
        rows = tensor[start:stop].contiguous()
        length = int(np.prod(tensor.shape[1:], dtype=np.int64))
        return from_torch(rows).reshape(stop - start, length)

    def in_rows(self, rows: int) -> _Rows | None:
        """The same numbers as so many rows; None where that would be a copy of the tensor."""
        return replace(self, tensor=self.tensor.view(rows, -1)) if self.tensor.is_contiguous() else None

    def raw(self, start: int, stop: int) -> NDArray[np.uint8]:
        """The bytes of rows, of any dtype, in C order."""
        import torch

        rows = (self.tensor if self.tensor.dim() else self.tensor.reshape(1))[start:stop]
        stored: NDArray[np.uint8] = rows.contiguous().reshape(-1).view(torch.uint8).numpy()
        return stored


def _load(path: Path) -> Any:
    import torch

    file = LocalFile(path)
    if is_lfs_pointer(file):
        raise CheckpointError(f"{path} is a Git-LFS pointer and not the file itself; run `git lfs pull`.")
    is_zip = file.read(0, min(file.size, len(ZIP_MAGIC))) == ZIP_MAGIC
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # on the pickle protocol and on TorchScript; both end in an error below
            return torch.load(path, weights_only=True, mmap=is_zip, map_location="cpu")
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to lead to
        needed = (
            re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        )
        if needed or "TorchScript" in str(error):
            what = needed[1].removesuffix(".") if needed else "a TorchScript program"
            raise CheckpointError(
                f"{path} needs code to be read ({what}), so it was not loaded; where you trust it, "
                "load it yourself and save its state dict with `safetensors.torch.save_file`."
            ) from error
        raise CheckpointError(
            f"{path} is truncated, damaged or not written by torch.save; download or save it again."
        ) from error

"""safetensors: an own reader of the header, since rows are read by their byte offset in the file.

The rules are those of the safetensors project's description of the format: eight bytes with the header's
length, the header in JSON, then the tensors in C order without holes or overlaps. What its Rust reader
refuses is refused here; so are names that occur twice, which the description forbids and that reader accepts.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from wdanalysis.checkpoints.dtypes import FLOATS, STORED_TYPES
from wdanalysis.checkpoints.storage import LocalFile
from wdanalysis.checkpoints.tensors import StoredTensor, WeightsFile
from wdanalysis.errors import CheckpointError

MAX_HEADER = 100_000_000
"""Longest header that the format allows, in bytes."""

LFS_POINTER = b"version https://git-lfs"


def read_safetensors(path: Path) -> WeightsFile:
    """Describe every tensor of a safetensors file from its header.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    CheckpointError
        The file is a Git-LFS pointer, is truncated, or breaks a rule of the format.
    """
    file = LocalFile(path)
    header, data_start = _read_header(file)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        _refuse(path, "its __metadata__ does not map strings to strings")

    entries = {name: _Entry.parse(path, name, description) for name, description in header.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            fault = "overlaps the one before it" if entry.begin < end else "leaves a hole before it"
            _refuse(path, f"tensor {name!r} {fault}")
        end = entry.end
    _check_length(file, data_start + end)

    readers = {
        name: _Rows(file, name, entry, offset=data_start + entry.begin) for name, entry in entries.items()
    }
    tensors = {
        name: StoredTensor(name, entry.shape, entry.dtype, path, readers[name], readers[name].raw)
        for name, entry in entries.items()
    }
    return WeightsFile(path, "safetensors", tensors, metadata)


def is_lfs_pointer(file: LocalFile) -> bool:
    """Whether the file is what Git leaves in place of a large file that was not downloaded."""
    return file.read(0, min(file.size, len(LFS_POINTER))) == LFS_POINTER


@dataclass(frozen=True)
class _Entry:
    """A tensor as the header describes it; offsets are relative to the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @classmethod
    def parse(cls, path: Path, name: str, description: Any) -> _Entry:
        match description:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if _are_sizes(
                [*shape, begin, end]
            ):
                pass
            case _:
                _refuse(
                    path, f"the header's entry of tensor {name!r} is not a dtype, a shape and two offsets"
                )
        if dtype not in STORED_TYPES:
            _refuse(path, f"tensor {name!r} has the unknown dtype {dtype}")
        bits = math.prod(shape) * STORED_TYPES[dtype].bits
        if bits != 8 * (end - begin):
            _refuse(
                path,
                f"tensor {name!r} of shape {tuple(shape)} and dtype {dtype} needs {bits / 8:,.10g} bytes, "
                f"but its offsets span {end - begin:,}",
            )
        return cls(dtype, tuple(shape), begin, end)


@dataclass(frozen=True)
class _Rows:
    """`RowReader` of one tensor of a safetensors file."""

    file: LocalFile
    name: str
    entry: _Entry
    offset: int

    def __call__(self, start: int, stop: int, buffer: NDArray[np.uint8] | None) -> NDArray[Any]:
        if self.entry.dtype not in FLOATS:
            raise CheckpointError(
                f"Tensor {self.name!r} in {self.file.path} is stored as {self.entry.dtype}, "
                f"and only {', '.join(FLOATS)} can be compared; save it in one of these."
            )
        storage = np.dtype(FLOATS[self.entry.dtype])
        length = math.prod(self.entry.shape[1:])
        count = (stop - start) * length * storage.itemsize
        if buffer is None or buffer.nbytes < count:
            buffer = np.empty(count, np.uint8)
        self.file.read_into(self.offset + start * length * storage.itemsize, buffer[:count])
        return buffer[:count].view(storage).reshape(stop - start, length)

    def in_rows(self, rows: int) -> _Rows:
        """The same numbers as so many rows."""
        return replace(self, entry=replace(self.entry, shape=(rows, math.prod(self.entry.shape) // rows)))

    def raw(self, start: int, stop: int) -> NDArray[np.uint8]:
        """The bytes of rows, of any dtype."""
        row_bits = math.prod(self.entry.shape[1:]) * STORED_TYPES[self.entry.dtype].bits
        first, last = start * row_bits // 8, stop * row_bits // 8
        stored = np.empty(last - first, np.uint8)
        self.file.read_into(self.offset + first, stored)
        return stored


def _read_header(file: LocalFile) -> tuple[dict[str, Any], int]:
    """Return the header, and the offset at which the tensors begin."""
    if is_lfs_pointer(file):
        raise CheckpointError(
            f"{file.path} is a Git-LFS pointer and not the file itself; run `git lfs pull`."
        )
    if file.size < 8:
        _refuse(file.path, f"it has {file.size} bytes, too few for a header")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_HEADER:
        _refuse(file.path, f"its header would have {length:,} bytes, and the format allows {MAX_HEADER:,}")
    _check_length(file, 8 + length, exact=False)
    try:
        header = json.loads(
            file.read(8, length).decode(), object_pairs_hook=_unique, parse_constant=_not_in_json
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file.path} is not a valid safetensors file: its header cannot be parsed ({error}); "
            "download or save it again."
        ) from error
    if not isinstance(header, dict):
        _refuse(file.path, "its header is not a JSON object")
    return header, 8 + length


def _check_length(file: LocalFile, expected: int, *, exact: bool = True) -> None:
    missing = expected - file.size
    if missing > 0:
        raise CheckpointError(
            f"{file.path} is truncated: {missing:,} of {expected:,} bytes are missing; "
            "download or save it again."
        )
    if missing < 0 and exact:
        _refuse(file.path, f"{-missing:,} bytes follow its last tensor")


def _are_sizes(values: list[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 2**64 for value in values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"the name {key!r} occurs twice")
        mapping[key] = value
    return mapping


def _not_in_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _refuse(path: Path, reason: str) -> NoReturn:
    raise CheckpointError(f"{path} is not a valid safetensors file: {reason}; download or save it again.")

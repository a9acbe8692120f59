"""A quantised weight, block by block: its codes, what they stand for, and how far apart those numbers are.

Every format stores a code of few bits for each element and a scale for a group of them:

    w = (level(code) − zero) · scale + offset

where level(code) is the code itself, or its entry in a table (`CodeBook`). A number that is stored in such a format is
moved to the nearest one that the codes can stand for; if it lay anywhere between its neighbours with the same
probability, its error has the variance step²/12, with the step that `Block.steps` gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from wdanalysis.checkpoints.dtypes import FLOATS, narrow, widen
from wdanalysis.checkpoints.quantised.packing import float_values
from wdanalysis.checkpoints.tensors import StoredTensor
from wdanalysis.errors import CheckpointError

Floats = NDArray[np.float32]
Codes = NDArray[Any]
T = TypeVar("T")

_NUMPY = {
    **{"U8": np.uint8, "I8": np.int8, "BOOL": np.uint8, "I16": np.int16, "U16": np.uint16, "I32": np.int32},
    **{"U32": np.uint32, "I64": np.int64, "U64": np.uint64},
    **{"F8_E4M3": np.uint8, "F8_E5M2": np.uint8, "F8_E4M3FNUZ": np.uint8, "F8_E5M2FNUZ": np.uint8},
    "F8_E8M0": np.uint8,
}


@dataclass(frozen=True)
class CodeBook:
    """A table of levels.

    Attributes
    ----------
    levels
        By code.
    steps
        By code: the step that gives the mean squared error of what is rounded to this level, √12 · rms.
    """

    levels: Floats
    steps: Floats

    @classmethod
    def of(cls, levels: Floats) -> CodeBook:
        """Every level takes what is nearer to it than to its neighbours: from c − a to c + b.

        If that is even over the cell, the mean squared error is (a³ + b³) / 3(a + b). The outermost levels have a
        cell on their inner side only.
        """
        finite = np.unique(levels[np.isfinite(levels)]).astype(np.float64)
        half = np.diff(finite) / 2
        a, b = np.append(0, half), np.append(half, 0)
        steps = np.sqrt(np.divide(4 * (a**3 + b**3), a + b, out=np.zeros_like(a), where=a + b > 0))
        at = np.clip(np.searchsorted(finite, levels), 0, max(len(finite) - 1, 0))
        of_codes = (
            np.where(np.isfinite(levels), steps[at], np.nan) if len(finite) else np.full(levels.shape, np.nan)
        )
        return cls(levels, of_codes.astype(np.float32))


@dataclass(frozen=True)
class Block:
    """Some rows of a quantised weight; all arrays broadcast against the codes.

    Attributes
    ----------
    codes
        rows × length, or with more dimensions.
    scale, zero, offset
        As in the equation above.
    book
        What the codes stand for; None where that is their own value.
    rounded_to
        The type to which level − zero is rounded before it is scaled (HQQ); exact where empty.
    """

    codes: Codes
    scale: Floats
    zero: Floats | float = 0.0
    offset: Floats | float = 0.0
    book: CodeBook | None = None
    rounded_to: str = ""

    def values(self) -> Floats:
        """The numbers, in float32."""
        levels = self.codes.astype(np.float32) if self.book is None else self.book.levels[self.codes]
        with np.errstate(over="ignore", invalid="ignore"):
            levels = levels - self.zero
            if self.rounded_to:
                levels = widen(narrow(levels, self.rounded_to), np.float32)
            values = levels * self.scale + self.offset
        return np.asarray(values, np.float32)

    def steps(self) -> Floats:
        """How far apart the numbers are around each."""
        steps = np.float32(1) if self.book is None else self.book.steps[self.codes]
        return np.asarray(np.broadcast_to(np.abs(steps * self.scale), self.codes.shape), np.float32)


@dataclass(frozen=True)
class QuantisedWeight:
    """A weight that a checkpoint stores quantised.

    Attributes
    ----------
    name, shape
        Of the weight that it stands for.
    dtype
        In which the format calculates.
    precision
        The format, as the table names it: ``NF4``, ``GPTQ-4`` …
    parts
        The tensors that it is stored in.
    rows
        Returns rows `start:stop` of the first dimension.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    precision: str
    parts: tuple[StoredTensor, ...]
    rows: Callable[[int, int], Block]

    def tensor(self) -> StoredTensor:
        """The weight as a tensor that is dequantised when it is read."""
        reader = _Rows(self)
        return StoredTensor(
            name=self.name,
            shape=self.shape,
            dtype=self.dtype,
            path=self.parts[0].path,
            reader=reader,
            stored_as=self.precision,
            steps=reader.steps,
        )


@dataclass(frozen=True)
class _Rows:
    """`RowReader` of a quantised weight."""

    weight: QuantisedWeight

    def __call__(self, start: int, stop: int, buffer: NDArray[np.uint8] | None) -> NDArray[Any]:
        return narrow(self._flat(self._block(start, stop).values(), start, stop), self.weight.dtype)

    def steps(self, start: int, stop: int) -> Floats:
        return self._flat(self._block(start, stop).steps(), start, stop)

    def _block(self, start: int, stop: int) -> Block:
        try:
            return self.weight.rows(start, stop)
        except (ValueError, IndexError) as error:
            raise misfit(self.weight.parts[0], self.weight.precision, str(error)) from error

    def _flat(self, block: Floats, start: int, stop: int) -> Floats:
        return np.ascontiguousarray(block).reshape(stop - start, math.prod(self.weight.shape[1:]))


class Kept(Generic[T]):
    """What every block of a weight needs: read with its first row, and let go with its last."""

    def __init__(self, rows: int, read: Callable[[], T]) -> None:
        self._rows, self._read = rows, read
        self._lock = Lock()
        self._kept: T | None = None

    def until(self, stop: int) -> T:
        """Return it for a block that ends with row `stop`."""
        with self._lock:
            kept = self._read() if self._kept is None else self._kept
            self._kept = None if stop >= self._rows else kept
            return kept


def turned(tensor: StoredTensor) -> StoredTensor:
    """Return a matrix transposed, which is read whole with its first rows."""
    columns, rows = tensor.shape

    def kept_whole(read: Callable[[int, int], NDArray[Any]]) -> Callable[[int, int], NDArray[Any]]:
        whole = Kept(rows, lambda: np.ascontiguousarray(read(0, columns).T))
        return lambda start, stop: whole.until(stop)[start:stop]

    values = kept_whole(tensor.read_rows)
    return replace(
        tensor,
        shape=(rows, columns),
        reader=lambda start, stop, buffer: values(start, stop),
        steps=None if tensor.steps is None else kept_whole(tensor.steps),
    )


def codes_of(tensor: StoredTensor, start: int = 0, stop: int | None = None) -> Codes:
    """Read rows of a tensor of integers or small floats as the integers that are stored."""
    stop = tensor.rows if stop is None else stop
    if tensor.dtype not in _NUMPY:
        raise misfit(tensor, "a quantised weight", f"its type is {tensor.dtype}")
    return tensor.read_bytes(start, stop).view(_NUMPY[tensor.dtype]).reshape(-1, *tensor.shape[1:])


def floats_of(tensor: StoredTensor, start: int = 0, stop: int | None = None) -> Floats:
    """Read rows of a small tensor of any type as the numbers that it holds."""
    stop = tensor.rows if stop is None else stop
    if tensor.dtype in FLOATS:
        return (
            widen(tensor.read_rows(start, stop), np.float64).astype(np.float32).reshape(-1, *tensor.shape[1:])
        )
    codes = codes_of(tensor, start, stop)
    return float_values(tensor.dtype)[codes] if tensor.dtype.startswith("F") else codes.astype(np.float32)


def spread(groups: Floats, length: int, group: int | None = None) -> Floats:
    """Give every element of a row the number of its group, along the last axis; one for all stays one.

    >>> spread(np.array([[1.0, 2.0]], np.float32), 3, 2)
    array([[1., 1., 2.]], dtype=float32)
    """
    if groups.shape[-1] == 1:
        return groups
    group = group or -(-length // groups.shape[-1])
    return np.repeat(groups, group, axis=-1)[..., :length]


def misfit(tensor: StoredTensor, what: str, reason: str) -> CheckpointError:
    """The error where the parts of a quantised weight do not fit together."""
    return CheckpointError(
        f"{tensor.name} in {tensor.path} looks like a part of {what}, but {reason}; download or save it again."
    )

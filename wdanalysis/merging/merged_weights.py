"""Eq. 1 and Eq. 5 of a stored matrix, a block of rows at a time: what merging an adapter computes.

In float32, or float64 where the base is stored so. Memory holds a block and the adapter's factors.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from wdanalysis.checkpoints.dtypes import to_torch, working_type
from wdanalysis.checkpoints.tensors import LowRankUpdate, StoredTensor
from wdanalysis.kernels.rescale import rescaling

BLOCK_BYTES = 1 << 23
"""How much of a stored matrix is in memory at once."""


def merged_blocks(source: StoredTensor, update: LowRankUpdate, *, in_by_out: bool) -> Iterator[Tensor]:
    """Yield W' in blocks of stored rows: V = W0 + s·BA (Eq. 1), and with a magnitude m·V/‖V‖ (Eq. 5).

    Parameters
    ----------
    source
        W0, as stored.
    update
        Of the same shape.
    in_by_out
        Whether W0 is stored as in × out, so that it gets (BA)ᵀ.
    """
    work = _working_dtype(source)
    A = widened(update.A).to(work)
    B = widened(update.B).reshape(-1, update.rank).to(work)
    rows, columns = (A.T, B.T) if in_by_out else (B, A)  # W0 is stored transposed: (BA)ᵀ = Aᵀ Bᵀ

    def directions() -> Iterator[tuple[slice, Tensor]]:
        start = 0
        for block in wide_blocks(source):
            place = slice(start, start + len(block))
            yield place, torch.addmm(block, rows[place], columns, alpha=update.scale)
            start = place.stop

    if update.magnitude is None:
        yield from (V for _, V in directions())
        return
    m = widened(update.magnitude).reshape(-1).to(work)
    vectors_are_rows = (update.magnitude_axis == "out") != in_by_out
    if vectors_are_rows:
        yield from (V * _rescaling(m[place], V.norm(dim=1))[:, None] for place, V in directions())
    else:  # the norm of a column takes a pass over all rows
        squares = torch.zeros(source.row_length, dtype=torch.float64)
        for _, V in directions():
            squares += V.double().square().sum(dim=0)
        factors = _rescaling(m, squares.sqrt().to(work))
        yield from (V * factors for _, V in directions())


def _rescaling(magnitude: Tensor, norm: Tensor) -> Tensor:
    return torch.from_numpy(rescaling(magnitude.numpy(), norm.numpy()))


def wide_blocks(source: StoredTensor) -> Iterator[Tensor]:
    """Yield the numbers of a stored tensor, in blocks of rows."""
    for start, stop in row_ranges(source):
        yield widened(source, start, stop)


def widened(tensor: StoredTensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Return rows of a stored tensor, all by default, in float32, or float64 where it is stored so."""
    return to_torch(tensor.read_rows(start, tensor.rows if stop is None else stop)).to(_working_dtype(tensor))


def _working_dtype(tensor: StoredTensor) -> torch.dtype:
    return torch.float64 if working_type(tensor.dtype) is np.float64 else torch.float32


def row_ranges(tensor: StoredTensor) -> Iterator[tuple[int, int]]:
    """Yield the first and last row (half-open) of each block."""
    step = max(1, BLOCK_BYTES // max(tensor.row_length * tensor.itemsize, 1))
    for start in range(0, tensor.rows, step):
        yield start, min(start + step, tensor.rows)

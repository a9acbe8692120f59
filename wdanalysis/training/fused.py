"""What a magnitude adds to a linear layer, each in one Triton kernel and one pass over the activations.

Without Triton, `functional` does the same with PyTorch's own operations.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

TILE = 8192
"""Elements that a program has in hand at once."""


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["scale", "bias"])  # type: ignore[untyped-decorator, unused-ignore]
def _scale_kernel(  # type: ignore[no-untyped-def]
    y, scale, bias, rows, columns, HAS_BIAS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    c = tl.load(scale + column, mask=column < columns, other=0.0)[None, :]
    value = c * tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b = tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
        value += b * (1 - c)
    tl.store(y + at, value, mask=inside)


@triton.jit(  # type: ignore[untyped-decorator, unused-ignore]
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=["bias", "scale", "divisor", "d_magnitude"],
)
def _through_magnitude_kernel(  # type: ignore[no-untyped-def]
    g,
    y,
    bias,
    scale,
    divisor,
    scaled,
    d_magnitude,
    rows,
    columns,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = column < columns
    c = tl.load(scale + column, mask=exists, other=0.0)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.float32)
    if HAS_BIAS:
        b = tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)[None, :]
    for start in range(0, rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        at = row[:, None].to(tl.int64) * columns + column[None, :]
        inside = (row[:, None] < rows) & exists[None, :]
        g_tile = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        y_tile = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y_tile -= b
        total += g_tile * y_tile
        tl.store(scaled + at, g_tile * c, mask=inside)
    by = tl.load(divisor + column, mask=exists, other=1.0)
    tl.store(d_magnitude + column, tl.sum(total, axis=0) / by, mask=exists)


def scale_(y: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """In place, y ← c ⊙ (y − b) + b of rows y = V′x + b, with one rounding; to the last bit y where c = 1.

    Parameters
    ----------
    y
        (rows, features), contiguous.
    scale, bias
        c in float32 and b, (features,).
    """
    rows, columns = y.shape
    if rows:
        grid = (-(-rows // 16), -(-columns // 256), 1)
        _launch(_scale_kernel, grid, 4, y, scale, bias, rows, columns, bias is not None, 16, 256)


def through_magnitude(
    g: Tensor, y: Tensor, bias: Tensor | None, scale: Tensor, divisor: Tensor
) -> tuple[Tensor, Tensor]:
    """Return c ⊙ g in g's dtype and Σ_t g_t ⊙ (y_t − b) / divisor in float32, the same on every run.

    Parameters
    ----------
    g, y
        (rows, features), contiguous.
    bias, scale, divisor
        b, and c and the divisor in float32, (features,).
    """
    rows, columns = g.shape
    block = 16 if columns <= 2048 else 32 if columns <= 4096 else 64
    scaled, d_magnitude = torch.empty_like(g), torch.empty_like(divisor)
    arguments = (g, y, bias, scale, divisor, scaled, d_magnitude, rows, columns)
    constants = (bias is not None, TILE // block, block)
    _launch(_through_magnitude_kernel, (-(-columns // block), 1, 1), 8, *arguments, *constants)
    return scaled, d_magnitude


_compiled: dict[Hashable, Any] = {}


def _launch(kernel: Any, grid: tuple[int, int, int], num_warps: int, first: Tensor, *rest: Any) -> None:
    """Launch a kernel on the device of `first`.

    Triton looks at every argument of every launch to see which variant of the kernel fits, which takes longer than
    these kernels run. What it looks at is the key here: dtype, row length and alignment.
    """
    if first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            return _launch(kernel, grid, num_warps, first, *rest)
    arguments = (first, *rest)
    pointers = [t.data_ptr() for t in arguments if isinstance(t, Tensor) and t.dtype == first.dtype]
    aligned = all(pointer % 16 == 0 for pointer in pointers)
    key = (id(kernel), first.device.index, first.dtype, first.shape[-1], rest[-3], aligned)
    compiled = _compiled.get(key) if aligned else None
    if compiled is not None:
        compiled[grid](*arguments)
    else:
        _compiled[key] = kernel[grid](*arguments, num_warps=num_warps)
    return None

"""What a magnitude adds to a linear layer, each in one Triton kernel and one pass over the activations.

Without Triton, `functional` does the same with PyTorch's own operations.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

TILE = 8192
"""Elements that a program has in hand at once."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
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


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _through_magnitude_kernel(  # type: ignore[no-untyped-def]
    g,
    y,
    bias,
    scale,
    magnitude,
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
    m = tl.load(magnitude + column, mask=exists, other=1.0)
    tl.store(d_magnitude + column, tl.sum(total, axis=0) / m, mask=exists)


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
    if y.numel():
        grid = (triton.cdiv(rows, 16), triton.cdiv(columns, 256))
        _scale_kernel[grid](
            y, scale, bias, rows, columns, HAS_BIAS=bias is not None, BLOCK_ROWS=16, BLOCK=256
        )


def through_magnitude(
    g: Tensor, y: Tensor, bias: Tensor | None, scale: Tensor, magnitude: Tensor
) -> tuple[Tensor, Tensor]:
    """Return c ⊙ g in g's dtype and Σ_t g_t ⊙ (y_t − b) / m in float32, the same on every run.

    Parameters
    ----------
    g, y
        (rows, features), contiguous.
    bias, scale, magnitude
        b, and c and m in float32, (features,).
    """
    rows, columns = g.shape
    block = 16 if columns <= 1024 else 32 if columns <= 4096 else 64
    scaled = torch.empty_like(g)
    d_magnitude = torch.empty_like(magnitude)
    grid: Any = (triton.cdiv(columns, block),)
    _through_magnitude_kernel[grid](
        g,
        y,
        bias,
        scale,
        magnitude,
        scaled,
        d_magnitude,
        rows,
        columns,
        HAS_BIAS=bias is not None,
        BLOCK_ROWS=TILE // block,
        BLOCK=block,
        num_warps=8,
    )
    return scaled, d_magnitude

"""What a magnitude adds to a linear layer, each in one Triton kernel and one pass over what it is about.

Without Triton, `functional` and `preparation` do the same with PyTorch's own operations.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from wdanalysis.training.fast.numerics import matmul_float32

TILE = 4096
"""Elements of an activation that a program of the backward pass has in hand at once."""

HIGHEST_RANK = 64
"""Up to this rank gᵀh is summed in the pass that ∇m takes; of more it would be the slower product."""


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["bias", "scale"])  # type: ignore[untyped-decorator, unused-ignore]
def _scale_kernel(  # type: ignore[no-untyped-def]
    y,
    h,
    B,
    bias,
    scale,
    rows,
    columns,
    RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    value = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    if RANK:
        update = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.float32)
        for start in range(0, RANK, BLOCK_RANK):
            k = start + tl.arange(0, BLOCK_RANK)
            h_at = row[:, None].to(tl.int64) * RANK + k[None, :]
            h_tile = tl.load(h + h_at, mask=(row[:, None] < rows) & (k[None, :] < RANK), other=0.0)
            B_at = column[None, :] * RANK + k[:, None]
            B_tile = tl.load(B + B_at, mask=(column[None, :] < columns) & (k[:, None] < RANK), other=0.0)
            update = tl.dot(h_tile, B_tile, update)
        value += update
    c = tl.load(scale + column, mask=column < columns, other=0.0)[None, :]
    value *= c
    if bias is not None:
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
    h,
    B,
    scaled,
    d_B,
    partial,
    bias,
    scale,
    divisor,
    d_magnitude,
    arrivals,
    rows,
    columns,
    RANK: tl.constexpr,
    LACKS_UPDATE: tl.constexpr,
    SUMS_GH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    part = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_RANK)
    exists = column < columns
    c = tl.load(scale + column, mask=exists, other=0.0)
    gy = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.float32)
    gh = tl.zeros((BLOCK, BLOCK_RANK), dtype=tl.float32)
    if bias is not None:
        b = tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)[None, :]
    for start in range(part * BLOCK_ROWS, rows, PARTS * BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        at = row[:, None].to(tl.int64) * columns + column[None, :]
        inside = (row[:, None] < rows) & exists[None, :]
        g_tile = tl.load(g + at, mask=inside, other=0.0)
        y_tile = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            y_tile -= b
        if SUMS_GH:
            h_at = row[:, None].to(tl.int64) * RANK + k[None, :]
            h_tile = tl.load(h + h_at, mask=(row[:, None] < rows) & (k[None, :] < RANK), other=0.0)
            gh = tl.dot(tl.trans(g_tile), h_tile, gh)
        gy += g_tile.to(tl.float32) * y_tile
        tl.store(scaled + at, g_tile.to(tl.float32) * c[None, :], mask=inside)
    tl.store(partial + part * columns + column, tl.sum(gy, axis=0), mask=exists)
    B_at = column[:, None] * RANK + k[None, :]
    partial_gh = partial + PARTS * columns
    if SUMS_GH:
        in_B = exists[:, None] & (k[None, :] < RANK)
        tl.store(partial_gh + part * columns * RANK + B_at, gh, mask=in_B)
    tl.debug_barrier()
    if tl.atomic_add(arrivals + tl.program_id(0), 1) == PARTS - 1:
        along_y = tl.zeros((BLOCK,), dtype=tl.float32)
        for other in tl.static_range(PARTS):
            along_y += tl.load(
                partial + other * columns + column, mask=exists, other=0.0, cache_modifier=".cg"
            )
        if RANK:
            for first in tl.static_range(0, RANK, BLOCK_RANK):
                in_B = exists[:, None] & (first + k[None, :] < RANK)
                if SUMS_GH:
                    gh = tl.zeros((BLOCK, BLOCK_RANK), dtype=tl.float32)
                    for other in tl.static_range(PARTS):
                        gh_at = partial_gh + other * columns * RANK + B_at
                        gh += tl.load(gh_at, mask=in_B, other=0.0, cache_modifier=".cg")
                else:
                    gh = tl.load(d_B + first + B_at, mask=in_B, other=0.0)
                if LACKS_UPDATE:
                    B_tile = tl.load(B + first + B_at, mask=in_B, other=0.0).to(tl.float32)
                    along_y += tl.sum(gh * B_tile, axis=1)
                tl.store(d_B + first + B_at, gh * c[:, None], mask=in_B)
        by = tl.load(divisor + column, mask=exists, other=1.0)
        tl.store(d_magnitude + column, along_y / by, mask=exists)
        tl.store(arrivals + tl.program_id(0), 0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _norms_kernel(  # type: ignore[no-untyped-def]
    addresses,
    squares,
    G,
    F,
    norms,
    vectors,
    length,
    RANK: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_LENGTH: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    matrix = tl.program_id(1).to(tl.int64)
    vector = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = vector < vectors
    W0 = tl.load(addresses + matrix).to(tl.pointer_type(G.dtype.element_ty))
    if ALIGNED:
        W0 = tl.multiple_of(W0, 16)
    W0 += vector[:, None].to(tl.int64) * length
    G += (matrix * vectors + vector[:, None]) * RANK
    F += matrix * RANK * length
    change = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, length, BLOCK_LENGTH):
        i = start + tl.arange(0, BLOCK_LENGTH)
        inside = exists[:, None] & (i[None, :] < length)
        w0 = tl.load(W0 + i[None, :], mask=inside, other=0.0)
        update = tl.zeros((BLOCK, BLOCK_LENGTH), dtype=tl.float32)
        for first in range(0, RANK, BLOCK_RANK):
            k = first + tl.arange(0, BLOCK_RANK)
            G_tile = tl.load(G + k[None, :], mask=exists[:, None] & (k[None, :] < RANK), other=0.0)
            F_at = k[:, None] * length + i[None, :]
            F_tile = tl.load(F + F_at, mask=(k[:, None] < RANK) & (i[None, :] < length), other=0.0)
            update = tl.dot(G_tile, F_tile, update)
        change += tl.sum(update * (2 * w0.to(tl.float32) + update), axis=1)
    at = matrix * vectors + vector
    square = tl.load(squares + at, mask=exists, other=0.0) + change
    tl.store(norms + at, tl.sqrt_rn(tl.where(square < 0, 0.0, square)), mask=exists)


def scale_(
    y: Tensor, scale: Tensor, bias: Tensor | None, h: Tensor | None = None, B: Tensor | None = None
) -> None:
    """In place, y ← c ⊙ (y + Bh − b) + b, rounded once; to the last bit y where Bh = 0 and c = 1 (Eq. 5).

    Parameters
    ----------
    y
        (rows, features), contiguous: V′x + b, or what Bh is missing from.
    scale, bias
        c in float32 and b, (features,).
    h, B
        (rows, r) and (features, r), contiguous, of 16 bits; None where there is nothing to add.
    """
    rows, columns = y.shape
    rank, block_rows, block, num_warps = (0, 16, 256, 4) if h is None else (h.shape[1], 64, 128, 4)
    if rows:
        grid = (-(-rows // block_rows), -(-columns // block), 1)
        numbers = (columns, rank, block_rows, block, _block_rank(rank))
        _launch(_scale_kernel, grid, num_warps, (y, h, B), bias, (scale,), rows, *numbers)


def through_magnitude(
    g: Tensor,
    y: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    divisor: Tensor,
    h: Tensor | None = None,
    B: Tensor | None = None,
    *,
    lacks_update: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return c ⊙ g, ∇m = Σ_t g_t ⊙ (y_t − b) / divisor (Eq. 7) and ∇B = Σ_t (c ⊙ g_t) h_tᵀ (Eq. 11).

    The sums are float32, and the same on every run.

    Parameters
    ----------
    g, y
        (rows, features), contiguous.
    bias, scale, divisor
        b, and c and the divisor in float32, (features,).
    h, B
        As in `scale_`; without them there is no ∇B.
    lacks_update
        Whether y is W0 x alone; then Σ_k B_jk (Σ_t g_tj h_tk) is added for BAx.
    """
    rows, columns = g.shape
    rank = 0 if h is None else h.shape[1]
    if h is not None and rank > HIGHEST_RANK and not lacks_update:
        scaled, d_magnitude, _ = through_magnitude(g, y, bias, scale, divisor)
        return scaled, d_magnitude, matmul_float32(scaled.t(), h)
    sums_gh = 0 < rank <= HIGHEST_RANK
    scaled, d_magnitude, d_B = torch.empty_like(g), torch.empty_like(divisor), None
    if h is not None:
        d_B = divisor.new_empty(columns, rank) if sums_gh else matmul_float32(g.t(), h)
    block = 32 if rank else 64
    blocks, parts = -(-columns // block), _parts(rows, columns, block)
    arrivals, partial = _workspace(g.get_device(), parts * columns * (1 + rank * sums_gh))
    tiles, vectors = (g, y, h, B, scaled, d_B, partial), (scale, divisor, d_magnitude, arrivals)
    numbers = (columns, rank, lacks_update, sums_gh, parts, TILE // block, block, _block_rank(rank))
    _launch(_through_magnitude_kernel, (blocks, parts, 1), 4, tiles, bias, vectors, rows, *numbers)
    return scaled, d_magnitude, d_B


def norms_of_sum(matrices: Sequence[Tensor], squares: Tensor, G: Tensor, F: Tensor) -> Tensor:
    """‖w0 + F g‖ of each vector, without the sum: ‖w0‖² + Δw·(2 w0 + Δw), under the root.

    Parameters
    ----------
    matrices
        W0 of n modules, (vectors, length), contiguous, of 16 bits.
    squares
        ‖w0‖² of each vector in float32, (n, vectors).
    G, F
        As in `functional.norms_of_sum`, in the dtype of W0.
    """
    n, vectors, rank = G.shape
    G, F = G.contiguous(), F.mT.contiguous()
    addresses = tuple(matrix.data_ptr() for matrix in matrices)
    aligned = all(address % 16 == 0 for address in addresses)
    norms = torch.empty_like(squares)
    block, block_length = 64, 64 if rank <= HIGHEST_RANK else 128
    with torch.cuda.device(G.device):
        _norms_kernel[-(-vectors // block), n](
            *(_on_device(addresses, G.device), squares, G, F, norms, vectors, F.shape[-1]),
            *(rank, aligned, block, block_length),
            _block_rank(rank),
        )
    return norms


@cache
def _block_rank(rank: int) -> int:
    return min(64, max(16, 1 << (rank - 1).bit_length()))


@lru_cache(maxsize=1024)
def _parts(rows: int, columns: int, block: int) -> int:
    """How many programs share the rows of a block of columns, so that every multiprocessor has some."""
    parts = 1
    while parts < 16 and parts * columns < 512 * block and parts * (TILE // block) < rows:
        parts *= 2
    return parts


def _workspace(device: int, size: int) -> tuple[Tensor, Tensor]:
    """Return `_stream_workspace` of the current stream, on which kernels that share it come one after another."""
    return _stream_workspace(device, triton.runtime.driver.active.get_current_stream(device), size)


@lru_cache(maxsize=64)
def _stream_workspace(device: int, stream: int, size: int) -> tuple[Tensor, Tensor]:
    """A count of finished programs for each block of columns, 0 between launches, and float32 numbers."""
    place = torch.device("cuda", device)
    return torch.zeros(2**16, dtype=torch.int32, device=place), torch.empty(size, device=place)


@lru_cache(maxsize=1024)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers on the device; kept, because to bring them there waits for it."""
    return torch.tensor(numbers, dtype=torch.int64, device=device)


_compiled: dict[Hashable, Any] = {}


def _launch(
    kernel: Any,
    grid: tuple[int, int, int],
    num_warps: int,
    tiles: tuple[Tensor, *tuple[Tensor | None, ...]],
    bias: Tensor | None,
    vectors: tuple[Tensor, ...],
    rows: int,
    *numbers: int,
) -> None:
    """Launch a kernel that takes all this in this order, on the device of `vectors`.

    Triton looks at every argument of every launch to see which variant of the kernel fits, which takes longer than
    these kernels run. What it looks at is the key here: dtypes, numbers and the alignment of the tiles.
    """
    device = vectors[0].get_device()
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _launch(kernel, grid, num_warps, tiles, bias, vectors, rows, *numbers)
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (*tiles, bias, *vectors)]
    aligned = not any(map((15).__and__, addresses[: len(tiles)]))
    key = (id(kernel), device, tiles[0].dtype, None if bias is None else bias.dtype, numbers)
    compiled = _compiled.get(key) if aligned else None
    if compiled is not None:
        compiled[grid](*addresses, rows, *numbers)
    else:
        compiled = kernel[grid](*tiles, bias, *vectors, rows, *numbers, num_warps=num_warps)
        if aligned:
            _compiled[key] = compiled
    return None

"""One pass over two stored matrices: the three sums of every vector, and what rounding alone would do.

The loops read the stored 16, 32 or 64 bits, widen in registers and add up in float64; there is no float32 copy of a
matrix. Numba compiles one version for each pair of storage types that is met, and keeps it on disk.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.extending import overload
from numpy.typing import NDArray

from wdanalysis.checkpoints.dtypes import STORED_TYPES, bfloat16_value

# The rows of the array of sums. The last two do not enter Eq. 3 and 4, but come with the same bytes.
A, P, Q, ULP2, UNCHANGED = range(5)
SUMS = 5
"""a = Σ w₀², p = Σ w₀·d, q = Σ d², Σ ulp(w)², and the number of elements with w = w₀: for each vector."""

_COLUMNS_AT_ONCE = 1024  # five float64 sums of so many columns stay in the first-level cache

# ulp(w) = 2^(exponent of w − fraction bits), and below the smallest normal number it stays what it is there.
_FRACTION_BITS = {
    np.dtype(stored.storage): stored.fraction_bits for stored in STORED_TYPES.values() if stored.storage
}
_SMALLEST_NORMAL = {"float16": np.float32(2.0**-14), "float32": np.float32(2.0**-126), "float64": 2.0**-1022}


def _value(stored):
    """Value of one stored element in float32, or in float64 where it is stored so (compiled code only)."""


def _power(stored):
    """2^exponent of one stored element, at least that of the smallest normal number (compiled code only)."""


@overload(_value)
def _value_of(stored):
    if stored == numba.uint16:  # bfloat16, its bits
        return lambda stored: _bfloat16_value(stored)  # noqa: PLW0108 - numba compiles a lambda, not a dispatcher
    if stored == numba.int16:  # float16, its bits
        return lambda stored: _float16_value(stored)  # noqa: PLW0108
    return lambda stored: stored


@overload(_power)
def _power_of(stored):
    if stored == numba.float64:
        tiny64 = _SMALLEST_NORMAL["float64"]
        mask64 = np.uint64(0x7FF0000000000000)
        return lambda stored: max(
            np.uint64(np.float64(stored).view(np.uint64) & mask64).view(np.float64), tiny64
        )
    tiny = _SMALLEST_NORMAL["float16" if stored == numba.int16 else "float32"]
    mask = np.uint32(0x7F800000)

    def power(stored):
        bits = np.float32(_value(stored)).view(np.uint32)
        return np.float64(max(np.uint32(bits & mask).view(np.float32), tiny))

    return power


_bfloat16_value = numba.njit(bfloat16_value)


@numba.njit
def _float16_value(stored):
    """Float32 value of a float16's bits: shift the exponent into place, scale by 2^112, mend infinity and NaN."""
    bits = np.uint32(np.uint16(stored))
    magnitude = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32) * np.float32(2.0**112)
    special = np.uint32(0x7F800000) if (bits & np.uint32(0x7C00)) == np.uint32(0x7C00) else np.uint32(0)
    sign = np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))
    return np.uint32(np.float32(magnitude).view(np.uint32) | special | sign).view(np.float32)


# Sums may be reordered and fused into multiply-adds; NaN and infinity keep their meaning.
_compiled = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})


@_compiled
def _terms(stored_base, stored_tuned):
    """What one pair of elements adds to a, p, q, Σ ulp², the unchanged count and Σ w²·ulp² (ulp in fraction bits)."""
    w0, w = np.float64(_value(stored_base)), np.float64(_value(stored_tuned))
    d = w - w0
    power = _power(stored_tuned)
    power2 = power * power
    return w0 * w0, w0 * d, d * d, power2, 1.0 if w == w0 else 0.0, w * w * power2


@_compiled
def _add_rows(base, tuned, first, last, ulp2_unit, sums, weighted_ulp2, vector):
    for i in range(base.shape[0]):
        w0, w = base[i, first:last], tuned[i, first:last]
        a = p = q = power2 = unchanged = weighted = 0.0
        for j in range(last - first):
            r = _terms(w0[j], w[j])
            a += r[0]
            p += r[1]
            q += r[2]
            power2 += r[3]
            unchanged += r[4]
            weighted += r[5]
        sums[A, vector + i] += a
        sums[P, vector + i] += p
        sums[Q, vector + i] += q
        sums[ULP2, vector + i] += power2 * ulp2_unit
        sums[UNCHANGED, vector + i] += unchanged
        if weighted_ulp2 is not None:  # numba compiles a version without the line, and what leads to it
            weighted_ulp2[vector + i] += weighted * ulp2_unit


@_compiled
def _add_columns(base, tuned, first, last, ulp2_unit, sums, weighted_ulp2, vector):
    rows = base.shape[0]
    in_fours = (
        rows - rows % 4
    )  # four rows at once, so that a column's sums are read and written a quarter as often
    for start in range(first, last, _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, last)
        of_these = slice(vector + start - first, vector + stop - first)
        a, p, q = sums[A, of_these], sums[P, of_these], sums[Q, of_these]
        ulp2, unchanged = sums[ULP2, of_these], sums[UNCHANGED, of_these]
        weighted = None if weighted_ulp2 is None else weighted_ulp2[of_these]
        for i in range(0, in_fours, 4):
            w0_r, w0_s = base[i, start:stop], base[i + 1, start:stop]
            w0_t, w0_u = base[i + 2, start:stop], base[i + 3, start:stop]
            w_r, w_s = tuned[i, start:stop], tuned[i + 1, start:stop]
            w_t, w_u = tuned[i + 2, start:stop], tuned[i + 3, start:stop]
            for j in range(stop - start):
                r, s = _terms(w0_r[j], w_r[j]), _terms(w0_s[j], w_s[j])
                t, u = _terms(w0_t[j], w_t[j]), _terms(w0_u[j], w_u[j])
                a[j] += r[0] + s[0] + t[0] + u[0]
                p[j] += r[1] + s[1] + t[1] + u[1]
                q[j] += r[2] + s[2] + t[2] + u[2]
                ulp2[j] += (r[3] + s[3] + t[3] + u[3]) * ulp2_unit
                unchanged[j] += r[4] + s[4] + t[4] + u[4]
                if weighted is not None:
                    weighted[j] += (r[5] + s[5] + t[5] + u[5]) * ulp2_unit
        for i in range(in_fours, rows):
            w0_r, w_r = base[i, start:stop], tuned[i, start:stop]
            for j in range(stop - start):
                r = _terms(w0_r[j], w_r[j])
                a[j] += r[0]
                p[j] += r[1]
                q[j] += r[2]
                ulp2[j] += r[3] * ulp2_unit
                unchanged[j] += r[4]
                if weighted is not None:
                    weighted[j] += r[5] * ulp2_unit


def add_dense(
    base: NDArray[Any],
    tuned: NDArray[Any],
    columns: slice,
    sums: NDArray[np.float64],
    first_vector: int = 0,
    *,
    vectors_are_rows: bool,
    weighted_ulp2: NDArray[np.float64] | None = None,
) -> None:
    """Add what a block of rows of two stored matrices brings to the sums of its vectors.

    Parameters
    ----------
    base, tuned
        rows × columns, as `StoredTensor.read_rows` returns them: uint16 holds bfloat16.
    columns
        The columns that count.
    sums
        5 × vectors, float64, added to in place: a, p, q, Σ ulp(w)², unchanged elements.
    first_vector
        The vector that the first row, or the first column that counts, belongs to.
    vectors_are_rows
        Whether a vector is a row of the block or one of the columns that count.
    weighted_ulp2
        Σ w²·ulp(w)² of each vector, added to in place; None leaves this sum out.
    """
    add = _add_rows if vectors_are_rows else _add_columns
    ulp2_unit = 2.0 ** (-2 * _FRACTION_BITS[tuned.dtype])
    blocks = _storage_bits(base), _storage_bits(tuned)
    if columns.step not in (None, 1):  # a copy, so that the kernel is compiled for blocks without gaps alone
        blocks = blocks[0][:, columns], blocks[1][:, columns]
        columns = slice(0, blocks[0].shape[1])
    blocks = np.ascontiguousarray(blocks[0]), np.ascontiguousarray(blocks[1])
    add(*blocks, columns.start, columns.stop, ulp2_unit, sums, weighted_ulp2, first_vector)


def _storage_bits(block: NDArray[Any]) -> NDArray[Any]:
    """Float16 as int16, which tells its bits from bfloat16's uint16; other types as they are."""
    return block.view(np.int16) if block.dtype == np.float16 else block

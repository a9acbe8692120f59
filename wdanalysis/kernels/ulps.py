"""A sample of a matrix's elements as it streams by, and a count of their ulps."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wdanalysis.kernels.cpu import _compiled, _storage_bits, _value
from wdanalysis.kernels.sums import Vector

BINADES = 48
"""Binades from that of the largest element down; what lies lower counts in the last."""


def sample(
    block: NDArray[Any],
    first: int,
    stride: int,
    values: Vector,
    vectors: NDArray[np.int32],
    first_vector: int,
    *,
    vectors_are_rows: bool,
) -> int:
    """Take every `stride`-th element of a stored block, row by row, and return how many that were.

    Parameters
    ----------
    block
        rows × columns, as `wdanalysis.kernels.cpu.add_dense` takes it.
    first
        The first element to take.
    stride
        From one element to the next.
    values, vectors
        Written to: each element's value, and the vector that it belongs to.
    first_vector
        The vector that the first row, or the first column, belongs to.
    vectors_are_rows
        Whether a vector is a row of the block or a column.
    """
    stored = _storage_bits(block)
    return int(_sample(stored, first, stride, values, vectors, first_vector, vectors_are_rows))


def count_ulps(
    values: Vector,
    vectors: NDArray[np.int32],
    group: NDArray[np.int32],
    m0: Vector,
    smallest_exponent: int,
    *,
    groups: int,
) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
    """Count a sample's elements by the binade that they lie in.

    A power of two has the finer grid of the binade below on its inner side, and counts half there.

    Parameters
    ----------
    values, vectors
        From `sample`.
    group
        The group that each vector is counted in.
    m0
        The length of each vector.
    smallest_exponent
        Of the binades: smaller numbers have the ulp of this one.
    groups
        How many groups there are.

    Returns
    -------
    int, ndarray, ndarray
        Exponent of the first binade; groups × `BINADES` counts, and the same where each element counts (w₀/m₀)².
    """
    elements, radial = (np.zeros((groups, BINADES)) for _ in range(2))
    top = _count(values.view(np.uint64), values, vectors, group, m0, smallest_exponent, elements, radial)
    return int(top), elements, radial


@_compiled
def _sample(block, first, stride, values, vectors, first_vector, vectors_are_rows):
    rows, columns = block.shape
    taken = 0
    for element in range(first, rows * columns, stride):
        row = element // columns
        column = element - row * columns
        values[taken] = _value(block[row, column])
        vectors[taken] = first_vector + (row if vectors_are_rows else column)
        taken += 1
    return taken


@_compiled
def _count(bits, values, vectors, group, m0, smallest, elements, radial):
    largest = np.uint64(0)
    for i in range(len(bits)):
        largest = max(largest, bits[i] & np.uint64(0x7FFFFFFFFFFFFFFF))
    top = max(np.int64(largest >> np.uint64(52)) - 1023, smallest)
    for i in range(len(bits)):
        at = group[vectors[i]]
        exponent = max(np.int64((bits[i] >> np.uint64(52)) & np.uint64(0x7FF)) - 1023, smallest)
        is_power = (bits[i] & np.uint64(0xFFFFFFFFFFFFF)) == 0 and exponent > smallest
        binade = min(top - exponent, BINADES - 1)
        below = min(binade + 1, BINADES - 1) if is_power else binade
        length = m0[vectors[i]]
        share = (values[i] / length) ** 2 if length > 0 else 0.0
        elements[at, binade] += 0.5
        elements[at, below] += 0.5
        radial[at, binade] += 0.5 * share
        radial[at, below] += 0.5 * share
    return top

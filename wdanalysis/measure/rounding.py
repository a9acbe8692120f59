"""What storing a tuned matrix in few bits did to ΔM and ΔD: how far it moves them, and which share it erases.

A tuned matrix W₀ + D is rounded to the grid of its stored dtype, whose step at w is ulp(w). What that does depends on
where W₀ lies:

- **off** the grid (a float32 base, a bfloat16 tuned matrix) every element gets an error that is even over ±ulp/2, of
  variance ulp²/12, whether it was trained or not. This adds to ΔM and ΔD: they have floors.
- **on** the grid (a bfloat16 base) an element that was not trained is stored as it was, so the floors are 0. A change d
  is stored as ulp · round(d/ulp): one under half an ulp is *erased*.

A matrix that is stored quantised (NF4, GPTQ, FP8 …) has the grid of its format, of which the step around each element
is known (`StoredTensor.steps`), and a base in floats lies off it: the first case, with steps for ulps. Where the base
is quantised as well it is not known whether it lies on that grid, and no floor is given.

For an update of independent elements N(0, σ²), an element of the stored update then has the variance

    V = σ² + ulp²/12                                                        off the grid
    V = ulp² · E[round(z)²] = ulp² · Σ_j 2(2j − 1) · P(z > j − ½),  z ~ N(0, (σ/ulp)²)        on it

σ is what makes Σ V the observed Σ d². With q = Σ V and r = Σ (w₀/m₀)²·V of a vector, expected are
1 − cos = (q − r)/2m₀² and m − m₀ ~ N((q − r)/2m₀, r). The same without rounding has V = σ²; the ratio of the two is
the bias. The ulps are those of a sample of W₀'s elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wdanalysis.checkpoints.dtypes import STORED_TYPES
from wdanalysis.checkpoints.model import StoredMatrix
from wdanalysis.decomposition import Axis
from wdanalysis.kernels import ulps
from wdanalysis.kernels.sums import Vector, VectorChanges
from wdanalysis.measure.plan import tiles

Grid = Literal["on", "off"]
"""Whether the base's elements are numbers of the tuned matrix's dtype."""

SAMPLED = 1 << 14
"""So many elements of a matrix are sampled, about; all of a smaller one."""

GROUPS = 16
"""So many groups of vectors of similar length."""

TELLABLE = 0.2
"""Off the grid a bias is told where training moved the elements by this share of what rounding did, or more."""

_SMALLEST_EXPONENT = {"F16": -14, "BF16": -126, "F32": -126, "F64": -1022}


@dataclass(frozen=True)
class Rounding:
    """What rounding did to one tuned matrix: columns of the metrics table; None where there is no value.

    Attributes
    ----------
    grid
        Whether the base lies on the tuned dtype's grid; None for an update that is not rounded.
    delta_d_floor, delta_m_floor
        ΔD and ΔM of a matrix that was only rounded: 0 on the grid. The latter is None without diagnostics.
    delta_m_bias, delta_d_bias
        Expected ΔM and ΔD of the stored matrix over those of the one before it was rounded. None without diagnostics,
        and where little or nothing but rounding is there to be seen (`TELLABLE`).
    """

    grid: Grid | None = None
    delta_d_floor: float | None = None
    delta_m_floor: float | None = None
    delta_m_bias: float | None = None
    delta_d_bias: float | None = None


NOT_ROUNDED = Rounding()
"""An adapter's update: it is not stored in the elements."""


class StepSums:
    """The squares of a quantised matrix's steps, summed up for each vector of one part.

    Attributes
    ----------
    squares, weighted
        Σ step² and Σ w²·step² of each vector.
    """

    def __init__(self, vectors: int) -> None:
        self.squares, self.weighted = np.zeros(vectors), np.zeros(vectors)

    def add(
        self, steps: NDArray[np.float32], numbers: Vector, vectors: slice, *, vectors_are_rows: bool
    ) -> None:
        """Add a block, rows × columns, of the steps and of the numbers that they are of."""
        along = 1 if vectors_are_rows else 0
        squares = np.square(steps, dtype=np.float64)
        self.squares[vectors] += squares.sum(axis=along)
        self.weighted[vectors] += (squares * numbers**2).sum(axis=along)


class BaseSample:
    """Elements of one part of the base, evenly spread over it, and the vector that each belongs to.

    Parameters
    ----------
    outputs, inputs
        Shape of the part.
    row_length
        Of the stored matrix. The stride has no divisor in common with it, so that no column is left out.
    """

    def __init__(self, outputs: int, inputs: int, row_length: int) -> None:
        self._stride = max(1, outputs * inputs // SAMPLED)
        while math.gcd(self._stride, row_length) != 1:
            self._stride += 1
        self._next = self._taken = 0
        most = -(-outputs * inputs // self._stride)
        self._values, self._vectors = np.empty(most), np.empty(most, np.int32)

    def add(self, block: NDArray[Any], first_vector: int, *, vectors_are_rows: bool) -> None:
        """Take those of a stored block, rows × columns that count, whose turn it is."""
        taken = ulps.sample(
            block,
            self._next,
            self._stride,
            self._values[self._taken :],
            self._vectors[self._taken :],
            first_vector,
            vectors_are_rows=vectors_are_rows,
        )
        self._taken += taken
        self._next += taken * self._stride - block.size

    @property
    def values(self) -> Vector:
        """The elements."""
        return self._values[: self._taken]

    @property
    def vectors(self) -> NDArray[np.int32]:
        """The vector of each."""
        return self._vectors[: self._taken]


class BaseSamples:
    """A sample of every part of one matrix of the base, taken as it streams by; empty where nothing asks for it."""

    def __init__(self, matrix: StoredMatrix, axis: Axis, *, wanted: bool) -> None:
        self._matrix, self._axis = matrix, axis
        parts = matrix.parts if wanted else ()
        self._of_parts = [BaseSample(*matrix.shape_of(part), matrix.row_length) for part in parts]

    def add(self, start: int, stop: int, base: NDArray[Any]) -> None:
        """Take what stored rows `start:stop` of the base hold of it."""
        if self._of_parts:
            rows = self._matrix.vectors_are_rows(self._axis)
            for tile in tiles(self._matrix, self._matrix.parts, start, stop):
                block = base[tile.rows, tile.columns]
                self._of_parts[tile.part].add(block, tile.vectors(self._axis).start, vectors_are_rows=rows)

    def of(self, part: int) -> BaseSample | None:
        """The sample of one part."""
        return self._of_parts[part] if self._of_parts else None


def holds_all_of(tuned_dtype: str, base_dtype: str) -> bool:
    """Whether every number of the base's dtype is one of the tuned dtype: itself or a wider one.

    >>> holds_all_of("F32", "BF16"), holds_all_of("BF16", "F32"), holds_all_of("BF16", "F16")
    (True, False, False)
    """
    return tuned_dtype == base_dtype or STORED_TYPES[tuned_dtype].bits > STORED_TYPES[base_dtype].bits


def lie_on_grid(values: Vector, dtype: str) -> bool:
    """Whether every value is a number of the dtype; those that are not finite do not count.

    >>> lie_on_grid(np.array([1.0, 1 + 2**-7]), "BF16"), lie_on_grid(np.array([1.0, 1 + 2**-8]), "BF16")
    (True, False)
    """
    ulp = 2.0 ** (_exponents(values, dtype) - STORED_TYPES[dtype].fraction_bits)
    finite = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        whole = np.mod(values, ulp) == 0
    within = np.abs(values) <= _LARGEST[dtype]
    return bool(np.all((whole & within)[finite]))


_LARGEST = {
    "F16": 65504.0,
    "BF16": float(np.ldexp(2 - 2.0**-7, 127)),
    "F32": float(np.finfo(np.float32).max),
    "F64": float(np.finfo(np.float64).max),
}


def _exponents(values: Vector, dtype: str) -> Vector:
    """Those of |w| = 1.… · 2^exponent, at least that of the dtype's smallest normal number."""
    return np.maximum(np.frexp(values)[1] - 1.0, _SMALLEST_EXPONENT[dtype])


def off_grid(ulp2: Vector, weighted_ulp2: Vector | None, changes: VectorChanges, length: int) -> Rounding:
    """What rounding adds where the base is off the grid.

    Parameters
    ----------
    ulp2
        Σ ulp(w)² of each vector.
    weighted_ulp2
        Σ w²·ulp(w)² of each vector; None without diagnostics.
    changes
        What the vectors of the stored matrix did.
    length
        How many elements a vector has.
    """
    error2 = ulp2 / 12
    floors = Rounding("off", delta_d_floor=0.5 * float(np.mean(_over_m2(error2, changes))))
    if weighted_ulp2 is None:
        return floors
    radial2 = _over_m2(weighted_ulp2 / 12, changes)
    floors = replace(floors, delta_m_floor=float(np.sqrt(2 / np.pi) * np.mean(np.sqrt(radial2))))
    variance = float(np.mean(changes.update_norm2 - error2)) / length
    if not variance * length > TELLABLE * float(np.mean(error2)):
        return floors
    groups = _Groups.of(changes.magnitude)
    q, r = length * variance + groups.means(error2), variance + groups.means(radial2)
    return _with_biases(floors, groups, length, variance, q, r)


def on_grid(sample: BaseSample | None, dtype: str, changes: VectorChanges, length: int) -> Rounding:
    """What rounding erases where the base is on the grid.

    Parameters
    ----------
    sample
        Of the base's elements; None without diagnostics.
    dtype
        Of the tuned matrix.
    changes, length
        As in `off_grid`.
    """
    nothing = Rounding("on", delta_d_floor=0.0)
    if sample is None:
        return nothing
    nothing = replace(nothing, delta_m_floor=0.0)
    stored = float(np.mean(changes.update_norm2)) / length
    if not (stored > 0 and math.isfinite(stored) and changes.magnitude.any()):
        return nothing
    groups = _Groups.of(changes.magnitude)
    smallest = _SMALLEST_EXPONENT[dtype]
    top, elements, radial = ulps.count_ulps(
        sample.values, sample.vectors, groups.of_vectors, changes.magnitude, smallest, groups=GROUPS + 1
    )
    exponents = np.maximum(top - np.arange(ulps.BINADES), smallest).astype(float)
    ulp = np.exp2(exponents - STORED_TYPES[dtype].fraction_bits)
    variance = variance_before(stored, ulp, elements.sum(axis=0) / elements.sum())
    of_each = stored_variance(math.sqrt(variance), ulp)
    q, r = (_of_sum(counts[:GROUPS]) @ of_each for counts in (elements, radial))
    return _with_biases(nothing, groups, length, variance, length * q, r)


@dataclass(frozen=True)
class _Groups:
    """Vectors of nearly the same length are taken together: a group for each quarter of an octave.

    Attributes
    ----------
    of_vectors
        The group of each vector; `GROUPS` for a vector of zeros.
    count
        The vectors of each of the `GROUPS` groups.
    m0
        Their mean length; 1 where there are none.
    """

    of_vectors: NDArray[np.int32]
    count: Vector
    m0: Vector

    @classmethod
    def of(cls, m0: Vector) -> _Groups:
        """From the longest vector down; the last group has all that are shorter."""
        octaves = np.log2(np.divide(m0.max(), m0, out=np.ones_like(m0), where=m0 > 0))
        group = np.where(m0 > 0, np.minimum(4 * octaves, GROUPS - 1), GROUPS).astype(np.int32)
        count = np.bincount(group, minlength=GROUPS + 1)[:GROUPS].astype(float)
        lengths = np.bincount(group, m0, GROUPS + 1)[:GROUPS]
        return cls(group, count, np.divide(lengths, count, out=np.ones(GROUPS), where=count > 0))

    def means(self, values: Vector) -> Vector:
        """Mean over each group's vectors of something that each has."""
        sums = np.bincount(self.of_vectors, values, GROUPS + 1)[:GROUPS]
        return sums / np.maximum(self.count, 1)


def variance_before(stored: float, ulp: Vector, share: Vector) -> float:
    """σ² of the update whose elements have the mean square `stored` once they are rounded.

    Parameters
    ----------
    stored
        Σ d² over the number of elements.
    ulp
        The ulps that elements have.
    share
        The share of the elements that has each.
    """
    low = 0.5 * math.sqrt(stored)
    high = max(2 * math.sqrt(stored), 4 * float(ulp[share > 0].max()))
    for _ in range(2):  # V grows with σ: a coarse look-up, and a fine one in the place that it found
        sigma = np.geomspace(low, high, 64)
        mean = stored_variance(sigma[:, None], ulp) @ share
        at = int(np.clip(np.searchsorted(mean, stored), 1, len(sigma) - 1))
        low, high = float(sigma[at - 1]), float(sigma[at])
    found = np.interp(math.log(stored), np.log(mean[at - 1 : at + 1]), np.log([low, high]))
    return math.exp(2 * float(found))


def _of_sum(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each row as shares; that of all where a group has none (vectors of zeros)."""
    sums = counts.sum(axis=1, keepdims=True)
    whole = np.broadcast_to(counts.sum(axis=0) / max(float(sums.sum()), 1e-300), counts.shape)
    shares: NDArray[np.float64] = np.divide(counts, sums, out=whole.copy(), where=sums > 0)
    return shares


def stored_variance(sigma: NDArray[np.float64] | float, ulp: NDArray[np.float64]) -> NDArray[np.float64]:
    """V of an element on the grid: ulp² · E[round(z)²], z ~ N(0, (σ/ulp)²).

    Above σ = ulp it is σ² + ulp²/12 to eight digits; below it is taken from a table.

    >>> stored_variance(np.array([0.02, 0.5, 3.0]), np.array(1.0)).round(4)
    array([0.    , 0.3255, 9.0833])
    """
    with np.errstate(over="ignore"):
        tau = np.asarray(sigma / ulp, dtype=np.float64)
    log_tau, log_variance = _small_ones()
    small = np.exp(np.interp(np.log(tau), log_tau, log_variance))
    return np.asarray(np.where(tau < 1, ulp**2 * small, sigma**2 + ulp**2 / 12), dtype=np.float64)


@cache
def _small_ones() -> tuple[Vector, Vector]:
    """Log σ/ulp and log E[round(z)²] for σ/ulp from 1/32 to 1."""
    from scipy.special import ndtr

    tau = np.geomspace(1 / 32, 1, 1024)
    j = np.arange(1, 12)[:, None]
    return np.log(tau), np.log(np.sum(2 * (2 * j - 1) * ndtr((0.5 - j) / tau), axis=0))


def _with_biases(
    floors: Rounding, groups: _Groups, length: int, variance: float, q: Vector, r: Vector
) -> Rounding:
    """Add what the stored update, of q and r in each group, makes of ΔM and ΔD over what one of `variance` makes."""
    stored_m, stored_d = _expected(groups, q, r)
    true_r = np.full(GROUPS, variance)
    true_m, true_d = _expected(groups, length * true_r, true_r)
    return replace(
        floors,
        delta_m_bias=stored_m / true_m if true_m else None,
        delta_d_bias=stored_d / true_d if true_d else None,
    )


def _expected(groups: _Groups, q: Vector, r: Vector) -> tuple[float, float]:
    """Sums over the vectors of the expected |m − m₀| and 1 − cos, for Σ d² = q and a radial part of variance r."""
    from scipy.special import erf

    outward, sd = (q - r) / (2 * groups.m0), np.sqrt(r)
    over_sd = np.divide(outward, sd, out=np.zeros_like(sd), where=sd > 0)
    folded = math.sqrt(2 / math.pi) * sd * np.exp(-(over_sd**2) / 2) + outward * erf(over_sd / math.sqrt(2))
    return float(groups.count @ folded), float(groups.count @ ((q - r) / (2 * groups.m0**2)))


def _over_m2(values: Vector, changes: VectorChanges) -> Vector:
    """The values over m², and 0 for a vector of zeros."""
    m2 = (changes.magnitude + changes.magnitude_change) ** 2
    return np.divide(values, m2, out=np.zeros_like(m2), where=m2 != 0)

"""What storing a tuned matrix in few bits did to ΔM and ΔD: how far it moves them, and which share it erases.

A tuned matrix W₀ + D is rounded to the grid of its stored dtype, whose step at w is ulp(w). What that does depends on
where W₀ lies:

- **off** the grid (a float32 base, a bfloat16 tuned matrix) every element gets an error that is even over ±ulp/2, of
  variance ulp²/12, whether it was trained or not. This adds to ΔM and ΔD: they have floors.
- **on** the grid (a bfloat16 base) an element that was not trained is stored as it was, so the floors are 0. A change d
  is stored as ulp · round(d/ulp): one under half an ulp is *erased*.
- **mixed**: most elements are on it, others off (a bfloat16 base stored in float16, whose smallest numbers lie apart).

For an update of independent elements N(0, σ²), an element of the stored update then has the variance

    V = σ² + ulp²/12                                                        off the grid
    V = ulp² · E[round(z)²] = ulp² · Σ_j 2(2j − 1) · P(z > j − ½),  z ~ N(0, (σ/ulp)²)        on it

σ is what makes Σ V the observed Σ d². With q = Σ V and r = Σ (w₀/m₀)²·V of a vector, expected are
1 − cos = (q − r)/2m₀² and m − m₀ ~ N((q − r)/2m₀ + ρ̄, r + s). The same without rounding has V = σ²; the ratio of the
two is the bias. The ulps are those of a sample of W₀'s elements.

ρ̄ and s are what an update's radial parts w₀·d/m₀ have beyond noise: their mean over vectors of one length, and their
variance less r; both 0 where the radial parts are no larger than noise makes them. Such a part is a small change that a
vector's elements have in common. Under the noise of the others rounding keeps the share

    g = d/dμ E[round(z + μ)] = Σ_j φ((j − ½)·ulp/σ) · ulp/σ,  j over all whole numbers, weighted as r is,

of it on the grid and all of it off the grid, so before rounding it was ρ̄/g and s/g².
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

Grid = Literal["on", "off", "mixed"]
"""Whether the base's elements are numbers of the tuned matrix's dtype."""

MOSTLY_ON = 0.5
"""A base of which a larger share of the elements is on the grid, but not all, is mixed: of float16's numbers an eighth
are bfloat16's by chance, of float32's a 65,536th."""

SAMPLED = 1 << 14
"""So many elements of a matrix are sampled, about; all of a smaller one."""

GROUPS = 16
"""So many groups of vectors of similar length."""

TELLABLE = 0.2
"""Off the grid a bias is told where training moved the elements by this share of what rounding did, or more."""

LEAST_KEPT = 0.5
"""ΔM's bias is told where rounding keeps this share, or more, of what a vector's elements have in common."""

BEYOND_NOISE = 3.0
"""Radial parts are larger than noise where their mean square is by so many of its standard errors."""

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
        and where little or nothing but rounding is there to be seen (`TELLABLE`); ΔM's also where most of what moved
        whole vectors was erased (`LEAST_KEPT`).
    """

    grid: Grid | None = None
    delta_d_floor: float | None = None
    delta_m_floor: float | None = None
    delta_m_bias: float | None = None
    delta_d_bias: float | None = None


NOT_ROUNDED = Rounding()
"""An adapter's update: it is not stored in the elements."""


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


def lie_on_grid(values: Vector, dtype: str) -> NDArray[np.bool_]:
    """Which values are numbers of the dtype; one that is not finite counts as one.

    >>> lie_on_grid(np.array([1.0, 1 + 2**-7, 1 + 2**-8]), "BF16")
    array([ True,  True, False])
    """
    with np.errstate(invalid="ignore"):
        whole = (_rounded(values, dtype) == values) & (np.abs(values) <= _LARGEST[dtype])
    lie: NDArray[np.bool_] = ~np.isfinite(values) | whole
    return lie


def _rounded(values: Vector, dtype: str) -> Vector:
    """The nearest numbers of the dtype, of two equally near ones the even."""
    ulp = np.exp2(_exponents(values, dtype) - STORED_TYPES[dtype].fraction_bits)
    return np.asarray(np.rint(values / ulp) * ulp)


def grid_of(values: Vector, dtype: str) -> Grid:
    """Where values lie; zeros, which are on every grid, do not count.

    >>> grid_of(np.array([1.0, 1 + 2**-7, 1 + 2**-8]), "BF16")
    'mixed'
    """
    lie = lie_on_grid(values, dtype)[values != 0]
    return "on" if lie.all() else "mixed" if lie.mean() > MOSTLY_ON else "off"


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
    return _with_biases(floors, groups, length, variance, q, r, changes.radial, np.ones(GROUPS))


def on_grid(
    sample: BaseSample | None, dtype: str, changes: VectorChanges, length: int, *, grid: Grid = "on"
) -> Rounding:
    """What rounding erases where the base is on the grid, or most of it is.

    Parameters
    ----------
    sample
        Of the base's elements; None without diagnostics, where all are on the grid.
    dtype
        Of the tuned matrix.
    changes, length
        As in `off_grid`.
    grid
        ``"on"`` or ``"mixed"``.
    """
    floors = Rounding(grid, delta_d_floor=0.0)
    if sample is None:
        return floors
    floors = replace(floors, delta_m_floor=0.0)
    stored = float(np.mean(changes.update_norm2)) / length
    if not (stored > 0 and math.isfinite(stored) and changes.magnitude.any()):
        return floors
    groups = _Groups.of(changes.magnitude)
    elements = _Elements.of(sample, dtype, groups, changes.magnitude, apart=grid == "mixed")
    if grid == "mixed":
        error2, radial2 = _errors2(sample, dtype, groups)
        turn = groups.count @ (length * error2 / (2 * groups.m0**2))
        change = groups.count @ np.sqrt(2 / np.pi * radial2)
        count = len(changes.magnitude)
        floors = replace(floors, delta_d_floor=float(turn) / count, delta_m_floor=float(change) / count)
        floor = float(groups.count @ error2) / count
        if not stored - floor > TELLABLE * floor:
            return floors
    variance = variance_before(stored, elements.ulp, elements.share, elements.is_off)
    of_each = stored_variance(math.sqrt(variance), elements.ulp, elements.is_off)
    q, r = (shares @ of_each for shares in (elements.of_groups, elements.radial))
    kept = elements.radial @ kept_in_common(math.sqrt(variance), elements.ulp, elements.is_off)
    return _with_biases(floors, groups, length, variance, length * q, r, changes.radial, kept)


def _errors2(sample: BaseSample, dtype: str, groups: _Groups) -> tuple[Vector, Vector]:
    """Mean square of what rounding a sample moves it by, in each group, and where each element counts (w₀/m₀)²."""
    of_each = groups.of_vectors[sample.vectors]
    error2 = (sample.values - _rounded(sample.values, dtype)) ** 2
    means = []
    for weight in (np.ones(len(error2)), sample.values**2):
        sums, weights = (np.bincount(of_each, x, GROUPS + 1)[:GROUPS] for x in (weight * error2, weight))
        means.append(np.divide(sums, weights, out=np.zeros(GROUPS), where=weights > 0))
    return means[0], means[1]


@dataclass(frozen=True)
class _Elements:
    """Kinds of elements, a kind for each ulp, or two where some of it are off the grid; and how many are of each.

    Attributes
    ----------
    ulp
        Of each kind.
    is_off
        Whether the kind lies off the grid.
    share
        The share of all elements that is of each kind.
    of_groups, radial
        The same in each of the `GROUPS` groups of vectors, and where each element counts (w₀/m₀)².
    """

    ulp: Vector
    is_off: NDArray[np.bool_]
    share: Vector
    of_groups: NDArray[np.float64]
    radial: NDArray[np.float64]

    @classmethod
    def of(cls, sample: BaseSample, dtype: str, groups: _Groups, m0: Vector, *, apart: bool) -> _Elements:
        """Count a sample; `apart` tells its elements on the grid from those off it."""
        smallest, kinds = _SMALLEST_EXPONENT[dtype], 1 + apart
        vectors, of_vectors = sample.vectors, groups.of_vectors
        if (
            apart
        ):  # an element off the grid counts for a second vector of the same length, in a group of its own
            off = ~lie_on_grid(sample.values, dtype)
            vectors = np.where(off, vectors + np.int32(len(m0)), vectors).astype(np.int32)
            of_vectors = np.concatenate([of_vectors, of_vectors + np.int32(GROUPS + 1)]).astype(np.int32)
            m0 = np.concatenate([m0, m0])
        top, elements, radial = ulps.count_ulps(
            sample.values, vectors, of_vectors, m0, smallest, groups=kinds * (GROUPS + 1)
        )
        exponents = np.maximum(top - np.arange(ulps.BINADES), smallest).astype(float)
        elements, radial = (
            counts.reshape(kinds, GROUPS + 1, -1).swapaxes(0, 1).reshape(GROUPS + 1, -1)
            for counts in (elements, radial)
        )
        return cls(
            np.tile(np.exp2(exponents - STORED_TYPES[dtype].fraction_bits), kinds),
            np.arange(kinds * ulps.BINADES) >= ulps.BINADES,
            elements.sum(axis=0) / elements.sum(),
            *(_of_sum(counts[:GROUPS]) for counts in (elements, radial)),
        )


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


def variance_before(
    stored: float, ulp: Vector, share: Vector, is_off: NDArray[np.bool_] | bool = False
) -> float:
    """σ² of the update whose elements have the mean square `stored` once they are rounded.

    Parameters
    ----------
    stored
        Σ d² over the number of elements.
    ulp
        The ulps that elements have.
    share
        The share of the elements that has each.
    is_off
        Which of them are off the grid.
    """
    low = 0.5 * math.sqrt(max(stored - float(stored_variance(0.0, ulp, is_off) @ share), 1e-3 * stored))
    high = max(2 * math.sqrt(stored), 4 * float(ulp[share > 0].max()))
    for _ in range(2):  # V grows with σ: a coarse look-up, and a fine one in the place that it found
        sigma = np.geomspace(low, high, 64)
        mean = stored_variance(sigma[:, None], ulp, is_off) @ share
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


def stored_variance(
    sigma: NDArray[np.float64] | float, ulp: NDArray[np.float64], is_off: NDArray[np.bool_] | bool = False
) -> NDArray[np.float64]:
    """V of an element: on the grid ulp² · E[round(z)²], z ~ N(0, (σ/ulp)²), off it σ² + ulp²/12.

    Above σ = ulp the first is the second to eight digits; below it is taken from a table.

    >>> stored_variance(np.array([0.02, 0.5, 3.0]), np.array(1.0)).round(4)
    array([0.    , 0.3255, 9.0833])
    """
    with np.errstate(over="ignore", divide="ignore"):
        tau = np.asarray(sigma / ulp, dtype=np.float64)
        log_tau, log_variance = _small_ones()
        small = np.where(tau > 0, np.exp(np.interp(np.log(tau), log_tau, log_variance)), 0.0)
    return np.asarray(np.where((tau < 1) & ~np.asarray(is_off), ulp**2 * small, sigma**2 + ulp**2 / 12))


def kept_in_common(
    sigma: float, ulp: NDArray[np.float64], is_off: NDArray[np.bool_] | bool = False
) -> NDArray[np.float64]:
    """Which share g of a small change that elements have in common is left, under the noise of an update N(0, σ²).

    >>> kept_in_common(1.0, np.array([0.5, 2.0, 4.0, 8.0])).round(3)
    array([1.   , 0.986, 0.432, 0.002])
    """
    tau = np.minimum(sigma / ulp, 1.0)  # from there on it is 1 to eight digits
    with np.errstate(divide="ignore", under="ignore"):
        densities = np.exp(-((np.arange(-9, 10)[:, None] - 0.5) ** 2) / (2 * tau**2))
    kept = densities.sum(axis=0) / (math.sqrt(2 * math.pi) * tau)
    return np.asarray(np.where(is_off, 1.0, kept))


@cache
def _small_ones() -> tuple[Vector, Vector]:
    """Log σ/ulp and log E[round(z)²] for σ/ulp from 1/32 to 1."""
    from scipy.special import ndtr

    tau = np.geomspace(1 / 32, 1, 1024)
    j = np.arange(1, 12)[:, None]
    return np.log(tau), np.log(np.sum(2 * (2 * j - 1) * ndtr((0.5 - j) / tau), axis=0))


def _with_biases(
    floors: Rounding,
    groups: _Groups,
    length: int,
    variance: float,
    q: Vector,
    r: Vector,
    radial: Vector,
    kept: Vector,
) -> Rounding:
    """Add what the stored update, of q and r in each group, makes of ΔM and ΔD over what one of `variance` makes.

    Rounding left the share `kept` of what is in the radial parts, one of each vector, beyond noise.
    """
    common, spread = _beyond_noise(groups, r, radial)
    stored_d = _expected_turn(groups, q, r)
    true_q, true_r = length * np.full(GROUPS, variance), np.full(GROUPS, variance)
    true_d = _expected_turn(groups, true_q, true_r)
    floors = replace(floors, delta_d_bias=stored_d / true_d if true_d else None)
    if groups.count @ kept < LEAST_KEPT * groups.count.sum():
        return floors
    g = np.maximum(kept, 1e-9)
    stored_m = _expected_change(groups, (q - r) / (2 * groups.m0) + common, r + spread)
    true_m = _expected_change(
        groups, (true_q - true_r) / (2 * groups.m0) + common / g, true_r + spread / g**2
    )
    return replace(floors, delta_m_bias=stored_m / true_m if true_m else None)


def _beyond_noise(groups: _Groups, r: Vector, radial: Vector) -> tuple[Vector, Vector]:
    """ρ̄ and s of each group's radial parts, which noise would give the variance r."""
    square, noise = groups.count @ groups.means(radial**2), groups.count @ r
    count = groups.count.sum()
    if not square > noise * (1 + BEYOND_NOISE * math.sqrt(2 / count)):
        return np.zeros(GROUPS), np.zeros(GROUPS)
    common = groups.means(radial)
    return common, np.maximum(groups.means(radial**2) - common**2 - r, 0.0)


def _expected_change(groups: _Groups, mean: Vector, variance: Vector) -> float:
    """Sum over the vectors of the expected |m − m₀| ~ |N(mean, variance)|."""
    from scipy.special import erf

    sd = np.sqrt(variance)
    over_sd = np.divide(mean, sd, out=np.zeros_like(sd), where=sd > 0)
    folded = math.sqrt(2 / math.pi) * sd * np.exp(-(over_sd**2) / 2) + mean * erf(over_sd / math.sqrt(2))
    return float(groups.count @ folded)


def _expected_turn(groups: _Groups, q: Vector, r: Vector) -> float:
    """Sum over the vectors of the expected 1 − cos, for Σ d² = q and a radial part of variance r."""
    return float(groups.count @ ((q - r) / (2 * groups.m0**2)))


def _over_m2(values: Vector, changes: VectorChanges) -> Vector:
    """The values over m², and 0 for a vector of zeros."""
    m2 = (changes.magnitude + changes.magnitude_change) ** 2
    return np.divide(values, m2, out=np.zeros_like(m2), where=m2 != 0)

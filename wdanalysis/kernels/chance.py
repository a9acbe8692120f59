"""ΔM and ΔD of an update without structure: what an isotropic one of the same norm, and rank, would do to a matrix.

A vector w₀ of length m₀ gets d ~ N(0, σ²I) in L dimensions. In units of m₀, with s = σ/m₀, z ~ N(0, 1) along w₀ and
X ~ χ² of L − 1 degrees of freedom across it,

    m/m₀ = R = √((1 + s·z)² + s²·X)        cos = (1 + s·z)/R

so all expectations are functions of s and L alone. They are taken once for each L, over z by the trapezoid rule and
over X by Gauss's, on a grid of s, and read from there for every vector. An update BA of rank r has σ² = σ̄²·g with
g ~ χ²_r/r for each vector (`_low_rank`), and its vectors share one factor (`_shared_variance`).

The norm of the whole update is given, and not drawn: of all draws those with that norm count. To first order this
takes from a variance the part that regression on Σ d² explains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from wdanalysis.kernels.lowrank import Array
from wdanalysis.kernels.sums import Vector

_SIZES = np.linspace(math.log(1e-4), math.log(1e3), 225)
"""Log of s·√L, the expected length of d over m₀; the scaled moments no longer change beyond."""

_PARTS = 25
"""The grid is taken in so many parts, each small enough for the cache."""

_NORMAL = np.linspace(-7, 7, 161)
_NORMAL_WEIGHTS = np.exp(-(_NORMAL**2) / 2) / np.exp(-(_NORMAL**2) / 2).sum()


@dataclass(frozen=True)
class Chance:
    """What an update without structure would do to one matrix.

    Attributes
    ----------
    delta_m, delta_m_sd
        The expected ΔM, and the standard deviation of one draw's.
    delta_d, delta_d_sd
        The same of ΔD.
    """

    delta_m: float = 0.0
    delta_m_sd: float = 0.0
    delta_d: float = 0.0
    delta_d_sd: float = 0.0


def chance(
    magnitude: Vector, length: int, update_norm2: float, *, rank: int | None = None, alignment: float = 0.0
) -> Chance:
    """Evaluate the expectations for the vectors of one matrix.

    Parameters
    ----------
    magnitude
        m₀ of each vector. One that is zero has no direction and is taken to stay so.
    length
        L, elements in a vector.
    update_norm2
        ‖ΔW‖² of the update that is to be equalled.
    rank
        r of an update BA; None for one of full rank.
    alignment
        Mean squared cosine between two vectors of the base (`mean_squared_cosine`), which an update of low rank needs.
    """
    m0 = magnitude[magnitude > 0]
    if not len(m0) or update_norm2 == 0:
        return Chance()
    vectors, moving = len(magnitude), len(m0)
    sigma = math.sqrt(update_norm2 / (moving * length))
    table = _table(length, rank)
    sums, norm_variance = table.sums(m0, sigma), moving * table.norm_variance

    def sd(variance: float, with_norm: float, shared: float = 0.0) -> float:
        return math.sqrt(max(variance - with_norm**2 / norm_variance + shared, 0.0)) / vectors

    shared = 0.0
    if rank is not None:
        growth = m0 * table.at(sigma / m0).growth
        shared = _shared_variance(sigma, growth, rank, alignment - 1 / length)
    return Chance(
        delta_m=sums.change / vectors,
        delta_m_sd=sd(sums.change_variance, sums.change_with_norm, shared),
        delta_d=sums.turn / vectors,
        delta_d_sd=sd(sums.turn_variance, sums.turn_with_norm),
    )


def _shared_variance(sigma: float, growth: Vector, rank: int, alignment: float) -> float:
    """Variance of Σ |m − m₀| that comes from the factor F that all vectors of a low-rank update share.

    With d = F g, the radial part of vector i is g·Fᵀŵ_i: given F, N(0, σ²·y) with y = |Fᵀŵ_i|²/r (in units of its
    mean). Two vectors with cosine c have Cov(y_i, y_j) = 2(c² − 1/L)/r, where 1/L is what the given norm takes: over
    all L directions y has a given sum. And ∂E|N(μ, σ²y)|/∂y = σ·φ(μ/σ) at y = 1.

    Parameters
    ----------
    sigma
        Expected standard deviation of ρ.
    growth
        μ of each vector: what the turn alone adds to its length.
    rank, alignment
        r, and the mean of c² − 1/L over pairs of vectors.
    """
    slope = sigma * np.exp(-((growth / sigma) ** 2) / 2) / math.sqrt(2 * math.pi)
    pairs = float(np.sum(slope)) ** 2 - float(np.sum(slope**2))
    return 2 * alignment / rank * pairs


def mean_squared_cosine(vectors: Array) -> float:
    """Mean of cos² over pairs of different vectors (n × L); those of zeros are left out."""
    norms = np.linalg.norm(vectors, axis=1)
    directions = vectors[norms > 0] / norms[norms > 0, None]
    count = len(directions)
    if count < 2:
        return 0.0
    return (float(np.sum((directions @ directions.T) ** 2)) - count) / (count * (count - 1))


@dataclass(frozen=True)
class _Moments:
    """Moments over one vector's draws, in units of m₀; arrays over s."""

    change: Vector
    """E|R − 1|."""
    growth: Vector
    """E(R − 1)."""
    change_variance: Vector
    change_with_norm: Vector
    """Covariance with Σ d²/σ²."""
    turn: Vector
    """E(1 − cos)."""
    turn_variance: Vector
    turn_with_norm: Vector


@dataclass(frozen=True)
class _Sums:
    """Sums of `_Moments` over a matrix's vectors, in the units of the weights."""

    change: float
    change_variance: float
    change_with_norm: float
    turn: float
    turn_variance: float
    turn_with_norm: float


@dataclass(frozen=True)
class _Table:
    """`_Moments` for any s, between points of a grid: scaled so that they hardly change from one to the next."""

    length: int
    scaled: Array
    norm_variance: float
    """Of y = Σ d²/σ²."""

    @classmethod
    def of(cls, length: int, sizes: Vector, moments: _Moments, norm_variance: float) -> _Table:
        columns = np.array([getattr(moments, field.name) for field in fields(moments)])
        return cls(length, columns / _scales(length, sizes), norm_variance)

    def at(self, sizes: Vector) -> _Moments:
        """The moments at each s."""
        below, share = self._between(sizes)
        scaled = self.scaled[:, below] * (1 - share) + self.scaled[:, below + 1] * share
        return _Moments(*(scaled * _scales(self.length, sizes)))

    def sums(self, m0: Vector, sigma: float) -> _Sums:
        """The moments summed over vectors: first of the scales at each point of the grid, then over the grid.

        The scale of E|R − 1| is s, which m₀ makes σ; that of E(1 − cos) differs from vector to vector.
        """
        sizes = sigma / m0
        below, share = self._between(sizes)
        turns = _turn_scale(self.length, sizes)

        def at_points(weights: Vector) -> Vector:
            above = weights * share
            found = np.zeros(len(_SIZES))
            found += np.bincount(below, weights - above, len(_SIZES))
            found[1:] += np.bincount(below, above, len(_SIZES))[:-1]
            return found

        count, turn, turn2 = at_points(np.ones_like(m0)), at_points(turns), at_points(turns * turns)
        scaled = _Moments(*self.scaled)
        return _Sums(
            change=sigma * float(scaled.change @ count),
            change_variance=sigma**2 * float(scaled.change_variance @ count),
            change_with_norm=sigma * float(scaled.change_with_norm @ count),
            turn=float(scaled.turn @ turn),
            turn_variance=float(scaled.turn_variance @ turn2),
            turn_with_norm=float(scaled.turn_with_norm @ turn),
        )

    def _between(self, sizes: Vector) -> tuple[NDArray[np.intp], Vector]:
        """The point of the grid below each s, and how far s is on the way to the next."""
        place = (np.log(sizes * math.sqrt(self.length)) - _SIZES[0]) / (_SIZES[1] - _SIZES[0])
        place = np.clip(place, 0, len(_SIZES) - 1.001)
        below = place.astype(np.intp)
        return below, place - below


def _turn_scale(length: int, s: Vector) -> Vector:
    x2 = length * s * s
    return x2 / (1 + x2)


def _scales(length: int, s: Vector) -> Array:
    """How each of `_Moments` goes with s where it is small and where it is large."""
    x2, turn = length * s * s, _turn_scale(length, s)
    scales: Array = np.array([s, x2 / (1 + np.sqrt(x2)), s * s, s, turn, turn * turn, turn])
    return scales


_LOCK = Lock()


def _table(length: int, rank: int | None) -> _Table:
    with _LOCK:  # threads that meet the same length wait for one table
        return _full_rank(length) if rank is None else _low_rank(length, rank)


@lru_cache(maxsize=64)
def _full_rank(length: int) -> _Table:
    """The table for d of full rank: quadrature over z and X at every s of the grid."""
    sizes = np.exp(_SIZES) / math.sqrt(length)
    across, weights = _chi_square(length - 1, 6 if length > 32 else 24)
    share = np.outer(weights, _NORMAL_WEIGHTS).ravel()
    z, X = np.tile(_NORMAL, len(across)), np.repeat(across, len(_NORMAL))
    with_norm = share * (X + z * z - length)
    moments = [_at_sizes(part[:, None], z, X, share, with_norm) for part in np.split(sizes, _PARTS)]
    return _Table.of(length, sizes, _Moments(*np.concatenate(moments, axis=1)), 2.0 * length)


def _at_sizes(s: Array, z: Vector, X: Vector, share: Vector, with_norm: Vector) -> Array:
    """`_Moments` at some s (k × 1), by the nodes z and X and their weights: 7 × k."""
    along, across2 = 1 + s * z, s * s * X
    R2 = along * along + across2
    R = np.sqrt(R2)
    growth = (s * z * (2 + s * z) + across2) / (R + 1)
    cos = np.divide(along, R, out=np.ones_like(R), where=R > 0)
    sin2 = np.divide(across2, R2, out=np.zeros_like(R), where=R > 0)
    turn = np.where(cos < 0, 1 - cos, sin2 / (1 + np.abs(cos)))
    change = np.abs(growth)
    mean_change, mean_turn = change @ share, turn @ share
    return np.array(
        [
            mean_change,
            growth @ share,
            np.square(change - mean_change[:, None]) @ share,
            change @ with_norm,
            mean_turn,
            np.square(turn - mean_turn[:, None]) @ share,
            turn @ with_norm,
        ]
    )


@lru_cache(maxsize=64)
def _low_rank(length: int, rank: int) -> _Table:
    """The table for d of rank r: that of full rank at s·√g, over g ~ χ²_r/r; variances add within and between."""
    full, sizes = _full_rank(length), np.exp(_SIZES) / math.sqrt(length)
    nodes, weights = _chi_square(rank, 16)
    g = nodes / rank
    given = [full.at(sizes * math.sqrt(part)) for part in g]
    w, g = weights[:, None], g[:, None]

    def each(name: str) -> Array:
        return np.array([getattr(moments, name) for moments in given])

    def mean(values: Array) -> Vector:
        means: Vector = np.sum(w * values, axis=0)
        return means

    change, turn = each("change"), each("turn")
    return _Table.of(
        length,
        sizes,
        _Moments(
            change=mean(change),
            growth=mean(each("growth")),
            change_variance=mean(each("change_variance") + (change - mean(change)) ** 2),
            change_with_norm=mean(g * each("change_with_norm") + length * (g - 1) * change),
            turn=mean(turn),
            turn_variance=mean(each("turn_variance") + (turn - mean(turn)) ** 2),
            turn_with_norm=mean(g * each("turn_with_norm") + length * (g - 1) * turn),
        ),
        2.0 * length * (1 + 2 / rank) + 2 * length**2 / rank,
    )


def _chi_square(freedom: int, nodes: int) -> tuple[Vector, Vector]:
    """Gauss's nodes and weights for an expectation over χ²: those of Laguerre, by the eigenvalues of Golub & Welsch."""
    if freedom == 0:
        return np.zeros(1), np.ones(1)
    alpha, k = freedom / 2 - 1, np.arange(nodes)
    off_diagonal = np.sqrt(k[1:] * (k[1:] + alpha))
    jacobi = np.diag(2 * k + alpha + 1) + np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1)
    values, columns = np.linalg.eigh(jacobi)
    return 2 * values, columns[0] ** 2

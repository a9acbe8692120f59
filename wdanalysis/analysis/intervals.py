"""How far a correlation can be trusted whose units are layers: intervals, a test, and what one layer does to it.

The points of one layer at several steps lie on one path, so they are not drawn independently; its layers nearly are.
Everything here follows from sums by layer, so that leaving out a layer is a subtraction. docs/reading.md has the
simulation by which the interval was chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import permutations
from math import factorial

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

CONFIDENCE = 0.95
"""Coverage of every interval and band."""

FEWEST_LAYERS = 6
"""Fewer layers have no interval and no p-value: 5 have 120 orders, and 24 without one layer, too few for a test."""

LEAST_SPREAD = 1e-12
"""Values whose range is below this share of the largest differ by rounding only."""

PERMUTATIONS = 5040
"""All orders of the layers are tried up to so many (7 layers), else so many: the observed one and random others."""

PERMUTATION_SEED = 0

AT_ONCE = 2520
"""So many orders are weighed at once: their arrays stay in the cache."""

NAN = float("nan")

Numbers = float | NDArray[np.float64]


@dataclass(frozen=True)
class ByLayer:
    """What the layers say of r and of the slope; NaN where there is none.

    Attributes
    ----------
    r_low, r_high, slope_low, slope_high
        Intervals.
    leave_out_low, leave_out_high
        The range of r when one layer is left out.
    leave_out_layer
        The place, among the layers, of the one that moves r most; −1 where there is none.
    t
        Half-width of the slope's interval in standard errors.
    level_variance, level_slope_covariance, slope_variance
        Of the line's height at the mean of x, and of its slope.
    """

    r_low: Numbers = NAN
    r_high: Numbers = NAN
    slope_low: Numbers = NAN
    slope_high: Numbers = NAN
    leave_out_low: Numbers = NAN
    leave_out_high: Numbers = NAN
    leave_out_layer: int | NDArray[np.intp] = -1
    t: Numbers = NAN
    level_variance: Numbers = NAN
    level_slope_covariance: Numbers = NAN
    slope_variance: Numbers = NAN


def by_layer(
    u: NDArray[np.float64], v: NDArray[np.float64], group: NDArray[np.intp], layer: NDArray[np.intp]
) -> ByLayer:
    """Leave out each layer in turn (the jackknife), for r on the scale of Fisher's z = artanh r and for the slope.

    Parameters
    ----------
    u, v
        (n,) finite numbers, of mean zero and order one. Each group's own mean is taken out.
    group, layer
        (n,) codes from 0 on without a gap.

    Returns
    -------
    ByLayer
        Numbers. All NaN under `FEWEST_LAYERS` layers, and where the points without some layer have no line.
    """
    count = int(layer.max(initial=-1)) + 1
    if count < FEWEST_LAYERS:
        return ByLayer()
    terms = (np.ones_like(u), u, v, u * u, u * v, v * v)
    groups, cell = int(group.max()) + 1, group * count + layer
    sums = np.array([np.bincount(cell, term, groups * count) for term in terms])
    return from_sums(sums.reshape(6, groups, count))


def from_sums(sums: NDArray[np.float64]) -> ByLayer:
    """Take what the layers say from sums over the points of each group and layer.

    The variance is c · Σ (z₍ₗ₎ − mean)². By Fisher, z of n points in G groups has the variance 1/(n − G − 2); the
    jackknife sees that of the points without a layer, so c is the ratio of the two. The half-width is Student's t times
    the standard error. Its degrees of freedom are √((L − 1)·K): K = 1/Σ share² is the number of layers that carry the
    variance, with a layer's share in that sum.

    Parameters
    ----------
    sums
        (6, ..., groups, layers) sums of 1, u, v, u², uv and v².

    Returns
    -------
    ByLayer
        Arrays of the shape `...`.
    """
    total = sums.sum(axis=-1, keepdims=True)
    without = total - sums
    uu, uv, vv = _centred(without)
    all_uu, all_uv, all_vv = _centred(total)
    left, freedom = _freedom(without[0]), _freedom(total[0])
    least = LEAST_SPREAD * total[0].sum(axis=-2)
    has_line = ((uu > least) & (vv > least) & (left >= 1)).all(axis=-1, keepdims=True)
    uu, vv, freedom = (np.where(has_line, values, NAN) for values in (uu, vv, freedom))
    per = left.mean(axis=-1, keepdims=True) / freedom
    r, slope = _r(all_uu, all_uv, all_vv)[..., 0], (all_uv / all_uu)[..., 0]
    without_r, without_slope = _r(uu, uv, vv), uv / uu
    n, su, sv = without[:3].sum(axis=-2)
    of_level = _less_mean(sv / n - without_slope * su / n)  # the height at u = 0, the mean of all
    of_slope, of_z = _less_mean(without_slope), _less_mean(_fisher(without_r))
    z, z_width = _fisher(r), _student(of_z) * np.sqrt((per * of_z**2).sum(axis=-1))
    t, slope_variance = _student(of_slope), (per * of_slope**2).sum(axis=-1)
    slope_width = t * np.sqrt(slope_variance)
    moves = np.abs(without_r - r[..., None])
    return ByLayer(
        r_low=np.where(z_width == 0, r, np.tanh(z - z_width)),
        r_high=np.where(z_width == 0, r, np.tanh(z + z_width)),
        slope_low=slope - slope_width,
        slope_high=slope + slope_width,
        leave_out_low=without_r.min(axis=-1),
        leave_out_high=without_r.max(axis=-1),
        leave_out_layer=np.where(has_line[..., 0], moves.argmax(axis=-1), -1),
        t=t,
        level_variance=(per * of_level**2).sum(axis=-1),
        level_slope_covariance=(per * of_level * of_slope).sum(axis=-1),
        slope_variance=slope_variance,
    )


def permutation_p(
    u: NDArray[np.float64],
    v: NDArray[np.float64],
    step: NDArray[np.intp],
    layer: NDArray[np.intp],
    fewest: int = FEWEST_LAYERS,
) -> float:
    """Exchange whole paths of v among the layers, and count how often their order comes out as telling.

    The statistic is |z|/se, of Fisher's z of the correlation of the layers' ranks at the same step: with a and b the
    shares of a layer's ranks in the sum of squares of u and of v, and p in the sum of products, r = Σ p and
    se = √Σ (p − r·(a + b)/2)² / (1 − r²). Exact where the layers' u, over all steps, have nothing to do with their v:
    every order of the layers is then as likely as the one observed. Ranks and the division by the standard error hold
    the error near its level where u and v have a scale in common, and so are uncorrelated but not independent.

    Parameters
    ----------
    u, v
        (n,) finite numbers of order one, any groups' means taken out.
    step, layer
        (n,) codes from 0 on. Several points of a layer at one step are told apart by their order.
    fewest
        So many layers are asked for.

    Returns
    -------
    float
        Two-sided, over the layers that have a point wherever another has one; NaN where they are under `fewest`.
    """
    if not len(u):
        return NAN
    count = int(layer.max()) + 1
    cell = _cells(step, layer)
    paths = np.full((2, count, int(cell.max()) + 1), np.nan)
    paths[:, layer, cell] = u, v
    paths = paths[:, np.isfinite(paths[0]).all(axis=1)]
    count = paths.shape[1]
    if count < fewest:
        return NAN
    return _p_of(_twice_centred_ranks(paths).tobytes(), count)


def false_discovery(p_values: ArrayLike) -> NDArray[np.float64]:
    """Benjamini and Hochberg's q: with all q < .05 called, at most 5 % of the calls are false on average.

    Parameters
    ----------
    p_values
        (n,) numbers; a NaN is no test.

    Returns
    -------
    ndarray
        (n,) numbers, NaN where the p-value is.

    Examples
    --------
    >>> false_discovery([0.01, 0.04, 0.03, float("nan")]).round(2)
    array([0.03, 0.04, 0.04,  nan])
    """
    p = np.asarray(p_values, dtype=np.float64)
    q = np.full(p.shape, np.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known])[::-1]]
    q[order] = np.minimum.accumulate(p[order] * len(known) / np.arange(len(known), 0, -1))
    return q


def _centred(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """(3, ..., L) sums of squares and products about the groups' means, from (6, ..., groups, L) plain sums."""
    n, su, sv, suu, suv, svv = sums
    per = 1 / np.maximum(n, 1)  # a group without a point adds nothing
    return np.asarray(np.array([suu - su * su * per, suv - su * sv * per, svv - sv * sv * per]).sum(axis=-2))


def _freedom(n: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points less groups less 2, (..., L) from the (..., groups, L) numbers of points."""
    return np.asarray((n - (n > 0)).sum(axis=-2) - 2)


def _r(uu: NDArray[np.float64], uv: NDArray[np.float64], vv: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.clip(uv / np.sqrt(uu * vv), -1, 1))


def _fisher(r: NDArray[np.float64]) -> NDArray[np.float64]:
    """Artanh r, finite at r = ±1."""
    most = 1 - 2.0**-53
    return np.asarray(np.arctanh(np.clip(r, -most, most)))


def _less_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(values - values.mean(axis=-1, keepdims=True))


def _student(moved: NDArray[np.float64]) -> NDArray[np.float64]:
    """Student's t for a variance that is a sum of the squares of (..., L) numbers."""
    squares = moved * moved
    whole = squares.sum(axis=-1)
    with np.errstate(invalid="ignore"):  # 0/0: nothing moves it, and t has nothing to widen
        carrying = whole * whole / (squares * squares).sum(axis=-1)
    freedom = np.sqrt((moved.shape[-1] - 1) * np.where(whole > 0, carrying, 1))
    return np.asarray(stdtrit(freedom, 0.5 + CONFIDENCE / 2))


def _twice_centred_ranks(paths: NDArray[np.float64]) -> NDArray[np.intp]:
    """Ranks of the layers less their mean, doubled, at each step; of (2, layers, cells) numbers of order one."""
    at_step = np.ascontiguousarray(paths.transpose(0, 2, 1))
    apart = at_step[..., :, None] - at_step[..., None, :]
    ranks = np.count_nonzero(apart > LEAST_SPREAD, axis=-1) - np.count_nonzero(apart < -LEAST_SPREAD, axis=-1)
    return np.asarray(ranks.transpose(0, 2, 1))


@lru_cache(
    maxsize=64
)  # a panel's pooled points have the same ranks at each step as those less their step's mean
def _p_of(twice_ranks: bytes, count: int) -> float:
    """The p-value of (2, count, cells) ranks."""
    of_u, of_v = ranks = np.frombuffer(twice_ranks, np.intp).reshape(2, count, -1).astype(np.float64)
    squares = (ranks**2).sum(axis=2)
    whole = squares.sum(axis=1, keepdims=True)
    if not whole.all():
        return 1.0  # all layers are alike: no order differs
    a, b = squares / whole
    product, shares = of_u @ of_v.T / np.sqrt(whole.prod()), (a[:, None] + b) / 2
    orders = _orders(count)
    found = np.concatenate(
        [_telling(product, shares, orders[at : at + AT_ONCE]) for at in range(0, len(orders), AT_ONCE)]
    )
    return float((found >= found[0] * (1 - 1e-9)).mean())  # equal but for rounding counts as equal


def _telling(
    product: NDArray[np.float64], shares: NDArray[np.float64], orders: NDArray[np.intp]
) -> NDArray[np.float64]:
    """(z/se)² of each order, from what each pair of layers adds to r and to the two sums of squares."""
    of_layer = product.take(orders)
    r = of_layer @ np.ones(len(product))
    of_layer -= r[:, None] * shares.take(orders)
    spread = np.einsum("ij,ij->i", of_layer, of_layer)
    found = np.full(len(r), np.inf)  # ranks that agree wholly
    np.divide((_fisher(r) * (1 - r * r)) ** 2, spread, out=found, where=spread > LEAST_SPREAD)
    return found


def _cells(step: NDArray[np.intp], layer: NDArray[np.intp]) -> NDArray[np.intp]:
    """A code for every step and, of a layer's several points at one step, their order."""
    place = step * (int(layer.max()) + 1) + layer
    if np.bincount(place).max() == 1:
        return step
    order = np.argsort(place, kind="stable")
    inside = np.arange(len(place)) - np.searchsorted(place[order], place[order])
    nth = np.empty_like(inside)
    nth[order] = inside
    return np.asarray(step * (int(nth.max()) + 1) + nth)


@cache
def _orders(count: int) -> NDArray[np.intp]:
    """(orders, count) places in a flat count × count matrix: row l, the column of its partner; the first as it is."""
    if factorial(count) <= PERMUTATIONS:
        orders = np.array(list(permutations(range(count))))
    else:
        same = np.tile(np.arange(count), (PERMUTATIONS, 1))
        orders = np.random.default_rng(PERMUTATION_SEED).permuted(same, axis=1)
        orders[0] = same[0]
    return np.asarray(orders + np.arange(count) * count)

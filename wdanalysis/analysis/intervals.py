"""How far a correlation can be trusted whose units are layers: intervals, a test, and what one layer does to it.

The points of one layer at several steps lie on one path, so they are not drawn independently; its layers nearly are.
Everything here follows from sums by layer, so that leaving out a layer is a subtraction. docs/reading.md has the
simulation by which the interval was chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
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

NAN = float("nan")


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
        Half-width of an interval in standard errors.
    level_variance, level_slope_covariance, slope_variance
        Of the line's height at the mean of x, and of its slope.
    """

    r_low: float = NAN
    r_high: float = NAN
    slope_low: float = NAN
    slope_high: float = NAN
    leave_out_low: float = NAN
    leave_out_high: float = NAN
    leave_out_layer: int = -1
    t: float = NAN
    level_variance: float = NAN
    level_slope_covariance: float = NAN
    slope_variance: float = NAN


def by_layer(
    u: NDArray[np.float64], v: NDArray[np.float64], group: NDArray[np.intp], layer: NDArray[np.intp]
) -> ByLayer:
    """Leave out each layer in turn (the jackknife), for r on the scale of Fisher's z = artanh r and for the slope.

    The standard error is √((L − 1)/L · Σ (z₍ₗ₎ − mean)²); the half-width is Student's t times it. Its degrees of
    freedom are √((L − 1)·K): K = 1/Σ share² is the number of layers that carry the spread, with a layer's share in the
    sum of squares of x or of y, whichever has fewer. Where all layers weigh the same, that is about L − 1.

    Parameters
    ----------
    u, v
        (n,) finite numbers, of mean zero and order one. Each group's own mean is taken out.
    group, layer
        (n,) codes from 0 on without a gap.

    Returns
    -------
    ByLayer
        All NaN under `FEWEST_LAYERS` layers, and where the points without some layer have no line.
    """
    count = int(layer.max(initial=-1)) + 1
    if count < FEWEST_LAYERS:
        return ByLayer()
    terms = (np.ones_like(u), u, v, u * u, u * v, v * v)
    groups, cell = int(group.max()) + 1, group * count + layer
    sums = np.array([np.bincount(cell, term, groups * count) for term in terms]).reshape(6, groups, count)
    total = sums.sum(axis=2, keepdims=True)
    uu, uv, vv = _centred(total - sums)
    all_uu, all_uv, all_vv = (float(whole[0]) for whole in _centred(total))
    if (uu <= LEAST_SPREAD * len(u)).any() or (vv <= LEAST_SPREAD * len(u)).any():
        return ByLayer()
    r, slope = _r(all_uu, all_uv, all_vv), all_uv / all_uu
    without_r, without_slope = _r(uu, uv, vv), uv / uu
    n, su, sv = (total - sums)[:3].sum(axis=1)
    without_level = sv / n - without_slope * su / n  # at u = 0, the mean of all
    z, without_z = _fisher(r), _fisher(without_r)
    t = stdtrit(np.sqrt((count - 1) * _carrying(u, v, group, layer)), 0.5 + CONFIDENCE / 2)
    z_width = t * np.sqrt(_covariance(without_z, without_z))
    slope_width = t * np.sqrt(_covariance(without_slope, without_slope))
    low, high = (np.tanh(z - z_width), np.tanh(z + z_width)) if z_width else (r, r)
    return ByLayer(
        r_low=float(low),
        r_high=float(high),
        slope_low=float(slope - slope_width),
        slope_high=float(slope + slope_width),
        leave_out_low=float(without_r.min()),
        leave_out_high=float(without_r.max()),
        leave_out_layer=int(np.abs(without_r - r).argmax()),
        t=float(t),
        level_variance=_covariance(without_level, without_level),
        level_slope_covariance=_covariance(without_level, without_slope),
        slope_variance=_covariance(without_slope, without_slope),
    )


def permutation_p(
    u: NDArray[np.float64],
    v: NDArray[np.float64],
    step: NDArray[np.intp],
    layer: NDArray[np.intp],
    fewest: int = FEWEST_LAYERS,
) -> float:
    """Exchange whole paths of v among the layers, and count how often the covariance comes out as far from their mean.

    Exact where the layers' ΔM, over all steps, have nothing to do with their ΔD: every order of the layers is then
    as likely as the one observed. The mean over all orders is the product of the steps' means, which no order changes:
    what is tested is the covariance of layers at the same step, whatever the scope of r.

    Parameters
    ----------
    u, v
        (n,) finite numbers, any groups' means taken out.
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
    of_u, of_v = paths - paths.mean(axis=1, keepdims=True)
    product = (of_u @ of_v.T).ravel()
    found = np.abs(product[_orders(count)].sum(axis=1))
    observed = abs(product[:: count + 1].sum())
    scale = np.sqrt((of_u**2).sum() * (of_v**2).sum())
    return float((found >= observed - 1e-12 * scale).mean())  # equal but for rounding counts as equal


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
    """(3, L) sums of squares and products about the groups' means, from (6, groups, L) plain sums."""
    n, su, sv, suu, suv, svv = sums
    per = 1 / np.maximum(n, 1)  # a group without a point adds nothing
    return np.asarray(np.array([suu - su * su * per, suv - su * sv * per, svv - sv * sv * per]).sum(axis=1))


def _r(uu: ArrayLike, uv: ArrayLike, vv: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(np.clip(np.asarray(uv) / np.sqrt(np.asarray(uu) * np.asarray(vv)), -1, 1))


def _fisher(r: NDArray[np.float64]) -> NDArray[np.float64]:
    """Artanh r, finite at r = ±1."""
    most = 1 - 2.0**-53
    return np.asarray(np.arctanh(np.clip(r, -most, most)))


def _covariance(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """The jackknife's, of two statistics without each of the layers."""
    count = len(one)
    return float((count - 1) / count * ((one - one.mean()) @ (other - other.mean())))


def _carrying(
    u: NDArray[np.float64], v: NDArray[np.float64], group: NDArray[np.intp], layer: NDArray[np.intp]
) -> float:
    """How many layers carry the spread: 1/Σ share², the less of that of u and of v."""
    n = np.bincount(group)
    found = []
    for values in (u, v):
        means = np.bincount(group, values) / n
        share = np.bincount(layer, (values - means[group]) ** 2)
        found.append(share.sum() ** 2 / (share @ share))
    return float(min(found))


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

"""The interval of any number that points give, from leaving out each layer in turn.

That of r and of the slope is in `wdanalysis.analysis.intervals`, from sums and so far sooner.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.special import stdtrit

from wdanalysis.analysis.intervals import CONFIDENCE, FEWEST_LAYERS, NAN
from wdanalysis.analysis.regression import NO_LABEL, Points

Interval = tuple[float, float]


def interval(points: Points, statistic: Callable[[Points], float]) -> Interval:
    """Statistic ± t · √((L − 1)/L · Σ (statistic without layer l − their mean)²), t of L − 1 degrees of freedom.

    Parameters
    ----------
    points
        Of one panel.
    statistic
        Of what the number is; best one whose error is about normal, such as artanh r and not r.

    Returns
    -------
    low, high
        NaN under `FEWEST_LAYERS` layers, where a point has no layer, and where the statistic is none.
    """
    layers = np.unique(points.layer)
    if len(layers) < FEWEST_LAYERS or NO_LABEL in layers:
        return NAN, NAN
    without = np.array([statistic(points.where(points.layer != layer)) for layer in layers])
    freedom = len(layers) - 1
    error = math.sqrt(freedom / len(layers) * np.sum((without - without.mean()) ** 2))
    value, half_width = statistic(points), stdtrit(freedom, 0.5 + CONFIDENCE / 2) * error
    return float(value - half_width), float(value + half_width)


def apart_from_zero(interval: Interval) -> bool:
    """Whether an interval does not hold 0; False for one that is NaN."""
    low, high = interval
    return low > 0 or high < 0


def fisher(r: float) -> float:
    """Artanh r, finite at r = ±1."""
    most = 1 - 2.0**-53
    return math.atanh(min(max(r, -most), most))

"""One word for a panel: what its layers, compared at the same step, can be said to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from wdanalysis.analysis.intervals import FEWEST_LAYERS

SIGNIFICANT = 0.05
"""A trend whose q-value is not below is none."""

RESTS = 0.5
"""An r this far from zero that changes its sign without one layer is said to rest on that layer."""

RISES, FALLS, NONE = "rises", "falls", "none"
AS_CHANCE = "as chance"
ONE_LAYER = "rests on one layer"
TOO_FEW = "too few layers"
BADGES = (RISES, FALLS, NONE, AS_CHANCE, ONE_LAYER, TOO_FEW)
"""Every badge."""


def badge(within_step: Mapping[str, Any]) -> str:
    """Read the `within_step` row of a panel in the table of correlations.

    Returns
    -------
    str
        `TOO_FEW` under `FEWEST_LAYERS` layers; `ONE_LAYER` where an r of `RESTS` or more changes its sign without one
        layer; `NONE` where q is not under `SIGNIFICANT` or a weaker r changes its sign; `AS_CHANCE` where r lies in the
        band of updates without structure (columns r_null_low and r_null_high, where the table has them); otherwise
        `RISES` or `FALLS`.

    Examples
    --------
    >>> badge({"layers": 10, "pearson_r": 0.8, "leave_out_low": 0.6, "leave_out_high": 0.9, "q_value": 0.01})
    'rises'
    """
    r, low, high = (
        _number(within_step, name) for name in ("pearson_r", "leave_out_low", "leave_out_high")
    )
    if _number(within_step, "layers") < FEWEST_LAYERS:
        return TOO_FEW
    if not math.isfinite(r):
        return NONE
    if low <= 0 <= high:
        return ONE_LAYER if abs(r) >= RESTS else NONE
    if not (math.isfinite(low) and _number(within_step, "q_value") < SIGNIFICANT):
        return NONE
    if _number(within_step, "r_null_low") <= r <= _number(within_step, "r_null_high"):
        return AS_CHANCE
    return RISES if r > 0 else FALLS


def _number(row: Mapping[str, Any], name: str) -> float:
    return float(row.get(name, math.nan))

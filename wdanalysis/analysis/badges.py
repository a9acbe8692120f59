"""One word for a panel: what its layers, compared at the same step, can be said to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wdanalysis.analysis.intervals import FEWEST_LAYERS

if TYPE_CHECKING:
    import pandas as pd

SIGNIFICANT = 0.05
"""A trend whose q-value is not below is none."""

RESTS = 0.5
"""An r this far from zero that changes its sign without one layer is said to rest on that layer, from ten layers on
(`_least_that_rests`); so is a significant one that is not so without one layer and loses this part of itself."""

RISES, FALLS, NONE = "rises", "falls", "none"
AS_CHANCE = "as chance"
ONE_LAYER = "rests on one layer"
TOO_FEW = "too few layers"
BADGES = (RISES, FALLS, NONE, AS_CHANCE, ONE_LAYER, TOO_FEW)
"""Every badge."""


def badge(within_step: Mapping[str, Any] | pd.Series) -> str:
    """Read the `within_step` row of a panel in the table of correlations.

    A trend asks for q < `SIGNIFICANT`, and for p < `SIGNIFICANT` without the layer that moves r most: a layer far out
    in both would make a trend by itself.

    Returns
    -------
    str
        `TOO_FEW` under `FEWEST_LAYERS` layers; `ONE_LAYER` where an r of `RESTS` or more (with fewer than ten layers,
        of 1.5 standard deviations of chance's r) changes its sign without one layer, or a significant one is none and
        falls by the part `RESTS`; `NONE` where there is no trend else; `AS_CHANCE` where r lies in the band of updates
        without structure (columns r_null_low and r_null_high, where the table has them); otherwise `RISES` or `FALLS`.

    Examples
    --------
    >>> badge({"layers": 10, "pearson_r": 0.8, "leave_out_low": 0.6, "leave_out_high": 0.9, "leave_out_p": 0.03,
    ...        "q_value": 0.01})
    'rises'
    """
    r, significant = _number(within_step, "pearson_r"), is_significant(_number(within_step, "q_value"))
    if _number(within_step, "layers") < FEWEST_LAYERS:
        return TOO_FEW
    if not math.isfinite(r):
        return NONE
    turned = without_most_moving(within_step)
    flips = r * turned <= 0
    if flips or not (significant and is_significant(_number(within_step, "leave_out_p"))):
        rests = (
            abs(r) >= _least_that_rests(within_step)
            if flips
            else significant and abs(turned) <= RESTS * abs(r)
        )
        return ONE_LAYER if rests else NONE
    if _number(within_step, "r_null_low") <= r <= _number(within_step, "r_null_high"):
        return AS_CHANCE
    return RISES if r > 0 else FALLS


def is_significant(p_value: float, tests: int = 1) -> bool:
    """Whether p times the number of tests is below `SIGNIFICANT`, and not at it but for rounding."""
    return p_value * tests < SIGNIFICANT * (1 - 1e-9)


def without_most_moving(row: Mapping[str, Any] | pd.Series) -> float:
    """The r without the layer that moves it most."""
    ends = (_number(row, "leave_out_low"), _number(row, "leave_out_high"))
    return max(ends, key=lambda without: abs(without - row["pearson_r"]))


def _least_that_rests(row: Mapping[str, Any] | pd.Series) -> float:
    """1.5/√(L − 1), 1.5 standard deviations of the r of L layers by chance, and at least `RESTS`."""
    return max(RESTS, 1.5 / math.sqrt(_number(row, "layers") - 1))


def _number(row: Mapping[str, Any] | pd.Series, name: str) -> float:
    return float(row.get(name, math.nan))

"""Which rows of the table rounding to the stored dtype has made or erased."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

NEAR_FLOOR = 3.0
"""A ΔD below this many times the ΔD of rounding alone may be rounding: it is 1.5 times what it would be without."""

MOSTLY_KEPT = 2 / 3
"""A ΔD of which rounding kept a smaller share says little of the update: without rounding it is 1.5 times that."""


def near_floor(metrics: pd.DataFrame) -> pd.Series[bool]:
    """Tell for each row of the metrics table whether rounding decides its ΔD.

    That is, off the grid of the stored dtype, a ΔD under `NEAR_FLOOR` times what rounding makes by itself, unless its
    expected bias is known and no such thing (the floor counts the error along a vector too, which turns nothing: in
    a vector of one large element that is most of it); on it, where
    rounding makes nothing by itself, one of which less than `MOSTLY_KEPT` is left (`erased`). Adapters' rows never are:
    their updates are not rounded. Nor are those of a table without diagnostics.
    """
    made, lost = _made_and_lost(metrics)
    return made | lost


def why_near_floor(metrics: pd.DataFrame) -> str:
    """Say what is so of the rows that `near_floor` tells, of one kind or of both; "" where there are none."""
    made, lost = _made_and_lost(metrics)
    kinds = (
        (made.any(), f"ΔD under {NEAR_FLOOR:g} × what rounding makes by itself"),
        (lost.any(), "rounding erased over a third of ΔD"),
    )
    return ", or ".join(text for is_there, text in kinds if is_there)


def _made_and_lost(metrics: pd.DataFrame) -> tuple[pd.Series[bool], pd.Series[bool]]:
    ratio = metrics["floor_ratio"] if "floor_ratio" in metrics else metrics["delta_d"] * np.nan
    bias = metrics["delta_d_bias"] if "delta_d_bias" in metrics else ratio * np.nan
    made = (ratio < NEAR_FLOOR) & ~(bias < 1 / MOSTLY_KEPT)
    return made, erased(metrics) > 1 - MOSTLY_KEPT


def erased(metrics: pd.DataFrame) -> pd.Series[float]:
    """The share of its ΔD that rounding is expected to have erased, for rows of a base on the grid or mostly; else NaN.

    Below 0 where rounding made it larger.
    """
    if "delta_d_bias" not in metrics or "grid" not in metrics:
        return metrics["delta_d"] * np.nan
    return (1 - metrics["delta_d_bias"]).where(metrics["grid"].isin(["on", "mixed"]))

"""Which rows of the table may be rounding and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

NEAR_FLOOR = 3.0
"""A ΔD below this many times the ΔD of rounding alone may be rounding."""


def near_floor(metrics: pd.DataFrame) -> pd.Series[bool]:
    """Tell for each row of the metrics table whether its ΔD is under `NEAR_FLOOR` times what rounding makes.

    Adapters' rows never are: their updates are not rounded. Nor are those of a table without diagnostics.
    """
    ratio = metrics["floor_ratio"] if "floor_ratio" in metrics else metrics["delta_d"] * np.nan
    return ratio < NEAR_FLOOR

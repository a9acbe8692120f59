"""What updates without structure would look like: the null model's points for the scatter."""

from __future__ import annotations

import numpy as np
import pandas as pd

NULL_CURVE_COLUMNS = (
    *("method", "module", "step", "layer"),
    *("delta_d", "delta_m_low", "delta_m", "delta_m_high"),
)


def null_curve(rows: pd.DataFrame) -> pd.DataFrame:
    """Return for each matrix the ΔD and ΔM that an update without structure of its size is expected to have.

    The interval holds 95 % of such updates. Nothing where the table has no null models.
    """
    if "null_delta_m" not in rows:
        return pd.DataFrame(columns=list(NULL_CURVE_COLUMNS))
    known = rows[np.isfinite(rows["null_delta_m"].to_numpy(float, na_value=np.nan))]
    half = 1.96 * known["null_delta_m_sd"]
    values = {
        "delta_d": known["null_delta_d"],
        "delta_m_low": known["null_delta_m"] - half,
        "delta_m": known["null_delta_m"],
        "delta_m_high": known["null_delta_m"] + half,
    }
    curve = known[["method", "module", "step", "layer"]].assign(**values)
    return pd.DataFrame(curve, columns=list(NULL_CURVE_COLUMNS))

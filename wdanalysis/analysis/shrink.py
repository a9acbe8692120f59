"""The shrink that all matrices of a checkpoint have in common.

Decoupled weight decay multiplies every weight by 1 − lr·wd at each step: that alone gives a ΔM in proportion to m₀,
which says which vectors are long and nothing of what was learned.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

EXPLAINS = 0.8
"""The share of Σ (m − m₀)² from which on one common factor is said to explain a checkpoint's change of magnitude."""

_NUMBERS = ("common_shrink", "explained_share", "shrink_low", "shrink_high")

COMMON_SHRINK_COLUMNS = ("method", "step", "axis", "matrices", *_NUMBERS, "explains")
"""The columns of `common_shrink`."""


def common_shrink(metrics: pd.DataFrame) -> pd.DataFrame:
    """Find the one factor that best explains m ≈ (1 − c)·m₀ over all vectors of all changed matrices of a checkpoint.

    Decoupled weight decay leaves c = 1 − Π(1 − lr·wd), about Σ lr·wd, in every matrix that it acts on. c is that of
    W ≈ (1 − c)·W₀ (DoRA: m ≈ (1 − c)·m₀) by least squares over all matrices: the mean of the matrices' own factors with
    weights ‖W₀‖². The length that vectors gain by turning is no part of it.

    Parameters
    ----------
    metrics
        The metrics table, with diagnostics.

    Returns
    -------
    DataFrame
        `COMMON_SHRINK_COLUMNS`, a row for each method, step and axis: the number of changed matrices; c; the share
        1 − Σ (m − (1 − c)·m₀)² / Σ (m − m₀)² that it explains; the least and the largest factor of a single matrix; and
        whether it `explains` the change: a shrink (c > 0) with a share of at least `EXPLAINS`. Empty numbers
        where nothing changed.

    Examples
    --------
    >>> common_shrink(run.metrics)[["method", "step", "matrices", "common_shrink"]].round(3).tail(2)
      method  step  matrices  common_shrink
    6   dora   180        20          0.007
    7   dora   240        20          0.006
    """
    rows = []
    changed = metrics[metrics["update_norm"].ne(0) & metrics["shrink"].notna()]
    by_checkpoint = dict(list(changed.groupby(["method", "step", "axis"], sort=False, dropna=False)))
    for key in metrics[["method", "step", "axis"]].drop_duplicates().itertuples(index=False, name=None):
        matrices = by_checkpoint.get(key, changed.iloc[:0])
        square, own = matrices["base_norm"] ** 2, matrices["shrink"]
        change2 = (matrices["delta_m_norm"] ** 2).sum()
        c = float((own * square).sum() / square.sum()) if len(matrices) else np.nan
        explained = -(2 * c * _m0_times_change(matrices).sum() + c**2 * square.sum())
        share = float(explained / change2) if change2 else np.nan
        rows.append(
            dict(zip(("method", "step", "axis"), key, strict=True))
            | {"matrices": len(matrices), "common_shrink": c, "explained_share": share}
            | {"shrink_low": own.min(), "shrink_high": own.max()}
            | {"explains": bool(c > 0 and share >= EXPLAINS)}
        )
    table = pd.DataFrame(rows, columns=list(COMMON_SHRINK_COLUMNS))
    numbers = dict.fromkeys(_NUMBERS, "float64")
    return table.astype({"step": "Int64", "matrices": "int64", "explains": "bool"} | numbers)


def _m0_times_change(matrices: pd.DataFrame) -> pd.Series[float]:
    """Σ m₀(m − m₀) of each matrix: from m² = m₀² + 2·m₀ρ + Σ d², summed over its vectors."""
    fitted = -matrices["shrink"] * matrices["base_norm"] ** 2  # Σ m₀ρ, but for DoRA Σ m₀(m − m₀) itself
    by_turning = (matrices["update_norm"] ** 2 - matrices["delta_m_norm"] ** 2) / 2
    return fitted + by_turning.where(matrices["update"] != "dora", 0.0)

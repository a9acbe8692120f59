"""A panel: the rows of one method and module, and what has been computed of them, as rules read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from wdanalysis.analysis.regression import PANEL_SCOPES, Fit, Points, at_last_step, correlations, fit

PANEL = ("method", "module", "axis")
"""The columns that name a panel."""

_READ = (
    *("method", "module", "axis", "step", "layer", "delta_m", "delta_d"),
    *("shrink", "delta_m_unshrunk", "floor_ratio", "delta_d_median", "delta_d_max"),
    *("unchanged_fraction", "tuned_dtype", "vectors", "length", "rank"),
)
"""Columns that every panel's rows have; those that the table lacks are empty."""


@dataclass(frozen=True)
class Panel:
    """The rows of one method and module, and what the rules read of them.

    Attributes
    ----------
    rows
        Those with values: every column of the metrics table, and those of `_READ`.
    last
        Those of the last step.
    pooled, within_step
        The panel's rows of these scopes in the table of correlations, by column.
    panels
        How many panels of the table have a p-value: so many were looked at.
    """

    rows: pd.DataFrame
    last: pd.DataFrame
    pooled: Mapping[str, Any]
    within_step: Mapping[str, Any]
    panels: int

    @cached_property
    def is_unchanged(self) -> bool:
        """Whether ΔM and ΔD of every matrix are 0."""
        return len(self.rows) > 0 and not self.rows[["delta_m", "delta_d"]].any(axis=None)

    @property
    def points(self) -> Points:
        """Its rows as points."""
        return Points.of(self.rows)

    @property
    def unshrunk(self) -> Fit:
        """As scope `within_step`, for ΔM without each matrix's uniform shrink."""
        points = Points.of(self.rows[self.rows["layer"].notna()])
        return fit(
            points.delta_d,
            points.delta_m_unshrunk,
            groups=points.step,
            layers=points.layer,
            steps=points.step,
        )


def panels(metrics: pd.DataFrame, correlated: pd.DataFrame | None = None) -> Iterator[tuple[Any, Panel]]:
    """Yield every panel of a metrics table that has values, with its method, module and axis.

    Parameters
    ----------
    metrics
        The metrics table.
    correlated
        Its table of `correlations`, where it is there already.
    """
    table = correlations(metrics, PANEL_SCOPES) if correlated is None else correlated
    of_scope = {scope: table[table["scope"] == scope] for scope in PANEL_SCOPES}
    found = {
        scope: dict(
            zip(
                rows[list(PANEL)].itertuples(index=False, name=None),
                map(_named, rows.to_dict("records")),
                strict=True,
            )
        )
        for scope, rows in of_scope.items()
    }
    looked_at = int(of_scope["within_step"]["p_value"].notna().sum())
    rows = metrics.assign(**{name: np.nan for name in _READ if name not in metrics})
    rows = rows[np.isfinite(rows[["delta_m", "delta_d"]].to_numpy(float, na_value=np.nan)).all(axis=1)]
    last = at_last_step(rows).groupby(list(PANEL), sort=False)
    for key, of_panel in rows.groupby(list(PANEL), sort=False):
        yield (
            key,
            Panel(of_panel, last.get_group(key), found["pooled"][key], found["within_step"][key], looked_at),
        )


def _named(row: Mapping[Any, Any]) -> Mapping[str, Any]:
    return row

"""Which rows of the metrics table a figure shows, and the sentence on those that it does not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
import pandas as pd

from wdanalysis.analysis.floors import near_floor, why_near_floor
from wdanalysis.analysis.runs import of_last_step
from wdanalysis.analysis.table import labels
from wdanalysis.errors import ComparisonError

VALUES = {"delta_m": "ΔM", "delta_d": "ΔD"}
"""The two quantities of the paper, by column, as figures name them."""

VECTORS = {"out": "one vector per output feature", "in": "one vector per input feature"}
"""What a value of the column `axis` means."""


def unique(metrics: pd.DataFrame, column: str) -> list[str]:
    """Return the values of a column in the order of the table."""
    return [str(value) for value in metrics[column].drop_duplicates()]


Names: TypeAlias = "str | Sequence[str] | None"
"""One name, several, or None for all."""


def chosen(table: pd.DataFrame, **wanted: Names) -> pd.DataFrame:
    """Return the rows whose columns have the wanted values, in its order: `method="ft", module=["q", "v"]`.

    Raises
    ------
    ComparisonError
        The table has no rows of one of them.
    """
    for column, names in wanted.items():
        for name in [names] if isinstance(names, str) else names or ():
            if not (table[column] == name).any():
                known = ", ".join(unique(table, column)) or "no rows"
                raise ComparisonError(f"there is no {column} {name!r} in the table, which has {known}.")
        if names is not None:
            table = table[table[column].isin([names] if isinstance(names, str) else list(names))]
    return table


def attention(metrics: pd.DataFrame, *roles: Sequence[str]) -> list[str]:
    """Return the first of several lists of roles so far as the table has them; all of its modules if it has none."""
    known = unique(metrics, "module")
    return next((there for wanted in roles if (there := [role for role in wanted if role in known])), known)


def ordered(rows: pd.DataFrame, wanted: Names) -> list[str]:
    """Return the modules of the rows: in the order that was asked for, else in that of the table."""
    known = unique(rows, "module")
    return (
        known
        if wanted is None or isinstance(wanted, str)
        else [name for name in dict.fromkeys(wanted) if name in known]
    )


def heading(modules: Sequence[str], what: str, axis: str) -> str:
    """Say what a figure shows in a few words.

    >>> heading(["q"], "ΔM against ΔD", "out"), heading(["q", "v"], "by layer", "in")
    ('q: ΔM against ΔD (axis out)', 'by layer (axis in)')
    """
    along = f" (axis {axis})" if axis else ""
    return f"{modules[0]}: {what}{along}" if len(modules) == 1 else f"{what}{along}"


def axis_of(metrics: pd.DataFrame) -> str:
    """Return the axis along which the vectors lie: ``out`` or ``in``.

    Raises
    ------
    ComparisonError
        The table mixes the two axes, which one figure must not.
    """
    axes = unique(metrics, "axis")
    if len(axes) != 1:
        raise ComparisonError(
            f"a figure shows one axis, and the metrics table has {' and '.join(axes) or 'none'}."
        )
    return axes[0]


def at_step(metrics: pd.DataFrame, step: int | None = None) -> pd.DataFrame:
    """Return the rows of a step, or of the last step that all runs of a method have.

    Raises
    ------
    ComparisonError
        No method has that step.
    """
    if step is None:
        return of_last_step(metrics)
    rows = metrics[(metrics["step"] == step).fillna(False)]
    if rows.empty:
        steps = ", ".join(str(known) for known in sorted(metrics["step"].dropna().unique()))
        raise ComparisonError(
            f"there is no step {step} in the metrics table, which has {steps or 'no steps'}"
        )
    return rows


def step_names(rows: pd.DataFrame) -> dict[str, str]:
    """Return "step 500", or "" where it is not known, for each method of rows of one step each."""
    steps = rows.groupby("method", sort=False)["step"].max()
    return {str(method): "" if pd.isna(step) else f"step {step}" for method, step in steps.items()}


def has_values(rows: pd.DataFrame, columns: Iterable[str] = tuple(VALUES)) -> pd.Series[bool]:
    """Tell for each row whether it has all of the values."""
    finite = np.isfinite(rows[list(columns)].to_numpy(float, na_value=np.nan)).all(axis=1)
    return pd.Series(finite, index=rows.index)


def stacks(rows: pd.DataFrame) -> list[str]:
    """Return the stacks (encoder, decoder …) that are on one panel; [""] where there is one."""
    return list(labels(rows, "stack").drop_duplicates()) or [""]


def runs_of(rows: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the rows of each run of the methods that have several; nothing where none has."""
    run = labels(rows, "run")
    return [of_run for _, of_run in rows[run != ""].groupby(["method", run[run != ""]], sort=False)]


def runs_note(rows: pd.DataFrame) -> str:
    """Say how many runs the means are over."""
    runs = {str(of_run["method"].iloc[0]): 0 for of_run in runs_of(rows)}
    for of_run in runs_of(rows):
        runs[str(of_run["method"].iloc[0])] += 1
    counts = sorted(set(runs.values()))
    several = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}" if counts else ""
    return f"strong: mean over {several} runs; faint: each run" if several else ""


def per_layer(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Return both values by the columns `by`, the median where several matrices (experts) share a place.

    Column `near_floor` tells whether all of them are near the floor; a column `stack` is there to group by in any case.
    """
    shown = rows[has_values(rows)]
    marked = shown.assign(near_floor=near_floor(shown), stack=labels(shown, "stack"))
    how = dict.fromkeys(VALUES, "median") | {"near_floor": "all"}
    return marked.groupby(by, sort=False).agg(how).reset_index()


def near_floor_note(rows: pd.DataFrame, mark: str = "hollow") -> str:
    """Say how many matrices are marked on the figure, because rounding decides their ΔD."""
    count = int(near_floor(rows).sum())
    return f"{mark}: {why_near_floor(rows)} ({count} of {len(rows)})" if count else ""


def left_out(
    rows: pd.DataFrame, *, columns: Iterable[str] = tuple(VALUES), without_layer: bool = False
) -> str:
    """Say how many matrices, and of which methods, are not on the figure for want of a value or a layer."""
    shown = has_values(rows, columns)
    reasons = [("a value", rows[~shown])]
    if without_layer:
        reasons.append(("a layer", rows[shown & rows["layer"].isna()]))
    parts = [
        f"{len(missing)} {'matrix' if len(missing) == 1 else 'matrices'} without {what}"
        f" ({', '.join(unique(missing, 'method'))})"
        for what, missing in reasons
        if len(missing)
    ]
    return f"not shown: {', '.join(parts)}" if parts else ""

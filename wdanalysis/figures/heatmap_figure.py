"""ΔM and ΔD of every layer and module of a method."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from wdanalysis.analysis.table import apart
from wdanalysis.errors import ComparisonError
from wdanalysis.figures import selection, style

WIDE_RANGE = 100.0
"""Colours are logarithmic by default where the values differ by more than this factor."""

MOST_NAMES = 50
"""Of more modules only every second, third … is named."""


def heatmap(
    metrics: pd.DataFrame,
    method: str,
    *,
    step: int | None = None,
    log: bool | None = None,
    experts: str | None = None,
) -> Figure:
    """Draw ΔM (above) and ΔD (below) of a method, a column a layer and a row a module, or an expert.

    Several matrices of one layer and module (experts) are shown by their median. A cell without a value is
    grey; one whose ΔD may be rounding has a dot. Cells of several runs hold their mean; stacks have rows of their own.

    Parameters
    ----------
    metrics
        The metrics table.
    method
        One of its methods.
    step
        The step to show; the last by default.
    log
        Whether the colours are logarithmic; by default they are linear from zero, unless the values differ
        by more than a factor of a hundred.
    experts
        A module, ``up`` say, of which every expert gets a row.

    Raises
    ------
    ComparisonError
        The table does not have the method or step, or mixes the two axes; it has no experts of that module.

    Examples
    --------
    >>> figure = heatmap(run.metrics, "dora")
    >>> figure.axes[1].get_xlabel()
    'layer'
    """
    rows = selection.rows_where(apart(metrics), "method", method)
    vectors = selection.vectors(rows)
    rows = selection.at_step(rows, step)
    if experts is not None:
        rows = _by_expert(rows, experts)
    runs_note = selection.runs_note(rows).partition(";")[0].replace("strong: ", "")
    rows = selection.over_runs(rows)
    if len(selection.stacks(rows)) > 1:
        stack = selection.labels_of(rows, "stack")
        rows = rows.assign(module=stack.where(stack == "", stack + ".") + rows["module"])
    modules = selection.unique(rows, "module")
    table = selection.per_layer(rows[rows["layer"].notna()], ["module", "layer"])

    with style.context():
        rows_shown = len(modules) if len(table) else 1
        figure = style.new_figure(height=1.3 + 2 * (0.35 + min(0.19 * rows_shown, 9.0)))
        for panel, column in zip(figure.subplots(2, 1, sharex=True), selection.VALUES, strict=True):
            _draw_cells(panel, table, column, modules, log)
            if experts is not None:
                panel.set_ylabel("expert")
        panel.set_xlabel("layer")
        when = selection.step_names(rows)[method]
        of_experts = "" if experts is None else f", experts of {experts}"
        style.title(
            figure,
            style.listed(f"{method}{of_experts}: {vectors}", when),
            runs_note,
            selection.near_floor_note(rows[selection.has_values(rows) & rows["layer"].notna()], "dot"),
            "grey: no value" if len(table) < len(modules) * len(_all_layers(table)) else "",
            selection.left_out(rows, without_layer=True),
        )
    return figure


def _by_expert(rows: pd.DataFrame, module: str) -> pd.DataFrame:
    """The rows of a module's experts, with the expert's number for the module."""
    of_experts = rows[rows["expert"].notna()] if "expert" in rows else rows.head(0)
    found = of_experts[of_experts["module"] == module].sort_values("expert", kind="stable")
    if found.empty:
        there = ", ".join(selection.unique(of_experts, "module")) or "none"
        raise ComparisonError(
            f"no experts of {module!r} in the metrics table: the modules with experts are {there}"
        )
    return found.assign(module=found["expert"].astype(str))


def _draw_cells(panel: Axes, table: pd.DataFrame, column: str, modules: list[str], log: bool | None) -> None:
    every = -(-len(modules) // MOST_NAMES)
    panel.set_yticks(range(0, len(modules), every), style.told_apart(modules, 30)[::every])
    panel.tick_params(length=0)
    panel.grid(visible=False)
    panel.spines[:].set_visible(False)
    style.integer_axis(panel.xaxis, ticks=12)
    if table.empty:
        panel.set_axis_off()
        style.message(panel, "no matrix with a layer and values")
        return
    layers = _all_layers(table)
    cells = table.pivot(index="module", columns="layer", values=column).reindex(index=modules, columns=layers)
    values = cells.to_numpy(float, na_value=np.nan)
    panel.set_facecolor(style.MISSING)
    edges = (np.arange(layers[0], layers[-1] + 2) - 0.5, np.arange(len(modules) + 1) - 0.5)
    mesh = panel.pcolormesh(*edges, values, norm=_norm(values, log), cmap="viridis")
    panel.set_ylim(edges[1][-1], edges[1][0])
    dotted = table[table["near_floor"]]
    rows = dotted["module"].map({name: place for place, name in enumerate(modules)})
    size = float(np.clip(1200 / len(layers) ** 1.5, 1.5, 12))
    panel.scatter(
        dotted["layer"].astype(int), rows, s=size, color="white", edgecolors="black", linewidths=0.3
    )
    bar = panel.figure.colorbar(mesh, ax=panel, pad=0.015, aspect=12)
    bar.outline.set_visible(False)
    style.number_axis(bar.ax.yaxis, selection.VALUES[column], ticks=4)


def _all_layers(table: pd.DataFrame) -> np.ndarray:
    """Return the first to the last layer, without gaps."""
    return np.arange(table["layer"].min(), table["layer"].max() + 1) if len(table) else np.arange(0)


def _norm(values: np.ndarray, log: bool | None) -> Normalize:
    """Return colours from zero, or logarithmic where asked or where the values need it."""
    positive = values[values > 0]
    if not len(positive):
        return Normalize(0, 1)
    low, high = positive.min(), positive.max()
    if high > WIDE_RANGE * low if log is None else log and high > low:
        return LogNorm(low, high)
    return Normalize(0, high)

"""ΔM and ΔD by layer, a line a method: the paper's Figures 3 and 8."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wdanalysis.analysis.runs import averaged
from wdanalysis.analysis.table import apart
from wdanalysis.figures import profiles, selection, style


def layers(
    metrics: pd.DataFrame,
    module: str | Sequence[str] | None = None,
    *,
    step: int | None = None,
    log: bool | None = None,
) -> Figure:
    """Draw ΔM (left) and ΔD (right) by layer, a row of panels a module and a line a method.

    A module of a single layer, or of none, gets a point a method instead. Several matrices of one layer and
    module (experts) are shown by their median. Of several runs each is a faint line and their mean a strong one.
    Merged stacks are taken apart again (``encoder.q``), as a layer's number means something in its stack only.

    Parameters
    ----------
    metrics
        The metrics table.
    module
        One module or several; all of the table by default.
    step
        The step to show; each method's last by default.
    log
        Whether the axes of ΔM and ΔD are logarithmic; by default they are linear and start at zero, unless
        the methods differ by more than a factor of fifty.

    Raises
    ------
    ComparisonError
        The table does not have the module or step, or mixes the two axes.

    Examples
    --------
    >>> figure = layers(run.metrics, "q")
    >>> figure.axes[0].get_ylabel()
    'ΔM'
    """
    metrics = apart(metrics)
    modules = [module] if isinstance(module, str) else module or selection.unique(metrics, "module")
    rows = pd.concat([selection.rows_where(metrics, "module", name) for name in modules])
    vectors = selection.vectors(rows)
    rows = selection.at_step(rows, step)
    steps = selection.step_names(rows)
    one_step = len(set(steps.values())) == 1
    labels = {
        method: method if one_step or not steps[method] else f"{method} ({steps[method]})"
        for method in selection.unique(rows[selection.has_values(rows)], "method")
    }

    with style.context():
        styles = style.method_styles(selection.unique(metrics, "method"))
        height = 2.1 if len(modules) == 1 else 1.6 * len(modules)
        figure = style.new_figure(height=height + 0.8)
        panels = figure.subplots(len(modules), 2, squeeze=False)
        lengths = [
            _draw_module(pair, rows[rows["module"] == name], styles, log)
            for pair, name in zip(panels, modules, strict=True)
        ]
        if len(modules) > 1:
            for panel, name in zip(panels[:, 0], modules, strict=True):
                panel.set_title(style.shortened(name, 44), loc="left", fontweight="bold")
        profiles.method_legend(figure, styles, labels, max(lengths))
        what = modules[0] if len(modules) == 1 else "by layer"
        style.title(
            figure,
            style.listed(f"{what}: {vectors}", next(iter(steps.values())) if one_step else ""),
            selection.runs_note(rows),
            selection.near_floor_note(rows[selection.has_values(rows)]),
            selection.left_out(rows),
        )
    return figure


def _draw_module(
    pair: Sequence[Axes],
    rows: pd.DataFrame,
    styles: dict[str, style.MethodStyle],
    log: bool | None,
) -> int:
    """Draw ΔM and ΔD of one module; return the number of layers."""
    single = rows["layer"].nunique() < 2
    places = rows.assign(layer=0) if single else rows
    table = selection.per_layer(averaged(places), ["method", "layer"])
    with_values = places[selection.has_values(places)]
    runs = [selection.per_layer(run, ["method", "layer"]) for run in selection.runs_of(with_values)]
    lines = [(line, True) for line in runs] + [
        (line, False) for _, line in table.groupby("method", sort=False)
    ]
    methods = selection.unique(with_values, "method")
    for panel, column in zip(pair, selection.VALUES, strict=True):
        for points, faint in lines:
            line = points.sort_values("layer", kind="stable")
            method = str(line["method"].iloc[0])
            x = [methods.index(method)] * len(line) if single else line["layer"].astype(int)
            panel.plot(x, line[column], **profiles.line_style(styles[method], len(line), faint=faint))
            if not faint:
                profiles.hollow_points(panel, x, line[column], line["near_floor"], styles[method])
        profiles.value_axis(panel, table, column, log)
        if table.empty:
            panel.set_axis_off()
            style.message(panel, "no values")
        elif single:
            panel.set_xlim(-0.5, len(methods) - 0.5)
            panel.set_xticks([])
            layer = rows["layer"].dropna().unique()
            panel.set_xlabel(f"layer {layer[0]}" if len(layer) else "no layer")
        else:
            style.integer_axis(panel.xaxis)
            panel.set_xlabel("layer")
    return int(rows["layer"].nunique())

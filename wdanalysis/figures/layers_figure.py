"""ΔM and ΔD by layer, a line a method: the paper's Figures 3 and 8."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wdanalysis.analysis.runs import averaged
from wdanalysis.analysis.table import apart, merged_stacks
from wdanalysis.figures import profiles, selection, style
from wdanalysis.figures.kinds import Title

STACK_LINES = ("-", "--", ":", "-.")
"""Dashes of the lines of the first, second … stack."""


def layers(
    metrics: pd.DataFrame,
    modules: selection.Names = None,
    *,
    methods: selection.Names = None,
    step: int | None = None,
    log: bool | None = None,
    cmap: style.Cmap | None = None,
    title: Title = "short",
    ax: style.AxLike | None = None,
    figsize: style.FigSize | None = None,
) -> Figure:
    """Draw ΔM (left) and ΔD (right) by layer, a row of panels a module and a line a method.

    A module of a single layer, or of none, gets a point a method instead. Several matrices of one layer and
    module (experts) are shown by their median. Of several runs each is a faint line and their mean a strong one.
    Each stack has a module of its own (`figure8` draws them together).

    Parameters
    ----------
    metrics
        The metrics table.
    modules, methods
        One or several of the table's; all by default.
    step
        The step to show; each method's last by default.
    log
        Whether the axes of ΔM and ΔD are logarithmic; by default they are linear and start at zero, unless
        the methods differ by more than a factor of fifty.
    cmap
        Colours of the methods.
    title
        What stands over the figure: ``"none"``, ``"short"`` or ``"full"``, all of the caption.
    ax
        One axes or as many as there are panels, to draw on in place of a new figure.
    figsize
        Inches of width and height; a height of None is what the panels need.

    Raises
    ------
    ComparisonError
        The table does not have the module, method or step, or mixes the two axes.
    ValueError
        `ax` has another number of axes than there are panels.

    Examples
    --------
    >>> figure = layers(run.metrics, "q")
    >>> figure.axes[0].get_ylabel()
    'ΔM'
    """
    return _by_layer(apart(metrics), modules, methods, step, log, cmap, title, ax, figsize)


def figure8(
    metrics: pd.DataFrame,
    modules: selection.Names = None,
    *,
    methods: selection.Names = None,
    step: int | None = None,
    log: bool | None = None,
    cmap: style.Cmap | None = None,
    title: Title = "short",
    ax: style.AxLike | None = None,
    figsize: style.FigSize | None = None,
) -> Figure:
    """Draw the paper's Figures 3 and 8 on one page: ΔM and ΔD of the attention's matrices by layer.

    As `layers`, but encoder, decoder and cross-attention are together: the dashes of a line tell the stack.

    Parameters
    ----------
    metrics
        The metrics table, its stacks apart or merged.
    modules
        One or several; by default q, k and v so far as they are there, else all.
    methods, step, log, cmap, title, ax, figsize
        As for `layers`.

    Raises
    ------
    ComparisonError, ValueError
        As `layers`.

    Examples
    --------
    >>> [axes.get_title(loc="left") for axes in figure8(run.metrics).axes[::2]]
    ['q', 'v']
    """
    merged = merged_stacks(metrics)
    shown = selection.attention(merged, ("q", "k", "v")) if modules is None else modules
    return _by_layer(merged, shown, methods, step, log, cmap, title, ax, figsize)


def _by_layer(
    metrics: pd.DataFrame,
    modules: selection.Names,
    methods: selection.Names,
    step: int | None,
    log: bool | None,
    cmap: style.Cmap | None,
    title: Title,
    ax: style.AxLike | None,
    figsize: style.FigSize | None,
) -> Figure:
    """Draw the modules of a table; each stack that it has merged is a line."""
    rows = selection.chosen(metrics, module=modules, method=methods)
    axis = selection.axis_of(rows)
    rows = selection.at_step(rows, step)
    names = selection.ordered(rows, modules)
    steps = selection.step_names(rows)
    one_step = len(set(steps.values())) == 1
    labels = {
        method: method if one_step or not steps[method] else f"{method} ({steps[method]})"
        for method in selection.unique(rows[selection.has_values(rows)], "method")
    }
    stacks = dict(zip(selection.stacks(rows), STACK_LINES, strict=False))
    most = max(int(rows.loc[rows["module"] == name, "layer"].nunique()) for name in names)

    with style.context():
        styles = style.method_styles(selection.unique(metrics, "method"), cmap)
        legend = profiles.legend(styles, labels, most, stacks)
        sheet = style.sheet(
            2 * len(names),
            columns=2,
            panel_height=2.1 if len(names) == 1 else 1.65,
            legend=legend,
            ax=ax,
            figsize=figsize,
        )
        for place, name in enumerate(names):
            pair = sheet.panels[2 * place : 2 * place + 2]
            _draw_module(pair, rows[rows["module"] == name], styles, stacks, log)
            if len(names) > 1:
                pair[0].set_title(style.fitted([name], sheet.title_width)[0], loc="left")
        sheet.legend(legend)
        sheet.entitle(
            title,
            selection.heading(names, "ΔM and ΔD by layer", axis),
            f"a line is a method ({selection.VECTORS[axis]})",
            next(iter(steps.values())) if one_step else "",
            selection.runs_note(rows),
            selection.near_floor_note(rows[selection.has_values(rows)]),
            selection.left_out(rows),
        )
    return sheet.figure


def _draw_module(
    pair: Sequence[Axes],
    rows: pd.DataFrame,
    styles: dict[str, style.MethodStyle],
    stacks: dict[str, str],
    log: bool | None,
) -> None:
    """Draw ΔM and ΔD of one module."""
    single = rows["layer"].nunique() < 2
    places = rows.assign(layer=0) if single else rows
    table = selection.per_layer(averaged(places), ["method", "stack", "layer"])
    with_values = places[selection.has_values(places)]
    runs = [selection.per_layer(run, ["method", "stack", "layer"]) for run in selection.runs_of(with_values)]
    methods = selection.unique(with_values, "method")
    for panel, column in zip(pair, selection.VALUES, strict=True):
        for faint in (True, False):
            for part in runs if faint else [table]:
                ordered = part.sort_values("layer", kind="stable")
                for key, line in ordered.groupby(["method", "stack"], sort=False):
                    method, stack = map(str, key)
                    x = [methods.index(method)] * len(line) if single else line["layer"].astype(int)
                    look = profiles.line_style(styles[method], len(line), stacks.get(stack), faint=faint)
                    panel.plot(x, line[column], **look)
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

"""ΔM and ΔD of every layer and module, a row of panels a method."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure

from wdanalysis.analysis.runs import averaged
from wdanalysis.analysis.table import apart
from wdanalysis.figures import selection, style
from wdanalysis.figures.kinds import Title

WIDE_RANGE = 100.0
"""Colours are logarithmic by default where the values differ by more than this factor."""

MOST_LINES = 28
"""Of more modules only every second, third … is named, and their rows are lower."""


def heatmap(
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
    """Draw ΔM (left) and ΔD (right), a pair of panels a method: a column a layer and a row a module.

    All methods share one scale of ΔM and one of ΔD. Several matrices of one layer and module (experts) are shown by
    their median. A cell without a value is grey; one whose ΔD may be rounding has a dot. Cells of several runs hold
    their mean; stacks have rows of their own.

    Parameters
    ----------
    metrics
        The metrics table.
    modules, methods
        One or several of the table's; all by default.
    step
        The step to show; each method's last by default.
    log
        Whether the colours are logarithmic; by default they are linear from zero, unless the values differ
        by more than a factor of a hundred.
    cmap
        Colours of the values.
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
    >>> figure = heatmap(run.metrics, methods="dora")
    >>> figure.axes[1].get_xlabel()
    'layer'
    """
    rows = selection.chosen(apart(metrics), module=modules, method=methods)
    axis = selection.axis_of(rows)
    rows = selection.at_step(rows, step)
    steps = selection.step_names(rows)
    one_step = len(set(steps.values())) == 1
    runs_note = selection.runs_note(rows).partition(";")[0].replace("strong: ", "")
    rows = averaged(rows)
    in_layers = rows[rows["layer"].notna()]
    names, shown = selection.ordered(in_layers, modules), selection.unique(rows, "method")
    table = selection.per_layer(in_layers, ["method", "module", "layer"])
    places = _all_layers(table)

    with style.context():
        lines = min(len(names), MOST_LINES)
        high = 1.2 * style.line_height() * lines / style.growth()
        sheet = style.sheet(2 * len(shown), columns=2, panel_height=0.36 + high, ax=ax, figsize=figsize)
        paired = sheet.columns == 2 or not sheet.is_own
        if sheet.is_own and (figsize is None or figsize[1] is None):
            bars = 1 if paired else 2
            sheet.figure.set_figheight(sheet.figure.get_figheight() + bars * 4 * style.line_height())
        colours = style.image_colours(cmap)
        over = dict(zip(shown, style.fitted(shown, sheet.title_width), strict=True))
        named = style.fitted(names, 0.4 * sheet.title_width)
        every = max(1, math.ceil(len(names) / max(1, lines)))
        for place, column in enumerate(selection.VALUES):
            panels = sheet.panels[place::2] if paired else sheet.panels[place * len(shown) :][: len(shown)]
            norm = _norm(table[column], log)
            for panel, method in zip(panels, shown, strict=True):
                of_method = table[table["method"] == method]
                _draw_cells(panel, of_method, column, names, places, norm, colours)
                panel.set_yticks(range(0, len(names), every), named[::every])
                panel.set_title("" if paired and place else over[method], loc="left")
                panel.tick_params(labelleft=not (paired and place), labelbottom=method == shown[-1])
                panel.set_xlabel("layer" if method == shown[-1] else "")
            if len(table):
                sheet.colour_bar_below(ScalarMappable(norm, colours), selection.VALUES[column], panels)
        sheet.entitle(
            title,
            selection.heading([], "ΔM and ΔD by layer and module", axis),
            f"a cell is a matrix ({selection.VECTORS[axis]}); the methods share the colours",
            next(iter(steps.values()))
            if one_step
            else style.listed(*(f"{m}: {s}" for m, s in steps.items())),
            runs_note,
            selection.near_floor_note(rows[selection.has_values(rows) & rows["layer"].notna()], "dot"),
            "grey: no value" if len(table) < len(shown) * len(names) * len(places) else "",
            selection.left_out(rows, without_layer=True),
        )
    return sheet.figure


def _draw_cells(
    panel: Axes,
    table: pd.DataFrame,
    column: str,
    modules: list[str],
    layers: np.ndarray,
    norm: Normalize,
    colours: Colormap,
) -> None:
    panel.tick_params(length=0)
    panel.grid(visible=False)
    panel.spines[:].set_visible(False)
    if table.empty:
        panel.set_axis_off()
        style.message(panel, "no layers with values")
        return
    cells = table.pivot(index="module", columns="layer", values=column).reindex(index=modules, columns=layers)
    panel.set_facecolor(style.MISSING)
    edges = (np.arange(layers[0], layers[-1] + 2) - 0.5, np.arange(len(modules) + 1) - 0.5)
    values = cells.to_numpy(float, na_value=np.nan)
    panel.pcolormesh(*edges, values, norm=norm, cmap=colours)
    panel.set_ylim(edges[1][-1], edges[1][0])
    style.integer_axis(panel.xaxis, ticks=10)
    dotted = table[table["near_floor"]]
    rows = dotted["module"].map({name: place for place, name in enumerate(modules)})
    size = float(np.clip(1200 / len(layers) ** 1.5, 1.5, 8))
    panel.scatter(
        dotted["layer"].astype(int), rows, s=size, color="white", edgecolors="black", linewidths=0.3
    )


def _all_layers(table: pd.DataFrame) -> np.ndarray:
    """Return the first to the last layer, without gaps."""
    return np.arange(table["layer"].min(), table["layer"].max() + 1) if len(table) else np.arange(0)


def _norm(values: pd.Series, log: bool | None) -> Normalize:
    """Return colours from zero, or logarithmic where asked or where the values need it."""
    positive = values[values > 0]
    if not len(positive):
        return Normalize(0, 1)
    low, high = positive.min(), positive.max()
    if high > WIDE_RANGE * low if log is None else log and high > low:
        return LogNorm(low, high)
    return Normalize(0, high)

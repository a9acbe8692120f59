"""The vectors of a module one by one, which the means ΔM and ΔD hide: their joint density, a panel a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from wdanalysis.errors import ComparisonError
from wdanalysis.figures import selection, style
from wdanalysis.figures.kinds import Title

BINS = 60
"""Cells of a side."""

LOWEST = 1e-16
"""1 − cos is not drawn below: it is what float64 tells from nothing."""


def density(
    vectors: pd.DataFrame,
    modules: selection.Names = None,
    *,
    methods: selection.Names = None,
    step: int | None = None,
    cmap: style.Cmap | None = None,
    title: Title = "short",
    ax: style.AxLike | None = None,
    figsize: style.FigSize | None = None,
    metrics: pd.DataFrame | None = None,
) -> Figure:
    """Draw how many vectors have which change of length (y) and of direction (x), a panel a method.

    Of several modules each begins a row of panels. Both axes are logarithmic and the same in all panels; the change of
    length is taken without its sign. The cross is the mean over all vectors, which a vector or two may pull far from
    where most are. The vectors of several runs are counted together.

    Parameters
    ----------
    vectors
        The table of vectors: a row a vector, with its rel_delta_m (m − m₀ over m₀) and delta_d (1 − cos).
    modules, methods
        One or several of the table's; all by default.
    step
        The step to show; each method's last by default.
    cmap
        Colours of the counts.
    title
        What stands over the figure: ``"none"``, ``"short"`` or ``"full"``, all of the caption.
    ax
        One axes or as many as there are panels, to draw on in place of a new figure.
    figsize
        Inches of width and height; a height of None is what the panels need.
    metrics
        The metrics table, which tells the axis that the vectors lie along: the heading names it.

    Raises
    ------
    ComparisonError
        The table does not have the module, method or step.
    ValueError
        `ax` has another number of axes than there are panels.

    Examples
    --------
    >>> table = pd.DataFrame({"rel_delta_m": [0.01, -0.02, 0.03], "delta_d": [1e-3, 2e-3, 4e-3]})
    >>> figure = density(table.assign(method="ft", module="q", step=1, layer=0), "q")
    >>> figure.axes[0].get_xscale()
    'log'
    """
    if vectors.empty:
        raise ComparisonError("there are no vectors: they are kept where they are asked for")
    rows = selection.at_step(selection.chosen(vectors, module=modules, method=methods), step)
    shown, names = selection.ordered(rows, modules), selection.unique(rows, "method")
    when = selection.step_names(rows)
    axis = "" if metrics is None else selection.axis_of(metrics)
    runs = {name: rows.loc[rows["method"] == name, "run"].nunique() if "run" in rows else 1 for name in names}
    x, y = rows["delta_d"].to_numpy(float), np.abs(rows["rel_delta_m"].to_numpy(float))
    known = np.isfinite(x) & np.isfinite(y)
    drawn = known & (x > LOWEST) & (y > 0)
    hidden = int((~drawn).sum())
    panels = [(module, method) for module in shown for method in names]
    of_panel = {
        (module, method): ((rows["module"] == module) & (rows["method"] == method)).to_numpy()
        for module, method in panels
    }
    edges = [_edges(values[drawn]) for values in (x, y)]
    counts = {
        panel: np.histogram2d(x[drawn & own], y[drawn & own], edges)[0] for panel, own in of_panel.items()
    }
    norm = LogNorm(1, max(10.0, *(count.max() for count in counts.values())))

    with style.context():
        colours = style.layer_colours(cmap)
        sheet = style.sheet(
            len(names), blocks=len(shown), panel_height=1.95, has_bar=True, ax=ax, figsize=figsize
        )
        titles = style.fitted(
            [method if len(shown) == 1 else f"{module}, {method}" for module, method in panels],
            sheet.title_width,
        )
        for place, (panel, name, key) in enumerate(zip(sheet.panels, titles, panels, strict=True)):
            cells = np.ma.masked_equal(counts[key].T, 0)
            panel.pcolormesh(*edges, cells, norm=norm, cmap=colours, rasterized=True)
            if (own := known & of_panel[key]).any():
                panel.plot(x[own].mean(), y[own].mean(), **_CROSS, markeredgecolor=style.ground())
            panel.set(xscale="log", yscale="log")
            panel.set(xlim=(edges[0][0], edges[0][-1]), ylim=(edges[1][0], edges[1][-1]))
            panel.set_title(name, loc="left")
            style.number_axis(panel.xaxis, "1 − cos")
            style.number_axis(panel.yaxis, "|m − m₀|/m₀")
            sheet.label_edges(panel, place % len(names), len(names), every_tick=False)
        style.count_axis(sheet.colour_bar(ScalarMappable(norm, colours), "vectors in a cell"))
        sheet.entitle(
            title,
            selection.heading(shown, "the vectors behind ΔM and ΔD", axis),
            "cross: mean of the vectors",
            f"not shown: {hidden:,} vectors that keep their length or direction" if hidden else "",
            of_panels=[
                f"{module}, {method}: {style.listed(when[method], _counted(count, runs[method]))}"
                for (module, method), count in counts.items()
            ],
        )
    return sheet.figure


def _counted(count: np.ndarray, runs: int) -> str:
    return f"{int(count.sum()):,} vectors" + (f" of {runs} runs" if runs > 1 else "")


_CROSS: Mapping[str, Any] = {"marker": "P", "color": "#D55E00", "markersize": 8}


def _edges(values: np.ndarray) -> np.ndarray:
    """Return the cells' edges along an axis, evenly spaced on a logarithmic scale."""
    if not len(values):
        return np.geomspace(1e-3, 1, BINS + 1)
    return np.geomspace(0.9 * values.min(), 1.1 * values.max(), BINS + 1)

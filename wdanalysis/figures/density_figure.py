"""The vectors of a module one by one, which the means ΔM and ΔD hide: their joint density, a panel a method."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from wdanalysis.errors import ComparisonError
from wdanalysis.figures import selection, style
from wdanalysis.figures.scatter_figure import TITLE_CHARACTERS

BINS = 60
"""Cells of a side."""

LOWEST = 1e-16
"""1 − cos is not drawn below: it is what float64 tells from nothing."""


def density(
    vectors: pd.DataFrame, module: str, *, step: int | None = None, metrics: pd.DataFrame | None = None
) -> Figure:
    """Draw how many vectors of a module have which change of length (y) and of direction (x), a panel a method.

    Both axes are logarithmic and the same in all panels; the change of length is taken without its sign. The cross is
    the mean over all vectors, which a vector or two may pull far from where most are. The vectors of several runs are
    counted together.

    Parameters
    ----------
    vectors
        The table of vectors: a row a vector, with its rel_delta_m (m − m₀ over m₀) and delta_d (1 − cos).
    module
        One of its modules.
    step
        The step to show; each method's last by default.
    metrics
        The metrics table, which tells the axis that the vectors lie along: the heading names it.

    Raises
    ------
    ComparisonError
        The table does not have the module or the step.

    Examples
    --------
    >>> table = pd.DataFrame({"rel_delta_m": [0.01, -0.02, 0.03], "delta_d": [1e-3, 2e-3, 4e-3]})
    >>> figure = density(table.assign(method="ft", module="q", step=1, layer=0), "q")
    >>> figure.axes[0].get_xscale()
    'log'
    """
    if vectors.empty:
        raise ComparisonError("there are no vectors: they are kept where they are asked for")
    rows = selection.rows_where(vectors, "module", module)
    rows = selection.at_step(rows, step)
    methods = selection.unique(rows, "method")
    when = selection.step_names(rows)
    one_step = len(set(when.values())) == 1
    x, y = rows["delta_d"].to_numpy(float), np.abs(rows["rel_delta_m"].to_numpy(float))
    drawn = np.isfinite(x) & np.isfinite(y) & (x > LOWEST) & (y > 0)
    hidden = int((~drawn).sum())
    method_of = rows["method"].to_numpy()
    along = "" if metrics is None else selection.vectors(metrics)
    n_rows, n_columns = style.grid(len(methods))

    with style.context():
        width = style.WIDTH if n_columns > 1 else 4.5
        figure = style.new_figure(height=0.55 + 2.2 * n_rows, width=width)
        panels = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False).ravel()
        titles = style.told_apart(methods, TITLE_CHARACTERS[n_columns])
        edges = [_edges(values[drawn]) for values in (x, y)]
        counts = {
            method: np.histogram2d(x[shown], y[shown], edges)[0]
            for method in methods
            for shown in [drawn & (method_of == method)]
        }
        most = max(float(count.max()) for count in counts.values())
        norm = LogNorm(1, max(most, 10))
        for index, (panel, method, title) in enumerate(zip(panels, methods, titles, strict=False)):
            cells = np.ma.masked_equal(counts[method].T, 0)
            mesh = panel.pcolormesh(*edges, cells, norm=norm, cmap=style.layer_colours(), rasterized=True)
            of_method = np.isfinite(x) & np.isfinite(y) & (method_of == method)
            if of_method.any():
                panel.plot(
                    *(x[of_method].mean(), y[of_method].mean()),
                    **{"marker": "P", "color": "#D55E00", "markersize": 8, "markeredgecolor": "white"},
                )
            panel.set(xscale="log", yscale="log")
            panel.set_xlim(edges[0][0], edges[0][-1])
            panel.set_ylim(edges[1][0], edges[1][-1])
            panel.set_title(title, loc="left", pad=15)
            runs = rows.loc[method_of == method, "run"].nunique() if "run" in rows else 1
            counted = f"{int(counts[method].sum()):,} vectors" + (f" of {runs} runs" if runs > 1 else "")
            says = style.listed("" if one_step else when[method], counted)
            panel.text(0, 1.03, says, transform=panel.transAxes, va="bottom", color=style.QUIET)
            style.number_axis(panel.xaxis, "1 − cos" if index + n_columns >= len(methods) else "", ticks=4)
            style.number_axis(panel.yaxis, "" if index % n_columns else "|m − m₀|/m₀")
        for empty in range(len(methods), len(panels)):
            panels[empty].remove()
            panels[empty - n_columns].tick_params(labelbottom=True)
        bar = figure.colorbar(
            mesh, ax=panels[: len(methods)], label="vectors in a cell", aspect=30 * n_rows, pad=0.015
        )
        bar.outline.set_visible(False)
        style.count_axis(bar.ax.yaxis)
        style.title(
            figure,
            style.listed(
                f"{module}: the vectors behind ΔM and ΔD",
                along,
                next(iter(when.values())) if one_step else "",
            ),
            "cross: mean of the vectors",
            f"not shown: {hidden:,} vectors that keep their length or direction" if hidden else "",
        )
    return figure


def _edges(values: np.ndarray) -> np.ndarray:
    """Return the cells' edges along an axis, evenly spaced on a logarithmic scale."""
    if not len(values):
        return np.geomspace(1e-3, 1, BINS + 1)
    return np.geomspace(0.9 * values.min(), 1.1 * values.max(), BINS + 1)

"""ΔM and ΔD by training step, a line a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wdanalysis.analysis.floors import near_floor
from wdanalysis.analysis.runs import averaged
from wdanalysis.figures import profiles, selection, style
from wdanalysis.figures.kinds import Title


def trajectory(
    metrics: pd.DataFrame,
    modules: selection.Names = None,
    *,
    methods: selection.Names = None,
    log: bool | None = None,
    cmap: style.Cmap | None = None,
    title: Title = "short",
    ax: style.AxLike | None = None,
    figsize: style.FigSize | None = None,
) -> Figure:
    """Draw the median of ΔM (left) and of ΔD (right) over a module's layers by step: a row a module, a line a method.

    The band, or for a method of one step the bar, holds the middle half of the layers. A point is hollow where the ΔD
    of most layers may be rounding. Of several runs each one's median is a faint line; line and band are those of their
    mean.

    Parameters
    ----------
    metrics
        The metrics table.
    modules, methods
        One or several of the table's; all by default.
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
        The table does not have the module or method, or mixes the two axes.
    ValueError
        `ax` has another number of axes than there are panels.

    Examples
    --------
    >>> figure = trajectory(run.metrics, "q")
    >>> figure.axes[0].get_ylabel()
    'ΔM'
    """
    rows = selection.chosen(metrics, module=modules, method=methods)
    axis = selection.axis_of(rows)
    names = selection.ordered(rows, modules)
    stepped = rows[rows["step"].notna() & selection.has_values(rows)]
    means = averaged(stepped)
    means = means.assign(near_floor=near_floor(means))
    without_step = selection.unique(rows[rows["step"].isna()], "method")
    labels = {method: method for method in selection.unique(stepped, "method")}

    with style.context():
        styles = style.method_styles(selection.unique(metrics, "method"), cmap)
        legend = profiles.legend(styles, labels, stepped["step"].nunique())
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
            of_module, their_means = (table[table["module"] == name] for table in (stepped, means))
            _draw_module(pair, of_module, their_means, styles, log)
            if len(names) > 1:
                pair[0].set_title(style.fitted([name], sheet.title_width)[0], loc="left")
        sheet.legend(legend)
        sheet.entitle(
            title,
            selection.heading(names, "ΔM and ΔD by step", axis),
            f"line: median of the layers ({selection.VECTORS[axis]})"
            + (", band: their middle half" if stepped["layer"].nunique() > 1 else ""),
            f"not shown: {', '.join(without_step)}, without a step" if without_step else "",
            selection.runs_note(stepped),
            selection.near_floor_note(means, "hollow (most layers)"),
            selection.left_out(rows[rows["step"].notna()]),
        )
    return sheet.figure


def _draw_module(
    pair: Sequence[Axes],
    rows: pd.DataFrame,
    means: pd.DataFrame,
    styles: Mapping[str, style.MethodStyle],
    log: bool | None,
) -> None:
    """Draw ΔM and ΔD of one module: each run's median, and of their means the median and the middle half."""
    runs = selection.runs_of(rows)
    for panel, column in zip(pair, selection.VALUES, strict=True):
        for run in runs:
            median = run.groupby("step")[column].median()
            method = str(run["method"].iloc[0])
            look = profiles.line_style(styles[method], len(median), faint=True)
            panel.plot(median.index.astype(int), median, **look)
        for method in selection.unique(means, "method"):
            by_step = means[means["method"] == method].groupby("step")
            low, median, high = (by_step[column].quantile(part) for part in (0.25, 0.5, 0.75))
            x = median.index.astype(int)
            panel.plot(x, median, **profiles.line_style(styles[method], len(x)))
            mostly = by_step["near_floor"].mean() > 0.5
            profiles.hollow_points(panel, x, median, mostly, styles[method])
            if len(x) > 1:
                panel.fill_between(x, low, high, color=styles[method].color, alpha=0.13, linewidth=0)
            else:
                panel.vlines(x, low, high, color=styles[method].color)
        profiles.value_axis(panel, rows, column, log)
        panel.set_xlabel("step")
        style.step_axis(panel.xaxis, rows["step"].dropna())
        if rows.empty:
            panel.set_axis_off()
            style.message(panel, "no step with values")

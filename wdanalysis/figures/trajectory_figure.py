"""ΔM and ΔD by training step, a line a method."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from wdanalysis.analysis.floors import near_floor
from wdanalysis.analysis.runs import averaged
from wdanalysis.figures import profiles, selection, style


def trajectory(metrics: pd.DataFrame, module: str, *, log: bool | None = None) -> Figure:
    """Draw the median of ΔM (left) and of ΔD (right) over a module's layers by step, a line a method.

    The band, or for a method of one step the bar, holds the middle half of the layers. A point is hollow where the ΔD
    of most layers may be rounding. Of several runs each one's median is a faint line; line and band are those of their
    mean.

    Parameters
    ----------
    metrics
        The metrics table.
    module
        One of its modules.
    log
        Whether the axes of ΔM and ΔD are logarithmic; by default they are linear and start at zero, unless
        the methods differ by more than a factor of fifty.

    Raises
    ------
    ComparisonError
        The table does not have the module, or mixes the two axes.

    Examples
    --------
    >>> figure = trajectory(run.metrics, "q")
    >>> figure.axes[0].get_ylabel()
    'ΔM'
    """
    rows = selection.rows_where(metrics, "module", module)
    vectors = selection.vectors(rows)
    stepped = rows[rows["step"].notna() & selection.has_values(rows)]
    runs = selection.runs_of(stepped)
    means = averaged(stepped)
    means = means.assign(near_floor=near_floor(means))
    without_step = selection.unique(rows[rows["step"].isna()], "method")
    steps = sorted(stepped["step"].unique())

    with style.context():
        styles = style.method_styles(selection.unique(metrics, "method"))
        figure = style.new_figure(height=2.9)
        for panel, column in zip(figure.subplots(1, 2), selection.VALUES, strict=True):
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
            profiles.value_axis(panel, stepped, column, log)
            panel.set_xlabel("step")
            style.integer_axis(panel.xaxis, ticks=6)
            if 0 < len(steps) <= 5:
                panel.set_xticks([int(step) for step in steps])
            if not steps:
                panel.set_axis_off()
                style.message(panel, "no checkpoint with a step and values")
        labels = {method: method for method in selection.unique(stepped, "method")}
        profiles.method_legend(figure, styles, labels, len(steps))
        style.title(
            figure,
            f"{module}: {vectors}",
            "line: median of the layers, band: their middle half" if stepped["layer"].nunique() > 1 else "",
            f"not shown: {', '.join(without_step)}, without a step" if without_step else "",
            selection.runs_note(stepped),
            selection.near_floor_note(means, "hollow (most layers)"),
            selection.left_out(rows[rows["step"].notna()]),
        )
    return figure

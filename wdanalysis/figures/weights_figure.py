"""How large each update of an adapter is and which rank it needs, by layer, a line a kind of module."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wdanalysis.errors import ComparisonError
from wdanalysis.figures import profiles, selection, style
from wdanalysis.figures.kinds import Title

PANELS = {"norm": "‖s·BA‖", "rank_95": "rank for 95 %", "m_spread": "spread of m (sd/mean)"}
"""What each panel shows, by column; the last where there are magnitudes."""


def weights(
    table: pd.DataFrame,
    modules: selection.Names = None,
    *,
    cmap: style.Cmap | None = None,
    title: Title = "short",
    ax: style.AxLike | None = None,
    figsize: style.FigSize | None = None,
) -> Figure:
    """Draw ‖s·BA‖, the rank for 95 % of its energy and, for DoRA, the spread of m by layer, a line a kind of module.

    Hollow markers are outliers of their kind. Several modules of a kind in one layer are shown by their median.

    Parameters
    ----------
    table
        The rows of one step of `AdapterWeights.modules`.
    modules
        One or several kinds; all by default.
    cmap
        Colours of the kinds.
    title
        What stands over the figure: ``"none"``, ``"short"`` or ``"full"``, all of the caption.
    ax
        As many axes as there are panels, to draw on in place of a new figure.
    figsize
        Inches of width and height; a height of None is what the panels need.

    Raises
    ------
    ComparisonError
        The table has no rows, or does not have the module.
    ValueError
        `ax` has another number of axes than there are panels.

    Examples
    --------
    >>> figure = weights(wd.adapter_weights("sample_checkpoints/dora/checkpoint-240").last())
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['‖s·BA‖', 'rank for 95 %', 'spread of m (sd/mean)']
    """
    if table.empty:
        raise ComparisonError("there are no updates to draw: the table has no rows.")
    rows = selection.chosen(table, module=modules)
    names = selection.ordered(rows, modules)
    shown = [column for column in PANELS if rows[column].notna().any()] or ["norm"]
    single = rows["layer"].nunique() < 2
    places = rows.assign(place=rows["module"].map(names.index) if single else rows["layer"].astype("Float64"))
    most = int(rows["layer"].nunique())
    with style.context():
        styles = style.method_styles(selection.unique(table, "module"), cmap)
        legend = profiles.legend(styles, {name: name for name in names}, most)
        sheet = style.sheet(
            len(shown), columns=len(shown), panel_height=2.1, legend=legend, ax=ax, figsize=figsize
        )
        for panel, column in zip(sheet.panels, shown, strict=True):
            known = places.dropna(subset=["place", column])
            for name in names:
                _draw(panel, known[known["module"] == name], column, styles[name])
            _axes(panel, column, rows, single=single)
        sheet.legend(legend)
        outliers = int(rows["outlier"].sum())
        sheet.entitle(
            title,
            "size and rank of the updates by layer",
            "a line is a kind of module",
            "dotted: r" if "rank_95" in shown else "",
            f"hollow: {outliers} outliers among their kind" if outliers else "",
        )
    return sheet.figure


def _draw(panel: Axes, rows: pd.DataFrame, column: str, of_kind: style.MethodStyle) -> None:
    line = rows.groupby("place").agg({column: "median", "outlier": "any"})
    x, y = line.index.to_numpy(float), line[column].to_numpy(float)
    if not len(line):
        return
    panel.plot(x, y, **profiles.line_style(of_kind, len(line)))
    profiles.hollow_points(panel, x, y, line["outlier"], of_kind)


def _axes(panel: Axes, column: str, rows: pd.DataFrame, *, single: bool) -> None:
    if column == "rank_95":
        for rank in rows["rank"].unique():
            panel.axhline(rank, color=style.NULL, linestyle=":", zorder=1)
        panel.set_ylim(0, 1.06 * rows["rank"].max())
        panel.set_ylabel(PANELS[column])
        style.integer_axis(panel.yaxis, ticks=6)
    else:
        highest = panel.dataLim.ymax
        panel.set_ylim(0, 1.06 * highest if 0 < highest < float("inf") else 1)
        style.number_axis(panel.yaxis, PANELS[column])
    if single:
        panel.set_xticks([])
        panel.set_xlabel("no layers" if rows["layer"].isna().all() else "one layer")
    else:
        style.integer_axis(panel.xaxis, ticks=6)
        panel.set_xlabel("layer")

"""ΔM against ΔD, a point a matrix and a panel a method: the paper's Figures 2 and 7."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from wdanalysis.analysis import readings as sentences
from wdanalysis.analysis import regression
from wdanalysis.analysis.floors import near_floor
from wdanalysis.analysis.nulls import null_curve
from wdanalysis.analysis.runs import averaged
from wdanalysis.analysis.table import labels
from wdanalysis.errors import ComparisonError
from wdanalysis.figures import selection, style
from wdanalysis.figures.kinds import PAPER_X, PAPER_Y, QUANTITIES

LEAST_SHARE = 1 / 8
"""Panels share their axes unless a method's points would fill less than this part of a side."""

TITLE_CHARACTERS = {1: 50, 2: 34, 3: 26}
"""Characters of a method's name that fit over a panel, by the number of panels side by side."""

MANY_POINTS = 2000
"""Panels with more points are drawn as a picture in a PDF or SVG, which would be slow to open otherwise."""

NULL_ROOM = 1.0
"""The axes reach out for updates without structure by so many times the range of the points, and no further."""

OUTLINES = ("white", "black", "#D55E00", "#56B4E9")
"""Outlines of the markers of the first, second … stack."""

STRUCTURELESS = "null: without structure"

Line = Mapping[str, Any]
"""The `pooled` row of the table of correlations for one panel."""


def scatter(
    metrics: pd.DataFrame,
    module: str,
    *,
    x: str = PAPER_X,
    y: str = PAPER_Y,
    share_axes: bool | None = None,
    correlations: pd.DataFrame | None = None,
    readings: pd.DataFrame | None = None,
) -> Figure:
    """Draw ΔM (y) against ΔD (x) of a module's matrices, a panel a method.

    Colour tells the layer, the marker the step (a range of steps where there are more than seven); a hollow
    marker is a matrix whose ΔD is near what rounding makes by itself, and the outline tells the stack where several
    are merged. Of several runs each is drawn faintly and their mean strongly. Grey dots are where
    updates without structure of the same size would lie, as far as the table has the null models.

    The line is the least-squares line over all points of a panel; its band is the 95 % interval of the slope, turned
    about the mean of the points. Line, band and the numbers above a panel are those of scope `pooled` in the table of
    correlations: their intervals come from layers. The heading ends with what
    `wdanalysis.analysis.readings` reads from each panel.

    Parameters
    ----------
    metrics
        The metrics table.
    module
        One of its modules.
    x, y
        Columns to show, of `wdanalysis.figures.kinds.QUANTITIES`. The correlations are then those of these columns;
        null models and readings are of ΔM and ΔD alone.
    share_axes
        Whether all panels have the same axes. By default they do, unless one method's changes are so much
        larger that another's points would shrink to a spot; the figure then says that the axes differ.
    correlations, readings
        The tables of these names, where they are made already.

    Raises
    ------
    ComparisonError
        The table does not have the module or a column, or mixes the two axes.
    ValueError
        `x` or `y` is no quantity.

    Examples
    --------
    >>> figure = scatter(run.metrics, "q")
    >>> figure.axes[0].get_ylabel()
    'ΔM'
    >>> scatter(run.metrics, "q", y="rel_delta_m").axes[0].get_ylabel()
    'ΔM/m₀'
    """
    pair = (x, y)
    rows = selection.rows_where(metrics, "module", module)
    vectors = selection.vectors(rows)
    _check(rows, pair)
    as_in_the_paper = pair == (PAPER_X, PAPER_Y)
    methods = selection.unique(rows, "method")
    every_run = rows[selection.has_values(rows, pair)]
    points = averaged(every_run)
    null = null_curve(points) if as_in_the_paper else null_curve(points.iloc[:0])
    lines = _pooled_lines(rows, pair, correlations)
    share = _fill_shared_axes(points, pair) if share_axes is None else share_axes
    markers = _step_markers(points["step"])
    layers = points["layer"].dropna().astype(int)
    norm = Normalize(layers.min(), layers.max()) if len(layers) else Normalize(0, 1)
    n_rows, n_columns = style.grid(len(methods))
    width = style.WIDTH if n_columns > 1 else 4.5
    texts = _readings(metrics, module, readings) if as_in_the_paper else []

    entries = _legend(points, markers, null, lines)

    with style.context():
        numbers = {method: _numbers(lines.get(method, {})) for method in methods}
        tall = max(map(len, numbers.values()))
        height = 0.6 + (1.95 + 0.14 * tall) * n_rows
        height += style.height_of(texts, width) + style.height_of_legend(
            [label for _, label in entries], width
        )
        figure = style.new_figure(height=height, width=width)
        panels = figure.subplots(n_rows, n_columns, sharex=share, sharey=share, squeeze=False).ravel()
        titles = style.told_apart(methods, TITLE_CHARACTERS[n_columns])
        for panel, method, title in zip(panels, methods, titles, strict=False):
            of_method = points[points["method"] == method]
            _draw_null(panel, null[null["method"] == method])
            for of_run in selection.runs_of(every_run[every_run["method"] == method]):
                _draw_points(panel, of_run, pair, markers, norm, faint=True)
            _draw_points(panel, of_method, pair, markers, norm)
            _draw_line(panel, of_method, pair, lines.get(method, {}))
            panel.set_title(title, loc="left", pad=6 + 10 * tall)
            panel.text(
                *(0, 1.03, "\n".join(numbers[method])),
                transform=panel.transAxes,
                va="bottom",
                color=style.QUIET,
            )
            if of_method.empty:
                style.message(panel, "no values")
            if share:
                _set_axes(panel, every_run, null, pair)
            else:
                _set_axes(panel, *_of(method, every_run, null), pair)
        for empty in range(len(methods), len(panels)):
            panels[empty].remove()
            panels[empty - n_columns].tick_params(labelbottom=True)
        for index, panel in enumerate(panels[: len(methods)]):
            if share and index + n_columns < len(methods):
                panel.set_xlabel("")
            if share and index % n_columns:
                panel.set_ylabel("")
        if layers.nunique() > 1:
            colours = ScalarMappable(norm, style.layer_colours())
            bar = figure.colorbar(
                colours, ax=panels[: len(methods)], label="layer", aspect=30 * n_rows, pad=0.015
            )
            bar.outline.set_visible(False)
            style.integer_axis(bar.ax.yaxis)
        style.legend(figure, [handle for handle, _ in entries], [label for _, label in entries])
        names = list(dict.fromkeys(name for name, _ in markers.values()))
        style.title(
            figure,
            f"{module}: {_heading(pair)}, {vectors}",
            style.listed(
                f"layer {layers.iloc[0]}" if layers.nunique() == 1 else "",
                f"step {names[0]}" if len(names) == 1 else "",
                "" if share or len(methods) == 1 else "the axes differ from panel to panel",
            ),
            selection.runs_note(every_run),
            selection.near_floor_note(points),
            _beyond_note(
                sum(
                    _beyond(panel, null[null["method"] == method])
                    for panel, method in zip(panels, methods, strict=False)
                )
            ),
            selection.left_out(rows, columns=pair),
            *texts,
        )
    return figure


def _check(rows: pd.DataFrame, pair: tuple[str, str]) -> None:
    """Refuse a pair of columns that is none, or that the table does not have."""
    for column in pair:
        if column not in QUANTITIES:
            raise ValueError(f"there is no quantity {column!r}; choose of {', '.join(QUANTITIES)}")
        if column not in rows or (rows[column].isna().all() and rows[PAPER_Y].notna().any()):
            raise ComparisonError(
                f"the metrics table has no values of {column}; measure again, with diagnostics"
            )


def _heading(pair: tuple[str, str]) -> str:
    if pair == (PAPER_X, PAPER_Y):
        return "magnitude change ΔM against direction change ΔD"
    x, y = (QUANTITIES[column].name for column in pair)
    return f"{y} against {x}"


def _of(method: str, one: pd.DataFrame, other: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows of a method in two tables."""
    return one[one["method"] == method], other[other["method"] == method]


def _pooled_lines(
    rows: pd.DataFrame, pair: tuple[str, str], correlations: pd.DataFrame | None
) -> dict[str, Line]:
    """Return the pooled row of the table of correlations for each method: of ΔM on ΔD, or of y on x."""
    if pair != (PAPER_X, PAPER_Y):
        unfit = [name for name in map(str, rows) if name.startswith("null_") or name.endswith("_unshrunk")]
        swapped = rows.assign(**{PAPER_X: rows[pair[0]], PAPER_Y: rows[pair[1]]}).drop(columns=unfit)
        correlations = regression.correlations(averaged(swapped))
        nulls = [name for name in map(str, correlations) if name.startswith("r_null")]
        correlations = correlations.drop(columns=nulls)
    elif correlations is None:
        correlations = regression.correlations(averaged(rows))
    module = rows["module"].iloc[0]
    pooled = correlations[(correlations["scope"] == "pooled") & (correlations["module"] == module)]
    return {str(row["method"]): row for row in pooled.to_dict("records")}


def _readings(metrics: pd.DataFrame, module: str, readings: pd.DataFrame | None) -> list[str]:
    """Return what is read from each panel, a paragraph a method; a sentence may tell of how many panels it is one."""
    table = sentences.readings(averaged(metrics)) if readings is None else readings
    table = table[table["module"] == module]
    by_method = table.groupby("method", sort=False)["sentence"]
    return [_said(str(method), list(sentences)) for method, sentences in by_method]


def _said(method: str, found: list[str]) -> str:
    """The sentences on a method's panel that have room above it, whole; "…" for those that have not."""
    text = f"{method}: {found[0]}"
    for sentence in found[1:]:
        if len(text) + len(sentence) + 3 > style.LONGEST_LINE:
            return f"{text} …"
        text = f"{text} {sentence}"
    return text


def _step_markers(steps: pd.Series) -> dict[object, tuple[str, str]]:
    """Return (name, marker) for each step; many steps share a few markers in the order of training."""
    known = sorted(int(step) for step in steps.dropna().unique())
    parts = np.array_split(known, min(len(known), len(style.MARKERS) - 1)) if known else []
    markers: dict[object, tuple[str, str]] = {}
    for part, marker in zip(parts, style.MARKERS, strict=False):
        name = f"{part[0]}" if len(part) == 1 else f"{part[0]}–{part[-1]}"
        markers |= dict.fromkeys(part.tolist(), (name, marker))
    if steps.isna().any():
        markers[None] = ("not known", style.MARKERS[len(parts)])
    return markers


def _draw_points(
    panel: Axes,
    points: pd.DataFrame,
    pair: tuple[str, str],
    markers: dict[object, tuple[str, str]],
    norm: Normalize,
    *,
    faint: bool = False,
) -> None:
    size = float(np.clip(2500 / len(points), 7, 26)) if len(points) else 0.0
    many = len(points) > MANY_POINTS
    colours = style.layer_colours().with_extremes(bad=style.MISSING)
    outlines = dict(zip(selection.stacks(points), OUTLINES, strict=False))
    shown = points.assign(_hollow=near_floor(points), _stack=labels(points, "stack"))
    for step, at_step in shown.groupby("step", dropna=False):
        marker = markers[None if pd.isna(step) else step][1]
        for (stack, hollow), rows in at_step.groupby(["_stack", "_hollow"]):
            outline = outlines.get(str(stack), OUTLINES[-1])
            width = 0.7 if outline != OUTLINES[0] else 0 if many else 0.25
            drawn = panel.scatter(
                rows[pair[0]],
                rows[pair[1]],
                c=rows["layer"].astype("Float64").to_numpy(float, na_value=np.nan),
                marker=marker,
                s=0.6 * size if faint else size,
                cmap=colours,
                norm=norm,
                alpha=0.22 if faint else None,
                plotnonfinite=True,
                linewidths=0 if faint else 0.9 if hollow else width,
                edgecolors=outline,
                rasterized=many,
                zorder=1.8 if faint else 2,
            )
            if hollow and not faint:  # the edge takes the layer's colour instead of the face
                drawn.set(facecolor="none", edgecolor=None)
                if outline != OUTLINES[0]:
                    drawn.set_path_effects([withStroke(linewidth=2.0, foreground=outline)])


def _draw_null(panel: Axes, null: pd.DataFrame) -> None:
    """Draw where updates without structure would lie: a dot for each matrix, and how far they spread."""
    if null.empty:
        return
    many = len(null) > MANY_POINTS
    panel.vlines(
        null["delta_d"],
        null["delta_m_low"],
        null["delta_m_high"],
        color=style.NULL,
        linewidth=2.2,
        alpha=0.35,
        zorder=0.8,
        rasterized=many,
    )
    panel.plot(null["delta_d"], null["delta_m"], **_NULL_DOT, zorder=0.9, rasterized=many)


def _beyond(panel: Axes, null: pd.DataFrame) -> int:
    """How many of a panel's grey dots lie beyond its axes."""
    sides = (("delta_d", panel.get_xlim()), ("delta_m", panel.get_ylim()))
    return int((~np.logical_and.reduce([null[column].between(*limits) for column, limits in sides])).sum())


def _beyond_note(count: int) -> str:
    """Say how many grey dots are not seen."""
    dots, lie = ("dot", "lies") if count == 1 else ("dots", "lie")
    return f"{count} null {dots} {lie} beyond the axes" if count else ""


_NULL_DOT: Mapping[str, Any] = {"color": style.NULL, "marker": ".", "markersize": 3, "linestyle": "none"}


def _draw_line(panel: Axes, points: pd.DataFrame, pair: tuple[str, str], line: Line) -> None:
    """Draw a panel's line, and its band where the table of correlations has the slope's interval."""
    slope, intercept = line.get("slope", np.nan), line.get("intercept", np.nan)
    if points.empty or not np.isfinite(slope):
        return
    x = np.array([points[pair[0]].min(), points[pair[0]].max()])
    ends = np.array([line.get("slope_low", np.nan), line.get("slope_high", np.nan)])
    if np.isfinite(ends).all():
        centre = points[pair[0]].mean()
        x = np.array([x[0], centre, x[1]])
        edges = intercept + slope * centre + ends[:, None] * (x - centre)
        panel.fill_between(x, edges.min(axis=0), edges.max(axis=0), **_BAND, zorder=1)
    panel.plot(
        x,
        intercept + slope * x,
        color="#222222",
        zorder=3,
        path_effects=[withStroke(linewidth=2.6, foreground="white")],
    )


_BAND: Mapping[str, Any] = {"color": "#555555", "alpha": 0.11, "linewidth": 0}


def _numbers(line: Line) -> list[str]:
    """Return the lines above a panel: r with its interval by layers, how it depends on one layer, and by chance."""

    def shown(*names: str) -> list[str]:
        values = [line.get(name, np.nan) for name in names]
        return [style.decimals(value) for value in values] if np.isfinite(values).all() else []

    count = line.get("n", 0)
    if not (r := shown("pearson_r")):
        return [f"n = {count}: no line"]
    interval = shown("r_low", "r_high")
    lines = [f"r = {r[0]}" + (f" [{', '.join(interval)}]" if interval else ", no interval")]
    if out := shown("leave_out_low", "leave_out_high"):
        lines.append(f"one layer out {' … '.join(out)}")
    if null := shown("r_null"):
        band = shown("r_null_low", "r_null_high")
        lines.append(f"null {null[0]}" + (f" [{', '.join(band)}]" if band else ""))
    return [*lines, f"slope = {style.number(line['slope'])},  n = {count}"]


def _legend(
    points: pd.DataFrame,
    markers: dict[object, tuple[str, str]],
    null: pd.DataFrame,
    lines: Mapping[str, Line],
) -> list[tuple[Artist, str]]:
    """Say what stands under the panels: what markers, outlines, the band and grey dots are."""
    entries: list[tuple[Artist, str]] = []
    names = list(dict.fromkeys(markers.values()))
    if len(names) > 1:
        entries += [
            (Line2D([], [], color=style.QUIET, linestyle="none", marker=marker), f"step {name}")
            for name, marker in names
        ]
    if len(stacks := selection.stacks(points)) > 1:
        entries += [
            (
                Line2D(
                    *([], []),
                    color="#b5b5b5" if outline != OUTLINES[0] else style.QUIET,
                    linestyle="none",
                    marker="o",
                    markeredgecolor=outline,
                    markeredgewidth=0.9,
                    markersize=5,
                ),
                stack or "other",
            )
            for stack, outline in zip(stacks, OUTLINES, strict=False)
        ]
    if any(np.isfinite(line.get("slope_low", np.nan)) for line in lines.values()):
        entries.append((Patch(**_BAND), "slope, 95 % by layer"))
    if len(null):
        entries.append((Line2D([], [], **_NULL_DOT), STRUCTURELESS))
    return entries


def _fill_shared_axes(points: pd.DataFrame, pair: tuple[str, str]) -> bool:
    """Whether every method's points would spread over a fair part of axes shared by all."""
    values = points[list(dict.fromkeys(pair))]
    by_method = values.groupby(points["method"])
    extents = by_method.max() - by_method.min()
    shares = extents / (values.max() - values.min())
    return bool((shares[extents > 0].min().fillna(1) >= LEAST_SHARE).all())


def _set_axes(panel: Axes, points: pd.DataFrame, null: pd.DataFrame, pair: tuple[str, str]) -> None:
    """Let the points, and grey dots that are near them, decide what is seen, and not the band."""
    for column, name in zip(pair, ("xlim", "ylim"), strict=True):
        low, high = points[column].min(), points[column].max()
        if np.isfinite(low):
            if column in null and len(null):
                room = NULL_ROOM * (high - low)
                low, high = (
                    max(low - room, min(low, null[column].min())),
                    min(high + room, max(high, null[column].max())),
                )
            margin = 0.07 * (high - low) or 0.1 * abs(high) or 1.0
            panel.set(**{name: (low - margin, high + margin)})
    style.number_axis(panel.xaxis, QUANTITIES[pair[0]].label, ticks=4)
    style.number_axis(panel.yaxis, QUANTITIES[pair[1]].label)

"""ΔM against ΔD, a point a matrix and a panel a method: the paper's Figures 2 and 7."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from wdanalysis.analysis import readings as sentences
from wdanalysis.analysis import regression
from wdanalysis.analysis.floors import near_floor
from wdanalysis.analysis.nulls import null_curve
from wdanalysis.analysis.runs import averaged
from wdanalysis.analysis.step_bins import step_bins
from wdanalysis.analysis.table import labels, merged_stacks
from wdanalysis.errors import ComparisonError
from wdanalysis.figures import selection, style
from wdanalysis.figures.kinds import PAPER_X, PAPER_Y, QUANTITIES, Title

LEAST_SHARE = 0.3
"""Panels share their axes unless a method's points would fill less than this part of a side."""

MANY_POINTS = 2000
"""Panels with more points are drawn as a picture in a PDF or SVG, which would be slow to open otherwise."""

NULL_ROOM = 1.0
"""The axes reach out for updates without structure by so many times the range of the points, and no further."""

BAND_ROOM = 0.3
"""The y axis reaches out for the band of the slope by so many times the range of the points, and no further."""

STRUCTURELESS = "null: without structure"

Line = Mapping[str, Any]
"""The `pooled` row of the table of correlations for one panel."""


def scatter(
    metrics: pd.DataFrame,
    modules: selection.Names = None,
    *,
    methods: selection.Names = None,
    x: str = PAPER_X,
    y: str = PAPER_Y,
    step: int | None = None,
    share_axes: bool | None = None,
    log: bool | None = None,
    cmap: style.Cmap | None = None,
    title: Title = "short",
    ax: style.AxLike | None = None,
    figsize: style.FigSize | None = None,
    correlations: pd.DataFrame | None = None,
    readings: pd.DataFrame | None = None,
) -> Figure:
    """Draw ΔM (y) against ΔD (x), a panel a method; of several modules each begins a row of panels.

    Colour tells the layer, the marker the step (a range of steps where there are more than seven); a hollow
    marker is a matrix whose ΔD is near what rounding makes by itself, and the outline tells the stack where several
    are merged. Of several runs each is drawn faintly and their mean strongly. Grey dots are where
    updates without structure of the same size would lie, as far as the table has the null models.

    The line is the least-squares line over all points of a panel; its band is the 95 % interval of the slope, turned
    about the mean of the points. Line, band and the r above a panel are those of scope `pooled` in the table of
    correlations (of scope `step`, where one step is shown): their intervals come from layers. The figure's `caption`
    ends with what `wdanalysis.analysis.readings` reads from each panel of all steps.

    Parameters
    ----------
    metrics
        The metrics table.
    modules, methods
        One or several of the table's; all by default.
    x, y
        Columns to show, of `wdanalysis.figures.kinds.QUANTITIES`. The correlations are then those of these columns;
        null models and readings are of ΔM and ΔD alone.
    step
        One step to show; all by default.
    share_axes
        Whether the panels of a module have the same axes. By default they do, unless one method's changes are so much
        larger that another's points would fill less than `LEAST_SHARE` of a side; the caption then says so.
    log
        Whether both axes are logarithmic; they are linear by default.
    cmap
        Colours of the layers.
    title
        What stands over the figure: ``"none"``, ``"short"`` or ``"full"``, all of the caption.
    ax
        One axes or as many as there are panels, to draw on in place of a new figure.
    figsize
        Inches of width and height; a height of None is what the panels need.
    correlations, readings
        The tables of these names, where they are made already.

    Raises
    ------
    ComparisonError
        The table does not have the module, method, step or a column, or mixes the two axes.
    ValueError
        `x` or `y` is no quantity, or `ax` has another number of axes than there are panels.

    Examples
    --------
    >>> figure = scatter(run.metrics, "q")
    >>> figure.axes[0].get_ylabel()
    'ΔM'
    >>> scatter(run.metrics, "q", methods="ft", y="rel_delta_m", title="none").axes[0].get_ylabel()
    'ΔM/m₀'
    """
    pair = (x, y)
    rows = selection.chosen(metrics, module=modules, method=methods)
    axis = selection.axis_of(rows)
    _check(rows, pair)
    as_in_the_paper = pair == (PAPER_X, PAPER_Y)
    lines = _lines(rows, pair, step, correlations)
    rows = rows if step is None else selection.at_step(rows, step)
    shown, names = selection.ordered(rows, modules), selection.unique(rows, "method")
    every_run = rows[selection.has_values(rows, pair)]
    points = averaged(every_run)
    null = null_curve(points) if as_in_the_paper else null_curve(points.iloc[:0])
    markers = _step_markers(points["step"])
    layers = points["layer"].dropna().astype(int)
    norm = Normalize(layers.min(), layers.max()) if len(layers) else Normalize(0, 1)
    differ, cut, unseen = "", list[str](), 0

    with style.context():
        entries = _legend(points, markers, null, lines)
        colours = style.layer_colours(cmap)
        sheet = style.sheet(
            len(names),
            blocks=len(shown),
            panel_height=1.95,
            legend=entries,
            has_bar=layers.nunique() > 1,
            ax=ax,
            figsize=figsize,
        )
        over = _titles(shown, names, lines, sheet.title_width)
        for block, module in enumerate(shown):
            panels = sheet.panels[block * len(names) :]
            of_module = [table[table["module"] == module] for table in (points, null, every_run)]
            share = _fill_shared_axes(of_module[0], pair) if share_axes is None else share_axes
            differ = differ if share or len(names) == 1 else "the axes differ from panel to panel"
            bands = [
                _band(of_module[0][of_module[0]["method"] == method], pair, lines.get((module, method), {}))
                for method in names
            ]
            for index, (panel, method) in enumerate(zip(panels, names, strict=False)):
                of_panel = [table[table["method"] == method] for table in of_module]
                line = lines.get((module, method), {})
                _draw_null(panel, of_panel[1])
                for of_run in selection.runs_of(of_panel[2]):
                    _draw_points(panel, of_run, pair, markers, norm, colours, faint=True)
                _draw_points(panel, of_panel[0], pair, markers, norm, colours)
                _draw_line(panel, of_panel[0], pair, line, log=bool(log))
                _draw_band(panel, bands[index])
                panel.set_title(over[module, method], loc="left")
                if of_panel[0].empty:
                    style.message(panel, "no values")
                _, seen_null, seen = of_module if share else of_panel
                _set_axes(panel, seen, seen_null, bands if share else [bands[index]], pair, log=bool(log))
                if _is_cut(panel, bands[index]):
                    cut.append(method if len(shown) == 1 else f"{module}, {method}")
                unseen += _beyond(panel, of_panel[1])
                sheet.label_edges(panel, index, len(names), every_tick=not share)
        if layers.nunique() > 1:
            style.integer_axis(sheet.colour_bar(ScalarMappable(norm, colours), "layer"))
        sheet.legend(entries)
        sheet.entitle(
            title,
            selection.heading(shown, _heading(pair), axis),
            _encoding(layers, markers, axis),
            differ,
            f"the band goes on beyond the panel ({'; '.join(cut)})" if cut else "",
            selection.runs_note(every_run),
            selection.near_floor_note(points),
            f"{unseen} grey {'dot lies' if unseen == 1 else 'dots lie'} beyond the axes" if unseen else "",
            selection.left_out(rows, columns=pair),
            of_panels=[
                *(f"{module}, {method}: {_numbers(line)}" for (module, method), line in lines.items()),
                *(_readings(metrics, shown, names, readings) if as_in_the_paper and step is None else []),
            ],
        )
    return sheet.figure


def figure2(
    metrics: pd.DataFrame,
    modules: selection.Names = None,
    *,
    methods: selection.Names = None,
    step: int | None = None,
    share_axes: bool | None = None,
    log: bool | None = None,
    cmap: style.Cmap | None = None,
    title: Title = "short",
    ax: style.AxLike | None = None,
    figsize: style.FigSize | None = None,
    correlations: pd.DataFrame | None = None,
    readings: pd.DataFrame | None = None,
) -> Figure:
    """Draw the paper's Figures 2 and 7 on one page: ΔM against ΔD, a row of panels a module and a panel a method.

    As `scatter`, but encoder, decoder and cross-attention are together: the outline of a marker tells the stack.

    Parameters
    ----------
    metrics
        The metrics table, its stacks apart or merged.
    modules
        One or several; by default q and v so far as they are there, else k and o, else all.
    methods, step, share_axes, log, cmap, title, ax, figsize
        As for `scatter`.
    correlations, readings
        The tables of these names, where they are made already; of stacks that are apart they are made anew.

    Raises
    ------
    ComparisonError, ValueError
        As `scatter`.

    Examples
    --------
    >>> len(figure2(run.metrics).axes)  # q and v of two methods, and the colours
    5
    """
    merged = merged_stacks(metrics)
    if selection.unique(merged, "module") != selection.unique(metrics, "module"):
        correlations = readings = None
    shown = selection.attention(merged, ("q", "v"), ("k", "o")) if modules is None else modules
    return scatter(
        merged,
        shown,
        methods=methods,
        step=step,
        share_axes=share_axes,
        log=log,
        cmap=cmap,
        title=title,
        ax=ax,
        figsize=figsize,
        correlations=correlations,
        readings=readings,
    )


def _encoding(layers: pd.Series, markers: Mapping[object, tuple[str, str]], axis: str) -> str:
    """Say what a point, its colour and its marker are."""
    steps = list(dict.fromkeys(name for name, _ in markers.values()))
    said = [f"a point is a matrix ({selection.VECTORS[axis]})"]
    if layers.nunique():
        said.append("colour: layer" if layers.nunique() > 1 else f"layer {layers.iloc[0]}")
    if steps:
        said.append("marker: step" if len(steps) > 1 else f"step {steps[0]}")
    return "; ".join(said)


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
    x, y = (QUANTITIES[column].name for column in pair)
    return f"{y} against {x}"


def _lines(
    rows: pd.DataFrame, pair: tuple[str, str], step: int | None, correlations: pd.DataFrame | None
) -> dict[tuple[str, str], Line]:
    """Return by module and method the row of the table of correlations: of ΔM on ΔD, or of y on x."""
    if pair != (PAPER_X, PAPER_Y):
        unfit = [name for name in map(str, rows) if name.startswith("null_") or name.endswith("_unshrunk")]
        swapped = rows.assign(**{PAPER_X: rows[pair[0]], PAPER_Y: rows[pair[1]]}).drop(columns=unfit)
        correlations = regression.correlations(averaged(swapped))
        nulls = [name for name in map(str, correlations) if name.startswith("r_null")]
        correlations = correlations.drop(columns=nulls)
    elif correlations is None:
        correlations = regression.correlations(averaged(rows))
    table = correlations[
        correlations["module"].isin(rows["module"]) & correlations["method"].isin(rows["method"])
    ]
    scope, group = table["scope"], table["group"]
    wanted = scope == "pooled" if step is None else (scope == "step") & (group == step).fillna(False)
    records: list[dict[str, Any]] = table[wanted].to_dict("records")  # type: ignore[assignment]
    return {(str(row["module"]), str(row["method"])): row for row in records}


def _readings(
    metrics: pd.DataFrame, modules: list[str], methods: list[str], readings: pd.DataFrame | None
) -> list[str]:
    """Return what is read from each panel; a sentence may tell of how many panels of the table it is one."""
    table = sentences.readings(averaged(metrics)) if readings is None else readings
    table = table[table["module"].isin(modules) & table["method"].isin(methods)]
    return [
        f"{module}, {method}: {' '.join(said['sentence'])}"
        for (module, method), said in table.groupby(["module", "method"], sort=False)
    ]


def _titles(
    modules: list[str], methods: list[str], lines: Mapping[tuple[str, str], Line], inches: float
) -> dict[tuple[str, str], str]:
    """Return what stands over each panel: its name and r; the interval on a line of its own where there is no room."""
    panels = [(module, method) for module in modules for method in methods]
    names = style.fitted(
        [method if len(modules) == 1 else f"{module}, {method}" for module, method in panels], inches
    )
    numbers = {panel: _r(lines.get(panel, {})) for panel in panels}
    broken = max(map(style.text_width, numbers.values())) > inches
    return {
        panel: f"{name}\n{numbers[panel].replace(' [', chr(10) + '[') if broken else numbers[panel]}"
        for panel, name in zip(panels, names, strict=True)
    }


def _step_markers(steps: pd.Series) -> dict[object, tuple[str, str]]:
    """Return (name, marker) for each step; many steps share a few markers in the order of training."""
    bins = step_bins(steps.dropna())
    of_bin = dict(zip(dict.fromkeys(bins.values()), style.MARKERS, strict=False))
    markers: dict[object, tuple[str, str]] = {step: (at.name, of_bin[at]) for step, at in bins.items()}
    if steps.isna().any():
        markers[None] = ("not known", style.MARKERS[len(of_bin)])
    return markers


def _draw_points(
    panel: Axes,
    points: pd.DataFrame,
    pair: tuple[str, str],
    markers: dict[object, tuple[str, str]],
    norm: Normalize,
    colours: Colormap,
    *,
    faint: bool = False,
) -> None:
    scale = (style.text_size() / 8) ** 2
    size = scale * float(np.clip(2500 / len(points), 7, 26)) if len(points) else 0.0
    many = len(points) > MANY_POINTS
    colours = colours.with_extremes(bad=style.MISSING)
    outlines = _outlines(points)
    marked = [markers[None if pd.isna(step) else step][1] for step in points["step"]]
    shown = points.assign(_marker=marked, _hollow=near_floor(points), _stack=labels(points, "stack"))
    for marker, of_marker in shown.groupby("_marker", sort=False):
        for (stack, hollow), rows in of_marker.groupby(["_stack", "_hollow"]):
            outline = outlines[str(stack)]
            width = 0.7 if len(outlines) > 1 else 0 if many else 0.25
            drawn = panel.scatter(
                rows[pair[0]],
                rows[pair[1]],
                c=rows["layer"].astype("Float64").to_numpy(float, na_value=np.nan),
                marker=str(marker),
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
                if len(outlines) > 1:
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


_NULL_DOT: Mapping[str, Any] = {"color": style.NULL, "marker": ".", "markersize": 3, "linestyle": "none"}


@dataclass(frozen=True)
class Band:
    """The 95 % interval of a slope, turned about the mean of the points: its edges at some x; empty where unknown."""

    x: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def _band(points: pd.DataFrame, pair: tuple[str, str], line: Line) -> Band:
    slopes = np.array([line.get("slope_low", np.nan), line.get("slope_high", np.nan)], float)
    if points.empty or not np.isfinite(slopes).all():
        return Band(*np.empty((3, 0)))
    ends, centre = (points[pair[0]].min(), points[pair[0]].max()), points[pair[0]].mean()
    x = np.sort(np.append(np.linspace(*ends, 60), centre))
    edges = line["intercept"] + line["slope"] * centre + slopes[:, None] * (x - centre)
    return Band(x, edges.min(axis=0), edges.max(axis=0))


def _draw_band(panel: Axes, band: Band) -> None:
    """Shade a band and draw its edges, so that one sees where it leaves the panel."""
    if not len(band.x):
        return
    panel.fill_between(band.x, band.low, band.high, **_band_look(), zorder=1)
    for edge in (band.low, band.high):
        panel.plot(band.x, edge, color=style.ink(), alpha=0.35, linewidth=0.5, zorder=1.1)


def _is_cut(panel: Axes, band: Band) -> bool:
    """Whether a band goes on beyond the y axis."""
    low, high = panel.get_ylim()
    return bool((band.low < low).any() or (band.high > high).any())


def _draw_line(panel: Axes, points: pd.DataFrame, pair: tuple[str, str], line: Line, *, log: bool) -> None:
    """Draw a panel's line over the range of its points."""
    slope, intercept = line.get("slope", np.nan), line.get("intercept", np.nan)
    if points.empty or not np.isfinite(slope):
        return
    ends = (points[pair[0]].min(), points[pair[0]].max())
    x = np.geomspace(*ends, 100) if log and ends[0] > 0 else np.array(ends)
    panel.plot(
        x,
        intercept + slope * x,
        color=style.ink(),
        zorder=3,
        path_effects=[withStroke(linewidth=2.6, foreground=style.ground())],
    )


def _band_look() -> dict[str, Any]:
    return {"color": style.ink(), "alpha": 0.1, "linewidth": 0}


def _outlines(points: pd.DataFrame) -> dict[str, str]:
    """Return the outline of the markers of each stack."""
    colours = (style.ground(), style.ink(), "#D55E00", "#56B4E9")
    return {stack: colours[min(i, 3)] for i, stack in enumerate(selection.stacks(points))}


def _shown(line: Line, *names: str) -> list[str]:
    """Return numbers of a line with two decimals; nothing where one is missing."""
    values = [line.get(name, np.nan) for name in names]
    return [style.decimals(value) for value in values] if np.isfinite(values).all() else []


def _r(line: Line) -> str:
    """Return what stands over a panel: r with its interval by layers."""
    if not (r := _shown(line, "pearson_r")):
        return f"n = {line.get('n', 0)}, no line"
    interval = _shown(line, "r_low", "r_high")
    return f"r = {r[0]}" + (f" [{', '.join(interval)}]" if interval else "")


def _numbers(line: Line) -> str:
    """Return what the caption says of a panel's line: how r depends on one layer, what chance gives, the slope."""
    if not _shown(line, "pearson_r"):
        return _r(line)
    said = [_r(line) + (" (95 %, by layer)" if _shown(line, "r_low", "r_high") else " (no interval)")]
    if out := _shown(line, "leave_out_low", "leave_out_high"):
        said.append(f"{' … '.join(out)} with one layer out")
    if null := _shown(line, "r_null"):
        band = _shown(line, "r_null_low", "r_null_high")
        said.append(f"updates without structure {null[0]}" + (f" [{', '.join(band)}]" if band else ""))
    return ", ".join([*said, f"slope {style.number(line['slope'])}", f"n = {line.get('n', 0)}"])


def _legend(
    points: pd.DataFrame,
    markers: dict[object, tuple[str, str]],
    null: pd.DataFrame,
    lines: Mapping[tuple[str, str], Line],
) -> list[tuple[Artist, str]]:
    """Say what stands under the panels: what markers, outlines, the band and grey dots are."""
    entries: list[tuple[Artist, str]] = []
    names = list(dict.fromkeys(markers.values()))
    if len(names) > 1:
        entries += [
            (Line2D([], [], color=style.quiet(), linestyle="none", marker=marker), f"step {name}")
            for name, marker in names
        ]
    if len(outlines := _outlines(points)) > 1:
        look: dict[str, Any] = {
            "linestyle": "none",
            "marker": "o",
            "color": "#a0a0a0",
            "markersize": 5,
            "markeredgewidth": 0.9,
        }
        entries += [
            (Line2D([], [], **look, markeredgecolor=outline), stack or "other")
            for stack, outline in outlines.items()
        ]
    if any(np.isfinite(line.get("slope_low", np.nan)) for line in lines.values()):
        entries.append((Patch(**_band_look()), "slope, 95 % by layer"))
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


def _set_axes(
    panel: Axes,
    points: pd.DataFrame,
    null: pd.DataFrame,
    bands: list[Band],
    pair: tuple[str, str],
    *,
    log: bool,
) -> None:
    """Let the points decide what is seen, and grey dots and bands so far as they are near them."""
    for column, name in zip(pair, "xy", strict=True):
        values = points[column][points[column] > 0] if log else points[column]
        low, high = values.min(), values.max()
        if np.isfinite(low) and log:
            panel.set(**{f"{name}scale": "log"})
            panel.set(**{f"{name}lim": (low / 1.25, high * 1.25)})
        elif np.isfinite(low):
            edges = [edge for band in bands for edge in (band.low, band.high)] if name == "y" else []
            wanted = [(np.concatenate(edges), BAND_ROOM)] if edges else []
            if column in null:
                wanted.append((null[column].to_numpy(float), NULL_ROOM))
            least, most = low, high
            for beside, room in wanted:
                least = min(least, max(low - room * (high - low), beside.min(initial=low)))
                most = max(most, min(high + room * (high - low), beside.max(initial=high)))
            margin = 0.07 * (most - least) or 0.1 * abs(high) or 1.0
            panel.set(**{f"{name}lim": (least - margin, most + margin)})
    style.number_axis(panel.xaxis, QUANTITIES[pair[0]].label)
    style.number_axis(panel.yaxis, QUANTITIES[pair[1]].label)

"""ΔM against ΔD, a point a matrix and a panel a method: the paper's Figures 2 and 7."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from wdanalysis.analysis.floors import near_floor
from wdanalysis.analysis.readings import readings
from wdanalysis.analysis.regression import Fit, fit
from wdanalysis.figures import selection, style

LEAST_SHARE = 1 / 8
"""Panels share their axes unless a method's points would fill less than this part of a side."""

TITLE_CHARACTERS = {1: 50, 2: 34, 3: 26}
"""Characters of a method's name that fit over a panel, by the number of panels side by side."""

MANY_POINTS = 2000
"""Panels with more points are drawn as a picture in a PDF or SVG, which would be slow to open otherwise."""


def scatter(metrics: pd.DataFrame, module: str, *, share_axes: bool | None = None) -> Figure:
    """Draw ΔM (y) against ΔD (x) of a module's matrices, a panel a method.

    Colour tells the layer, the marker the step (a range of steps where there are more than seven); a hollow
    marker is a matrix whose ΔD is near what rounding makes by itself. The line
    is the least-squares line over all points of a panel, with the 95 % band of its mean; the numbers above
    it are those of scope `pooled` in the table of correlations. The heading ends with what
    `wdanalysis.analysis.readings` reads from each panel.

    Parameters
    ----------
    metrics
        The metrics table.
    module
        One of its modules.
    share_axes
        Whether all panels have the same axes. By default they do, unless one method's changes are so much
        larger that another's points would shrink to a spot; the figure then says that the axes differ.

    Raises
    ------
    ComparisonError
        The table does not have the module, or mixes the two axes.

    Examples
    --------
    >>> figure = scatter(run.metrics, "q")
    >>> figure.axes[0].get_ylabel()
    'ΔM'
    """
    rows = selection.rows_where(metrics, "module", module)
    vectors = selection.vectors(rows)
    methods = selection.unique(rows, "method")
    points = rows[selection.has_values(rows)]
    share = _fill_shared_axes(points) if share_axes is None else share_axes
    markers = _step_markers(points["step"])
    layers = points["layer"].dropna().astype(int)
    norm = Normalize(layers.min(), layers.max()) if len(layers) else Normalize(0, 1)
    n_rows, n_columns = style.grid(len(methods))
    width = style.WIDTH if n_columns > 1 else 4.5
    said = readings(metrics).query("module == @module").groupby("method")["sentence"].agg(" ".join)
    texts = [style.shortened(f"{method}: {said[method]}", 300) for method in methods if method in said]

    with style.context():
        height = 0.9 + 2.25 * n_rows + style.height_of(texts, width)
        figure = style.new_figure(height=height, width=width)
        panels = figure.subplots(n_rows, n_columns, sharex=share, sharey=share, squeeze=False).ravel()
        titles = style.told_apart(methods, TITLE_CHARACTERS[n_columns])
        for panel, method, title in zip(panels, methods, titles, strict=False):
            of_method = points[points["method"] == method]
            _draw_points(panel, of_method, markers, norm)
            _draw_fit(panel, title, of_method)
            _set_axes(panel, points if share else of_method)
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
        names = list(dict.fromkeys(markers.values()))
        if len(names) > 1:
            handles = [
                Line2D([], [], color=style.QUIET, linestyle="none", marker=marker) for _, marker in names
            ]
            style.legend(figure, handles, [name for name, _ in names], title="step")
        style.title(
            figure,
            f"{module}: magnitude change ΔM against direction change ΔD, {vectors}",
            style.listed(
                f"layer {layers.iloc[0]}" if layers.nunique() == 1 else "",
                f"step {names[0][0]}" if len(names) == 1 else "",
                "" if share or len(methods) == 1 else "the axes differ from panel to panel",
            ),
            selection.near_floor_note(points),
            selection.left_out(rows),
            *texts,
        )
    return figure


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
    panel: Axes, points: pd.DataFrame, markers: dict[object, tuple[str, str]], norm: Normalize
) -> None:
    size = float(np.clip(2500 / len(points), 7, 26)) if len(points) else 0.0
    many = len(points) > MANY_POINTS
    colours = style.layer_colours().with_extremes(bad=style.MISSING)
    for step, at_step in points.groupby("step", dropna=False):
        marker = markers[None if pd.isna(step) else step][1]
        for hollow, rows in at_step.groupby(near_floor(at_step)):
            drawn = panel.scatter(
                rows["delta_d"],
                rows["delta_m"],
                c=rows["layer"].astype("Float64").to_numpy(float, na_value=np.nan),
                marker=marker,
                s=size,
                cmap=colours,
                norm=norm,
                plotnonfinite=True,
                linewidths=0.9 if hollow else 0 if many else 0.25,
                edgecolors="white",
                rasterized=many,
                zorder=2,
            )
            if hollow:  # the edge takes the layer's colour instead of the face
                drawn.set(facecolor="none", edgecolor=None)


def _draw_fit(panel: Axes, title: str, points: pd.DataFrame) -> None:
    line = fit(points["delta_d"], points["delta_m"], layers=points["layer"], steps=points["step"])
    if np.isfinite(line.slope):
        x = np.linspace(points["delta_d"].min(), points["delta_d"].max(), 60)
        panel.fill_between(x, *line.band(x), color="#555555", alpha=0.18, linewidth=0, zorder=1)
        panel.plot(
            x,
            line.line(x),
            color="#222222",
            zorder=3,
            path_effects=[withStroke(linewidth=2.6, foreground="white")],
        )
    panel.set_title(title, loc="left", pad=26)
    panel.text(0, 1.03, _numbers(line), transform=panel.transAxes, va="bottom", color=style.QUIET)
    if line.n == 0:
        style.message(panel, "no values")


def _numbers(line: Fit) -> str:
    """Return the two lines above a panel."""
    if not np.isfinite(line.pearson_r):
        return f"n = {line.n}: no line\n"
    r, low, high = (
        f"{value:.2f}".replace("-", style.MINUS) for value in (line.pearson_r, line.r_low, line.r_high)
    )
    interval = f" [{low}, {high}]" if np.isfinite(line.r_low) else ""
    return f"r = {r}{interval}\nslope = {style.number(line.slope)},  n = {line.n}"


def _fill_shared_axes(points: pd.DataFrame) -> bool:
    """Whether every method's points would spread over a fair part of axes shared by all."""
    values = points[list(selection.VALUES)]
    by_method = values.groupby(points["method"])
    extents = by_method.max() - by_method.min()
    shares = extents / (values.max() - values.min())
    return bool((shares[extents > 0].min().fillna(1) >= LEAST_SHARE).all())


def _set_axes(panel: Axes, points: pd.DataFrame) -> None:
    """Let the points and not the band decide what is seen."""
    for column, set_limits in (("delta_d", panel.set_xlim), ("delta_m", panel.set_ylim)):
        low, high = points[column].min(), points[column].max()
        if np.isfinite(low):
            margin = 0.07 * (high - low) or 0.1 * abs(high) or 1.0
            set_limits(low - margin, high + margin)
    style.number_axis(panel.xaxis, selection.VALUES["delta_d"], ticks=4)
    style.number_axis(panel.yaxis, selection.VALUES["delta_m"])

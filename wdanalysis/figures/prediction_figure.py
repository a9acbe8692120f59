"""What the run's schedule predicts of ΔM and ΔD against what was observed, a panel a method."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure

from wdanalysis.analysis.runs import averaged
from wdanalysis.errors import ComparisonError
from wdanalysis.figures import selection, style
from wdanalysis.figures.kinds import QUANTITIES, Title
from wdanalysis.figures.profiles import SQUASHED
from wdanalysis.figures.scatter_figure import MANY_POINTS


def prediction(
    predictions: pd.DataFrame,
    modules: selection.Names = None,
    *,
    methods: selection.Names = None,
    cmap: style.Cmap | None = None,
    title: Title = "short",
    ax: style.AxLike | None = None,
    figsize: style.FigSize | None = None,
) -> Figure:
    """Draw the observed value (y) against the predicted one (x) of a module's matrices.

    A panel is a method, a law and what it predicts; on the grey line both are equal. R² is
    1 − Σ(observed − predicted)²/Σ(observed − mean)², of no line through the points but of the law itself: it is
    negative where their mean would predict better. The caption names each law, with its factor where that was fitted.
    Of several runs, each predicted from its own schedule, each is drawn faintly and their mean strongly; the least and
    the largest R² of a run stand above, and the factor is their mean.

    Parameters
    ----------
    predictions
        The table of predictions: a row for every method, step, module, layer and law.
    modules, methods
        One or several of the table's; all by default.
    cmap
        Colours of the layers.
    title
        What stands over the figure: ``"none"``, ``"short"`` or ``"full"``, all of the caption.
    ax
        One axes or as many as there are panels, to draw on in place of a new figure.
    figsize
        Inches of width and height; a height of None is what the panels need.

    Raises
    ------
    ComparisonError
        The table does not have the module or method.
    ValueError
        `ax` has another number of axes than there are panels.

    Examples
    --------
    >>> table = run.predictions()
    >>> len(prediction(table, "v").axes) >= table.query("module == 'v'")["method"].nunique()
    True
    """
    if predictions.empty:
        raise ComparisonError("there are no predictions: the runs' schedules are not known")
    rows = selection.chosen(predictions, module=modules, method=methods)
    axis = selection.axis_of(rows)
    shown = selection.ordered(rows, modules)
    finite = np.isfinite(rows[["predicted", "observed"]].to_numpy(float, na_value=np.nan)).all(axis=1)
    missing = int((~finite).sum())
    groups = [
        (tuple(map(str, key)), part[finite[part.index]])
        for key, part in rows.reset_index(drop=True).groupby(
            ["module", "method", "law", "quantity"], sort=False
        )
    ]
    groups.sort(key=lambda group: shown.index(group[0][0]))
    layers = rows.loc[finite, "layer"].dropna().astype(int)
    norm = Normalize(layers.min(), layers.max()) if len(layers) else Normalize(0, 1)

    with style.context():
        colours = style.layer_colours(cmap)
        has_bar = layers.nunique() > 1
        sheet = style.sheet(len(groups), panel_height=2.0, has_bar=has_bar, ax=ax, figsize=figsize)
        names = style.fitted(
            [key[1] if len(shown) == 1 else f"{key[0]}, {key[1]}" for key, _ in groups], sheet.title_width
        )
        said = []
        for panel, name, ((module, method, law, quantity), every_run) in zip(
            sheet.panels, names, groups, strict=True
        ):
            points = averaged(every_run)
            _draw(panel, points, every_run, norm, quantity, colours)
            r2 = _r_squared_of_runs(every_run)
            panel.set_title(f"{name}\n{'R² = ' if points.size else ''}{r2}", loc="left")
            said.append(
                f"{module}, {method}: {_law(law, points)} predicts {_name(quantity)}, R² = {r2}, n = {len(points)}"
            )
        if has_bar:
            style.integer_axis(sheet.colour_bar(ScalarMappable(norm, colours), "layer"))
        sheet.entitle(
            title,
            selection.heading(shown, "predicted and observed", axis),
            f"a point is a matrix at a step ({selection.VECTORS[axis]}); on the grey line both are equal",
            selection.runs_note(rows),
            f"not shown: {missing} rows without a value" if missing else "",
            of_panels=said,
        )
    return sheet.figure


def _name(quantity: str) -> str:
    return QUANTITIES[quantity].name if quantity in QUANTITIES else quantity


def _draw(
    panel: Axes,
    points: pd.DataFrame,
    every_run: pd.DataFrame,
    norm: Normalize,
    quantity: str,
    colours: Colormap,
) -> None:
    """Draw points, those of each run faintly, and the line of equal values, both axes with the same limits."""
    if points.empty:
        panel.set_axis_off()
        style.message(panel, "no values")
        return
    values = every_run[["predicted", "observed"]].to_numpy(float)
    low, high = float(values.min()), float(values.max())
    logarithmic = low > 0 and high > SQUASHED * low
    if logarithmic:
        limits = (low / 1.3, high * 1.3)
        panel.set_xscale("log")
        panel.set_yscale("log")
    else:
        margin = 0.07 * (high - low) or 0.1 * abs(high) or 1.0
        limits = (low - margin, high + margin)
    panel.plot(limits, limits, color=style.NULL, linewidth=1.2, zorder=1)
    size = (style.text_size() / 8) ** 2 * float(np.clip(2500 / len(points), 7, 26))
    strong: dict[str, Any] = {"s": size, "linewidths": 0.25, "edgecolors": style.ground(), "zorder": 2}
    faint: dict[str, Any] = {"s": 0.6 * size, "linewidths": 0, "alpha": 0.22, "zorder": 1.8}
    for shown, look in [*((run, faint) for run in selection.runs_of(every_run)), (points, strong)]:
        panel.scatter(
            shown["predicted"],
            shown["observed"],
            c=shown["layer"].astype("Float64").to_numpy(float, na_value=np.nan),
            cmap=colours.with_extremes(bad=style.MISSING),
            norm=norm,
            plotnonfinite=True,
            rasterized=len(shown) > MANY_POINTS,
            **look,
        )
    panel.set(xlim=limits, ylim=limits)
    style.number_axis(panel.xaxis, f"predicted {_name(quantity)}")
    style.number_axis(panel.yaxis, f"observed {_name(quantity)}")


def _law(law: str, points: pd.DataFrame) -> str:
    """Name a law, with the factor that was fitted where one was."""
    fitted = points["fitted"].iloc[:1].to_numpy(float) if "fitted" in points else np.empty(0)
    return law.replace("_", " ") + "".join(
        f" × {style.number(f, 2)} (fitted)" for f in fitted[np.isfinite(fitted)]
    )


def _r_squared_of_runs(points: pd.DataFrame) -> str:
    """Return a panel's R², of several runs the least and the largest."""
    found = sorted(map(_r_squared, selection.runs_of(points) or [points]))
    ends = dict.fromkeys(style.decimals(r2) if np.isfinite(r2) else "–" for r2 in (found[0], found[-1]))
    return " … ".join(ends)


def _r_squared(points: pd.DataFrame) -> float:
    """Return R² from the table, or of its rows where the table has none."""
    if "r2" in points and len(points):
        return float(points["r2"].iloc[0])
    observed, predicted = points["observed"].astype(float), points["predicted"].astype(float)
    spread = ((observed - observed.mean()) ** 2).sum()
    return 1 - float(((observed - predicted) ** 2).sum() / spread) if spread > 0 else np.nan

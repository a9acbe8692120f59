"""What the run's schedule predicts of ΔM and ΔD against what was observed, a panel a method."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from wdanalysis.analysis.runs import averaged
from wdanalysis.errors import ComparisonError
from wdanalysis.figures import selection, style
from wdanalysis.figures.kinds import QUANTITIES
from wdanalysis.figures.profiles import SQUASHED
from wdanalysis.figures.scatter_figure import MANY_POINTS, TITLE_CHARACTERS


def prediction(predictions: pd.DataFrame, module: str) -> Figure:
    """Draw the observed value (y) against the predicted one (x) of a module's matrices.

    A panel is a method, a law and what it predicts; on the grey line both are equal. R² is
    1 − Σ(observed − predicted)²/Σ(observed − mean)², of no line through the points but of the law itself: it is
    negative where their mean would predict better. A law with a factor that was fitted says so. Of several runs, each
    predicted from its own schedule, each is drawn faintly and their mean strongly; the least and the largest R² of
    a run stand above, and the factor is their mean.

    Parameters
    ----------
    predictions
        The table of predictions: a row for every method, step, module, layer and law.
    module
        One of its modules.

    Raises
    ------
    ComparisonError
        The table does not have the module.

    Examples
    --------
    >>> table = run.predictions()
    >>> len(prediction(table, "v").axes) >= table.query("module == 'v'")["method"].nunique()
    True
    """
    if predictions.empty:
        raise ComparisonError("there are no predictions: the runs' schedules are not known")
    rows = selection.rows_where(predictions, "module", module)
    finite = np.isfinite(rows[["predicted", "observed"]].to_numpy(float, na_value=np.nan)).all(axis=1)
    missing = int((~finite).sum())
    rows = rows[finite]
    groups = list(rows.groupby(["method", "law", "quantity"], sort=False)) or [((module, "", ""), rows)]
    layers = rows["layer"].dropna().astype(int)
    norm = Normalize(layers.min(), layers.max()) if len(layers) else Normalize(0, 1)
    n_rows, n_columns = style.grid(len(groups))

    with style.context():
        width = style.WIDTH if n_columns > 1 else 4.5
        figure = style.new_figure(height=0.4 + 2.45 * n_rows, width=width)
        panels = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
        methods = [str(method) for (method, _, _), _ in groups]
        names = dict(zip(methods, style.told_apart(methods, TITLE_CHARACTERS[n_columns]), strict=True))
        for panel, ((method, law, quantity), every_run) in zip(panels, groups, strict=False):
            points = averaged(every_run)
            _draw(panel, points, every_run, norm, str(quantity))
            panel.set_title(names[str(method)], loc="left", pad=26)
            says = style.shortened(_law(str(law), points), TITLE_CHARACTERS[n_columns] + 4)
            numbers = f"R² = {_r_squared_of_runs(every_run)},  n = {len(points)}"
            panel.text(
                *(0, 1.03, f"{says}\n{numbers}"), transform=panel.transAxes, va="bottom", color=style.QUIET
            )
        for empty in panels[len(groups) :]:
            empty.remove()
        if layers.nunique() > 1:
            bar = figure.colorbar(
                ScalarMappable(norm, style.layer_colours()),
                ax=panels[: len(groups)],
                label="layer",
                aspect=30 * n_rows,
                pad=0.015,
            )
            bar.outline.set_visible(False)
            style.integer_axis(bar.ax.yaxis)
        style.title(
            figure,
            f"{module}: predicted by the laws named and observed; on the grey line both are equal",
            selection.runs_note(rows),
            f"not shown: {missing} rows without a value" if missing else "",
        )
    return figure


def _draw(panel: Axes, points: pd.DataFrame, every_run: pd.DataFrame, norm: Normalize, quantity: str) -> None:
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
    size = float(np.clip(2500 / len(points), 7, 26))
    strong: dict[str, Any] = {"s": size, "linewidths": 0.25, "edgecolors": "white", "zorder": 2}
    faint: dict[str, Any] = {"s": 0.6 * size, "linewidths": 0, "alpha": 0.22, "zorder": 1.8}
    for shown, look in [*((run, faint) for run in selection.runs_of(every_run)), (points, strong)]:
        panel.scatter(
            shown["predicted"],
            shown["observed"],
            c=shown["layer"].astype("Float64").to_numpy(float, na_value=np.nan),
            cmap=style.layer_colours().with_extremes(bad=style.MISSING),
            norm=norm,
            plotnonfinite=True,
            rasterized=len(shown) > MANY_POINTS,
            **look,
        )
    panel.set(xlim=limits, ylim=limits)
    name = QUANTITIES[quantity].name if quantity in QUANTITIES else quantity
    style.number_axis(panel.xaxis, f"predicted {name}", ticks=4)
    style.number_axis(panel.yaxis, f"observed {name}", ticks=4)


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

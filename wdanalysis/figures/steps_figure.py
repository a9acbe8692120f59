"""How r depends on which four steps one looks at, a row a method."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from wdanalysis.errors import ComparisonError
from wdanalysis.figures import selection, style

BINS = 40
"""Bars from r = −1 to 1."""


def steps(step_choices: pd.DataFrame, module: str, *, correlations: pd.DataFrame | None = None) -> Figure:
    """Draw a histogram of the pooled r over all choices of four steps, a row a method.

    The steps of the smallest and of the largest r are named beside it. The black line is the r of all steps.

    Parameters
    ----------
    step_choices
        The table of choices: a row for every method, module and choice of steps, with its r. A series of no more than
        four steps has none.
    module
        One of its modules.
    correlations
        The table of correlations, for the r of all steps.

    Raises
    ------
    ComparisonError
        The table does not have the module.

    Examples
    --------
    >>> rows = [("ft", "q", "out", f"10 20 30 {last}", r) for last, r in [(40, 0.4), (50, -0.2)]]
    >>> len(steps(pd.DataFrame(rows, columns=["method", "module", "axis", "steps", "r"]), "q").axes)
    1
    """
    if step_choices.empty:
        raise ComparisonError("no method has more than four steps to choose from")
    rows = selection.rows_where(step_choices, "module", module)
    vectors = selection.vectors(rows)
    methods = selection.unique(rows, "method")
    with style.context():
        colours = style.method_styles(methods)
        figure = style.new_figure(height=0.75 + 1.05 * len(methods))
        panels = figure.subplots(len(methods), 1, sharex=True, squeeze=False).ravel()
        for panel, method, name in zip(panels, methods, style.told_apart(methods, 90), strict=True):
            choices = rows[rows["method"] == method]
            _draw(panel, choices, colours[method].color, _own(correlations, method, module))
            panel.set_title(name, loc="left", pad=15)
        panels[-1].set_xlabel("r of ΔM and ΔD, pooled over layers and four steps")
        style.title(
            figure,
            f"{module}: r over all choices of four steps, {vectors}",
            "black line: r of all steps" if correlations is not None else "",
        )
    return figure


def _own(correlations: pd.DataFrame | None, method: str, module: str) -> float:
    """Return the r of all steps; NaN where it is not known."""
    if correlations is None:
        return float("nan")
    pooled = correlations[
        (correlations["method"] == method)
        & (correlations["module"] == module)
        & (correlations["scope"] == "pooled")
    ]
    return float(pooled["pearson_r"].iloc[0]) if len(pooled) else float("nan")


def _draw(panel: Axes, choices: pd.DataFrame, colour: str, own: float) -> None:
    known = choices[choices["r"].notna()]
    panel.set_xlim(-1.02, 1.02)
    panel.axvline(0, color=style.NULL, linewidth=0.8, zorder=1)
    panel.spines["left"].set_visible(False)
    panel.set_yticks([])
    panel.set_xticks(np.linspace(-1, 1, 9), [style.decimals(r) for r in np.linspace(-1, 1, 9)])
    if known.empty:
        style.message(panel, "no values")
        return
    heights, edges = np.histogram(known["r"], np.linspace(-1, 1, BINS + 1))
    panel.bar(edges[:-1], heights, 2 / BINS, align="edge", color=colour, alpha=0.75, zorder=2)
    panel.set_ylim(0, 1.12 * heights.max())
    if np.isfinite(own):
        edge = withStroke(linewidth=3, foreground="white")
        panel.axvline(own, color="black", linewidth=1.5, zorder=3, path_effects=[edge])
    lowest, highest = (known.iloc[int(place)] for place in (known["r"].argmin(), known["r"].argmax()))
    ends = (
        f"{_named(lowest)} … {_named(highest)};  {len(known)} choices"
        if len(known) > 1
        else f"{_named(lowest)};  1 choice"
    )
    panel.text(0, 1.05, ends, transform=panel.transAxes, va="bottom", color=style.QUIET)


def _named(choice: pd.Series) -> str:
    return f"{style.decimals(choice['r'])} ({choice['steps']})"

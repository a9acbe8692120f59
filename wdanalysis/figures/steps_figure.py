"""How r depends on which four steps one looks at, a row a method."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from wdanalysis.errors import ComparisonError
from wdanalysis.figures import selection, style
from wdanalysis.figures.kinds import Title

BINS = 40
"""Bars from r = −1 to 1."""


def steps(
    step_choices: pd.DataFrame,
    modules: selection.Names = None,
    *,
    methods: selection.Names = None,
    cmap: style.Cmap | None = None,
    title: Title = "short",
    ax: style.AxLike | None = None,
    figsize: style.FigSize | None = None,
    correlations: pd.DataFrame | None = None,
) -> Figure:
    """Draw a histogram of the pooled r over all choices of four steps, a row a method.

    The smallest and the largest r stand over it; the caption names their steps. The black line is the r of all steps.

    Parameters
    ----------
    step_choices
        The table of choices: a row for every method, module and choice of steps, with its r. A series of no more than
        four steps has none.
    modules, methods
        One or several of the table's; all by default.
    cmap
        Colours of the methods.
    title
        What stands over the figure: ``"none"``, ``"short"`` or ``"full"``, all of the caption.
    ax
        One axes or as many as there are panels, to draw on in place of a new figure.
    figsize
        Inches of width and height; a height of None is what the panels need.
    correlations
        The table of correlations, for the r of all steps.

    Raises
    ------
    ComparisonError
        The table does not have the module or method.
    ValueError
        `ax` has another number of axes than there are panels.

    Examples
    --------
    >>> rows = [("ft", "q", "out", f"10 20 30 {last}", r) for last, r in [(40, 0.4), (50, -0.2)]]
    >>> len(steps(pd.DataFrame(rows, columns=["method", "module", "axis", "steps", "r"]), "q").axes)
    1
    """
    if step_choices.empty:
        raise ComparisonError("no method has more than four steps to choose from")
    rows = selection.chosen(step_choices, module=modules, method=methods)
    axis = selection.axis_of(rows)
    shown = selection.ordered(rows, modules)
    groups = list(rows.groupby(["module", "method"], sort=False))
    groups.sort(key=lambda group: shown.index(str(group[0][0])))
    with style.context():
        colours = style.method_styles(selection.unique(step_choices, "method"), cmap)
        sheet = style.sheet(len(groups), columns=1, panel_height=0.95, ax=ax, figsize=figsize)
        names = style.fitted(
            [str(method) if len(shown) == 1 else f"{module}, {method}" for (module, method), _ in groups],
            sheet.title_width,
        )
        said = []
        for place, (panel, ((module, method), choices)) in enumerate(zip(sheet.panels, groups, strict=True)):
            own = _own(correlations, str(method), str(module))
            _draw(panel, choices, colours[str(method)].color, own)
            known = choices[choices["r"].notna()]
            panel.set_title(f"{names[place]}\n{_range(known)}", loc="left")
            said.append(f"{module}, {method}: {_ends(known)}")
            if sheet.is_own and place < len(groups) - 1:
                panel.tick_params(labelbottom=False)
            else:
                panel.set_xlabel("r of four steps")
        sheet.entitle(
            title,
            selection.heading(shown, "r over all choices of four steps", axis),
            f"r of ΔM and ΔD, pooled over layers and four steps ({selection.VECTORS[axis]})",
            "black: r of all steps" if correlations is not None and len(correlations) else "",
            of_panels=said,
        )
    return sheet.figure


def _own(correlations: pd.DataFrame | None, method: str, module: str) -> float:
    """Return the r of all steps, NaN where it is not known."""
    if correlations is None or correlations.empty:
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
    style.number_axis(panel.xaxis, "", ticks=8)
    if known.empty:
        style.message(panel, "no values")
        return
    heights, edges = np.histogram(known["r"], np.linspace(-1, 1, BINS + 1))
    panel.bar(edges[:-1], heights, 2 / BINS, align="edge", color=colour, alpha=0.75, zorder=2)
    panel.set_ylim(0, 1.12 * heights.max())
    if np.isfinite(own):
        edge = withStroke(linewidth=3, foreground=style.ground())
        panel.axvline(own, color=style.ink(), linewidth=1.5, zorder=3, path_effects=[edge])


def _range(known: pd.DataFrame) -> str:
    """Return the smallest and the largest r."""
    if known.empty:
        return "no r"
    ends = dict.fromkeys(style.decimals(r) for r in (known["r"].min(), known["r"].max()))
    return f"r = {' … '.join(ends)}"


def _ends(known: pd.DataFrame) -> str:
    """Name the choices of the smallest and of the largest r."""
    if known.empty:
        return "no r"
    ends = (known.iloc[int(place)] for place in (known["r"].argmin(), known["r"].argmax()))
    named = dict.fromkeys(f"{style.decimals(end['r'])} (steps {end['steps']})" for end in ends)
    return f"{' … '.join(named)}, {len(known)} {'choice' if len(known) == 1 else 'choices'}"

"""What the figures of ΔM and ΔD by layer and by step share: value axes, a line a method, a legend."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from wdanalysis.figures import selection, style

SQUASHED = 50.0
"""An axis is logarithmic by default where the medians of two methods differ by more than this factor."""

FEW = 40
"""The most points of a line that has a marker at each."""


def value_axis(panel: Axes, table: pd.DataFrame, column: str, log: bool | None) -> None:
    """Scale and name the y axis of a panel: from zero, or logarithmic where asked or where needed."""
    if squashes(table, column) if log is None else log:
        panel.set_yscale("log", nonpositive="mask")
    else:
        highest = panel.dataLim.ymax
        panel.set_ylim(0, 1.06 * highest if 0 < highest < np.inf else 1)
    style.number_axis(panel.yaxis, selection.VALUES[column])


def squashes(table: pd.DataFrame, column: str) -> bool:
    """Whether on a linear axis some method's line would lie on zero."""
    medians = table.groupby("method")[column].median()
    medians = medians[medians > 0]
    return len(medians) > 1 and bool(medians.max() > SQUASHED * medians.min())


def line_style(
    method: style.MethodStyle, points: int, dashes: str | None = None, *, faint: bool = False
) -> dict[str, Any]:
    """Return plot's keywords for a method's line: markers where it has few points, else dashes; thin for one of runs.

    `dashes` are those of a stack; where there are several, they tell them apart.
    """
    if faint:
        single = {"marker": ".", "linestyle": "none"} if points == 1 else {"linestyle": dashes or "-"}
        return {"color": method.color, "alpha": 0.5, "linewidth": 0.7, "zorder": 1.5, **single}
    if points > FEW:
        return {"color": method.color, "linestyle": dashes if dashes not in (None, "-") else method.linestyle}
    dashes = (dashes or "-") if points > 1 else "none"
    return {"color": method.color, "marker": method.marker, "linestyle": dashes}


def hollow_points(
    panel: Axes, x: ArrayLike, y: ArrayLike, near_floor: ArrayLike, method: style.MethodStyle
) -> None:
    """Draw the points of a method's line that may be rounding as hollow markers over it."""
    hollow = np.asarray(near_floor, dtype=bool)
    if not hollow.any():
        return
    panel.plot(
        np.asarray(x)[hollow],
        np.asarray(y)[hollow],
        color=method.color,
        marker=method.marker,
        markerfacecolor=style.ground(),
        linestyle="none",
    )


def legend(
    styles: Mapping[str, style.MethodStyle],
    labels: Mapping[str, str],
    points: int,
    stacks: Mapping[str, str] = MappingProxyType({}),
) -> list[style.Entry]:
    """Return the lines of the methods of `labels`, and the dashes of stacks where there are several."""
    entries: list[style.Entry] = [
        (Line2D([], [], **line_style(styles[method], points)), label) for method, label in labels.items()
    ]
    if len(stacks) > 1:
        looks: dict[str, dict[str, Any]] = {
            stack: {"color": style.quiet(), "linestyle": dashes} for stack, dashes in stacks.items()
        }
        entries += [(Line2D([], [], **look), stack or "other") for stack, look in looks.items()]
    return entries

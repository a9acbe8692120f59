"""Training loss and held-out loss by step, a line a method."""

from __future__ import annotations

import io

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from wdanalysis.errors import ComparisonError
from wdanalysis.figures import profiles, selection, style

PANELS = {"loss": "training loss", "held_out_loss": "held-out loss"}


def losses(table: pd.DataFrame) -> Figure:
    """Draw the training loss (left) and the held-out loss (right) by step, a line a method.

    Parameters
    ----------
    table
        Columns `method`, `step`, `loss` and `held_out_loss`, in nats a token; missing values are left out.

    Raises
    ------
    ComparisonError
        The table has no rows.
    """
    if table.empty:
        raise ComparisonError("there are no losses to draw: the table has no rows.")
    methods = selection.unique(table, "method")
    with style.context():
        styles = style.method_styles(methods)
        figure = style.new_figure(height=2.9)
        most = 0
        for panel, (column, name) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
            known = table[table[column].notna()]
            for method in selection.unique(known, "method"):
                rows = known[known["method"] == method].sort_values("step")
                most = max(most, len(rows))
                panel.plot(rows["step"], rows[column], **profiles.line_style(styles[method], len(rows)))
            _axes(panel, name, empty=known.empty)
        profiles.method_legend(figure, styles, {method: method for method in methods}, most)
        style.title(figure, "loss while training, in nats a token")
    return figure


def _axes(panel: Axes, name: str, *, empty: bool) -> None:
    panel.set_xlabel("step")
    panel.set_ylabel(name)
    style.integer_axis(panel.xaxis, ticks=6)
    panel.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if empty:
        panel.set_axis_off()
        style.message(panel, f"no {name} was measured")


def losses_png(table: pd.DataFrame) -> bytes:
    """Return the figure of `losses` as a PNG file."""
    file = io.BytesIO()
    style.write(losses(table), file, "png")
    return file.getvalue()

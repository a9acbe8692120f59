"""Training loss and held-out loss by step, a line a method."""

from __future__ import annotations

import io

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wdanalysis.errors import ComparisonError
from wdanalysis.figures import profiles, selection, style
from wdanalysis.figures.kinds import Title

PANELS = {"loss": "training loss", "held_out_loss": "held-out loss"}


def losses(
    table: pd.DataFrame,
    *,
    methods: selection.Names = None,
    cmap: style.Cmap | None = None,
    title: Title = "short",
    ax: style.AxLike | None = None,
    figsize: style.FigSize | None = None,
) -> Figure:
    """Draw the training loss (left) and the held-out loss (right) by step, a line a method.

    Parameters
    ----------
    table
        Columns `method`, `step`, `loss` and `held_out_loss`, in nats a token; missing values are left out.
    methods
        One or several of the table's; all by default.
    cmap
        Colours of the methods.
    title
        What stands over the figure: ``"none"``, ``"short"`` or ``"full"``, all of the caption.
    ax
        Two axes to draw on in place of a new figure.
    figsize
        Inches of width and height; a height of None is what the panels need.

    Raises
    ------
    ComparisonError
        The table has no rows, or does not have the method.
    ValueError
        `ax` has another number of axes than there are panels.
    """
    if table.empty:
        raise ComparisonError("there are no losses to draw: the table has no rows.")
    rows = selection.chosen(table, method=methods)
    names = selection.unique(rows, "method")
    most = int(rows.groupby("method")[list(PANELS)].count().to_numpy().max())
    with style.context():
        styles = style.method_styles(selection.unique(table, "method"), cmap)
        legend = profiles.legend(styles, {method: method for method in names}, most)
        sheet = style.sheet(2, columns=2, panel_height=2.1, legend=legend, ax=ax, figsize=figsize)
        for panel, (column, name) in zip(sheet.panels, PANELS.items(), strict=True):
            known = rows[rows[column].notna()]
            for method in selection.unique(known, "method"):
                line = known[known["method"] == method].sort_values("step")
                panel.plot(line["step"], line[column], **profiles.line_style(styles[method], len(line)))
            _axes(panel, name, empty=known.empty)
        sheet.legend(legend)
        sheet.entitle(title, "loss while training, in nats a token")
    return sheet.figure


def _axes(panel: Axes, name: str, *, empty: bool) -> None:
    panel.set_xlabel("step")
    style.integer_axis(panel.xaxis, ticks=6)
    style.number_axis(panel.yaxis, name)
    if empty:
        panel.set_axis_off()
        style.message(panel, f"no {name} was measured")


def losses_png(table: pd.DataFrame) -> bytes:
    """Return the figure of `losses` as a PNG file."""
    file = io.BytesIO()
    style.write(losses(table), file, "png")
    return file.getvalue()

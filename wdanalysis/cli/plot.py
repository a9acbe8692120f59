"""`wd-analyze plot`: the figures again, from saved tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wdanalysis.cli import console, options
from wdanalysis.figures.kinds import PAPER_X, PAPER_Y


def plot(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The results of `wd-analyze compare`.")],
    figures: options.Figures = "all",
    format: Annotated[options.Format, typer.Option(help="How figures are stored.")] = "png",
    x: options.X = PAPER_X,
    y: options.Y = PAPER_Y,
    merge_stacks: options.MergeStacks = False,
    quiet: options.Quiet = False,
) -> None:
    """Draw the figures of a saved comparison again; those of the same name are replaced.

    Other axes of the scatter than the paper's (x, y) are in its file's name.

    Example: wd-analyze plot wd-analysis --figures scatter --format pdf
    """
    kinds = options.figure_kinds(figures)

    from wdanalysis.comparison import redraw

    drawn = redraw(directory, figures=kinds, format=format, x=x, y=y, merge_stacks=merge_stacks)
    if not quiet:
        console.lines(*map(str, drawn))

"""`wd-analyze plot`: the figures again, from saved tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wdanalysis.cli import console, options
from wdanalysis.cli.figure_options import FigureChoice, with_figure_options


@with_figure_options
def plot(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The results of `wd-analyze compare`.")],
    *,
    drawn: FigureChoice,
    merge_stacks: Annotated[bool, options.merge_stacks(options.FIGURES)] = False,
    quiet: Annotated[bool, options.quiet(options.OUTPUT)] = False,
) -> None:
    """Draw the figures of a saved comparison again; those of the same name are replaced.

    Where `compare` was interrupted while it drew, this writes what is missing, as it was asked for.
    Other axes of the scatter than the paper's (x, y) are in its file's name.

    Example: wd-analyze plot wd-analysis --figures scatter --format pdf
    """
    from wdanalysis.comparison import redraw

    with console.progress_bars(quiet=quiet) as progress:
        written = redraw(
            directory, figures=drawn.kinds, look=drawn.look, merge_stacks=merge_stacks, progress=progress
        )
    if not quiet:
        console.lines(*map(str, written))

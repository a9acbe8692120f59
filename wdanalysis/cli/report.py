"""`wd-analyze report`: the HTML page, from saved tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wdanalysis.cli import console, options


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The results of `wd-analyze compare`.")],
    quiet: Annotated[bool, options.quiet()] = False,
) -> None:
    """Write the report of a saved comparison, DIR/report.html, again: one file with everything, for any browser.

    Example: wd-analyze report wd-analysis
    """
    from wdanalysis.comparison import rewrite_report

    written = rewrite_report(directory)
    if not quiet:
        console.lines(str(written))

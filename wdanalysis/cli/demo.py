"""`wd-analyze demo`: a first comparison, of checkpoints that the package carries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wdanalysis.cli import console, options
from wdanalysis.cli.compare import compare

DEFAULT_OUT = Path("wd-demo")
CHECKPOINTS = "checkpoints"
"""The folder in DIR that they are copied to."""


def demo(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the results.")] = DEFAULT_OUT,
    force: Annotated[bool, typer.Option("--force", help="Replace results that are in DIR.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare full tuning, LoRA and DoRA of a small language model that comes with the package.

    Example: wd-analyze demo
    """
    from wdanalysis.demo import BASE, METHODS, MODULES, copy_checkpoints
    from wdanalysis.results.folder import check_free

    check_free(directory, force=force)
    folder = copy_checkpoints(directory / CHECKPOINTS)
    base, *tuned = (str(folder / name) for name in (BASE, *METHODS))
    modules = ",".join(MODULES)
    compare(base, tuned, modules=modules, out=directory, force=force, quiet=quiet)
    if quiet:
        return
    feature = "ΔM, how much lengths changed, against ΔD, how far directions turned, a point a layer and step"
    console.lines(
        "",
        "This was a language model of 1.1 million parameters, tuned in three ways, four steps each. What ran:",
        f"  wd-analyze compare {base} {' '.join(tuned)} --modules {modules} --out {directory}",
        "Look at",
        f"  {directory / 'figures' / 'scatter_v.png'}: {feature}",
        f"  {directory / 'report.html'}: all of it to explore, in any browser",
        f"  {directory / 'metrics.csv'}: a row for every method, step and matrix",
        "Then compare your own: wd-analyze compare BASE TUNED…",
    )

"""`wd-analyze demo`: a first comparison, of checkpoints that the package carries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from wdanalysis.cli import console

DEFAULT_OUT = Path("wd-demo")
CHECKPOINTS = "checkpoints"
"""The folder in DIR that they are copied to."""


def demo(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the results.")] = DEFAULT_OUT,
    force: Annotated[bool, typer.Option("--force", help="Replace results that are in DIR.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Compare full tuning, LoRA and DoRA of a small language model that comes with the package.

    Example: wd-analyze demo
    """
    from wdanalysis.demo import BASE, METHODS, MODULES, copy_checkpoints
    from wdanalysis.results.folder import check_free

    check_free(directory, force=force)
    folder = copy_checkpoints(directory / CHECKPOINTS)
    paths = [str(folder / name) for name in (BASE, *METHODS)]
    line = [*paths, "--modules", ",".join(MODULES), "--out", str(directory)]
    _compare(context, [*line, *(["--force"] if force else []), *(["--quiet"] if quiet else [])])
    if quiet:
        return
    console.lines(
        "",
        "A small language model, tuned in three ways, four steps each. What ran:",
        f"  wd-analyze compare {' '.join(line)}",
        "Look at",
        f"  {directory / 'figures' / 'scatter_v.png'}: how far lengths and directions moved",
        f"  {directory / 'report.html'}: all of it, to explore in a browser",
        f"  {directory / 'metrics.csv'}: a row for every method, step and matrix",
        "Then compare your own: wd-analyze compare BASE TUNED…",
    )


def _compare(context: typer.Context, arguments: list[str]) -> None:
    """Run `wd-analyze compare` with these arguments, as if they had been typed."""
    program: Any = context.find_root()
    command = program.command.commands["compare"]
    with command.make_context(command.name, arguments, parent=program) as typed:
        command.invoke(typed)

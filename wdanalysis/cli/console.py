"""What commands print: tables and lines on standard output, progress and warnings on standard error."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def table(columns: Iterable[tuple[str, str]], rows: Iterable[Iterable[str]]) -> None:
    """Print a table; `columns` are headings with ``left`` or ``right``. Names in it are data, never markup."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading, side in columns:
        drawn.add_column(Text(heading), justify="right" if side == "right" else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:  # a pipe or a file has no width to fit into
        console = Console(highlight=False, width=400)
    console.print(drawn)


def lines(*texts: str) -> None:
    """Print lines on standard output."""
    for text in texts:
        sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def warn(texts: Iterable[str]) -> None:
    """Print warnings on standard error."""
    for text in texts:
        sys.stderr.write(f"warning: {text}\n")


@contextmanager
def byte_progress(*, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Show bytes, rate and time left on standard error, where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("reading"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def number(value: float | int | None, digits: int = 3) -> str:
    """A number for reading: three significant digits, and a dash where there is none."""
    import pandas as pd

    return "–" if value is None or pd.isna(value) else f"{value:.{digits}g}"


def summary_table(summary: pd.DataFrame) -> None:
    """Print a comparison's summary."""
    headings = [
        ("method", "left"),
        ("module", "left"),
        ("matrices", "right"),
        ("last step", "right"),
        ("ΔM", "right"),
        ("ΔD", "right"),
        ("r", "right"),
        ("95 %", "left"),
        ("slope", "right"),
    ]
    rows = [
        (
            row["method"],
            row["module"],
            str(row["matrices"]),
            number(row["step"], 12),
            number(row["delta_m"]),
            number(row["delta_d"]),
            _signed(row["pearson_r"]),
            "–" if math.isnan(row["r_low"]) else f"{_signed(row['r_low'])} … {_signed(row['r_high'])}",
            number(row["slope"]),
        )
        for row in summary.to_dict("records")
    ]
    table(headings, rows)


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.2f}".replace("-", "−")

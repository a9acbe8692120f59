"""What commands print: tables and lines on standard output, progress and warnings on standard error."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; `columns` are headings with ``left`` or ``right``. Names in it are data, never markup."""
    headings = [heading for heading, _ in columns]
    cells = [headings, *rows]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    rule = ["─" * width for width in widths]
    for row in (headings, rule, *cells[1:]):
        aligned = (
            cell.rjust(width) if side == "right" else cell.ljust(width)
            for cell, width, (_, side) in zip(row, widths, columns, strict=True)
        )
        lines("  ".join(aligned).rstrip())


def lines(*texts: str) -> None:
    """Print lines on standard output."""
    sys.stdout.writelines(f"{text}\n" for text in texts)
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

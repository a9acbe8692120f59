"""What commands print: tables and lines on standard output, progress and warnings on standard error."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from rich.progress import Progress as Bars
    from rich.progress import ProgressColumn, TaskID

    from wdanalysis.checkpoints.storage import Progress
    from wdanalysis.training.run.trainer import TrainingProgress


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


def quieten_libraries() -> None:
    """Keep bitsandbytes, which PEFT imports where it is installed, from warning of kernels that nobody asked for."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def lines(*texts: str) -> None:
    """Print lines on standard output."""
    sys.stdout.writelines(f"{text}\n" for text in texts)
    sys.stdout.flush()


def warn(texts: Iterable[str]) -> None:
    """Print warnings on standard error."""
    for text in texts:
        sys.stderr.write(f"warning: {text}\n")


@contextmanager
def progress_bars(*, quiet: bool) -> Iterator[tuple[Progress | None, Progress | None]]:
    """Show bytes read, then matrices decomposed, with the time left, on standard error where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None, None
        return
    from rich.progress import DownloadColumn, MofNCompleteColumn, TransferSpeedColumn

    with ExitStack() as shown:

        def bar(text: str, *columns: ProgressColumn) -> Progress:
            bars = _bars(*columns)
            task = bars.add_task(text, total=None)

            def update(done: int, total: int) -> None:
                if not done:
                    shown.enter_context(bars)
                bars.update(task, completed=done, total=total)
                if done == total:
                    bars.stop()

            return update

        reading = bar("reading", DownloadColumn(), TransferSpeedColumn())
        yield reading, bar("singular values", MofNCompleteColumn())


@contextmanager
def training_bars(*, quiet: bool) -> Iterator[TrainingProgress | None]:
    """Show method, step, loss and time left, a bar a method, on standard error where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import MofNCompleteColumn, TextColumn

    with _bars(MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}")) as bars:
        tasks: dict[str, TaskID] = {}

        def update(method: str, step: int, last: int, loss: float | None) -> None:
            if method not in tasks:
                tasks[method] = bars.add_task(method, total=last, loss="–")
            bars.update(tasks[method], completed=step, loss="–" if loss is None else f"{loss:.3f}")

        yield update


def _bars(*columns: ProgressColumn) -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    start, end = (TextColumn("{task.description}"), BarColumn()), TimeRemainingColumn()
    return Bars(*start, *columns, end, console=Console(stderr=True), transient=True)


def readings(table: pd.DataFrame, most: int = 6) -> None:
    """Print a comparison's readings, a paragraph a method and module; of more than `most` the first."""
    panels = [(key, " ".join(of["sentence"])) for key, of in table.groupby(["method", "module"], sort=False)]
    lines(*(f"{method} {module}: {text}" for (method, module), text in panels[:most]))
    if len(panels) > most:
        lines(f"… and {len(panels) - most} more in readings.csv.")


def number(value: float | int | None, digits: int = 3) -> str:
    """A number for reading: three significant digits, and a dash where there is none."""
    import pandas as pd

    return "–" if value is None or pd.isna(value) else f"{value:.{digits}g}"


def summary_table(summary: pd.DataFrame) -> None:
    """Print a comparison's summary, with the interval of r in one column."""
    headings = [
        ("method", "left"),
        ("module", "left"),
        ("step", "right"),
        ("ΔM", "right"),
        ("ΔD", "right"),
        ("r", "right"),
        ("95 %", "left"),
        ("slope", "right"),
        ("layers", "left"),
    ]
    rows = [
        (
            row["method"],
            row["module"],
            number(row["step"], 12),
            number(row["delta_m"]),
            number(row["delta_d"]),
            _signed(row["pearson_r"]),
            "–" if math.isnan(row["r_low"]) else f"{_signed(row['r_low'])} … {_signed(row['r_high'])}",
            number(row["slope"]),
            row["badge"],
        )
        for row in summary.to_dict("records")
    ]
    table(headings, rows)


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.2f}".replace("-", "−")

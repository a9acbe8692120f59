"""What commands print: tables and text on standard output, progress and warnings on standard error.

On a terminal text is wrapped at words to its width, and signs have colours, unless NO_COLOR is set. In a pipe or a file
a paragraph is one line, and plain.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, TextIO

from wdanalysis.errors import WdAnalysisError

if TYPE_CHECKING:
    import pandas as pd
    from rich.progress import Progress as Bars
    from rich.progress import ProgressColumn, TaskID

    from wdanalysis.comparison import Phases
    from wdanalysis.training.run.trainer import TrainingProgress

SIGNED = re.compile(r"(?<![\w.,])[+−]\d+(?:\.\d+)?(?:e[+-]\d+)?|\b(?:rises|falls)$")
"""What is coloured: numbers with their sign, and the badge of a trend."""

COLOURS = {"+": 36, "r": 36, "−": 35, "f": 35}
"""Cyan and magenta, by how what is coloured begins: neither is good or bad, and the text says the same."""

NARROWEST = 12
"""Characters that the last column of a table keeps, however narrow the terminal is."""


class CutShortError(WdAnalysisError):
    """Ctrl-C: one sentence on what is left, and the exit code that shells have for it."""

    exit_code = 130


def quieten_libraries() -> None:
    """Keep bitsandbytes, which PEFT imports where it is installed, from warning of kernels that nobody asked for."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def lines(*texts: str) -> None:
    """Print lines on standard output as they are."""
    sys.stdout.writelines(f"{text}\n" for text in texts)
    sys.stdout.flush()


def paragraph(text: str, indent: str = "") -> None:
    """Print text on standard output, wrapped; lines after the first are indented by two more characters."""
    lines(*(_coloured(line) for line in _wrapped(text, sys.stdout, indent, f"{indent}  ")))


def heading(text: str) -> None:
    """Print what the following is of."""
    lines(f"\033[1m{text}\033[0m" if _has_colours() else text)


def table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; `columns` are headings with ``left`` or ``right``. Names in it are data, never markup.

    On a terminal that is too narrow the last column is wrapped.
    """
    headings = [heading for heading, _ in columns]
    cells = [headings, *rows]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    if (room := _width(sys.stdout)) is not None:
        before = sum(widths[:-1]) + 2 * (len(widths) - 1)
        widths[-1] = min(widths[-1], max(room - before, NARROWEST))
    rule = ["─" * width for width in widths]
    for row in (headings, rule, *cells[1:]):
        last, *more = textwrap.wrap(row[-1], widths[-1]) or [""]
        for of_row in ([*row[:-1], last], *([""] * (len(row) - 1) + [rest] for rest in more)):
            aligned = (
                cell.rjust(width) if side == "right" else cell.ljust(width)
                for cell, width, (_, side) in zip(of_row, widths, columns, strict=True)
            )
            lines(_coloured("  ".join(aligned).rstrip()))


def warn(texts: Iterable[str]) -> None:
    """Print warnings on standard error."""
    for text in texts:
        _complain(f"warning: {text}")


def fail(text: str) -> None:
    """Print on standard error why the command ends."""
    _complain(f"wd-analyze: {text}")


def _complain(text: str) -> None:
    sys.stderr.writelines(f"{line}\n" for line in _wrapped(text, sys.stderr, "", "  "))


@contextmanager
def plain_warnings(*, quiet: bool) -> Iterator[None]:
    """Print what is warned of with `warnings.warn` as other warnings are, without the place in the code."""
    with warnings.catch_warnings():
        if not os.environ.get("PYTHONWARNINGS") and not sys.warnoptions:

            def show(message: Warning | str, *_: object, **__: object) -> None:
                if not quiet:
                    warn([str(message)])

            warnings.showwarning = show
        yield


def _wrapped(text: str, stream: TextIO, first: str, others: str) -> list[str]:
    room = _width(stream)
    if room is None:
        return [first + text]
    return textwrap.wrap(
        text,
        max(room, 2 * NARROWEST),
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [first]


def _width(stream: TextIO) -> int | None:
    """Characters of a terminal's line; None where the stream is none."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def _has_colours() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _coloured(line: str) -> str:
    if not _has_colours():
        return line
    return SIGNED.sub(lambda found: f"\033[{COLOURS[found[0][0]]}m{found[0]}\033[0m", line)


@contextmanager
def progress_bars(*, quiet: bool) -> Iterator[Phases | None]:
    """Show what is being done, how much of it and the time left, on standard error where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import DownloadColumn, MofNCompleteColumn, TransferSpeedColumn

    columns: dict[str, list[ProgressColumn]] = {
        "reading": [DownloadColumn(), TransferSpeedColumn()],
        "writing": [DownloadColumn(), TransferSpeedColumn()],
        "singular values": [MofNCompleteColumn()],
        "checking": [MofNCompleteColumn()],
        "drawing": [MofNCompleteColumn()],
    }
    with ExitStack() as shown:
        begun: dict[str, tuple[Bars, TaskID]] = {}

        def update(phase: str, done: int, total: int) -> None:
            counts = phase in columns
            if phase not in begun:
                if done == total:
                    return
                bars = shown.enter_context(_bars(*columns.get(phase, [])))
                begun[phase] = bars, bars.add_task(phase, total=total if counts else None)
                bars.refresh()
            bars, task = begun[phase]
            if counts:
                bars.update(task, completed=done, total=total)
            if done == total:
                bars.stop()

        yield update


@contextmanager
def training_bars(*, quiet: bool) -> Iterator[TrainingProgress | None]:
    """Show method, step, loss and time left, a bar a method, on standard error where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import MofNCompleteColumn, TextColumn

    with _bars(MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}")) as bars:
        tasks: dict[str, TaskID] = {}

        def update(method: str, step: int, last: int, loss: float | None, evaluating: bool) -> None:
            if method not in tasks:
                tasks[method] = bars.add_task(method, total=last, loss="–")
            bars.update(
                tasks[method],
                description=f"{method}, evaluating" if evaluating else method,
                completed=step,
                loss="–" if loss is None else f"{loss:.3f}",
            )

        yield update


def _bars(*columns: ProgressColumn) -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    start, end = (TextColumn("{task.description}"), BarColumn()), TimeRemainingColumn()
    return Bars(*start, *columns, end, console=Console(stderr=True), transient=True)


def readings(table: pd.DataFrame, most: int = 6) -> None:
    """Print a comparison's readings by method, a paragraph a module; of more than `most` the first."""
    panels = [(key, " ".join(of["sentence"])) for key, of in table.groupby(["method", "module"], sort=False)]
    printed = None
    for (method, module), text in panels[:most]:
        if method != printed:
            heading(str(method))
            printed = method
        paragraph(f"{module}: {text}", "  ")
    if len(panels) > most:
        paragraph(f"… and {len(panels) - most} more in readings.csv.")


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
            signed(row["pearson_r"], "+.2f"),
            "–"
            if math.isnan(row["r_low"])
            else f"{signed(row['r_low'], '+.2f')} … {signed(row['r_high'], '+.2f')}",
            signed(row["slope"], "+.3g"),
            row["badge"],
        )
        for row in summary.to_dict("records")
    ]
    table(headings, rows)


def signed(value: float, form: str) -> str:
    """Write a number in a format that has its sign, a dash where there is none."""
    return "–" if math.isnan(value) else re.sub("^-", "−", f"{value:{form}}")

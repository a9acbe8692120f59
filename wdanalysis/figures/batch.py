"""The whole set of figures as files, drawn by several processes: matplotlib takes a while, and a machine has cores.

A helper imports matplotlib while its caller is still busy with something else, and then reads on its standard input
where the `Work` lies. Every process takes the next figure that nobody has claimed, by creating its file. Helpers are
never relied on: what they leave undrawn, for whatever reason, the caller draws.

This module imports no matplotlib by itself, so that helpers start before their caller does.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING

from wdanalysis.errors import OutputError
from wdanalysis.kernels.cores import available_cores

if TYPE_CHECKING:
    import pandas as pd

KINDS: Mapping[str, str] = MappingProxyType(
    {"scatter": "module", "layers": "module", "trajectory": "module", "heatmap": "method"}
)
"""Each kind of figure, a function of `wdanalysis.figures`, and the column of which every value gets a figure."""

FORMATS = ("png", "pdf", "svg")

LONGEST_NAME = 80
"""Characters of a module's or method's name that go into a file's name."""

FIGURES_EACH = 4
"""A process is worth its start for so many figures."""

MOST_HELPERS = 3

PATIENCE = 60.0
"""Seconds that a helper may take for its last figure before the caller draws it."""


@dataclass(frozen=True)
class PlannedFigure:
    """One figure of the set.

    Attributes
    ----------
    kind
        One of `KINDS`.
    name
        The module or method that it shows.
    file
        Name of its file.
    """

    kind: str
    name: str
    file: str


@dataclass(frozen=True)
class Work:
    """What helpers are told: figures of a metrics table to be drawn into a folder."""

    metrics: pd.DataFrame
    figures: Sequence[PlannedFigure]
    folder: Path
    format: str
    dpi: float | None


def save_figures(
    metrics: pd.DataFrame,
    directory: str | Path,
    *,
    kinds: Iterable[str] = tuple(KINDS),
    format: str = "png",
    dpi: float | None = None,
) -> list[Path]:
    """Write `scatter_<module>`, `layers_<module>`, `trajectory_<module>`, `heatmap_<method>` into a folder.

    The same table gives the same bytes. In PDF and SVG, text stays text.

    Parameters
    ----------
    metrics
        The metrics table.
    directory
        Where to write; made where it is missing. The files appear once all are drawn, and replace those of the same
        name.
    kinds
        Which of `KINDS`.
    format
        ``png``, ``pdf`` or ``svg``.
    dpi
        Pixels per inch of a PNG; 200 by default.

    Returns
    -------
    list of Path
        The files, in the order of `kinds` and of the table.

    Raises
    ------
    OutputError
        There is no such kind or format.
    ComparisonError
        The table mixes the two axes.
    """
    figures = planned_figures(metrics, kinds, format)
    with (
        Helpers(len(figures)) as helpers,
        drawing(metrics, figures, Path(directory), helpers, format=format, dpi=dpi) as finish,
    ):
        return finish()


def planned_figures(metrics: pd.DataFrame, kinds: Iterable[str], format: str) -> list[PlannedFigure]:
    """Return every figure of the set, in the order of `kinds` and of the table; no heat map without layers.

    Raises
    ------
    OutputError
        There is no such kind or format.
    """
    taken: set[str] = set()
    return [
        PlannedFigure(kind, str(name), _free_name(f"{kind}_{_file_safe(str(name))}", format, taken))
        for kind in checked_kinds(kinds, format)
        for name in (metrics[metrics["layer"].notna()] if kind == "heatmap" else metrics)[
            KINDS[kind]
        ].drop_duplicates()
    ]


def checked_kinds(kinds: Iterable[str], format: str) -> list[str]:
    """Return the kinds of figures as a list.

    Raises
    ------
    OutputError
        There is no such kind or format.
    """
    kinds = list(kinds)
    for choice, choices in [(format, FORMATS), *((kind, KINDS) for kind in kinds)]:
        if choice not in choices:
            raise OutputError(f"there is no figure {choice!r}; choose of {', '.join(choices)}.")
    return kinds


@contextmanager
def drawing(
    metrics: pd.DataFrame,
    figures: Sequence[PlannedFigure],
    directory: Path,
    helpers: Helpers,
    *,
    format: str = "png",
    dpi: float | None = None,
) -> Iterator[Callable[[], list[Path]]]:
    """Let helpers draw figures beside what the caller does; the function that this gives draws the rest.

    Parameters
    ----------
    metrics, directory, format, dpi
        As for `save_figures`.
    figures
        As `planned_figures` returns them.
    helpers
        Processes that may draw; they are stopped at the end.
    """
    if not figures:
        yield list
        return
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".drawing-") as folder, helpers:
        work = Work(metrics, figures, Path(folder), format, dpi)
        helpers.begin(work)

        def finish() -> list[Path]:
            helpers.finish(work)
            return [(work.folder / figure.file).replace(directory / figure.file) for figure in figures]

        yield finish


class Helpers:
    """Processes that are ready to draw, or are about to be.

    Parameters
    ----------
    figures
        How many there will be to draw; a few are drawn sooner alone.
    """

    def __init__(self, figures: int) -> None:
        count = min(available_cores() - 1, MOST_HELPERS, figures // FIGURES_EACH - 1)
        self._processes = [_started() for _ in range(count) if sys.executable]

    def __enter__(self) -> Helpers:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def begin(self, work: Work) -> None:
        """Let them draw, while this process does something else."""
        place = work.folder / "work"
        if self._processes:
            place.write_bytes(pickle.dumps(work))
        for process in self._processes:
            with suppress(OSError):  # it has died
                os.write(_input(process).fileno(), f"{place}\n".encode())

    def finish(self, work: Work) -> None:
        """Draw with them until every figure is there."""
        draw_unclaimed(work, work.figures)
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
        self.stop()
        for figure in work.figures:
            file = work.folder / figure.file
            if not file.exists() or not file.stat().st_size:
                draw(work, figure)

    def stop(self) -> None:
        """End them, whatever they are doing."""
        for process in self._processes:
            process.kill()
            _input(process).close()
            process.wait()
        self._processes = []


def draw_unclaimed(work: Work, figures: Iterable[PlannedFigure]) -> None:
    """Draw every figure whose file nobody has created before."""
    for figure in figures:
        try:
            (work.folder / figure.file).touch(exist_ok=False)
        except FileExistsError:
            continue
        draw(work, figure)


def draw(work: Work, figure: PlannedFigure) -> None:
    """Draw one figure, so that its file is empty or whole."""
    from wdanalysis import figures

    file = work.folder / figure.file
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    drawn = getattr(figures, figure.kind)(work.metrics, figure.name)
    figures.style.write(drawn, partial, work.format, work.dpi)
    partial.replace(file)


def help_drawing() -> None:
    """Be a helper: import, wait for work, and draw it from its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, which then stops its helpers
    import wdanalysis.figures  # noqa: F401

    if place := sys.stdin.readline().rstrip("\n"):
        work = pickle.loads(Path(place).read_bytes())  # which the caller has just written
        draw_unclaimed(work, reversed(work.figures))


def _started() -> subprocess.Popen[bytes]:
    code = "import sys; sys.path[:] = sys.argv[1:]; from wdanalysis.figures.batch import help_drawing; help_drawing()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *sys.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # the caller meets the same error itself
    )


def _input(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdin is not None
    return process.stdin


def _file_safe(name: str) -> str:
    """Return the name with "-" for all that a file system or a shell may take amiss."""
    return "".join(c if c.isalnum() or c in "._-+" else "-" for c in name)[:LONGEST_NAME]


def _free_name(stem: str, format: str, taken: set[str]) -> str:
    """Return stem.format, or stem-2.format … where that is taken, be it in other letter case; and take it."""
    name, count = f"{stem}.{format}", 1
    while name.casefold() in taken:
        count += 1
        name = f"{stem}-{count}.{format}"
    taken.add(name.casefold())
    return name

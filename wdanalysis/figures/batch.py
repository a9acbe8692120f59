"""The whole set of figures as files, drawn by several processes: matplotlib takes a while, and a machine has cores.

Helpers import matplotlib while their caller is still busy with something else, and draw from the first figure on; the
caller draws from the last. They are never relied on: what helpers do not bring, for whatever reason, the caller draws.

This module imports no matplotlib by itself, so that helpers start before their caller does.
"""

from __future__ import annotations

import io
import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias

from wdanalysis.errors import OutputError
from wdanalysis.figures.kinds import FORMATS, KINDS, PAPER_X, PAPER_Y, QUANTITIES
from wdanalysis.kernels.cores import available_cores
from wdanalysis.writing import write_whole

if TYPE_CHECKING:
    import pandas as pd

LONGEST_NAME = 80
"""Characters of a module's or method's name that go into a file's name."""

FIGURES_EACH = 4
"""A process is worth its start for so many figures."""

MOST_HELPERS = 3

PATIENCE = 60.0
"""Seconds that the caller waits for a figure that a helper has begun before it draws it itself."""


Tables: TypeAlias = "Mapping[str, pd.DataFrame]"
"""Tables by the names that `wdanalysis.figures.kinds.KINDS` has; those that there are not are left out."""


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
    options
        Arguments of its function beyond tables, as pairs.
    """

    kind: str
    name: str
    file: str
    options: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Work:
    """Tables to be drawn, and how."""

    tables: Tables
    format: str
    dpi: float | None

    def part(self, figure: PlannedFigure) -> Work:
        """Return what one figure needs of it: the whole metrics, which give methods their colours, else its rows."""
        kind = KINDS[figure.kind]
        tables = {name: self.tables[name] for name in (kind.table, *kind.beside) if name in self.tables}
        return replace(
            self,
            tables={
                name: table if name == "metrics" or table.empty else table[table[kind.of] == figure.name]
                for name, table in tables.items()
            },
        )

    def draw(self, figure: PlannedFigure) -> bytes:
        """Return the file of a figure."""
        from wdanalysis import figures
        from wdanalysis.figures import style

        kind = KINDS[figure.kind]
        tables = self.part(figure).tables
        beside = {name: tables[name] for name in kind.beside if name in tables}
        drawn = getattr(figures, figure.kind)(
            tables[kind.table], figure.name, **beside, **dict(figure.options)
        )
        file = io.BytesIO()
        style.write(drawn, file, self.format, self.dpi)
        return file.getvalue()


def save_figures(
    tables: pd.DataFrame | Tables,
    directory: str | Path,
    *,
    kinds: Iterable[str] = tuple(KINDS),
    format: str = "png",
    dpi: float | None = None,
    x: str = PAPER_X,
    y: str = PAPER_Y,
) -> list[Path]:
    """Write `scatter_<module>`, `layers_<module>`, `trajectory_<module>`, `heatmap_<method>` … into a folder.

    The same tables give the same bytes. In PDF and SVG, text stays text.

    Parameters
    ----------
    tables
        The metrics table, or several tables by their names (`wdanalysis.figures.kinds.KINDS`) with ``metrics`` among
        them. A kind whose table is missing has no figures.
    directory
        Where to write; made where it is missing. The files appear once all are drawn, and replace those of the same
        name.
    kinds
        Which of `KINDS`.
    format
        ``png``, ``pdf`` or ``svg``.
    dpi
        Pixels per inch of a PNG; 200 by default.
    x, y
        What the scatter shows, of `wdanalysis.figures.kinds.QUANTITIES`; other axes than the paper's are in the file's
        name.

    Returns
    -------
    list of Path
        The files, in the order of `kinds` and of the table.

    Raises
    ------
    OutputError
        There is no such kind, format or quantity.
    ComparisonError
        The table mixes the two axes, or lacks a quantity.
    """
    named = tables if isinstance(tables, Mapping) else {"metrics": tables}
    figures = planned_figures(named, kinds, format, x=x, y=y)
    with drawing(named, figures, Path(directory), format=format, dpi=dpi) as finish:
        return finish()


def planned_figures(
    tables: Tables, kinds: Iterable[str], format: str, *, x: str = PAPER_X, y: str = PAPER_Y
) -> list[PlannedFigure]:
    """Return every figure of the set, in the order of `kinds` and of the tables; no heat map without layers.

    None at all where no matrix has a value.

    Raises
    ------
    OutputError
        There is no such kind, format or quantity.
    """
    kinds = list(kinds)
    chosen = [(format, FORMATS), *((kind, KINDS) for kind in kinds), (x, QUANTITIES), (y, QUANTITIES)]
    for choice, choices in chosen:
        if choice not in choices:
            raise OutputError(f"there is no figure {choice!r}; choose of {', '.join(choices)}.")
    axes = () if (x, y) == (PAPER_X, PAPER_Y) else (("x", x), ("y", y))
    taken: set[str] = set()
    figures = []
    for kind in kinds:
        options = axes if kind == "scatter" else ()
        suffix = f"_{y}-over-{x}" if options else ""
        figures += [
            PlannedFigure(
                kind, name, _free_name(f"{kind}_{_file_safe(name)}{suffix}", format, taken), options
            )
            for name in _names(tables, kind)
        ]
    return figures


def _names(tables: Tables, kind: str) -> list[str]:
    """The modules or methods of which there is a figure of a kind."""
    from wdanalysis.analysis.table import apart

    metrics, shown = tables["metrics"], tables.get(KINDS[kind].table)
    if shown is None or not metrics["delta_m"].notna().any():
        return []
    if kind == "heatmap":
        shown = shown[shown["layer"].notna()]
    elif kind == "layers":
        shown = apart(shown)
    return [str(name) for name in shown[KINDS[kind].of].drop_duplicates()]


@contextmanager
def drawing(
    tables: Tables,
    figures: Sequence[PlannedFigure],
    directory: Path,
    *,
    format: str = "png",
    dpi: float | None = None,
) -> Iterator[Callable[[], list[Path]]]:
    """Let helpers draw figures beside what the caller does; the function that this gives draws the rest and writes.

    Parameters
    ----------
    tables, directory, format, dpi
        As for `save_figures`.
    figures
        As `planned_figures` returns them.
    """
    work = Work(tables, format, dpi)
    with _helped(work, figures) as (left, begun):

        def finish() -> list[Path]:
            files = {figure: work.draw(figure) for figure in _taken(left)}
            for figure in figures:
                if figure not in files:
                    files[figure] = _brought(begun.get(figure)) or work.draw(figure)
            return [_write(directory / figure.file, files[figure]) for figure in figures]

        yield finish


Begun: TypeAlias = dict[PlannedFigure, "Future[bytes]"]


@contextmanager
def _helped(work: Work, figures: Sequence[PlannedFigure]) -> Iterator[tuple[deque[PlannedFigure], Begun]]:
    """Let processes draw while the context lasts; give the figures that nobody has begun, and those of helpers."""
    left, begun = deque(figures), Begun()
    count = min(available_cores() - 1, MOST_HELPERS, len(figures) // FIGURES_EACH - 1)
    others = multiprocessing.active_children()
    with ExitStack() as at_end:

        def begin(_: object = None) -> None:
            """Give a helper the next figure, and another one when it has drawn that."""
            with suppress(Exception):  # nothing is left, or the helpers are dead
                figure = left.popleft()
                begun[figure] = pool.submit(work.part(figure).draw, figure)
                begun[figure].add_done_callback(begin)

        if count > 0:
            with suppress(Exception):  # a system that starts no processes
                pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))
                at_end.callback(pool.shutdown)
                with _on_their_own():
                    for _ in range(count):
                        begin()
            for process in set(multiprocessing.active_children()) - set(others):
                at_end.callback(process.kill)  # whatever it is doing
        at_end.callback(left.clear)
        yield left, begun


def _taken(left: deque[PlannedFigure]) -> Iterator[PlannedFigure]:
    """Take figures from the end, while helpers take them from the start."""
    with suppress(IndexError):
        while True:
            yield left.pop()


@contextmanager
def _on_their_own() -> Iterator[None]:
    """Let processes that are started meanwhile not run the caller's script again, and leave Ctrl-C to the caller."""
    masks = hasattr(signal, "pthread_sigmask")  # POSIX alone has signal masks
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if masks else None
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        if blocked is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _brought(figure: Future[bytes] | None) -> bytes | None:
    """The file that a helper has drawn; None where it died or failed: the caller meets the same error itself."""
    try:
        return figure.result(PATIENCE) if figure else None
    except Exception:
        return None


def _write(path: Path, content: bytes) -> Path:
    return write_whole(path, lambda file: file.write(content))


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

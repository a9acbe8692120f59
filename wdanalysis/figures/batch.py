"""The whole set of figures as files, drawn by several processes: matplotlib takes a while, and a machine has cores.

Helpers import matplotlib while their caller is still busy with something else, and draw from the first figure on; the
caller draws from the last. They are never relied on: what helpers do not bring, for whatever reason, the caller draws.

This module imports no matplotlib by itself, so that helpers start before their caller does.
"""

from __future__ import annotations

import io
import multiprocessing
import re
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from wdanalysis.errors import OutputError
from wdanalysis.figures.kinds import KINDS, PAPER_X, PAPER_Y, Look
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


CAPTIONS = "captions.md"
"""The file beside the figures that says what each shows, to be set under it."""


@dataclass(frozen=True)
class PlannedFigure:
    """One figure of the set.

    Attributes
    ----------
    kind
        One of `KINDS`.
    name
        The module or method that it shows; "" where it shows all.
    file
        Name of its file.
    """

    kind: str
    name: str
    file: str


@dataclass(frozen=True)
class DrawnFigure:
    """The file of a figure, what it shows, and what went wrong with its text."""

    content: bytes
    heading: str = ""
    caption: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """Tables to be drawn, and how; `settings` is what the user has set in matplotlib."""

    tables: Tables
    look: Look
    settings: Mapping[str, Any] = field(default_factory=dict)

    def part(self, figure: PlannedFigure) -> Work:
        """Return what one figure needs of it: the whole metrics, which give methods their colours, else its rows."""
        kind = KINDS[figure.kind]
        tables = {name: self.tables[name] for name in (kind.table, *kind.beside) if name in self.tables}
        return replace(
            self,
            tables={
                name: table
                if name == "metrics" or table.empty or not kind.of
                else table[table["module"] == figure.name]
                for name, table in tables.items()
            },
        )

    def draw(self, figure: PlannedFigure) -> DrawnFigure:
        """Return the file of a figure, with its caption."""
        import matplotlib

        from wdanalysis import figures
        from wdanalysis.figures import style

        kind, look = KINDS[figure.kind], self.look
        tables = self.part(figure).tables
        options: dict[str, Any] = {name: tables[name] for name in kind.beside if name in tables}
        options |= {name: getattr(look, name) for name in kind.takes}
        options |= {"title": look.title, "figsize": (look.width, None) if look.width else None}
        rc: Any = dict(self.settings)
        file = io.BytesIO()
        with (
            warnings.catch_warnings(record=True) as caught,
            matplotlib.rc_context(rc),
            style.context(look.style, look.font),
        ):
            warnings.simplefilter("always")
            draw = getattr(figures, figure.kind)
            drawn = draw(tables[kind.table], *filter(None, [figure.name]), **options)
            style.write(drawn, file, look.format, look.dpi)
        said = tuple(dict.fromkeys(str(warning.message) for warning in caught))
        return DrawnFigure(file.getvalue(), drawn.heading, drawn.caption, said)


def save_figures(
    tables: pd.DataFrame | Tables,
    directory: str | Path,
    *,
    kinds: Iterable[str] = tuple(KINDS),
    look: Look | None = None,
) -> list[Path]:
    """Write `scatter_<module>`, `layers_<module>`, `trajectory_<module>`, `heatmap` … and their captions into a folder.

    The same tables give the same bytes, as long as matplotlib is set alike. In PDF and SVG, text stays text.

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
    look
        How they are drawn.

    Returns
    -------
    list of Path
        The files, in the order of `kinds` and of the table; `captions.md` is the last.

    Raises
    ------
    OutputError
        There is no such kind, or the look asks for a font that there is not.
    ComparisonError
        The table mixes the two axes, or lacks a quantity.

    Warns
    -----
    UserWarning
        The font lacks characters of the names: once, with all of them.
    """
    look = look or Look()
    named = tables if isinstance(tables, Mapping) else {"metrics": tables}
    figures = planned_figures(named, kinds, look)
    with drawing(named, figures, Path(directory), look) as finish:
        return finish()


def planned_figures(tables: Tables, kinds: Iterable[str], look: Look) -> list[PlannedFigure]:
    """Return every figure of the set, in the order of `kinds` and of the tables.

    There is none of what a table has nothing to show: no layers, one step, one module for a page of several; and none
    at all where no matrix has a value.

    Raises
    ------
    OutputError
        There is no such kind.
    """
    kinds = list(kinds)
    for kind in kinds:
        if kind not in KINDS:
            raise OutputError(f"there is no figure {kind!r}; choose of {', '.join(KINDS)}.")
    axes = "" if (look.x, look.y) == (PAPER_X, PAPER_Y) else f"_{look.y}-over-{look.x}"
    taken: set[str] = set()
    return [
        PlannedFigure(kind, name, _free_name(stem + axes * ("x" in KINDS[kind].takes), look.format, taken))
        for kind in kinds
        for name in _names(tables, kind)
        for stem in [f"{kind}_{_file_safe(name)}" if name else kind]
    ]


def _names(tables: Tables, kind: str) -> list[str]:
    """The modules of which there is a figure of a kind; [""] where one shows all."""
    from wdanalysis.analysis.table import apart, merged_stacks

    metrics, shown = tables["metrics"], tables.get(KINDS[kind].table)
    if shown is None or not metrics["delta_m"].notna().any():
        return []
    if kind in _PAGES:
        shown = merged_stacks(shown)
    elif kind == "layers":
        shown = apart(shown)
    if (column := _ALONG.get(kind)) is not None:
        places = shown.groupby("module", sort=False)[column].nunique()
        shown = shown[shown["module"].map(places) > (0 if kind == "heatmap" else 1)]
    if KINDS[kind].of:
        return [str(name) for name in shown["module"].drop_duplicates()]
    return [""] if len(shown) and (kind not in _PAGES or shown["module"].nunique() > 1) else []


_PAGES = ("figure2", "figure8")
"""Kinds that show several modules on one page; one module has figures of its own."""

_ALONG = {"layers": "layer", "figure8": "layer", "trajectory": "step", "heatmap": "layer"}
"""The column along which a kind shows values: nothing without any, and but for the heat map nothing with one."""


@contextmanager
def drawing(
    tables: Tables,
    figures: Sequence[PlannedFigure],
    directory: Path,
    look: Look,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Callable[[], list[Path]]]:
    """Let helpers draw figures beside what the caller does; the function that this gives draws the rest and writes.

    Parameters
    ----------
    tables, directory, look
        As for `save_figures`.
    figures
        As `planned_figures` returns them.
    progress
        Called with the figures drawn and the number of all.
    """
    work = Work(tables, look, _settings())
    with _helped(work, figures) as (left, begun):

        def tell(drawn: Mapping[PlannedFigure, DrawnFigure]) -> None:
            if progress and figures:
                of_helpers = sum(work.done() for figure, work in list(begun.items()) if figure not in drawn)
                progress(len(drawn) + of_helpers, len(figures))

        def finish() -> list[Path]:
            drawn: dict[PlannedFigure, DrawnFigure] = {}
            tell(drawn)
            for figure in _taken(left):
                drawn[figure] = work.draw(figure)
                tell(drawn)
            for figure in figures:
                if figure not in drawn:
                    drawn[figure] = _brought(begun.get(figure)) or work.draw(figure)
                    tell(drawn)
            _warn_of_glyphs(drawn.values())
            paths = [_write(directory / figure.file, drawn[figure].content) for figure in figures]
            texts = [_captioned(figure, drawn[figure]) for figure in figures]
            return [*paths, _write(directory / CAPTIONS, "\n".join(texts).encode())] if figures else []

        yield finish


def _settings() -> dict[str, Any]:
    """What the user has set in matplotlib: nothing where it is not imported yet."""
    if "matplotlib" not in sys.modules:
        return {}
    from wdanalysis.figures import style

    return style.settings()


def _captioned(figure: PlannedFigure, drawn: DrawnFigure) -> str:
    """Return a figure's part of `captions.md`: its file as a heading, and the caption in one paragraph."""
    return f"## {figure.file}\n\n**{drawn.heading}.** {drawn.caption}\n"


def _warn_of_glyphs(drawn: Iterable[DrawnFigure]) -> None:
    """Warn once of all characters that the font lacks, and of everything else by itself."""
    said = dict.fromkeys(text for figure in drawn for text in figure.warnings)
    missing = {int(found[1]) for text in said if (found := re.match(r"Glyph (\d+) ", text))}
    others = [text for text in said if not re.match(r"Glyph (\d+) ", text)]
    if missing:
        characters = "".join(map(chr, sorted(missing)))
        others.append(
            f"the figures' font has no {characters}: boxes stand in their place; choose a font that has"
        )
    for text in others:
        warnings.warn(text, stacklevel=4)


Begun: TypeAlias = dict[PlannedFigure, "Future[DrawnFigure]"]


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


def _brought(figure: Future[DrawnFigure] | None) -> DrawnFigure | None:
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

"""How figures look: sizes, colours, markers and text, for a paper, a talk or a screen, and for colour-blind eyes too.

What a user has set in matplotlib's rcParams, by a style sheet or a `matplotlibrc`, stays as it is; `RC` is for the rest.
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from wdanalysis.errors import OutputError

WIDTH = 6.75
"""Inches: the text width of a two-column paper."""

CHARACTERS = 16
"""That many characters of 8 pt go on an inch."""

PANEL = 1.6
"""A panel is at least so many inches wide where its text is of 8 pt."""

ONE_PANEL = 4.5
"""A figure of one panel is no wider, where nobody says."""

DPI = 200

SIZES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"paper": (8, WIDTH), "talk": (14, 10.0), "screen": (10, 9.0)}
)
"""Points of the text and inches of the width, by style."""

RC: Mapping[str, Any] = MappingProxyType(
    {
        "axes.titlesize": "medium",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": "#e4e4e4",
        "legend.fontsize": "medium",
        "legend.title_fontsize": "medium",
        "legend.frameon": False,
        "text.parse_math": False,  # a "$" in a method's name is a dollar
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "wdanalysis",  # the same figure is the same file
        "pdf.fonttype": 42,
    }
)

STROKES: Mapping[str, float] = MappingProxyType(
    {"axes.linewidth": 0.6, "grid.linewidth": 0.5, "lines.linewidth": 1.3, "lines.markersize": 4.0}
)
"""Widths in points beside text of 8 pt; larger text has wider ones."""

METADATA: Mapping[str, Mapping[str, None]] = MappingProxyType(
    {
        "png": {"Software": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
        "svg": {"Date": None, "Creator": None},
    }
)
"""What a file says about itself, by format: neither the time nor the version, so that it can be compared."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
"""Okabe and Ito's palette with grey instead of its yellow, which is too pale for a line."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

LINES = ("-", "--", "-.", ":")

MISSING = "#9a9a9a"
"""Colour of a point without a layer, and of a cell without a value."""

QUIET = "#505050"
"""Colour of what is said beside the data."""

NULL = "#a9a9a9"
"""Colour of what updates without structure would show."""

MINUS = "−"


class Drawing(Figure):
    """A figure that a Jupyter cell shows by itself, with no backend chosen.

    Attributes
    ----------
    heading
        What it shows, in a few words.
    caption
        What a reader must know of it, to be set under it.
    """

    heading: str = ""
    caption: str = ""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        picture = io.BytesIO()
        write(self, picture, "png")
        width, height = (round(100 * inches) for inches in self.get_size_inches())
        return picture.getvalue(), {"width": width, "height": height}


_INSIDE: ContextVar[bool] = ContextVar("inside", default=False)


@contextmanager
def context(style: str = "paper", font: str | None = None) -> Iterator[None]:
    """Draw and write figures in this: what the user has not set is `RC` in a style's size.

    Inside of another such context the outer one holds. TeX stays out: it reads the "%" and "_" of names as its own.

    Raises
    ------
    OutputError
        The font is not installed.
    """
    if _INSIDE.get():
        yield
        return
    points, _ = SIZES[style]
    wanted = {"font.size": points, **RC}
    wanted |= {name: width * points / 8 for name, width in STROKES.items()}
    default, now = matplotlib.rcParamsDefault, matplotlib.rcParams
    rc = {name: value for name, value in wanted.items() if now[name] == default[name]}
    if font is not None:
        rc["font.family"] = [_installed(font), *default["font.sans-serif"][:1]]
    inside = _INSIDE.set(True)
    try:
        with matplotlib.rc_context({**rc, "text.usetex": False}):
            yield
    finally:
        _INSIDE.reset(inside)


def settings() -> dict[str, Any]:
    """Return what differs from matplotlib's defaults by now, for another process; but for what belongs to a process."""
    default, now = matplotlib.rcParamsDefault, matplotlib.rcParams
    own = {name for name in now if name.startswith(("backend", "interactive", "webagg", "tk", "toolbar"))}
    return {name: now[name] for name in now if name not in own and now[name] != default[name]}


def _installed(font: str) -> str:
    from matplotlib.font_manager import findfont

    try:
        findfont(font, fallback_to_default=False)
    except ValueError:
        raise OutputError(
            f"the font {font!r} is not installed; `fc-list` names those that are.", parameter="font"
        ) from None
    return font


def text_size() -> float:
    """Return the points of the text by now."""
    return float(matplotlib.rcParams["font.size"])


def line_height() -> float:
    """Return the inches that a line of text takes."""
    return 1.35 * text_size() / 72


def characters(inches: float) -> int:
    """Return how many characters go on so many inches."""
    return max(4, int(CHARACTERS * inches * 8 / text_size()))


def write(figure: Figure, target: Path | io.BytesIO, format: str, dpi: float | None = None) -> None:
    """Write a figure, a PNG with `DPI` by default; the same figure always gives the same bytes."""
    # A little larger, and written much sooner.
    quick: dict[str, Any] = {"pil_kwargs": {"compress_level": 3}} if format == "png" else {}
    with context():
        figure.savefig(
            target, format=format, dpi=dpi or DPI, metadata=dict(METADATA.get(format, {})), **quick
        )


AxLike: TypeAlias = "Axes | Sequence[Axes] | NDArray[Any]"
"""Where a caller wants panels drawn: one axes or as many as there are panels."""

FigSize: TypeAlias = "tuple[float, float | None]"
"""Inches of width and height; a height of None is what the panels need."""


@dataclass(frozen=True)
class Sheet:
    """A figure and its panels: new ones, or those of a figure of the caller's.

    Attributes
    ----------
    figure, panels
        The figure, and its panels row by row.
    columns
        How many panels stand side by side.
    is_own
        Whether the figure was made here. One of the caller's keeps its title, and its legend is inside a panel.
    """

    figure: Figure
    panels: list[Axes]
    columns: int
    is_own: bool

    @property
    def panel_width(self) -> float:
        """Inches that a panel has, with its labels."""
        return float(self.figure.get_figwidth()) / self.columns

    def legend(self, handles: Sequence[Artist], labels: Sequence[str]) -> None:
        """Put a legend under the panels, in as many columns as the labels leave room for.

        A label is shown as it is: matplotlib drops one that begins with "_", so it is set afterwards.
        """
        if not handles:
            return
        labels = told_apart(labels, min(40, characters(self.figure.get_figwidth()) - 6))
        names = [f"{i}" for i in range(len(labels))]
        if self.is_own:
            rows = _legend_rows(labels, self.figure.get_figwidth())
            columns = math.ceil(len(labels) / rows)
            box = self.figure.legend(handles, names, loc="outside lower center", ncols=columns)
        else:
            box = self.panels[-1].legend(handles, names)
        for text, label in zip(box.get_texts(), labels, strict=True):
            text.set_text(label)

    def label_edges(self, panel: Axes, index: int, panels: int, *, every_tick: bool) -> None:
        """Name axes at the left and lower edge of a block only, and their ticks where `every_tick` is False."""
        if not every_tick and index + self.columns < panels:
            panel.set_xlabel("")
            panel.tick_params(labelbottom=False)
        if index % self.columns:
            panel.set_ylabel("")
            panel.tick_params(labelleft=every_tick)

    def colour_bar(self, mappable: ScalarMappable, label: str, panels: Sequence[Axes] | None = None) -> Axis:
        """Put a colour bar beside the panels, or some of them, and return its axis."""
        panels = self.panels if panels is None else list(panels)
        rows = math.ceil(len(panels) / self.columns)
        bar = self.figure.colorbar(mappable, ax=panels, label=label, aspect=30 * rows, pad=0.015)
        bar.outline.set_visible(False)
        return bar.ax.yaxis

    def entitle(self, title: str, heading: str, *sentences: str) -> None:
        """Give a figure its caption, and over it as much of that as `title` says; empty sentences are left out."""
        if not self.is_own:
            return
        said = [sentence for sentence in sentences if sentence]
        if isinstance(self.figure, Drawing):
            self.figure.heading, self.figure.caption = heading, " ".join(map(as_sentence, said))
        width = characters(self.figure.get_figwidth())
        lines = {
            "none": [],
            "short": [shortened(heading, width)],
            "full": [part for line in (heading, *said) for part in textwrap.wrap(line, width)],
        }[title]
        if lines:
            points = text_size()
            self.figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=points)
            if len(lines) > 1:
                grown = self.figure.get_figheight() + line_height() * (len(lines) - 1)
                self.figure.set_figheight(grown)


def sheet(
    panels: int,
    columns: int | None = None,
    *,
    blocks: int = 1,
    panel_height: float,
    labels: Sequence[str] = (),
    ax: AxLike | None = None,
    figsize: FigSize | None = None,
) -> Sheet:
    """Return panels to draw on.

    Parameters
    ----------
    panels, columns, blocks
        How many panels, and how many side by side (by default as many as have room); and how many such blocks stand
        one under another.
    panel_height
        Inches of a panel with the text around it, beside text of 8 pt.
    labels
        Of the legend, which takes room.
    ax
        Draw on these; the figure is the caller's then.
    figsize
        Size of a new figure; by default the width of matplotlib's rcParams where the user has set it, else `WIDTH`, and
        less for a single panel.

    Raises
    ------
    ValueError
        `ax` has another number of axes than there are panels.
    """
    width, height = figsize or (default_width() if panels > 1 else min(default_width(), ONE_PANEL), None)
    columns = columns or _columns(panels, width)
    if ax is not None:
        given = np.atleast_1d(np.asarray(ax, dtype=object)).ravel().tolist()
        if len(given) != panels * blocks:
            raise ValueError(f"this figure has {panels * blocks} panels, and ax has {len(given)}")
        return Sheet(given[0].figure, given, columns, is_own=False)
    rows = math.ceil(panels / columns)
    if height is None:
        # Large text makes panels higher.
        height = line_height() * 2 + panel_height * rows * blocks * min(text_size() / 8, 1.4)
        height += line_height() * 1.35 * _legend_rows(labels, width) if labels else 0
    figure = Drawing(figsize=(width, height), layout="constrained")
    made = figure.subplots(rows * blocks, columns, squeeze=False).reshape(blocks, rows * columns)
    for unused in made[:, panels:].ravel():
        unused.remove()
    return Sheet(figure, list(made[:, :panels].ravel()), columns, is_own=True)


def _columns(panels: int, width: float) -> int:
    """Return how many panels stand side by side on a figure of that width; rows are as even as may be.

    >>> [_columns(panels, 6.75 * matplotlib.rcParams["font.size"] / 8) for panels in (3, 5, 8)]
    [3, 3, 4]
    """
    most = max(1, min(4, int(width / (PANEL * text_size() / 8))))
    return math.ceil(panels / math.ceil(panels / most))


def default_width() -> float:
    """Return the inches that a figure is wide where nobody says."""
    width = float(matplotlib.rcParams["figure.figsize"][0])
    return WIDTH if width == matplotlib.rcParamsDefault["figure.figsize"][0] else width


def as_sentence(text: str) -> str:
    """Return the text with a capital at its start and a full stop at its end.

    >>> as_sentence("grey: no value")
    'Grey: no value.'
    """
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


@dataclass(frozen=True)
class MethodStyle:
    """Colour, marker and line of a method, the same on every figure of a table."""

    color: str
    marker: str
    linestyle: str


def method_styles(methods: Iterable[str]) -> dict[str, MethodStyle]:
    """Return a style for each method; those after the eighth share a colour but not its marker."""
    count = len(COLOURS)
    return {
        method: MethodStyle(
            COLOURS[i % count], MARKERS[(i + i // count) % count], LINES[(i + i // count) % len(LINES)]
        )
        for i, method in enumerate(methods)
    }


def layer_colours(cmap: str | Colormap | None = None) -> Colormap:
    """Return a caller's colours, by default viridis without its palest end, which vanishes on white."""
    if cmap is not None:
        return matplotlib.colormaps.get_cmap(cmap)
    return ListedColormap(matplotlib.colormaps["viridis"](range(0, 236)), name="layers")


def shortened(text: str, width: int) -> str:
    """Return the text on one line of at most `width` characters, its middle left out where it is longer."""
    line = "".join(character if character.isprintable() else " " for character in text)
    head = (width - 1) // 2
    return line if len(line) <= width else f"{line[: width - 1 - head]}…{line[-head:]}"


def told_apart(names: Sequence[str], width: int) -> list[str]:
    """Return every name on one line of at most `width` characters, different ones different.

    Where shortening alone would make two the same, what all begin and end with gives way first.
    """
    labels = [shortened(name, width) for name in names]
    if len(set(labels)) < len(set(names)):
        head = _common_start(names)
        tail = _common_start([name[head:][::-1] for name in names])
        spare = max(0, width - 2 - max(len(name) - head - tail for name in names))
        head, tail = max(0, head - spare // 2), max(0, tail - (spare - spare // 2))
        before, after = "…" * bool(head), "…" * bool(tail)
        labels = [f"{before}{shortened(name[head : len(name) - tail], width - 2)}{after}" for name in names]
    if len(set(labels)) < len(set(names)):
        labels = [f"{place} {shortened(name, width - 4)}" for place, name in enumerate(names, 1)]
    return labels


def _common_start(names: Sequence[str]) -> int:
    """Return how many characters all names begin with."""
    return sum(1 for _ in itertools.takewhile(lambda same: len(set(same)) == 1, zip(*names, strict=False)))


def decimals(value: float) -> str:
    """Return a correlation to two decimals: 0.97, −0.05."""
    return f"{value:.2f}".replace("-", MINUS)


def number(value: float, digits: int = 3) -> str:
    """Return a number to `digits` significant digits as it is set in print: 0.0621, −1.20×10⁻⁴."""
    exponent = math.floor(math.log10(abs(value))) if value else 0
    if -3 <= exponent <= 3:
        return f"{value:.{max(digits - 1 - exponent, 0)}f}".replace("-", MINUS)
    return f"{value / 10.0**exponent:.{digits - 1}f}×{power_of_ten(exponent)}".replace("-", MINUS)


def power_of_ten(exponent: int) -> str:
    """Return "10⁻⁶" for −6."""
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


class PowerFormatter(Formatter):
    """Tick labels in units of a power of ten, all to the same decimals."""

    def __init__(self, exponent: int = 0) -> None:
        self.unit = 10.0**exponent

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Return the label of x by itself."""
        return self.format_ticks([x])[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """Return the labels of all ticks, with as many decimals as tell them apart exactly."""
        ticks = np.asarray(values) / self.unit
        near = 1e-3 * np.ptp(ticks) or 1e-9
        decimals = next((d for d in range(9) if np.allclose(ticks, ticks.round(d), rtol=0, atol=near)), 9)
        return [f"{tick + 0.0:.{decimals}f}".replace("-", MINUS) for tick in ticks.round(decimals)]


def count_axis(axis: Axis) -> None:
    """Write whole numbers at the decades of a logarithmic axis."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_minor_formatter(NullFormatter())


def number_axis(axis: Axis, name: str, ticks: int = 5) -> None:
    """Give an axis of ΔM or ΔD its name and ticks that are legible from 1e-12 to 1.

    A linear axis counts in a power of ten that its name tells, "ΔD (10⁻⁶)". The limits must be set.
    """
    low, high = sorted(axis.get_view_interval())
    if axis.get_scale() == "log":
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=ticks + 1))
        axis.set_major_formatter(FuncFormatter(lambda value, _: decade_label(value)))
        axis.set_minor_formatter(NullFormatter())
    else:
        largest = max(abs(low), abs(high))
        exponent = math.floor(math.log10(largest)) if largest else 0
        if -2 <= exponent <= 3:
            exponent = 0
        axis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(PowerFormatter(exponent))
        name += f"  ({power_of_ten(exponent)})" if exponent else ""
    axis.set_label_text(name)


def decade_label(value: float) -> str:
    """Return "10⁻⁶" or "5×10⁻⁶"."""
    mantissa, exponent = f"{value:.0e}".split("e")
    return (f"{mantissa}×" if mantissa != "1" else "") + power_of_ten(int(exponent))


def integer_axis(axis: Axis, ticks: int = 8) -> None:
    """Give an axis of layers or steps whole numbers."""
    axis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def _legend_rows(labels: Sequence[str], width: float) -> int:
    """Return how many rows a legend has on a figure of that width."""
    per_row = characters(width) // (max(map(len, labels)) + 9)
    return math.ceil(len(labels) / max(1, per_row))


def listed(*texts: str) -> str:
    """Return the texts with commas between them; empty ones are left out."""
    return ", ".join(filter(None, texts))


def message(axes: Axes, text: str) -> None:
    """Say in an empty panel why it is empty."""
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color=QUIET)

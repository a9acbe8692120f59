"""How figures look: sizes, colours, markers and text, for a paper, a talk or a screen, and for colour-blind eyes too.

What a user has set in matplotlib's rcParams, by a style sheet or a `matplotlibrc`, stays; `RC` is for the rest.
"""

from __future__ import annotations

import io
import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, TypeAlias

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import (
    FixedLocator,
    Formatter,
    FuncFormatter,
    Locator,
    LogLocator,
    MaxNLocator,
    NullFormatter,
)
from numpy.typing import NDArray

from wdanalysis.errors import OutputError
from wdanalysis.figures.kinds import FORMATS, Title
from wdanalysis.writing import write_whole

WIDTH = 6.75
"""Inches: the text width of a two-column paper."""

PANEL = 1.5
"""A panel is at least so many inches wide where its text is of 8 pt."""

BESIDE = 4.5
"""The names and numbers of a panel's y axis, or of a colour bar, are about so many times the size of the text wide."""

ONE_PANEL = 4.5
"""A figure of one panel is no wider beside text of 8 pt, where nobody says."""

DPI = 200

SIZES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"paper": (8, WIDTH), "talk": (14, 10.0), "screen": (10, 9.0)}
)
"""Points of the text and inches of the width, by style."""

RC: Mapping[str, Any] = MappingProxyType(
    {
        "axes.titlesize": "medium",
        "figure.titlesize": "medium",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": "#e4e4e4",
        "legend.fontsize": "medium",
        "legend.title_fontsize": "medium",
        "legend.frameon": False,
        "legend.columnspacing": 1.2,
        "legend.handlelength": 1.8,
        "legend.handletextpad": 0.5,
        "savefig.dpi": DPI,
        "text.parse_math": False,  # a "$" in a method's name is a dollar
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "wdanalysis",  # the same figure is the same file
        "pdf.fonttype": 42,
    }
)

STROKES: Mapping[str, float] = MappingProxyType(
    {
        **{"axes.linewidth": 0.6, "grid.linewidth": 0.5, "lines.linewidth": 1.3, "lines.markersize": 4.0},
        **{f"{axis}tick.major.{name}": 3.5 for axis in "xy" for name in ("size", "pad")},
    }
)
"""Points beside text of 8 pt; larger text has more."""

METADATA: Mapping[str, Mapping[str, None]] = MappingProxyType(
    {
        "png": {"Software": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
        "svg": {"Date": None, "Creator": None},
    }
)
"""What a file says about itself, by format: neither the time nor the version, so that it can be compared."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
"""Okabe and Ito's palette with grey instead of its yellow, which is too pale for a line; a user's cycle goes first."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

LINES = ("-", "--", "-.", ":")

MISSING = "#9a9a9a"
"""Colour of a point without a layer, and of a cell without a value."""

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
    points, width = SIZES[style]
    default: Any = matplotlib.rcParamsDefault
    now: Any = matplotlib.rcParams
    wanted: dict[str, Any] = {"font.size": points, "figure.figsize": (width, width), **RC}
    wanted |= {name: strokes * points / 8 for name, strokes in STROKES.items()}
    rc: Any = {name: value for name, value in wanted.items() if now[name] == default[name]}
    if (
        "axes.grid" in rc and "grid.color" not in rc
    ):  # a style's colour, chosen for a grid that it does not draw
        rc["grid.alpha"] = 0.2
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


def em() -> float:
    """Return the inches of the text's size by now."""
    return text_size() / 72


def growth() -> float:
    """Return how much higher than beside text of 8 pt a panel is by now."""
    return min(text_size() / 8, 1.4)


def line_height() -> float:
    """Return the inches that a line of text takes."""
    return 1.35 * em()


def ink() -> str:
    """Return the colour of text and axes by now: black, but for a user's style."""
    return to_hex(matplotlib.rcParams["text.color"])


def ground() -> str:
    """Return the colour of the panels by now: white, but for a user's style."""
    return to_hex(matplotlib.rcParams["axes.facecolor"])


def quiet() -> str:
    """Return the colour of what is said beside the data."""
    red, green, blue = (
        0.69 * fore + 0.31 * back for fore, back in zip(to_rgb(ink()), to_rgb(ground()), strict=True)
    )
    return to_hex((red, green, blue))


def text_width(text: str, font: FontProperties | None = None) -> float:
    """Return the inches that a line of text is wide, by now or in a font."""
    return _text_width(text, font or FontProperties())


@lru_cache(maxsize=4096)
def _text_width(text: str, font: FontProperties) -> float:
    with warnings.catch_warnings():  # of missing glyphs: said once, where the text is drawn
        warnings.simplefilter("ignore")
        width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return float(width) / 72


def wrapped(text: str, inches: float) -> list[str]:
    """Return the text in lines of that width, broken at spaces; a word that is too long is shortened."""
    space, left = text_width("x x") - text_width("xx"), inches
    lines: list[list[str]] = [[]]
    for word in (fitted([word], inches)[0] for word in text.split()):
        width = text_width(word)
        if lines[-1] and width > left:
            lines.append([])
            left = inches
        lines[-1].append(word)
        left -= width + space
    return [" ".join(line) for line in lines]


def save(figure: Figure, path: Path) -> Path:
    """Write a figure into a file, whole or not at all, as what its suffix says.

    Raises
    ------
    OutputError
        There is no such format, or the file may not be written.
    """
    format = path.suffix[1:].lower()
    if format not in FORMATS:
        raise OutputError(
            f"{path} is none of {', '.join(f'.{known}' for known in FORMATS)}.", parameter="figure"
        )
    return write_whole(path, lambda file: write(figure, file, format))


def write(figure: Figure, target: Path | BinaryIO, format: str, dpi: float | None = None) -> None:
    """Write a figure, a PNG with `DPI` by default; the same figure always gives the same bytes."""
    # A little larger, and written much sooner.
    options: dict[str, Any] = {"pil_kwargs": {"compress_level": 3}} if format == "png" else {}
    options |= {"dpi": dpi} if dpi else {}
    with context():
        figure.savefig(target, format=format, metadata=dict(METADATA.get(format, {})), **options)


AxLike: TypeAlias = "Axes | Sequence[Axes] | NDArray[Any]"
"""Where a caller wants panels drawn: one axes or as many as there are panels."""

Cmap: TypeAlias = "str | Colormap"
"""A colour map or its name."""

FigSize: TypeAlias = "tuple[float, float | None]"
"""Inches of width and height; a height of None is what the panels need."""

Entry: TypeAlias = tuple[Artist, str]
"""A mark of a legend and what it says."""


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
    has_bar
        Whether a colour bar will stand beside the panels.
    """

    figure: Figure
    panels: list[Axes]
    columns: int
    is_own: bool
    has_bar: bool = False

    @property
    def title_width(self) -> float:
        """Inches that a panel has for a line over it."""
        return self._width / self.columns - BESIDE * em()

    @property
    def _width(self) -> float:
        return float(self.figure.get_figwidth()) - BESIDE * em() * self.has_bar

    def legend(self, entries: Sequence[Entry]) -> None:
        """Put a legend under the panels, in as many columns as the labels leave room for.

        A label is shown as it is: matplotlib drops one that begins with "_", so it is set afterwards.
        """
        if not entries:
            return
        width = float(self.figure.get_figwidth())
        handles, labels = [handle for handle, _ in entries], _legend_labels(entries, width)
        names = [f"{i}" for i in range(len(labels))]
        if self.is_own:
            columns = _legend_columns(labels, width)
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

    def colour_bar(self, mappable: ScalarMappable, label: str) -> Axis:
        """Put a colour bar beside the panels and return its axis."""
        rows = math.ceil(len(self.panels) / self.columns)
        bar = self.figure.colorbar(mappable, ax=self.panels, label=label, aspect=30 * rows, pad=0.015)
        bar.outline.set_visible(False)
        return bar.ax.yaxis

    def colour_bar_below(self, mappable: ScalarMappable, label: str, panels: Sequence[Axes]) -> None:
        """Put a colour bar of numbers under some of the panels."""
        height = float(self.figure.get_figheight())
        bar = self.figure.colorbar(
            mappable,
            ax=list(panels),
            location="bottom",
            fraction=min(0.15, 0.08 / height),
            aspect=max(5.0, 8 * float(self.figure.get_figwidth()) / self.columns),
            pad=0.01,
        )
        bar.outline.set_visible(False)
        number_axis(bar.ax.xaxis, label)

    def entitle(self, title: Title, heading: str, *sentences: str, of_panels: Sequence[str] = ()) -> None:
        """Give a figure its caption, and over it as much of that as `title` says; empty sentences are left out.

        `of_panels` begin with names, whose letters stay as they are.
        """
        if not self.is_own:
            return
        said = [as_sentence(text) for text in sentences if text] + [
            text.rstrip(".") + "." for text in of_panels
        ]
        if isinstance(self.figure, Drawing):
            self.figure.heading, self.figure.caption = heading, " ".join(said)
        shown: list[str] = {"none": [], "short": [heading], "full": [heading, *said]}[title]
        width = float(self.figure.get_figwidth()) * 0.95
        if lines := [part for line in shown for part in wrapped(line, width)]:
            self.figure.suptitle("\n".join(lines), x=0.01, ha="left")
            self.figure.set_figheight(self.figure.get_figheight() + line_height() * (len(lines) - 1))


def sheet(
    panels: int,
    columns: int = 4,
    *,
    blocks: int = 1,
    panel_height: float,
    legend: Sequence[Entry] = (),
    has_bar: bool = False,
    ax: AxLike | None = None,
    figsize: FigSize | None = None,
) -> Sheet:
    """Return panels to draw on.

    Parameters
    ----------
    panels, columns, blocks
        How many panels, and how many side by side at most: as many as have room; and how many such blocks stand
        one under another.
    panel_height
        Inches of a panel with the text around it, beside text of 8 pt.
    legend, has_bar
        What takes room beside the panels.
    ax
        Draw on these; the figure is the caller's then.
    figsize
        Size of a new figure; by default the width of matplotlib's rcParams where the user has set it, else the style's,
        and less for a single panel.

    Raises
    ------
    ValueError
        `ax` has another number of axes than there are panels.
    """
    if ax is not None:
        given = np.atleast_1d(np.asarray(ax, dtype=object)).ravel().tolist()
        if len(given) != panels * blocks:
            raise ValueError(f"this figure has {panels * blocks} panels, and ax has {len(given)}")
        specification = given[0].get_subplotspec()
        side_by_side = specification.get_gridspec().ncols if specification else 1
        return Sheet(given[0].figure, given, side_by_side, is_own=False)
    default = float(matplotlib.rcParams["figure.figsize"][0])
    width, height = figsize or (default if panels > 1 else min(default, ONE_PANEL * text_size() / 8), None)
    columns = _columns(panels, columns, width - BESIDE * em() * has_bar)
    rows = math.ceil(panels / columns)
    if height is None:
        # Large text makes panels higher.
        height = line_height() * 2 + panel_height * rows * blocks * growth()
        height += line_height() * 1.2 * _legend_rows(legend, width)
    figure = Drawing(figsize=(width, height), layout="constrained")
    made = figure.subplots(rows * blocks, columns, squeeze=False).reshape(blocks, rows * columns)
    for unused in made[:, panels:].ravel():
        unused.remove()
    return Sheet(figure, list(made[:, :panels].ravel()), columns, is_own=True, has_bar=has_bar)


def _columns(panels: int, most: int, width: float) -> int:
    """Return how many panels stand side by side on a figure of that width; rows are as even as may be.

    >>> [_columns(panels, 4, 6.0 * matplotlib.rcParams["font.size"] / 8) for panels in (3, 5, 8)]
    [3, 3, 4]
    """
    most = max(1, min(most, int(width / (PANEL * text_size() / 8))))
    return math.ceil(panels / math.ceil(panels / most))


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


def method_styles(methods: Sequence[str], cmap: str | Colormap | None = None) -> dict[str, MethodStyle]:
    """Return a style for each method; where there are more than colours, some share one but not the marker.

    The colours are those of `cmap`, or of the cycle that the user has set, or `COLOURS`.
    """
    cycle = matplotlib.rcParams["axes.prop_cycle"]
    colours: Sequence[str] = COLOURS
    if cmap is not None:
        chosen = matplotlib.colormaps.get_cmap(cmap)
        places = np.linspace(0, 0.9, len(methods)) if chosen.N > 20 else range(len(methods))
        colours = [to_hex(chosen(place)) for place in places]
    elif cycle != matplotlib.rcParamsDefault["axes.prop_cycle"] and "color" in cycle.keys:
        colours = [to_hex(colour) for colour in cycle.by_key()["color"]]
    count = len(colours)
    return {
        method: MethodStyle(
            colours[i % count],
            MARKERS[(i + i // count) % len(MARKERS)],
            LINES[(i + i // len(MARKERS)) % len(LINES)],
        )
        for i, method in enumerate(methods)
    }


def layer_colours(cmap: str | Colormap | None = None) -> Colormap:
    """Return a caller's or a user's colours, by default viridis without the end that vanishes on the ground."""
    chosen = cmap or matplotlib.rcParams["image.cmap"]
    if chosen != matplotlib.rcParamsDefault["image.cmap"]:
        return matplotlib.colormaps.get_cmap(chosen)
    seen = range(0, 236) if sum(to_rgb(ground())) > 1.5 else range(70, 256)
    return ListedColormap(matplotlib.colormaps["viridis"](seen), name="layers")


def image_colours(cmap: str | Colormap | None = None) -> Colormap:
    """Return a caller's or a user's colours of cells, by default viridis."""
    return matplotlib.colormaps.get_cmap(cmap or matplotlib.rcParams["image.cmap"])


def fitted(names: Sequence[str], inches: float) -> list[str]:
    """Return every name on one line of that width, different ones different."""
    width = max(map(len, names), default=0)
    while True:
        labels = told_apart(names, width)
        longest = max(map(text_width, labels), default=0.0)
        if longest <= inches or width <= 4:
            return labels
        width = max(4, min(width - 1, int(width * inches / longest)))


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


class Ticks(Locator):
    """The first of several locators whose labels have room beside one another, whatever the panel's size will be.

    Where those of none have, one tick.
    """

    def __init__(self, *locators: Locator) -> None:
        self._locators = locators
        self._font = FontProperties()

    def set_axis(self, axis: Any) -> None:
        """Take the axis that this is of."""
        super().set_axis(axis)
        for locator in self._locators:
            locator.set_axis(axis)

    def __call__(self) -> Sequence[float]:
        """Return the places of the ticks."""
        assert self.axis is not None
        return self.tick_values(*self.axis.get_view_interval())

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        """Return the places of the ticks between two values."""
        low, high = sorted((vmin, vmax))
        single: list[float] = []
        for locator in self._locators:
            ticks = np.asarray(locator.tick_values(vmin, vmax))
            ticks = ticks[(ticks >= low) & (ticks <= high)]
            if len(ticks) > 1 and self._have_room(ticks, low, high):
                return list(map(float, ticks))
            single = single or list(map(float, ticks[len(ticks) // 2 :][:1]))
        return single

    def _have_room(self, ticks: NDArray[Any], low: float, high: float) -> bool:
        axis: Any = self.axis
        em = self._font.get_size() / 72
        is_x = axis.axis_name == "x"
        inches = (axis.axes.bbox.width if is_x else axis.axes.bbox.height) / axis.axes.figure.dpi
        labels = axis.get_major_formatter().format_ticks(ticks)
        needed = np.array(
            [text_width(label, self._font) + 0.6 * em if is_x else 1.15 * em for label in labels]
        )
        places = axis.get_transform().transform(np.array([low, *ticks, high]))
        apart = np.abs(np.diff(places[1:-1]) / (places[-1] - places[0])) * inches
        return bool((apart >= (needed[:-1] + needed[1:]) / 2).all())


def number_axis(axis: Axis, name: str, ticks: int = 5) -> None:
    """Give an axis of ΔM or ΔD its name and ticks that are legible from 1e-12 to 1.

    A linear axis counts in a power of ten that its name tells, "ΔD (10⁻⁶)". The limits must be set.
    """
    low, high = sorted(axis.get_view_interval())
    if axis.get_scale() == "log":
        fine = [LogLocator(subs=subs) for subs in ((1, 2, 5), (1, 3))] if high < 100 * low else []
        decades = [LogLocator(numticks=most) for most in range(ticks + 1, 1, -1)]
        narrow = _linear(ticks) if high < 6 * low else []
        axis.set_major_locator(Ticks(*narrow, *fine, *decades))
        axis.set_major_formatter(FuncFormatter(lambda value, _: decade_label(value)))
        axis.set_minor_formatter(NullFormatter())
    else:
        largest = max(abs(low), abs(high))
        exponent = math.floor(math.log10(largest)) if largest else 0
        if -2 <= exponent <= 3:
            exponent = 0
        axis.set_major_locator(Ticks(*_linear(ticks)))
        axis.set_major_formatter(PowerFormatter(exponent))
        name += f"  ({power_of_ten(exponent)})" if exponent else ""
    axis.set_label_text(name)


def _linear(most: int) -> list[Locator]:
    usual, any_digit = [1, 2, 2.5, 5, 10], [1, 2, 2.5, 3, 4, 5, 6, 8, 10]
    tried = [*((count, usual) for count in range(most, 1, -1)), *((count, any_digit) for count in (3, 2, 1))]
    return [MaxNLocator(count, steps=steps, min_n_ticks=1) for count, steps in tried]


def decade_label(value: float) -> str:
    """Return "10⁻⁶" or "5×10⁻⁶"."""
    exponent = math.floor(math.log10(value) + 1e-9)
    mantissa = f"{value / 10.0**exponent:.3g}"
    return (f"{mantissa}×" if mantissa != "1" else "") + power_of_ten(exponent)


def integer_axis(axis: Axis, ticks: int = 8) -> None:
    """Give an axis of layers or steps whole numbers."""
    counts = range(ticks, 0, -1)
    axis.set_major_locator(
        Ticks(*(MaxNLocator(n, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1) for n in counts))
    )


def step_axis(axis: Axis, steps: Iterable[int]) -> None:
    """Give an axis of steps ticks at the steps themselves where they are few, else at round ones."""
    known = sorted({int(step) for step in steps})
    if 0 < len(known) <= 5:
        round_ones = (
            MaxNLocator(n, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1) for n in range(5, 0, -1)
        )
        axis.set_major_locator(Ticks(FixedLocator(known), *round_ones))
    else:
        integer_axis(axis, ticks=6)


def _legend_labels(entries: Sequence[Entry], width: float) -> list[str]:
    return fitted([label for _, label in entries], min(4.0, width - 5 * em()))


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """Return how many columns of a legend have room on a figure of that width; columns are filled one by one."""
    widths = np.array([text_width(label) for label in labels])
    return next(
        columns
        for columns in range(len(labels), 0, -1)
        if columns == 1
        or sum(part.max() for part in np.array_split(widths, columns)) + (3.7 * columns) * em() <= width
    )


def _legend_rows(entries: Sequence[Entry], width: float) -> int:
    """Return how many rows a legend has on a figure of that width."""
    if not entries:
        return 0
    return math.ceil(len(entries) / _legend_columns(_legend_labels(entries, width), width))


def listed(*texts: str) -> str:
    """Return the texts with commas between them; empty ones are left out."""
    return ", ".join(filter(None, texts))


def message(axes: Axes, text: str) -> None:
    """Say in an empty panel why it is empty."""
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color=quiet())

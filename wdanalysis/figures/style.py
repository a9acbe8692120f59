"""How figures look: sizes, colours, markers and text, on a page 7 inches wide, for colour-blind eyes too."""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

WIDTH = 7.0
"""Inches: the text width of a two-column paper."""

CHARACTERS = 16
"""That many characters of text go on an inch."""

DPI = 200

RC: Mapping[str, Any] = MappingProxyType(
    {
        "font.size": 8,
        "axes.titlesize": 8,
        "axes.labelsize": 8,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8,
        "legend.title_fontsize": 8,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e4e4e4",
        "grid.linewidth": 0.5,
        "lines.linewidth": 1.3,
        "lines.markersize": 4,
        "legend.frameon": False,
        "text.parse_math": False,  # a "$" in a method's name is a dollar
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "wdanalysis",  # the same figure is the same file
        "pdf.fonttype": 42,
    }
)

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
    """A figure that a Jupyter cell shows by itself, with no backend chosen."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        picture = io.BytesIO()
        write(self, picture, "png")
        width, height = (round(100 * inches) for inches in self.get_size_inches())
        return picture.getvalue(), {"width": width, "height": height}


def context() -> AbstractContextManager[None]:
    """Return the context in which figures are drawn and written: matplotlib's defaults with `RC`."""
    return matplotlib.style.context(["default", dict(RC)])


def new_figure(height: float, width: float = WIDTH) -> Drawing:
    """Return an empty figure of a size in inches whose parts find their own room."""
    return Drawing(figsize=(width, height), layout="constrained")


def write(figure: Figure, target: Path | io.BytesIO, format: str, dpi: float | None = None) -> None:
    """Write a figure, a PNG with `DPI` by default; the same figure always gives the same bytes."""
    # A little larger, and written much sooner.
    quick: dict[str, Any] = {"pil_kwargs": {"compress_level": 3}} if format == "png" else {}
    with context():
        figure.savefig(
            target, format=format, dpi=dpi or DPI, metadata=dict(METADATA.get(format, {})), **quick
        )


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


def layer_colours() -> Colormap:
    """Return viridis without its palest end, which vanishes on white."""
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
    axis.set_tick_params(labelsize=RC["font.size"])


def decade_label(value: float) -> str:
    """Return "10⁻⁶" or "5×10⁻⁶"."""
    mantissa, exponent = f"{value:.0e}".split("e")
    return (f"{mantissa}×" if mantissa != "1" else "") + power_of_ten(int(exponent))


def integer_axis(axis: Axis, ticks: int = 8) -> None:
    """Give an axis of layers or steps whole numbers."""
    axis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axis.set_tick_params(labelsize=RC["font.size"])


def legend(
    figure: Figure, handles: Sequence[Artist], labels: Sequence[str], *, title: str | None = None
) -> None:
    """Put a legend under the panels, in as many columns as the labels leave room for.

    A label is shown as it is: matplotlib drops one that begins with "_", so it is set afterwards.
    """
    if not handles:
        return
    labels = told_apart(labels, 40)
    rows = _legend_rows(labels, figure.get_figwidth())
    columns = math.ceil(len(labels) / rows)
    box = figure.legend(
        handles, [f"{i}" for i in range(len(labels))], loc="outside lower center", ncols=columns, title=title
    )
    for text, label in zip(box.get_texts(), labels, strict=True):
        text.set_text(label)


def _legend_rows(labels: Sequence[str], width: float) -> int:
    """Return how many rows a legend has on a figure of that width."""
    per_row = int(CHARACTERS * width) // (max(map(len, labels)) + 9)
    return math.ceil(len(labels) / max(1, per_row))


def height_of_legend(labels: Sequence[str], width: float) -> float:
    """Return the inches that a legend takes on a figure of that width."""
    return 0.1 + 0.18 * _legend_rows(told_apart(labels, 40), width) if labels else 0.0


LONGEST_LINE = 300
"""Longer lines of a heading are cut."""


def title(figure: Figure, *lines: str) -> None:
    """Head a figure with what it shows and what a reader must know of it; empty lines are left out."""
    width = int(CHARACTERS * figure.get_figwidth())
    wrapped = [part for line in lines for part in textwrap.wrap(shortened(line, LONGEST_LINE), width)]
    figure.suptitle("\n".join(wrapped), x=0.01, ha="left", fontsize=RC["font.size"])


def height_of(lines: Iterable[str], width: float) -> float:
    """Return the inches that lines of a heading take on a figure of that width."""
    characters = int(CHARACTERS * width)
    return 0.135 * sum(len(textwrap.wrap(line, characters)) for line in lines)


def listed(*texts: str) -> str:
    """Return the texts with commas between them; empty ones are left out."""
    return ", ".join(filter(None, texts))


def message(axes: Axes, text: str) -> None:
    """Say in an empty panel why it is empty."""
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color=QUIET)


def grid(panels: int) -> tuple[int, int]:
    """Return rows and columns for a number of panels, at most three side by side."""
    columns = 2 if panels == 4 else min(panels, 3)
    return math.ceil(panels / columns), columns

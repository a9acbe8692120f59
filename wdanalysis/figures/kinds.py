"""The kinds of figures, of quantities on a scatter and of files that there are, without importing what draws them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

from wdanalysis.errors import OutputError


@dataclass(frozen=True)
class Kind:
    """What a kind of figure is drawn from.

    Attributes
    ----------
    of
        The column of which every value gets a figure; "" where one figure shows all.
    table
        Name of the table that the figure shows; where that is missing or empty there are no figures of the kind.
    beside
        Names of tables that it takes by keyword, where they are there.
    takes
        Which choices of a `Look` it has arguments for.
    """

    of: str
    table: str = "metrics"
    beside: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "scatter": Kind(
            "module", beside=("correlations", "readings"), takes=("x", "y", "step", "share_axes", "log")
        ),
        "layers": Kind("module", takes=("step", "log")),
        "trajectory": Kind("module", takes=("log",)),
        "heatmap": Kind("", takes=("step", "log")),
        "figure2": Kind("", beside=("correlations", "readings"), takes=("step", "share_axes", "log")),
        "figure8": Kind("", takes=("step", "log")),
        "prediction": Kind("module", table="predictions"),
        "steps": Kind("module", table="step_choices", beside=("correlations",)),
        "density": Kind("module", table="vectors", beside=("metrics",), takes=("step",)),
    }
)
"""Each kind of figure, a function of `wdanalysis.figures`."""


@dataclass(frozen=True)
class Quantity:
    """A column of the metrics table that an axis may show.

    Attributes
    ----------
    name
        What sentences call it.
    label
        What its axis says, with the unit.
    diagnostic
        Whether the column is empty without diagnostics.
    """

    name: str
    label: str
    diagnostic: bool = False


QUANTITIES: Mapping[str, Quantity] = MappingProxyType(
    {
        "delta_m": Quantity("ΔM", "ΔM"),
        "delta_d": Quantity("ΔD", "ΔD"),
        "delta_m_signed": Quantity("signed ΔM", "signed ΔM, mean of m − m₀"),
        "rel_delta_m": Quantity("ΔM/m₀", "ΔM/m₀"),
        "mean_angle": Quantity("the mean angle", "mean angle, degrees", diagnostic=True),
        "matrix_delta_m": Quantity("|‖W‖ − ‖W₀‖|", "|‖W‖ − ‖W₀‖|", diagnostic=True),
        "matrix_delta_d": Quantity("1 − cos(W, W₀)", "1 − cos(W, W₀)", diagnostic=True),
    }
)
"""What a scatter can show on either axis, by column. `matrix_…` take the whole matrix as one vector."""

PAPER_X, PAPER_Y = "delta_d", "delta_m"
"""The axes of the paper's Figures 2 and 7."""

Format: TypeAlias = Literal["png", "pdf", "svg"]
StyleName: TypeAlias = Literal["paper", "talk", "screen"]
Title: TypeAlias = Literal["none", "short", "full"]
"""What stands over a figure: nothing; what it shows, in a few words; or all that `captions.md` says of it."""

FORMATS: tuple[str, ...] = get_args(Format)
STYLES: tuple[str, ...] = get_args(StyleName)
TITLES: tuple[str, ...] = get_args(Title)


@dataclass(frozen=True)
class Look:
    """How a set of figures is drawn; None leaves a choice to the figure.

    Attributes
    ----------
    format
        ``png``, ``pdf`` or ``svg``.
    style
        ``paper`` (8 pt, 6.75 inches), ``talk`` (14 pt, 10 inches) or ``screen`` (10 pt, 9 inches).
    width
        Inches, in place of the style's.
    dpi
        Pixels per inch of a PNG; 200 by default.
    font
        A font family that is installed; where it lacks a character, matplotlib's own font has it.
    title
        What stands over a figure.
    x, y
        What the scatter shows, of `QUANTITIES`.
    step
        The step that figures of one step show; each method's last by default.
    share_axes
        Whether the panels of a figure have the same axes; by default where that leaves each panel's points room.
    log
        Whether the axes of ΔM and ΔD are logarithmic; by default where linear ones would squash a method.

    Raises
    ------
    OutputError
        There is no such format, style, title or quantity, or a size is no positive number.

    Examples
    --------
    >>> Look(style="talk", title="none").format
    'png'
    """

    format: str = "png"
    style: str = "paper"
    width: float | None = None
    dpi: float | None = None
    font: str | None = None
    title: str = "short"
    x: str = PAPER_X
    y: str = PAPER_Y
    step: int | None = None
    share_axes: bool | None = None
    log: bool | None = None

    def __post_init__(self) -> None:
        chosen = [
            *(("format", FORMATS), ("style", STYLES), ("title", TITLES)),
            *(("x", tuple(QUANTITIES)), ("y", tuple(QUANTITIES))),
        ]
        for name, choices in chosen:
            if (choice := getattr(self, name)) not in choices:
                raise OutputError(
                    f"there is no {name} {choice!r}; choose of {', '.join(choices)}.", parameter=name
                )
        for name, (least, most) in {"width": (1.5, 60.0), "dpi": (10.0, 2400.0)}.items():
            size = getattr(self, name)
            if size is not None and not least <= size <= most:
                raise OutputError(
                    f"a {name} of {size:g} is not between {least:g} and {most:g}.", parameter=name
                )

"""The kinds of figures, of quantities on a scatter and of files that there are, without importing what draws them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Kind:
    """What a kind of figure is drawn from.

    Attributes
    ----------
    of
        The column of which every value gets a figure.
    table
        Name of the table that the figure shows; where that is missing or empty there are no figures of the kind.
    beside
        Names of tables that it takes by keyword, where they are there.
    """

    of: str
    table: str = "metrics"
    beside: tuple[str, ...] = ()


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "scatter": Kind("module", beside=("correlations", "readings")),
        "layers": Kind("module"),
        "trajectory": Kind("module"),
        "heatmap": Kind("method"),
        "prediction": Kind("module", table="predictions"),
        "steps": Kind("module", table="step_choices", beside=("correlations",)),
        "density": Kind("module", table="vectors", beside=("metrics",)),
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

FORMATS = ("png", "pdf", "svg")

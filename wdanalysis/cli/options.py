"""Option values as the user writes them."""

from __future__ import annotations

import math
import os
import re
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from wdanalysis.figures.kinds import KINDS, QUANTITIES

if TYPE_CHECKING:
    from wdanalysis.measure.geometry import GeometryOptions

OPTION_NAMES = {
    "applied_as": "as",
    "directory": "out",
    "learning_rate": "lr",
    "live_every": "live",
    "methods": "method",
}
"""Options that are not called as the parameter that they set."""


def option_name(parameter: str) -> str:
    """Name the option that sets a parameter of the Python functions.

    >>> option_name("learning_rate"), option_name("max_length")
    ('--lr', '--max-length')
    """
    return f"--{OPTION_NAMES.get(parameter, parameter.replace('_', '-'))}"


Format = Literal["png", "pdf", "svg"]
"""How figures are stored."""

HIGHEST_LAYER = 100_000


def layer_numbers(text: str | None) -> list[int] | None:
    """Read ``0-11,20`` as the layers that it means."""
    if text is None:
        return None
    found: list[int] = []
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", piece)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise typer.BadParameter(
                f"{piece.strip()!r} is neither a number nor a range such as 0-11", param_hint="--layers"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last > HIGHEST_LAYER:
            raise typer.BadParameter(f"no model has a layer {last}", param_hint="--layers")
        found.extend(range(first, last + 1))
    return found


def step_numbers(text: str | None) -> list[int] | None:
    """Read ``500,1000`` as steps."""
    if text is None:
        return None
    pieces = [piece.strip() for piece in text.split(",")]
    if wrong := [piece for piece in pieces if not piece.isdecimal()]:
        raise typer.BadParameter(f"{wrong[0]!r} is not a step such as 500", param_hint="--steps")
    return [int(piece) for piece in pieces]


def positive(value: float | None) -> float | None:
    """Refuse what is no positive number."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise typer.BadParameter(f"{value} is not a positive number")
    return value


Alpha = Annotated[
    float | None,
    typer.Option(
        callback=positive,
        help="LoRA's α, for an adapter file without its adapter_config.json.",
        show_default="from the config",
    ),
]
DoraAxis = Annotated[
    Literal["out", "in"] | None,
    typer.Option(
        help="What a magnitude of an adapter belongs to, where its file does not tell.",
        show_default="from the file",
    ),
]
AppliedAs = Annotated[
    Literal["comfyui", "peft", "lycoris"] | None,
    typer.Option(
        "--as",
        help="Also measure the weight that this loader makes of an adapter's magnitudes, from the base and from the "
        "intended one.",
        show_default="no loader's",
    ),
]
MergeStacks = Annotated[
    bool,
    typer.Option(
        "--merge-stacks", help="Take encoder, decoder and cross-attention together: one q for all of them."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]


Figures = Annotated[
    str, typer.Option(metavar="KINDS", help=f"Of {', '.join(KINDS)}, with commas; all; none.")
]


def quantity(column: str) -> str:
    """Refuse what is no quantity for an axis of the scatter."""
    if column not in QUANTITIES:
        raise typer.BadParameter(f"{column!r} is not one of {', '.join(QUANTITIES)}")
    return column


X = Annotated[
    str,
    typer.Option(
        callback=quantity,
        metavar="COLUMN",
        help=f"What the scatter shows along x: of {', '.join(QUANTITIES)}.",
    ),
]
Y = Annotated[str, typer.Option(callback=quantity, metavar="COLUMN", help="The same along y.")]


GeometryText = Annotated[
    str | None,
    typer.Option(
        metavar="NAME=VALUE,…",
        help="--geometry with other numbers: k dimensions of the top subspaces, the share of elements that are the "
        "largest, directions compared between steps, values in the tail of Hill's index.",
        show_default="k=512 or half the side, share=0.3, directions=8, tail=half the values",
    ),
]


def geometry(text: str) -> GeometryOptions:
    """Read ``k=256,share=0.5``."""
    from wdanalysis.measure.geometry import GeometryOptions

    kinds = {"k": int, "share": float, "directions": int, "tail": int}
    chosen: dict[str, float] = {}
    for piece in text.split(","):
        name, _, value = (part.strip() for part in piece.partition("="))
        if name not in kinds:
            raise typer.BadParameter(
                f"{piece.strip()!r} is none of {', '.join(f'{known}=…' for known in kinds)}",
                param_hint="--geometry-with",
            )
        try:
            chosen[name] = kinds[name](value)
        except ValueError:
            raise typer.BadParameter(
                f"{name} is a number, not {value!r}", param_hint="--geometry-with"
            ) from None
    try:
        return GeometryOptions(**chosen)  # type: ignore[arg-type]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--geometry-with") from None


def figure_kinds(text: str) -> list[str]:
    """Read ``scatter,layers``, ``all`` or ``none``."""
    if text in ("all", "none"):
        return list(KINDS) if text == "all" else []
    kinds = [kind.strip() for kind in text.split(",")]
    for kind in kinds:
        if kind not in KINDS:
            choices = ", ".join(KINDS)
            raise typer.BadParameter(f"{kind!r} is not one of {choices}, all, none", param_hint="--figures")
    return kinds


def labelled(tuned: list[str], labels: list[str]) -> list[tuple[str | None, str]]:
    """Give each tuned path its label; a label for a path that is not among them adds it."""
    paths = {os.path.normpath(path): path for path in tuned}
    names: dict[str, str] = {}
    for label in labels:
        name, equals, path = label.partition("=")
        if not (name and equals and path):
            raise typer.BadParameter(f"{label!r} is not of the form NAME=PATH", param_hint="--label")
        place = os.path.normpath(path)
        if place in names:
            raise typer.BadParameter(
                f"{path} has two labels: {names[place]} and {name}", param_hint="--label"
            )
        names[place] = name
        paths.setdefault(place, path)
    return [(names.get(place), path) for place, path in paths.items()]

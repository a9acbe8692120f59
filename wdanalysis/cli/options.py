"""Option values as the user writes them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from wdanalysis.measure.geometry import GeometryOptions

SUBJECT, NUMBERS, PREDICTIONS, FIGURES, OUTPUT = (
    "What to compare",
    "Numbers",
    "Predictions from the learning rate",
    "Figures",
    "Output",
)
"""The headings under which options are listed."""

OPTION_NAMES = {
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


def one_of(choices: Sequence[str]) -> Callable[[str | None], str | None]:
    """Refuse what is none of the choices."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in choices:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}")
        return value

    return check


def several_of(
    choices: Callable[[], Iterable[str]], *, separator: str | None = ","
) -> Callable[[str], list[str]]:
    """Let the shell complete words, also behind others and a separator: ``q,`` to ``q,k`` or ``q,v``.

    Parameters
    ----------
    choices
        Called when the shell asks.
    separator
        None: there is one word.
    """

    def complete(incomplete: str) -> list[str]:
        before, comma, begun = incomplete.rpartition(separator) if separator else ("", "", incomplete)
        there = before.split(separator)
        return [
            f"{before}{comma}{word}" for word in choices() if word.startswith(begun) and word not in there
        ]

    return complete


def _roles() -> list[str]:
    """What `--modules` knows by a name."""
    from wdanalysis.checkpoints.architectures import LAYER_ROLES, MODEL_ROLES

    return [*dict.fromkeys(role for role, _ in (*LAYER_ROLES, *MODEL_ROLES)), "all"]


complete_roles = several_of(_roles)


def alpha(panel: str | None = None) -> Any:
    """Give the option `--alpha`, under a heading."""
    return typer.Option(
        callback=positive,
        metavar="α",
        help="LoRA's, for an adapter file without its adapter_config.json.",
        show_default="from the config",
        rich_help_panel=panel,
    )


def quiet(panel: str | None = None) -> Any:
    """Give the option `--quiet`, under a heading."""
    return typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=panel)


def merge_stacks(panel: str) -> Any:
    """Give the option `--merge-stacks`, under a heading."""
    return typer.Option(
        "--merge-stacks",
        help="Take encoder, decoder and cross-attention together: one q for all.",
        rich_help_panel=panel,
    )


GeometryText = Annotated[
    str | None,
    typer.Option(
        metavar="NAME=VALUE,…",
        help="--geometry with other numbers: k, dimensions of the top subspaces (512, or half the side); rank of the "
        "principal part (64); share of elements in its mask (0.3); directions compared between steps (16); tail, "
        "values of Hill's index (half of all).",
        show_default=False,
        rich_help_panel=NUMBERS,
    ),
]


def geometry(text: str) -> GeometryOptions:
    """Read ``k=256,share=0.5``."""
    from wdanalysis.measure.geometry import GeometryOptions

    kinds = {"k": int, "rank": int, "share": float, "directions": int, "tail": int}
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

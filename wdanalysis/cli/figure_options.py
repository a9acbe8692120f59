"""The options that say which figures are drawn, and how: one declaration for every command that draws."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any

import typer

from wdanalysis.cli.options import FIGURES, one_of, option_name, several_of
from wdanalysis.errors import OutputError
from wdanalysis.figures.kinds import KINDS, PAPER_X, PAPER_Y, QUANTITIES, Format, Look, StyleName, Title

ALL, NONE = "all", "none"


@dataclass(frozen=True)
class FigureChoice:
    """What was said of figures: which kinds of them, and their look; None where nothing was said."""

    kinds: list[str] | None
    look: Look | None


def with_figure_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes a `FigureChoice` as `drawn` the options that make one, where that stands."""

    @functools.wraps(command)
    def run(**options: Any) -> None:
        given = {name: value for name in OPTIONS if (value := options.pop(name)) is not None}
        command(**options, drawn=_choice(given.pop("figures", None), given))

    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        parameters.extend(_parameters() if parameter.name == "drawn" else [parameter])
    made: Any = run
    made.__signature__ = signature.replace(parameters=parameters)
    return run


def _option(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=FIGURES, **settings)


_quantities = tuple(QUANTITIES)

OPTIONS: Mapping[str, Any] = MappingProxyType(
    {
        "figures": Annotated[
            str | None,
            _option(
                metavar="KINDS",
                help=f"{', '.join(KINDS)}: some of them, with commas; all; none.",
                show_default=ALL,
                autocompletion=several_of(lambda: [*KINDS, ALL, NONE]),
            ),
        ],
        "format": Annotated[Format | None, _option(help="Of the files.", show_default="png")],
        "title": Annotated[
            Title | None,
            _option(help="What stands over a figure; full: its caption, too.", show_default="short"),
        ],
        "style": Annotated[
            StyleName | None, _option(help="Sizes of text and figures.", show_default="paper")
        ],
        "width": Annotated[
            float | None, _option(metavar="INCHES", help="Of a figure.", show_default="the style's")
        ],
        "dpi": Annotated[float | None, _option(metavar="N", help="Pixels an inch.", show_default="200")],
        "font": Annotated[
            str | None, _option(metavar="NAME", help="A font that is installed.", show_default=False)
        ],
        "x": Annotated[
            str | None,
            _option(
                metavar="COLUMN",
                help=f"The scatter's x: {', '.join(_quantities)}.",
                show_default=PAPER_X,
                callback=one_of(_quantities),
                autocompletion=several_of(lambda: _quantities, separator=None),
            ),
        ],
        "y": Annotated[
            str | None,
            _option(
                metavar="COLUMN",
                help="Its y: the same.",
                show_default=PAPER_Y,
                callback=one_of(_quantities),
                autocompletion=several_of(lambda: _quantities, separator=None),
            ),
        ],
        "step": Annotated[
            int | None,
            _option(metavar="N", help="What figures of one step show.", show_default="each method's last"),
        ],
        "share_axes": Annotated[
            bool | None,
            _option(
                "--share-axes/--free-axes",
                help="One scale for a figure's panels, or its own for each.",
                show_default="shared where points keep room",
            ),
        ],
        "log": Annotated[
            bool | None,
            _option(
                "--log/--linear", help="Axes of ΔM and ΔD.", show_default="log where linear squashes a method"
            ),
        ],
    }
)
"""Every option by the parameter of `Look` that it sets, and `figures`."""


def _parameters() -> list[inspect.Parameter]:
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)
        for name, option in OPTIONS.items()
    ]


def _choice(kinds: str | None, given: Mapping[str, Any]) -> FigureChoice:
    """What the options say; those that nothing that is drawn takes are wrong usage."""
    chosen = None if kinds is None else figure_kinds(kinds)
    for name in given:
        if objection := _objection(name, list(KINDS) if chosen is None else chosen):
            raise typer.BadParameter(objection, param_hint=_spelt(name))
    try:
        return FigureChoice(chosen, Look(**given) if given else None)
    except OutputError as error:
        raise typer.BadParameter(str(error), param_hint=_spelt(error.parameter or "figures")) from None


def _objection(name: str, kinds: list[str]) -> str | None:
    """Why an option means nothing beside the others."""
    takers = [kind for kind, of_kind in KINDS.items() if name in of_kind.takes]
    if not kinds:
        return "no figures are drawn (--figures none)"
    if takers and not set(takers) & set(kinds):
        return f"it is for {', '.join(takers)}, and --figures has {', '.join(kinds)}"
    return None


def _spelt(name: str) -> str:
    return {"share_axes": "--share-axes/--free-axes", "log": "--log/--linear"}.get(name, option_name(name))


def figure_kinds(text: str) -> list[str]:
    """Read ``scatter,layers``, ``all`` or ``none``."""
    if text in (ALL, NONE):
        return list(KINDS) if text == ALL else []
    kinds = [kind.strip() for kind in text.split(",")]
    for kind in kinds:
        if kind not in KINDS:
            choices = ", ".join([*KINDS, ALL, NONE])
            raise typer.BadParameter(f"{kind!r} is not one of {choices}", param_hint="--figures")
    return kinds

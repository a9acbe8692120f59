"""The options of `train` that set fields of a plan, made of what the fields say of themselves."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, get_args

import typer

from wdanalysis.cli.options import complete_roles, option_name, several_of
from wdanalysis.training.methods import METHODS
from wdanalysis.training.run.plan import PANELS, PlanField, plan_fields

COMPLETIONS: Mapping[str, Callable[[str], list[str]]] = MappingProxyType(
    {
        "methods": several_of(lambda: METHODS),
        "targets": complete_roles,
        "magnitude_targets": complete_roles,
    }
)
"""What a shell completes where the type does not say so."""


def with_plan_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `**given` an option for each field of a plan; each heading lists them first."""
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "given"]
    of_plan = [_parameter(field) for field in plan_fields().values() if field.setting.panel]
    made: Any = command
    made.__signature__ = signature.replace(parameters=sorted([*of_plan, *own], key=_panel))
    return command


def given_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was given of the options, as fields of a plan."""
    found = {}
    for name, value in options.items():
        if value is None or value is False or value == []:
            continue
        if plan_fields()[name].kind == tuple[str, ...]:
            found[name] = tuple(part.strip() for part in value.split(","))
        else:
            found[name] = tuple(value) if isinstance(value, list) else value
    return found


def _panel(parameter: inspect.Parameter) -> int:
    return PANELS.index(get_args(parameter.annotation)[1].rich_help_panel)


def _parameter(field: PlanField) -> inspect.Parameter:
    setting = field.setting
    kind = _kind(field)
    more = " May be repeated." if kind == list[Path] | None else ""
    option = typer.Option(
        option_name(field.name),
        help=_with_options(setting.help) + more,
        metavar=_metavar(field),
        callback=_checked(field) if setting.bounds else None,
        show_default=_with_options(setting.otherwise or _text(field.default)) or False,
        rich_help_panel=setting.panel,
        autocompletion=COMPLETIONS.get(field.name),
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=False if kind is bool else None,
        annotation=Annotated[kind, option],
    )


def _kind(field: PlanField) -> Any:
    """What the option holds: a switch, paths, a text (several names stand in one, with commas), or the field's own."""
    parts = (field.kind, *get_args(field.kind))
    if field.kind is bool:
        return bool
    if Path in parts:
        return list[Path] | None
    return str | None if str in parts else field.kind | None


def _metavar(field: PlanField) -> str | None:
    if not field.setting.bounds:
        return field.setting.written
    number = "int" if int in (field.kind, *get_args(field.kind)) else "float"
    return f"<{number}> [{field.setting.bounds}]"


def _text(default: Any) -> str:
    if isinstance(default, tuple):
        return ",".join(default)
    if default is None or isinstance(default, bool):
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default)


def _with_options(text: str) -> str:
    """The text with the option of each setting that it names in backticks."""
    return re.sub(r"`(\w+)`", lambda name: option_name(name[1]), text)


def _checked(field: PlanField) -> Callable[[float | None], float | None]:
    def check(value: float | None) -> float | None:
        if value is not None and (objection := field.setting.objection(value)):
            raise typer.BadParameter(objection)
        return value

    return check

"""Option values as the user writes them."""

from __future__ import annotations

import re
from enum import StrEnum

import typer


class AxisChoice(StrEnum):
    """What a vector is."""

    OUT = "out"
    IN = "in"


class Device(StrEnum):
    """Where the sums are taken."""

    AUTO = "auto"
    CPU = "cpu"


class Format(StrEnum):
    """How figures are stored."""

    PNG = "png"
    PDF = "pdf"
    SVG = "svg"


def numbers(text: str | None, option: str) -> list[int] | None:
    """Read ``0-11,20`` as the numbers that it means."""
    if text is None:
        return None
    found: list[int] = []
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", piece)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise typer.BadParameter(
                f"{piece.strip()!r} is neither a number nor a range such as 0-11", param_hint=option
            )
        found.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return found


def figure_kinds(text: str) -> list[str]:
    """Read ``scatter,layers``, ``all`` or ``none``."""
    from wdanalysis.results import FIGURE_KINDS

    if text in ("all", "none"):
        return list(FIGURE_KINDS) if text == "all" else []
    kinds = [kind.strip() for kind in text.split(",")]
    for kind in kinds:
        if kind not in FIGURE_KINDS:
            choices = ", ".join(FIGURE_KINDS)
            raise typer.BadParameter(f"{kind!r} is not one of {choices}, all, none", param_hint="--figures")
    return kinds


def labelled(tuned: list[str], labels: list[str]) -> list[tuple[str | None, str]]:
    """Give each tuned path its label; a label for a path that is not among them adds it."""
    named: dict[str, str | None] = dict.fromkeys(map(_plain, tuned))
    paths = {_plain(path): path for path in tuned}
    for label in labels:
        name, equals, path = label.partition("=")
        if not (name and equals and path):
            raise typer.BadParameter(f"{label!r} is not of the form NAME=PATH", param_hint="--label")
        named[_plain(path)] = name
        paths.setdefault(_plain(path), path)
    return [(name, paths[path]) for path, name in named.items()]


def _plain(path: str) -> str:
    return path.rstrip("/") or path

"""Writes the command reference from the command itself, when mkdocs builds the pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from wdanalysis.cli import app

PLACE = "<!-- reference -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the reference where a page asks for it (a hook of mkdocs)."""
    return markdown.replace(PLACE, reference()) if PLACE in markdown else markdown


def reference() -> str:
    """Every command with its arguments, options and defaults, as Markdown."""
    group: Any = typer.main.get_command(app)
    return "\n".join(line for name, command in group.commands.items() for line in _section(name, command))


def _section(name: str, command: Any) -> Iterator[str]:
    context = command.context_class(command, info_name=f"wd-analyze {name}")
    yield from (f"## wd-analyze {name}", "", command.help or "", "", "| | |", "|---|---|")
    for parameter in command.params:
        spelt, meaning = (text.replace("|", "\\|") for text in parameter.get_help_record(context))
        yield f"| `{spelt}` | {meaning} |"
    yield ""

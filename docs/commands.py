"""Writes the command reference from the command itself, when mkdocs builds the pages."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import typer

from wdanalysis.cli import app

PLACE = "<!-- reference -->"

NOTE = re.compile(r"\s*\[(?:default: )?(?P<value>.*)\]$")
"""What stands behind an option's meaning: its default, and which numbers it may be."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the reference where a page asks for it (a hook of mkdocs)."""
    return markdown.replace(PLACE, reference()) if PLACE in markdown else markdown


def reference() -> str:
    """Every command with its arguments, options and defaults under their headings, as Markdown."""
    group: Any = typer.main.get_command(app)
    return "\n".join(line for name, command in group.commands.items() for line in _section(name, command))


def _section(name: str, command: Any) -> Iterator[str]:
    text, _, example = (command.help or "").partition("Example: ")
    yield from (f"## wd-analyze {name}", "", text.strip(), "")
    if example:
        yield from ("```bash", example.strip(), "```", "")
    context = command.context_class(command, info_name=f"wd-analyze {name}")
    for heading, parameters in groupby(command.params, key=_heading):
        yield from (f"**{heading}**", "", "| | | |", "|---|---|---|")
        for parameter in parameters:
            yield _row(*parameter.get_help_record(context))
        yield ""


def _heading(parameter: Any) -> str:
    other = "Arguments" if parameter.param_type_name == "argument" else "Options"
    return parameter.rich_help_panel or other


def _row(spelt: str, meaning: str) -> str:
    """One parameter: how it is written, what it means, its default."""
    note = NOTE.search(meaning)
    default = re.sub(r"^\((.*)\)(?=$|; )", r"\1", note["value"]) if note else ""
    cells = (f"<code>{_cell(spelt)}</code>", _cell(NOTE.sub("", meaning)), _cell(default))
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Text that neither a table nor HTML nor Markdown takes for its own."""
    return re.sub(r"[|*_`]", lambda found: f"&#{ord(found[0])};", html.escape(text, quote=False))

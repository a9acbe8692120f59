"""The command reference of the documentation, as Markdown makes HTML of it."""

from __future__ import annotations

import html
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import typer

from wdanalysis.cli import app

markdown = pytest.importorskip("markdown")

HOOK = Path(__file__).parents[2] / "docs" / "commands.py"


@pytest.fixture(scope="module")
def page() -> str:
    spec = importlib.util.spec_from_file_location("docs_commands", HOOK)
    assert spec is not None
    assert spec.loader is not None
    hook: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    made: str = markdown.markdown(hook.reference(), extensions=["tables", "fenced_code"])
    return made


def text(cell: str) -> str:
    return html.unescape(re.sub(r"<.*?>", "", cell))


def test_no_sign_of_the_markup_is_left(page: str) -> None:
    assert "\\" not in text(page)
    assert "**" not in text(page)
    assert "|---" not in text(page)


def test_every_option_has_its_row_with_choices_and_default(page: str) -> None:
    rows = [
        tuple(map(text, re.findall(r"<td>(.*?)</td>", row)))
        for row in re.findall(r"(?s)<tr>(.*?)</tr>", page)
    ]
    assert ("--style <paper|talk|screen>", "Sizes of text and figures.", "paper") in rows
    assert ("--width INCHES", "Of a figure.", "the style's") in rows
    spelt = {word for row in rows if row for word in re.findall(r"--[\w-]+", row[0])}
    group: Any = typer.main.get_command(app)
    for command in group.commands.values():
        for parameter in command.params:
            assert set(option for option in parameter.opts if option.startswith("--")) <= spelt


def test_options_stand_under_the_headings_of_the_help(page: str) -> None:
    compare = page[: page.index("wd-analyze plot</h2>")]
    headings = re.findall(r"<p><strong>(.*?)</strong></p>", compare)
    assert headings == [
        *("What to compare", "Numbers", "Predictions from the learning rate", "Figures", "Output"),
    ]

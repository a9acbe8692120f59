"""The documentation: its pages build, its commands and its Python run, and it defines every column."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import nbformat
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from wdanalysis.analysis.prediction import PREDICTION_COLUMNS, SCHEDULE_COLUMNS
from wdanalysis.analysis.readings import READING_COLUMNS
from wdanalysis.analysis.regression import CORRELATION_COLUMNS
from wdanalysis.analysis.runs import RUN_COLUMNS
from wdanalysis.analysis.shrink import COMMON_SHRINK_COLUMNS
from wdanalysis.analysis.table import COLUMNS, STACK_COLUMNS
from wdanalysis.cli import app
from wdanalysis.measure.geometry import GEOMETRY_COLUMNS
from wdanalysis.measure.spectra import SIMILARITY_COLUMNS, SPECTRA_COLUMNS
from wdanalysis.results.vectors import VECTOR_COLUMNS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def module(name: str) -> ModuleType:
    """A script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


shown = module("shown")
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if "```" in page.read_text(encoding="utf-8")]
BLOCK = re.compile(r"(?:<!-- (?P<mark>\w+) -->\n)?```(?P<language>bash|python)\n(?P<text>.*?)```", re.DOTALL)
"""`yours`: needs files of the reader's; `long`: trains for minutes. Such commands are parsed and not run."""


def blocks(page: Path) -> Iterator[tuple[str | None, str, str]]:
    """Mark, language and text of a page's fenced blocks."""
    for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
        yield found["mark"], found["language"], found["text"]


def commands(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "wd-analyze", line
        yield arguments


def parse(arguments: list[str]) -> None:
    """Read a command's arguments as the command does, without running it."""
    group: Any = typer.main.get_command(app)
    name, *rest = arguments
    group.commands[name].make_context(name, rest)


def name_of(page: Path) -> str:
    return str(page.relative_to(DOCS))


@pytest.fixture
def beside_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sample_checkpoints").symlink_to(ROOT / "sample_checkpoints")
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("beside_the_samples")
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_and_python_block_of_a_page_runs(page: Path) -> None:
    names: dict[str, Any] = {}
    for mark, language, text in blocks(page):
        if language == "python":
            code = compile(text, name_of(page), "exec")
            if mark is None:
                exec(code, names)
            continue
        for arguments in commands(text):
            if mark is not None:
                parse(arguments)
                continue
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, (arguments, result.output, result.exception)


def pixels(png: Path | bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(
        Image.open(io.BytesIO(png) if isinstance(png, bytes) else png).convert("RGB"), dtype=int
    )


@pytest.mark.slow
@pytest.mark.parametrize("page", shown.pages(), ids=name_of)
def test_a_page_shows_what_its_commands_print_and_draw(page: Path, tmp_path: Path) -> None:
    """Where it does not: `python docs/shown.py`."""
    text, pictures = shown.shown(page, tmp_path)
    assert text == page.read_text(encoding="utf-8")
    for place, picture in pictures.items():
        kept, drawn = pixels(DOCS / "images" / place), pixels(picture)
        assert kept.shape == drawn.shape, place
        assert (np.abs(kept - drawn).max(axis=2) > 48).mean() < 1e-4, place


def test_a_picture_that_has_changed_is_noticed(tmp_path: Path) -> None:
    from PIL import Image

    whole = Image.open(DOCS / "images/first/scatter_v.png").convert("RGB")
    whole.paste((200, 0, 0), (300, 150, 316, 166))  # a point of a scatter
    whole.save(tmp_path / "changed.png")
    kept, drawn = pixels(DOCS / "images/first/scatter_v.png"), pixels(shown.small(tmp_path / "changed.png"))
    assert (np.abs(kept - drawn).max(axis=2) > 48).mean() > 1e-4


def test_a_terminal_is_shown_as_it_is(tmp_path: Path) -> None:
    printed = shown.run("wd-analyze --version", tmp_path)
    assert re.fullmatch(r"(wd-analyze )?\d+\.\d+\S*\n", printed)
    with pytest.raises(SystemExit, match=r"no-such"):
        shown.run("wd-analyze inspect no-such-path", tmp_path)


def test_all_pictures_together_are_small() -> None:
    assert sum(path.stat().st_size for path in (DOCS / "images").rglob("*.png")) < 1_500_000


def test_a_command_that_does_not_exist_is_noticed() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(["compare", "base", "tuned", "--no-such-option"])


def defined_columns(heading: str) -> set[str]:
    """The columns that a section of the page of columns defines, ranges such as `s1` … `s10` in full."""
    page = (DOCS / "columns.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", page, flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(heading)]
    names = set()
    for cell in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE):
        spelt = re.findall(r"`(\w+)`", cell)
        names.update(spelt)
        for first, last in itertools.pairwise(spelt if "…" in cell else []):
            stem, start = re.fullmatch(r"(\D+)(\d+)", first).groups()  # type: ignore[union-attr]
            names.update(f"{stem}{i}" for i in range(int(start), int(last.removeprefix(stem)) + 1))
    return names


@pytest.mark.parametrize(
    ("file", "columns"),
    [
        ("metrics.csv", COLUMNS),
        ("metrics.csv", STACK_COLUMNS),
        ("runs.csv", RUN_COLUMNS),
        ("correlations.csv", CORRELATION_COLUMNS),
        ("diagnostics.csv", COMMON_SHRINK_COLUMNS),
        ("readings.csv", READING_COLUMNS),
        ("schedules.csv", SCHEDULE_COLUMNS),
        ("predictions.csv", PREDICTION_COLUMNS),
        ("spectra.csv", SPECTRA_COLUMNS),
        ("similarity.csv", SIMILARITY_COLUMNS),
        ("geometry.csv", GEOMETRY_COLUMNS),
        ("vectors.parquet", VECTOR_COLUMNS),
    ],
)
def test_every_column_is_defined(file: str, columns: tuple[str, ...]) -> None:
    assert set(columns) <= defined_columns(file)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        build, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_pages_load_nothing_from_the_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    loaded = r"""<(?:script|img|iframe)[^>]+src="?https?:|<link[^>]+rel="?(?:stylesheet|preconnect|icon)[^>]+https?:"""
    assert len(pages) >= len(PAGES)
    assert not [page.name for page in pages if re.search(loaded, page.read_text(encoding="utf-8"))]


def test_the_command_reference_names_every_option(site: Path) -> None:
    page = (site / "commands.html").read_text(encoding="utf-8")
    group: Any = typer.main.get_command(app)
    for command in group.commands.values():
        assert f"wd-analyze {command.name}" in page
        for parameter in command.params:
            assert all(option in page for option in parameter.opts if option.startswith("--"))


def test_the_command_reference_has_no_backslash(site: Path) -> None:
    page = (site / "commands.html").read_text(encoding="utf-8")
    cells = re.findall(r"<td>(.*?)</td>", page, re.DOTALL)
    assert cells
    assert not [cell for cell in cells if "\\" in cell]


def equations(page: Path) -> list[ElementTree.Element]:
    text = html.unescape(page.read_text(encoding="utf-8"))
    return [ElementTree.fromstring(found) for found in re.findall(r"<math.*?</math>", text, re.DOTALL)]


def test_equations_need_no_script_and_no_latex_is_left(site: Path) -> None:
    written = equations(site / "method.html")
    assert len(written) >= 28
    left = r'class="arithmatex"|\$\$|\\(?:frac|sqrt|text|qquad)\b'
    assert not [page.name for page in site.rglob("*.html") if re.search(left, page.read_text("utf-8"))]
    elements = {element.tag.rpartition("}")[2] for equation in written for element in equation.iter()}
    assert {"mfrac", "msqrt", "munderover", "msubsup"} <= elements
    assert not [text for equation in written for text in equation.itertext() if set("\\&~$") & set(text)]


def test_the_font_of_the_pages_has_every_character_of_the_equations(site: Path) -> None:
    from fontTools.ttLib import TTFont

    font = TTFont(site / "css/mathematics.woff")
    used = {
        character
        for page in site.rglob("*.html")
        for equation in equations(page)
        for text in equation.itertext()
        for character in text.strip()
    }
    assert used
    assert not [character for character in used if ord(character) not in font.getBestCmap()]
    assert font["MATH"].table.MathVariants.VertGlyphCount > 0  # roots and brackets that grow


def test_notebooks_are_pages_with_their_outputs(site: Path) -> None:
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for notebook in notebooks:
        page = site / "notebooks" / f"{notebook.stem}.html"
        cells = nbformat.read(notebook, as_version=4).cells
        outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
        pictures = [data["image/png"] for data in outputs if "image/png" in data]
        shown = sorted((site / "notebooks").glob(f"{notebook.stem}-*.png"))
        assert sorted(base64.b64encode(picture.read_bytes()) for picture in shown) == sorted(
            picture.replace("\n", "").encode() for picture in pictures
        )
        text = page.read_text(encoding="utf-8")
        assert all(f'src="{picture.name}"' in text for picture in shown)
        assert text.count('class="notebook-output"') == sum(
            "text/html" in data and "image/png" not in data for data in outputs
        )


def test_long_signatures_are_broken_into_lines(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    signatures = re.findall(r'<div class="[^"]*doc-signature[^"]*">.*?<pre>(.*?)</pre>', page, re.DOTALL)
    lines = [line for text in signatures for line in html.unescape(re.sub(r"<[^>]+>", "", text)).splitlines()]
    assert len(signatures) > 20
    assert max(map(len, lines)) <= 80

"""README says what is so: its command draws its picture, its numbers are those measured, its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import typer

from wdanalysis.cli import app
from wdanalysis.figures.kinds import KINDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
READING = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
PICTURE = ROOT / "docs" / "images" / "demo_scatter_v.png"
SHADES = 32
"""Of 255: what two pixels may differ by and count as equal."""


def section(heading: str) -> str:
    return README.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]


def cells(page: str, case: str) -> list[list[str]]:
    """The cells behind the first one of every row of a table that is of this case."""
    rows = [line.removeprefix(f"| {case} |") for line in page.splitlines() if line.startswith(f"| {case} |")]
    return [[cell.strip() for cell in row.rstrip("| ").split("|")] for row in rows]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that README's first command leaves, in an empty one."""
    install, command = re.search(r"```bash\n(.*?)\n```", README, re.DOTALL)[1].splitlines()  # type: ignore[index]
    assert install == "pip install wdanalysis"
    program, *arguments = command.split()
    assert program == "wd-analyze"
    folder = tmp_path_factory.mktemp("empty")
    done = subprocess.run(
        [sys.executable, "-m", "wdanalysis.cli", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Look at\n  wd-demo/figures/scatter_v.png" in done.stdout
    return folder / "wd-demo"


@pytest.mark.slow
def test_the_picture_is_the_one_that_the_command_above_it_draws(demo: Path) -> None:
    import matplotlib.image

    shown, drawn = (matplotlib.image.imread(path) for path in (PICTURE, demo / "figures" / "scatter_v.png"))
    assert f"]({PICTURE.relative_to(ROOT)})" in README
    assert shown.shape == drawn.shape, "python -m sample_checkpoints.make_demo --picture draws it anew"
    differing = (np.abs(shown - drawn).max(axis=-1) > SHADES / 255).mean()
    assert differing < 2e-4, "python -m sample_checkpoints.make_demo --picture draws it anew"


@pytest.mark.slow
def test_what_is_said_of_the_picture_is_what_was_read_off_it(demo: Path) -> None:
    readings = pd.read_csv(demo / "readings.csv")
    of = " ".join(readings.query("method == 'LoRA' and module == 'v'")["sentence"])
    assert "R² = 0.91 without a fit" in README
    assert "R² = 0.91 without a fit" in of
    assert "random updates of the same size would give r = +0.81 … +0.94" in README
    assert "random updates of the same size would have +0.81 … +0.94" in of


@pytest.mark.slow
def test_the_tables_of_what_comes_out_name_every_file_and_column(demo: Path) -> None:
    out = section("What comes out")
    named = set(re.findall(r"`([\w.]+)`", out))
    files = {path.name for path in demo.iterdir() if path.is_file()}
    assert {"metrics.csv", "readings.csv", "report.html", "run.json"} <= files & named
    assert set(KINDS) | {"captions.md"} <= named
    assert {path.stem.split("_")[0] for path in (demo / "figures").glob("*.png")} <= named
    table = pd.read_csv(demo / "metrics.csv")
    assert set(list(table.columns)[:17]) <= named


def test_the_speed_and_the_precision_are_those_measured() -> None:
    trust = section("Why trust it")
    for case in ("float32 script, axis out", "`compare`, axis out"):
        (wall, _, peak, *_), (_, error_of_delta_d) = cells(RESULTS, case)
        assert f"{wall} and {peak}" in trust
        assert error_of_delta_d in trust


def test_how_often_intervals_hold_is_what_the_simulation_found() -> None:
    rows = re.findall(r"^\| [a-z][^|]*\| (?:6|10|32) \| ([\d.]+)–([\d.]+) \|", READING, re.MULTILINE)
    assert len(rows) == 12
    held = [float(end) for row in rows for end in row]
    assert f"{min(held)} to\n  {max(held)} % of cases" in section("Why trust it")


def test_every_command_is_named() -> None:
    group: Any = typer.main.get_command(app)
    named = set(re.findall(r"^wd-analyze (\w+)", section("On the command line"), re.MULTILINE))
    assert set(group.commands) <= named


@pytest.mark.parametrize(
    "target", sorted({link for link in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in link})
)
def test_a_link_leads_to_a_file_and_a_heading_that_are_there(target: str) -> None:
    name, _, anchor = target.removeprefix("../../").partition("#")
    if name.startswith("actions/workflows/"):  # of the forge: README is shown two levels below it
        workflow = name.removeprefix("actions/workflows/").removesuffix("/badge.svg")
        assert (ROOT / ".github" / "workflows" / workflow).is_file()
        return
    assert (ROOT / name).is_file()
    if anchor:
        headings = re.findall(r"^#+ (.*)$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {heading.lower().replace(" ", "-") for heading in headings}


def test_the_badges_of_python_are_the_versions_that_are_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    versions = [kind.rsplit(" ", 1)[1] for kind in project["classifiers"] if ":: Python :: 3." in kind]
    assert f"![Python {', '.join(versions)}]" in README
    assert ", ".join(f'"{version}"' for version in versions) in (
        ROOT / ".github" / "workflows" / "ci.yml"
    ).read_text(encoding="utf-8")
    assert project["license"] == "Apache-2.0"


def test_what_to_install_is_quoted_where_a_shell_would_expand_it() -> None:
    commands = re.findall(r"pip install [^`\n#]*", README)
    assert len(commands) >= 6
    for command in commands:
        assert "[" not in re.sub(r'"[^"]*"', "", command), command

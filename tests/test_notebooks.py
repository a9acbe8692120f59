"""The notebooks: each runs from a clean kernel, and what is kept of its outputs reads well anywhere."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from machine_paths import machine_paths
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
ALL = sorted(NOTEBOOKS.glob("*.ipynb"))


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def name_of(path: Path) -> str:
    return path.stem


def test_there_are_four() -> None:
    assert [path.stem[0] for path in ALL] == ["1", "2", "3", "4"]


@pytest.mark.slow
@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_it_runs_from_a_clean_kernel(path: Path) -> None:
    folder = {"metadata": {"path": str(NOTEBOOKS)}}
    NotebookClient(read(path), timeout=240, resources=folder).execute()


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_its_kept_outputs_are_those_of_one_run_in_order(path: Path) -> None:
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_it_names_no_path_of_the_machine_that_ran_it(path: Path) -> None:
    shown = [
        str(output.get("text", ""))
        + "".join(str(v) for k, v in output.get("data", {}).items() if "image" not in k)
        for cell in read(path).cells
        for output in cell.get("outputs", [])
    ]
    assert not [text for text in shown if machine_paths(text)]


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_every_number_that_its_prose_gives_is_in_its_code_or_its_outputs(path: Path) -> None:
    cells = read(path).cells
    prose = " ".join(cell.source for cell in cells if cell.cell_type == "markdown")
    shown = " ".join(
        cell.source
        + "".join(
            output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in cell.outputs
        )
        for cell in cells
        if cell.cell_type == "code"
    )
    known = [float(number) for number in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", shown.replace("−", "-"))]
    for number in re.findall(r"(?<![\w.])[+-]?\d+\.\d+", prose.replace("−", "-")):
        digits = len(number.split(".")[1])
        assert any(round(value, digits) == float(number) for value in known), number


def test_charts_to_explore_are_left_to_the_readers_own_run() -> None:
    (cell,) = [cell for cell in read(ALL[0]).cells if cell.source.endswith(".explore()")]
    (output,) = cell.outputs
    assert list(output["data"]) == ["text/plain"]
    assert output["data"]["text/plain"].startswith("<Linked charts of FT, DoRA: q, v")


def test_all_together_are_small() -> None:
    assert sum(path.stat().st_size for path in ALL) < 3_000_000

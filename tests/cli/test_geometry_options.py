"""`--geometry` and `--geometry-with` on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from checkpoint_files import llama, moved, write
from typer.testing import CliRunner

from wdanalysis.cli import app


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "base.safetensors", llama(layers=1))
    write(tmp_path / "ft.safetensors", moved(llama(layers=1)))
    return tmp_path


def compare(*options: str) -> tuple[int, str]:
    line = ["compare", "base.safetensors", "ft.safetensors", "--figures", "none", "--no-report", *options]
    result = CliRunner().invoke(app, line)
    return result.exit_code, result.output


def test_geometry_is_written_as_csv_and_parquet(here: Path) -> None:
    assert compare("--geometry")[0] == 0
    csv = pd.read_csv("wd-analysis/geometry.csv").fillna({"run": ""})
    parquet = pd.read_parquet("wd-analysis/geometry.parquet")
    pd.testing.assert_frame_equal(csv, parquet, check_dtype=False)
    assert csv["subspace"].tolist() == [4] * len(csv)


def test_its_numbers_can_be_chosen_and_are_noted(here: Path) -> None:
    assert compare("--geometry-with", "k=2, share=0.5,tail=3")[0] == 0
    options = json.loads(Path("wd-analysis/run.json").read_text())["options"]
    assert options["geometry"] == {"k": 2, "rank": None, "share": 0.5, "directions": 16, "tail": 3}
    assert set(pd.read_csv("wd-analysis/geometry.csv")["subspace"]) == {2}


@pytest.mark.parametrize("wrong", ["ranks=3", "k=many", "k", "share=2", "k=0"])
def test_a_wrong_number_is_a_usage_error(here: Path, wrong: str) -> None:
    code, output = compare("--geometry-with", wrong)
    assert code == 2
    assert "--geometry-with" in output


def test_help_prints_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = re.sub(r"[\s│]+", "", CliRunner().invoke(app, ["compare", "--help"]).output)
    assert "--geometry-withNAME=VALUE" in text
    for default in ("(512,orhalftheside)", "(64)", "(0.3)", "(16)", "(halfofall)"):
        assert default in text

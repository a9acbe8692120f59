"""`report.html` as the command line writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoint_files import llama, write, write_steps
from typer.testing import CliRunner

from wdanalysis.cli import app

COMPARE = ("compare", "base.safetensors", "ft", "--figures", "none")
PAGE = Path("wd-analysis/report.html")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with a base and a fully tuned series."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "base.safetensors", llama())
    write_steps(tmp_path / "ft", llama())


def outputs() -> list[str]:
    listed: list[str] = json.loads(Path("wd-analysis/run.json").read_text())["outputs"]
    return listed


def test_compare_writes_the_report() -> None:
    result = CliRunner().invoke(app, COMPARE)
    assert result.exit_code == 0, result.output
    assert "report.html" in result.stdout
    assert "report.html" in outputs()
    assert PAGE.read_text("utf-8").startswith("<!doctype html>")


def test_no_report_leaves_it_out_and_removes_an_old_one() -> None:
    CliRunner().invoke(app, COMPARE)
    CliRunner().invoke(app, [*COMPARE, "--no-report", "--force"])
    assert not PAGE.exists()
    assert "report.html" not in outputs()


def test_report_writes_it_from_the_tables_alone() -> None:
    CliRunner().invoke(app, [*COMPARE, "--no-report"])
    Path("base.safetensors").unlink()
    result = CliRunner().invoke(app, ["report", "wd-analysis"])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(PAGE)
    assert PAGE.exists()
    assert "report.html" in outputs()


def test_a_folder_without_results_is_one_sentence() -> None:
    result = CliRunner().invoke(app, ["report", "ft"])
    assert result.exit_code == 1
    assert "ft holds no results of `wd-analyze compare`" in str(result.exception)

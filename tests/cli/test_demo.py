"""`wd-analyze demo`: a comparison into a folder, what to look at next, and nothing of the user's touched."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import wdanalysis as wd
from wdanalysis.cli import app
from wdanalysis.errors import OutputError


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["demo", *arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout


@pytest.mark.slow
def test_it_compares_into_a_folder_and_says_what_ran_and_what_to_look_at(tmp_path: Path) -> None:
    out = tmp_path / "first"
    printed = run(str(out))
    saved = wd.Comparison.load(out)
    assert saved.methods == ["FT", "LoRA", "DoRA"]
    assert saved.modules == ["q", "v"]
    assert len(saved.metrics) == 3 * 2 * 4 * 10
    assert saved.warnings == []
    base, *tuned = (str(out / "checkpoints" / name) for name in ("base", "FT", "LoRA", "DoRA"))
    assert f"wd-analyze compare {base} {' '.join(tuned)} --modules q,v --out {out}" in printed
    named = [out / "figures" / "scatter_v.png", out / "report.html", out / "metrics.csv"]
    assert all(f"  {path}: " in printed and path.is_file() for path in named)
    again = wd.compare(base, tuned, modules=["q", "v"])
    assert again.metrics.equals(saved.metrics)


@pytest.mark.slow
def test_results_are_replaced_on_request_alone_and_quietly(tmp_path: Path) -> None:
    assert run(str(tmp_path / "out"), "--quiet") == ""
    before = (tmp_path / "out" / "run.json").stat().st_mtime_ns
    refused = CliRunner().invoke(app, ["demo", str(tmp_path / "out")])
    assert isinstance(refused.exception, OutputError)
    assert refused.exception.parameter == "force"
    assert (tmp_path / "out" / "run.json").stat().st_mtime_ns == before
    assert run(str(tmp_path / "out"), "--quiet", "--force") == ""
    assert (tmp_path / "out" / "run.json").stat().st_mtime_ns > before


def test_a_folder_with_checkpoints_of_the_users_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "checkpoints" / "base" / "config.json"
    mine.parent.mkdir(parents=True)
    mine.write_text("{}")
    result = CliRunner().invoke(app, ["demo", str(tmp_path), "--force"])
    assert isinstance(result.exception, OutputError)
    assert "config.json is there and is none of the demo's files" in str(result.exception)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]

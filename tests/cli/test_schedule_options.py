"""A schedule on the command line: what it predicts from, and what is asked for where it is not whole."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from checkpoint_files import llama, write, write_steps
from typer.testing import CliRunner

from wdanalysis import Schedule
from wdanalysis.cli import app


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "base.safetensors", llama())
    write_steps(tmp_path / "ft", llama())
    return tmp_path


def compare(*arguments: str) -> tuple[int, str]:
    plain = ["--figures", "none", "--no-report", "--force", "--out", "out"]
    result = CliRunner().invoke(app, ["compare", "base.safetensors", "ft", *plain, *arguments])
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


@pytest.mark.usefixtures("here")
def test_a_schedule_is_taken_from_the_options() -> None:
    code, output = compare(
        *("--lr", "1e-3", "--schedule", "cosine", "--schedule-steps", "40"),
        *("--warmup", "4", "--weight-decay", "0.1"),
    )
    assert code == 0, output
    made = Schedule.named("cosine", 1e-3, steps=40, warmup=4, weight_decay=0.1)
    table = pd.read_csv("out/schedules.csv")
    assert table["step"].to_list() == [10, 20, 30]
    assert table["s2"].to_list() == pytest.approx([made.sums(step).s2 for step in (10, 20, 30)])
    assert table["kept"].to_list() == pytest.approx([made.sums(step).kept for step in (10, 20, 30)])
    compare()
    assert not Path("out/schedules.csv").exists()  # without a schedule the earlier one's table goes


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lr", "1e-3"], "give the steps of a whole run"),
        (["--schedule-steps", "40"], "a schedule needs its peak"),
        (["--warmup", "4"], "a schedule needs its peak"),
        (["--lr", "-1", "--schedule-steps", "40"], "not a positive number"),
    ],
)
def test_half_a_schedule_is_refused(arguments: list[str], said: str) -> None:
    code, output = compare(*arguments)
    assert code == 2
    assert said in output


@pytest.mark.usefixtures("here")
def test_a_warmup_longer_than_the_run_is_refused_by_its_option() -> None:
    code, _ = compare("--lr", "1e-3", "--schedule-steps", "4", "--warmup", "5")
    assert code == 1

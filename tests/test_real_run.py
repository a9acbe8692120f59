"""The whole way: a real model tuned by transformers and PEFT, compared by the command, against a plain script."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pytest
from typer.testing import CliRunner

from wdanalysis.cli import app

if TYPE_CHECKING:
    from real_run import RealRun


@pytest.mark.parametrize("axis", ["out", "in"])
def test_the_command_gives_the_numbers_of_the_plain_script(
    real_run: RealRun, tmp_path: Path, axis: str
) -> None:
    import reference

    paths = [str(real_run.methods[method]) for method in ("ft", "lora", "dora")]
    options = ["--axis", axis, "--modules", "q,v", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["compare", str(real_run.base), *paths, *options])
    assert result.exit_code == 0, result.output

    found = pd.read_csv(tmp_path / "out" / "metrics.csv")
    expected = reference.metrics(real_run.base, real_run.methods)
    expected = expected[expected["axis"] == axis]
    both = found.merge(expected, on=["method", "step", "name", "axis"], suffixes=("", "_expected"))
    assert len(both) == len(found) == len(expected) == 3 * 3 * 6 * 2
    for column in ("delta_m", "delta_d"):
        pd.testing.assert_series_equal(
            both[column], both[f"{column}_expected"], rtol=1e-6, atol=1e-14, check_names=False
        )

    figures = sorted(path.name for path in (tmp_path / "out" / "figures").iterdir())
    assert figures == sorted(
        [f"{kind}_{module}.png" for kind in ("scatter", "layers", "trajectory") for module in ("q", "v")]
        + ["heatmap.png", "figure2.png", "figure8.png", "captions.md"]
        + [f"prediction_{module}.png" for module in ("q", "v")]
    )
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["complete"] is True
    assert run["skipped"] == []
    assert {len(checkpoints) for method, checkpoints in run["inputs"].items() if method != "BASE"} == {3}

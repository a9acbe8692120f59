"""`--dora-axis` and `--as` are the parameters `dora_axis` and `applied_as` of `compare`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from wdanalysis.cli import main

MODULE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A square weight, and an adapter whose magnitudes are of either axis."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    save_file({f"{MODULE}.weight": torch.randn(5, 5)}, "base.safetensors")
    parts = {"lora_up.weight": torch.randn(5, 2), "lora_down.weight": torch.randn(2, 5)}
    parts["dora_scale"] = torch.rand(5) + 1
    key = f"lora_unet_{MODULE.replace('.', '_')}"
    save_file({f"{key}.{part}": tensor for part, tensor in parts.items()}, "style.safetensors")
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["wd-analyze", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


@pytest.mark.parametrize("command", ["compare base.safetensors", "inspect", "merge base.safetensors"])
def test_an_axis_that_is_not_known_is_asked_for_by_the_option(
    here: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["out"] if command.startswith("merge") else []
    assert run(monkeypatch, *command.split(), "style.safetensors", *out) == 1
    assert capsys.readouterr().err.rstrip().endswith("(--dora-axis)")
    assert run(monkeypatch, *command.split(), "style.safetensors", *out, "--dora-axis", "in") == 0


def test_a_loader_s_weights_are_methods_of_their_own_and_the_run_says_so(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--dora-axis", "out", "--as", "lycoris", "--figures", "none", "--no-report", "--out", "out"]
    assert run(monkeypatch, "compare", "base.safetensors", "style.safetensors", *options) == 0
    methods = list(pd.read_csv("out/metrics.csv")["method"])
    assert methods == ["style", "style as lycoris", "style as lycoris, from intended"]
    asked = json.loads(Path("out/run.json").read_text())["options"]
    assert (asked["dora_axis"], asked["applied_as"]) == ("out", "lycoris")

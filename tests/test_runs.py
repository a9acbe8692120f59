"""Several runs of one method, from their folders to tables, sentences and figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from checkpoint_files import llama, moved, write, write_lora, write_model, write_steps
from scipy import stats

import wdanalysis as wd
from wdanalysis.errors import CheckpointError, ComparisonError

LAYERS, WIDTH, STEPS = 6, 16, (10, 20, 30)


def tuned_run(folder: Path, base: dict[str, torch.Tensor], seed: int) -> Path:
    """Tune chained linear layers by AdamW on batches of a seed's own, saved at `STEPS`."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: weight.clone().requires_grad_() for name, weight in base.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=3e-3)
    target = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(99))
    for step in range(1, STEPS[-1] + 1):
        batch = torch.randn(32, WIDTH, generator=generator)
        x = batch
        for weight in weights.values():
            x = torch.tanh(x @ weight.T)
        loss = ((x - torch.tanh(batch @ target)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in STEPS:
            saved = {name: weight.detach().clone() for name, weight in weights.items()}
            write(folder / f"checkpoint-{step}" / "model.safetensors", saved)
    return folder


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base.safetensors`, and real runs of three seeds in `ft/`."""
    folder = tmp_path_factory.mktemp("seeds")
    generator = torch.Generator().manual_seed(0)
    base = {
        f"model.layers.{layer}.self_attn.q_proj.weight": torch.randn(WIDTH, WIDTH, generator=generator) / 4
        for layer in range(LAYERS)
    }
    write(folder / "base.safetensors", base)
    for seed in range(3):
        tuned_run(folder / "ft" / f"seed-{seed}", base, seed)
    return folder


@pytest.fixture(scope="module")
def compared(seeds: Path) -> wd.Comparison:
    return wd.compare(seeds / "base.safetensors", {"FT": seeds / "ft"})


def test_every_row_is_the_one_of_its_run_alone(seeds: Path, compared: wd.Comparison) -> None:
    assert compared.metrics["run"].unique().tolist() == ["seed-0", "seed-1", "seed-2"]
    for seed in range(3):
        alone = wd.compare(seeds / "base.safetensors", {"FT": seeds / "ft" / f"seed-{seed}"}).metrics
        assert alone["run"].eq("").all()
        of_run = compared.metrics[compared.metrics["run"] == f"seed-{seed}"].reset_index(drop=True)
        pd.testing.assert_frame_equal(of_run.drop(columns="run"), alone.drop(columns="run"), check_exact=True)


def test_tables_are_of_the_mean_over_runs(compared: wd.Comparison) -> None:
    by_run = [own.reset_index(drop=True) for _, own in compared.metrics.groupby("run")]
    mean = {column: np.mean([own[column] for own in by_run], axis=0) for column in ("delta_m", "delta_d")}
    (pooled,) = compared.correlations().query("scope == 'pooled'").to_dict("records")
    assert pooled["n"] == LAYERS * len(STEPS)
    assert pooled["pearson_r"] == pytest.approx(stats.pearsonr(mean["delta_d"], mean["delta_m"]).statistic)
    (summary,) = compared.summary().to_dict("records")
    assert summary["delta_m"] == pytest.approx(mean["delta_m"][-LAYERS:].mean())
    assert compared.diagnostics()["matrices"].eq(LAYERS).all()


def test_runs_are_compared_with_each_other(compared: wd.Comparison) -> None:
    across = compared.across_runs()
    r = [
        stats.pearsonr(own["delta_d"], own["delta_m"]).statistic for _, own in compared.metrics.groupby("run")
    ]
    np.testing.assert_allclose(across["r_mean"].iloc[1:], r, rtol=1e-12)
    z = np.arctanh(r)
    low, high = np.tanh(stats.t.interval(0.95, 2, loc=z.mean(), scale=stats.sem(z)))
    np.testing.assert_allclose(across.loc[0, ["r_low", "r_high"]].astype(float), [low, high], rtol=1e-9)
    assert "runs" in set(compared.readings()["rule"])


def test_the_folder_keeps_runs(compared: wd.Comparison, tmp_path: Path) -> None:
    written = {path.name for path in compared.save(tmp_path / "out", report=False)}
    assert {"runs.csv", "scatter_q.png", "layers_q.png", "trajectory_q.png", "heatmap.png"} <= written
    loaded = wd.Comparison.load(tmp_path / "out")
    pd.testing.assert_frame_equal(loaded.metrics, compared.metrics)
    pd.testing.assert_frame_equal(loaded.across_runs(), compared.across_runs())
    noted = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [entry.get("run") for entry in noted["inputs"]["FT"]] == [
        f"seed-{seed}" for seed in range(3) for _ in STEPS
    ]
    assert all("run" not in entry for entry in noted["inputs"]["BASE"])
    assert loaded.run.inputs["FT"][0].run == "seed-0"


def test_without_runs_there_is_no_table_of_them(seeds: Path, tmp_path: Path) -> None:
    alone = wd.compare(seeds / "base.safetensors", {"FT": seeds / "ft" / "seed-0"})
    written = alone.save(tmp_path / "out", figures=[], report=False)
    assert "runs.csv" not in {path.name for path in written}
    assert alone.across_runs().empty


def test_paths_of_one_name_with_the_same_steps_are_runs(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", llama())
    runs = [write_steps(tmp_path / name, llama()) for name in ("a", "b")]
    lora = write_lora(tmp_path / "lora", llama())
    compared = wd.compare(base, {"FT": runs, "LoRA": lora})
    assert compared.methods == ["FT", "LoRA"]
    ft = compared.metrics[compared.metrics["method"] == "FT"]
    assert ft["run"].unique().tolist() == ["a", "b"]
    assert compared.metrics.loc[compared.metrics["method"] == "LoRA", "run"].eq("").all()


def test_chosen_steps_are_of_every_run(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", llama())
    runs = [
        write_steps(tmp_path / "a", llama()),
        write_steps(tmp_path / "b", llama(), steps=(10, 20)),
    ]
    chosen = wd.compare(base, {"FT": runs}, steps=[10, 20])
    assert chosen.metrics.groupby("run")["step"].unique().map(list).to_dict() == {
        "a": [10, 20],
        "b": [10, 20],
    }
    assert not chosen.warnings
    every = wd.compare(base, {"FT": runs})
    assert "not all runs of FT have step 30: means over runs are of step 10, 20" in every.warnings
    assert every.summary()["step"].eq(20).all()
    one = wd.compare(base, {"FT": runs}, steps=[30])
    assert one.metrics["run"].eq("").all()
    assert "b of FT was left out, as it has none of the chosen steps." in one.warnings


def test_what_is_left_out_names_its_run(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", llama())
    whole = moved(llama())
    first = write_model(tmp_path / "seed-0", whole)
    part = {name: weight for name, weight in whole.items() if "layers.1.self_attn.q" not in name}
    second = write_model(tmp_path / "seed-1", part)
    compared = wd.compare(base, {"FT": [first, second]})
    (left_out,) = compared.skipped.to_dict("records")
    assert (left_out["method"], left_out["run"]) == ("FT", "seed-1")
    pooled = compared.correlations().query("scope == 'pooled' and module == 'q'")
    assert pooled["n"].item() == 2  # of all runs


def test_a_value_that_is_not_finite_is_said_with_its_run(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", llama())
    broken = moved(llama())
    broken["model.layers.0.self_attn.q_proj.weight"][0, 0] = torch.nan
    runs = [write_model(tmp_path / "a", moved(llama())), write_model(tmp_path / "b", broken)]
    compared = wd.compare(base, {"FT": runs})
    assert any("q_proj.weight of FT, b or of BASE" in warning for warning in compared.warnings)
    assert compared.correlations().query("scope == 'pooled' and module == 'q'")["n"].item() == 2


def test_runs_of_two_kinds_are_refused(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", llama())
    model = write_model(tmp_path / "ft" / "run-1", moved(llama()))
    write_lora(tmp_path / "ft" / "run-2", llama())
    with pytest.raises(CheckpointError, match="no runs of one method"):
        wd.compare(base, model.parent)


@pytest.mark.parametrize("what", ["spectra", "geometry", "vectors"])
def test_what_would_mix_runs_is_refused(tmp_path: Path, what: str) -> None:
    base = write(tmp_path / "base.safetensors", llama())
    runs = [write_model(tmp_path / name, moved(llama())) for name in ("seed-0", "seed-1")]
    with pytest.raises(ComparisonError, match=f"FT has several runs, and {what} are taken of one"):
        wd.compare(base, {"FT": runs}, **{what: True})

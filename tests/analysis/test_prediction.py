"""Predictions: the laws against AdamW on noise, the statistics by hand, and how often a sentence is false."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from checkpoint_files import llama, write, write_steps
from safetensors.torch import load_file
from scipy import stats

import wdanalysis as wd
from wdanalysis.analysis.prediction import (
    PREDICTION_COLUMNS,
    SCHEDULE_COLUMNS,
    mean_absolute_normal,
    predictions,
    readings,
    schedule_table,
)
from wdanalysis.checkpoints import open_series
from wdanalysis.checkpoints.schedules import Schedule, find_schedule
from wdanalysis.comparison import Comparison
from wdanalysis.errors import ComparisonError, OutputError

SAMPLES = Path(__file__).parents[2] / "sample_checkpoints"
STEPS = (20, 40, 60)
DECAYING = Schedule.named("cosine", 2e-3, steps=60, warmup=5, weight_decay=2.0)
STILL = Schedule.named("linear", 2e-3, steps=60)


def adam_on_noise(schedule: Schedule, start: np.ndarray, seed: int = 0) -> dict[int, np.ndarray]:
    """Where AdamW brings numbers whose gradients are independent noise, at `STEPS`."""
    rng = np.random.default_rng(seed)
    x, first, second = start.copy(), np.zeros(start.shape), np.zeros(start.shape)
    seen = {}
    for k, lr in enumerate(schedule.learning_rates, 1):
        gradient = rng.standard_normal(start.shape)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        x = x * (1 - lr * (schedule.weight_decay or 0.0))
        x = x - lr * first / (1 - 0.9**k) / (np.sqrt(second / (1 - 0.999**k)) + 1e-12)
        if k in STEPS:
            seen[k] = x.copy()
    return seen


def row(
    step: int, layer: int, update: str, m0: np.ndarray, m: np.ndarray, turn: np.ndarray, length: int
) -> dict:
    """A row of the metrics table, as far as predictions read it."""
    delta_m = np.abs(m - m0).mean()
    return {
        **{"method": "run", "step": step, "layer": layer, "module": "q", "name": f"{layer}.q", "axis": "out"},
        **{"vectors": len(m0), "length": length, "delta_m": delta_m, "delta_d": turn.mean()},
        **{"rel_delta_m": delta_m / m0.mean(), "update_norm": 1.0, "base_norm": np.linalg.norm(m0)},
        **{"centrifugal": (m * turn).mean(), "mean_inverse_m0_squared": (m0**-2.0).mean(), "update": update},
    }


def table(rows: list[dict[str, Any]] | pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(rows).astype({"step": "Int64", "layer": "Int64"})


def sums_of(schedule: Schedule, method: str = "run") -> pd.DataFrame:
    return schedule_table({(method, ""): schedule}, [(method, "", step) for step in STEPS])


def magnitudes(schedule: Schedule, layers: int = 8, spread: float = 0.3) -> pd.DataFrame:
    """DoRA's m of layers of different norms, tuned by AdamW on noise."""
    rng = np.random.default_rng(1)
    bases = [scale * np.exp(spread * rng.standard_normal(4000)) for scale in np.linspace(0.2, 1.0, layers)]
    ends = [adam_on_noise(schedule, m0, seed) for seed, m0 in enumerate(bases)]
    return table(
        [
            row(step, layer, "dora", m0, end[step], np.zeros(len(m0)), 64)
            for step in STEPS
            for layer, (m0, end) in enumerate(zip(bases, ends, strict=True))
        ]
    )


def full_tuning(schedule: Schedule, layers: int = 8, length: int = 64) -> pd.DataFrame:
    """Matrices of different norms, tuned by AdamW on noise."""
    rng = np.random.default_rng(2)
    bases = [scale * rng.standard_normal((100, length)) for scale in np.linspace(0.05, 0.2, layers)]
    rows = []
    for layer, W0 in enumerate(bases):
        for step, W in adam_on_noise(schedule, W0, layer).items():
            m0, m = np.linalg.norm(W0, axis=1), np.linalg.norm(W, axis=1)
            rows.append(row(step, layer, "stored", m0, m, 1 - (W0 * W).sum(1) / (m0 * m), length))
    return table(rows)


def test_the_mean_of_an_absolute_normal_is_that_of_scipy() -> None:
    mean, sd = np.array([0.0, 0.5, -2.0, 30.0]), np.array([1.0, 2.0, 0.5, 0.1])
    expected = stats.foldnorm(c=np.abs(mean) / sd, scale=sd).mean()
    assert mean_absolute_normal(mean, sd) == pytest.approx(expected)
    assert mean_absolute_normal([-3.0, 0.0], [0.0, 0.0]).tolist() == [3.0, 0.0]


@pytest.mark.parametrize("schedule", [STILL, DECAYING])
def test_magnitudes_under_adam_on_noise_move_as_predicted_without_a_fit(schedule: Schedule) -> None:
    found = predictions(magnitudes(schedule), sums_of(schedule))
    assert found["predicted"].to_numpy() == pytest.approx(found["observed"].to_numpy(), rel=0.08)
    assert found["r2"].iloc[0] > 0.95
    assert abs(found["bias"].iloc[0]) < 0.02
    assert found["fitted"].isna().all()


def test_the_plain_sum_of_squares_predicts_too_little_of_a_short_run() -> None:
    sums = sums_of(STILL)
    plain = predictions(magnitudes(STILL), sums.assign(diffusion=sums["s2"]))
    assert -0.22 < plain["bias"].iloc[0] < -0.08
    assert plain.groupby("step")["predicted"].first().to_numpy() == pytest.approx(
        np.sqrt(2 / np.pi * sums["s2"].to_numpy())
    )


@pytest.mark.parametrize("schedule", [STILL, DECAYING])
def test_weights_under_adam_on_noise_turn_as_predicted_and_g_is_one(schedule: Schedule) -> None:
    found = predictions(full_tuning(schedule), sums_of(schedule))
    assert found["quantity"].unique().tolist() == ["delta_d"]
    assert found["fitted"].iloc[0] == pytest.approx(
        1, abs=0.1
    )  # 1 − cos of large turns is below half their square
    assert found["r2"].iloc[0] > 0.97
    assert "diffuse" not in (said := readings(found)["sentence"].item())
    assert "× what Adam's steps in random directions turn" in said


def test_lengths_that_only_turning_changes_are_the_mean_centrifugal_part() -> None:
    rng = np.random.default_rng(3)
    rows = []
    for step, layer in itertools.product(STEPS, range(8)):
        W0 = (1 + layer) * rng.standard_normal((50, 32))
        d = 0.01 * step * rng.standard_normal(W0.shape)
        d -= (d * W0).sum(1, keepdims=True) / (W0**2).sum(1, keepdims=True) * W0  # at right angles to w0
        m0, m = np.linalg.norm(W0, axis=1), np.linalg.norm(W0 + d, axis=1)
        rows.append(row(step, layer, "low-rank", m0, m, 1 - ((W0 + d) * W0).sum(1) / (m0 * m), 32))
    found = predictions(table(rows))  # needs no schedule
    assert found["predicted"].to_numpy() == pytest.approx(found["observed"].to_numpy(), rel=1e-9)
    assert found["r2"].iloc[0] == pytest.approx(1)
    assert readings(found)["sentence"].item().endswith("R² = 1.00 without a fit.")


def test_of_several_runs_each_is_predicted_by_its_own_schedule_and_all_have_to_hold() -> None:
    faster = Schedule.named("cosine", 4e-3, steps=60)
    rows = pd.concat([magnitudes(STILL).assign(run="a"), magnitudes(faster).assign(run="b")])
    checkpoints = [("run", run, step) for run in "ab" for step in STEPS]
    sums = schedule_table({("run", "a"): STILL, ("run", "b"): faster}, checkpoints)
    found = predictions(rows, sums)
    for run, schedule in (("a", STILL), ("b", faster)):
        alone = predictions(magnitudes(schedule), sums_of(schedule))
        own = found[found["run"] == run].reset_index(drop=True)
        pd.testing.assert_frame_equal(own.drop(columns="run"), alone.drop(columns="run"), check_dtype=False)
    least = found.groupby("run")["r2"].first().min()
    said = readings(found)["sentence"].item()
    assert said.endswith(f"R² = {least:.2f} without a fit. This R² is the least of 2 runs.")
    one_for_both = schedule_table({("run", run): STILL for run in "ab"}, checkpoints)
    assert readings(predictions(rows, one_for_both)).empty


def test_the_statistics_of_a_panel_are_those_by_hand() -> None:
    rows = full_tuning(STILL, layers=6)
    rows["delta_d"] *= 1 + 0.3 * np.sin(np.arange(len(rows)))
    found = predictions(rows, sums_of(STILL))
    y = found["observed"].to_numpy()
    x = (found["predicted"] / found["fitted"]).to_numpy()
    g = np.linalg.lstsq(x[:, None], y, rcond=None)[0].item()
    assert found["fitted"].unique() == pytest.approx([g])
    assert found["r2"].unique() == pytest.approx([1 - ((y - g * x) ** 2).sum() / ((y - y.mean()) ** 2).sum()])
    assert found["bias"].unique() == pytest.approx([g * x.mean() / y.mean() - 1])
    grid = found.pivot(index="name", columns="step", values=["predicted", "observed"])
    p, o = grid["predicted"].to_numpy(), grid["observed"].to_numpy()
    as_good = [
        (p[list(order)] * o).sum() >= (p * o).sum() - 1e-15 for order in itertools.permutations(range(6))
    ]
    assert found["p_value"].iloc[0] == pytest.approx(np.mean(as_good), abs=0.02)


def test_r2_of_a_law_without_a_fit_may_be_negative() -> None:
    rows = magnitudes(STILL).assign(delta_m=lambda rows: 10 * rows["delta_m"])
    rows["rel_delta_m"] *= 10
    found = predictions(rows, sums_of(STILL))
    assert found["r2"].iloc[0] < 0
    assert readings(found).empty


def test_what_no_law_speaks_of_is_left_out() -> None:
    rows = magnitudes(STILL)
    sums = sums_of(STILL)
    assert predictions(rows.drop(columns="update"), sums).columns.to_list() == list(PREDICTION_COLUMNS)
    assert predictions(rows.drop(columns="base_norm"), sums).empty  # no diagnostics
    assert predictions(rows.assign(base_norm=np.nan), sums).empty
    assert predictions(rows.assign(axis="in"), sums).empty  # m is of outputs
    assert predictions(rows.assign(update_norm=0.0), sums).empty
    assert predictions(rows, None).empty
    assert len(predictions(rows, sums[sums["step"] == 40])) == 8


def test_a_checkpoint_without_a_step_is_the_last_of_its_run() -> None:
    rows = magnitudes(STILL)
    last = rows[rows["step"] == 60].assign(step=pd.array([pd.NA] * 8, dtype="Int64"))
    sums = schedule_table({("run", ""): STILL}, [("run", "", None)])
    assert predictions(last, sums)["predicted"].to_numpy() == pytest.approx(
        predictions(rows, sums_of(STILL)).query("step == 60")["predicted"].to_numpy()
    )


GROWTH = np.arange(1.0, 5.0)


def layers_by_chance(panels: int, layers: int, *, noise: float, shuffle: bool, seed: int) -> pd.DataFrame:
    """Panels in which ΔM grows over steps as predicted; which layer has which prediction may be by chance."""
    rng = np.random.default_rng(seed)
    true = np.exp(0.08 * rng.standard_normal((panels, 1, layers)))
    told = rng.permuted(true, axis=2) if shuffle else true
    seen = GROWTH[:, None] * true * np.exp(noise * rng.standard_normal((panels, len(GROWTH), layers)))
    panel, step, layer = (at.ravel() for at in np.indices(seen.shape))
    fixed = {"method": "run", "axis": "out", "update": "low-rank", "update_norm": 1.0}
    at = {"module": panel.astype(str), "step": step, "layer": layer, "name": layer.astype(str)}
    columns = {"delta_m": seen.ravel(), "centrifugal": (GROWTH[:, None] * told).ravel()}
    return table(pd.DataFrame({**at, **columns, **fixed}))


@pytest.mark.parametrize("layers", [6, 10, 32])
def test_a_law_that_tells_the_layers_by_chance_is_said_to_hold_in_five_percent_at_most(layers: int) -> None:
    """Each panel alone, 400 of them: the steps make an R² over 0.9, whatever the order of the layers."""
    panels = predictions(layers_by_chance(400, layers, noise=0.02, shuffle=True, seed=layers))
    first = panels.groupby("module").first()
    assert (first["r2"] > 0.9).mean() > 0.5
    assert (first["p_value"] <= 0.05).mean() == pytest.approx(0.05, abs=3 * np.sqrt(0.05 * 0.95 / 400))
    assert len(readings(panels.assign(q_value=panels["p_value"]))) <= 0.05 * 400


def test_one_false_sentence_among_many_panels_is_as_rare() -> None:
    made = [layers_by_chance(10, 10, noise=0.02, shuffle=True, seed=seed) for seed in range(100)]
    assert np.mean([len(readings(predictions(metrics))) > 0 for metrics in made]) <= 0.05


def test_a_law_that_holds_is_said_to() -> None:
    found = predictions(layers_by_chance(50, 10, noise=0.03, shuffle=False, seed=0))
    assert len(readings(found)) >= 45
    assert readings(
        predictions(layers_by_chance(5, 5, noise=0.03, shuffle=False, seed=0))
    ).empty  # few layers


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_a_drift_of_magnitudes_is_never_called_a_diffusion(shape: str) -> None:
    """m that moves by the sum of the rates instead of the root of the sum of their squares, however far."""
    schedule = Schedule.named(shape, 2e-3, steps=60)
    diffused, sums = magnitudes(schedule), sums_of(schedule)
    assert len(readings(predictions(diffused, sums))) == 1
    way = diffused["step"].map(dict(zip(sums["step"], sums["s1"], strict=True))).astype(float)
    drifted = way * diffused["delta_m"].mean() / way.mean()
    mean_m0 = diffused["delta_m"] / diffused["rel_delta_m"]
    for far in np.geomspace(0.5, 2, 30):
        rows = diffused.assign(delta_m=far * drifted, rel_delta_m=far * drifted / mean_m0)
        assert readings(predictions(rows, sums)).empty


def test_the_mean_inverse_square_leaves_zero_vectors_out(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    W0 = torch.randn(16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    W0[3] = 0
    paths = (write(tmp_path / f"{at}.safetensors", {name: W}) for at, W in (("base", W0), ("ft", W0 + 0.01)))
    found = wd.compare(*paths, modules="all").metrics.iloc[0]
    m0 = W0.norm(dim=1)
    assert found.mean_inverse_m0_squared == pytest.approx(float((m0[m0 > 0] ** -2).mean()))


def sample(method: str, kind: str) -> pd.DataFrame:
    """A sample's rows, with what predictions read of them by hand where the table lacks it."""
    rows = wd.compare(
        SAMPLES / "base", {method: SAMPLES / method}, modules=["q", "k", "v", "up", "down"]
    ).metrics
    if "update" not in rows:
        rows = rows.assign(update=kind)
    if kind != "low-rank":
        return rows
    base = load_file(SAMPLES / "base" / "model.safetensors")
    steps = {
        step: load_file(SAMPLES / method / f"checkpoint-{step}" / "adapter_model.safetensors")
        for step in rows["step"].unique()
    }
    parts = []
    for at in rows.itertuples():
        A, B = (
            steps[at.step][f"base_model.model.{at.name.removesuffix('weight')}lora_{factor}.weight"].double()
            for factor in "AB"
        )
        w0 = base[at.name].double()
        w = w0 + 2 * B @ A
        parts.append(float((w.norm(dim=1) - (w * w0).sum(1) / w0.norm(dim=1)).mean()))
    return rows.assign(centrifugal=parts)


def predicted_sample(method: str, kind: str) -> pd.DataFrame:
    rows = sample(method, kind)
    schedule = find_schedule(open_series(SAMPLES / method))
    assert schedule is not None
    return predictions(
        rows,
        schedule_table({(method, ""): schedule}, zip(rows["method"], rows["run"], rows["step"], strict=True)),
    )


def r_squared(found: pd.DataFrame) -> float:
    return float(
        1
        - ((found["observed"] - found["predicted"]) ** 2).sum() / (found["observed"].var(ddof=0) * len(found))
    )


def test_the_samples_meet_the_laws_as_the_docs_say() -> None:
    lora, dora, ft = (
        predicted_sample(method, kind)
        for method, kind in (("lora", "low-rank"), ("dora", "dora"), ("ft", "stored"))
    )
    assert r_squared(lora) == pytest.approx(0.97, abs=0.005)
    assert (lora["r2"] > 0.9).all()
    means = dora.groupby("step")[["observed", "predicted"]].mean().reset_index()
    assert r_squared(means) == pytest.approx(0.91, abs=0.005)
    assert (dora["r2"] < 0.5).all()  # layers differ, and the law says that they do not
    by_module = ft.groupby("module")[["fitted", "r2"]].first().round(2)
    assert by_module.loc["v"].to_list() == [0.43, 0.93]
    assert by_module.loc["k"].to_list() == [0.70, 0.48]


def comparison() -> Comparison:
    return Comparison(
        wd.compare(SAMPLES / "base", SAMPLES / "dora", modules=["q"]).metrics.assign(update="dora"),
        schedules=schedule_table({("dora", ""): STILL}, [("dora", "", 20), ("dora", "", 60)]),
    )


def test_schedules_and_predictions_are_saved_and_read_back(tmp_path: Path) -> None:
    made = comparison()
    written = made.save(tmp_path, figures=[], report=False)
    assert {"schedules.csv", "predictions.csv"} <= {path.name for path in written}
    loaded = Comparison.load(tmp_path)
    pd.testing.assert_frame_equal(loaded.schedules, made.schedules, check_exact=True, check_dtype=False)
    pd.testing.assert_frame_equal(loaded.predictions(), made.predictions(), check_exact=True)
    (tmp_path / "schedules.csv").write_text("step\n1\n")
    with pytest.raises(OutputError, match=r"schedules in .* cannot be read"):
        Comparison.load(tmp_path)


def test_a_comparison_finds_its_schedules_or_takes_those_that_are_given(tmp_path: Path) -> None:
    shutil.copytree(SAMPLES / "dora" / "checkpoint-60", tmp_path / "bare" / "checkpoint-60")
    base, dora = SAMPLES / "base", SAMPLES / "dora"
    found = wd.compare(base, {"a": dora, "b": tmp_path / "bare"}, modules=["q"])
    assert found.schedules is not None
    assert found.schedules.columns.to_list() == list(SCHEDULE_COLUMNS)
    assert found.schedules["method"].unique().tolist() == ["a"]
    assert wd.compare(base, tmp_path / "bare", modules=["q"]).schedules is None

    given = wd.compare(base, {"a": dora, "b": tmp_path / "bare"}, modules=["q"], schedule={"b": STILL})
    assert given.schedules["source"].map(lambda source: Path(source).name).unique().tolist() == [
        "losses.csv",
        "given",
    ]
    short = wd.compare(base, dora, modules=["q"], schedule=STILL)
    assert short.schedules["step"].to_list() == [60]
    assert "the schedule of dora ends at step 60: nothing is predicted beyond" in short.warnings
    with pytest.raises(ComparisonError, match="given for c, which is not compared"):
        wd.compare(base, {"a": dora}, modules=["q"], schedule={"c": STILL})


def test_a_decay_that_no_file_tells_is_asked_for(tmp_path: Path) -> None:
    tuned = write_steps(tmp_path / "ft", llama(), steps=(10,))
    base = write(tmp_path / "base.safetensors", llama())
    log = [{"step": step, "learning_rate": 1e-3} for step in (5, 10)]
    state = {"global_step": 10, "max_steps": 10, "log_history": log}
    (tuned / "checkpoint-10" / "trainer_state.json").write_text(json.dumps(state))
    unknown = wd.compare(base, tuned)
    assert any("does not tell the weight decay of ft" in warning for warning in unknown.warnings)
    assert unknown.schedules["kept"].to_list() == [1.0]
    known = wd.compare(base, tuned, weight_decay=0.5)
    assert not known.warnings
    assert known.schedules["kept"].to_list() == pytest.approx([(1 - 0.5e-3) ** 10])

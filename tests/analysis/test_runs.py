"""The mean over runs, and intervals across them, against scipy and against simulated runs whose truth is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy import stats

from wdanalysis.analysis.regression import correlations
from wdanalysis.analysis.runs import (
    across_runs,
    averaged,
    has_runs,
    in_all_runs,
    mean_of_runs,
    of_last_step,
    run_readings,
)

LAYERS, STEPS = 10, 4


def table(runs: int = 3, *, seed: int = 0, method: str = "ft", named: bool = True) -> pd.DataFrame:
    """Rows of one module: ΔM and ΔD of every run, step and layer."""
    rng = np.random.default_rng(seed)
    rows = [
        {
            **{"method": method, "step": step, "layer": layer, "module": "q", "name": f"h.{layer}.q"},
            **{"axis": "out", "run": f"seed-{run}" if named else "", "zero_vectors": run, "vectors": 8},
            **{"delta_d": float(rng.uniform(1, 2) * step), "delta_m": float(rng.uniform(1, 2) * step)},
        }
        for run in range(runs)
        for step in range(1, STEPS + 1)
        for layer in range(LAYERS)
    ]
    types = dict.fromkeys(("step", "layer", "zero_vectors", "vectors"), "Int64")
    return pd.DataFrame(rows).astype(types)


def test_the_mean_is_taken_of_each_matrix_at_each_step() -> None:
    metrics = table()
    mean = averaged(metrics)
    assert not has_runs(mean)
    assert mean[["step", "layer"]].to_numpy().tolist() == table(1)[["step", "layer"]].to_numpy().tolist()
    by_run = [metrics[metrics["run"] == f"seed-{run}"]["delta_m"].to_numpy() for run in range(3)]
    np.testing.assert_allclose(mean["delta_m"], np.mean(by_run, axis=0), rtol=1e-15)
    assert mean["zero_vectors"].eq(2).all()
    assert mean["vectors"].eq(8).all()
    assert mean.dtypes.equals(metrics.dtypes)


def test_a_table_without_runs_is_itself() -> None:
    metrics = table(1, named=False)
    assert averaged(metrics) is metrics
    assert in_all_runs(metrics) is metrics
    assert across_runs(metrics).empty
    assert averaged(metrics.drop(columns="run")) is not None  # a table of an earlier version


def test_a_table_read_from_csv_knows_its_runs(tmp_path: Path) -> None:
    for metrics in (
        table(),
        pd.concat([table(), table(1, method="lora", named=False)]),
        table(1, named=False),
    ):
        metrics.to_csv(tmp_path / "metrics.csv", index=False)
        read = pd.read_csv(tmp_path / "metrics.csv")
        assert has_runs(read) == has_runs(metrics)
        assert len(averaged(read)) == len(averaged(metrics))
        assert len(across_runs(read)) == len(across_runs(metrics))


def test_a_method_with_one_run_beside_one_with_several_stays_as_it_is() -> None:
    alone = table(1, method="lora", named=False)
    mean = averaged(pd.concat([table(), alone], ignore_index=True))
    pd.testing.assert_frame_equal(
        mean[mean["method"] == "lora"].reset_index(drop=True), alone, check_dtype=False
    )
    assert across_runs(pd.concat([table(), alone]))["method"].unique().tolist() == ["ft"]


def test_what_not_all_runs_have_is_in_no_mean() -> None:
    metrics = table()
    cut_short = metrics[~((metrics["run"] == "seed-1") & (metrics["step"] == 4))]
    assert averaged(cut_short)["step"].max() == 3
    assert across_runs(cut_short)["n"].eq(3 * LAYERS).all()


def test_the_last_step_is_the_last_of_all_runs() -> None:
    metrics = table()
    first_run, in_layer_0 = metrics["run"] == "seed-0", metrics["layer"] == 0
    cut_short = metrics[~((metrics["run"] == "seed-1") & (metrics["step"] == 4)) & ~(first_run & in_layer_0)]
    last = of_last_step(pd.concat([cut_short, table(1, method="lora", named=False)]))
    assert last.groupby("method")["step"].unique().map(list).to_dict() == {"ft": [3], "lora": [4]}
    assert last.groupby("run").size().to_dict() == {"": 10, "seed-0": 9, "seed-1": 10, "seed-2": 10}
    unknown = metrics.assign(step=metrics["step"].where(metrics["step"] < 4))
    assert of_last_step(unknown)["step"].isna().all()
    assert len(of_last_step(unknown)) == 3 * LAYERS
    alone = table(1, named=False)
    assert of_last_step(alone)["step"].eq(4).all()


def test_predictions_are_averaged_by_law() -> None:
    told = pd.concat([table(2).assign(law=law, predicted=k) for k, law in ((1.0, "one"), (2.0, "two"))])
    mean = averaged(told)
    assert len(mean) == 2 * LAYERS * STEPS
    assert mean.groupby("law")["predicted"].unique().map(list).to_dict() == {"one": [1.0], "two": [2.0]}


def test_a_value_that_one_run_lacks_is_empty_in_the_mean() -> None:
    metrics = table()
    metrics.loc[0, "delta_m"] = np.nan
    mean = averaged(metrics)
    assert math.isnan(mean["delta_m"].iloc[0])
    assert mean["delta_m"].iloc[1:].notna().all()
    assert mean["delta_d"].notna().all()


def test_matrices_without_layer_or_step_are_averaged_too() -> None:
    metrics = table()
    metrics["layer"], metrics["step"] = pd.array([pd.NA] * len(metrics), "Int64"), metrics["step"]
    assert len(averaged(metrics)) == LAYERS * STEPS
    metrics = metrics[metrics["step"] == 1].assign(step=pd.array([pd.NA] * 3 * LAYERS, "Int64"))
    assert len(averaged(metrics)) == LAYERS


def test_r_and_slope_of_each_run_and_their_intervals_are_scipys() -> None:
    metrics = table(5, seed=3)
    across = across_runs(metrics)
    assert across["run"].tolist() == ["", *(f"seed-{run}" for run in range(5))]
    of_runs = [metrics[metrics["run"] == f"seed-{run}"] for run in range(5)]
    lines = [stats.linregress(own["delta_d"], own["delta_m"]) for own in of_runs]
    np.testing.assert_allclose(across["r_mean"].iloc[1:], [line.rvalue for line in lines], rtol=1e-12)
    np.testing.assert_allclose(across["slope_mean"].iloc[1:], [line.slope for line in lines], rtol=1e-12)
    z, slopes = np.arctanh([line.rvalue for line in lines]), np.array([line.slope for line in lines])
    for values, back, name in ((z, np.tanh, "r"), (slopes, np.asarray, "slope")):
        low, high = stats.t.interval(0.95, 4, loc=values.mean(), scale=stats.sem(values))
        mean = across.iloc[0]
        np.testing.assert_allclose(mean[f"{name}_mean"], back(values.mean()), rtol=1e-12)
        np.testing.assert_allclose([mean[f"{name}_low"], mean[f"{name}_high"]], back([low, high]), rtol=1e-12)
    assert across.loc[0, ["runs", "n", "reason"]].tolist() == [5, LAYERS * STEPS, ""]


def test_under_three_runs_the_reason_stands_instead_of_an_interval() -> None:
    across = across_runs(table(2))
    assert across[["r_low", "r_high", "slope_low", "slope_high"]].isna().all(axis=None)
    assert across["reason"].iloc[0] == "2 runs: an interval asks for 3"
    metrics = table(3)
    metrics.loc[metrics["run"] == "seed-2", "delta_m"] = 1.0
    assert across_runs(metrics)["reason"].iloc[0] == "2 runs, as 1 of 3 have no line: an interval asks for 3"


def test_a_perfect_r_has_no_interval() -> None:
    metrics = table(3)
    metrics["delta_m"] = metrics["delta_d"]
    mean = across_runs(metrics).iloc[0]
    assert mean["r_mean"] == 1
    assert math.isnan(mean["r_low"])
    assert mean["reason"] == "the r of a run is 1 or −1"


def test_correlations_of_the_mean_have_layers_and_steps_as_points() -> None:
    pooled = correlations(averaged(table())).query("scope == 'pooled'")
    assert pooled["n"].tolist() == [LAYERS * STEPS]


def test_the_sentence_gives_the_interval_or_every_run() -> None:
    (sentence,) = run_readings(across_runs(table(4)))["sentence"]
    mean = across_runs(table(4)).iloc[0]
    assert sentence.startswith(f"Over 4 runs r is {mean['r_mean']:+.2f}, 95 % ")
    (sentence,) = run_readings(across_runs(table(2)))["sentence"]
    assert "(2 runs: an interval asks for 3)" in sentence
    opposed = table(3)
    opposed.loc[opposed["run"] == "seed-0", "delta_m"] *= -1
    assert (
        run_readings(across_runs(opposed))["sentence"].iloc[0].endswith("its sign differs from run to run.")
    )


def simulated_r(
    experiments: int, runs: int, kind: str, rng: np.random.Generator, between: float = 0.5
) -> NDArray[np.float64]:
    """R of every run of many experiments, experiments × runs.

    All runs share the layers of their base; a run has a slope of its own, and noise that goes on along its steps.
    """
    layers = np.linspace(-1, 1, LAYERS)[:, None]
    time = np.arange(1, STEPS + 1)
    shape = (experiments, runs, LAYERS, STEPS)
    if kind == "heavy-tailed":
        own = rng.standard_t(3, size=shape[:2]) / math.sqrt(3)
    elif kind == "skewed":
        own = rng.exponential(size=shape[:2]) - 1
    else:
        own = rng.normal(size=shape[:2])
    walk = rng.normal(size=(2, *shape)).cumsum(-1) / 3
    x = time * np.exp(0.4 * layers) + walk[0]
    trend = time if kind == "trended" else 0
    slope, of_layer = (0.0, 0.0) if kind == "nothing" else (0.5, 3 * layers)
    y = trend + (slope + between * own)[..., None, None] * x + of_layer + walk[1] + rng.normal(size=shape) / 3
    x, y = (v.reshape(experiments, runs, -1) for v in (x, y))
    x, y = (v - v.mean(-1, keepdims=True) for v in (x, y))
    r: NDArray[np.float64] = (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return r


def coverage(r: NDArray[np.float64], truth: float) -> float:
    held = [low <= truth <= high for _, low, high in (mean_of_runs(own, of_correlations=True) for own in r)]
    return float(np.mean(held))


@pytest.mark.parametrize("runs", [3, 5, 10])
@pytest.mark.parametrize("kind", ["independent", "trended", "heavy-tailed"])
def test_intervals_across_runs_cover_what_they_say(kind: str, runs: int) -> None:
    rng = np.random.default_rng(runs)
    truth = math.tanh(np.arctanh(simulated_r(20_000, 1, kind, rng)).mean())
    assert 0.92 <= coverage(simulated_r(2_000, runs, kind, rng), truth) <= 0.97


@pytest.mark.parametrize(("between", "most"), [(0.1, 0.06), (0.5, 0.08)])
@pytest.mark.parametrize("runs", [3, 5])
def test_an_interval_excludes_zero_in_one_of_twenty_where_there_is_nothing(
    runs: int, between: float, most: float
) -> None:
    """R is as often above zero as below; with slopes that differ much it is near 1 or −1, which is not normal."""
    r = simulated_r(4_000, runs, "nothing", np.random.default_rng(1), between)
    excluded = [
        low > 0 or high < 0 for _, low, high in (mean_of_runs(own, of_correlations=True) for own in r)
    ]
    assert 0.03 <= np.mean(excluded) <= most

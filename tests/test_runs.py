"""Several runs of one method, from their folders to tables, sentences and figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from checkpoint_files import llama, moved, write, write_lora, write_model, write_steps
from scipy import stats

import wdanalysis as wd
from wdanalysis.errors import CheckpointError

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


METHODS, SEEDS = ("FT", "LoRA"), ("seed-0", "seed-1")
RATES = {"seed-0": 1e-3, "seed-1": 4e-3}
WANTED: dict[str, Any] = {"spectra": True, "geometry": True, "vectors": True}


def tell_rates(folder: Path, run: str) -> None:
    """What a trainer leaves beside the checkpoints of a run: transformers in the last, this project above them."""
    if folder.parent.name == "FT":
        log = [{"step": step, "learning_rate": RATES[run] / step} for step in STEPS]
        state = {"global_step": STEPS[-1], "max_steps": STEPS[-1], "log_history": log}
        (folder / f"checkpoint-{STEPS[-1]}" / "trainer_state.json").write_text(json.dumps(state))
    else:
        settings = {"steps": STEPS[-1], "weight_decay": 100 * RATES[run]}
        (folder / "training.json").write_text(json.dumps({"settings": settings}))
        rows = [f"{step},{RATES[run]}" for step in range(1, STEPS[-1] + 1)]
        (folder / "losses.csv").write_text("\n".join(["step,learning_rate", *rows]))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base.safetensors`, and two runs each of full tuning and of LoRA, with schedules of their own."""
    folder = tmp_path_factory.mktemp("several")
    base = llama(layers=LAYERS, size=12)
    write(folder / "base.safetensors", base)
    for seed, run in enumerate(SEEDS):
        for step in STEPS:
            number = 100 * seed + step
            ft = moved(base, size=step / 1000, seed=number)
            write_model(folder / "FT" / run / f"checkpoint-{step}", ft)
            write_lora(folder / "LoRA" / run / f"checkpoint-{step}", base, seed=number)
        for method in METHODS:
            tell_rates(folder / method / run, run)
    return folder


@pytest.fixture(scope="module")
def whole(several: Path) -> wd.Comparison:
    return wd.compare(several / "base.safetensors", [several / method for method in METHODS], **WANTED)


@pytest.fixture(scope="module", params=SEEDS)
def one_run(several: Path, request: pytest.FixtureRequest) -> tuple[str, wd.Comparison]:
    """A run of each method, compared by itself."""
    run = str(request.param)
    paths = {method: several / method / run for method in METHODS}
    return run, wd.compare(several / "base.safetensors", paths, **WANTED)


def tables(comparison: wd.Comparison) -> dict[str, pd.DataFrame]:
    assert comparison.spectra is not None
    assert comparison.geometry is not None
    assert comparison.vectors is not None
    assert comparison.schedules is not None
    return {
        "metrics": comparison.metrics,
        "spectra": comparison.spectra.matrices,
        "geometry": comparison.geometry,
        "vectors": comparison.vectors.read(),
        "schedules": comparison.schedules,
        "predictions": comparison.predictions().drop(columns="q_value"),  # over the panels that there are
    }


def test_every_table_of_several_runs_is_that_of_each_by_itself(
    whole: wd.Comparison, one_run: tuple[str, wd.Comparison]
) -> None:
    run, by_itself = one_run
    for (name, of_all), alone in zip(tables(whole).items(), tables(by_itself).values(), strict=True):
        assert set(of_all["run"]) == set(SEEDS), name
        assert set(alone["run"]) == {""}, name
        own = of_all[of_all["run"] == run].reset_index(drop=True).drop(columns="run")
        pd.testing.assert_frame_equal(
            own, alone.drop(columns="run"), check_exact=True, check_categorical=False
        )


def test_updates_are_compared_between_methods_and_between_runs(
    whole: wd.Comparison, one_run: tuple[str, wd.Comparison]
) -> None:
    run, by_itself = one_run
    assert whole.spectra is not None
    assert by_itself.spectra is not None
    similarity, ends = whole.spectra.similarity, ["run_a", "run_b"]
    own = similarity[similarity[ends].eq(run).all(axis=1)].reset_index(drop=True)
    expected = by_itself.spectra.similarity
    pd.testing.assert_frame_equal(own.drop(columns=ends), expected.drop(columns=ends), check_exact=True)
    pairs = similarity[["method_a", "run_a", "method_b", "run_b"]].drop_duplicates()
    assert len(pairs) == 6
    assert (pairs["method_a"] == pairs["method_b"]).sum() == 2


def test_each_run_is_predicted_from_its_own_schedule(whole: wd.Comparison) -> None:
    assert whole.schedules is not None
    last = whole.schedules[whole.schedules["step"] == STEPS[-1]].set_index(["method", "run"])
    for run, rate in RATES.items():
        assert last.loc[("LoRA", run), "s1"] == pytest.approx(STEPS[-1] * rate)
        assert last.loc[("LoRA", run), "lr_wd"] == pytest.approx(STEPS[-1] * rate * 100 * rate)
        assert all(f"/{run}/" in source for source in last.xs(run, level="run")["source"])
    ratio = last.loc[("FT", "seed-1"), "diffusion"] / last.loc[("FT", "seed-0"), "diffusion"]
    assert ratio == pytest.approx((RATES["seed-1"] / RATES["seed-0"]) ** 2)
    (warning,) = (text for text in whole.warnings if "weight decay of FT, seed-1" in text)
    assert "/FT/seed-1/" in warning


def test_a_schedule_is_never_that_of_another_run(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", llama())
    for name in ("known", "unknown"):
        write_steps(tmp_path / name / "FT", llama(), steps=STEPS)
    log = [{"step": step, "learning_rate": 1e-3} for step in STEPS]
    (tmp_path / "known" / "FT" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    paths = [tmp_path / name / "FT" for name in ("known", "unknown")]
    found = wd.compare(base, {"FT": paths}).schedules
    assert found is not None
    assert found["run"].unique().tolist() == ["known"]
    given = wd.Schedule.named("constant", 1e-3, steps=STEPS[-1])
    both = wd.compare(base, {"FT": paths}, schedule=given).schedules
    assert both is not None
    assert both["run"].unique().tolist() == ["known", "unknown"]


def test_the_folder_keeps_what_each_run_did(whole: wd.Comparison, tmp_path: Path) -> None:
    written = {path.name for path in whole.save(tmp_path, figures=["prediction", "density"], report=False)}
    assert {"prediction_q.png", "density_q.png"} <= written
    loaded = wd.Comparison.load(tmp_path)
    for (name, saved), kept in zip(tables(loaded).items(), tables(whole).values(), strict=True):
        pd.testing.assert_frame_equal(saved, kept, check_exact=True, check_dtype=False, obj=name)
    assert loaded.spectra is not None
    assert whole.spectra is not None
    pd.testing.assert_frame_equal(loaded.spectra.similarity, whole.spectra.similarity, check_dtype=False)
    of_one = loaded.vectors.read("LoRA", run="seed-1", step=STEPS[0], module="v", layer=2)  # type: ignore[union-attr]
    assert of_one["vector"].tolist() == list(range(12))


def test_figures_draw_each_run_faintly_and_the_mean_strongly(whole: wd.Comparison) -> None:
    predictions = whole.predictions().query("module == 'q' and method == 'LoRA'")
    panel = next(axes for axes in whole.prediction("q").axes if axes.get_title(loc="left") == "LoRA")
    *runs, mean = panel.collections
    assert [len(points.get_offsets()) for points in (*runs, mean)] == [LAYERS * len(STEPS)] * 3
    assert [points.get_alpha() for points in (*runs, mean)] == [0.22, 0.22, None]
    own = [of_run[["predicted", "observed"]].to_numpy() for _, of_run in predictions.groupby("run")]
    np.testing.assert_allclose(mean.get_offsets(), np.mean(own, axis=0), rtol=1e-12)
    low, high = (f"{r2:.2f}".replace("-", "−") for r2 in sorted(predictions.groupby("run")["r2"].first()))
    assert f"R² = {low} … {high},  n = {LAYERS * len(STEPS)}" in "".join(t.get_text() for t in panel.texts)
    density = whole.density("q")
    assert "of 2 runs" in "".join(text.get_text() for axes in density.axes for text in axes.texts)


def test_every_kind_of_figure_gets_the_tables_that_it_shows(whole: wd.Comparison) -> None:
    from wdanalysis.figures.kinds import KINDS

    assert {name for kind in KINDS.values() for name in (kind.table, *kind.beside)} <= set(whole._tables())


def test_the_page_has_each_run(whole: wd.Comparison, compared: wd.Comparison, several: Path) -> None:
    pytest.importorskip("bokeh", reason="the report needs the extra 'report'")
    from wdanalysis.report import content
    from wdanalysis.report.page import render

    found = content.data(whole._findings, whole.run, whole.spectra, whole.geometry)["tables"]

    def names(table: str) -> list[str]:
        return [column["name"] for column in found[table]["columns"]]

    assert found["runs"]["rows"] == len(whole.across_runs())
    for table in ("runs", "inputs", "predictions", "spectra", "geometry"):
        assert "run" in names(table), table
    assert {"run_a", "run_b"} <= set(names("similarity"))
    assert found["metrics"]["rows"] == len(whole.metrics) / 2
    page = render(whole._findings, whole.run, whole.spectra, whole.geometry)
    assert 'data-table="runs"' in page
    assert "metrics-means.csv" in page
    alone = wd.compare(several / "base.safetensors", several / "FT" / "seed-0")
    assert 'data-table="runs"' not in render(alone._findings, alone.run)
    for made in (content.inputs(alone.run), content.skipped(alone.run)):
        assert "run" not in made


def test_what_was_left_out_of_a_run_is_named_with_it_on_the_page(tmp_path: Path) -> None:
    from wdanalysis.report import content

    base = write(tmp_path / "base.safetensors", llama())
    part = {name: weight for name, weight in moved(llama()).items() if "layers.1.self_attn.q" not in name}
    runs = [write_model(tmp_path / "seed-0", moved(llama())), write_model(tmp_path / "seed-1", part)]
    compared = wd.compare(base, {"FT": runs})
    skipped = content.data(compared._findings, compared.run)["tables"]["skipped"]
    (run,) = (column for column in skipped["columns"] if column["name"] == "run")
    assert run["levels"] == ["seed-1"]

"""Live measurements: those that `compare` makes of a checkpoint of the same step, without any checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from equations import tuned_weight
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_llama import model_folder, quick, text_file, tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import wdanalysis as wd
from wdanalysis.comparison import redraw
from wdanalysis.decomposition import Axis
from wdanalysis.errors import OutputError, TrainingError
from wdanalysis.training.data.batches import Collator, load_data
from wdanalysis.training.injection import AdapterConfig, inject
from wdanalysis.training.layers import adapted_modules
from wdanalysis.training.live import WeightDecompositionCallback
from wdanalysis.training.run.loop import TrainingInterrupted, train
from wdanalysis.training.run.plan import TrainingPlan

METRICS = ["delta_m", "delta_d", "delta_m_signed", "rel_delta_m", "update_norm", "rel_update_norm"]


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with quick():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live")
    model_folder(folder / "base")
    text_file(folder / "text.txt", words=115)
    return folder


@pytest.fixture
def plan(folder: Path) -> TrainingPlan:
    return TrainingPlan(
        model=str(folder / "base"),
        data=(folder / "text.txt",),
        rank=2,
        learning_rate=1e-2,
        steps=4,
        batch_size=2,
        max_length=32,
        eval_fraction=0.0,
    )


def plain_trainer(model: nn.Module, folder: Path, out: Path, *callbacks: TrainerCallback) -> Trainer:
    """A training script that knows nothing of ours but the callback."""
    data = load_data([folder / "text.txt"], tokenizer(), max_length=32)
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=4, save_steps=2, learning_rate=1e-2, per_device_train_batch_size=2,
        report_to="none", disable_tqdm=True, logging_steps=2,
    )  # fmt: skip
    return Trainer(model, arguments, Collator(0), data.train, callbacks=list(callbacks))


def assert_same_numbers(live: pd.DataFrame, compared: pd.DataFrame) -> None:
    keys = ["step", "layer", "module", "name", "axis"]
    pd.testing.assert_frame_equal(live[keys], compared[keys])
    for column in METRICS:
        np.testing.assert_allclose(live[column], compared[column], rtol=1e-5, err_msg=column)


@pytest.mark.parametrize("method", ["ft", "lora", "dora", "vera", "dvora"])
def test_live_numbers_are_those_of_checkpoints(plan: TrainingPlan, tmp_path: Path, method: str) -> None:
    axes: tuple[Axis, ...] = ("out", "in")
    watched: dict[str, Any] = {"every": 2, "modules": "q,v"}
    live = [WeightDecompositionCallback(tmp_path / axis, axis=axis, **watched) for axis in axes]
    (run,) = train(replace(plan, methods=(method,)), tmp_path / "run", callbacks=live)
    for axis in axes:
        saved = wd.Comparison.load(tmp_path / axis).metrics
        compared = wd.compare(plan.model or "", {method: run.folder}, modules="q,v", axis=axis, steps=[2, 4])
        assert saved["method"].unique().tolist() == [method]
        assert_same_numbers(saved, compared.metrics)


@pytest.mark.parametrize("method", ["lora", "dora", "dvora"])
@pytest.mark.parametrize("trained_axis", ["out", "in"])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_adapters_are_measured_as_eq_3_and_4_of_their_weight(
    folder: Path, method: str, trained_axis: Any, axis: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    inject(model, AdapterConfig(method, rank=2, axis=trained_axis, magnitude_targets=None))
    torch.manual_seed(0)
    for module in adapted_modules(model).values():
        for parameter in module.trained():
            nn.init.normal_(parameter, 0.0, 0.1)
        if module.magnitude is not None:
            nn.init.uniform_(module.magnitude, 0.05, 0.15)
    rows = WeightDecompositionCallback(axis=axis).measure(model, 1)
    assert len(rows) == 4
    for row in rows.itertuples():
        tuned = tuned_weight(adapted_modules(model)[row.name.removesuffix(".weight")])
        assert row.delta_m == pytest.approx(wd.delta_m(base[row.name], tuned, axis), rel=1e-5)
        assert row.delta_d == pytest.approx(wd.delta_d(base[row.name], tuned, axis), rel=1e-5)


def test_a_plain_trainer_needs_nothing_else_of_ours(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    live = WeightDecompositionCallback(tmp_path / "live", every=2)
    plain_trainer(model, folder, tmp_path / "out", live).train()
    compared = wd.compare(folder / "base", {"ft": tmp_path / "out"}).metrics
    assert live.metrics["module"].unique().tolist() == ["q", "k", "v", "o"]
    assert_same_numbers(live.metrics, compared)
    assert redraw(tmp_path / "live", figures=["trajectory"])


@pytest.mark.parametrize("use_dora", [False, True])
def test_it_measures_peft_models(folder: Path, tmp_path: Path, use_dora: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=use_dora, task_type="CAUSAL_LM")
    live = WeightDecompositionCallback(every=2)
    plain_trainer(get_peft_model(model, config), folder, tmp_path, live).train()
    name = "dora" if use_dora else "lora"
    assert_same_numbers(live.metrics, wd.compare(folder / "base", {name: tmp_path}).metrics)
    assert live.metrics["method"].unique().tolist() == [name]


def test_the_means_of_each_module_go_to_the_trainers_loggers(folder: Path, tmp_path: Path) -> None:
    class Logger(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[dict[str, float]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.seen.append(dict(logs))

    logger, live = Logger(), WeightDecompositionCallback(every=2, modules="q")
    trainer = plain_trainer(
        AutoModelForCausalLM.from_pretrained(folder / "base"), folder, tmp_path, logger, live
    )
    live.log_to(trainer)
    trainer.train()
    rows = live.metrics
    expected = [rows[rows["step"] == step]["delta_d"].mean() for step in (2, 4)]
    assert [entry["delta_d/q"] for entry in logger.seen if "delta_d/q" in entry] == pytest.approx(expected)
    assert sum("loss" in entry for entry in logger.seen) == 2  # the training loss is logged as before


def test_without_a_logger_the_means_are_in_the_history(folder: Path, tmp_path: Path) -> None:
    live = WeightDecompositionCallback(every=3, modules="v")
    trainer = plain_trainer(AutoModelForCausalLM.from_pretrained(folder / "base"), folder, tmp_path, live)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "delta_m/v" in entry] == [3, 4]


def test_full_tuning_keeps_a_copy_of_the_watched_matrices_alone(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    live = WeightDecompositionCallback(modules="q")
    live.measure(model, 0)
    assert live.nbytes == 2 * 16 * 16 * 4
    inject(model, AdapterConfig("lora"))
    adapters = WeightDecompositionCallback()
    adapters.measure(model, 0)
    assert adapters.nbytes == 0


def test_an_update_of_nothing_measures_zero(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    inject(model, AdapterConfig("dora"))
    rows = WeightDecompositionCallback().measure(model, 0)
    assert rows["delta_d"].eq(0).all()
    assert rows["delta_m"].max() < 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ft", "dora"])
def test_a_resumed_run_goes_on_with_its_table_and_its_base(
    plan: TrainingPlan, tmp_path: Path, method: str
) -> None:
    class Stop(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    plan = replace(plan, methods=(method,), save_steps=2)
    train(plan, tmp_path / "whole", live_every=1)
    with pytest.raises(TrainingInterrupted):
        train(plan, tmp_path / "cut", live_every=1, callbacks=[Stop()])
    train(plan, tmp_path / "cut", live_every=1, resume=True)
    whole, cut = (wd.Comparison.load(tmp_path / run / method / "live").metrics for run in ("whole", "cut"))
    pd.testing.assert_frame_equal(whole, cut)
    assert cut["step"].unique().tolist() == [1, 2, 3, 4]


def last_step_by_definition(folder: Path, out: Path) -> dict[str, tuple[float, float]]:
    """ΔM and ΔD of each query projection at step 4 in float64, of the saved weights."""
    base, tuned = (load_file(path / "model.safetensors") for path in (folder / "base", out / "checkpoint-4"))
    names = [name for name in base if name.endswith("q_proj.weight")]
    return {n: (float(wd.delta_m(base[n], tuned[n])), float(wd.delta_d(base[n], tuned[n]))) for n in names}


def resumed(folder: Path, out: Path, added: WeightDecompositionCallback) -> Trainer:
    """A script that was interrupted at step 2, and in which README's callback is added on resuming."""
    trainer = plain_trainer(AutoModelForCausalLM.from_pretrained(folder / "base"), folder, out)
    trainer.add_callback(added)
    return trainer


def assert_last_step_is(rows: pd.DataFrame, expected: dict[str, tuple[float, float]]) -> None:
    last = rows[rows["step"] == 4].set_index("name")
    assert last.index.tolist() == list(expected)
    for name, (delta_m, delta_d) in expected.items():
        assert last.loc[name, "delta_m"] == pytest.approx(delta_m, rel=1e-6)
        assert last.loc[name, "delta_d"] == pytest.approx(delta_d, rel=1e-6)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def start(folder: Path, out: Path, *callbacks: TrainerCallback) -> None:
    """The first two of four steps, with the callbacks added as README does."""
    trainer = plain_trainer(AutoModelForCausalLM.from_pretrained(folder / "base"), folder, out, StopAt(2))
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()


def test_a_resumed_full_tuning_takes_the_base_that_its_folder_keeps(folder: Path, tmp_path: Path) -> None:
    start(folder, tmp_path, WeightDecompositionCallback(tmp_path / "live", every=1, modules="q"))
    live = WeightDecompositionCallback(tmp_path / "live", every=1, modules="q")
    resumed(folder, tmp_path, live).train(resume_from_checkpoint=True)
    assert live.metrics["step"].unique().tolist() == [1, 2, 3, 4]
    assert live.nbytes == 0
    assert_last_step_is(live.metrics, last_step_by_definition(folder, tmp_path))


def test_a_resumed_full_tuning_takes_the_base_that_it_is_given(folder: Path, tmp_path: Path) -> None:
    start(folder, tmp_path)
    live = WeightDecompositionCallback(every=4, modules="q", base=folder / "base")
    resumed(folder, tmp_path, live).train(resume_from_checkpoint=True)
    assert_last_step_is(live.metrics, last_step_by_definition(folder, tmp_path))


def test_a_resumed_full_tuning_without_a_base_is_refused(folder: Path, tmp_path: Path) -> None:
    start(folder, tmp_path)
    trainer = resumed(folder, tmp_path, WeightDecompositionCallback(tmp_path / "live", modules="q"))
    with pytest.raises(TrainingError, match="resumed from a checkpoint and its base is not kept") as error:
        trainer.train(resume_from_checkpoint=True)
    assert error.value.parameter == "base"


def test_so_is_a_model_that_was_loaded_from_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    start(folder, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    with pytest.raises(TrainingError, match=r"loaded from .*checkpoint-2 and its base is not kept") as error:
        plain_trainer(model, folder, tmp_path, WeightDecompositionCallback(modules="q"))
    assert error.value.parameter == "base"
    rows = WeightDecompositionCallback(modules="q", base=folder / "base").measure(model, 2)
    assert rows["delta_d"].gt(1e-5).all()
    of_another = model_folder(tmp_path / "another", width=32)
    with pytest.raises(TrainingError, match=r"has .* as \(32, 32\), and the model in training as \(16, 16\)"):
        WeightDecompositionCallback(modules="q", base=of_another).measure(model, 2)


def test_adapters_need_no_base_when_they_are_resumed(folder: Path, tmp_path: Path) -> None:
    def adapted() -> nn.Module:
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        return get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)

    plain_trainer(adapted(), folder, tmp_path, StopAt(2)).train()
    live = WeightDecompositionCallback(every=2)
    trainer = plain_trainer(adapted(), folder, tmp_path)
    trainer.add_callback(live)
    trainer.train(resume_from_checkpoint=True)
    compared = wd.compare(folder / "base", {"lora": tmp_path}).metrics
    assert_same_numbers(live.metrics, compared[compared["step"] == 4].reset_index(drop=True))


def test_modules_that_are_not_trained_are_an_error(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    with pytest.raises(TrainingError, match=r"selects none of the .* trained matrices"):
        WeightDecompositionCallback(modules="nothing").measure(model, 0)
    with pytest.raises(TrainingError, match="no matrix of the model is trained"):
        WeightDecompositionCallback().measure(model.requires_grad_(False), 0)
    with pytest.raises(TrainingError, match="at least 1"):
        WeightDecompositionCallback(every=0)


def test_a_table_of_another_run_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    def run() -> None:
        live = WeightDecompositionCallback(tmp_path / "live", every=4, modules="q")
        plain_trainer(AutoModelForCausalLM.from_pretrained(folder / "base"), folder, tmp_path, live).train()

    run()
    with pytest.raises(OutputError, match="already holds results"):
        run()

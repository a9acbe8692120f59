"""A run: the same batches for every method, checkpoints that others load, and the same end after an interruption."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_llama import WORDS, instruction_file, model_folder, quick, text_file
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from wdanalysis.errors import OutputError, TrainingError
from wdanalysis.training.data.batches import load_data
from wdanalysis.training.peft_folder import load_adapter
from wdanalysis.training.run.curves import losses
from wdanalysis.training.run.folder import RunFolder
from wdanalysis.training.run.loop import MethodRun, TrainingInterrupted, train
from wdanalysis.training.run.model import load_model, load_tokenizer
from wdanalysis.training.run.plan import TrainingPlan
from wdanalysis.training.run.trainer import MethodTrainer, saved_steps

Batches = dict[str, list[dict[str, Tensor]]]

PROBE = torch.arange(1, 33).reshape(2, 16)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> TrainingPlan:
    """Six steps on a tiny model; an epoch has five, so that a run crosses from one to the next."""
    folder = tmp_path_factory.mktemp("run")
    return TrainingPlan(
        methods=("lora",),
        model=str(model_folder(folder / "base")),
        data=(text_file(folder / "text.txt", words=115),),
        rank=2,
        learning_rate=1e-2,
        steps=6,
        batch_size=2,
        accumulation=2,
        max_length=32,
        eval_fraction=0.0,
    )


class StopAt(TrainerCallback):
    """Ctrl-C in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with quick():
        yield


@pytest.fixture(scope="module")
def runs(plan: TrainingPlan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, MethodRun]:
    """Four steps of each method that PEFT knows; not to be changed."""
    out = tmp_path_factory.mktemp("runs")
    return {run.method: run for run in train(replace(plan, methods=("lora", "dora", "vera"), steps=4), out)}


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    """Every batch that a method is trained on, in order."""
    seen: Batches = {}
    original: Callable[..., Tensor] = MethodTrainer.training_step

    def spied(self: MethodTrainer, model: Any, inputs: Any, *rest: Any, **kwargs: Any) -> Tensor:
        seen.setdefault(Path(str(self.args.output_dir)).name, []).append({**inputs})
        return original(self, model, inputs, *rest, **kwargs)

    monkeypatch.setattr(MethodTrainer, "training_step", spied)
    return seen


def last_step(folder: Path) -> int:
    checkpoint = RunFolder(folder).last_checkpoint()
    assert checkpoint is not None
    return int(checkpoint.name.removeprefix("checkpoint-"))


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(PROBE).logits
    return result


def base_model(plan: TrainingPlan) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(plan.model)


def weights(folder: Path) -> dict[str, Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def test_checkpoints_are_saved_at_four_even_steps_or_each_so_many_and_always_at_the_last() -> None:
    assert saved_steps(400, every=None, checkpoints=4) == [100, 200, 300, 400]
    assert saved_steps(10, every=None, checkpoints=4) == [3, 5, 8, 10]
    assert saved_steps(3, every=None, checkpoints=4) == [1, 2, 3]
    assert saved_steps(10, every=4, checkpoints=4) == [4, 8, 10]
    assert saved_steps(8, every=4, checkpoints=4) == [4, 8]


def test_all_methods_see_the_same_batches_in_the_same_order(
    plan: TrainingPlan, tmp_path: Path, batches: Batches
) -> None:
    methods = ("ft", "lora", "dora", "vera", "dvora")
    train(replace(plan, methods=methods, steps=6, dropout=0.1, save_steps=6), tmp_path)
    assert list(batches) == list(methods)
    tokens = {method: [batch["input_ids"] for batch in seen] for method, seen in batches.items()}
    for method in methods:
        assert len(tokens[method]) == len(tokens["ft"])
        assert all(map(torch.equal, tokens["ft"], tokens[method]))
    assert len({tuple(batch.flatten().tolist()) for batch in tokens["ft"]}) == len(tokens["ft"])


def test_full_tuning_is_adamw_on_the_batches_it_saw(
    plan: TrainingPlan, tmp_path: Path, batches: Batches
) -> None:
    plan = replace(plan, methods=("ft",), steps=3, accumulation=1, learning_rate=1e-3, weight_decay=0.1)
    train(plan, tmp_path)
    model = base_model(plan).train()
    decayed = [p for n, p in model.named_parameters() if "norm" not in n]
    others = [p for n, p in model.named_parameters() if "norm" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    )
    for step, batch in enumerate(batches["ft"]):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (3 - step) / 3
        logits = model(batch["input_ids"]).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "ft" / "checkpoint-3")
    for ours, plain in zip(tuned.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_peft_loads_a_checkpoint_with_the_same_outputs(
    plan: TrainingPlan, runs: dict[str, MethodRun], method: str
) -> None:
    run = runs[method]
    assert [path.name for path in run.checkpoints] == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    ours = base_model(plan)
    load_adapter(ours, run.checkpoints[-1])
    theirs = PeftModel.from_pretrained(base_model(plan), run.checkpoints[-1])
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)
    assert (logits(theirs) - logits(base_model(plan))).abs().max() > 1e-3


@pytest.mark.parametrize(("method", "stop"), [("ft", 3), ("dora", 3), ("dvora", 5)])
def test_a_resumed_run_ends_with_the_same_bits_as_one_that_was_not_interrupted(
    plan: TrainingPlan, tmp_path: Path, method: str, stop: int
) -> None:
    plan = replace(plan, methods=(method,), dropout=0.2, save_steps=2)
    (whole,) = train(plan, tmp_path / "whole")
    with pytest.raises(TrainingInterrupted):
        train(plan, tmp_path / "cut", callbacks=[StopAt(stop)])
    assert last_step(tmp_path / "cut" / method) == stop - 1
    (resumed,) = train(plan, tmp_path / "cut", resume=True)
    for name, tensor in weights(whole.checkpoints[-1]).items():
        assert torch.equal(tensor, weights(resumed.checkpoints[-1])[name]), name
    pd.testing.assert_frame_equal(whole.losses, resumed.losses, check_exact=True)


def test_resuming_leaves_a_finished_method_and_starts_one_that_was_not_begun(
    plan: TrainingPlan, tmp_path: Path, batches: Batches
) -> None:
    train(replace(plan, steps=1), tmp_path)
    batches.clear()
    runs = train(replace(plan, steps=1, methods=("lora", "ft")), tmp_path, resume=True)
    assert list(batches) == ["ft"]
    assert [run.losses["step"].max() for run in runs] == [1, 1]


def test_a_checkpoint_that_was_cut_short_is_not_resumed_from(plan: TrainingPlan, tmp_path: Path) -> None:
    plan = replace(plan, steps=2)
    (whole,) = train(plan, tmp_path)
    (whole.checkpoints[-1] / "trainer_state.json").write_text('{"global_st')
    assert last_step(whole.folder) == 1
    (again,) = train(plan, tmp_path, resume=True)
    assert [path.name for path in again.checkpoints] == ["checkpoint-1", "checkpoint-2"]


def test_a_folder_that_holds_a_run_is_refused_and_stays_as_it_is(
    plan: TrainingPlan, runs: dict[str, MethodRun]
) -> None:
    plan = replace(plan, steps=4)
    out = runs["lora"].folder.parent
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match="already holds a run"):
        train(plan, out)
    for other, setting in [({"rank": 1}, "rank"), ({"seed": 1}, "seed"), ({"steps": 5}, "steps")]:
        with pytest.raises(TrainingError, match=f"holds another run: its {setting} is"):
            train(replace(plan, **other), out, resume=True)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_other_data_under_the_same_name_is_another_run(plan: TrainingPlan, tmp_path: Path) -> None:
    plan = replace(plan, steps=1, data=(text_file(tmp_path / "text.txt"),))
    train(plan, tmp_path / "out")
    text_file(tmp_path / "text.txt", words=601)
    with pytest.raises(TrainingError, match="holds another run"):
        train(plan, tmp_path / "out", resume=True)


def test_a_loss_that_becomes_nan_stops_the_run_and_keeps_the_last_good_checkpoint(
    plan: TrainingPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Callable[..., Tensor] = MethodTrainer.compute_loss

    def diverging(self: MethodTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        return loss * math.nan if self.state.global_step == 3 else loss

    monkeypatch.setattr(MethodTrainer, "compute_loss", diverging)
    with pytest.raises(TrainingError, match=r"became NaN at step 4; .*checkpoint-3 is kept"):
        train(plan, tmp_path)
    assert last_step(tmp_path / "lora") == 3
    assert (tmp_path / "lora" / "losses.csv").is_file()


def test_weights_that_are_not_finite_are_never_saved(
    plan: TrainingPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Break(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                next(p for p in kwargs["model"].parameters() if p.requires_grad).data[0] = math.inf

    with pytest.raises(TrainingError, match=r"no longer finite after step 3; .*checkpoint-2 is kept"):
        train(plan, tmp_path, callbacks=[Break()])


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(plan: TrainingPlan, tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted, match=r"after step 3; .*checkpoint-3 is kept: resume it"):
        train(plan, tmp_path, callbacks=[StopAt(3)])
    with pytest.raises(TrainingInterrupted, match="no checkpoint was written yet"):
        train(plan, tmp_path / "early", callbacks=[StopAt(0)])


def test_the_held_out_loss_is_the_mean_over_its_tokens(plan: TrainingPlan, tmp_path: Path) -> None:
    plan = replace(plan, steps=1, batch_size=1, eval_fraction=0.2)
    (run,) = train(plan, tmp_path)
    held_out = load_data(
        plan.data, load_tokenizer(plan), max_length=plan.max_length, eval_fraction=plan.eval_fraction
    ).held_out
    assert held_out is not None
    model = base_model(plan).eval()
    with torch.no_grad():
        values = [
            model(item["input_ids"][None], labels=item["input_ids"][None]).loss for item in _items(held_out)
        ]
    table = run.losses.set_index("step")
    assert table.loc[0, "held_out_loss"] == pytest.approx(float(torch.stack(values).mean()), rel=1e-5)
    assert math.isnan(table.loc[0, "loss"])


def test_training_lowers_both_losses_and_writes_them(plan: TrainingPlan, tmp_path: Path) -> None:
    (run,) = train(replace(plan, steps=20, methods=("ft",), eval_fraction=0.1), tmp_path)
    held_out = run.losses["held_out_loss"].dropna()
    assert held_out.iloc[-1] < held_out.iloc[0] - 0.1
    assert run.losses["loss"].iloc[-1] < run.losses["loss"].iloc[1] - 0.1
    assert list(run.losses) == ["step", "loss", "held_out_loss", "learning_rate", "tokens"]
    assert run.losses["tokens"].is_monotonic_increasing
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_of_instructions_only_answers_are_learnt(
    plan: TrainingPlan, tmp_path: Path, batches: Batches
) -> None:
    file = instruction_file(tmp_path / "records.json")
    train(replace(plan, data=(file,), steps=1, accumulation=1, max_length=256), tmp_path / "out")
    (batch,) = batches["lora"]
    counted = batch["labels"] != -100
    answers = [
        load_tokenizer(plan).decode(row[kept]) for row, kept in zip(batch["input_ids"], counted, strict=True)
    ]
    assert len(answers) == plan.batch_size
    assert all(answer.removesuffix("<end>") in WORDS for answer in answers)


def test_examples_longer_than_the_model_reads_are_refused(plan: TrainingPlan, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="256 positions, fewer than the 512 of an example's max length"):
        train(replace(plan, max_length=512), tmp_path)


def test_the_log_becomes_a_table_of_one_row_a_step() -> None:
    log = [
        {"eval_loss": 5.0, "step": 0, "num_input_tokens_seen": 0},
        {"loss": 4.0, "learning_rate": 0.1, "step": 2, "num_input_tokens_seen": 8},
        {"delta_m/q": 1.0, "step": 2},
        {"eval_loss": 3.0, "step": 2, "num_input_tokens_seen": 8},
        {"train_runtime": 1.0, "train_loss": 3.5, "step": 2},
    ]
    table = losses(log)
    assert table["step"].tolist() == [0, 2]
    assert table["held_out_loss"].tolist() == [5.0, 3.0]
    assert table["tokens"].tolist() == [0, 8]


def test_adapters_keep_the_dtype_of_the_base_and_train_in_float32(tmp_path: Path) -> None:
    base = model_folder(tmp_path, dtype=torch.bfloat16)
    plan = TrainingPlan(methods=("dora", "ft"), model=str(base), dtype="bfloat16", rank=2)
    dtypes = {p.requires_grad: p.dtype for p in load_model(plan, "dora").parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert {p.dtype for p in load_model(replace(plan, dtype="auto"), "ft").parameters()} == {torch.float32}


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_gradients_through_a_4_bit_base_are_the_same_after_an_evaluation(tmp_path: Path, method: str) -> None:
    pytest.importorskip("bitsandbytes")
    base = model_folder(tmp_path, width=128)
    model = load_model(TrainingPlan(methods=(method,), model=str(base), quantize="4bit"), method)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model.train()(PROBE, labels=PROBE).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    logits(model)
    after = gradients()
    assert len(before) == len([p for p in model.parameters() if p.requires_grad])
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other)


def test_a_4_bit_base_is_trained_and_is_a_setting_of_the_run(plan: TrainingPlan, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = model_folder(tmp_path / "base", width=128)
    plan = replace(plan, model=str(base), methods=("dora",), quantize="4bit", steps=2, eval_fraction=0.2)
    (run,) = train(plan, tmp_path / "out", live_every=1)
    assert run.losses["held_out_loss"].iloc[-1] < run.losses["held_out_loss"].iloc[0]
    assert run.parameters.total > 300_000  # as if it were not quantized
    with pytest.raises(TrainingError, match="holds another run: its quantize is"):
        train(replace(plan, quantize=None), tmp_path / "out", resume=True)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"methods": ("dpo",)}, "there is no method 'dpo'"),
        ({"scheduler": "square"}, "there is no scheduler 'square'"),
        ({"quantize": "4bit", "methods": ("ft",)}, "not quantized"),
        ({"steps": 0}, "steps must be at least 1, and is 0"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"warmup": -1}, "warmup must be at least 0, and is -1"),
        ({"learning_rate": math.nan}, "learning rate must be above 0"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TrainingError, match=sentence):
        TrainingPlan(**settings)


def test_a_model_that_cannot_be_loaded_is_named(plan: TrainingPlan, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nowhere"):
        train(replace(plan, model=str(tmp_path / "nowhere")), tmp_path)


def test_settings_that_decide_nothing_may_change_on_resuming(plan: TrainingPlan, tmp_path: Path) -> None:
    train(replace(plan, steps=1), tmp_path)
    train(replace(plan, steps=1, save_steps=1, gradient_checkpointing=True), tmp_path, resume=True)
    written = json.loads((tmp_path / "lora" / "training.json").read_text())
    assert written["settings"]["rank"] == 2


def _items(examples: Any) -> Iterator[dict[str, Tensor]]:
    return (examples[index] for index in range(len(examples)))

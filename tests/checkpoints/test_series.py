"""A folder of steps is a series; what does not belong to it is said."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wdanalysis.checkpoints import Series, open_checkpoint, open_series
from wdanalysis.checkpoints.series import by_run, joined, with_common_steps
from wdanalysis.checkpoints.steps import run_names
from wdanalysis.errors import CheckpointError, ComparisonError

Save = Callable[..., Path]


def steps_and_values(series: Series) -> dict[int | None, float]:
    return {point.step: float(point.tensors["w"].read()[0, 0]) for point in series.checkpoints}


def trainer_state(folder: Path, step: int) -> None:
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))


@pytest.mark.parametrize(
    "spelling",
    [
        "checkpoint-{}/model.safetensors",
        "checkpoint_{}/model.safetensors",
        "step-{}/pytorch_model.bin",
        "step{}/model.safetensors",
        "global_step{}/model.safetensors",
        "iter_{:07}/model.safetensors",
        "epoch_{}/model.safetensors",
        "epoch-{}/model.safetensors",
        "{}/model.safetensors",
        "Step {}/model.safetensors",
        "step{}-tokens4B/model.safetensors",
        "step_{}.safetensors",
        "ckpt-{}.pt",
        "model_{}.pt",
        "{}.safetensors",
        "epoch=1-step={}.ckpt",
        "my-run-step_{}.safetensors",
    ],
)
def test_the_usual_spellings_tell_the_step(tmp_path: Path, save: Save, spelling: str) -> None:
    for step in (1000, 5, 20):
        save(tmp_path / "LoRA" / spelling.format(step), step)
    series = open_series(tmp_path / "LoRA")
    assert list(steps_and_values(series).items()) == [(5, 5), (20, 20), (1000, 1000)]
    assert series.name == "LoRA"


def test_a_series_of_the_trainer(tmp_path: Path) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(2, 2))

        def forward(self, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": ((self.w - labels) ** 2).mean()}

    arguments = TrainingArguments(
        str(tmp_path / "ft"), max_steps=4, save_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(Model(), arguments, train_dataset=[{"labels": torch.ones(2, 2)}] * 64)
    trainer.train()
    trainer.save_model()
    series = open_series(tmp_path / "ft")
    assert [point.step for point in series.checkpoints] == [2, 4]
    assert series.notes == (f"The model in {tmp_path / 'ft'} itself was left out, as its step is not known.",)
    trainer.save_state()
    assert "as its step 4 is there as checkpoint-4" in open_series(tmp_path / "ft").notes[0]


def test_epochs_are_noted(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "epoch_3" / "model.safetensors")
    (checkpoint,) = open_series(tmp_path).checkpoints
    assert checkpoint.notes == ("epoch_3 tells its epoch, which was taken as its step.",)


def test_the_trainers_state_wins_over_the_name(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "checkpoint-1" / "model.safetensors")
    trainer_state(tmp_path / "checkpoint-1", 500)
    (checkpoint,) = open_series(tmp_path).checkpoints
    assert checkpoint.step == 500
    assert checkpoint.notes == ("checkpoint-1 is step 500 by its trainer_state.json, and was read as that.",)


def test_the_final_model_of_a_run_is_included_where_its_step_is_new(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "checkpoint-500" / "model.safetensors", 500)
    save(tmp_path / "model.safetensors", 700)
    trainer_state(tmp_path, 700)
    series = open_series(tmp_path)
    assert steps_and_values(series) == {500: 500, 700: 700}
    assert not series.notes


def test_folders_without_a_step_are_left_out_and_noted(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "checkpoint-500" / "model.safetensors", 500)
    save(tmp_path / "checkpoint-best" / "model.safetensors")
    (tmp_path / "logs").mkdir()
    series = open_series(tmp_path)
    assert list(steps_and_values(series)) == [500]
    assert series.notes == (f"{tmp_path / 'checkpoint-best'} was left out, as its step is not known.",)


def test_files_without_a_step_are_left_out_and_noted(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "step_5.safetensors", 5)
    save(tmp_path / "last.safetensors")
    assert open_series(tmp_path).notes == (
        f"{tmp_path / 'last.safetensors'} was left out, as its step is not known.",
    )


def test_the_state_of_deepspeed_beside_a_model_is_no_step(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "checkpoint-500" / "model.safetensors")
    save(tmp_path / "checkpoint-500" / "global_step500" / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    (checkpoint,) = open_series(tmp_path / "checkpoint-500").checkpoints
    assert checkpoint.step == 500


def test_two_entries_of_one_step_are_an_error(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "checkpoint-500" / "model.safetensors")
    save(tmp_path / "step_500" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"step 500 twice, as checkpoint-500 and as step_500"):
        open_series(tmp_path)


def test_an_empty_step_is_an_error_unless_it_is_not_wanted(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "checkpoint-500" / "model.safetensors")
    (tmp_path / "checkpoint-600").mkdir()
    with pytest.raises(CheckpointError, match=r"checkpoint-600 is an empty folder"):
        open_series(tmp_path)
    assert [point.step for point in open_series(tmp_path, steps=[500]).checkpoints] == [500]


def test_steps_that_are_not_there_are_an_error_that_names_those_there_are(tmp_path: Path, save: Save) -> None:
    for step in (5, 10, 15):
        save(tmp_path / f"step_{step}.safetensors")
    assert [point.step for point in open_series(tmp_path, steps={15, 5}).checkpoints] == [5, 15]
    with pytest.raises(CheckpointError, match=r"has no step 7, 8; it has 5, 10, 15\."):
        open_series(tmp_path, steps=[5, 7, 8])


def test_a_single_checkpoint_without_a_step_has_no_steps_to_choose(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has no step 7; the step of its checkpoint is not known"):
        open_series(tmp_path, steps=[7])


def test_a_folder_of_methods_is_no_series(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "ft" / "model.safetensors")
    save(tmp_path / "lora" / "checkpoint-5" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"pass one of the folders in it: ft, lora\."):
        open_series(tmp_path)


@pytest.mark.parametrize(
    ("file", "path", "name", "step"),
    [
        ("ft/model.safetensors", "ft", "ft", None),
        ("ft/model.safetensors", "ft/", "ft", None),
        ("ft/model.safetensors", "ft/model.safetensors", "ft", None),
        ("ft/adapter.safetensors", "ft/adapter.safetensors", "adapter", None),
        ("ft/checkpoint-5/model.safetensors", "ft", "ft", 5),
        ("ft/checkpoint-5/model.safetensors", "ft/checkpoint-5", "ft", 5),
        ("ft/checkpoint-5/model.safetensors", "ft/checkpoint-5/model.safetensors", "ft", 5),
        ("ft/step_5.safetensors", "ft/step_5.safetensors", "ft", 5),
        ("model_2/model.safetensors", "model_2", "model_2", None),
    ],
)
def test_the_name_of_a_method(
    tmp_path: Path,
    save: Save,
    monkeypatch: pytest.MonkeyPatch,
    *,
    file: str,
    path: str,
    name: str,
    step: int | None,
) -> None:
    save(tmp_path / file)
    monkeypatch.chdir(tmp_path)
    series = open_series(path)
    assert (series.name, series.checkpoints[0].step) == (name, step)
    assert open_checkpoint(series.checkpoints[0].path).step == step


def test_the_folder_one_is_in_has_its_own_name(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "ft" / "model.safetensors")
    monkeypatch.chdir(tmp_path / "ft")
    assert open_series(".").name == "ft"


@pytest.mark.parametrize("content", ["{", "[]", '{"global_step": "five"}'])
def test_a_damaged_trainer_state_is_an_error(tmp_path: Path, save: Save, content: str) -> None:
    save(tmp_path / "model.safetensors")
    (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"trainer_state\.json (is not|has no)"):
        open_series(tmp_path)


def test_importing_the_package_and_reading_safetensors_does_not_import_torch(
    tmp_path: Path, save: Save
) -> None:
    path = save(tmp_path / "model.safetensors")
    program = (
        "import sys, wdanalysis.checkpoints as c; c.open_checkpoint(sys.argv[1]).tensors['w'].read(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)], check=False).returncode == 0


def test_shards_of_an_index_are_one_model_whatever_they_are_called(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b"), 1):
        save_file({f"{name}.weight": torch.ones(2, 2)}, tmp_path / f"model-{number}.safetensors")
    weight_map = {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (checkpoint,) = open_series(tmp_path).checkpoints
    assert sorted(checkpoint.tensors) == ["a.weight", "b.weight"]


# Runs: several seeds of one method


def runs_steps_and_values(series: Series) -> list[tuple[str, int | None, float]]:
    return [(c.run, c.step, float(c.tensors["w"].read()[0, 0])) for c in series.checkpoints]


@pytest.mark.parametrize(
    "spelling",
    [
        *("seed-{}", "seed_{}", "seed{}", "Seed={}", "run-{}", "run{}", "rep{}", "repeat-{}"),
        *("replicate_{}", "trial-{}", "s{}", "S{}", "ft-seed-{}", "my_run.run{}"),
    ],
)
def test_a_folder_of_seeds_is_a_folder_of_runs(tmp_path: Path, save: Save, spelling: str) -> None:
    for seed in (10, 9):
        for step in (5, 20):
            save(tmp_path / "ft" / spelling.format(seed) / f"checkpoint-{step}" / "model.safetensors", seed)
    series = open_series(tmp_path / "ft")
    first, last = spelling.format(9), spelling.format(10)
    assert runs_steps_and_values(series) == [(first, 5, 9), (first, 20, 9), (last, 5, 10), (last, 20, 10)]
    assert series.name == "ft"
    assert not series.notes


@pytest.mark.parametrize("name", ["seed", "fold-1", "s-1", "llama-s1", "runs1", "seed-1-best", "r1"])
def test_other_names_tell_no_run(tmp_path: Path, save: Save, name: str) -> None:
    save(tmp_path / "ft" / name / "model.safetensors")
    with pytest.raises(CheckpointError, match="pass one of the folders in it"):
        open_series(tmp_path / "ft")


def test_runs_may_be_single_checkpoints_without_a_step(tmp_path: Path, save: Save) -> None:
    for seed in (0, 1):
        save(tmp_path / "ft" / f"seed-{seed}" / "model.safetensors", seed)
    assert runs_steps_and_values(open_series(tmp_path / "ft")) == [("seed-0", None, 0), ("seed-1", None, 1)]


def test_one_run_alone_has_no_name(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "ft" / "seed-0" / "checkpoint-5" / "model.safetensors")
    (checkpoint,) = open_series(tmp_path / "ft").checkpoints
    assert checkpoint.run == ""


def test_a_folder_of_steps_or_with_weights_is_no_folder_of_runs(tmp_path: Path, save: Save) -> None:
    for name in ("steps/checkpoint-5", "steps/seed-0", "weights", "weights/seed-0"):
        save(tmp_path / name / "model.safetensors")
    for folder in ("steps", "weights"):
        (checkpoint,) = open_series(tmp_path / folder).checkpoints
        assert checkpoint.run == ""


def test_what_lies_beside_runs_is_noted(tmp_path: Path, save: Save) -> None:
    for name in ("seed-0", "seed-1", "best"):
        save(tmp_path / name / "model.safetensors")
    (tmp_path / "seed-2").mkdir()
    (tmp_path / "logs").mkdir()
    assert open_series(tmp_path).notes == (
        f"{tmp_path / 'seed-2'} was left out, as it holds no checkpoint.",
        f"{tmp_path / 'best'} was left out, as its name tells no run.",
    )


def test_steps_that_not_all_runs_have_are_noted(tmp_path: Path, save: Save) -> None:
    for seed, steps in ((0, (5, 20)), (1, (5,))):
        for step in steps:
            save(tmp_path / "ft" / f"seed-{seed}" / f"checkpoint-{step}" / "model.safetensors")
    (note,) = with_common_steps(open_series(tmp_path / "ft")).notes
    assert note == "not all runs of ft have step 20: means over runs are of step 5"
    only = open_series(tmp_path / "ft", steps=[20])
    assert [(c.run, c.step) for c in only.checkpoints] == [("", 20)]
    assert only.notes == ("seed-1 of ft was left out, as it has none of the chosen steps.",)
    with pytest.raises(CheckpointError, match=r"has no step 30; it has 5, 20"):
        open_series(tmp_path / "ft", steps=[30])


def test_runs_without_a_common_step_are_refused(tmp_path: Path, save: Save) -> None:
    for seed in (0, 1):
        save(tmp_path / "ft" / f"seed-{seed}" / f"checkpoint-{seed + 5}" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no step in common \(seed-0: 5; seed-1: 6\)"):
        with_common_steps(open_series(tmp_path / "ft"))


def test_paths_of_one_name_are_steps_or_runs(tmp_path: Path, save: Save) -> None:
    for seed in (0, 1):
        for step in (5, 20):
            save(tmp_path / f"seed-{seed}" / "ft" / f"checkpoint-{step}" / "model.safetensors", seed)
    whole = [tmp_path / "seed-0" / "ft", tmp_path / "seed-1" / "ft"]
    in_runs = [("seed-0", 5, 0), ("seed-0", 20, 0), ("seed-1", 5, 1), ("seed-1", 20, 1)]
    assert runs_steps_and_values(joined("FT", [open_series(path) for path in whole])) == in_runs
    single = [path / f"checkpoint-{step}" for step in (20, 5) for path in whole]
    assert runs_steps_and_values(joined("FT", [open_series(path) for path in single])) == in_runs
    one_run = [whole[0] / "checkpoint-5", whole[1] / "checkpoint-20"]
    steps = runs_steps_and_values(joined("FT", [open_series(path) for path in one_run]))
    assert steps == [("", 5, 0), ("", 20, 1)]


def test_a_series_is_taken_apart_into_its_runs_where_they_lie(tmp_path: Path, save: Save) -> None:
    for seed, steps in ((0, (5, 20)), (1, (5,))):
        for step in steps:
            save(tmp_path / "ft" / f"seed-{seed}" / f"checkpoint-{step}" / "model.safetensors", seed)
    runs = by_run(open_series(tmp_path / "ft"))
    assert {run: [c.step for c in own.checkpoints] for run, own in runs.items()} == {
        "seed-0": [5, 20],
        "seed-1": [5],
    }
    assert runs["seed-0"].path == tmp_path / "ft" / "seed-0"
    assert runs["seed-1"].path == tmp_path / "ft" / "seed-1" / "checkpoint-5"
    alone = open_series(tmp_path / "ft" / "seed-0")
    assert by_run(alone) == {"": alone}


def test_a_step_twice_in_one_folder_is_no_run(tmp_path: Path, save: Save) -> None:
    for name in ("checkpoint-5", "step-5"):
        save(tmp_path / name / "model.safetensors")
    parts = [open_series(tmp_path / name) for name in ("checkpoint-5", "step-5")]
    with pytest.raises(ComparisonError, match="both called 'FT' and have step 5"):
        joined("FT", parts)
    with pytest.raises(ComparisonError, match="given twice"):
        joined("FT", [parts[0], parts[0]])


def test_a_model_and_an_adapter_are_no_runs_of_one_method(tmp_path: Path, save: Save) -> None:
    model, adapter = (open_series(save(tmp_path / f"{name}.safetensors")) for name in "ab")
    lora = replace(adapter, checkpoints=tuple(replace(c, method="LoRA") for c in adapter.checkpoints))
    with pytest.raises(CheckpointError, match="one is a model, the other LoRA"):
        joined("FT", [model, lora])


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a", "b"], ["a", "b"]),
        (["seed-0/ft", "seed-1/ft"], ["seed-0", "seed-1"]),
        (["x/0/ft", "y/0/lora"], ["ft", "lora"]),
        (["x/0", "y/0", "y/1"], ["x/0", "y/0", "y/1"]),
    ],
)
def test_runs_are_named_by_what_differs(paths: list[str], names: list[str]) -> None:
    assert list(run_names([Path(path) for path in paths]).values()) == names


def test_files_are_runs_by_their_stems_where_these_differ(tmp_path: Path, save: Save) -> None:
    ft = [save(tmp_path / name) for name in ("ft_a.safetensors", "ft_b.safetensors")]
    assert list(run_names(ft).values()) == ["ft_a", "ft_b"]
    same = [save(tmp_path / name) for name in ("ft.safetensors", "ft.pt")]
    assert list(run_names(same).values()) == ["ft.safetensors", "ft.pt"]

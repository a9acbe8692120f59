"""`wd-analyze train` as a user meets it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_llama import model_folder, quick, text_file
from typer.testing import CliRunner

import wdanalysis as wd
from wdanalysis.cli import app, main
from wdanalysis.training.data.formats import PROMPT
from wdanalysis.training.run import loop
from wdanalysis.training.run.plan import TrainingPlan
from wdanalysis.training.run.recipes import RECIPES

TINY = [
    *("--model", "base", "--data", "text.txt", "--rank", "2", "--steps", "2"),
    *("--batch-size", "2", "--max-length", "32", "--lr", "0.01"),
]


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with quick():
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    model_folder(folder / "base")
    text_file(folder / "text.txt", words=115)
    return folder


@pytest.fixture
def here(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a base and a text."""
    for path in inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(
    *arguments: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    """Run the command as the shell does; exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["wd-analyze", "train", *arguments])
    capsys.readouterr()
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_it_counts_trains_saves_and_says_how_to_compare(here: Path) -> None:
    result = CliRunner().invoke(app, ["train", "--method", "ft,dora", *TINY, "--live", "1", "--out", "runs"])
    assert result.exit_code == 0, result.output
    assert "ft: trainable 12,656 of 12,656 parameters (100.00 %)" in result.stdout
    assert "dora: trainable 320 of 12,976 parameters (2.47 %)" in result.stdout
    assert "wd-analyze compare base runs/ft runs/dora" in result.stdout
    assert {path.name for path in (here / "runs").iterdir()} == {"ft", "dora", "losses.png"}
    for method, weights in [("ft", "model.safetensors"), ("dora", "adapter_model.safetensors")]:
        folder = here / "runs" / method
        entries = {"checkpoint-1", "checkpoint-2", "live", "losses.csv", "training.json"}
        assert {path.name for path in folder.iterdir()} == entries
        assert (folder / "checkpoint-2" / weights).is_file()
    assert wd.compare("base", ["runs/ft", "runs/dora"]).methods == ["ft", "dora"]
    assert CliRunner().invoke(app, ["plot", "runs/dora/live"]).exit_code == 0


def test_json_is_one_object_with_the_losses(here: Path) -> None:
    result = CliRunner().invoke(app, ["train", "--method", "lora", *TINY, "--json"])
    found = json.loads(result.stdout)
    assert found["method"] == "lora"
    assert found["out"] == "wd-training"
    assert found["trainable"] == 256
    assert [entry["step"] for entry in found["losses"]] == [0, 1, 2]
    assert found["checkpoints"] == ["wd-training/lora/checkpoint-1", "wd-training/lora/checkpoint-2"]


def test_quiet_prints_nothing(here: Path) -> None:
    result = CliRunner().invoke(app, ["train", *TINY, "--quiet"])
    assert (result.exit_code, result.stdout) == (0, "")


def test_dry_run_counts_from_a_configuration_and_writes_nothing(here: Path) -> None:
    config = json.loads((here / "base" / "config.json").read_text())
    (here / "config.json").write_text(json.dumps(config))
    options = ["--method", "dora", "--rank", "2", "--targets", "q,k", "--dry-run", "--json"]
    found = json.loads(CliRunner().invoke(app, ["train", "--model", "config.json", *options]).stdout)
    # Two layers of q and k, each 16 × 16: A and B of rank 2, and m.
    trainable = 2 * 2 * (2 * 2 * 16 + 16)
    assert found == {
        "method": "dora",
        "trainable": trainable,
        "total": 12656 + trainable,
        "percent": pytest.approx(100 * trainable / (12656 + trainable)),
    }
    assert not (here / "wd-training").exists()


def test_a_dry_run_of_several_methods_lists_them(here: Path) -> None:
    arguments = ["train", "--model", "base", "--method", "ft,lora", "--rank", "2", "--dry-run", "--json"]
    found = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert [(entry["method"], entry["trainable"]) for entry in found["methods"]] == [
        ("ft", 12656),
        ("lora", 256),
    ]


def test_a_recipe_is_counted_on_its_own_model_and_options_override_it() -> None:
    arguments = ["train", "--recipe", "llama-7b-commonsense-r32", "--dry-run"]
    assert "(0.84 %)" in CliRunner().invoke(app, arguments).stdout  # Table 1
    assert "(0.43 %)" in CliRunner().invoke(app, [*arguments, "--rank", "16"]).stdout


def test_a_recipe_sets_what_the_options_do_not(here: Path) -> None:
    arguments = ["--recipe", "llama-7b-commonsense-r16", *TINY, "--targets", "q", "--epochs", "1"]
    arguments = [*arguments[: arguments.index("--steps")], *arguments[arguments.index("--steps") + 2 :]]
    result = CliRunner().invoke(app, ["train", *arguments])
    assert result.exit_code == 0, result.output
    settings = json.loads(Path("wd-training/dora/training.json").read_text())["settings"]
    assert settings["alpha"] == 32
    assert settings["dropout"] == 0.05
    assert settings["warmup"] == 100
    assert (settings["rank"], settings["targets"], settings["learning_rate"]) == (2, "q", 0.01)


def test_recipes_are_listed() -> None:
    listed = CliRunner().invoke(app, ["train", "--list-recipes"]).stdout
    assert all(name in listed for name in RECIPES)
    as_json = json.loads(CliRunner().invoke(app, ["train", "--list-recipes", "--json"]).stdout)
    assert [entry["name"] for entry in as_json] == list(RECIPES)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--targets", "nothing"], "No module matches the targets 'nothing'"),
        (["--rank", "17"], "Rank 17 does not fit a weight of 16 × 16"),
        (["--recipe", "llama-70b"], "there is no recipe 'llama-70b'"),
        (["--method", "sft"], "there is no method 'sft'"),
        (["--data", "empty.txt"], "empty.txt holds no text"),
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--model", "nowhere"], "nowhere cannot be loaded"),
        (["--out", "text.txt"], "text.txt is a file: name a folder. (--out)"),
        (["--eval-data", "nowhere"], "(--eval-data)"),
        (["--quantize", "4bit", "--method", "ft"], "quantize none, or leave it out. (--quantize)"),
        (["--max-length", "1024"], "lower that. (--max-length)"),
    ],
)
def test_what_goes_wrong_is_one_sentence_and_exit_code_1(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    sentence: str,
) -> None:
    (here / "empty.txt").write_text("")
    arguments = [
        argument for argument in TINY if "--data" not in options or argument not in ("--data", "text.txt")
    ]
    code, out, err = run(*arguments, *options, "--quiet", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 1
    assert out == ""
    assert sentence in err
    assert err.startswith("wd-analyze: ")
    assert "Traceback" not in err


def test_a_folder_with_a_run_is_refused_until_it_is_resumed(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CliRunner().invoke(app, ["train", *TINY]).exit_code == 0
    code, _, err = run(*TINY, capsys=capsys, monkeypatch=monkeypatch)
    assert (code, "already holds a run" in err) == (1, True)
    code, _, err = run(*TINY, "--resume", "--dropout", "0.5", capsys=capsys, monkeypatch=monkeypatch)
    assert (code, "its dropout is 0.0, not 0.5" in err) == (1, True)
    assert CliRunner().invoke(app, ["train", *TINY, "--resume"]).exit_code == 0


def test_ctrl_c_ends_in_one_sentence(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise loop.TrainingInterrupted("dora was interrupted after step 1.")

    monkeypatch.setattr(loop, "train", interrupted)
    code, _, err = run(*TINY, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 130
    assert err.endswith("wd-analyze: dora was interrupted after step 1. (--resume)\n")


def test_without_a_model_and_data_it_tunes_the_bundled_base_on_pythons_documentation(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def some_documentation(*, held_out: bool = False) -> list[str]:
        return ["Return the length of an object.\n" * 20] * (1 if held_out else 4)

    monkeypatch.setattr(loop, "library_documentation", some_documentation)
    result = CliRunner().invoke(
        app, ["train", "--steps", "2", "--max-length", "32", "--out", "runs", "--json"]
    )
    found = json.loads(result.stdout)
    assert found["method"] == "dora"
    assert found["losses"][0]["held_out_loss"] > 0
    config = json.loads(Path("runs/dora/checkpoint-2/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == loop.BUNDLED_NAME


def test_steps_and_epochs_together_are_wrong_usage() -> None:
    assert CliRunner().invoke(app, ["train", "--steps", "1", "--epochs", "1", "--dry-run"]).exit_code == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "lora", "--axis", "in"], "lora: no magnitude is trained"),
        (["--method", "lora,vera", "--full-gradient"], "lora, vera: no magnitude is trained"),
        (["--method", "lora", "--magnitude-targets", "q"], "lora: no magnitude is trained"),
        (["--method", "ft", "--rank", "4"], "ft: no adapter is trained"),
        (["--method", "ft", "--axis", "in"], "ft: no adapter is trained"),
        (["--method", "vera", "--alpha", "4"], "vera: there is no α"),
        (["--scheduler", "constant", "--warmup", "5"], "constant_with_warmup has one"),
        (["--eval-fraction", "0.2"], "what is held out of the bundled text is fixed"),
        (
            ["--eval-fraction", "0.2", "--data", "a", "--eval-data", "b"],
            "the data of --eval-data is held out",
        ),
    ],
)
def test_a_setting_that_means_nothing_beside_the_others_is_wrong_usage(options: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["train", *options, "--dry-run"])
    assert result.exit_code == 2
    assert said in " ".join(result.output.replace("│", " ").split())


def test_what_means_something_for_one_of_the_methods_is_taken(here: Path) -> None:
    line = [
        "train",
        "--model",
        "base",
        "--method",
        "ft,lora,dora",
        "--rank",
        "2",
        "--axis",
        "in",
        "--dry-run",
    ]
    assert CliRunner().invoke(app, line).exit_code == 0
    watched = ["train", "--model", "base", "--method", "ft", "--live", "1", "--axis", "in", "--dry-run"]
    assert CliRunner().invoke(app, watched).exit_code == 0


def test_progress_tells_when_it_evaluates(here: Path) -> None:
    told: list[tuple[int, bool]] = []
    plan = TrainingPlan(
        methods=("lora",), model="base", data=(Path("text.txt"),), rank=2, steps=2, batch_size=2,
        max_length=32, eval_fraction=0.3,
    )  # fmt: skip
    loop.train(
        plan, "runs", progress=lambda method, step, last, loss, evaluating: told.append((step, evaluating))
    )
    assert (0, True) in told
    assert (1, False) in told
    assert told[-1] == (2, False)


def test_a_cut_answer_is_told(here: Path) -> None:
    record = {"instruction": "Go on.", "input": "", "output": "a" * 400}
    Path("records.jsonl").write_text("\n".join([json.dumps(record)] * 4))
    assert len(PROMPT) < 256
    arguments = [argument.replace("text.txt", "records.jsonl").replace("32", "256") for argument in TINY]
    result = CliRunner().invoke(app, ["train", *arguments, "--eval-fraction", "0"])
    assert "4 of 4 instructions were cut at 256 tokens" in result.stdout

"""The command line as a user meets it: what it prints, what it writes, its exit codes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from checkpoint_files import llama, moved, write, write_lora, write_steps
from typer.testing import CliRunner

import wdanalysis
from wdanalysis import writing
from wdanalysis.cli import app, main

TABLES = {"metrics.csv", "metrics.parquet", "correlations.csv", "diagnostics.csv", "readings.csv", "run.json"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a base, a fully tuned series and an adapter."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "base.safetensors", llama())
    write_steps(tmp_path / "ft", llama())
    write_lora(tmp_path / "lora", llama())
    return tmp_path


def run(
    *arguments: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    """Run the command as the shell does; exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["wd-analyze", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def test_compare_writes_tables_and_figures_and_prints_a_summary(here: Path) -> None:
    result = CliRunner().invoke(app, ["compare", "base.safetensors", "ft", "lora"])
    assert result.exit_code == 0, result.output
    assert {path.name for path in (here / "wd-analysis").iterdir()} == {
        *TABLES,
        *("predictions.csv", "figures", "report.html"),
    }
    assert {path.name for path in (here / "wd-analysis" / "figures").iterdir()} >= {
        *(f"{kind}_{module}.png" for kind in ("scatter", "layers", "trajectory") for module in "qkv"),
        "heatmap.png",
        *(f"prediction_{module}.png" for module in "qv"),  # of the adapter
        "captions.md",
    }
    assert "one vector per output feature" in result.stdout
    for word in ("ft", "lora", "ΔM", "slope", "Wrote wd-analysis/"):
        assert word in result.stdout
    assert result.stdout.splitlines()[-1] == "Open wd-analysis/report.html"


def test_csv_and_parquet_hold_the_same_table(here: Path) -> None:
    CliRunner().invoke(app, ["compare", "base.safetensors", "ft", "lora", "--figures", "none"])
    csv = pd.read_csv("wd-analysis/metrics.csv", dtype={"run": "str"}).fillna({"run": ""})
    parquet = pd.read_parquet("wd-analysis/metrics.parquet")
    pd.testing.assert_frame_equal(csv, parquet, check_dtype=False)
    correlations = pd.read_csv("wd-analysis/correlations.csv")
    assert set(correlations["scope"]) == {"pooled", "step", "layer", "within_step", "within_layer"}
    assert not (here / "wd-analysis" / "figures").exists()


def test_run_json_says_how_the_numbers_came_about(here: Path) -> None:
    CliRunner().invoke(
        app, ["compare", "base.safetensors", "ft", "--axis", "in", "--layers", "0-1", "--figures", "none"]
    )
    saved = json.loads(Path("wd-analysis/run.json").read_text())
    assert saved["versions"]["wdanalysis"] == wdanalysis.__version__
    chosen = {"axis": "in", "modules": None, "layers": [0, 1], "steps": None, "alpha": None}
    assert saved["options"] == chosen | {"diagnostics": True, "spectra": False, "vectors": False}
    (base_file,) = saved["inputs"]["BASE"][0]["files"]
    assert base_file["bytes"] == (here / "base.safetensors").stat().st_size
    assert len(base_file["header_sha256"]) == 64
    assert [entry["step"] for entry in saved["inputs"]["ft"]] == [10, 20, 30]
    assert set(saved["outputs"]) == TABLES | {"report.html"}


def test_run_json_holds_the_line_that_was_typed(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["compare", "base.safetensors", "ft", "--figures", "none", "--no-report"]
    monkeypatch.setattr(sys, "argv", ["wd-analyze", *line])
    with pytest.raises(SystemExit):
        main()
    assert json.loads(Path("wd-analysis/run.json").read_text())["command"] == ["wd-analyze", *line]


def test_json_is_one_object_on_standard_output(here: Path) -> None:
    result = CliRunner().invoke(app, ["compare", "base.safetensors", "ft", "--json", "--figures", "none"])
    printed = json.loads(result.stdout)
    assert {row["module"] for row in printed["summary"]} == {"q", "k", "v"}
    assert all(Path(file).is_file() for file in printed["files"])


def test_quiet_prints_nothing(here: Path) -> None:
    result = CliRunner().invoke(app, ["compare", "base.safetensors", "ft", "-q", "--figures", "none"])
    assert (result.exit_code, result.output) == (0, "")


def test_label_names_a_method_and_may_add_a_path(here: Path) -> None:
    arguments = [
        "base.safetensors",
        "ft/",
        "--label",
        "Full=ft",
        "--label",
        "Adapter=lora",
        "--figures",
        "none",
    ]
    result = CliRunner().invoke(app, ["compare", *arguments])
    assert result.exit_code == 0, result.output
    assert set(pd.read_csv("wd-analysis/metrics.csv")["method"]) == {"Full", "Adapter"}


def test_labels_of_one_name_and_the_same_steps_are_runs(here: Path) -> None:
    for seed in (1, 2, 3):
        for step in (10, 20):
            write(
                here / f"s{seed}" / f"checkpoint-{step}" / "model.safetensors",
                moved(llama(), seed=seed * step),
            )
    labels = [word for seed in (1, 2, 3) for word in ("--label", f"FT=s{seed}")]
    result = CliRunner().invoke(app, ["compare", "base.safetensors", "lora", *labels, "--figures", "none"])
    assert result.exit_code == 0, result.output
    assert "FT: means over 3 runs (s1, s2, s3); runs.csv has each." in " ".join(result.stdout.split())
    across = pd.read_csv("wd-analysis/runs.csv", keep_default_na=False)
    assert across[across["module"] == "q"]["run"].tolist() == ["", "s1", "s2", "s3"]
    again = ["compare", "base.safetensors", *labels, "--figures", "none", "--json", "--force"]
    printed = json.loads(CliRunner().invoke(app, again).stdout)
    assert [row["runs"] for row in printed["runs"] if row["module"] == "q"] == [3, 1, 1, 1]


def test_a_folder_of_seeds_is_given_as_one_path(here: Path) -> None:
    for seed in (1, 2):
        write(here / "many" / f"seed-{seed}" / "model.safetensors", moved(llama(), seed=seed))
    result = CliRunner().invoke(app, ["compare", "base.safetensors", "many", "--figures", "none"])
    assert result.exit_code == 0, result.output
    metrics = pd.read_csv("wd-analysis/metrics.csv")
    assert set(zip(metrics["method"], metrics["run"], strict=True)) == {
        ("many", "seed-1"),
        ("many", "seed-2"),
    }
    inspected = CliRunner().invoke(app, ["inspect", "many"])
    assert inspected.exit_code == 0
    assert "many, 2 checkpoints" in inspected.stdout


def test_stacks_are_merged_on_request(here: Path) -> None:
    for name, weights in (("two", llama()), ("two-ft", moved(llama()))):
        stacks = {
            tensor.replace("model.", f"{stack}."): weight.clone()
            for stack in ("encoder", "decoder")
            for tensor, weight in weights.items()
        }
        write(here / f"{name}.safetensors", stacks)
    arguments = ["compare", "two.safetensors", "two-ft.safetensors", "--modules", "q", "--figures", "none"]
    assert CliRunner().invoke(app, [*arguments, "--merge-stacks"]).exit_code == 0
    metrics = pd.read_csv("wd-analysis/metrics.csv")
    assert set(metrics["module"]) == {"q"}
    assert set(metrics["stack"]) == {"encoder", "decoder"}
    assert json.loads(Path("wd-analysis/run.json").read_text())["options"]["merge_stacks"] is True
    assert CliRunner().invoke(app, [*arguments, "--out", "apart"]).exit_code == 0
    drawn = CliRunner().invoke(app, ["plot", "apart", "--figures", "scatter", "--merge-stacks"])
    assert drawn.exit_code == 0, drawn.output
    assert [path.name for path in Path("apart/figures").glob("*.png")] == ["scatter_q.png"]


@pytest.mark.parametrize("format", ["pdf", "svg"])
def test_figures_come_in_other_formats(here: Path, format: str) -> None:
    arguments = ["base.safetensors", "ft", "--format", format, "--figures", "scatter", "--modules", "q"]
    CliRunner().invoke(app, ["compare", *arguments])
    (figure,) = (path for path in Path("wd-analysis/figures").iterdir() if path.name != "captions.md")
    assert figure.name == f"scatter_q.{format}"
    assert figure.stat().st_size > 1000


def test_plot_draws_again_from_the_tables_alone(here: Path) -> None:
    CliRunner().invoke(app, ["compare", "base.safetensors", "ft", "--figures", "none"])
    (here / "base.safetensors").unlink()
    result = CliRunner().invoke(app, ["plot", "wd-analysis", "--figures", "scatter"])
    assert result.exit_code == 0, result.output
    assert [path.name for path in sorted(Path("wd-analysis/figures").glob("*.png"))] == [
        f"scatter_{module}.png" for module in "kqv"
    ]


def test_the_scatter_shows_other_quantities_in_a_file_of_their_name(here: Path) -> None:
    CliRunner().invoke(app, ["compare", "base.safetensors", "ft", "--figures", "scatter", "--modules", "q"])
    arguments = [
        "plot",
        "wd-analysis",
        "--figures",
        "scatter,layers",
        "--x",
        "delta_m_signed",
        "--y",
        "rel_delta_m",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert [path.name for path in sorted(Path("wd-analysis/figures").glob("*.png"))] == [
        "layers_q.png",
        "scatter_q.png",
        "scatter_q_rel_delta_m-over-delta_m_signed.png",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--x", "loss"], "'loss' is not one of delta_m"),
        (["--y", "mean_angle", "--no-diagnostics"], "mean_angle is not measured without diagnostics"),
    ],
    ids=["unknown", "without_diagnostics"],
)
def test_a_quantity_that_is_not_there_is_refused_before_measuring(
    here: Path, options: list[str], words: str
) -> None:
    result = CliRunner().invoke(app, ["compare", "base.safetensors", "ft", *options])
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())
    assert not Path("wd-analysis").exists()


def test_inspect_tells_format_roles_layers_and_steps(here: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", "base.safetensors", "ft", "lora"])
    assert result.exit_code == 0, result.output
    for words in ("ft, 3 checkpoints", "F32", "0–2", "8 × 8", "embed", "lora_alpha", "scales"):
        assert words in result.stdout


def test_inspect_json_is_a_list(here: Path) -> None:
    base, ft, lora = json.loads(
        CliRunner().invoke(app, ["inspect", *("base.safetensors", "ft", "lora"), "--json"]).stdout
    )
    assert base["checkpoints"][0]["parameters"] == sum(weight.numel() for weight in llama().values())
    assert [checkpoint["step"] for checkpoint in ft["checkpoints"]] == [10, 20, 30]
    assert lora["checkpoints"][0]["adapter"]["ranks"] == [2]
    assert lora["checkpoints"][0]["adapter"]["scales"] == [2.0]
    modules = {module["module"]: module for module in lora["checkpoints"][0]["modules"]}
    assert modules["q"]["matrices"] == 3
    assert modules["q"]["shapes"] == [[8, 8]]


def test_help_lists_every_option_with_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = CliRunner().invoke(app, ["compare", "--help"]).stdout
    for option in (
        "--label",
        "--axis",
        "--modules",
        "--layers",
        "--steps",
        "--out",
        "--figures",
        "--force",
    ):
        assert option in shown
    for default in ("[default: out]", "[default: wd-analysis]", "[default: (all)]"):
        assert default in " ".join(shown.split())


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout.strip() == f"wd-analyze {wdanalysis.__version__}"


# Failures: one sentence on standard error, exit code 1, nothing half written.


def fails(
    *arguments: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    out: str = "wd-analysis",
    exit_code: int = 1,
) -> str:
    code, stdout, stderr = run(*arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert code == exit_code
    assert stdout == ""
    assert stderr.startswith("wd-analyze: ")
    assert len(stderr.strip().splitlines()) == 1
    assert not Path(out).exists() or not any(Path(out).glob("**/.*"))
    return stderr


def test_a_missing_path(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    message = fails("compare", "base.safetensors", "nowhere/", capsys=capsys, monkeypatch=monkeypatch)
    assert "nowhere" in message
    assert not Path("wd-analysis").exists()


def test_results_are_not_replaced(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["compare", "base.safetensors", "ft", "--figures", "none"]
    CliRunner().invoke(app, arguments)
    before = Path("wd-analysis/metrics.csv").stat().st_mtime_ns
    assert "--force" in fails(*arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert Path("wd-analysis/metrics.csv").stat().st_mtime_ns == before
    assert CliRunner().invoke(app, [*arguments, "--force"]).exit_code == 0


def test_out_that_is_a_file(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("taken").write_text("")
    arguments = ["compare", "base.safetensors", "ft", "--out", "taken"]
    assert "is a file" in fails(*arguments, capsys=capsys, monkeypatch=monkeypatch)


def test_a_disk_that_is_full_in_mid_run(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing.os, "fsync", full)
    message = fails(
        "compare", "base.safetensors", "ft", "--figures", "none", capsys=capsys, monkeypatch=monkeypatch
    )
    assert "disk is full" in message
    assert list(Path("wd-analysis").iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_standard_output_on_a_full_disk_is_no_traceback(here: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "wdanalysis.cli",
                "compare",
                "base.safetensors",
                "ft",
                "--figures",
                "none",
            ],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("wd-analyze: standard output cannot be written")


def test_ctrl_c_keeps_what_was_measured(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from wdanalysis import comparison
    from wdanalysis.measure import stream

    def interrupted_stream(*arguments: object, **options: object):  # type: ignore[no-untyped-def]
        for count, measured in enumerate(stream.stream(*arguments, **options)):  # type: ignore[arg-type]
            if count == 2:
                raise KeyboardInterrupt
            yield measured

    monkeypatch.setattr(comparison, "stream", interrupted_stream)
    message = fails(
        "compare", "base.safetensors", "ft", capsys=capsys, monkeypatch=monkeypatch, exit_code=130
    )
    assert "6 rows measured so far" in message
    assert len(pd.read_csv("wd-analysis/metrics.csv")) == 6
    assert json.loads(Path("wd-analysis/run.json").read_text())["complete"] is False


def test_vectors_are_written_where_they_are_asked_for(here: Path) -> None:
    result = CliRunner().invoke(app, ["compare", "base.safetensors", "ft", "--vectors", "--figures", "none"])
    assert result.exit_code == 0
    assert "vectors.parquet" in result.stdout
    vectors, metrics = (pd.read_parquet(f"wd-analysis/{name}.parquet") for name in ("vectors", "metrics"))
    assert len(vectors) == metrics["vectors"].sum()


def test_skipped_matrices_are_counted_on_standard_output(here: Path) -> None:
    tuned = moved(llama())
    del tuned["model.layers.0.self_attn.q_proj.weight"]
    write(here / "partial.safetensors", tuned)
    result = CliRunner().invoke(
        app, ["compare", "base.safetensors", "partial.safetensors", "--figures", "none"]
    )
    assert "Left out: 1 (1 × is in BASE, but not in this checkpoint)" in result.stdout
    (skipped,) = json.loads(Path("wd-analysis/run.json").read_text())["skipped"]
    assert skipped["name"] == "model.layers.0.self_attn.q_proj.weight"


def test_json_keeps_the_digits_of_small_numbers(here: Path) -> None:
    write(
        here / "f64.safetensors",
        {name: weight.double() for name, weight in moved(llama(), size=1e-6).items()},
    )
    result = CliRunner().invoke(
        app, ["compare", "base.safetensors", "f64.safetensors", "--json", "--figures", "none"]
    )
    found = {row["module"]: row["delta_d"] for row in json.loads(result.stdout)["summary"]}
    means = pd.read_csv("wd-analysis/metrics.csv").groupby("module")["delta_d"].mean()
    assert found == pytest.approx(means.to_dict(), rel=1e-12)


def test_a_signal_ends_the_command_in_one_sentence(here: Path) -> None:
    code = (
        "import os, signal, time, wdanalysis.comparison as c, wdanalysis.cli as cli\n"
        "c.open_checkpoint = lambda path: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60))\n"
        "cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "compare", "base.safetensors", "ft"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 130
    assert done.stderr.startswith("wd-analyze: interrupted")
    assert len(done.stderr.splitlines()) == 1


def test_a_terminal_without_greek_letters_gets_no_traceback(here: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wdanalysis.cli", "compare", "base.safetensors", "ft", "--figures", "none"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_not_utf_8_is_no_traceback(here: Path) -> None:
    name = os.fsdecode(b"bad\xff")
    try:
        write_steps(here / name, llama(), steps=(1,))
    except OSError:
        pytest.skip("the file system takes no such name")
    result = CliRunner().invoke(app, ["compare", "base.safetensors", name, "--figures", "none"])
    assert result.exit_code == 0, result.output
    assert pd.read_csv("wd-analysis/metrics.csv")["method"].unique().tolist() == [r"bad\udcff"]


def test_an_output_folder_that_cannot_be_made_is_found_before_the_work(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wdanalysis.comparison.open_checkpoint", lambda path: pytest.fail("the work began"))
    arguments = ["compare", "base.safetensors", "ft", "--out", "base.safetensors/results"]
    assert "cannot be written" in fails(*arguments, capsys=capsys, monkeypatch=monkeypatch, out="results")
    assert "cannot be written" in fails(
        *arguments[:-1], "x" * 300, capsys=capsys, monkeypatch=monkeypatch, out="results"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare"],
        ["compare", "base.safetensors"],
        ["compare", "base.safetensors", "ft", "--axis", "rows"],
        ["compare", "base.safetensors", "ft", "--layers", "a-b"],
        ["compare", "base.safetensors", "ft", "--figures", "pie"],
        ["compare", "base.safetensors", "ft", "--label", "ft"],
        ["compare", "base.safetensors", "ft", "--device", "cpu"],
        ["compare", "base.safetensors", "ft", "--layers", "0-300000000"],
        ["compare", "base.safetensors", "ft", "--steps", "10-20"],
        ["compare", "base.safetensors", "ft", "--alpha", "nan"],
        ["compare", "base.safetensors", "--label", "A=ft", "--label", "B=./ft"],
        ["nonsense"],
    ],
)
def test_wrong_usage_exits_with_2(here: Path, arguments: list[str]) -> None:
    assert CliRunner().invoke(app, arguments).exit_code == 2


def test_importing_the_package_or_asking_for_help_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'matplotlib', 'pandas', 'numba', 'scipy', 'transformers', 'pyarrow'}"
    for code in ("import wdanalysis", "from wdanalysis.cli import app"):
        loaded = subprocess.run(
            [sys.executable, "-c", f"{code}; import sys; print(*({heavy} & set(sys.modules)))"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert loaded.stdout.strip() == "", code


LAUNCHER = Path(__file__).parents[2] / "cli.py"


@pytest.mark.parametrize("start", [[str(LAUNCHER)], ["-m", "wdanalysis"], ["-m", "wdanalysis.cli"]])
def test_the_command_starts_from_a_checkout_and_as_a_module(start: list[str]) -> None:
    done = subprocess.run([sys.executable, *start, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("wd-analyze ")

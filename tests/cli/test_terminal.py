"""The command in a real terminal, as a process of its own: widths, colours, progress, Ctrl-C, completion."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from checkpoint_files import llama, moved, write, write_lora, write_steps
from typer.testing import CliRunner

from wdanalysis.cli import app

fcntl = pytest.importorskip("fcntl")
pty = pytest.importorskip("pty")
termios = pytest.importorskip("termios")

COMMAND = [sys.executable, "-m", "wdanalysis"]
COMPARE = ["compare", "base.safetensors", "ft", "lora", "--modules", "q,v", "--figures", "scatter"]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
DIRECTORY = Path("wd-analysis")


def set_up(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Make a working folder with a base, a fully tuned series and an adapter, and an environment that says nothing."""
    patch.chdir(folder)
    for name in ("NO_COLOR", "FORCE_COLOR", "TERMINAL_WIDTH"):
        patch.delenv(name, raising=False)
    patch.setenv("TERM", "xterm-256color")
    patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    write(folder / "base.safetensors", llama(layers=6))
    write_steps(folder / "ft", llama(layers=6))
    write_lora(folder / "lora", llama(layers=6))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_up(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one comparison prints on terminals of 80 and 120 columns, without colours, and into a pipe."""
    with pytest.MonkeyPatch.context() as patch:
        set_up(tmp_path_factory.mktemp("printed"), patch)
        found = {
            str(columns): in_terminal([*COMMAND, *COMPARE, "--force"], columns)[1] for columns in (80, 120)
        }
        found["pipe"] = run(*COMPARE, "--force").stdout
        patch.setenv("NO_COLOR", "1")
        found["80, no colour"] = in_terminal([*COMMAND, *COMPARE, "--force"], 80)[1]
    return found


def in_terminal(command: Sequence[str], columns: int, *, stderr_too: bool = False) -> tuple[int, str]:
    """Run a command on a pseudo-terminal so wide; its exit code and what it wrote there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    said = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    stderr = theirs if stderr_too else subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=stderr, env=said)
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux says so that the other end is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    return process.wait(), written.decode().replace("\r\n", "\n")


def run(*arguments: str, command: Sequence[str] = COMMAND) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 120])
def test_text_is_wrapped_at_words_to_the_width(printed: dict[str, str], columns: int) -> None:
    plain = ESCAPE.sub("", printed[str(columns)])
    assert columns - 20 < max(map(len, plain.splitlines())) <= columns
    sentences = [line for line in printed["pipe"].splitlines() if line.startswith(("Axis out", "  q:"))]
    assert len(sentences) == 3
    for sentence in sentences:
        assert " ".join(sentence.split()) in " ".join(plain.split())  # no word is cut


@pytest.mark.slow
def test_readings_stand_under_their_method_and_the_last_line_says_what_to_open(
    printed: dict[str, str],
) -> None:
    lines = printed["pipe"].splitlines()
    for method in ("ft", "lora"):
        place = lines.index(method)
        assert lines[place + 1].startswith("  q: ")
        assert lines[place + 2].startswith("  v: ")
    assert lines[-1] == "Open wd-analysis/report.html"
    without = run(*COMPARE, "--no-report").stdout.splitlines()
    assert without[-1] == "Open wd-analysis/figures/scatter_q.png"


@pytest.mark.slow
def test_signs_are_coloured_and_never_by_colour_alone(printed: dict[str, str]) -> None:
    coloured, plain = printed["80"], printed["80, no colour"]
    assert re.search(r"\x1b\[36m\+\d\.\d\d\x1b\[0m", coloured)
    assert re.search(r"\x1b\[35m−\d\.\d\d\x1b\[0m", coloured)
    assert "\x1b" not in plain
    assert ESCAPE.sub("", coloured) == plain


@pytest.mark.slow
def test_a_pipe_gets_plain_text_and_a_paragraph_a_line(printed: dict[str, str]) -> None:
    assert "\x1b" not in printed["pipe"]
    assert any(len(line) > 200 and line.startswith("Axis out") for line in printed["pipe"].splitlines())


@pytest.mark.slow
def test_progress_names_its_phase() -> None:
    code, written = in_terminal([*COMMAND, *COMPARE, "--spectra"], 100, stderr_too=True)
    assert code == 0
    phases = ["reading", "singular values", "writing tables", "writing report", "drawing"]
    places = [written.index(phase) for phase in phases]
    assert places == sorted(places)
    assert re.search(r"drawing\b.*\b[012]/2", ESCAPE.sub("", written))


@pytest.mark.parametrize("command", ["compare", "plot", "train"])
def test_help_fits_a_terminal_of_80_columns_and_is_grouped(command: str) -> None:
    code, written = in_terminal([*COMMAND, command, "--help"], 80)
    plain = ESCAPE.sub("", written)
    assert code == 0
    assert max(map(len, plain.splitlines())) <= 80
    groups = re.findall(r"^╭─ (.*?) ─*╮$", plain, re.MULTILINE)
    assert {
        "compare": [
            *("What to compare", "What to compare", "Numbers", "Predictions from the learning rate"),
            *("Figures", "Output"),
        ],
        "plot": ["Arguments", "Figures", "Output"],
    }.get(command, groups) == groups
    assert (
        "…" not in plain.replace("TUNED…", "").replace("NAME=VALUE,…", "").replace("1 …)", "")
        or command == "train"
    )


BREAKS = """
import os, signal, sys
sys.argv[0] = "wd-analyze"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from wdanalysis.cli import main
from wdanalysis.figures import batch
batch.Work.draw = lambda *_: os.kill(os.getpid(), signal.{signal})
main()
"""


def broken_off(by: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Compare, and be hit by a signal at the first figure."""
    command = [sys.executable, "-c", BREAKS.format(signal=by)]
    return run(*COMPARE, "--format", "svg", "--style", "talk", *more, command=command)


@pytest.mark.slow
def test_ctrl_c_while_drawing_leaves_what_plot_finishes_as_it_was_asked_for() -> None:
    stopped = broken_off("SIGINT")
    assert stopped.returncode == 130
    assert stopped.stderr == (
        "wd-analyze: interrupted; the tables in wd-analysis are whole: "
        "finish with `wd-analyze plot wd-analysis`.\n"
    )
    noted = json.loads((DIRECTORY / "run.json").read_text())
    assert noted["complete"] is False
    assert noted["unfinished"]["how"] == "finish with `wd-analyze plot wd-analysis`"
    refused = run(*COMPARE)
    assert refused.returncode == 1
    assert "not finished: finish with `wd-analyze plot wd-analysis`" in refused.stderr
    page = run("report", "wd-analysis")
    assert page.returncode == 0
    assert "are not finished: finish with `wd-analyze plot wd-analysis`" in page.stderr

    finished = run("plot", "wd-analysis")
    assert finished.returncode == 0, finished.stderr
    names = {"figures/scatter_q.svg", "figures/scatter_v.svg", "figures/captions.md", "report.html"}
    assert {str(Path(line).relative_to(DIRECTORY)) for line in finished.stdout.splitlines()} == names
    noted = json.loads((DIRECTORY / "run.json").read_text())
    assert noted["complete"] is True
    assert "unfinished" not in noted
    assert names <= set(noted["outputs"])


@pytest.mark.slow
def test_a_killed_command_leaves_the_same() -> None:
    assert broken_off("SIGKILL").returncode == -signal.SIGKILL
    assert json.loads((DIRECTORY / "run.json").read_text())["complete"] is False
    assert run("plot", "wd-analysis").returncode == 0
    assert json.loads((DIRECTORY / "run.json").read_text())["complete"] is True


@pytest.mark.slow
def test_figures_of_earlier_results_go_only_once_the_new_ones_are_whole() -> None:
    run(*COMPARE, "--x", "delta_m_signed")
    (old,) = (DIRECTORY / "figures").glob("scatter_q_*")
    assert broken_off("SIGINT", "--force").returncode == 130
    assert old.exists()
    assert run("plot", "wd-analysis").returncode == 0
    assert not old.exists()


@pytest.mark.slow
def test_tables_that_are_not_whole_are_not_taken_for_results() -> None:
    stops = (
        "import os, signal, sys; sys.argv[0] = 'wd-analyze'\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from wdanalysis.cli import main\n"
        "from wdanalysis.results import folder\n"
        "folder._write_table = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "main()"
    )
    stopped = run(*COMPARE, command=[sys.executable, "-c", stops])
    assert stopped.returncode == 130
    assert stopped.stderr == "wd-analyze: interrupted; wd-analysis holds no results yet.\n"
    refused = run("plot", "wd-analysis")
    assert refused.returncode == 1
    assert "not whole" in refused.stderr
    assert run(*COMPARE).returncode == 0  # no --force is needed where there is nothing


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("compare b t --figures scatter,la", {"scatter,layers"}),
        ("compare b t --figures no", {"none"}),
        ("compare b t --modules q,do", {"q,down"}),
        ("compare b t --axis ", {"out", "in"}),
        ("plot d --style ", {"paper", "talk", "screen"}),
        ("plot d --title s", {"short"}),
        ("plot d --x rel", {"rel_delta_m"}),
        ("train --method ft,d", {"ft,dora", "ft,dvora"}),
        ("train --recipe llama2-7b-c", {"llama2-7b-commonsense-r16", "llama2-7b-commonsense-r32"}),
        ("merge a b c --dtype b", {"bfloat16"}),
    ],
)
def test_a_shell_completes_choices(monkeypatch: pytest.MonkeyPatch, words: str, completed: set[str]) -> None:
    monkeypatch.setenv("_WD_ANALYZE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"wd-analyze {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" "))))
    main = "import sys; sys.argv[0] = 'wd-analyze'; from wdanalysis.cli import main; main()"
    assert set(run(command=[sys.executable, "-c", main]).stdout.split()) == completed


@pytest.mark.slow
def test_what_python_warns_of_is_a_line_like_other_warnings() -> None:
    assert run(*COMPARE).returncode == 0
    done = run("plot", "wd-analysis", "--figures", "density")
    assert done.stderr == "warning: no density is drawn: this comparison has no vectors\n"
    assert run("plot", "wd-analysis", "--figures", "density", "--quiet").stderr == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--figures", "none", "--style", "talk"], "no figures are drawn"),
        (["--figures", "layers", "--x", "delta_m"], "it is for scatter, and --figures has layers"),
        (["--figures", "prediction", "--log"], "and --figures has prediction"),
        (["--figures", "density"], "density shows single vectors: add --vectors"),
        (["--width", "0.2"], "not between 1.5 and 60"),
        (["--steps", "10,20", "--step", "30"], "30 is not among the --steps to keep"),
    ],
)
def test_an_option_that_means_nothing_beside_the_others_is_wrong_usage(options: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["compare", "base.safetensors", "ft", *options])
    assert done.exit_code == 2
    assert said in " ".join(done.output.replace("│", " ").split())
    assert not DIRECTORY.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tuned", "options", "said"),
    [
        ("ft", ["--alpha", "16"], "none is compared: leave it out (--alpha)"),
        ("ft", ["--weight-decay", "0.1"], "no schedule is known: leave it out (--weight-decay)"),
    ],
)
def test_an_option_that_the_checkpoints_have_no_use_for_is_refused(
    tuned: str, options: list[str], said: str
) -> None:
    done = run("compare", "base.safetensors", tuned, *options)
    assert done.returncode == 1
    assert said in done.stderr


@pytest.mark.slow
def test_an_option_that_changes_nothing_is_named() -> None:
    done = run(*COMPARE, "--merge-stacks", "--alpha", "4")
    assert "merge_stacks changes nothing: the model has one stack" in done.stderr
    assert "alpha = 4 was not used, because lora has its own adapter_config.json" in done.stderr
    assert (
        "warning: merge_stacks" in run("plot", "wd-analysis", "--merge-stacks", "--figures", "scatter").stderr
    )


def test_inspect_refuses_an_alpha_where_there_is_no_adapter() -> None:
    refused = CliRunner().invoke(app, ["inspect", "base.safetensors", "--alpha", "2"])
    assert refused.exit_code == 2
    assert "no adapter among these" in refused.output
    assert CliRunner().invoke(app, ["inspect", "base.safetensors", "lora", "--alpha", "2"]).exit_code == 0


@pytest.mark.slow
def test_the_look_of_figures_is_what_the_options_say(tmp_path: Path) -> None:
    write(tmp_path / "tuned.safetensors", moved(llama(layers=6)))
    line = ["compare", "base.safetensors", "tuned.safetensors", "--modules", "q", "--figures", "scatter"]
    look = ["--title", "none", "--style", "talk", "--width", "4", "--dpi", "50", "--share-axes", "--linear"]
    assert run(*line, *look).returncode == 0
    data = (DIRECTORY / "figures" / "scatter_q.png").read_bytes()
    width = struct.unpack(">I", data[16:20])[0]
    assert width == 200  # 4 inches of 50 pixels

"""Files of figures: their names, bytes and text, whoever draws them; and that matplotlib's state is left alone."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from signal import Signals

import matplotlib
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from wdanalysis.errors import OutputError
from wdanalysis.figures import batch as drawing
from wdanalysis.figures import layers, save_figures, scatter
from wdanalysis.figures.batch import CAPTIONS, Work, planned_figures
from wdanalysis.figures.kinds import KINDS, Look
from wdanalysis.figures.style import number, told_apart

AWKWARD = ["_private", "$x^2$", "a/b<script>", "FT_with_a_name_of_26_chars", "100 %", "größe"]


def test_the_whole_set_has_a_file_for_every_module_and_three_of_all(table, tmp_path) -> None:
    paths = save_figures(table(), tmp_path / "figures")
    assert [path.name for path in paths] == [
        *("scatter_q.png", "scatter_v.png", "layers_q.png", "layers_v.png"),
        *("trajectory_q.png", "trajectory_v.png"),
        *("heatmap.png", "figure2.png", "figure8.png", "captions.md"),
    ]
    for path in paths[:-1]:
        picture = imread(path)
        assert picture.shape[1] == 1350  # 6.75 inches at 200 dpi
        assert picture.std() > 0.02


def test_names_of_files_are_safe_and_do_not_collide(table, tmp_path) -> None:
    metrics = table(methods=["FT"], steps=[1], layers=(0,), modules=["Q", "q", "a/b", "a<b", "x" * 300])
    names = [path.name for path in save_figures(metrics, tmp_path, kinds=["scatter"], look=Look(dpi=20))]
    assert names[:4] == ["scatter_Q.png", "scatter_q-2.png", "scatter_a-b.png", "scatter_a-b-2.png"]
    assert len(names[4]) < 100


@pytest.mark.parametrize("format", ["png", "pdf", "svg"])
def test_the_same_table_gives_the_same_bytes(table, tmp_path, format) -> None:
    metrics = table(methods=["FT"], modules=["q"])
    first, second = (save_figures(metrics, tmp_path / run, look=Look(format=format, dpi=50)) for run in "ab")
    assert [path.suffix for path in first] == [*[f".{format}"] * 4, ".md"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_names_are_shown_as_they_are_and_are_text_in_an_svg(table, tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = table(methods=AWKWARD, modules=["q"])
        paths = save_figures(
            metrics, tmp_path, kinds=["scatter", "layers"], look=Look(format="svg", width=20)
        )
    for path in paths[:-1]:
        svg = path.read_text(encoding="utf-8")
        for name in AWKWARD:
            assert f">{name.replace('<', '&lt;').replace('>', '&gt;')}<" in svg


def test_a_legend_keeps_a_label_that_begins_with_an_underscore(table) -> None:
    shown = [text.get_text() for text in layers(table(methods=AWKWARD), "q").legends[0].get_texts()]
    assert shown == AWKWARD


def test_an_unknown_kind_is_refused_before_anything_is_written(table, tmp_path) -> None:
    with pytest.raises(OutputError, match="no figure 'pie'; choose of"):
        save_figures(table(), tmp_path / "figures", kinds=["scatter", "pie"])
    assert not (tmp_path / "figures").exists()


def test_matplotlibs_settings_are_left_alone(table, tmp_path) -> None:
    with matplotlib.rc_context({"text.usetex": True, "figure.facecolor": "black"}):
        before = dict(matplotlib.rcParams)
        save_figures(table(methods=["a_b"], modules=["q"]), tmp_path, kinds=["layers"], look=Look(dpi=50))
        assert dict(matplotlib.rcParams) == before


def test_figures_need_neither_pyplot_nor_a_display() -> None:
    code = (
        "import sys, wdanalysis.figures.batch; assert 'matplotlib' not in sys.modules;"
        "import wdanalysis.figures.scatter_figure; from wdanalysis.figures import layers, scatter;"
        "assert callable(scatter) and callable(layers); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_figure_shows_itself_in_jupyter_and_can_be_drawn_on(table) -> None:
    figure = scatter(table(), "q")
    assert isinstance(figure, Figure)
    figure.axes[0].axhline(1e-5)
    picture, size = figure._repr_png_()
    assert picture.startswith(b"\x89PNG")
    assert size["width"] == 675


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0.00"),
        (0.0621, "0.0621"),
        (-12.34, "−12.3"),
        (101.4, "101"),
        (-1.2e-4, "−1.20×10⁻⁴"),
        (4.56e7, "4.56×10⁷"),
    ],
)
def test_numbers_are_set_as_in_print(value, shown) -> None:
    assert number(value) == shown


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "available_cores", lambda: 2)


@pytest.fixture
def metrics(table) -> pd.DataFrame:
    """A table whose figures are worth a helper."""
    return table(methods=["FT", "LoRA"], modules=["q", "k", "v"])


@pytest.mark.slow
@pytest.mark.usefixtures("two_cores")
def test_a_helper_draws_the_same_bytes_as_its_caller(metrics, tmp_path, monkeypatch) -> None:
    planned = planned_figures({"metrics": metrics}, KINDS, Look())
    work = Work({"metrics": metrics}, Look(dpi=40))
    with drawing._helped(work, planned) as (left, begun):
        while left or not all(future.done() for future in begun.values()):
            time.sleep(0.05)
        by_helper = {figure.file: future.result().content for figure, future in begun.items()}
    assert sorted(by_helper) == sorted(figure.file for figure in planned)
    monkeypatch.setattr(drawing, "available_cores", lambda: 1)
    alone = save_figures(metrics, tmp_path / "alone", look=Look(dpi=40))
    assert {path.name: path.read_bytes() for path in alone if path.name != CAPTIONS} == by_helper


@pytest.mark.slow
@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("signal", ["SIGKILL", "SIGSTOP"])
def test_what_a_helper_leaves_is_drawn_by_its_caller(metrics, tmp_path, monkeypatch, signal) -> None:
    monkeypatch.setattr(drawing, "PATIENCE", 0.1)
    planned = planned_figures({"metrics": metrics}, KINDS, Look())
    known = multiprocessing.active_children()
    with drawing.drawing({"metrics": metrics}, planned, tmp_path, Look(dpi=20)) as finish:
        (helper,) = set(multiprocessing.active_children()) - set(known)
        os.kill(helper.pid, getattr(Signals, signal))
        paths = finish()
    assert [path.name for path in paths] == [*(figure.file for figure in planned), CAPTIONS]
    assert all(path.stat().st_size for path in paths)
    helper.join(60)
    assert not helper.is_alive()


@pytest.mark.usefixtures("two_cores")
def test_a_system_that_starts_no_processes_draws_alone(metrics, tmp_path, monkeypatch) -> None:
    def refused(*_: object) -> None:
        raise NotImplementedError("this system has no semaphores")

    monkeypatch.setattr(drawing, "ProcessPoolExecutor", refused)
    planned = planned_figures({"metrics": metrics}, KINDS, Look())
    assert len(save_figures(metrics, tmp_path, look=Look(dpi=20))) == len(planned) + 1


@pytest.mark.usefixtures("two_cores")
def test_ctrl_c_stops_helpers_and_leaves_nothing(metrics, tmp_path, monkeypatch) -> None:
    def interrupted(*_: object) -> bytes:
        raise KeyboardInterrupt

    planned = planned_figures({"metrics": metrics}, KINDS, Look())
    known = multiprocessing.active_children()
    with drawing.drawing({"metrics": metrics}, planned, tmp_path, Look()) as finish:
        (helper,) = set(multiprocessing.active_children()) - set(known)
        monkeypatch.setattr(Work, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finish()
    helper.join(60)
    assert not helper.is_alive()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_script_without_a_guard_runs_once(metrics, tmp_path) -> None:
    metrics.to_parquet(tmp_path / "metrics.parquet")
    script = tmp_path / "script.py"
    script.write_text(
        "import pandas as pd\n"
        "from wdanalysis.figures import batch\n"
        "print('it runs', flush=True)\n"
        "batch.available_cores = lambda: 2\n"
        "batch.save_figures(pd.read_parquet('metrics.parquet'), 'figures', look=batch.Look(dpi=20))\n"
    )
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "it runs\n"
    assert done.stderr == ""
    planned = planned_figures({"metrics": metrics}, KINDS, Look())
    assert len(list((tmp_path / "figures").iterdir())) == len(planned) + 1


def test_long_names_that_differ_in_the_middle_are_told_apart() -> None:
    names = [f"llama-7b-commonsense-lora-{r}-lr1e-4-seed1-final-checkpoint-of-the-run" for r in ("r8", "r32")]
    short, long = told_apart(names, 30)
    assert "r8-" in short
    assert "r32-" in long
    assert max(map(len, (short, long))) <= 30
    assert len(set(told_apart([f"{'a' * 50}{i}{'b' * 50}{i}" for i in range(12)], 20))) == 12
    assert told_apart(["FT", "LoRA"], 20) == ["FT", "LoRA"]


@pytest.mark.parametrize(
    ("made", "drawn"),
    [
        ({"layers": [None]}, {"scatter", "trajectory", "figure2"}),
        ({"layers": [3]}, {"scatter", "trajectory", "figure2", "heatmap"}),
        ({"steps": [7]}, {"scatter", "layers", "figure2", "figure8", "heatmap"}),
        ({"steps": [None]}, {"scatter", "layers", "figure2", "figure8", "heatmap"}),
        ({"modules": ["q"]}, {"scatter", "layers", "trajectory", "heatmap"}),
        ({"modules": ["encoder.q", "cross.q"]}, {"scatter", "layers", "trajectory", "heatmap"}),
    ],
)
def test_what_has_nothing_to_show_gets_no_figure(table, made, drawn) -> None:
    planned = planned_figures({"metrics": table(**made)}, KINDS, Look())
    assert {figure.kind for figure in planned} == drawn


def test_captions_say_of_each_file_what_the_figure_does_not(table, tmp_path) -> None:
    metrics = table(methods=["FT"], modules=["q"])
    *paths, captions = save_figures(metrics, tmp_path, look=Look(title="none", dpi=20))
    parts = captions.read_text(encoding="utf-8").split("## ")[1:]
    assert [part.split("\n")[0] for part in parts] == [path.name for path in paths]
    assert scatter(metrics, "q").caption in parts[0]
    assert scatter(metrics, "q", title="none").get_suptitle() == ""
    full = scatter(metrics, "q", title="full")
    assert full.get_suptitle().replace("\n", " ").count("(95 %, by layer)") == 1


def test_missing_glyphs_are_one_warning(table, tmp_path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_figures(table(methods=["模型", "型"], modules=["q"]), tmp_path, kinds=["scatter", "layers"])
    (warning,) = caught
    assert "the figures' font has no 型模" in str(warning.message)

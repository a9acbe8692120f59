"""Files of figures: their names, bytes and text, whoever draws them; and that matplotlib's state is left alone."""

from __future__ import annotations

import subprocess
import sys
import warnings

import matplotlib
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from wdanalysis.errors import OutputError
from wdanalysis.figures import batch as drawing
from wdanalysis.figures import layers, save_figures, scatter
from wdanalysis.figures.batch import KINDS, Helpers, planned_figures
from wdanalysis.figures.style import number, told_apart

AWKWARD = ["_private", "$x^2$", "a/b<script>", "FT_with_a_name_of_26_chars", "100 %", "größe"]


def test_the_whole_set_has_a_file_for_every_module_and_method(table, tmp_path) -> None:
    paths = save_figures(table(), tmp_path / "figures")
    assert [path.name for path in paths] == [
        *("scatter_q.png", "scatter_v.png", "layers_q.png", "layers_v.png"),
        *("trajectory_q.png", "trajectory_v.png"),
        *("heatmap_FT.png", "heatmap_LoRA.png", "heatmap_DoRA.png"),
    ]
    for path in paths:
        picture = imread(path)
        assert picture.shape[1] == 1400  # 7 inches at 200 dpi
        assert picture.std() > 0.02


def test_names_of_files_are_safe_and_do_not_collide(table, tmp_path) -> None:
    metrics = table(methods=["LoRA", "lora", "a/b", "a<b", "x" * 300], steps=[1], layers=(0,), modules=["q"])
    names = [path.name for path in save_figures(metrics, tmp_path, kinds=["heatmap"], dpi=20)]
    assert names[:4] == ["heatmap_LoRA.png", "heatmap_lora-2.png", "heatmap_a-b.png", "heatmap_a-b-2.png"]
    assert len(names[4]) < 100


@pytest.mark.parametrize("format", ["png", "pdf", "svg"])
def test_the_same_table_gives_the_same_bytes(table, tmp_path, format) -> None:
    metrics = table(methods=["FT"], modules=["q"])
    first, second = (save_figures(metrics, tmp_path / run, format=format, dpi=50) for run in "ab")
    assert [path.suffix for path in first] == [f".{format}"] * 4
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_names_are_shown_as_they_are_and_are_text_in_an_svg(table, tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = save_figures(
            table(methods=AWKWARD, modules=["q"]), tmp_path, kinds=["scatter", "layers"], format="svg"
        )
    for path in paths:
        svg = path.read_text(encoding="utf-8")
        for name in AWKWARD:
            assert f">{name.replace('<', '&lt;').replace('>', '&gt;')}</text>" in svg


def test_a_legend_keeps_a_label_that_begins_with_an_underscore(table) -> None:
    shown = [text.get_text() for text in layers(table(methods=AWKWARD), "q").legends[0].get_texts()]
    assert shown == AWKWARD


def test_an_unknown_kind_or_format_is_refused_before_anything_is_written(table, tmp_path) -> None:
    for options in ({"kinds": ["scatter", "pie"]}, {"format": "gif"}):
        with pytest.raises(OutputError, match="choose of"):
            save_figures(table(), tmp_path / "figures", **options)
    assert not (tmp_path / "figures").exists()


def test_matplotlibs_settings_are_left_alone(table, tmp_path) -> None:
    with matplotlib.rc_context({"text.usetex": True, "figure.facecolor": "black"}):
        before = dict(matplotlib.rcParams)
        save_figures(table(methods=["a_b"], modules=["q"]), tmp_path, kinds=["layers"], dpi=50)
        assert dict(matplotlib.rcParams) == before


def test_figures_need_neither_pyplot_nor_a_display() -> None:
    code = "import sys, wdanalysis.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_figure_shows_itself_in_jupyter_and_can_be_drawn_on(table) -> None:
    figure = scatter(table(), "q")
    assert isinstance(figure, Figure)
    figure.axes[0].axhline(1e-5)
    picture, size = figure._repr_png_()
    assert picture.startswith(b"\x89PNG")
    assert size["width"] == 700


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


@pytest.mark.usefixtures("two_cores")
def test_a_helper_draws_the_same_bytes_as_its_caller(metrics, tmp_path, monkeypatch) -> None:
    planned = planned_figures(metrics, KINDS, "png")
    with Helpers(len(planned)) as helpers:
        (helper,) = helpers._processes
        with drawing.drawing(metrics, planned, tmp_path / "both", helpers, dpi=40) as finish:
            assert helper.wait(60) == 0
            by_helper = {path.name: path.read_bytes() for path in (tmp_path / "both").glob(".*/*.png")}
            assert sorted(by_helper) == sorted(figure.file for figure in planned)
            assert len(finish()) == len(planned)
    monkeypatch.setattr(drawing, "available_cores", lambda: 1)
    alone = save_figures(metrics, tmp_path / "alone", dpi=40)
    assert {path.name: path.read_bytes() for path in alone} == by_helper


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("how", ["raise SystemExit(1)", "import time; time.sleep(600)"])
def test_what_a_helper_leaves_is_drawn_by_its_caller(metrics, tmp_path, monkeypatch, how) -> None:
    def useless() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", how], stdin=subprocess.PIPE)

    monkeypatch.setattr(drawing, "_started", useless)
    monkeypatch.setattr(drawing, "PATIENCE", 0.1)
    planned = planned_figures(metrics, KINDS, "png")
    with (
        Helpers(len(planned)) as helpers,
        drawing.drawing(metrics, planned, tmp_path, helpers, dpi=20) as finish,
    ):
        (claimed,) = tmp_path.glob(".drawing-*")
        (claimed / planned[0].file).touch()  # by the helper, before it died
        paths = finish()
    assert all(path.stat().st_size for path in paths)
    assert sorted(tmp_path.iterdir()) == sorted(paths)


@pytest.mark.usefixtures("two_cores")
def test_ctrl_c_stops_helpers_and_leaves_nothing(metrics, tmp_path) -> None:
    planned = planned_figures(metrics, KINDS, "png")
    with Helpers(len(planned)) as helpers:
        (helper,) = helpers._processes
        with pytest.raises(KeyboardInterrupt), drawing.drawing(metrics, planned, tmp_path, helpers):
            raise KeyboardInterrupt
    assert helper.poll() is not None
    assert list(tmp_path.iterdir()) == []


def test_long_names_that_differ_in_the_middle_are_told_apart() -> None:
    names = [f"llama-7b-commonsense-lora-{r}-lr1e-4-seed1-final-checkpoint-of-the-run" for r in ("r8", "r32")]
    short, long = told_apart(names, 30)
    assert "r8-" in short
    assert "r32-" in long
    assert max(map(len, (short, long))) <= 30
    assert len(set(told_apart([f"{'a' * 50}{i}{'b' * 50}{i}" for i in range(12)], 20))) == 12
    assert told_apart(["FT", "LoRA"], 20) == ["FT", "LoRA"]


def test_a_method_without_layers_gets_no_heat_map(table) -> None:
    metrics = pd.concat([table(methods=["FT"]), table(methods=["flat"], layers=[None])])
    assert [figure.name for figure in planned_figures(metrics, ["heatmap"], "png")] == ["FT"]

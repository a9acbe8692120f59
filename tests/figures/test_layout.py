"""What a reader can read: texts neither overlap nor leave the figure, measured with the renderer."""

from __future__ import annotations

import io
import math
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
import pytest
from figure_tables import LONG, ROLES, SHORT, faults, metrics, tables, text_boxes
from matplotlib.figure import Figure

import wdanalysis.figures as all_figures
from wdanalysis.errors import OutputError
from wdanalysis.figures import layers, style
from wdanalysis.figures.batch import PlannedFigure, Work
from wdanalysis.figures.kinds import KINDS, Look

SIZES = [("paper", 3.25), ("paper", 6.75), ("talk", 3.25), ("talk", 6.75)]
SMALL: dict[str, Any] = {"methods": SHORT[:1], "steps": 1, "layers": 1}
LARGE: dict[str, Any] = {"methods": SHORT, "steps": 50, "layers": 126, "modules": ("q",), "spread": 3.0}
LONG_NAMES: dict[str, Any] = {"methods": LONG, "steps": 5, "layers": 12, "modules": ROLES[:3], "spread": 1.5}
CASES = {"small": SMALL, "long names": LONG_NAMES, "large": LARGE}


def drawn(kind: str, of: dict[str, Any], **choices: Any) -> Figure:
    of_kind = KINDS[kind]
    beside = {name: of[name] for name in of_kind.beside if name in of}
    return getattr(all_figures, kind)(of[of_kind.table], *["q"] * bool(of_kind.of), **beside, **choices)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_no_text_overlaps_another_or_leaves_the_figure(case) -> None:
    of = tables(**CASES[case])
    found = {}
    for look, width in SIZES:
        with style.context(look):
            for kind in KINDS:
                if len(of[KINDS[kind].table]):
                    found[kind, look, width] = faults(drawn(kind, of, figsize=(width, None)))
    assert {place: wrong for place, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("kind", ["scatter", "layers", "heatmap"])
@pytest.mark.parametrize(("look", "width"), SIZES)
def test_three_methods_are_legible_in_a_column_and_on_a_slide(kind, look, width) -> None:
    of = tables(SHORT[:3], 5, 12, spread=5.0)
    with style.context(look):
        assert faults(drawn(kind, of, figsize=(width, None))) == []


def test_a_measure_of_faults_sees_them() -> None:
    figure = Figure(figsize=(2, 1))
    for place in (0.5, 0.52, 0.95):
        figure.text(place, 0.5, "long text")
    assert faults(figure) == ["'long text' leaves the figure", "'long text' and 'long text' overlap"]


def test_nothing_but_a_short_title_and_fitted_numbers_stands_on_a_scatter() -> None:
    figure = drawn("scatter", tables(SHORT[:2], 4, 6))
    words = {text for text, _ in text_boxes(figure) if not text.replace("−", "").replace(".", "").isdigit()}
    said = {word for text in words for word in text.split("\n")}
    assert figure.get_suptitle() == "q: ΔM against ΔD (axis out)"
    assert all(len(word) < 45 for word in said)
    assert "one vector per output feature" in figure.caption


@pytest.mark.parametrize("kind", KINDS)
def test_a_caller_may_draw_into_a_figure_of_his_own(kind) -> None:
    of = tables(SHORT[:2], 6, 4)
    panels = len([axes for axes in drawn(kind, of).axes if axes.get_label() != "<colorbar>"])
    mine = Figure(figsize=(12, 12), layout="constrained")
    grid = mine.subplots(math.ceil((panels + 1) / 2), 2).ravel()
    figure = drawn(kind, of, ax=grid[:panels] if panels > 1 else grid[0])
    assert figure is mine
    assert mine.get_suptitle() == ""
    assert all(axes.has_data() for axes in grid[:panels])
    assert not any(axes.has_data() for axes in grid[panels:])
    mine.savefig(io.BytesIO(), dpi=30)
    with pytest.raises(ValueError, match=f"has {panels} panel"):
        drawn(kind, of, ax=[grid[0]] * (panels + 1))


def contrast(colour: Any, ground: Any) -> float:
    """WCAG's ratio of the luminances."""

    def luminance(given: Any) -> float:
        parts = np.array(matplotlib.colors.to_rgb(given))
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(colour), luminance(ground)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dark_style_is_honoured_and_legible(kind) -> None:
    of = tables(SHORT, 6, 4)
    with matplotlib.rc_context(), matplotlib.style.context("dark_background"):
        figure = drawn(kind, of)
        assert matplotlib.colors.to_hex(figure.get_facecolor()) == "#000000"
        for axes in figure.axes:
            assert all(contrast(line.get_color(), "black") > 2 for line in axes.lines)
            assert all(contrast(text.get_color(), "black") > 4.5 for text in (*axes.texts, axes.title))


def test_what_a_user_has_set_stays() -> None:
    of = metrics(SHORT[:2], 3, 4)
    mine = {"font.size": 12.5, "figure.figsize": (5.0, 3.0), "lines.linewidth": 3.0, "savefig.dpi": 50}
    with matplotlib.rc_context(mine):
        figure = layers(of, "q")
        size = figure.axes[0].xaxis.label.get_fontsize()
    assert (size, figure.get_figwidth(), figure.axes[0].lines[0].get_linewidth()) == (12.5, 5.0, 3.0)
    with matplotlib.rc_context({"axes.prop_cycle": matplotlib.cycler(color=["#111111", "#222222"])}):
        assert [line.get_color() for line in layers(of, "q").axes[0].lines[:3:2]] == ["#111111", "#222222"]


def test_a_colour_map_is_that_of_the_caller() -> None:
    of = tables(SHORT[:2], 5, 4)
    (points,) = [
        c for c in drawn("scatter", of, cmap="plasma").axes[0].collections if c.get_array() is not None
    ][:1]
    assert points.get_cmap()(0.3)[:3] == matplotlib.colormaps["plasma"](0.3)[:3]
    first = drawn("layers", of, cmap="plasma").axes[0].lines[0]
    assert first.get_color() == matplotlib.colors.to_hex(matplotlib.colormaps["plasma"](0.0))


def test_a_font_that_is_not_there_is_one_sentence() -> None:
    work = Work(tables(SHORT[:1], 2, 3), Look(font="No Such Font"))
    with pytest.raises(OutputError, match="the font 'No Such Font' is not installed") as raised:
        work.draw(PlannedFigure("scatter", "q", "scatter_q.png"))
    assert raised.value.parameter == "font"


def test_ticks_take_the_room_that_the_panel_has() -> None:
    shown = {}
    for width in (2.0, 9.0):
        figure = layers(metrics(SHORT[:1], 3, 126), "q", figsize=(width, 2.5))
        figure.draw_without_rendering()
        shown[width] = len(figure.axes[0].get_xticks())
    assert shown[2.0] < shown[9.0]


@pytest.mark.parametrize(("look", "width"), [("paper", 3.25), ("talk", 6.75)])
@pytest.mark.parametrize("choice", [{"log": True}, {"step": 100}, {"title": "full"}, {"title": "none"}])
def test_every_choice_of_a_look_is_legible(look, width, choice) -> None:
    of = tables(SHORT[:3], 5, 12, spread=5.0)
    with style.context(look):
        for kind in ("scatter", "layers", "heatmap"):
            if choice.keys() <= {"title", *KINDS[kind].takes}:
                assert faults(drawn(kind, of, figsize=(width, None), **choice)) == []

"""The scatter of ΔM against ΔD: its artists hold the table's points and scipy's line."""

from __future__ import annotations

import io
import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy import stats

from wdanalysis.analysis.readings import readings
from wdanalysis.analysis.regression import fit
from wdanalysis.errors import ComparisonError
from wdanalysis.figures import scatter


def panels(figure: Figure) -> list:
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def texts(axes) -> str:
    return "\n".join([axes.get_title(loc="left"), *(text.get_text() for text in axes.texts)])


def drawn_points(axes) -> np.ndarray:
    marked = [c.get_offsets() for c in axes.collections if len(c.get_offsets()) and c.get_array() is not None]
    return np.sort(np.concatenate(marked), axis=0)


def test_every_method_has_a_panel_with_its_points(table) -> None:
    metrics = table()
    for panel, method in zip(panels(scatter(metrics, "v")), ("FT", "LoRA", "DoRA"), strict=True):
        rows = metrics[(metrics["method"] == method) & (metrics["module"] == "v")]
        assert panel.get_title(loc="left") == method
        np.testing.assert_array_equal(drawn_points(panel), np.sort(rows[["delta_d", "delta_m"]], axis=0))


def test_the_line_is_that_of_scipy_over_the_range_of_the_points(table) -> None:
    metrics = table(methods=["FT"])
    rows = metrics[metrics["module"] == "q"]
    expected = stats.linregress(rows["delta_d"], rows["delta_m"])
    x, y = panels(scatter(metrics, "q"))[0].lines[0].get_data()
    assert (x[0], x[-1]) == (rows["delta_d"].min(), rows["delta_d"].max())
    np.testing.assert_allclose(y, expected.intercept + expected.slope * np.asarray(x), rtol=1e-10)


def test_a_panel_names_r_its_interval_slope_and_n(table) -> None:
    metrics = table(methods=["FT"])
    rows = metrics[metrics["module"] == "q"]
    line = fit(rows["delta_d"], rows["delta_m"], layers=rows["layer"], steps=rows["step"])
    numbers = [stats.pearsonr(rows["delta_d"], rows["delta_m"]).statistic, line.r_low, line.r_high]
    r, low, high = (f"{number:.2f}".replace("-", "−") for number in numbers)
    shown = texts(panels(scatter(metrics, "q"))[0])
    assert f"r = {r} [{low}, {high}]" in shown
    assert f"n = {len(rows)}" in shown


def test_colour_is_the_layer_and_marker_the_step(table) -> None:
    figure = scatter(table(methods=["FT"], layers=(3, 7, 11)), "q")
    groups = [c for c in panels(figure)[0].collections if c.get_array() is not None]
    assert [list(group.get_array()) for group in groups] == [[3, 7, 11]] * 3
    assert len({group.get_paths()[0].vertices.tobytes() for group in groups}) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()][:3] == [
        f"step {step}" for step in (500, 1000, 2000)
    ]


def test_many_steps_share_a_marker_and_the_legend_names_their_range(table) -> None:
    figure = scatter(table(methods=["FT"], steps=range(100, 5001, 100), layers=(0, 1)), "q")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    ranges = [label for label in labels if label.startswith("step ")]
    assert len(ranges) == 7
    assert ranges[0].startswith("step 100–")
    assert ranges[-1].endswith("–5000")


def test_panels_share_axes_unless_a_method_would_shrink_to_a_spot(table) -> None:
    alike = table(methods=["FT", "LoRA"])
    unlike = alike.copy()
    unlike.loc[unlike["method"] == "FT", ["delta_m", "delta_d"]] *= 100
    note = "the axes differ from panel to panel"

    for metrics, share, expected in [(alike, None, True), (unlike, None, False), (unlike, True, True)]:
        figure = scatter(metrics, "q", share_axes=share)
        first, second = panels(figure)
        assert (first.get_xlim() == second.get_xlim()) is expected
        assert (note in figure.get_suptitle()) is not expected


def test_a_matrix_without_a_value_is_not_drawn_and_is_named(table) -> None:
    metrics = table(methods=["FT"])
    metrics.loc[0, "delta_d"] = math.nan
    figure = scatter(metrics, "q")
    assert len(drawn_points(panels(figure)[0])) == 17
    assert "1 matrix without a value (FT)" in figure.get_suptitle()


def test_points_near_the_rounding_floor_are_hollow_and_counted(table) -> None:
    metrics = table(methods=["FT"], steps=[None], modules=["q"]).assign(
        floor_ratio=[1, 2.9, 3, 10, 100, np.nan]
    )
    figure = scatter(metrics, "q")
    figure.savefig(io.BytesIO())
    filled, hollow = (c for c in panels(figure)[0].collections if c.get_array() is not None)
    assert list(hollow.get_array()) == [0, 1]
    assert len(hollow.get_facecolor()) == 0
    assert not np.array_equal(*hollow.get_edgecolor())  # the layers' colours
    assert len(filled.get_facecolor()) == 4
    assert "hollow: ΔD under 3 × what rounding makes by itself (2 of 6)" in figure.get_suptitle()


def test_the_heading_ends_with_the_reading_of_every_panel(table) -> None:
    metrics = table(methods=["FT", "LoRA"], steps=[None])
    heading = scatter(metrics, "v").get_suptitle().replace("\n", " ")
    said = readings(metrics).query("module == 'v'").groupby("method")["sentence"].agg(" ".join)
    for method in ("FT", "LoRA"):
        assert f"{method}: {said[method]}" in heading


@pytest.mark.parametrize("layers", [(0,), (0, 1), (None,)])
def test_too_few_points_have_no_line(table, layers) -> None:
    for panel in panels(scatter(table(steps=[None], layers=layers), "q")):
        assert not panel.lines
        assert f"n = {len(layers)}: no line" in texts(panel)


def test_a_method_without_values_says_so(table) -> None:
    metrics = table()
    metrics.loc[metrics["method"] == "LoRA", "delta_m"] = math.nan
    assert "no values" in texts(panels(scatter(metrics, "q"))[1])


@pytest.mark.parametrize("axis", ["out", "in"])
def test_the_figure_names_its_axis(table, axis) -> None:
    assert f"(axis={axis})" in scatter(table().assign(axis=axis), "q").get_suptitle()


def test_two_axes_in_one_figure_are_refused(table) -> None:
    with pytest.raises(ComparisonError, match="one axis"):
        scatter(pd.concat([table(), table().assign(axis="in")]), "q")


def test_an_unknown_module_is_answered_with_the_known_ones(table) -> None:
    with pytest.raises(ComparisonError, match="no module 'k' in the metrics table, which has q, v"):
        scatter(table(), "k")


@pytest.mark.parametrize("scale", [1e-12, 1e-9, 1e-5, 1e-1, 1e3])
def test_tick_labels_stay_short_at_any_scale(table, scale) -> None:
    figure = scatter(table(scale=scale), "q")
    figure.savefig(io.BytesIO())
    labels = [label.get_text() for panel in panels(figure) for label in panel.get_xticklabels()]
    assert any(labels)
    assert max(map(len, labels)) <= 6

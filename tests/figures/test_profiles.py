"""ΔM and ΔD by layer and by step: the lines are the table's rows, their medians and quartiles."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from wdanalysis.analysis.runs import averaged
from wdanalysis.errors import ComparisonError
from wdanalysis.figures import heatmap, layers, trajectory


def labels(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_layers_shows_each_methods_last_step(table) -> None:
    metrics = table()
    figure = layers(metrics, "q")
    for panel, column in zip(figure.axes, ("delta_m", "delta_d"), strict=True):
        for line, method in zip(panel.lines, ("FT", "LoRA", "DoRA"), strict=True):
            rows = metrics.query("module == 'q' and step == 2000").query(f"method == {method!r}")
            np.testing.assert_array_equal(line.get_xdata(), rows["layer"].to_numpy(int))
            np.testing.assert_array_equal(line.get_ydata(), rows[column])
    assert labels(figure) == ["FT", "LoRA", "DoRA"]
    assert "Step 2000" in figure.caption


def test_layers_shows_the_step_that_is_asked_for(table) -> None:
    metrics = table(methods=["FT"])
    rows = metrics.query("module == 'q' and step == 500")
    np.testing.assert_array_equal(
        layers(metrics, "q", step=500).axes[0].lines[0].get_ydata(), rows["delta_m"]
    )
    with pytest.raises(ComparisonError, match="no step 7 in the metrics table, which has 500, 1000, 2000"):
        layers(metrics, "q", step=7)


def test_methods_with_different_last_steps_are_labelled_with_them(table) -> None:
    metrics = table(methods=["FT", "LoRA"])
    metrics = metrics[(metrics["method"] == "FT") | (metrics["step"] < 2000)]
    assert labels(layers(metrics, "q")) == ["FT (step 2000)", "LoRA (step 1000)"]


def test_layers_has_a_row_of_panels_for_every_module(table) -> None:
    figure = layers(table(modules=["q", "k", "v"]))
    assert [axes.get_title(loc="left") for axes in figure.axes[::2]] == ["q", "k", "v"]


@pytest.mark.parametrize("only", [(5,), (None,)])
def test_a_single_layer_is_a_point_for_each_method(table, only) -> None:
    panel = layers(table(layers=only), "q").axes[0]
    assert [list(line.get_xdata()) for line in panel.lines] == [[0], [1], [2]]


def test_experts_of_a_layer_are_shown_by_their_median(table) -> None:
    metrics = table(methods=["FT"], steps=[1], layers=(0, 0, 0, 1))
    rows = metrics[metrics["module"] == "q"]
    expected = [rows["delta_m"][:3].median(), rows["delta_m"].iloc[3]]
    assert list(layers(metrics, "q").axes[0].lines[0].get_ydata()) == expected


def test_linear_axes_start_at_zero_and_a_wide_range_is_logarithmic(table) -> None:
    metrics = table()
    linear = layers(metrics, "q").axes[0]
    assert (linear.get_yscale(), linear.get_ylim()[0]) == ("linear", 0)
    metrics.loc[metrics["method"] == "FT", "delta_m"] *= 1000
    left, right = layers(metrics, "q").axes
    assert (left.get_yscale(), right.get_yscale()) == ("log", "linear")
    assert layers(metrics, "q", log=False).axes[0].get_yscale() == "linear"


def test_trajectory_is_the_median_of_the_layers_with_its_quartiles(table) -> None:
    metrics = table(methods=["FT"])
    rows = metrics[metrics["module"] == "q"]
    values = rows["delta_d"].to_numpy().reshape(3, 6)
    panel = trajectory(metrics, "q").axes[1]
    np.testing.assert_array_equal(panel.lines[0].get_xdata(), [500, 1000, 2000])
    np.testing.assert_allclose(panel.lines[0].get_ydata(), np.median(values, axis=1), rtol=1e-12)
    edges = panel.collections[0].get_paths()[0].vertices[:, 1]
    for quartile in np.percentile(values, [25, 75], axis=1).ravel():
        assert np.isclose(edges, quartile, rtol=1e-12).any()


def test_a_method_without_steps_is_named_and_not_drawn(table) -> None:
    metrics = table()
    metrics.loc[metrics["method"] == "LoRA", "step"] = None
    figure = trajectory(metrics, "q")
    assert labels(figure) == ["FT", "DoRA"]
    assert "Not shown: LoRA, without a step" in figure.caption


def test_a_table_without_steps_or_values_gives_a_sentence_and_no_lines(table) -> None:
    for figure in (
        trajectory(table(steps=[None]), "q"),
        layers(table().assign(delta_m=math.nan), "q"),
    ):
        assert not any(panel.lines for panel in figure.axes)
        assert all(panel.texts[0].get_text().startswith("no ") for panel in figure.axes)


def test_a_method_keeps_its_colour_where_another_is_missing(table) -> None:
    metrics = table(methods=["FT", "LoRA"])
    without = metrics[(metrics["method"] != "FT") | (metrics["module"] == "v")]
    assert (
        layers(without, "q").axes[0].lines[0].get_color() == layers(metrics, "q").axes[0].lines[1].get_color()
    )


def test_points_near_the_rounding_floor_are_hollow(table) -> None:
    metrics = table(methods=["FT"], steps=[1, 2], modules=["q"], layers=(0, 1, 2)).assign(floor_ratio=50.0)
    metrics.loc[metrics.eval("step == 2 and layer == 0 or step == 1 and layer > 0"), "floor_ratio"] = 2.0
    for figure, at, count in (
        (layers(metrics, "q"), [0], "1 of 3"),
        (trajectory(metrics, "q"), [1], "3 of 6"),
    ):
        for panel in figure.axes:
            line, hollow = panel.lines
            assert hollow.get_markerfacecolor() == "#ffffff"
            assert list(hollow.get_xdata()) == at
            assert set(hollow.get_ydata()) <= set(line.get_ydata())
        assert f"ΔD under 3 × what rounding makes by itself ({count})" in figure.caption


def test_means_over_runs_are_those_of_the_tables_where_a_run_lacks_a_matrix_or_a_step(table) -> None:
    one = table(methods=["FT"], modules=["q"])
    one = one.assign(name=[f"h.{layer}.q" for layer in one["layer"]])
    other = one.assign(delta_m=3 * one["delta_m"], delta_d=2 * one["delta_d"])
    lacking = other[(other["step"] < 2000) & (other["layer"] != 4)]
    metrics = pd.concat([one.assign(run="seed-0"), lacking.assign(run="seed-1")], ignore_index=True)
    mean = averaged(metrics)
    last = mean[mean["step"] == 1000]
    panel = layers(metrics, "q").axes[0]
    whole, short, strong = panel.lines
    assert [len(line.get_xdata()) for line in (whole, short)] == [6, 5]
    assert list(strong.get_xdata()) == [0, 1, 2, 3, 5]
    np.testing.assert_array_equal(strong.get_ydata(), last["delta_m"])
    cells = heatmap(metrics, methods="FT").axes[0].collections[0].get_array()
    np.testing.assert_array_equal(cells.compressed(), last["delta_m"])
    line = trajectory(metrics, "q").axes[0].lines[-1]
    np.testing.assert_array_equal(line.get_ydata(), mean.groupby("step")["delta_m"].median())

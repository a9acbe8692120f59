"""The heat map: a cell holds the value of its layer and module."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import LogNorm

from wdanalysis.errors import ComparisonError
from wdanalysis.figures import heatmap


def test_cells_hold_the_last_steps_values_by_module_and_layer(table) -> None:
    metrics = table(modules=["v", "q"], layers=(0, 1, 3))
    figure = heatmap(metrics, methods="LoRA")
    rows = metrics.query("method == 'LoRA' and step == 2000")
    for panel, column in zip(figure.axes[:2], ("delta_m", "delta_d"), strict=True):
        cells = panel.collections[0].get_array()
        np.testing.assert_array_equal(cells[:, [0, 1, 3]].ravel(), rows[column])
        assert cells[:, 2].mask.all()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["v", "q"]
    assert "Grey: no value" in figure.caption
    assert "Step 2000" in figure.caption


def test_colours_start_at_zero_and_a_wide_range_is_logarithmic(table) -> None:
    metrics = table(methods=["FT"], steps=[1])
    metrics.loc[0, "delta_d"] *= 1000
    left, right = heatmap(metrics, methods="FT").axes[:2]
    assert left.collections[0].norm.vmin == 0
    assert isinstance(right.collections[0].norm, LogNorm)


def test_a_single_layer_fills_its_cell(table) -> None:
    mesh = heatmap(table(layers=(4,)), methods="FT").axes[0].collections[0]
    np.testing.assert_array_equal(mesh.get_coordinates()[0, :, 0], [3.5, 4.5])


def test_what_has_no_layer_or_no_value_is_counted(table) -> None:
    metrics = table(methods=["FT"], steps=[1], layers=(0, 1, None))
    metrics.loc[0, "delta_m"] = math.nan
    heading = heatmap(metrics, methods="FT").caption
    assert "1 matrix without a value (FT), 2 matrices without a layer (FT)" in heading
    empty = heatmap(metrics[metrics["layer"].isna()], methods="FT")
    assert all(panel.texts[0].get_text() == "no layers with values" for panel in empty.axes)


def test_an_unknown_method_is_answered_with_the_known_ones(table) -> None:
    with pytest.raises(ComparisonError, match="no method 'VeRA' in the table, which has FT, LoRA, DoRA"):
        heatmap(table(), methods="VeRA")


def test_a_cell_near_the_rounding_floor_has_a_dot(table) -> None:
    metrics = table(methods=["FT"], steps=[1], modules=["q", "v"], layers=(0, 1)).assign(floor_ratio=50.0)
    metrics.loc[metrics.eval("module == 'v' and layer == 1"), "floor_ratio"] = 2.0
    figure = heatmap(metrics, methods="FT")
    for panel in figure.axes[:2]:
        np.testing.assert_array_equal(panel.collections[1].get_offsets(), [[1, 1]])
    assert "Dot: ΔD under 3 × what rounding makes by itself (1 of 4)" in figure.caption


def test_methods_share_one_scale_of_each_quantity(table) -> None:
    metrics = table(methods=["FT", "LoRA"], steps=[1])
    metrics.loc[metrics["method"] == "LoRA", "delta_m"] *= 3
    figure = heatmap(metrics)
    assert [axes.get_title(loc="left") for axes in figure.axes[:4]] == ["FT", "", "LoRA", ""]
    for place, column in enumerate(("delta_m", "delta_d")):
        norms = [axes.collections[0].norm for axes in figure.axes[place:4:2]]
        assert {(norm.vmin, norm.vmax) for norm in norms} == {(0, metrics[column].max())}
        assert figure.axes[4 + place].get_xlabel().startswith(("ΔM", "ΔD")[place])


def test_a_module_outside_the_layers_has_no_row(table) -> None:
    metrics = table(methods=["FT"], steps=[1])
    metrics.loc[metrics["module"] == "v", "layer"] = None
    shown = heatmap(metrics).axes[0]
    assert [label.get_text() for label in shown.get_yticklabels()] == ["q"]


def test_every_expert_of_a_module_gets_a_row(table) -> None:
    metrics = table(methods=["FT"], steps=[1], modules=["q", "up", "up"], layers=(0, 1, 2))
    metrics["expert"] = pd.array([pd.NA] * 9, dtype="Int64")
    of_up = metrics.index[metrics["module"] == "up"]
    metrics.loc[of_up, "expert"] = [10, 2] * 3
    figure = heatmap(metrics, methods="FT", experts="up")
    for panel, column in zip(figure.axes[:2], ("delta_m", "delta_d"), strict=True):
        cells = panel.collections[0].get_array()
        for row, expert in enumerate((2, 10)):
            of_expert = metrics[metrics["expert"] == expert].sort_values("layer")
            np.testing.assert_array_equal(cells[row], of_expert[column])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["2", "10"]
    assert "experts of up" in figure.caption
    with pytest.raises(ComparisonError, match=r"no experts of 'q' .* with experts are up"):
        heatmap(metrics, methods="FT", experts="q")

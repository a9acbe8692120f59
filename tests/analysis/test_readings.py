"""Each rule says its sentence where the numbers carry it, and nothing where they do not."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from numpy.typing import ArrayLike
from scipy import stats

from wdanalysis.analysis.readings import READING_COLUMNS, RULES, Panel, reading, readings

RNG = np.random.default_rng(0)
LAYERS, STEPS = 12, 4
UP = np.linspace(1, 2, LAYERS)
NOISE = RNG.permutation(UP)


def panel(delta_d: ArrayLike, delta_m: ArrayLike, **columns: object) -> pd.DataFrame:
    """Rows of one method and module: steps × layers."""
    delta_d = np.atleast_2d(delta_d)
    steps, layers = delta_d.shape
    data = {
        "method": "FT",
        "step": pd.array(np.repeat(100 * np.arange(1, steps + 1), layers), dtype="Int64"),
        "layer": pd.array(np.tile(np.arange(layers), steps), dtype="Int64"),
        "module": "q",
        "axis": "out",
        "delta_d": delta_d.ravel(),
        "delta_m": np.broadcast_to(delta_m, delta_d.shape).ravel(),
    }
    return pd.DataFrame(data | columns)


def said(rule: str, rows: pd.DataFrame) -> str | None:
    return RULES[rule](Panel.of(rows))


def by_step(first: ArrayLike, growth: ArrayLike) -> np.ndarray:
    """Values of each layer that grow with the steps."""
    return np.asarray(first) + np.arange(STEPS)[:, None] * np.asarray(growth)


def test_a_trend_across_layers_is_told_with_its_r() -> None:
    assert said("trend", panel(UP, UP + 0.1 * NOISE)).startswith("Across layers ΔM rises with ΔD (r = +")
    assert said("trend", panel(UP, 3 - UP)) == "Across layers ΔM falls as ΔD rises (r = −1.00, n = 12)."


def test_what_is_not_significant_is_no_clear_trend() -> None:
    assert said("trend", panel(UP, NOISE)).startswith("Across layers there is no clear trend (r = ")


def test_few_layers_have_no_trend_however_straight() -> None:
    assert said("trend", panel(UP[:5], UP[:5])) == "Too few layers (5) to read a trend across them."


def test_experts_of_few_layers_are_few_layers() -> None:
    assert "Too few layers (2)" in said("trend", panel(UP, UP, layer=np.arange(LAYERS) % 2))


def test_a_trend_within_every_layer_may_stand_beside_none_across_them() -> None:
    rows = panel(by_step(UP, 0.01), by_step(NOISE, 0.01))
    text = said("trend", rows)
    assert text.startswith("ΔM rises with ΔD within every layer; across layers there is no clear trend (r = ")


def test_most_layers_are_not_every_layer() -> None:
    growth = np.where(np.arange(LAYERS) < 2, -0.01, 0.01)
    text = said("trend", panel(by_step(UP, 0.01), by_step(NOISE, growth)))
    assert text.startswith("ΔM rises with ΔD within most layers (83 %); ")


def test_layers_of_both_signs_have_no_common_trend() -> None:
    growth = np.where(np.arange(LAYERS) % 2, -0.01, 0.01)
    text = said("trend", panel(by_step(UP, 0.01), by_step(NOISE, growth)))
    assert text.startswith("Within layers ΔM has no common trend; ")


def test_two_steps_are_no_trend_within_a_layer() -> None:
    rows = panel(by_step(UP, 0.01)[:2], by_step(NOISE, 0.01)[:2])
    assert "within" not in said("trend", rows).lower()


def test_the_last_step_speaks_for_the_layers_and_not_all_steps_at_once() -> None:
    """Four steps that repeat one weak trend are not four times the evidence."""
    weak = UP + 1.6 * NOISE
    assert stats.pearsonr(UP, weak).pvalue > 0.05
    assert stats.pearsonr(np.tile(UP, STEPS), np.tile(weak, STEPS)).pvalue < 0.05
    rows = panel(np.tile(UP, (STEPS, 1)), np.tile(weak, (STEPS, 1)))
    assert "no clear trend" in said("trend", rows)


def test_a_pooled_r_that_hides_opposite_trends_is_told() -> None:
    rows = panel(by_step(UP, 0.3), by_step(-UP, 0.3))
    assert said("pooled_hides", rows).startswith("The pooled r of ")
    assert said("pooled_hides", panel(by_step(UP, 0.3), by_step(UP, 0.3))) is None
    assert said("pooled_hides", panel(UP, -UP)) is None


def shrunk(factors: ArrayLike, unshrunk: ArrayLike, **columns: object) -> pd.DataFrame:
    return panel(NOISE, UP, shrink=factors, delta_m_unshrunk=unshrunk, **columns)


def test_one_common_shrink_is_told_with_its_share_and_size() -> None:
    assert said("shrink", shrunk(0.009, 0.08 * UP)) == "92 % of ΔM is one common shrink of 0.9 %."
    assert said("shrink", shrunk(-0.009, 0.08 * UP)) == "92 % of ΔM is one common growth of 0.9 %."


def test_factors_that_differ_are_not_one() -> None:
    text = said("shrink", shrunk(0.01 * UP, 0.08 * UP))
    assert text == "92 % of ΔM is a uniform shrink of each matrix, by 1 % to 2 %."


def test_a_shrink_that_explains_little_or_goes_both_ways_is_not_told() -> None:
    assert said("shrink", shrunk(0.009, 0.6 * UP)) is None
    assert said("shrink", shrunk(0.009 * (-1) ** np.arange(LAYERS), 0.08 * UP)) is None


def test_a_share_that_is_not_all_is_not_rounded_to_all() -> None:
    assert said("shrink", shrunk(0.009, 0.001 * UP)).startswith("99 % ")
    assert said("shrink", shrunk(0.009, 0 * UP)).startswith("100 % ")


def test_a_trend_that_only_shows_without_the_shrink_is_told() -> None:
    text = said("without_shrink", shrunk(0.009, 0.05 * NOISE))
    assert text == "Without that, ΔM rises with ΔD across layers (r = +1.00)."
    assert said("without_shrink", shrunk(0.009, 0.05 * UP)) is None  # the same as with it
    assert said("without_shrink", shrunk(0.009, 0.9 * NOISE)) is None  # there is no shrink to speak of


def test_points_near_the_rounding_floor_are_counted() -> None:
    ratio = np.where(np.arange(LAYERS) < 3, 1.0, 10.0)
    text = said("rounding", panel(UP, UP, floor_ratio=ratio, tuned_dtype="BF16"))
    assert text == "3 of 12 points may be rounding: ΔD is under 3 × what rounding to BF16 makes by itself."
    assert said("rounding", panel(UP, UP, floor_ratio=1.0)).startswith("All 12 points may be rounding")
    assert said("rounding", panel(UP, UP, floor_ratio=10.0)) is None
    assert said("rounding", panel(UP, UP, floor_ratio=np.nan)) is None  # an adapter


def test_elements_that_stayed_are_told_where_they_are_most() -> None:
    assert (
        said("few_elements", panel(UP, UP, unchanged_fraction=0.93)) == "93 % of the elements are unchanged."
    )
    assert said("few_elements", panel(UP, UP, unchanged_fraction=0.4)) is None


def test_a_few_vectors_that_turned_most_are_told() -> None:
    text = said("few_vectors", panel(UP, UP, delta_d_median=1e-6, delta_d_max=2e-5))
    assert text == "A few vectors turned far more than the others: the largest 1 − cos is 20 × the median."
    assert said("few_vectors", panel(UP, UP, delta_d_median=1e-6, delta_d_max=5e-6)) is None


def test_nothing_changed_is_all_that_is_said() -> None:
    rows = panel(0 * UP, 0 * UP, floor_ratio=0.0, unchanged_fraction=1.0, shrink=0.0, delta_m_unshrunk=0.0)
    assert reading(rows) == "Nothing changed: every compared matrix equals the base."


@pytest.mark.parametrize("missing", [np.nan, None])
def test_a_panel_without_values_is_silent(missing: float | None) -> None:
    assert reading(panel(UP, UP).assign(delta_m=missing)) == ""


def test_a_table_without_diagnostics_is_read_as_far_as_it_goes() -> None:
    table = readings(panel(UP, 3 - UP))
    assert tuple(table) == READING_COLUMNS
    assert table["rule"].tolist() == ["trend"]


def test_every_method_and_module_is_read_by_itself() -> None:
    rows = pd.concat([panel(UP, UP), panel(UP, -UP).assign(method="LoRA"), panel(UP, UP).assign(module="v")])
    table = readings(rows)
    assert table[["method", "module"]].values.tolist() == [["FT", "q"], ["LoRA", "q"], ["FT", "v"]]
    assert ["ΔM rises" in sentence for sentence in table["sentence"]] == [True, False, True]
    assert reading(rows[rows["method"] == "LoRA"]) == table["sentence"][1]


def test_no_rows_have_no_readings() -> None:
    assert readings(panel(UP, UP).iloc[:0]).empty

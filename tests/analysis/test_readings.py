"""Each rule says its sentence where the numbers carry it, and nothing where they do not."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from numpy.typing import ArrayLike

from wdanalysis.analysis.badges import BADGES, badge
from wdanalysis.analysis.panel import panels
from wdanalysis.analysis.readings import READING_COLUMNS, RULES, readings
from wdanalysis.analysis.regression import correlations

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
    ((_, of_rows),) = panels(rows)
    return RULES[rule](of_rows)


def text(rows: pd.DataFrame) -> str:
    return " ".join(readings(rows)["sentence"])


def badge_of(rows: pd.DataFrame) -> str:
    return badge(correlations(rows, ("within_step",)).iloc[0])


def by_step(first: ArrayLike, growth: ArrayLike) -> np.ndarray:
    """Values of each layer that grow with the steps."""
    return np.asarray(first) + np.arange(STEPS)[:, None] * np.asarray(growth)


def test_a_trend_across_layers_is_told_with_its_numbers() -> None:
    rising, falling = panel(UP, UP + 0.1 * NOISE), panel(UP, 3 - UP)
    assert said("trend", rising).startswith(
        "At the same step, layers that turned more changed magnitude more: r = +"
    )
    assert said("trend", falling) == (
        "At the same step, layers that turned more changed magnitude less: r = −1.00 [−1.00, −1.00], 12 layers; "
        "−1.00 … −1.00 without any one layer; q < 0.001 over 1 panel."
    )
    assert (badge_of(rising), badge_of(falling)) == ("rises", "falls")


def test_what_chance_would_give_is_no_clear_trend() -> None:
    rows = panel(UP, NOISE)
    assert said("trend", rows).startswith("No clear trend across layers at the same step: r = ")
    assert badge_of(rows) == "none"


def test_more_panels_ask_for_more() -> None:
    """The same panel among twenty of noise: what p would call a trend, q does not."""
    weak = panel(UP, UP + 0.8 * NOISE)
    assert said("trend", weak).startswith("At the same step")
    noise = [panel(UP, RNG.normal(size=LAYERS)).assign(module=f"m{one}") for one in range(20)]
    of_weak = readings(pd.concat([weak, *noise])).iloc[0]
    assert of_weak["sentence"].startswith("No clear trend")
    assert of_weak["sentence"].endswith("over 21 panels.")


def test_few_layers_have_no_trend_however_straight() -> None:
    rows = panel(UP[:5], UP[:5])
    assert said("trend", rows) == "Only 5 layers are known: an interval, a p-value and a trend ask for 6."
    assert badge_of(rows) == "too few layers"


def test_experts_of_few_layers_are_few_layers() -> None:
    assert said("trend", panel(UP, UP, layer=np.arange(LAYERS) % 2)).startswith("Only 2 layers are known")


def test_four_steps_that_repeat_one_trend_are_not_four_times_the_evidence() -> None:
    weak = UP + 1.6 * NOISE
    once, often = panel(UP, weak), panel(np.tile(UP, (STEPS, 1)), np.tile(weak, (STEPS, 1)))
    one, many = (correlations(rows, ("within_step",))["p_value"].item() for rows in (once, often))
    assert one == many


def test_a_trend_that_one_layer_makes_is_told_as_such() -> None:
    rest = RNG.normal(size=LAYERS - 1) / 3
    x, y = np.append(RNG.normal(size=LAYERS - 1) / 3, 9), np.append(rest - 0.5 * UP[1:], 9)
    x[:-1] += UP[1:]
    rows = panel(x, y)
    assert said("trend", rows) is None
    text = said("one_layer", rows)
    assert text.startswith("The trend across layers rests on layer 11: at the same step r = +0.9")
    assert "without it r = −0." in text
    assert badge_of(rows) == "rests on one layer"


def test_a_trend_inside_the_band_of_chance_is_not_told() -> None:
    rows = panel(UP, UP + 0.1 * NOISE)
    table = correlations(rows).assign(r_null_low=0.9, r_null_high=1.0)
    assert badge(table[table["scope"] == "within_step"].iloc[0]) == "as chance"
    assert readings(rows, table).empty
    assert len(readings(rows, table.assign(r_null_high=0.91))) == 1
    assert len(readings(rows, table.assign(r_null_low=np.nan))) == 1


def test_layers_of_different_steps_are_not_read() -> None:
    rows = panel(by_step(UP, 0.1), by_step(UP, 0.1))
    steps_and_layers = rows["step"].astype(int) // 100 % 2 == rows["layer"].astype(int) % 2
    assert said("trend", rows[steps_and_layers]).startswith(
        ("The layers do not have the same steps", "At the same")
    )


def test_every_badge_is_listed() -> None:
    assert {"rises", "falls", "none", "as chance", "rests on one layer", "too few layers"} == set(BADGES)


def test_a_pooled_r_that_mixes_opposite_parts_is_taken_apart() -> None:
    text = said("pooled_parts", panel(by_step(UP, 0.3), by_step(-UP, 0.3)))
    pooled, of_layers, inside, of_steps = (
        float(word.replace("−", "-")) for word in re.findall(r"[+−]\d\.\d\d", re.sub(r" \[.*?\]", "", text))
    )
    assert text.startswith("The pooled r of ")
    assert pooled == pytest.approx(of_layers + of_steps)
    assert (inside, of_layers < 0 < of_steps) == (-1, True)
    assert said("pooled_parts", panel(by_step(UP, 0.3), by_step(UP, 0.3))) is None
    assert said("pooled_parts", panel(UP, -UP)) is None  # one step


def test_steps_that_decide_the_sign_are_told() -> None:
    level = np.array([0, 1, 2, 3, 4, 5, 6])[:, None]
    turns = panel(UP + level, UP + np.array([0, 1, 2, 3, 2, 1, 0])[:, None])
    assert said("step_choice", turns).startswith("Over the choices of four steps r goes from −0.")
    assert said("step_choice", panel(UP + level, UP + level)) is None
    assert said("step_choice", panel((UP + level)[:4], (UP - level)[:4])) is None


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
    rows = shrunk(0.009, 0.05 * NOISE)
    assert badge_of(rows) == "none"
    assert said("without_shrink", rows) == (
        "Without that, layers that turned more changed magnitude more at the same step (r = +1.00; p < 0.001)."
    )
    assert said("without_shrink", shrunk(0.009, 0.05 * UP)) is None  # the same as with it
    assert said("without_shrink", shrunk(0.009, 0.9 * NOISE)) is None  # there is no shrink to speak of


def test_a_trend_that_the_shrink_makes_is_told() -> None:
    rows = panel(UP, UP, shrink=0.009, delta_m_unshrunk=0.05 * NOISE)
    assert said("without_shrink", rows).startswith(
        "Without that, there is no clear trend across layers at the same step (r = "
    )


def test_points_near_the_rounding_floor_are_counted() -> None:
    ratio = np.where(np.arange(LAYERS) < 3, 1.0, 10.0)
    text = said("rounding", panel(UP, UP, floor_ratio=ratio, tuned_dtype="BF16"))
    assert text == "3 of 12 points may be rounding: ΔD is under 3 × what rounding to BF16 makes by itself."
    assert said("rounding", panel(UP, UP, floor_ratio=1.0)).startswith("All 12 points may be rounding")
    assert said("rounding", panel(UP, UP, floor_ratio=10.0)) is None
    assert said("rounding", panel(UP, UP, floor_ratio=np.nan)) is None  # an adapter


def test_elements_that_stayed_are_told_where_they_are_most() -> None:
    def of(share: ArrayLike, vectors: ArrayLike = 8) -> str | None:
        return said("few_elements", panel(UP, UP, unchanged_fraction=share, vectors=vectors, length=96))

    assert of(0.93) == "93 % of the elements are stored as they were."
    assert of(0.4) is None
    most_of_the_matrices = np.where(np.arange(LAYERS) < 8, 0.9, 0.0)
    assert of(most_of_the_matrices) == "60 % of the elements are stored as they were."
    assert of(most_of_the_matrices, np.where(np.arange(LAYERS) < 8, 8, 800)) is None


def test_a_vector_that_turned_far_more_than_most_is_told() -> None:
    def of(largest: float, **columns: object) -> str | None:
        shape = {"vectors": 4096, "length": 4096, "delta_d_median": 1e-6, "delta_d_max": largest}
        return said("few_vectors", panel(UP, UP, **(shape | columns)))

    assert of(4e-5) == (
        "At least one vector turned far more than most: the largest 1 − cos is 40 × the median, where chance gives "
        "alike vectors 1.1 × at most."
    )
    assert of(2e-5) is None
    assert of(4e-5, rank=8) is not None
    assert of(8e-5, rank=1) is None  # its largest coefficient is squared
    assert of(4e-5, delta_d_bias=0.2, grid="on") is None  # a few stored steps


def test_nothing_changed_is_all_that_is_said() -> None:
    rows = panel(0 * UP, 0 * UP, floor_ratio=0.0, unchanged_fraction=1.0, shrink=0.0, delta_m_unshrunk=0.0)
    assert text(rows) == "Nothing changed: every compared matrix equals the base."


@pytest.mark.parametrize("missing", [np.nan, None])
def test_a_panel_without_values_is_silent(missing: float | None) -> None:
    assert text(panel(UP, UP).assign(delta_m=missing)) == ""


def test_a_table_without_diagnostics_is_read_as_far_as_it_goes() -> None:
    table = readings(panel(UP, 3 - UP))
    assert tuple(table) == READING_COLUMNS
    assert table["rule"].tolist() == ["trend"]


def test_every_method_and_module_is_read_by_itself() -> None:
    rows = pd.concat([panel(UP, UP), panel(UP, -UP).assign(method="LoRA"), panel(UP, UP).assign(module="v")])
    table = readings(rows)
    assert table[["method", "module"]].values.tolist() == [["FT", "q"], ["LoRA", "q"], ["FT", "v"]]
    assert ["magnitude more" in sentence for sentence in table["sentence"]] == [True, False, True]


def test_no_rows_have_no_readings() -> None:
    assert readings(panel(UP, UP).iloc[:0]).empty

"""Regression and correlation against scipy.stats and against least squares with dummy variables."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from wdanalysis.analysis.intervals import false_discovery
from wdanalysis.analysis.regression import (
    CORRELATION_COLUMNS,
    FIT_COLUMNS,
    PANEL_SCOPES,
    STEP_CHOICE_COLUMNS,
    SUMMARY_COLUMNS,
    Fit,
    correlations,
    fit,
    parts,
    step_choices,
    summary,
)

NUMBERS = FIT_COLUMNS[1:]


def points(n: int = 40, seed: int = 0, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    x = generator.gamma(2.0, size=n) * scale
    return x, 0.3 * x + generator.normal(size=n) * scale


def table(delta_d: np.ndarray, delta_m: np.ndarray, **columns: object) -> pd.DataFrame:
    """Metrics of (steps × layers) arrays: the columns that the statistics read."""
    steps, layers = np.indices(delta_d.shape)
    frame = {
        "method": "FT",
        "module": "q",
        "axis": "out",
        "step": pd.array(100 * (steps.ravel() + 1), dtype="Int64"),
        "layer": pd.array(layers.ravel(), dtype="Int64"),
        "delta_d": delta_d.ravel(),
        "delta_m": delta_m.ravel(),
    }
    return pd.DataFrame(frame | columns)


def is_without_layers(line: Fit) -> bool:
    return all(map(math.isnan, (line.r_low, line.r_high, line.slope_low, line.slope_high, line.p_value)))


def is_empty(line: Fit) -> bool:
    return all(math.isnan(getattr(line, number)) for number in NUMBERS)


@pytest.mark.parametrize("scale", [1.0, 1e-9])
@pytest.mark.parametrize("n", [4, 5, 40])
def test_fit_is_that_of_scipy(n: int, scale: float) -> None:
    x, y = points(n, scale=scale)
    line, pearson, spearman = stats.linregress(x, y), stats.pearsonr(x, y), stats.spearmanr(x, y)

    ours = fit(x, y)

    assert ours.n == n
    assert ours.pearson_r == pytest.approx(pearson.statistic, rel=1e-12)
    assert ours.spearman_r == pytest.approx(spearman.statistic, rel=1e-12)
    assert ours.slope == pytest.approx(line.slope, rel=1e-12)
    assert ours.intercept == pytest.approx(line.intercept, rel=1e-9)
    assert is_without_layers(ours)


def test_spearman_gives_ties_their_mean_rank() -> None:
    x, y = [1.0, 1, 2, 3, 3, 3, 4], [2.0, 1, 1, 5, 4, 5, 9]
    assert fit(x, y).spearman_r == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-12)


def test_fit_within_groups_is_a_regression_with_a_dummy_variable_for_each_group() -> None:
    x, y = points(30)
    groups = np.repeat([7, 3, 9, 4], [12, 8, 9, 1])
    x, y = x + groups, y - 5 * groups
    design = np.column_stack([x, groups[:, None] == np.unique(groups)])
    beta = np.linalg.lstsq(design, y, rcond=None)[0]
    hat = design @ np.linalg.pinv(design)

    ours = fit(x, y, groups=groups)

    assert ours.n == 30
    assert ours.slope == pytest.approx(beta[0], rel=1e-10)
    assert ours.leverage == pytest.approx(np.diag(hat).max(), rel=1e-10)
    assert ours.intercept == pytest.approx(y.mean() - beta[0] * x.mean(), rel=1e-10)


def test_r_within_groups_is_the_partial_correlation_given_the_group() -> None:
    x, y = points(30)
    groups = np.repeat(["a", "b", "c"], 10)
    dummies = (groups[:, None] == np.unique(groups)).astype(float)
    u, v = (values - dummies @ np.linalg.lstsq(dummies, values, rcond=None)[0] for values in (x + 1e3, y))
    r = stats.pearsonr(u, v).statistic

    ours = fit(x, y, groups=groups)

    assert ours.pearson_r == pytest.approx(r, rel=1e-9)
    assert ours.spearman_r == pytest.approx(stats.spearmanr(u, v).statistic, rel=1e-12)


def test_simpsons_paradox_shows_in_the_signs_of_the_scopes() -> None:
    steps, layers = np.indices((4, 12))
    jitter = np.random.default_rng(0).normal(size=steps.shape) * 1e-3
    metrics = table(delta_d=layers + steps + jitter, delta_m=2.0 * steps - layers)

    r = correlations(metrics).groupby("scope")["pearson_r"]

    assert r.get_group("pooled").item() < 0
    assert r.get_group("within_layer").item() > 0.99
    assert r.get_group("within_step").item() < -0.99
    assert (r.get_group("layer") > 0.99).all()
    assert (r.get_group("step") < -0.99).all()


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([], []),
        ([1.0, 2.0], [1.0, 3.0]),
        ([1.0, 2.0, math.nan, 4.0], [1.0, math.inf, 2.0, 1.0]),
        ([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]),
        ([0.1, 0.1 + 1e-17, 0.3 - 0.2], [1.0, 2.0, 3.0]),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
    ],
)
def test_no_number_is_made_up_without_three_points_and_spread(x: list[float], y: list[float]) -> None:
    ours = fit(x, y)
    assert is_empty(ours)
    assert ours.n == np.sum(np.isfinite(x) & np.isfinite(y))


def test_groups_of_one_point_leave_nothing_to_fit() -> None:
    x, y = points(5)
    assert is_empty(fit(x, y, groups=range(5)))
    assert is_empty(fit(x, y, groups=[1, 1, 2, 3, 4]))


def test_points_on_a_line_correlate_exactly() -> None:
    ours = fit(range(6), range(10, -2, -2), layers=range(6))
    assert (ours.pearson_r, ours.r_low, ours.r_high, ours.spearman_r) == pytest.approx((-1, -1, -1, -1))
    assert ours.p_value == 2 / 720  # the order observed, and its reverse
    assert (ours.slope, ours.slope_low, ours.slope_high) == pytest.approx((-2, -2, -2))


def test_a_point_without_a_layer_leaves_no_interval() -> None:
    x, y = points(12)
    assert is_without_layers(fit(x, y, layers=pd.array([*range(11), pd.NA], dtype="Int64")))
    assert fit(x, y, layers=pd.array([*range(11), pd.NA], dtype="Int64")).layers == 11


def test_correlations_has_a_row_for_every_method_module_scope_and_group() -> None:
    x, y = (values.reshape(3, 5) for values in points(15))
    metrics = pd.concat([table(x, y), table(y, x, method="LoRA"), table(x, y, module="v")])

    result = correlations(metrics)

    assert tuple(result.columns) == CORRELATION_COLUMNS
    assert result[["method", "module"]].drop_duplicates().values.tolist() == [
        ["FT", "q"],
        ["LoRA", "q"],
        ["FT", "v"],
    ]
    first = result[(result["method"] == "FT") & (result["module"] == "q")]
    assert first["scope"].tolist() == ["pooled", *["step"] * 3, *["layer"] * 5, "within_step", "within_layer"]
    assert first["group"].dropna().tolist() == [100, 200, 300, 0, 1, 2, 3, 4]
    assert first["n"].tolist() == [15, 5, 5, 5, 3, 3, 3, 3, 3, 15, 15]


def test_each_scope_is_fitted_to_its_own_points_with_delta_d_as_x() -> None:
    x, y = (values.reshape(3, 5) for values in points(15))
    slope = correlations(table(x, y)).set_index(["scope", "group"])["slope"]
    assert slope["pooled"].item() == pytest.approx(stats.linregress(x.ravel(), y.ravel()).slope)
    assert slope["step", 200] == pytest.approx(stats.linregress(x[1], y[1]).slope)
    assert slope["layer", 4] == pytest.approx(stats.linregress(x[:, 4], y[:, 4]).slope)


def test_a_matrix_without_metrics_is_not_counted() -> None:
    x, y = (values.reshape(1, 6) for values in points(6))
    y[0, 2] = math.nan
    pooled = correlations(table(x, y)).iloc[0]
    assert pooled["n"] == 5
    assert pooled["slope"] == pytest.approx(stats.linregress(np.delete(x, 2), np.delete(y, 2)).slope)


def test_a_checkpoint_without_a_step_is_a_step_of_its_own() -> None:
    x, y = (values.reshape(1, 6) for values in points(6))
    result = correlations(table(x, y, step=pd.array([pd.NA] * 6, dtype="Int64"))).set_index("scope")
    assert result.loc["step", "n"] == 6
    assert result.loc["step", "group"] is pd.NA
    assert result.loc["within_step", "slope"] == pytest.approx(result.loc["pooled", "slope"])


def test_matrices_without_a_layer_are_no_layer() -> None:
    x, y = (values.reshape(3, 2) for values in points(6))
    result = correlations(table(x, y, layer=pd.array([pd.NA] * 6, dtype="Int64"))).set_index("scope")
    assert "layer" not in result.index
    assert result.loc["within_layer", "n"] == 0
    assert result.loc["pooled", "n"] == 6


def test_an_empty_table_has_no_rows_and_every_column() -> None:
    result = correlations(table(np.empty((0, 0)), np.empty((0, 0))))
    assert tuple(result.columns) == CORRELATION_COLUMNS
    assert result.empty


def test_summary_has_the_last_steps_means_the_pooled_fit_and_a_badge() -> None:
    x, y = (values.reshape(3, 5) for values in points(15))
    summed = summary(table(x, y))
    row = summed.iloc[0]
    assert tuple(summed) == SUMMARY_COLUMNS
    assert len(SUMMARY_COLUMNS) <= 10
    assert (row["method"], row["module"], row["step"], row["badge"]) == ("FT", "q", 300, "too few layers")
    assert row["delta_m"] == pytest.approx(y[2].mean())
    assert row["delta_d"] == pytest.approx(x[2].mean())
    assert row["slope"] == pytest.approx(stats.linregress(x.ravel(), y.ravel()).slope)
    assert row["pearson_r"] == pytest.approx(stats.pearsonr(x.ravel(), y.ravel()).statistic)


def test_every_scope_but_a_layers_own_steps_has_an_interval_and_a_p() -> None:
    x, y = (values.reshape(3, 9) for values in points(27))
    by_scope = correlations(table(x, y)).groupby("scope")
    for number in ("r_low", "slope_high", "p_value", "leave_out_low", "leave_out_layer", "q_value"):
        known = by_scope[number].count()
        assert known.to_dict() == {"pooled": 1, "step": 3, "layer": 0, "within_step": 1, "within_layer": 1}
    assert by_scope["layers"].max().to_dict()["pooled"] == 9


def test_the_pooled_p_is_that_of_layers_at_the_same_step() -> None:
    x, y = (values.reshape(3, 9) for values in points(27))
    p = correlations(table(x + 5 * np.arange(3)[:, None], y - 9 * np.arange(3)[:, None])).set_index("scope")[
        "p_value"
    ]
    assert p["pooled"] == p["within_step"]


def test_q_values_are_over_the_panels_of_one_scope() -> None:
    generator = np.random.default_rng(0)
    tables = [table(*generator.normal(size=(2, 2, 7)), module=module) for module in "qkvo"]
    result = correlations(pd.concat(tables))
    for scope in ("pooled", "step", "within_step", "within_layer"):
        rows = result[result["scope"] == scope]
        np.testing.assert_array_equal(rows["q_value"], false_discovery(rows["p_value"]))


def test_some_scopes_alone_are_the_same_rows() -> None:
    x, y = (values.reshape(3, 9) for values in points(27))
    every, some = correlations(table(x, y)), correlations(table(x, y), PANEL_SCOPES)
    pd.testing.assert_frame_equal(every[every["scope"].isin(PANEL_SCOPES)].reset_index(drop=True), some)


@pytest.mark.parametrize("seed", range(5))
def test_the_pooled_r_is_the_sum_of_its_parts(seed: int) -> None:
    generator = np.random.default_rng(seed)
    steps = np.repeat([1, 2, 3, 4], [5, 9, 2, 8])
    x, y = generator.normal(size=(2, 24)) * [[1e-7], [1e-3]] + steps * generator.normal(size=(2, 1)) * [
        [1e-7],
        [1e-3],
    ]
    found = parts(x, y, steps)
    between = math.sqrt((1 - found.w_d**2) * (1 - found.w_m**2)) * found.r_between
    r = stats.pearsonr(x, y).statistic
    assert found.w_d * found.w_m * found.r_within + between == pytest.approx(r, abs=1e-12)
    assert found.from_within + between == pytest.approx(r, abs=1e-12)
    assert found.r_within == pytest.approx(fit(x, y, groups=steps).pearson_r, rel=1e-12)


def test_one_step_is_all_within() -> None:
    x, y = points(9)
    found = parts(x, y, np.full(9, 7))
    assert (found.r_within, found.w_d, found.w_m) == pytest.approx((fit(x, y).pearson_r, 1, 1))
    assert math.isnan(found.r_between)


def test_correlations_have_the_parts_and_the_choices_of_steps_in_pooled_rows() -> None:
    x, y = (values.reshape(6, 4) for values in points(24))
    result = correlations(table(x, y)).set_index("scope")
    row, found = result.loc["pooled"], parts(x.ravel(), y.ravel(), np.repeat(range(6), 4))
    assert (row["r_within"], row["r_between"], row["w_d"], row["w_m"]) == pytest.approx(
        (found.r_within, found.r_between, found.w_d, found.w_m)
    )
    choices = step_choices(table(x, y))["r"]
    assert (row["r_four_low"], row["r_four_median"], row["r_four_high"]) == (
        choices.min(),
        choices.median(),
        choices.max(),
    )
    assert result.drop(index="pooled")[["r_within", "w_m", "r_four_low"]].isna().all(axis=None)


def test_every_choice_of_four_steps_has_the_r_of_its_points() -> None:
    x, y = (values.reshape(6, 4) for values in points(24, scale=1e-9))
    choices = step_choices(table(x, y))
    assert tuple(choices) == STEP_CHOICE_COLUMNS
    assert len(choices) == math.comb(6, 4)
    for steps, r in choices[["steps", "r"]].itertuples(index=False):
        chosen = [int(step) // 100 - 1 for step in steps.split()]
        assert r == pytest.approx(stats.pearsonr(x[chosen].ravel(), y[chosen].ravel()).statistic, rel=1e-9)


def test_many_steps_are_chosen_from_at_random_and_the_same_every_time() -> None:
    x, y = (values.reshape(20, 3) for values in points(60))
    choices = step_choices(table(x, y))
    assert len(choices) == choices["steps"].nunique() == 500
    pd.testing.assert_frame_equal(choices, step_choices(table(x, y)))


def test_four_steps_leave_no_choice() -> None:
    x, y = (values.reshape(4, 5) for values in points(20))
    assert step_choices(table(x, y)).empty
    assert correlations(table(x, y))["r_four_low"].isna().all()


def test_correlations_without_the_shrink_are_those_of_delta_m_unshrunk() -> None:
    x, y = (values.reshape(3, 5) for values in points(15))
    result = correlations(table(x, y, delta_m_unshrunk=(y**2).ravel())).set_index(["scope", "group"])
    expected = stats.linregress(x[1], y[1] ** 2)
    assert result.loc[("step", 200), "pearson_r_unshrunk"] == pytest.approx(expected.rvalue)
    assert result.loc[("step", 200), "slope_unshrunk"] == pytest.approx(expected.slope)
    assert correlations(table(x, y))[["pearson_r_unshrunk", "slope_unshrunk"]].isna().all(axis=None)

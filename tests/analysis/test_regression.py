"""Regression and correlation against scipy.stats and against least squares with dummy variables."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from wdanalysis.analysis.regression import CORRELATION_COLUMNS, Fit, bootstrap, correlations, fit, summary

NUMBERS = CORRELATION_COLUMNS[6:15]


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


def is_empty(line: Fit) -> bool:
    return all(math.isnan(getattr(line, number)) for number in NUMBERS)


@pytest.mark.parametrize("scale", [1.0, 1e-9])
@pytest.mark.parametrize("n", [4, 5, 40])
def test_fit_is_that_of_scipy(n: int, scale: float) -> None:
    x, y = points(n, scale=scale)
    line, pearson, spearman = stats.linregress(x, y), stats.pearsonr(x, y), stats.spearmanr(x, y)
    interval = pearson.confidence_interval(0.95)
    margin = stats.t.ppf(0.975, n - 2) * line.stderr

    ours = fit(x, y)

    assert ours.n == n
    assert ours.pearson_r == pytest.approx(pearson.statistic, rel=1e-12)
    assert (ours.r_low, ours.r_high) == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert ours.p_value == pytest.approx(pearson.pvalue, rel=1e-9)
    assert ours.spearman_r == pytest.approx(spearman.statistic, rel=1e-12)
    assert ours.slope == pytest.approx(line.slope, rel=1e-12)
    assert (ours.slope_low, ours.slope_high) == pytest.approx((line.slope - margin, line.slope + margin))
    assert ours.intercept == pytest.approx(line.intercept, rel=1e-9)


def test_spearman_gives_ties_their_mean_rank() -> None:
    x, y = [1.0, 1, 2, 3, 3, 3, 4], [2.0, 1, 1, 5, 4, 5, 9]
    assert fit(x, y).spearman_r == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-12)


def test_band_is_the_confidence_interval_of_the_mean() -> None:
    x, y = points(12)
    at = np.array([0.0, 1.5, 7.0])
    design, design_at = np.column_stack([np.ones_like(x), x]), np.column_stack([np.ones_like(at), at])
    beta, residual, *_ = np.linalg.lstsq(design, y, rcond=None)
    covariance = np.linalg.inv(design.T @ design) * residual[0] / 10
    margin = stats.t.ppf(0.975, 10) * np.sqrt(np.einsum("ij,jk,ik->i", design_at, covariance, design_at))

    low, high = fit(x, y).band(at)

    np.testing.assert_allclose(low, design_at @ beta - margin, rtol=1e-10)
    np.testing.assert_allclose(high, design_at @ beta + margin, rtol=1e-10)
    np.testing.assert_allclose(fit(x, y).line(at), design_at @ beta, rtol=1e-10)


def test_fit_within_groups_is_a_regression_with_a_dummy_variable_for_each_group() -> None:
    x, y = points(30)
    groups = np.repeat([7, 3, 9, 4], [12, 8, 9, 1])
    x, y = x + groups, y - 5 * groups
    design = np.column_stack([x, groups[:, None] == np.unique(groups)])
    beta, residual, *_ = np.linalg.lstsq(design, y, rcond=None)
    freedom = 30 - 5
    error = math.sqrt(np.linalg.inv(design.T @ design)[0, 0] * residual[0] / freedom)
    margin = stats.t.ppf(0.975, freedom) * error

    ours = fit(x, y, groups=groups)

    assert ours.n == 30
    assert ours.slope == pytest.approx(beta[0], rel=1e-10)
    assert (ours.slope_low, ours.slope_high) == pytest.approx((beta[0] - margin, beta[0] + margin), rel=1e-10)
    assert ours.p_value == pytest.approx(2 * stats.t.sf(abs(beta[0] / error), freedom), rel=1e-8)
    assert ours.intercept == pytest.approx(y.mean() - beta[0] * x.mean(), rel=1e-10)


def test_r_within_groups_is_the_partial_correlation_given_the_group() -> None:
    x, y = points(30)
    groups = np.repeat(["a", "b", "c"], 10)
    dummies = (groups[:, None] == np.unique(groups)).astype(float)
    u, v = (values - dummies @ np.linalg.lstsq(dummies, values, rcond=None)[0] for values in (x + 1e3, y))
    r = stats.pearsonr(u, v).statistic
    z_margin = stats.norm.ppf(0.975) / math.sqrt(30 - 3 - 2)

    ours = fit(x, y, groups=groups)

    assert ours.pearson_r == pytest.approx(r, rel=1e-9)
    assert ours.r_low == pytest.approx(math.tanh(math.atanh(r) - z_margin), rel=1e-9)
    assert ours.r_high == pytest.approx(math.tanh(math.atanh(r) + z_margin), rel=1e-9)
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


def test_three_points_have_a_line_but_no_interval_of_r() -> None:
    x, y = [1.0, 2.0, 4.0], [1.0, 3.0, 2.0]
    ours = fit(x, y)
    assert ours.pearson_r == pytest.approx(stats.pearsonr(x, y).statistic)
    assert ours.p_value == pytest.approx(stats.pearsonr(x, y).pvalue)
    assert ours.slope_low < ours.slope < ours.slope_high
    assert math.isnan(ours.r_low)
    assert math.isnan(ours.r_high)


def test_points_on_a_line_correlate_exactly() -> None:
    ours = fit([1.0, 2.0, 3.0, 4.0], [8.0, 6.0, 4.0, 2.0])
    assert (ours.pearson_r, ours.r_low, ours.r_high, ours.spearman_r) == (-1, -1, -1, -1)
    assert ours.p_value == 0
    assert (ours.slope, ours.slope_low, ours.slope_high) == (-2, -2, -2)


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


def test_summary_has_the_last_steps_means_and_the_pooled_fit() -> None:
    x, y = (values.reshape(3, 5) for values in points(15))
    row = summary(table(x, y)).iloc[0]
    assert (row["method"], row["module"], row["matrices"], row["step"], row["n"]) == ("FT", "q", 5, 300, 15)
    assert row["delta_m"] == pytest.approx(y[2].mean())
    assert row["delta_d"] == pytest.approx(x[2].mean())
    assert row["slope"] == pytest.approx(stats.linregress(x.ravel(), y.ravel()).slope)
    assert row["pearson_r"] == pytest.approx(stats.pearsonr(x.ravel(), y.ravel()).statistic)


def test_the_bootstrap_over_layers_is_that_of_resampled_rows() -> None:
    """Against drawing the rows of whole layers and fitting each draw with scipy."""
    layers, steps = 12, 3
    x, y = points(layers * steps)
    y = y + 0.5 * np.tile(np.random.default_rng(1).normal(size=layers), steps)
    layer = np.tile(np.arange(layers), steps)
    generator, found = np.random.default_rng(7), []
    for _ in range(1500):
        drawn = np.concatenate([np.flatnonzero(layer == k) for k in generator.integers(layers, size=layers)])
        line = stats.linregress(x[drawn], y[drawn])
        found.append((line.rvalue, line.slope))
    expected = np.quantile(found, (0.025, 0.975), axis=0)
    ours = bootstrap(x, y, layer)
    width_r, width_slope = expected[1] - expected[0]
    assert (ours.r_low, ours.r_high) == pytest.approx(expected[:, 0].tolist(), abs=0.08 * width_r)
    assert (ours.slope_low, ours.slope_high) == pytest.approx(expected[:, 1].tolist(), abs=0.08 * width_slope)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_the_bootstrap_follows_the_scale_and_is_the_same_every_time(scale: float) -> None:
    x, y = points(30)
    layer = np.arange(30)
    one, scaled = bootstrap(x, y, layer), bootstrap(scale * x, y / scale, layer)
    assert bootstrap(x, y, layer) == one
    assert (scaled.r_low, scaled.r_high) == pytest.approx((one.r_low, one.r_high))
    assert scaled.slope_low * scale**2 == pytest.approx(one.slope_low)


def test_the_bootstrap_asks_for_four_layers_and_a_line() -> None:
    x, y = points(9)
    assert math.isnan(bootstrap(x, y, np.arange(9) % 3).r_low)
    assert math.isnan(bootstrap(np.ones(9), y, np.arange(9)).slope_low)


def test_correlations_bootstrap_the_pooled_scope_alone() -> None:
    x, y = (values.reshape(3, 5) for values in points(15))
    result = correlations(table(x, y)).set_index("scope")
    assert result.loc["pooled", "r_boot_low"] < result.loc["pooled", "r_boot_high"]
    assert result.drop(index="pooled")[["r_boot_low", "slope_boot_high"]].isna().all(axis=None)


def test_correlations_without_the_shrink_are_those_of_delta_m_unshrunk() -> None:
    x, y = (values.reshape(3, 5) for values in points(15))
    result = correlations(table(x, y, delta_m_unshrunk=(y**2).ravel())).set_index(["scope", "group"])
    expected = stats.linregress(x[1], y[1] ** 2)
    assert result.loc[("step", 200), "pearson_r_unshrunk"] == pytest.approx(expected.rvalue)
    assert result.loc[("step", 200), "slope_unshrunk"] == pytest.approx(expected.slope)
    assert correlations(table(x, y))[["pearson_r_unshrunk", "slope_unshrunk"]].isna().all(axis=None)

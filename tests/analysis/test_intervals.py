"""Intervals, p- and q-values from layers: against definitions written out, and how often they are right in simulation.

`python tests/analysis/test_intervals.py` prints the table of docs/reading.md.
"""

from __future__ import annotations

import math
from itertools import permutations, product

import numpy as np
import pytest
from scipy import stats

from wdanalysis.analysis import intervals
from wdanalysis.analysis.intervals import false_discovery, from_sums, permutation_p
from wdanalysis.analysis.regression import fit

STEPS = np.arange(1, 5) / 2
NOISE = 0.4
KINDS = ("independent", "trended", "heavy-tailed")
SCOPES = ("pooled", "within_step", "step")
LAYERS = (6, 10, 32)
CORRELATIONS = (0.0, 0.6, 0.9)


def drawn(
    kind: str, layers: int, rho: float, repeats: int, generator: np.random.Generator, *, shared: bool = False
) -> np.ndarray:
    """(2, repeats, steps, layers) values of ΔD and ΔM.

    Independent: every point by itself. Trended: both grow with the steps, each layer by a factor of its own; the
    factors have correlation `rho`. Heavy-tailed: the factors have Student's t3, and with `shared` a common scale.
    """
    if kind == "independent":
        x, other = generator.normal(size=(2, repeats, len(STEPS), layers))
        return np.array([x, rho * x + math.sqrt(1 - rho**2) * other])
    shape = (2, repeats, 1, layers)
    if kind == "heavy-tailed":
        one, other = generator.standard_t(3, size=shape)
        if shared:
            scale = np.sqrt(3 / generator.chisquare(3, size=shape[1:]))
            one, other = generator.normal(size=shape) * scale
    else:
        one, other = generator.normal(size=shape)
    factors = np.array([one, rho * one + math.sqrt(1 - rho**2) * other])
    trend = np.array([2.0, 1.0])[:, None, None, None]
    noise = NOISE * generator.normal(size=(2, repeats, len(STEPS), layers))
    return STEPS[:, None] * (trend + factors) + noise


def truth(kind: str, rho: float, scope: str) -> tuple[float, float]:
    """The population's r and slope: what infinitely many layers of `drawn` give."""
    if kind == "independent":
        return rho, rho
    steps = STEPS[-1:] if scope == "step" else STEPS
    of_layers = (3 if kind == "heavy-tailed" else 1) * (steps**2).mean()
    between = steps.var() if scope == "pooled" else 0.0
    xx, yy = 4 * between + of_layers + NOISE**2, between + of_layers + NOISE**2
    xy = 2 * between + of_layers * rho
    return xy / math.sqrt(xx * yy), xy / xx


def codes(values: np.ndarray, scope: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Values of order one as (2, n), and the points' groups, steps and layers."""
    if scope == "step":
        values = values[..., -1:, :]
    step, layer = (index.ravel() for index in np.indices(values.shape[1:]))
    flat = values.reshape(2, -1)
    flat = (flat - flat.mean(axis=1, keepdims=True)) / flat.std(axis=1, keepdims=True)
    return flat, step if scope == "within_step" else 0 * step, step, layer


def sums(values: np.ndarray, scope: str) -> tuple[np.ndarray, np.ndarray]:
    """What `from_sums` takes of (2, repeats, steps, layers) values, and the (repeats,) scales of y in those of x."""
    if scope == "step":
        values = values[..., -1:, :]
    scale = values.std(axis=(2, 3), keepdims=True)
    u, v = (values - values.mean(axis=(2, 3), keepdims=True)) / scale
    terms = np.array([np.ones_like(u), u, v, u * u, u * v, v * v])
    ratio = (scale[1] / scale[0])[:, 0, 0]
    return terms if scope == "within_step" else terms.sum(axis=2, keepdims=True), ratio


def coverage(
    kind: str, layers: int, rho: float, scope: str, repeats: int, *, shared: bool = False
) -> tuple[float, float]:
    """The shares of intervals of r and of the slope that hold the truth."""
    generator = np.random.default_rng([layers, KINDS.index(kind), int(10 * rho)])
    r, slope = truth(kind, rho, scope)
    of_points, scale = sums(drawn(kind, layers, rho, repeats, generator, shared=shared), scope)
    found = from_sums(of_points)
    of_r = (found.r_low <= r) & (r <= found.r_high)
    of_slope = (found.slope_low <= slope / scale) & (slope / scale <= found.slope_high)
    return float(np.mean(of_r)), float(np.mean(of_slope))


def false_positives(kind: str, layers: int, repeats: int, *, shared: bool = False) -> float:
    """The share of p < 0.05 where ΔM has nothing to do with ΔD, or (shared) is uncorrelated with it."""
    generator = np.random.default_rng([7, layers, KINDS.index(kind)])
    values = drawn(kind, layers, 0.0, repeats, generator, shared=shared)
    found = 0
    for one in range(repeats):
        (u, v), _, step, layer = codes(values[:, one], "pooled")
        found += permutation_p(u, v, step, layer) < 0.05
    return found / repeats


def check_coverage(kind: str, layers: int, shared: bool, repeats: int) -> None:
    """92 to 97 % of the nominal 95 %, but for two standard errors of the simulation."""
    spare = 2 * math.sqrt(0.95 * 0.05 / repeats)
    for rho, scope in product(CORRELATIONS, SCOPES):
        of_r, of_slope = coverage(kind, layers, rho, scope, repeats, shared=shared)
        least = 0.895 if shared and (scope, rho) == ("pooled", 0.9) else 0.92  # docs/reading.md says why
        assert 0.92 - spare <= of_r <= 0.97 + spare, (rho, scope, of_r)
        assert least - spare <= of_slope <= 0.97 + spare, (rho, scope, of_slope)


def check_false_positives(kind: str, layers: int, shared: bool, repeats: int) -> None:
    """At most 6 %, but for two standard errors of the simulation."""
    assert false_positives(kind, layers, repeats, shared=shared) <= 0.06 + 2 * math.sqrt(
        0.06 * 0.94 / repeats
    )


cells = pytest.mark.parametrize(
    ("kind", "layers", "shared"),
    [(*cell, False) for cell in product(KINDS, LAYERS)]
    + [("heavy-tailed", layers, True) for layers in LAYERS],
)


@cells
def test_intervals_hold_the_truth_as_often_as_they_say(kind: str, layers: int, shared: bool) -> None:
    check_coverage(kind, layers, shared, repeats=2000)


@pytest.mark.slow
@cells
def test_intervals_hold_the_truth_as_often_as_they_say_over_many_draws(
    kind: str, layers: int, shared: bool
) -> None:
    check_coverage(kind, layers, shared, repeats=10_000)


@cells
def test_five_percent_of_p_values_are_under_five_percent_where_nothing_is(
    kind: str, layers: int, shared: bool
) -> None:
    check_false_positives(kind, layers, shared, repeats=500)


@pytest.mark.slow
@cells
def test_five_percent_of_p_values_are_under_five_percent_over_many_draws(
    kind: str, layers: int, shared: bool
) -> None:
    check_false_positives(kind, layers, shared, repeats=4000)


def test_the_interval_is_the_jackknife_over_layers_of_artanh_r_and_of_the_slope() -> None:
    """Against leaving out the rows of each layer and fitting the rest with scipy."""
    layers, steps = 8, 3
    generator = np.random.default_rng(0)
    layer, step = np.tile(np.arange(layers), steps), np.repeat(np.arange(steps), layers)
    x = generator.gamma(2.0, size=layers * steps) + step
    y = 0.3 * x + generator.normal(size=layers)[layer] + 0.2 * generator.normal(size=layers * steps)

    def less_means(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
        return np.concatenate(
            [values[kept & (step == s)] - values[kept & (step == s)].mean() for s in range(steps)]
        )

    without = [
        stats.linregress(less_means(x, layer != one), less_means(y, layer != one)) for one in range(layers)
    ]
    whole = stats.linregress(less_means(x, layer >= 0), less_means(y, layer >= 0))
    points = layers * steps
    of_fisher = (points - steps - steps - 2) / (points - steps - 2)  # 1/(n − G − 2) with a layer and without

    def half_width(found: np.ndarray) -> float:
        squares = (found - found.mean()) ** 2
        carrying = squares.sum() ** 2 / (squares**2).sum()
        t = stats.t.ppf(0.975, math.sqrt((layers - 1) * carrying))
        return t * math.sqrt(of_fisher * squares.sum())

    z = half_width(np.arctanh([line.rvalue for line in without]))
    slope = half_width(np.array([line.slope for line in without]))

    ours = fit(x, y, groups=step, layers=layer, steps=step)

    assert (ours.r_low, ours.r_high) == pytest.approx(
        (math.tanh(math.atanh(whole.rvalue) - z), math.tanh(math.atanh(whole.rvalue) + z)), rel=1e-10
    )
    assert (ours.slope_low, ours.slope_high) == pytest.approx(
        (whole.slope - slope, whole.slope + slope), rel=1e-10
    )
    left_out = [line.rvalue for line in without]
    assert (ours.leave_out_low, ours.leave_out_high) == pytest.approx(
        (min(left_out), max(left_out)), rel=1e-10
    )
    assert ours.leave_out_layer == np.abs(np.array(left_out) - whole.rvalue).argmax()


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_intervals_follow_the_scale(scale: float) -> None:
    (x, y), _, step, layer = codes(drawn("trended", 9, 0.3, 1, np.random.default_rng(0))[:, 0], "pooled")
    one = fit(x, y, layers=layer, steps=step)
    scaled = fit(scale * x + 3 * scale, y / scale, layers=layer, steps=step)
    assert (scaled.r_low, scaled.r_high, scaled.p_value) == pytest.approx(
        (one.r_low, one.r_high, one.p_value)
    )
    assert scaled.slope_low * scale**2 == pytest.approx(one.slope_low)
    assert np.array(scaled.band(scale)) * scale == pytest.approx(np.array(one.band(1.0 - 3)), rel=1e-6)


def z_over_error(x: np.ndarray, y: np.ndarray) -> float:
    """|artanh r| of ranks at each step over its standard error, from its slopes in the layers' weights."""
    a, b = (stats.rankdata(values, axis=1) - (values.shape[1] + 1) / 2 for values in (x, y))

    def z(weight: np.ndarray) -> float:
        return math.atanh((weight * a * b).sum() / math.sqrt((weight * a * a).sum() * (weight * b * b).sum()))

    one = np.ones(x.shape[1])
    by_weight = [(z(one + nudge) - z(one - nudge)) / 2e-5 for nudge in 1e-5 * np.eye(x.shape[1])]
    return abs(z(one)) / math.sqrt((np.array(by_weight) ** 2).sum())


def test_the_p_value_is_the_share_of_orders_of_the_layers_whose_ranks_are_as_telling() -> None:
    """Against ranks of scipy and a derivative by differences, with ΔM's paths in every order of six layers."""
    values = drawn("trended", 6, 0.7, 1, np.random.default_rng(3))[:, 0]
    (u, v), _, step, layer = codes(values, "pooled")
    x, y = values
    found = np.array([z_over_error(x, y[:, list(order)]) for order in permutations(range(6))])
    expected = (found >= found[0] * (1 - 1e-6)).mean()
    assert permutation_p(u, v, step, layer) == pytest.approx(expected)
    (u, v), group, step, layer = codes(values, "within_step")
    assert fit(u, v, groups=group, layers=layer, steps=step).p_value == pytest.approx(expected)


def test_orders_that_agree_wholly_are_the_most_telling() -> None:
    x = np.array([1.0, 2.0, 3.0, 5.0, 8.0, 13.0])
    assert permutation_p(x, -x, 0 * x.astype(int), np.arange(6)) == pytest.approx(2 / 720)
    assert permutation_p(x, np.ones(6), 0 * x.astype(int), np.arange(6)) == 1.0


def test_sampled_orders_agree_with_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    (u, v), _, step, layer = codes(drawn("trended", 8, 0.5, 1, np.random.default_rng(5))[:, 0], "pooled")
    sampled = permutation_p(u, v, step, layer)
    monkeypatch.setattr(intervals, "PERMUTATIONS", math.factorial(8))
    for cached in (intervals._orders, intervals._p_of):
        cached.cache_clear()
    every = permutation_p(u, v, step, layer)
    for cached in (intervals._orders, intervals._p_of):
        cached.cache_clear()
    assert sampled == pytest.approx(every, abs=4 * math.sqrt(every * (1 - every) / 5040))


def test_several_matrices_of_a_layer_move_together() -> None:
    """Experts: the order of rows tells which stands for which in another layer; twice as many are no evidence."""
    (u, v), _, step, layer = codes(drawn("trended", 8, 0.5, 1, np.random.default_rng(5))[:, 0], "pooled")
    once = permutation_p(u, v, step, layer)
    assert permutation_p(np.tile(u, 2), np.tile(v, 2), np.tile(step, 2), np.tile(layer, 2)) == once


def test_a_layer_without_a_step_takes_no_part_in_the_exchange() -> None:
    (u, v), _, step, layer = codes(drawn("trended", 8, 0.5, 1, np.random.default_rng(5))[:, 0], "pooled")
    kept = np.arange(len(u)) != len(u) - 1  # the last layer's last step
    less = layer < 7
    assert permutation_p(u[kept], v[kept], step[kept], layer[kept]) == pytest.approx(
        permutation_p(u[less], v[less], step[less], layer[less])
    )


def test_five_layers_have_neither_interval_nor_p() -> None:
    (x, y), _, step, layer = codes(drawn("trended", 5, 0.9, 1, np.random.default_rng(0))[:, 0], "pooled")
    line = fit(x, y, layers=layer, steps=step)
    assert line.layers == 5
    assert all(map(math.isnan, (line.r_low, line.slope_low, line.p_value, line.leave_out_low)))
    assert line.leave_out_layer is None
    assert np.isnan(line.band([0.0])).all()


def test_spread_of_one_layer_alone_has_no_interval() -> None:
    x = np.where(np.arange(8) == 3, 1.0, 0.0)
    line = fit(x, x, layers=range(8))
    assert line.pearson_r == 1
    assert math.isnan(line.r_low)


def test_the_band_is_the_jackknife_of_the_lines_height() -> None:
    (x, y), _, step, layer = codes(drawn("trended", 9, 0.3, 1, np.random.default_rng(0))[:, 0], "pooled")
    line, at = fit(x, y, layers=layer, steps=step), 1.7
    heights = np.array([fit(x[layer != one], y[layer != one]).line(at) for one in range(9)])
    variance = (32 - 3) / (36 - 3) * ((heights - heights.mean()) ** 2).sum()
    half_width = line.t * math.sqrt(variance)
    assert np.array(line.band(at)) == pytest.approx([line.line(at) - half_width, line.line(at) + half_width])


def test_q_values_are_those_of_scipy() -> None:
    p = np.random.default_rng(0).uniform(size=30) ** 3
    np.testing.assert_allclose(false_discovery(p), stats.false_discovery_control(p), rtol=1e-12)
    with_gap = np.insert(p, 4, np.nan)
    np.testing.assert_allclose(
        false_discovery(with_gap), np.insert(stats.false_discovery_control(p), 4, np.nan)
    )
    assert len(false_discovery([])) == 0


def _print_table(repeats: int = 10_000) -> None:
    for kind, shared in (*((kind, False) for kind in KINDS), ("heavy-tailed", True)):
        for layers in LAYERS:
            found = {
                scope: np.array(
                    [coverage(kind, layers, rho, scope, repeats, shared=shared) for rho in CORRELATIONS]
                )
                for scope in SCOPES
            }
            cells = [
                f"{100 * found[scope][:, place].min():.1f}–{100 * found[scope][:, place].max():.1f}"
                for scope in SCOPES
                for place in (0, 1)
            ]
            p = f"{100 * false_positives(kind, layers, repeats // 2, shared=shared):.1f}"
            print(
                f"| {kind}{', one scale' if shared else ''} | {layers} | {' | '.join(cells)} | {p} |",
                flush=True,
            )


if __name__ == "__main__":
    _print_table()

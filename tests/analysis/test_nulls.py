"""The null models' r against whole matrices that walk at random, and how often it errs where there is no structure."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from random_walks import LAYERS, SIZES, dora_panel, panels

from wdanalysis.analysis.nulls import CURVE_COLUMNS, NULL_COLUMNS, null_curve, null_r, reading
from wdanalysis.analysis.regression import correlations

SCOPES = ["pooled", "within_step"]


def measured(table: pd.DataFrame) -> np.ndarray:
    """Pearson's r by numpy: of all points, and within steps."""
    within = table[["delta_d", "delta_m"]] - table.groupby("step")[["delta_d", "delta_m"]].transform("mean")
    return np.array([np.corrcoef(points.T)[0, 1] for points in (table[["delta_d", "delta_m"]], within)])


def bands(table: pd.DataFrame) -> np.ndarray:
    found = null_r(table)
    assert found["scope"].tolist() == SCOPES
    return found[list(NULL_COLUMNS)].to_numpy()


@pytest.mark.parametrize("rank", [None, 4])
def test_the_band_is_that_of_random_walks_and_errs_in_at_most_one_of_twenty(rank: int | None) -> None:
    tables = list(panels(rank, 200))
    r = np.array([measured(table) for table in tables])
    median, low, high = bands(tables[0]).T
    np.testing.assert_allclose(median, np.median(r, axis=0), atol=0.02)
    np.testing.assert_allclose(low, np.quantile(r, 0.025, axis=0), atol=0.06)
    np.testing.assert_allclose(high, np.quantile(r, 0.975, axis=0), atol=0.03)
    outside = np.mean((r < low) | (r > high), axis=0)
    assert (outside <= 0.05 + 1.65 * np.sqrt(0.05 * 0.95 / len(r))).all(), outside


def test_the_band_of_magnitudes_is_that_of_their_walks_beside_the_turns_that_were_seen() -> None:
    generator = np.random.default_rng(0)
    delta_d = np.outer(generator.uniform(0.5, 1.5, size=LAYERS), SIZES)
    tables = [dora_panel(generator, delta_d) for _ in range(150)]
    r, found = (np.array([of(table) for table in tables]) for of in (measured, bands))
    assert np.abs(np.median(found[:, :, 0], axis=0) - np.median(r, axis=0)).max() < 0.08
    outside = np.mean((r < found[:, :, 1]) | (r > found[:, :, 2]), axis=0)
    assert (outside <= 0.05 + 1.65 * np.sqrt(0.05 * 0.95 / len(r))).all(), outside


def test_correlations_have_the_band_where_points_are_pooled_or_within_steps() -> None:
    (table,) = panels(None, 1)
    found = correlations(table).set_index("scope")
    expected = null_r(table).set_index("scope")
    pd.testing.assert_frame_equal(found.loc[SCOPES, list(NULL_COLUMNS)], expected[list(NULL_COLUMNS)])
    assert found.loc[["step", "layer", "within_layer"], list(NULL_COLUMNS)].isna().all(axis=None)


def test_each_panel_has_a_band_of_its_own_whatever_else_is_in_the_table_and_in_what_order() -> None:
    (one,) = panels(None, 1)
    other = one.assign(method="N", null_delta_m=1.0 + one["layer"])
    both = pd.concat([one, other]).sample(frac=1, random_state=0)
    found = null_r(both).set_index("method").loc["M", list(NULL_COLUMNS)].to_numpy()
    np.testing.assert_allclose(found, bands(one), atol=0.05)  # other draws, as the rows come in another order
    in_order = null_r(pd.concat([other, one])).set_index("method").loc["M", list(NULL_COLUMNS)].to_numpy()
    np.testing.assert_array_equal(in_order, bands(one))


def test_there_is_no_band_without_diagnostics_or_with_too_few_points() -> None:
    (table,) = panels(None, 1)
    bare = table[["method", "module", "axis", "step", "layer", "delta_m", "delta_d"]]
    assert null_r(bare)[list(NULL_COLUMNS)].isna().all(axis=None)
    assert null_r(table.head(2))[list(NULL_COLUMNS)].isna().all(axis=None)
    one_step = null_r(table[table["layer"] == 0])  # a point a step leaves nothing within steps
    assert one_step[list(NULL_COLUMNS)].notna().all(axis=1).tolist() == [True, False]
    assert len(null_r(table.head(0))) == len(null_curve(table.head(0))) == 0


def test_the_curve_is_the_expectation_of_every_point() -> None:
    (stored,) = panels(None, 1)
    generator = np.random.default_rng(0)
    dora = dora_panel(generator, generator.uniform(size=(LAYERS, len(SIZES))))
    curve = null_curve(pd.concat([stored, dora]))
    assert tuple(curve) == CURVE_COLUMNS
    of_stored, of_dora = (curve[curve["method"] == method].reset_index(drop=True) for method in "MD")
    np.testing.assert_array_equal(of_stored["delta_d"], stored["null_delta_d"])
    np.testing.assert_array_equal(of_stored["delta_m"], stored["null_delta_m"])
    half_width = (of_stored["delta_m_high"] - of_stored["delta_m_low"]) / 2
    np.testing.assert_allclose(half_width, 1.96 * stored["null_delta_m_sd"], rtol=1e-4)
    np.testing.assert_array_equal(of_dora["delta_d"], dora["delta_d"])
    inside = dora["delta_m"].between(of_dora["delta_m_low"], of_dora["delta_m_high"])
    assert inside.mean() > 0.8


def test_the_sentence_says_where_r_lies() -> None:
    assert reading(0.97, 0.85, 0.96, update="stored") == (
        "r = +0.97; random updates of the same size would give +0.85 … +0.96."
    )
    assert reading(-0.25, -0.1, 0.8, update="dora") == (
        "r = −0.25; magnitudes that move at random as far would give −0.10 … +0.80."
    )
    assert reading(0.9, 0.85, 0.96, update="low-rank") == (
        "r = +0.90 is what chance gives: random updates of the same size would have +0.85 … +0.96."
    )
    assert reading(0.9, float("nan"), float("nan"), update="stored") is None

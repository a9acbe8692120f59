"""DoRA's rescaling, against Eq. 5 in float64, and its rule for vectors of zeros."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import wdanalysis as wd
from wdanalysis.decomposition import Axis
from wdanalysis.kernels.lowrank import Factors, LowRankSums
from wdanalysis.kernels.rescale import rescaled_update, rescaling, rescaling_less_one, vector_changes_of_dora


def factors(seed: int, out: int, r: int, inputs: int, size: float) -> Factors:
    rng = np.random.default_rng(seed)
    return Factors(rng.standard_normal((out, r)) * size, rng.standard_normal((r, inputs)), 0.5)


def test_a_zero_vector_stays_zero_whatever_its_magnitude() -> None:
    m, norm = np.array([2.0, 3.0]), np.array([0.0, 2.0])
    assert rescaling(m, norm).tolist() == [0.0, 1.5]
    assert rescaling_less_one(m, norm).tolist() == [-1.0, 0.5]


def test_c_less_one_keeps_its_digits_where_the_magnitude_hardly_moved() -> None:
    norm = np.array([3.0])
    m = norm * (1 + 2.0**-50)
    assert rescaling_less_one(m, norm)[0] == pytest.approx((m - norm)[0] / 3, rel=1e-15, abs=0)


def test_the_type_of_the_numbers_is_kept() -> None:
    assert rescaling(np.ones(2, np.float32), np.ones(2, np.float32)).dtype == np.float32


@pytest.mark.parametrize("axis", ["out", "in"])
def test_a_block_of_doras_update_is_that_of_the_whole_matrix(axis: Axis) -> None:
    rng = np.random.default_rng(0)
    w0, update = rng.standard_normal((6, 8)), factors(1, 6, 2, 8, 1e-1)
    update = Factors(update.B, update.A, update.scale, np.zeros(0), axis)
    v = w0 + update.scale * update.B @ update.A
    c = rng.uniform(0.9, 1.1, 6 if axis == "out" else 8)
    w = c[:, None] * v if axis == "out" else v * c
    block = rescaled_update(w0[2:5, 1:7], update, c - 1, slice(2, 5), slice(1, 7))
    np.testing.assert_allclose(block, (w - w0)[2:5, 1:7], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("sign", [1, -1])
def test_dora_takes_direction_from_the_update_and_length_from_its_magnitude(sign: int) -> None:
    rng = np.random.default_rng(0)
    w0, update = rng.standard_normal((20, 30)), factors(1, 20, 4, 30, 1e-2)
    v = w0 + update.scale * update.B @ update.A
    magnitude = sign * np.linalg.norm(w0, axis=1) * (1 + 0.01 * rng.standard_normal(20))
    w = torch.from_numpy(magnitude[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True))
    low_rank = LowRankSums([update], "out")
    low_rank.add(w0, slice(0, 20), slice(0, 30))
    found = vector_changes_of_dora(*low_rank.sums()[0], magnitude)
    base = torch.from_numpy(w0)
    assert np.abs(found.magnitude_change).mean() == pytest.approx(wd.delta_m(base, w), rel=1e-9)
    assert found.turn.mean() == pytest.approx(wd.delta_d(base, w), rel=1e-9)
    assert found.update_norm2.sum() == pytest.approx(float((w - base).square().sum()), rel=1e-9)


def test_a_zero_row_of_dora_stays_zero_and_finite() -> None:
    zero, kept = np.array([0.0, 1.0]), np.array([0.0, 2.0])
    found = vector_changes_of_dora(zero, zero * 0, zero * 0, kept)
    assert found.magnitude_change.tolist() == [0.0, 1.0]
    assert found.turn.tolist() == [0.0, 0.0]

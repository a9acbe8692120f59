"""Adapters without a merged matrix, against the merged matrix of Eq. 1 and Eq. 5 in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import wdanalysis as wd
from wdanalysis.decomposition import Axis
from wdanalysis.kernels.lowrank import Factors, LowRankSums
from wdanalysis.kernels.rescale import rescaled_update, vector_changes_of_dora
from wdanalysis.kernels.sums import vector_changes


def factors(seed: int, out: int, r: int, inputs: int, size: float) -> Factors:
    rng = np.random.default_rng(seed)
    return Factors(rng.standard_normal((out, r)) * size, rng.standard_normal((r, inputs)), 0.5)


def oriented(weights: np.ndarray, axis: Axis) -> np.ndarray:
    return weights if axis == "out" else weights.T


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-6])
def test_several_updates_of_one_matrix_each_agree_with_their_merged_matrix(axis: Axis, size: float) -> None:
    w0 = np.random.default_rng(0).standard_normal((20, 30))
    updates = [factors(seed, 20, r, 30, size) for seed, r in ((1, 2), (2, 5))]
    low_rank = LowRankSums(updates, axis)
    block = oriented(w0, axis)
    for start in range(0, len(block), 7):
        low_rank.add(block[start : start + 7], slice(start, start + 7), slice(0, block.shape[1]))
    for update, sums in zip(updates, low_rank.sums(), strict=True):
        found = vector_changes(*sums)
        base, merged = torch.from_numpy(w0), torch.from_numpy(w0 + update.scale * update.B @ update.A)
        assert np.abs(found.magnitude_change).mean() == pytest.approx(
            wd.delta_m(base, merged, axis), rel=1e-6
        )
        assert found.turn.mean() == pytest.approx(wd.delta_d(base, merged, axis), rel=1e-6)
        assert found.update_norm2.sum() == pytest.approx(float((merged - base).square().sum()), rel=1e-6)


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


def test_a_block_of_doras_update_is_that_of_the_whole_matrix() -> None:
    rng = np.random.default_rng(0)
    w0, update = rng.standard_normal((6, 8)), factors(1, 6, 2, 8, 1e-1)
    v = w0 + update.scale * update.B @ update.A
    c = rng.uniform(0.9, 1.1, 6)
    block = rescaled_update(w0[2:5, 1:7], update, c - 1, slice(2, 5), slice(1, 7))
    np.testing.assert_allclose(block, (c[:, None] * v - w0)[2:5, 1:7], rtol=1e-12, atol=1e-15)

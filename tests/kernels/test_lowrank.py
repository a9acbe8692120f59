"""Adapters without a merged matrix, against the merged matrix of Eq. 1 and Eq. 5 in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import wdanalysis as wd
from wdanalysis.decomposition import Axis
from wdanalysis.kernels.lowrank import Factors, LowRankSums
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

"""Expectations of ΔM and ΔD of updates without structure, against whole matrices of them."""

from __future__ import annotations

import numpy as np
import pytest

from wdanalysis.kernels.chance import Chance, chance, mean_squared_cosine
from wdanalysis.kernels.sums import vector_changes

BASES = {"rows of other lengths": 0.0, "rows that look alike": 1.5}


def base(vectors: int, length: int, common: float, generator: np.random.Generator) -> np.ndarray:
    lengths = generator.uniform(0.3, 2, size=(vectors, 1))
    return lengths * (generator.normal(size=(vectors, length)) + common * generator.normal(size=length))


def simulated(
    W0: np.ndarray, norm: float, rank: int | None, draws: int, generator: np.random.Generator
) -> np.ndarray:
    """ΔM and ΔD of random updates of one norm: draws × 2."""
    vectors, length = W0.shape
    found = np.empty((draws, 2))
    for draw in found:
        d = (
            generator.normal(size=W0.shape)
            if rank is None
            else generator.normal(size=(vectors, rank)) @ generator.normal(size=(rank, length))
        )
        d *= norm / np.linalg.norm(d)
        changes = vector_changes((W0**2).sum(1), np.einsum("ij,ij->i", W0, d), np.einsum("ij,ij->i", d, d))
        draw[:] = np.abs(changes.magnitude_change).mean(), changes.turn.mean()
    return found


@pytest.mark.parametrize("common", BASES.values(), ids=BASES)
@pytest.mark.parametrize("rank", [None, 2, 8])
@pytest.mark.parametrize(("vectors", "length", "size"), [(48, 64, 0.01), (48, 64, 0.5), (32, 128, 3.0)])
def test_expectation_and_spread_are_those_of_random_matrices(
    vectors: int, length: int, size: float, rank: int | None, common: float
) -> None:
    generator = np.random.default_rng(0)
    W0 = base(vectors, length, common, generator)
    norm = size * float(np.linalg.norm(W0))
    draws = simulated(W0, norm, rank, 1500, generator)
    expected = chance(
        np.linalg.norm(W0, axis=1), length, norm**2, rank=rank, alignment=mean_squared_cosine(W0)
    )
    assert (expected.delta_m, expected.delta_d) == pytest.approx(draws.mean(axis=0), rel=0.015)
    assert (expected.delta_m_sd, expected.delta_d_sd) == pytest.approx(draws.std(axis=0), rel=0.09)


@pytest.mark.parametrize("size", [0.1, 0.5, 5.0])
@pytest.mark.parametrize("length", [1, 2, 3, 8])
def test_short_vectors_are_no_exception(length: int, size: float) -> None:
    generator = np.random.default_rng(1)
    W0 = base(60, length, 0.0, generator)
    norm = size * float(np.linalg.norm(W0))
    draws = simulated(W0, norm, None, 3000, generator)
    expected = chance(np.linalg.norm(W0, axis=1), length, norm**2)
    assert (expected.delta_m, expected.delta_d) == pytest.approx(draws.mean(axis=0), rel=0.015, abs=1e-3)
    assert (expected.delta_m_sd, expected.delta_d_sd) == pytest.approx(draws.std(axis=0), rel=0.08, abs=1e-3)


def test_a_small_update_has_the_expectations_of_first_order() -> None:
    m0, length, sigma = np.array([1.0, 2.0, 4.0]), 1000, 1e-6
    expected = chance(m0, length, 3 * length * sigma**2)
    assert expected.delta_m == pytest.approx(np.sqrt(2 / np.pi) * sigma, rel=2e-3)
    assert expected.delta_d == pytest.approx(np.mean((length - 1) * sigma**2 / 2 / m0**2), rel=2e-3)


def test_vectors_of_zeros_stay_zero() -> None:
    m0 = np.array([1.0, 2.0, 3.0, 4.0])
    without, padded = chance(m0, 50, 0.3), chance(np.append(m0, np.zeros(4)), 50, 0.3)
    assert padded.delta_m == pytest.approx(without.delta_m / 2)
    assert padded.delta_d_sd == pytest.approx(without.delta_d_sd / 2)


def test_no_update_or_a_base_of_zeros_moves_nothing() -> None:
    assert chance(np.ones(3), 5, 0.0) == chance(np.zeros(3), 5, 1.0) == Chance()


def test_mean_squared_cosine_is_that_of_all_pairs() -> None:
    W0 = np.random.default_rng(0).normal(size=(5, 3))
    u = W0 / np.linalg.norm(W0, axis=1, keepdims=True)
    pairs = [(u[i] @ u[j]) ** 2 for i in range(5) for j in range(5) if i != j]
    assert mean_squared_cosine(np.vstack([W0, np.zeros(3)])) == pytest.approx(np.mean(pairs))
    assert mean_squared_cosine(W0[:1]) == 0

"""Singular values, ranks, intruders and similarity, against numpy's full decomposition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import llama, moved, write, write_lora, write_model
from safetensors.torch import load_file
from scipy.linalg import subspace_angles
from scipy.stats import entropy

import wdanalysis as wd
from wdanalysis.comparison import Interrupted
from wdanalysis.kernels.lowrank import Factors
from wdanalysis.measure.spectra import (
    SIMILARITY_COLUMNS,
    SPECTRA_COLUMNS,
    BaseVectors,
    effective_rank,
    intruder_dimensions,
    low_rank_svd,
    singular_values,
    stable_rank,
    subspace_similarity,
    top_singular,
    values_and_right,
)

RNG = np.random.default_rng(0)


def matrix(rows: int, columns: int, decay: float = 0.97) -> np.ndarray:
    """A random matrix whose singular values fall by a factor."""
    U, _, Vh = np.linalg.svd(RNG.standard_normal((rows, columns)), full_matrices=False)
    return (U * decay ** np.arange(len(Vh))) @ Vh


def test_ranks_of_equal_singular_values_are_their_number() -> None:
    assert stable_rank(np.array([3.0, 3.0, 3.0, 0.0])) == pytest.approx(3)
    assert effective_rank(np.array([3.0, 3.0, 3.0, 0.0])) == pytest.approx(3)


def test_ranks_are_their_definitions() -> None:
    W = matrix(20, 30)
    values = np.linalg.svd(W, compute_uv=False)
    assert stable_rank(values) == pytest.approx(np.linalg.norm(W) ** 2 / np.linalg.norm(W, 2) ** 2)
    assert effective_rank(values) == pytest.approx(np.exp(entropy(values)))


def test_an_update_of_zero_has_no_rank() -> None:
    assert np.isnan(stable_rank(np.zeros(3)))
    assert np.isnan(effective_rank(np.zeros(3)))


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (12, 40), (6, 4)])
def test_the_top_singular_triplets_are_those_of_the_full_decomposition(shape: tuple[int, int]) -> None:
    W = matrix(*shape)
    U, values, Vh = np.linalg.svd(W, full_matrices=False)
    k = min(10, *shape)
    ours = top_singular(W, 10)
    np.testing.assert_allclose(ours[1], values[:k], rtol=1e-9)
    assert np.abs(np.sum(ours[0] * U[:, :k], axis=0)) == pytest.approx(np.ones(k), abs=1e-6)
    assert np.abs(np.sum(ours[2] * Vh[:k].T, axis=0)) == pytest.approx(np.ones(k), abs=1e-6)


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (12, 40)])
def test_all_singular_values_are_those_of_the_full_decomposition(shape: tuple[int, int]) -> None:
    W = matrix(*shape)
    np.testing.assert_allclose(
        singular_values(W), np.linalg.svd(W, compute_uv=False), rtol=1e-7, atol=1e-8 * np.linalg.norm(W, 2)
    )


@pytest.mark.parametrize(
    ("shape", "rank"),
    [((300, 420), 12), ((420, 300), 12), ((300, 420), None), ((420, 300), None), ((40, 30), None)],
)
def test_all_values_and_top_right_vectors_are_those_of_the_full_decomposition(
    shape: tuple[int, int], rank: int | None
) -> None:
    rng = np.random.default_rng(3)
    W = rng.standard_normal(shape)
    W = W if rank is None else W[:, :rank] @ np.diag(0.9 ** np.arange(rank)) @ W[:rank]
    values, right = values_and_right(W, 16)
    _, expected, Vh = np.linalg.svd(W)
    np.testing.assert_allclose(values, expected, atol=1e-7 * expected[0])
    assert right.shape == (shape[1], rank or 16)
    np.testing.assert_allclose(subspace_angles(right, Vh[: right.shape[1]].T), 0, atol=1e-6)
    cosines = np.abs(np.sum(right * Vh[: right.shape[1]].T, axis=0))
    np.testing.assert_allclose(cosines, 1, atol=1e-6)


def test_a_large_matrix_of_low_rank_has_no_more_singular_values_than_its_rank() -> None:
    W = matrix(400, 3) @ matrix(3, 300)
    values = singular_values(W)
    assert np.count_nonzero(values) == 3
    assert effective_rank(values) == pytest.approx(
        effective_rank(np.linalg.svd(W, compute_uv=False)), rel=1e-6
    )


@pytest.mark.parametrize("r", [1, 4, 40])
def test_the_decomposition_of_factors_is_that_of_their_product(r: int) -> None:
    factors = Factors(RNG.standard_normal((30, r)), RNG.standard_normal((r, 20)), 0.5)
    U, values, V = low_rank_svd(factors)
    product = 0.5 * factors.B @ factors.A
    np.testing.assert_allclose((U * values) @ V.T, product, atol=1e-12)
    k = min(r, 20)
    np.testing.assert_allclose(values[:k], np.linalg.svd(product, compute_uv=False)[:k], rtol=1e-9)


def test_similarity_is_the_mean_squared_cosine_of_the_angles_between_subspaces() -> None:
    U, V = (np.linalg.qr(RNG.standard_normal((30, columns)))[0] for columns in (3, 5))
    assert subspace_similarity(U, V) == pytest.approx(np.mean(np.cos(subspace_angles(U, V)) ** 2))
    assert subspace_similarity(U, U) == pytest.approx(1)


def intruders_by_definition(W0: np.ndarray, W: np.ndarray, k: int = 10, epsilon: float = 0.5) -> int:
    """Algorithm 1 of arXiv 2410.21228 as it stands."""
    U0, U = (np.linalg.svd(M, full_matrices=False)[0] for M in (W0, W))
    return sum(all(abs(U[:, j] @ U0[:, i]) < epsilon for i in range(U0.shape[1])) for j in range(k))


@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (300, 280)])
@pytest.mark.parametrize("new", [0, 2, 5])
def test_new_large_directions_are_intruders(shape: tuple[int, int], new: int) -> None:
    W0 = matrix(*shape)
    left, right = (np.linalg.qr(RNG.standard_normal((side, new)))[0] for side in shape)
    W = W0 + 5 * left @ right.T
    found = intruder_dimensions(top_singular(W, 10)[0], BaseVectors(W0))
    assert found == intruders_by_definition(W0, W) == new


def test_a_direction_that_only_moved_up_is_no_intruder() -> None:
    W0 = matrix(60, 80)
    U, _, Vh = np.linalg.svd(W0, full_matrices=False)
    W = W0 + 5 * np.outer(U[:, 50], Vh[50])
    assert intruder_dimensions(top_singular(W, 10)[0], BaseVectors(W0)) == intruders_by_definition(W0, W) == 0


def test_the_table_of_an_adapter_is_that_of_its_merged_matrix_by_numpy(tmp_path: Path) -> None:
    weights = llama(size=32)
    base, lora = write(tmp_path / "base.safetensors", weights), write_lora(tmp_path / "lora", weights, r=4)
    spectra = wd.compare(base, lora, spectra=True).spectra
    assert spectra is not None
    assert tuple(spectra.matrices) == SPECTRA_COLUMNS
    factors = load_file(lora / "adapter_model.safetensors")
    for row in spectra.matrices.to_dict("records"):
        key = f"base_model.model.{row['name'].removesuffix('.weight')}.lora_"
        W0 = weights[row["name"]].double().numpy()
        dW = 2 * (factors[f"{key}B.weight"].double() @ factors[f"{key}A.weight"].double()).numpy()
        check(row, W0, W0 + dW, values=4)


def test_the_table_of_a_full_model_is_numpys(tmp_path: Path) -> None:
    weights = llama(size=300, layers=1)
    tuned = moved(weights, size=0.05, only="q_proj")
    base, ft = write(tmp_path / "base.safetensors", weights), write(tmp_path / "ft.safetensors", tuned)
    row = wd.compare(base, ft, modules="q", spectra=True).spectra.matrices.iloc[0]
    W0, W = (model[row["name"]].double().numpy() for model in (weights, tuned))
    check(row, W0, W, values=10)
    assert row["rank"] == 300


def check(row: dict[str, object], W0: np.ndarray, W: np.ndarray, values: int) -> None:
    s0, s, ds = (np.linalg.svd(M, compute_uv=False) for M in (W0, W, W - W0))
    for which, expected in (("base", s0[:10]), ("tuned", s[:10]), ("update", ds[:values])):
        found = [row[f"{which}_s{i + 1}"] for i in range(len(expected))]
        assert found == pytest.approx(expected.tolist(), rel=1e-6)
    assert row["stable_rank"] == pytest.approx(np.sum(ds**2) / ds[0] ** 2, rel=1e-6)
    assert row["effective_rank"] == pytest.approx(np.exp(entropy(ds)), rel=1e-6)
    assert row["intruder_dimensions"] == intruders_by_definition(W0, W)


def test_similarity_of_two_methods_is_that_of_their_last_updates(tmp_path: Path) -> None:
    weights = llama(size=32)
    base = write(tmp_path / "base.safetensors", weights)
    a, b = (moved(weights, size=0.1, seed=seed) for seed in (1, 2))
    write_model(tmp_path / "A" / "checkpoint-1", b)
    write_model(tmp_path / "A" / "checkpoint-2", a)
    methods = {"A": tmp_path / "A", "B": write(tmp_path / "b.safetensors", b)}
    table = wd.compare(base, methods, modules="q", spectra=True).spectra.similarity
    assert tuple(table) == SIMILARITY_COLUMNS
    assert table[["method_a", "step_a", "method_b"]].drop_duplicates().values.tolist() == [["A", 2, "B"]]
    row = table[(table["i"] == 2) & (table["j"] == 8)].iloc[0]
    U, V = (np.linalg.svd((w[row["name"]] - weights[row["name"]]).double().numpy())[2].T for w in (a, b))
    cosines = np.cos(subspace_angles(U[:, :2], V[:, :8]))
    assert row["similarity"] == pytest.approx(np.sum(cosines**2) / 2)
    assert row["by_chance"] == 8 / 32


def test_by_chance_is_what_random_subspaces_have_on_average() -> None:
    def random_similarity() -> float:
        U, V = (np.linalg.qr(RNG.standard_normal((32, columns)))[0] for columns in (2, 8))
        return subspace_similarity(U, V)

    assert np.mean([random_similarity() for _ in range(500)]) == pytest.approx(8 / 32, rel=0.1)


def test_a_matrix_with_nan_has_an_empty_row(tmp_path: Path) -> None:
    weights = llama()
    broken = {
        name: torch.full_like(w, torch.nan) if "0.self_attn.q" in name else w for name, w in weights.items()
    }
    base, ft = write(tmp_path / "base.safetensors", weights), write(tmp_path / "ft.safetensors", broken)
    table = wd.compare(base, ft, modules="q", spectra=True).spectra.matrices.set_index("layer")
    assert table.loc[0, "rank":].drop("run").isna().all()
    assert table.loc[1, "intruder_dimensions"] == 0


def test_spectra_are_saved_and_loaded(tmp_path: Path) -> None:
    weights = llama()
    base, lora = write(tmp_path / "base.safetensors", weights), write_lora(tmp_path / "lora", weights)
    compared = wd.compare(base, {"LoRA": lora, "NA": lora}, spectra=True)
    compared.save(tmp_path / "out", figures=[])
    loaded = wd.Comparison.load(tmp_path / "out").spectra
    assert loaded.matrices.equals(compared.spectra.matrices)
    assert loaded.similarity["method_b"].tolist() == ["NA"] * len(compared.spectra.similarity)


def test_without_being_asked_no_spectra_are_taken(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", llama())
    assert wd.compare(base, write_lora(tmp_path / "lora", llama())).spectra is None


def test_ctrl_c_keeps_the_spectra_that_were_taken(tmp_path: Path) -> None:
    def stop(phase: str, done: int, _: int) -> None:
        if phase == "singular values" and done == 2:
            raise KeyboardInterrupt

    weights = llama(size=16)
    base, ft = (
        write(tmp_path / "base.safetensors", weights),
        write(tmp_path / "ft.safetensors", moved(weights)),
    )
    with pytest.raises(Interrupted) as interrupted:
        wd.compare(base, ft, spectra=True, progress=stop)
    partial = interrupted.value.comparison
    partial.save(tmp_path / "out", figures=[], report=False)
    loaded = wd.Comparison.load(tmp_path / "out")
    assert len(loaded.spectra.matrices) == 2
    assert len(loaded.metrics) > 2
    assert loaded.run.complete is False

"""The fused pass over two stored matrices, against float64 and torch's own bits."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors.torch import save_file

import wdanalysis as wd
from wdanalysis.decomposition import Axis
from wdanalysis.kernels import cpu
from wdanalysis.kernels.sums import VectorChanges, vector_changes

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def stored(tensor: torch.Tensor) -> np.ndarray:
    """The tensor as a checkpoint's rows come: bfloat16 as its bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def dense_sums(base: torch.Tensor, tuned: torch.Tensor, axis: Axis) -> np.ndarray:
    sums = np.zeros((cpu.SUMS, base.shape[0 if axis == "out" else 1]))
    columns = slice(0, base.shape[1])
    cpu.add_dense(stored(base), stored(tuned), columns, sums, vectors_are_rows=axis == "out")
    return sums


def changes(base: torch.Tensor, tuned: torch.Tensor, axis: Axis) -> VectorChanges:
    return vector_changes(*dense_sums(base, tuned, axis)[:3])


def turned(base: torch.Tensor, delta_d: float) -> torch.Tensor:
    """`base` with noise that turns its vectors by about `delta_d`."""
    noise = torch.randn(base.shape, dtype=torch.float64)
    return base.double() + noise * base.double().std() * (2 * delta_d) ** 0.5


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize(("base_dtype", "tuned_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_every_pair_of_dtypes_agrees_with_the_definition(
    base_dtype: torch.dtype, tuned_dtype: torch.dtype, axis: Axis
) -> None:
    torch.manual_seed(1)
    base = (0.02 * torch.randn(37, 1029)).to(base_dtype)
    tuned = turned(base, 1e-2).to(tuned_dtype)
    found = changes(base, tuned, axis)
    assert np.abs(found.magnitude_change).mean() == pytest.approx(wd.delta_m(base, tuned, axis), rel=1e-9)
    assert found.turn.mean() == pytest.approx(wd.delta_d(base, tuned, axis), rel=1e-9)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("base_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("delta_d", [1e-1, 1e-3, 1e-5, 1e-7, 1e-9, 1e-10])
def test_small_updates_keep_six_digits(base_dtype: torch.dtype, axis: Axis, delta_d: float) -> None:
    torch.manual_seed(2)
    base = (0.02 * torch.randn(64, 512)).to(base_dtype)
    tuned = turned(base, delta_d)
    found = changes(base, tuned, axis)
    assert found.turn.mean() == pytest.approx(delta_d, rel=0.2)  # the case is what it claims to be
    assert found.turn.mean() == pytest.approx(wd.delta_d(base, tuned, axis), rel=1e-6)
    exact = exact_magnitude_change(base, tuned, axis)
    assert np.abs(found.magnitude_change).mean() == pytest.approx(exact, rel=1e-6)


def exact_magnitude_change(base: torch.Tensor, tuned: torch.Tensor, axis: Axis) -> float:
    """ΔM in extended precision, which has digits to lose."""
    w0, w = base.double().numpy().astype(np.longdouble), tuned.double().numpy().astype(np.longdouble)
    dim = 1 if axis == "out" else 0
    return float(np.abs(np.sqrt((w * w).sum(dim)) - np.sqrt((w0 * w0).sum(dim))).mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_one_of_the_16_bit_numbers_is_read_right(dtype: torch.dtype) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    numbers = every[every.isfinite()].unsqueeze(1)
    zero = torch.zeros_like(numbers)
    a, _, _, ulp2, unchanged = dense_sums(numbers, numbers, "out")
    np.testing.assert_array_equal(a, numbers.double().square().squeeze(1).numpy())
    np.testing.assert_array_equal(unchanged, 1)
    np.testing.assert_array_equal(dense_sums(zero, numbers, "out")[cpu.Q], a)
    spacing = (
        torch.nextafter(numbers.abs(), torch.full_like(numbers, torch.inf)).double() - numbers.abs().double()
    )
    inside = spacing.isfinite().squeeze(1).numpy()  # the largest number has no next
    np.testing.assert_array_equal(ulp2[inside], spacing.square().squeeze(1).numpy()[inside])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ulp_is_numpys_spacing(dtype: type) -> None:
    rng = np.random.default_rng(3)
    numbers = (rng.standard_normal(1000) * 10.0 ** rng.integers(-30, 30, 1000)).astype(dtype)[:, None]
    ulp2 = dense_sums(torch.from_numpy(numbers), torch.from_numpy(numbers), "out")[cpu.ULP2]
    np.testing.assert_allclose(ulp2, np.spacing(np.abs(numbers[:, 0])).astype(np.float64) ** 2, rtol=1e-15)


def test_unchanged_counts_equal_values_across_dtypes() -> None:
    base = torch.tensor([[1.0, 2.0, -0.0, 4.0]])
    tuned = torch.tensor([[1.0, 2.5, 0.0, 4.0]], dtype=torch.bfloat16)
    assert dense_sums(base, tuned, "out")[cpu.UNCHANGED].tolist() == [3.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_shows_in_the_sums_of_its_vector_only(
    dtype: torch.dtype, bad: float
) -> None:
    base = torch.ones(5, 40, dtype=dtype)
    tuned = base.clone()
    tuned[2, 17] = bad
    found = changes(base, tuned, "out")
    assert np.isfinite(found.magnitude_change).tolist() == [True, True, False, True, True]


matrices = npst.arrays(np.float64, (5, 6), elements=st.integers(-64, 64).map(lambda n: n / 64))


@settings(deadline=None, max_examples=50)
@given(matrices, st.floats(0.125, 8))
def test_scaling_a_matrix_moves_magnitudes_and_turns_nothing(weights: np.ndarray, c: float) -> None:
    base = torch.from_numpy(weights)
    for axis in ("out", "in"):
        found = changes(base, c * base, axis)
        assert found.turn.max() <= 1e-15 * max(1, (1 / c - 1) ** 2)
        mean_m = np.linalg.norm(weights, axis=1 if axis == "out" else 0).mean()
        assert np.abs(found.magnitude_change).mean() == pytest.approx(
            abs(c - 1) * mean_m, rel=1e-9, abs=1e-300
        )


@settings(deadline=None, max_examples=50)
@given(matrices, matrices, st.permutations(range(5)))
def test_the_order_of_vectors_changes_nothing(w0: np.ndarray, w: np.ndarray, order: list[int]) -> None:
    base, tuned = torch.from_numpy(w0), torch.from_numpy(w)
    found, permuted = changes(base, tuned, "out"), changes(base[order], tuned[order], "out")
    np.testing.assert_array_equal(found.turn[order], permuted.turn)
    np.testing.assert_array_equal(found.magnitude_change[order], permuted.magnitude_change)


@settings(deadline=None, max_examples=50)
@given(matrices, matrices)
def test_any_two_matrices_agree_with_the_definition(w0: np.ndarray, w: np.ndarray) -> None:
    base, tuned = torch.from_numpy(w0), torch.from_numpy(w)
    for axis in ("out", "in"):
        found = changes(base, tuned, axis)
        assert found.turn.mean() == pytest.approx(wd.delta_d(base, tuned, axis), rel=1e-6, abs=1e-12)
        assert np.abs(found.magnitude_change).mean() == pytest.approx(
            wd.delta_m(base, tuned, axis), rel=1e-6, abs=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("length", [7, 64, 4096, 11008])
def test_a_vector_that_became_zero_is_counted_whatever_its_length(
    tmp_path: Path, dtype: torch.dtype, length: int
) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    w0 = torch.randn(16, length, generator=torch.Generator().manual_seed(0)).to(dtype)
    w = w0.clone()
    w[:10] = 0
    for axis, tensors in (("out", (w0, w)), ("in", (w0.T.contiguous(), w.T.contiguous()))):
        for file, tensor in zip(("base", "tuned"), tensors, strict=True):
            save_file({name: tensor}, tmp_path / f"{file}.safetensors")
        compared = wd.compare(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", axis=axis)
        assert compared.metrics["zero_vectors"].tolist() == [10]
        assert compared.metrics["delta_d"][0] == pytest.approx(10 / 16, rel=1e-15)
        assert any("all-zero vectors" in warning for warning in compared.warnings)

"""The definition, against the paper's equations worked by hand and by other means."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import wdanalysis as wd


def test_eq_2_splits_each_row_into_length_and_unit_vector_along_out() -> None:
    magnitude, direction = wd.decompose(torch.tensor([[3.0, 4.0], [0.0, -2.0]]))
    assert magnitude.tolist() == [5.0, 2.0]
    assert direction.tolist() == [[0.6, 0.8], [0.0, -1.0]]


def test_eq_2_splits_each_column_along_in() -> None:
    magnitude, direction = wd.decompose(torch.tensor([[3.0, 0.0], [4.0, -2.0]]), axis="in")
    assert magnitude.tolist() == [5.0, 2.0]
    assert direction.tolist() == [[0.6, 0.0], [0.8, -1.0]]


def test_eq_3_is_the_mean_absolute_change_of_magnitude() -> None:
    base, tuned = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[0.0, 7.0], [1.0, 0.0]])
    assert wd.delta_m(base, tuned) == pytest.approx((2.0 + 1.0) / 2)


def test_eq_4_is_the_mean_of_one_minus_cosine() -> None:
    angle = 0.3
    base = torch.tensor([[2.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    tuned = torch.tensor([[math.cos(angle), math.sin(angle)], [0.0, -1.0]], dtype=torch.float64)
    assert wd.delta_d(base, tuned) == pytest.approx(((1 - math.cos(angle)) + 2.0) / 2, rel=1e-12)


@pytest.mark.parametrize("angle", [1e-1, 1e-3, 1e-5])
def test_small_turns_keep_their_digits(angle: float) -> None:
    base = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    tuned = 3 * torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    assert wd.delta_d(base, tuned) == pytest.approx(2 * math.sin(angle / 2) ** 2, rel=1e-10)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_float_dtype_gives_what_numpy_gives_for_its_values(
    axis: wd.decomposition.Axis, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    base = torch.randn(7, 11).to(dtype)
    tuned = (base.float() + 0.1 * torch.randn(7, 11)).to(dtype)
    w0, w, dim = base.double().numpy(), tuned.double().numpy(), 1 if axis == "out" else 0
    m0, m = np.linalg.norm(w0, axis=dim), np.linalg.norm(w, axis=dim)
    assert wd.delta_m(base, tuned, axis) == pytest.approx(np.abs(m - m0).mean(), rel=1e-12)
    assert wd.delta_d(base, tuned, axis) == pytest.approx((1 - (w0 * w).sum(dim) / (m0 * m)).mean(), rel=1e-9)


def test_a_zero_vector_counts_nothing_if_it_stays_zero_and_one_if_it_does_not() -> None:
    zero, one = torch.zeros(1, 3), torch.ones(1, 3)
    assert wd.delta_d(zero, zero) == 0.0
    assert wd.delta_d(zero, one) == wd.delta_d(one, zero) == 1.0
    assert wd.delta_m(zero, one) == pytest.approx(math.sqrt(3))
    assert torch.equal(wd.decompose(zero).direction, torch.zeros(1, 3, dtype=torch.float64))


def test_a_convolution_is_read_as_out_by_the_rest() -> None:
    weight = torch.randn(4, 3, 2, 2)
    assert torch.equal(wd.decompose(weight).magnitude, weight.double().flatten(1).norm(dim=1))


def test_what_is_not_a_matrix_of_floats_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="two dimensions"):
        wd.decompose(torch.ones(3))
    with pytest.raises(ValueError, match=r"holds torch\.int64"):
        wd.decompose(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="'out'"):
        wd.decompose(torch.ones(3, 3), axis="rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="differ in shape"):
        wd.delta_m(torch.ones(2, 3), torch.ones(3, 2))

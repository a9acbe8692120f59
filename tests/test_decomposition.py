"""The definition, against the paper's equations worked by hand and by other means."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

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


class ForeignArray:
    """What JAX, TensorFlow and others give numpy, and nothing more."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype)


KINDS: dict[str, Callable[[np.ndarray], Any]] = {
    "numpy": lambda values: values,
    "numpy, big-endian": lambda values: values.astype(">f4"),
    "not contiguous": lambda values: np.asfortranarray(values)[::1, ::-1][:, ::-1],
    "read-only": lambda values: np.frombuffer(values.tobytes(), np.float32).reshape(values.shape),
    "nested lists": lambda values: values.tolist(),
    "__array__ alone": ForeignArray,
    "torch, trained": lambda values: torch.tensor(values, requires_grad=True),
}


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    base = random.normal(size=(5, 7)).astype(np.float32)
    return base, base + 0.1 * random.normal(size=(5, 7)).astype(np.float32)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_of_array_gives_the_numbers_of_its_values(
    pair: tuple[np.ndarray, np.ndarray], kind: Callable[[np.ndarray], Any], axis: wd.decomposition.Axis
) -> None:
    base, tuned = pair
    expected = (wd.delta_m(*map(torch.tensor, pair), axis), wd.delta_d(*map(torch.tensor, pair), axis))
    assert (
        wd.delta_m(kind(base), kind(tuned), axis),
        wd.delta_d(kind(base), kind(tuned), axis),
    ) == expected
    assert wd.delta_d(kind(base), torch.tensor(tuned), axis) == expected[1]  # of two kinds


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_decomposition_is_of_torch_where_the_weight_is_and_else_of_numpy(
    pair: tuple[np.ndarray, np.ndarray], kind: Callable[[np.ndarray], Any]
) -> None:
    given = kind(pair[0])
    parts = wd.decompose(given)
    wanted = torch.Tensor if isinstance(given, torch.Tensor) else np.ndarray
    assert {type(part) for part in parts} == {wanted}
    assert {str(part.dtype).removeprefix("torch.") for part in parts} == {"float64"}
    np.testing.assert_allclose(parts.magnitude, np.linalg.norm(pair[0].astype(float), axis=1), rtol=1e-12)
    np.testing.assert_allclose(
        np.asarray(parts.magnitude)[:, None] * np.asarray(parts.direction), pair[0], rtol=1e-12
    )


def test_what_is_given_is_never_written_to(pair: tuple[np.ndarray, np.ndarray]) -> None:
    double = pair[0].astype(float)
    before = double.copy()
    parts = wd.decompose(double)
    parts.direction[:] = 0
    assert (double == before).all()


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn"])
def test_jaxs_small_floats_are_floats(pair: tuple[np.ndarray, np.ndarray], name: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    as_jax_gives_it = [ForeignArray(values.astype(getattr(ml_dtypes, name))) for values in pair]
    as_torch_rounds_it = [torch.tensor(values).to(getattr(torch, name)) for values in pair]
    assert wd.delta_d(*as_jax_gives_it) == wd.delta_d(*as_torch_rounds_it) > 0


def test_what_is_not_a_matrix_of_floats_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="two dimensions"):
        wd.decompose(torch.ones(3))
    with pytest.raises(ValueError, match=r"holds torch\.int64"):
        wd.decompose(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="holds int64"):
        wd.decompose([[1, 2], [3, 4]])
    with pytest.raises(ValueError, match="holds complex128"):
        wd.decompose(np.eye(2, dtype=complex))
    with pytest.raises(ValueError, match="'out'"):
        wd.decompose(torch.ones(3, 3), axis="rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="differ in shape"):
        wd.delta_m(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"differ in shape: \(4, 3, 2\) and \(4, 6\)"):
        wd.delta_d(np.ones((4, 3, 2)), torch.ones(4, 6))

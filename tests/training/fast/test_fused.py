"""The Triton kernels against float64, on a GPU only."""

from __future__ import annotations

import pytest
import torch
from equations import random, relative_error
from torch import Tensor

from wdanalysis.training.fast.functional import squared_norms

if not torch.cuda.is_available():
    pytest.skip("Triton kernels need a GPU", allow_module_level=True)
fused = pytest.importorskip("wdanalysis.training.fast.fused")

SHAPES = [(7, 5), (300, 100), (4096, 512), (1000, 8192)]
UPDATES = [
    (0, 8, 4),
    (7, 5, 1),
    (300, 100, 3),
    (129, 70, 8),
    (4096, 512, 32),
    (1000, 8192, 64),
    (500, 2050, 384),
]
"""Rows, features and rank."""


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def of_16_bits(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


def on_gpu(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return random(*shape, seed=seed).to("cuda", dtype)


def a_bias(features: int, dtype: torch.dtype, has_bias: bool) -> Tensor | None:
    return on_gpu((features,), dtype, seed=5) if has_bias else None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_scaling_rounds_once(shape: tuple[int, int], dtype: torch.dtype, has_bias: bool) -> None:
    y, c = on_gpu(shape, dtype), on_gpu(shape[1:], torch.float32).abs()
    b = a_bias(shape[1], dtype, has_bias)
    exact = c.double() * y.double() + (0 if b is None else b.double() * (1 - c.double()))
    fused.scale_(y, c, b)
    torch.testing.assert_close(y, exact.to(dtype))


@pytest.mark.parametrize("shape", UPDATES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_update_is_added_before_scaling(
    shape: tuple[int, int, int], of_16_bits: torch.dtype, has_bias: bool
) -> None:
    rows, features, rank = shape
    y, c = on_gpu((rows, features), of_16_bits), on_gpu((features,), torch.float32).abs()
    h, B = on_gpu((rows, rank), of_16_bits, seed=1), on_gpu((features, rank), of_16_bits, seed=2)
    b = a_bias(features, of_16_bits, has_bias)
    exact = c.double() * (y.double() + h.double() @ B.double().T)
    exact += 0 if b is None else b.double() * (1 - c.double())
    again = y.clone()
    fused.scale_(y, c, b, h, B)
    torch.testing.assert_close(y, exact.to(of_16_bits), rtol=0.01, atol=1e-4)
    fused.scale_(again, c, b, h, B)
    assert torch.equal(y, again)


@pytest.mark.parametrize("has_bias", [False, True])
def test_an_update_of_zero_and_a_scale_of_one_change_no_bit(of_16_bits: torch.dtype, has_bias: bool) -> None:
    y, h, B = on_gpu((300, 100), of_16_bits), on_gpu((300, 8), of_16_bits), on_gpu((100, 8), of_16_bits)
    before = y.clone()
    fused.scale_(y, torch.ones(100, device="cuda"), a_bias(100, of_16_bits, has_bias), h, torch.zeros_like(B))
    assert torch.equal(y, before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_gradient_passes_with_float32_sums(
    shape: tuple[int, int], dtype: torch.dtype, has_bias: bool
) -> None:
    g, y = on_gpu(shape, dtype), on_gpu(shape, dtype, seed=1)
    c, m = on_gpu(shape[1:], torch.float32).abs(), 1 + on_gpu(shape[1:], torch.float32, seed=1).abs()
    b = a_bias(shape[1], dtype, has_bias)
    scaled, d_magnitude, _ = fused.through_magnitude(g, y, b, c, m)
    torch.testing.assert_close(scaled, (c.double() * g.double()).to(dtype))
    shifted = y.double() - (0 if b is None else b.double())
    assert relative_error(d_magnitude, (g.double() * shifted).sum(dim=0) / m.double()) < 1e-5


@pytest.mark.parametrize("shape", UPDATES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("lacks_update", [False, True])
def test_the_gradient_to_b_comes_of_the_same_pass(
    shape: tuple[int, int, int], of_16_bits: torch.dtype, has_bias: bool, lacks_update: bool
) -> None:
    rows, features, rank = shape
    g, y = on_gpu((rows, features), of_16_bits), on_gpu((rows, features), of_16_bits, seed=1)
    h, B = on_gpu((rows, rank), of_16_bits, seed=2), on_gpu((features, rank), of_16_bits, seed=3)
    c, m = (on_gpu((features,), torch.float32, seed=seed).abs() for seed in (4, 6))
    m, b = m + 1, a_bias(features, of_16_bits, has_bias)
    results = fused.through_magnitude(g, y, b, c, m, h, B, lacks_update=lacks_update)
    shifted = y.double() - (0 if b is None else b.double())
    shifted += h.double() @ B.double().T if lacks_update else 0
    exact = c.double() * g.double()
    scaled, d_magnitude, d_B = results
    torch.testing.assert_close(scaled, exact.to(of_16_bits))
    if rows:
        assert relative_error(d_magnitude, (g.double() * shifted).sum(dim=0) / m.double()) < 1e-5
        sums_what_is_rounded = rank > fused.HIGHEST_RANK and not lacks_update
        assert relative_error(d_B, exact.T @ h.double()) < (0.01 if sums_what_is_rounded else 1e-5)
    else:
        assert not d_magnitude.any()
        assert not d_B.any()
    again = fused.through_magnitude(g, y, b, c, m, h, B, lacks_update=lacks_update)
    assert all(torch.equal(one, other) for one, other in zip(results, again, strict=True))


@pytest.mark.parametrize("shape", [(5, 7, 1), (100, 300, 3), (512, 2048, 32), (2050, 520, 384)], ids=str)
def test_norms_are_those_of_the_sum(shape: tuple[int, int, int], of_16_bits: torch.dtype) -> None:
    vectors, length, rank = shape
    W0 = [on_gpu((vectors, length), of_16_bits, seed=seed) for seed in range(3)]
    G, F = (on_gpu((3, n, rank), of_16_bits, seed=n) / rank**0.5 for n in (vectors, length))
    squares = torch.stack([squared_norms(w0) for w0 in W0])
    norms = fused.norms_of_sum(W0, squares, G, F)
    exact = (torch.stack(W0).double() + G.double() @ F.double().mT).norm(dim=2)
    assert relative_error(norms, exact) < 1e-6
    assert torch.equal(norms, fused.norms_of_sum(W0, squares, G, F))
    assert torch.equal(fused.norms_of_sum(W0, squares, 0 * G, F), squares.sqrt())


def test_norms_take_weights_that_are_not_aligned(of_16_bits: torch.dtype) -> None:
    W0 = on_gpu((1 + 40 * 64,), of_16_bits)[1:].view(40, 64)
    G, F = on_gpu((1, 40, 4), of_16_bits), on_gpu((1, 64, 4), of_16_bits)
    norms = fused.norms_of_sum([W0], squared_norms(W0)[None], G, F)
    assert relative_error(norms, (W0.double() + G[0].double() @ F[0].double().T).norm(dim=1)[None]) < 1e-6

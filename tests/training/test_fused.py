"""The Triton kernels against float64, on a GPU only."""

from __future__ import annotations

import pytest
import torch
from equations import random, relative_error
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("Triton kernels need a GPU", allow_module_level=True)
fused = pytest.importorskip("wdanalysis.training.fused")

SHAPES = [(7, 5), (300, 100), (4096, 512), (1000, 8192)]


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


def on_gpu(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return random(*shape, seed=seed).to("cuda", dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_scaling_rounds_once(shape: tuple[int, int], dtype: torch.dtype, has_bias: bool) -> None:
    y, c = on_gpu(shape, dtype), on_gpu(shape[1:], torch.float32).abs()
    b = on_gpu(shape[1:], dtype, seed=1) if has_bias else None
    exact = c.double() * y.double() + (0 if b is None else b.double() * (1 - c.double()))
    fused.scale_(y, c, b)
    torch.testing.assert_close(y, exact.to(dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_gradient_passes_with_float32_sums(
    shape: tuple[int, int], dtype: torch.dtype, has_bias: bool
) -> None:
    g, y = on_gpu(shape, dtype), on_gpu(shape, dtype, seed=1)
    c, m = on_gpu(shape[1:], torch.float32).abs(), 1 + on_gpu(shape[1:], torch.float32, seed=1).abs()
    b = on_gpu(shape[1:], dtype, seed=2) if has_bias else None
    scaled, d_magnitude = fused.through_magnitude(g, y, b, c, m)
    torch.testing.assert_close(scaled, (c.double() * g.double()).to(dtype))
    shifted = y.double() - (0 if b is None else b.double())
    assert relative_error(d_magnitude, (g.double() * shifted).sum(dim=0) / m.double()) < 1e-5

"""Products and norms that are not summed in 16 bits: under the functions of `functional` and the kernels of `fused`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from wdanalysis.training.layers import accurate_dtype

_HAS_FLOAT32_RESULT = torch.__version__ >= "2.8"
"""Whether products of 16 bits can be had in float32."""


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Keep autocast from computing norms in 16 bits."""
    return torch.autocast(device.type, enabled=False)


def matmul_float32(a: Tensor, b: Tensor, s: float = 1.0) -> Tensor:
    """A product, times s, whose sums are neither kept nor returned in 16 bits.

    Parameters
    ----------
    a, b
        Two matrices, or two batches of them, of one dtype.
    s
        1 for batches.
    """
    if a.is_cuda and a.element_size() == 2 and _HAS_FLOAT32_RESULT:
        if s != 1:
            zero = _zero(a.device)
            scaled: Tensor = torch.addmm(zero, a, b, out_dtype=torch.float32, beta=0, alpha=s)
            return scaled
        multiply: Any = torch.mm if a.ndim == 2 else torch.bmm
        unscaled: Tensor = multiply(a, b, out_dtype=torch.float32)
        return unscaled
    dtype = accurate_dtype(a.dtype)
    product = a.to(dtype) @ b.to(dtype)
    return product if s == 1 else product.mul_(s)


def root(squares: Tensor) -> Tensor:
    """√ to the nearest number, so that the root of ‖w0‖² is ‖w0‖; a CPU's vectorised root is not always that."""
    return squares.sqrt() if squares.is_cuda else squares.double().sqrt().to(squares.dtype)


@cache
def _zero(device: torch.device) -> Tensor:
    return torch.zeros((), device=device)

"""Eq. 1 and 5 written out for autograd: what the fast functions are tested against, with PEFT."""

from __future__ import annotations

import torch
from torch import Tensor

from wdanalysis.decomposition import Axis
from wdanalysis.training.layers import Adapted


def eq_5(W0: Tensor, A: Tensor, B: Tensor, s: float, m: Tensor, axis: Axis, *, detach: bool) -> Tensor:
    """W' = m (W0 + s·BA) / ‖W0 + s·BA‖, the norm detached (Eq. 11) or not (Eq. 6)."""
    dim = 1 if axis == "out" else 0
    V = W0 + s * B @ A
    norm = V.norm(dim=dim, keepdim=True)
    return m.unsqueeze(dim) * V / (norm.detach() if detach else norm)


@torch.no_grad()
def tuned_weight(layer: Adapted) -> Tensor:
    """W' of a layer, out × in, by Eq. 1 or 5."""
    W = layer.base_weight()
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    if layer.update is not None:
        A, B = layer.update.factors()
        W = W + (B @ A).to(W.dtype)
    if layer.magnitude is None:
        return W
    dim = 1 if layer.axis == "out" else 0
    return layer.magnitude.unsqueeze(dim).to(W.dtype) * W / W.norm(dim=dim, keepdim=True)


def relative_error(value: Tensor, exact: Tensor) -> float:
    value, exact = value.detach().double(), exact.detach().double()
    return float((value - exact).norm() / exact.norm())


def random(*shape: int, seed: int = 0, requires_grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)

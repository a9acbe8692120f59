"""‖V′‖ without V′, and Eq. 1 and 5 as one operation each, with the gradients of Eq. 6, 7 and 11.

Everywhere W0 is out × in, A is r × in, B is out × r, V′ = W0 + s·BA and c = m/‖V′‖. Products take the dtype of W0;
norms, m and c are float32 (float64 where W0 is).
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from wdanalysis.training.fast.numerics import full_precision, matmul_float32, root
from wdanalysis.training.layers import lengths

Arguments = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None, "Prepared"]
"""What `low_rank_linear` takes after x."""

STAND_IN_FOR_ZERO = 2.0**-60
"""What m counts as where it is 0: so little that it is lost in any rounding, yet y/m is V′x/‖V′‖.

In float16, which has no numbers so small, an m of exactly 0 gets no gradient where the output is kept.
"""

LONGEST_REBUILT = 4096
"""Up to this length of its rows a module that does not widen its input rebuilds its output for Eq. 7."""


# --- norms --------------------------------------------------------------------------------------------------


def squared_norms(vectors: Tensor) -> Tensor:
    """‖w0‖² of each row: the part of the norm that never changes."""
    return lengths(vectors, "out").square()


def norms_of_sum(squares: Tensor, product: Tensor, G: Tensor, F: Tensor) -> Tensor:
    """‖w0 + F g‖ of each vector, without the sum: ‖w0‖² + 2 g·(W0 F) + g (FᵀF) gᵀ, under the root.

    Parameters
    ----------
    squares
        ‖w0‖² of each vector, (n, vectors).
    product
        W0 F, (n, vectors, r).
    G, F
        The update Δw = F g of n matrices: (n, vectors, r) and (n, length, r). Along the output axis G is B and F is
        s·Aᵀ, along the input axis the other way round.
    """
    gram = matmul_float32(F.mT, F)
    G = G.to(product.dtype)
    change = (G * torch.baddbmm(product, G, gram, beta=2)).sum(dim=-1)
    return root((squares + change).clamp_(min=0))


def factored_norm(vectors: Tensor, squares: Tensor, G: Tensor, F: Tensor) -> Tensor:
    """‖W0 + G Fᵀ‖ of each row, with its gradient to G and F, which Eq. 6 needs and Eq. 11 leaves out.

    Parameters
    ----------
    vectors
        W0, vectors × length.
    squares
        ‖w0‖² of each, (vectors,).
    G, F
        (vectors, r) and (length, r).
    """
    with torch.no_grad(), full_precision(vectors.device):
        factor = F.to(vectors.dtype)
        product = matmul_float32(vectors, factor)
        norm = norms_of_sum(squares[None], product[None], G[None], factor[None])[0]
    return with_gradient(norm, vectors, G, F)


def with_gradient(norm: Tensor, vectors: Tensor, G: Tensor, F: Tensor) -> Tensor:
    """Return `norm`, which is known already, as `factored_norm` does with its gradient."""
    return _NormGradient.apply(norm, vectors, G, F)  # type: ignore[no-any-return, no-untyped-call]


class _NormGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, norm: Tensor, vectors: Tensor, G: Tensor, F: Tensor) -> Tensor:
        ctx.save_for_backward(norm, vectors, G, F)
        return norm.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_norm: Tensor) -> tuple[Tensor | None, ...]:
        """∇_{V′}‖V′‖ = V′/‖V′‖, carried on to G and F; 0 where a vector is zero."""
        norm, vectors, G, F = ctx.saved_tensors
        with full_precision(vectors.device):
            k = (d_norm / norm).where(norm > 0, 0.0)[:, None]
            kG = k * G
            product = matmul_float32(vectors, F.to(vectors.dtype))
            d_G = torch.addmm(k * product, kG, F.mT @ F)
            d_F = matmul_float32(vectors.mT, kG.to(vectors.dtype)).addmm_(F, G.mT @ kG)
        return None, None, d_G, d_F


# --- Eq. 1 and 5 --------------------------------------------------------------------------------------------


class Prepared(NamedTuple):
    """What a module needs of its factors and magnitude until these change again; no part of the graph.

    Attributes
    ----------
    A, B
        s·A and B in the dtype of the products; None where the update is not made of trained factors.
    s
        The scale that is in A.
    scale
        c = m/‖V′‖, 0 where the vector is zero; None without a magnitude.
    magnitude
        m, with `STAND_IN_FOR_ZERO` for 0, so that Eq. 7 can be had from c ⊙ V′x.
    norm
        ‖V′‖, infinite where the vector is zero, for Eq. 7 from V′x.
    """

    A: Tensor | None = None
    B: Tensor | None = None
    s: float = 1.0
    scale: Tensor | None = None
    magnitude: Tensor | None = None
    norm: Tensor | None = None

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """s·A and B, where they are."""
        assert self.A is not None
        assert self.B is not None
        return self.A, self.B


def scale_by_magnitude(magnitude: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return c, m and ‖V′‖ as `Prepared` has them, from m and ‖V′‖."""
    magnitude = magnitude.where(magnitude != 0, STAND_IN_FOR_ZERO)
    norm = norm.where(norm > 0, torch.inf)
    return magnitude / norm, magnitude, norm


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor | None,
    norm: Tensor | None,
    ready: Prepared,
) -> Tensor:
    """Return c ⊙ (W0 + s·BA) x + b in as few operations as it takes; c is 1 without a magnitude.

    For the backward pass are kept x, Ax and, for Eq. 7 as ∇m_j = Σ_t g_tj (y_tj − b_j)/m_j, the result y, which costs
    nothing where the next operation keeps it too (after a gate or up projection). Where that is unlikely and y cheap,
    V′x is rebuilt instead: see `LONGEST_REBUILT`. Nothing of the size of W0 is made.

    Parameters
    ----------
    x, weight, bias
        (…, in), W0 (out × in), frozen, and b; of one dtype.
    A, B, magnitude, norm
        The parameters and ‖V′‖, for their gradients; a `norm` of None is the constant of Eq. 11.
    ready
        What is made of them, with which is computed.
    """
    return _LowRankLinear.apply(x, weight, bias, A, B, magnitude, norm, ready)  # type: ignore[no-any-return, no-untyped-call]


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        _A: Tensor,
        _B: Tensor,
        _magnitude: Tensor | None,
        _norm: Tensor | None,
        ready: Prepared,
    ) -> Tensor:
        A, B = ready.factors
        y = linear(x, weight, bias)
        h = torch.mm(x.reshape(-1, x.shape[-1]), A.t())
        rows = y.view(-1, y.shape[-1])
        if ready.scale is None:
            rows.addmm_(h, B.t())
        else:
            _update_and_scale_(rows, h, B, bias, ready.scale)
        keeps_y = ready.scale is not None and not _is_rebuilt(weight)
        ctx.save_for_backward(x, h, weight, bias, y if keeps_y else None)
        ctx.ready = ready
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Eq. 7 for m and Eq. 11 for A and B; Eq. 6 comes of it by what goes to ‖V′‖."""
        x, h, weight, bias, y = ctx.saved_tensors
        ready: Prepared = ctx.ready
        needs_x, _, needs_bias, *_, needs_norm, _ = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])
        A, B = ready.factors
        d_bias = g.sum(dim=0) if needs_bias else None
        d_magnitude = d_norm = None
        if ready.scale is None:
            d_B = matmul_float32(g.t(), h)
        else:
            if y is None:  # W0 x, for ∇m_j = Σ_t g_tj (V′x_t)_j / ‖V′_j‖
                W0x = linear(x, weight).view(g.shape)
                g, d_magnitude, d_B = _through_update(g, h, W0x, B, None, ready, lacks_update=True)
            else:
                y = y.view(g.shape)
                g, d_magnitude, d_B = _through_update(g, h, y, B, bias, ready, lacks_update=False)
            d_norm = -ready.scale * d_magnitude if needs_norm else None
        d_h = torch.mm(g, B)
        d_A = matmul_float32(d_h.t(), x.reshape(-1, x.shape[-1]), ready.s)
        d_x = torch.mm(g, weight).addmm_(d_h, A).view(x.shape) if needs_x else None
        return d_x, None, d_bias, d_A, d_B, d_magnitude, d_norm, None


def rescale(
    y: Tensor, magnitude: Tensor, norm: Tensor | None, ready: Prepared, bias: Tensor | None = None
) -> Tensor:
    """Return c ⊙ (y − b) + b: the magnitude's part of Eq. 5, where y = V′x + b was computed by others.

    Parameters
    ----------
    y
        (…, features).
    magnitude, norm
        m and ‖V′‖, for their gradients; a `norm` of None is the constant of Eq. 11.
    ready
        With c.
    bias
        b, where it is in y.
    """
    return _Rescale.apply(y, magnitude, norm, ready, bias)  # type: ignore[no-any-return, no-untyped-call]


class _Rescale(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, _magnitude: Tensor, _norm: Tensor | None, ready: Prepared, bias: Tensor | None
    ) -> Tensor:
        assert ready.scale is not None
        out = y.clone(memory_format=torch.contiguous_format)
        _scale_(out.view(-1, out.shape[-1]), bias, ready.scale)
        ctx.save_for_backward(out, bias)
        ctx.ready = ready
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Eq. 7 for m, and what it gives to y, ‖V′‖ and b."""
        out, bias = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        c, m = ctx.ready.scale, ctx.ready.magnitude
        d_y, d_magnitude = _through_magnitude(g, out.view(g.shape), bias, c, m)
        d_norm = -ctx.ready.scale * d_magnitude if ctx.needs_input_grad[2] else None
        d_bias = (g - d_y).sum(dim=0) if ctx.needs_input_grad[4] else None
        return d_y.view(grad.shape), d_magnitude, d_norm, None, d_bias


def _update_and_scale_(y: Tensor, h: Tensor, B: Tensor, bias: Tensor | None, c: Tensor) -> None:
    """In place, y ← c ⊙ (y + Bh − b) + b of rows y and h; to the last bit y where Bh = 0 and c = 1."""
    fused = fused_kernels(y)
    if fused is not None and y.element_size() == 2:
        fused.scale_(y, c, bias, h, B)
    else:
        _scale_(y.addmm_(h, B.t()), bias, c)


def _through_update(
    g: Tensor, h: Tensor, y: Tensor, B: Tensor, bias: Tensor | None, ready: Prepared, *, lacks_update: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return c ⊙ g, and ∇m and ∇B of Eq. 7 and 11.

    Parameters
    ----------
    g, h, y
        Rows: the gradient, Ax, and the output, or W0 x, which `lacks_update`.
    """
    c, divisor = ready.scale, ready.norm if lacks_update else ready.magnitude
    assert c is not None
    fused = fused_kernels(g)
    if fused is not None and g.element_size() == 2:
        gradients: tuple[Tensor, Tensor, Tensor] = fused.through_magnitude(
            g.contiguous(), y, bias, c, divisor, h, B, lacks_update=lacks_update
        )
        return gradients
    if lacks_update:
        y.addmm_(h, B.t())
    g, d_magnitude = _through_magnitude(g, y, bias, c, divisor)
    return g, d_magnitude, matmul_float32(g.t(), h)


def _scale_(y: Tensor, bias: Tensor | None, c: Tensor) -> None:
    """In place, y ← c ⊙ (y − b) + b of rows y; to the last bit y where c = 1."""
    fused = fused_kernels(y)
    if fused is not None:
        fused.scale_(y, c, bias)
    else:
        y.mul_(c)
        if bias is not None:
            y.add_(bias * (1 - c))


def _through_magnitude(
    g: Tensor, y: Tensor, bias: Tensor | None, c: Tensor, divisor: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return c ⊙ g, and Eq. 7, ∇m_j = ∇W′_j·V′_j/‖V′_j‖, as Σ_t g_tj (y_tj − b_j)/divisor_j."""
    assert divisor is not None
    fused = fused_kernels(g)
    if fused is not None:
        d_y, d_magnitude, _ = fused.through_magnitude(g.contiguous(), y, bias, c, divisor)
        return d_y, d_magnitude
    total = (g * y).sum(dim=0, dtype=divisor.dtype)
    if bias is not None:
        total -= bias * g.sum(dim=0, dtype=divisor.dtype)
    return torch.mul(g, c, out=torch.empty_like(g)), total / divisor


def _is_rebuilt(weight: Tensor) -> bool:
    out_features, in_features = weight.shape
    return out_features <= in_features <= LONGEST_REBUILT


def fused_kernels(operand: Tensor) -> ModuleType | None:
    """Return the module `fused` where it has kernels for `operand`: on a GPU, with Triton, but in float64."""
    return _import_fused() if operand.is_cuda and operand.dtype != torch.float64 else None


@cache
def _import_fused() -> ModuleType | None:
    try:
        from wdanalysis.training.fast import fused
    except ImportError:
        return None
    return fused

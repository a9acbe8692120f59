"""Equations 2 to 4 of the DoRA paper (arXiv 2402.09353, ICML 2024) as they are written, in float64.

This module is the definition. What is fast lives in `wdanalysis.kernels` and is tested against it.

A weight matrix is taken as `torch.nn.Linear` stores it, W ∈ ℝ^(out × in): pass ``W.T`` of a matrix stored as in × out
(GPT-2's Conv1D). `axis` says what one vector is:

- ``"out"``, the default: one vector per output feature, a row of W. The paper's authors' code and PEFT do this; it is
  what the paper calls a column, since it draws W as in × out.
- ``"in"``: one vector per input feature, a column of W: Eq. 2 read to the letter on an `nn.Linear` weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Axis = Literal["out", "in"]
"""What one vector of the decomposition is: an output feature or an input feature."""


class Decomposition(NamedTuple):
    """W = magnitude · direction (Eq. 2).

    Attributes
    ----------
    magnitude
        m = ‖W‖_c, one number per vector: shape (out,) along ``"out"``, (in,) along ``"in"``. In the units of W.
    direction
        W / ‖W‖_c, out × in, each vector of unit length. An all-zero vector has no direction and stays zero, so that
        magnitude · direction is W for every W.

    Examples
    --------
    >>> W = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    >>> parts = wd.decompose(W, axis="in")
    >>> parts.magnitude
    tensor([3.0000, 4.4721], dtype=torch.float64)
    >>> bool(torch.allclose(parts.magnitude * parts.direction, W.double()))
    True
    """

    magnitude: Tensor
    direction: Tensor


def decompose(weight: Tensor, axis: Axis = "out") -> Decomposition:
    """Split a weight matrix into magnitude and direction (Eq. 2).

    Parameters
    ----------
    weight
        out × in (or out × in × k… of a convolution, read as out × (in·k…)), of any float dtype.
    axis
        ``"out"``: a vector is a row; ``"in"``: a vector is a column.

    Returns
    -------
    Decomposition
        In float64, on the device of `weight`.

    Raises
    ------
    ValueError
        `weight` is not a matrix of floats, or `axis` is neither ``"out"`` nor ``"in"``.

    Examples
    --------
    >>> magnitude, direction = wd.decompose(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    >>> magnitude
    tensor([5., 2.], dtype=torch.float64)
    """
    W, dim = _as_matrix(weight), _reduced_dim(axis)
    m = W.norm(dim=dim, keepdim=True)
    direction = W / m.where(m > 0, 1.0)
    return Decomposition(m.squeeze(dim), direction)


def delta_m(base: Tensor, tuned: Tensor, axis: Axis = "out") -> float:
    """ΔM = (1/k) Σ_n |mⁿ − m₀ⁿ| (Eq. 3), in the units of the weights.

    Parameters
    ----------
    base, tuned
        W₀ and W, of one shape, out × in; the dtypes may differ.
    axis
        ``"out"``: k = out, a vector is a row; ``"in"``: k = in, a vector is a column.

    Raises
    ------
    ValueError
        The shapes differ, or as in `decompose`.

    Examples
    --------
    Doubled, then turned by a quarter: only the first changes a length, from 5 to 10.

    >>> base, tuned = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[6.0, 8.0], [2.0, 0.0]])
    >>> wd.delta_m(base, tuned)
    2.5
    """
    _same_shape(base, tuned)
    m0, m = decompose(base, axis).magnitude, decompose(tuned, axis).magnitude
    return float((m - m0).abs().mean())


def delta_d(base: Tensor, tuned: Tensor, axis: Axis = "out") -> float:
    """ΔD = (1/k) Σ_n (1 − cos(Vⁿ, W₀ⁿ)) (Eq. 4), from 0 (no turn) to 2 (reversed).

    With unit vectors u and u₀, 1 − cos(u, u₀) = ½‖u − u₀‖², which keeps its digits where the turn is small.
    A vector that is zero in both is unchanged and counts 0. One that is zero in only one of the two has no angle and
    counts 1, as cosine similarity 0 does.

    Parameters
    ----------
    base, tuned
        W₀ and W, of one shape, out × in; the dtypes may differ.
    axis
        ``"out"``: k = out, a vector is a row; ``"in"``: k = in, a vector is a column.

    Raises
    ------
    ValueError
        The shapes differ, or as in `decompose`.

    Examples
    --------
    Doubled, then turned by a quarter: only the second changes a direction, to a cosine of 0.

    >>> base, tuned = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[6.0, 8.0], [2.0, 0.0]])
    >>> wd.delta_d(base, tuned)
    0.5
    """
    _same_shape(base, tuned)
    (m0, u0), (m, u) = decompose(base, axis), decompose(tuned, axis)
    one_minus_cos = 0.5 * (u - u0).square().sum(dim=_reduced_dim(axis))
    only_one_is_zero = (m0 == 0) != (m == 0)
    return float(one_minus_cos.masked_fill(only_one_is_zero, 1.0).mean())


def _as_matrix(weight: Tensor) -> Tensor:
    if weight.ndim < 2:
        raise ValueError(
            f"a weight matrix has two dimensions, out × in; this one has shape {tuple(weight.shape)}"
        )
    if not weight.is_floating_point():
        raise ValueError(f"a weight matrix holds floats; this one holds {weight.dtype}")
    return weight.detach().double().flatten(start_dim=1)


def _reduced_dim(axis: Axis) -> int:
    if axis not in get_args(Axis):
        raise ValueError(
            f"axis is 'out' (a vector per output feature) or 'in' (per input feature), not {axis!r}"
        )
    return 1 if axis == "out" else 0


def _same_shape(base: torch.Tensor, tuned: torch.Tensor) -> None:
    if base.shape != tuned.shape:
        raise ValueError(f"base and tuned differ in shape: {tuple(base.shape)} and {tuple(tuned.shape)}")

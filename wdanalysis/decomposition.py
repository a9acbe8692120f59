"""Equations 2 to 4 of the DoRA paper (arXiv 2402.09353, ICML 2024) as they are written, in float64.

This module is the definition. What is fast lives in `wdanalysis.kernels` and is tested against it.

A weight matrix is taken as `torch.nn.Linear` stores it, W ∈ ℝ^(out × in): pass ``W.T`` of a matrix stored as in × out
(GPT-2's Conv1D). `axis` says what one vector is:

- ``"out"``, the default: one vector per output feature, a row of W. The paper's authors' code and PEFT do this; it is
  what the paper calls a column, since it draws W as in × out.
- ``"in"``: one vector per input feature, a column of W: Eq. 2 read to the letter on an `nn.Linear` weight.

W may be a torch tensor, a numpy array, or what numpy makes an array of (an array of JAX or TensorFlow, nested lists).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, TypeAlias, TypeVar, get_args, overload

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

    Matrix: TypeAlias = Tensor | ArrayLike

Array = TypeVar("Array")

Axis = Literal["out", "in"]
"""What one vector of the decomposition is: an output feature or an input feature."""


class Decomposition(NamedTuple, Generic[Array]):
    """W = magnitude · direction (Eq. 2), in torch tensors where W is one, else in numpy arrays.

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

    magnitude: Array
    direction: Array


@overload
def decompose(weight: Tensor, axis: Axis = "out") -> Decomposition[Tensor]: ...
@overload
def decompose(weight: ArrayLike, axis: Axis = "out") -> Decomposition[NDArray[np.float64]]: ...
def decompose(
    weight: Matrix, axis: Axis = "out"
) -> Decomposition[Tensor] | Decomposition[NDArray[np.float64]]:
    """Split a weight matrix into magnitude and direction (Eq. 2).

    Parameters
    ----------
    weight
        out × in (or out × in × k… of a convolution, read as out × (in·k…)), of any float dtype, bfloat16 included.
    axis
        ``"out"``: a vector is a row; ``"in"``: a vector is a column.

    Returns
    -------
    Decomposition
        In float64: of a torch tensor torch tensors on its device, of anything else numpy arrays.

    Raises
    ------
    ValueError
        `weight` is not a matrix of floats, or `axis` is neither ``"out"`` nor ``"in"``.

    Examples
    --------
    >>> magnitude, direction = wd.decompose(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    >>> magnitude
    tensor([5., 2.], dtype=torch.float64)
    >>> wd.decompose(np.array([[3.0, 4.0], [0.0, 2.0]])).magnitude
    array([5., 2.])
    """
    import torch

    magnitude, direction = _split(_as_matrix(weight), _reduced_dim(axis))
    if isinstance(weight, torch.Tensor):
        return Decomposition(magnitude, direction)
    return Decomposition(magnitude.numpy(), direction.numpy())


def delta_m(base: Matrix, tuned: Matrix, axis: Axis = "out") -> float:
    """ΔM = (1/k) Σ_n |mⁿ − m₀ⁿ| (Eq. 3), in the units of the weights.

    Parameters
    ----------
    base, tuned
        W₀ and W, of one shape, out × in, each as `decompose` takes it; the dtypes may differ.
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
    W0, W = _pair(base, tuned)
    dim = _reduced_dim(axis)
    (m0, _), (m, _) = _split(W0, dim), _split(W, dim)
    return float((m - m0).abs().mean())


def delta_d(base: Matrix, tuned: Matrix, axis: Axis = "out") -> float:
    """ΔD = (1/k) Σ_n (1 − cos(Vⁿ, W₀ⁿ)) (Eq. 4), from 0 (no turn) to 2 (reversed).

    With unit vectors u and u₀, 1 − cos(u, u₀) = ½‖u − u₀‖², which keeps its digits where the turn is small.
    A vector that is zero in both is unchanged and counts 0. One that is zero in only one of the two has no angle and
    counts 1, as cosine similarity 0 does.

    Parameters
    ----------
    base, tuned
        W₀ and W, of one shape, out × in, each as `decompose` takes it; the dtypes may differ.
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
    W0, W = _pair(base, tuned)
    dim = _reduced_dim(axis)
    (m0, u0), (m, u) = _split(W0, dim), _split(W, dim)
    one_minus_cos = 0.5 * (u - u0).square().sum(dim=dim)
    only_one_is_zero = (m0 == 0) != (m == 0)
    return float(one_minus_cos.masked_fill(only_one_is_zero, 1.0).mean())


def _split(W: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return m = ‖W‖_c and W / m (Eq. 2); an all-zero vector stays zero."""
    m = W.norm(dim=dim, keepdim=True)
    return m.squeeze(dim), W / m.where(m > 0, 1.0)


def _as_matrix(weight: Matrix) -> Tensor:
    """Return a weight as a float64 tensor of two dimensions."""
    import numpy as np
    import torch

    if isinstance(weight, torch.Tensor):
        _check_matrix(weight.shape, weight.dtype, holds_floats=weight.is_floating_point())
        return weight.detach().double().flatten(start_dim=1)
    array = np.asarray(weight)
    # By name: numpy does not know JAX's bfloat16 and float8s for floats.
    holds_floats = array.dtype.name.startswith(("float", "bfloat"))
    _check_matrix(array.shape, array.dtype, holds_floats=holds_floats)
    return torch.from_numpy(array.astype(np.float64, order="C")).flatten(start_dim=1)


def _check_matrix(shape: Sequence[int], dtype: object, *, holds_floats: bool) -> None:
    if len(shape) < 2:
        raise ValueError(f"a weight matrix has two dimensions, out × in; this one has shape {tuple(shape)}")
    if not holds_floats:
        raise ValueError(f"a weight matrix holds floats; this one holds {dtype}")


def _reduced_dim(axis: Axis) -> int:
    if axis not in get_args(Axis):
        raise ValueError(
            f"axis is 'out' (a vector per output feature) or 'in' (per input feature), not {axis!r}"
        )
    return 1 if axis == "out" else 0


def _pair(base: Matrix, tuned: Matrix) -> tuple[Tensor, Tensor]:
    """Return both weights as matrices, which must be of one shape, on the device of the tuned one."""
    import numpy as np

    W0, W = _as_matrix(base), _as_matrix(tuned)
    shape0, shape = tuple(np.shape(base)), tuple(np.shape(tuned))
    if shape0 != shape:
        raise ValueError(f"base and tuned differ in shape: {shape0} and {shape}")
    return W0.to(W.device), W

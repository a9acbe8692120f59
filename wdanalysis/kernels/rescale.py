"""DoRA's rescaling: each vector v of V = W₀ + ΔV becomes c·v with c = m/‖v‖ (Eq. 5).

A vector v that is zero has no direction: it stays zero whatever its m is. This module is where that rule is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wdanalysis.kernels.lowrank import Array, Factors
from wdanalysis.kernels.sums import Vector, VectorChanges, magnitudes_and_turn


def rescaling(magnitude: NDArray[Any], norm: NDArray[Any]) -> NDArray[Any]:
    """C = m/‖v‖ of each vector, in the type of the two; 0 for a zero v.

    >>> rescaling(np.array([3.0, 1.0]), np.array([2.0, 0.0]))
    array([1.5, 0. ])
    """
    return _over_norm(magnitude, norm, of_zero=0.0)


def rescaling_less_one(magnitude: Vector, norm: Vector) -> Vector:
    """C − 1 = (m − ‖v‖)/‖v‖, which keeps its digits where m is nearly ‖v‖; −1 for a zero v."""
    return _over_norm(magnitude - norm, norm, of_zero=-1.0)


def _over_norm(numbers: NDArray[Any], norm: NDArray[Any], *, of_zero: float) -> NDArray[Any]:
    quotients: NDArray[Any] = np.divide(numbers, norm, out=np.full_like(norm, of_zero), where=norm != 0)
    return quotients


def vector_changes_of_dora(a: Vector, p: Vector, q: Vector, magnitude: Vector) -> VectorChanges:
    """Evaluate the equations of `vector_changes` for w = m·v/‖v‖, from the sums of v = w₀ + ΔV and the stored m.

    Only the direction comes from v. A negative m turns the vector round.

    Parameters
    ----------
    a, p, q
        The sums of each vector of V, as in `vector_changes`.
    magnitude
        The trained m, one number for each vector.
    """
    m0, v_norm, turn_of_v = magnitudes_and_turn(a, p, q)
    m = np.where(v_norm == 0, 0.0 * magnitude, np.abs(magnitude))  # a NaN in m stays one
    turn = np.where((magnitude < 0) & (v_norm > 0), 2 - turn_of_v, turn_of_v)
    turn = np.where((m0 == 0) & (m == 0), 0.0, np.where((m0 == 0) != (m == 0), 1.0 + 0.0 * turn, turn))
    change = m - m0
    radial = np.where(m0 == 0, 0.0 * m, change - m * turn)
    update_norm2 = change**2 + 2 * m0 * m * turn  # the law of cosines
    return VectorChanges(m0, change, turn, update_norm2, radial)


def rescaled_update(
    block: Array,
    factors: Factors,
    less_one: Vector,
    outputs: slice = slice(None),
    inputs: slice = slice(None),
) -> Array:
    """A block of DoRA's whole update W − W₀, out × in, for measuring it along the axis that m does not rescale.

    W − W₀ = (c − 1)·W₀ + c·s·BA, which subtracts nothing nearly equal.

    Parameters
    ----------
    block
        W₀[outputs, inputs], out × in.
    factors
        ΔV = s·BA of the whole matrix.
    less_one
        c − 1 for every vector of the whole matrix along `factors.magnitude_axis`.
    outputs, inputs
        Where the block lies.
    """
    change = less_one[outputs, None] if factors.magnitude_axis == "out" else less_one[None, inputs]
    direction_update = factors.B[outputs] @ factors.A[:, inputs]
    return change * block + (1 + change) * factors.scale * direction_update

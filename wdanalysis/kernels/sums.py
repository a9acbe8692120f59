"""From the three sums of a vector to its two magnitudes and the angle between them.

For one vector w₀ of the base and the same vector w of the tuned matrix, with d = w − w₀,

    a = Σ w₀²      p = Σ w₀·d      q = Σ d²

    m₀ = √a                  m = √(a + 2p + q)                       the two magnitudes (Eq. 2)
    m − m₀ = (2p + q) / (m + m₀)
    1 − cos = (a·q − p²) / (a·m²) / (1 + cos),  cos = (a + p) / (m₀·m)
    ρ = p/m₀                                the radial part of d: m − m₀ = ρ + m·(1 − cos), exactly

The usual m − m₀ and 1 − cos subtract nearly equal numbers; these two forms do not, and keep their digits for updates
far smaller than the weights. What they give up lies at the other end: for a vector that tuning shrank to a fraction
f of its length, a + 2p + q is exact to 1e-16/f² of itself, so six digits hold down to f = 1e-5. Where no digit is left
(`LOST`, f < 3e-7) the vector counts as zero, as one does that became zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

LOST = 1e-13
"""An m² of a smaller share of m₀² is the rounding of the sums."""


@dataclass(frozen=True)
class VectorChanges:
    """What tuning did to each vector of a matrix; every field has one number per vector.

    Attributes
    ----------
    magnitude
        m₀ of the base.
    magnitude_change
        m − m₀.
    turn
        1 − cos, from 0 (no turn) to 2 (reversed). 0 for a vector that is zero in both matrices, 1 for one that is zero
        in only one of them, which has no angle.
    update_norm2
        Σ d², the squared length of the update.
    radial
        ρ = w₀·d/m₀, how far d goes along w₀; 0 where w₀ is zero and has no direction. What remains of m − m₀ is
        m·(1 − cos), which the turn adds to the length.
    """

    magnitude: Vector
    magnitude_change: Vector
    turn: Vector
    update_norm2: Vector
    radial: Vector

    @property
    def centrifugal(self) -> Vector:
        """m·(1 − cos): m − m₀ less its radial part."""
        return (self.magnitude + self.magnitude_change) * self.turn


def dot(u: Vector, v: Vector) -> float:
    """Σ uv, without a BLAS: its threads and those that measure would wait for each other at every matrix."""
    return float(np.einsum("i,i->", u, v))


def vector_changes(a: Vector, p: Vector, q: Vector) -> VectorChanges:
    """Evaluate the equations above for every vector.

    Parameters
    ----------
    a, p, q
        Σ w₀², Σ w₀·d and Σ d² of each vector. NaN where an element was not finite, which the result then is too.
    """
    m0, m, one_minus_cos = magnitudes_and_turn(a, p, q)
    both = m + m0
    with np.errstate(invalid="ignore"):  # a vector that is not finite
        change = np.divide(2 * p + q, both, out=np.zeros_like(both), where=both != 0)
        radial = np.divide(p, m0, out=np.zeros_like(m0), where=m0 != 0)
    is_zero = m == 0
    change, radial = (np.where(is_zero, 0.0 - m0, values) for values in (change, radial))
    return VectorChanges(m0, change, one_minus_cos, q, radial)


def magnitudes_and_turn(a: Vector, p: Vector, q: Vector) -> tuple[Vector, Vector, Vector]:
    """m₀, m and 1 − cos of each vector, from the sums as in `vector_changes`."""
    with np.errstate(invalid="ignore"):  # a vector that is not finite
        return _with_angles(a, p, q)


def _with_angles(a: Vector, p: Vector, q: Vector) -> tuple[Vector, Vector, Vector]:
    m0, m2 = np.sqrt(a), a + 2 * p + q
    m2 = np.where(m2 <= LOST * a, 0.0, m2)  # NaN stays NaN
    m = np.sqrt(m2)
    lengths = m0 * m
    has_angle = lengths != 0  # NaN has one, so that it stays NaN
    cos = np.divide(a + p, lengths, out=np.ones_like(a), where=has_angle)
    # sin² = (aq − p²)/(am²), in units of a so that nothing overflows, gives 1 − cos for small turns;
    # past a right angle the subtraction itself is exact enough.
    q_a, p_a, m2_a = (np.divide(x, a, out=np.zeros_like(a), where=has_angle) for x in (q, p, m2))
    sin2 = np.divide(np.maximum(q_a - p_a * p_a, 0.0), m2_a, out=np.zeros_like(a), where=has_angle)
    turn = np.where(cos < 0, 1 - cos, sin2 / (1 + np.maximum(cos, 0.0)))
    only_one_is_zero = ~has_angle & (np.maximum(m0, m) > 0)
    return m0, m, np.where(only_one_is_zero, 1.0, turn)

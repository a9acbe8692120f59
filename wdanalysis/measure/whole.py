"""The change of a matrix as others normalise it: as one long vector, and by the mean angle of its vectors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wdanalysis.kernels.sums import Vector, VectorChanges, vector_changes


@dataclass(frozen=True)
class WholeMatrix:
    """Columns of the metrics table.

    Attributes
    ----------
    matrix_delta_m
        | ‖W‖ − ‖W₀‖ |, Frobenius.
    matrix_delta_d
        1 − cos(vec W, vec W₀).
    mean_angle
        Mean angle between a vector and what it was, in degrees.
    """

    matrix_delta_m: float
    matrix_delta_d: float
    mean_angle: float

    @classmethod
    def of(cls, changes: VectorChanges) -> WholeMatrix:
        """Take them of a matrix's vectors, without cancellation.

        The sums of a vector add up to those of the matrix: a = Σ m₀², 2p + q = Σ (m − m₀)(m + m₀), q = Σ d²; with them
        the equations of `wdanalysis.kernels.sums` hold of the matrix as of a vector. The angle of a vector is
        2·asin √((1 − cos)/2).
        """
        m0, change, q = changes.magnitude, changes.magnitude_change, np.sum(changes.update_norm2)
        p = (np.sum(change * (2 * m0 + change)) - q) / 2
        whole = vector_changes(*(np.array([value]) for value in (np.sum(m0**2), p, q)))
        return cls(
            matrix_delta_m=abs(float(whole.magnitude_change[0])),
            matrix_delta_d=float(whole.turn[0]),
            mean_angle=float(np.mean(angle(changes.turn))),
        )


def angle(turn: Vector) -> Vector:
    """Degrees of 1 − cos, right down to the smallest.

    >>> angle(np.array([0.0, 0.5, 1.0, 2.0])).round(6)
    array([  0.,  60.,  90., 180.])
    """
    degrees: Vector = np.degrees(2 * np.arcsin(np.sqrt(np.minimum(turn / 2, 1))))
    return degrees

"""What ΔM and ΔD alone cannot tell: uniform shrink, the floor that rounding sets, and which vectors moved.

For each matrix, from the same sums as Eq. 3 and 4 (`MatrixDiagnostics`); and for each checkpoint, from the table of its
matrices (`common_shrink`). Decoupled weight decay multiplies every weight by 1 − lr·wd at each step: that alone gives
a ΔM in proportion to m₀, which says which vectors are long and nothing of what was learned.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wdanalysis.kernels.sums import Vector, VectorChanges


@dataclass(frozen=True)
class MatrixDiagnostics:
    """Further columns of the metrics table, for one matrix; None where there is no value.

    Attributes
    ----------
    shrink
        c of m ≈ (1 − c)·m₀ by least squares over the vectors: c = −Σ m₀(m − m₀) / Σ m₀². Negative for growth.
    shrink_share
        The share of ΔM that the shrink explains: 1 − delta_m_unshrunk / ΔM.
    delta_m_unshrunk
        ΔM after taking it out: mean |m − (1 − c)·m₀|.
    delta_m_floor
        The ΔM that rounding the tuned tensor to its stored dtype makes by itself.
    floor_ratio
        ΔD over the ΔD that rounding makes by itself.
    delta_m_median, delta_m_p90, delta_m_max
        Quantiles of |m − m₀| over the vectors.
    delta_d_median, delta_d_p90, delta_d_max
        The same of 1 − cos.
    base_norm
        ‖W₀‖ (Frobenius): √Σ m₀².
    delta_m_norm
        √Σ (m − m₀)².
    """

    shrink: float | None = None
    shrink_share: float | None = None
    delta_m_unshrunk: float | None = None
    delta_m_floor: float | None = None
    floor_ratio: float | None = None
    delta_m_median: float | None = None
    delta_m_p90: float | None = None
    delta_m_max: float | None = None
    delta_d_median: float | None = None
    delta_d_p90: float | None = None
    delta_d_max: float | None = None
    base_norm: float | None = None
    delta_m_norm: float | None = None

    @classmethod
    def of(
        cls, changes: VectorChanges, *, delta_m_floor: float | None, delta_d_floor: float | None
    ) -> MatrixDiagnostics:
        """Take them of a matrix's vectors, all finite; the floors are None for an update that is not rounded."""
        m0, dm, turn = changes.magnitude, changes.magnitude_change, changes.turn
        delta_m, base_norm = float(np.mean(np.abs(dm))), float(np.linalg.norm(m0))
        c = uniform_shrink(m0, dm)
        unshrunk = None if c is None else float(np.mean(np.abs(dm + c * m0)))
        m_median, m_p90, m_max = map(float, np.quantile(np.abs(dm), (0.5, 0.9, 1.0)))
        d_median, d_p90, d_max = map(float, np.quantile(turn, (0.5, 0.9, 1.0)))
        return cls(
            shrink=c,
            shrink_share=None if unshrunk is None or not delta_m else 1 - unshrunk / delta_m,
            delta_m_unshrunk=unshrunk,
            delta_m_floor=delta_m_floor,
            floor_ratio=float(np.mean(turn)) / delta_d_floor if delta_d_floor else None,
            delta_m_median=m_median,
            delta_m_p90=m_p90,
            delta_m_max=m_max,
            delta_d_median=d_median,
            delta_d_p90=d_p90,
            delta_d_max=d_max,
            base_norm=base_norm,
            delta_m_norm=float(np.linalg.norm(dm)),
        )


def uniform_shrink(m0: Vector, magnitude_change: Vector) -> float | None:
    """C of m ≈ (1 − c)·m₀ by least squares: c = −Σ m₀(m − m₀) / Σ m₀²; None for a matrix of zeros."""
    square = float(m0 @ m0)
    return 0.0 - float(m0 @ magnitude_change) / square if square else None


def delta_d_floor(ulp2: Vector, changes: VectorChanges) -> float:
    """ΔD that rounding the tuned tensor to its stored dtype makes by itself: ½ · mean of Σ ulp(w)²/12 / m².

    Rounding moves an element by an error that is even over ±ulp/2, of variance ulp²/12; a zero vector is not moved.
    """
    return 0.5 * float(np.mean(_over_m2(ulp2 / 12, changes)))


def delta_m_floor(weighted_ulp2: Vector, changes: VectorChanges) -> float:
    """ΔM that rounding makes by itself: √(2/π) · mean of σ, with σ² = Σ (w/m)²·ulp(w)²/12.

    To first order m moves by Σ (w/m)·e over the errors e of the elements: nearly normal, of mean 0 and variance σ²,
    and E|N(0, σ)| = σ·√(2/π).

    Parameters
    ----------
    weighted_ulp2
        Σ w²·ulp(w)² of each vector.
    changes
        For m.
    """
    return float(np.sqrt(2 / np.pi) * np.mean(np.sqrt(_over_m2(weighted_ulp2 / 12, changes))))


def _over_m2(values: Vector, changes: VectorChanges) -> Vector:
    """The values over m², and 0 for a vector of zeros."""
    m2 = (changes.magnitude + changes.magnitude_change) ** 2
    return np.divide(values, m2, out=np.zeros_like(m2), where=m2 != 0)

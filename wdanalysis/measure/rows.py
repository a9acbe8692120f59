"""From what a pass over the bytes found of each vector to a row of the table.

The row is ΔM and ΔD with what makes them readable, and from the same sums what the two alone cannot tell
(`MatrixDiagnostics`): uniform shrink, the floor that rounding sets, which vectors moved, what is radial in it, and what
an update without structure would have done.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from wdanalysis.checkpoints.model import StoredMatrix
from wdanalysis.checkpoints.names import Part
from wdanalysis.decomposition import Axis
from wdanalysis.kernels.chance import chance
from wdanalysis.kernels.sums import Vector, VectorChanges, dot
from wdanalysis.measure.plan import State
from wdanalysis.measure.rounding import NOT_ROUNDED, Grid, Rounding
from wdanalysis.measure.whole import WholeMatrix

UpdateKind = Literal["stored", "low-rank", "dora"]


@dataclass(frozen=True)
class Update:
    """What kind of update a matrix got.

    Attributes
    ----------
    kind
        ``stored``: two whole matrices; ``low-rank``: an adapter; ``dora``: an adapter with magnitudes of its own.
    rank
        r of an adapter's factors.
    alignment
        Of an adapter: the mean squared cosine between two vectors of the base.
    """

    kind: UpdateKind
    rank: int | None = None
    alignment: float = 0.0


STORED = Update("stored")


@dataclass(frozen=True)
class MatrixDiagnostics:
    """Further columns of the metrics table, for one matrix; None where there is no value.

    Attributes
    ----------
    shrink
        c of W ≈ (1 − c)·W₀ by least squares: c = −Σ m₀ρ / Σ m₀² = −⟨W₀, ΔW⟩ / ‖W₀‖²; for ``dora``, whose vectors get
        no longer by turning, c of m ≈ (1 − c)·m₀, with m − m₀ for ρ. Negative for growth.
    shrink_share
        The share of ΔM that the shrink explains: 1 − delta_m_unshrunk / ΔM.
    delta_m_unshrunk
        ΔM after taking it out: mean |m − (1 − c)·m₀|.
    delta_m_floor
        The ΔM that rounding the tuned tensor to its stored dtype makes by itself.
    floor_ratio
        ΔD over the ΔD that rounding makes by itself; None where it makes none (a base on the grid).
    delta_m_median, delta_m_p90, delta_m_max
        Quantiles of |m − m₀| over the vectors.
    delta_d_median, delta_d_p90, delta_d_max
        The same of 1 − cos.
    base_norm
        ‖W₀‖ (Frobenius): √Σ m₀².
    delta_m_norm
        √Σ (m − m₀)².
    update, rank
        See `Update`.
    mean_rho, mean_abs_rho
        Means of ρ = w₀·d/m₀, the radial part of m − m₀, and of |ρ|.
    centrifugal
        Mean m·(1 − cos), the rest: delta_m_signed = mean_rho + centrifugal.
    radial_share
        Σ ρ² / ‖ΔW‖².
    null_delta_m, null_delta_m_sd, null_delta_d, null_delta_d_sd
        ΔM and ΔD that an update without structure of the same norm (and rank) would be expected to make, and how far
        one such update lies from it (`wdanalysis.kernels.chance`). None for ``dora``, whose m is a parameter.
    mean_inverse_m0_squared
        Mean 1/m₀² over the vectors that are not zero.
    matrix_delta_m, matrix_delta_d, mean_angle
        See `WholeMatrix`.
    grid, delta_m_bias, delta_d_bias
        See `Rounding`.
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
    update: UpdateKind | None = None
    rank: int | None = None
    mean_rho: float | None = None
    mean_abs_rho: float | None = None
    centrifugal: float | None = None
    radial_share: float | None = None
    null_delta_m: float | None = None
    null_delta_m_sd: float | None = None
    null_delta_d: float | None = None
    null_delta_d_sd: float | None = None
    mean_inverse_m0_squared: float | None = None

    matrix_delta_m: float | None = None
    matrix_delta_d: float | None = None
    mean_angle: float | None = None
    grid: Grid | None = None
    delta_m_bias: float | None = None
    delta_d_bias: float | None = None

    @classmethod
    def of(
        cls,
        changes: VectorChanges,
        *,
        length: int,
        update: Update,
        rounding: Rounding,
    ) -> MatrixDiagnostics:
        """Take them of a matrix's vectors, all finite."""
        m0, dm, turn = changes.magnitude, changes.magnitude_change, changes.turn
        delta_m, base_norm = float(np.mean(np.abs(dm))), math.sqrt(dot(m0, m0))
        rho, update_norm2 = changes.radial, float(np.sum(changes.update_norm2))
        c = uniform_shrink(m0, dm if update.kind == "dora" else rho)
        unshrunk = None if c is None else float(np.mean(np.abs(dm + c * m0)))
        m_median, m_p90, m_max = map(float, np.quantile(np.abs(dm), (0.5, 0.9, 1.0)))
        d_median, d_p90, d_max = map(float, np.quantile(turn, (0.5, 0.9, 1.0)))
        return cls(
            shrink=c,
            shrink_share=None if unshrunk is None or not delta_m else 1 - unshrunk / delta_m,
            delta_m_unshrunk=unshrunk,
            delta_m_floor=rounding.delta_m_floor,
            floor_ratio=_ratio(float(np.mean(turn)), rounding.delta_d_floor or 0),
            delta_m_median=m_median,
            delta_m_p90=m_p90,
            delta_m_max=m_max,
            delta_d_median=d_median,
            delta_d_p90=d_p90,
            delta_d_max=d_max,
            base_norm=base_norm,
            delta_m_norm=math.sqrt(dot(dm, dm)),
            update=update.kind,
            rank=update.rank,
            mean_rho=float(np.mean(rho)),
            mean_abs_rho=float(np.mean(np.abs(rho))),
            centrifugal=float(np.mean(changes.centrifugal)),
            radial_share=_ratio(dot(rho, rho), update_norm2),
            **_null(changes.magnitude, length, update_norm2, update),
            mean_inverse_m0_squared=float(np.mean(m0[m0 > 0] ** -2.0)) if m0.any() else None,
            grid=rounding.grid,
            delta_m_bias=rounding.delta_m_bias,
            delta_d_bias=rounding.delta_d_bias,
            **vars(WholeMatrix.of(changes)),
        )


@dataclass(frozen=True, kw_only=True)
class _Change:
    """The first columns of the table."""

    method: str
    step: int | None
    layer: int | None
    module: str
    name: str
    axis: Axis
    vectors: int
    length: int
    delta_m: float | None = None
    delta_d: float | None = None
    delta_m_signed: float | None = None
    rel_delta_m: float | None = None
    update_norm: float | None = None
    rel_update_norm: float | None = None
    unchanged_fraction: float | None = None
    delta_d_floor: float | None = None
    base_dtype: str
    tuned_dtype: str
    zero_vectors: int | None = None


@dataclass(frozen=True)
class MatrixChange(MatrixDiagnostics, _Change):
    """What one tuned checkpoint did to one matrix: a row of the table.

    The fields are the columns of `metrics.csv`, which docs and `Comparison.metrics` describe. Metrics are None where an
    element is not finite, and the columns of `MatrixDiagnostics` where they were not asked for.

    Attributes
    ----------
    run
        Which of the method's runs; empty where it has one.
    expert
        Index of the expert among its layer's; None outside of experts.
    """

    run: str = ""
    expert: int | None = None


def row(
    matrix: StoredMatrix,
    part: Part,
    axis: Axis,
    state: State,
    changes: VectorChanges,
    *,
    update: Update,
    tuned_dtype: str,
    unchanged_fraction: float,
    diagnostics: bool,
    rounding: Rounding = NOT_ROUNDED,
) -> MatrixChange:
    """Sum up what a tuned checkpoint did to the vectors of one part of a matrix.

    Parameters
    ----------
    matrix, part, axis, state
        What was compared, along which axis, and with what.
    changes
        Of every vector of the part.
    update
        Of what kind the change is.
    tuned_dtype
        As the tuned weights or factors are stored.
    unchanged_fraction
        Share of the elements that are what they were.
    diagnostics
        Whether to fill the columns of `MatrixDiagnostics`.
    rounding
        What storing the tuned matrix did.
    """
    outputs, inputs = matrix.shape_of(part)
    m0, dm = changes.magnitude, changes.magnitude_change
    delta_m, delta_d = float(np.mean(np.abs(dm))), float(np.mean(changes.turn))
    base_norm, update_norm = math.sqrt(np.sum(m0**2)), math.sqrt(np.sum(changes.update_norm2))
    length = inputs if axis == "out" else outputs
    unmeasured = MatrixChange(
        method=state.method,
        step=state.step,
        layer=matrix.layer,
        module=part.module,
        name=matrix.tensor.name,
        axis=axis,
        vectors=outputs if axis == "out" else inputs,
        length=length,
        base_dtype=matrix.tensor.precision,
        tuned_dtype=tuned_dtype,
        run=state.run,
        expert=matrix.expert,
    )
    if not all(map(math.isfinite, (delta_m, delta_d, base_norm, update_norm))):
        return unmeasured
    further = (
        MatrixDiagnostics.of(changes, length=length, update=update, rounding=rounding)
        if diagnostics
        else MatrixDiagnostics()
    )
    return replace(
        unmeasured,
        delta_m=delta_m,
        delta_d=delta_d,
        delta_m_signed=float(np.mean(dm)),
        rel_delta_m=_ratio(delta_m, float(np.mean(m0))),
        update_norm=update_norm,
        rel_update_norm=_ratio(update_norm, base_norm),
        unchanged_fraction=unchanged_fraction,
        delta_d_floor=rounding.delta_d_floor,
        zero_vectors=int(np.sum((m0 == 0) | (m0 + dm == 0))),
        **vars(further),
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _null(magnitude: Vector, length: int, update_norm2: float, update: Update) -> dict[str, float]:
    """The null columns by name."""
    if update.kind == "dora":
        return {}
    expected = chance(magnitude, length, update_norm2, rank=update.rank, alignment=update.alignment)
    return {f"null_{name}": value for name, value in vars(expected).items()}


def uniform_shrink(m0: Vector, radial: Vector) -> float | None:
    """C of W ≈ (1 − c)·W₀ by least squares: c = −Σ m₀ρ / Σ m₀²; None for a matrix of zeros.

    By the magnitudes, m ≈ (1 − c)·m₀, a turn would pass for growth, as W₀ + ΔW gets longer by turning. DoRA's vectors
    do not, and their m is what decay acts on: there it is the other way round, and m − m₀ stands for ρ.
    """
    square = dot(m0, m0)
    return 0.0 - dot(m0, radial) / square if square else None

"""What tuning did to each single vector: what ΔM and ΔD are the means of, kept where it is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wdanalysis.kernels.sums import VectorChanges
from wdanalysis.measure.rows import MatrixChange


@dataclass(frozen=True)
class MatrixVectors:
    """The vectors of one row of the metrics table.

    Attributes
    ----------
    method, run, step, layer, module, name
        Of the row.
    rel_delta_m
        (m − m₀)/m₀ of each vector, with its sign; NaN for one that is zero in the base.
    delta_d
        1 − cos of each.
    """

    method: str
    run: str
    step: int | None
    layer: int | None
    module: str
    name: str
    rel_delta_m: NDArray[np.float32]
    delta_d: NDArray[np.float32]

    @classmethod
    def of(cls, row: MatrixChange, changes: VectorChanges) -> MatrixVectors:
        """Take them of what was measured."""
        m0, change = changes.magnitude, changes.magnitude_change
        relative = np.divide(change, m0, out=np.full_like(m0, np.nan), where=m0 > 0)
        return cls(
            row.method,
            row.run,
            row.step,
            row.layer,
            row.module,
            row.name,
            relative.astype(np.float32),
            changes.turn.astype(np.float32),
        )

"""Carry out a plan: stream the bytes of each job through the kernels, and get one row of the table for each pair.

A job's memory is a block of rows of the base and one of a tuned matrix for each thread, whatever the model's size.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wdanalysis.checkpoints.dtypes import widen
from wdanalysis.checkpoints.names import Part
from wdanalysis.checkpoints.tensors import LowRankUpdate, StoredTensor
from wdanalysis.decomposition import Axis
from wdanalysis.kernels import cpu
from wdanalysis.kernels.cores import available_cores
from wdanalysis.kernels.lowrank import Factors, LowRankSums, dora_update
from wdanalysis.kernels.sums import Vector, VectorChanges, vector_changes, vector_changes_of_dora
from wdanalysis.measure.diagnostics import MatrixDiagnostics, delta_d_floor, delta_m_floor
from wdanalysis.measure.plan import Job, Plan, State

DENSE_BLOCK_BYTES = 1 << 20
"""How much of a stored matrix a thread holds at once: base and tuned together fit in a second-level cache."""

ADAPTER_BLOCK_BYTES = 1 << 23
"""The same where adapters are measured: a product of matrices wants more rows."""

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and the bytes to read in all."""


@dataclass(frozen=True)
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
    delta_m: float | None
    delta_d: float | None
    delta_m_signed: float | None
    rel_delta_m: float | None
    update_norm: float | None
    rel_update_norm: float | None
    unchanged_fraction: float | None
    delta_d_floor: float | None
    base_dtype: str
    tuned_dtype: str
    zero_vectors: int | None


@dataclass(frozen=True)
class MatrixChange(MatrixDiagnostics, _Change):
    """What one tuned checkpoint did to one matrix: a row of the table.

    The fields are the columns of `metrics.csv`, which docs and `Comparison.metrics` describe. Metrics are None where an
    element is not finite, and the columns of `MatrixDiagnostics` where they were not asked for.
    """


def stream(
    plan: Plan,
    axis: Axis,
    *,
    diagnostics: bool = True,
    progress: Progress | None = None,
    threads: int | None = None,
) -> Iterator[list[MatrixChange]]:
    """Measure every job of a plan, in its order; what is yielded stays right if the caller stops.

    Parameters
    ----------
    plan
        From `wdanalysis.measure.plan.plan`.
    axis
        What a vector is.
    diagnostics
        Whether to fill the columns of `MatrixDiagnostics`.
    progress
        Told after every job.
    threads
        Jobs at once; by default one for each core that the process may use.

    Raises
    ------
    CheckpointError
        A file ended early or could not be read.
    """
    threads = threads or available_cores()
    done, total = 0, plan.nbytes
    if progress:
        progress(0, total)
    with ThreadPoolExecutor(threads, thread_name_prefix="wd-analyze") as pool:
        jobs = iter(plan.jobs)
        running: deque[tuple[Job, Future[list[MatrixChange]]]] = deque()
        try:
            while True:
                while len(running) < 4 * threads and (job := next(jobs, None)) is not None:
                    running.append((job, pool.submit(measure, job, axis, diagnostics=diagnostics)))
                if not running:
                    return
                job, future = running.popleft()
                rows = future.result()
                done += job.nbytes
                if progress:
                    progress(done, total)
                yield rows
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def measure(job: Job, axis: Axis, *, diagnostics: bool = True) -> list[MatrixChange]:
    """Measure one matrix of the base against everything that the job compares with it."""
    low_rank = _LowRankPass(job, axis, diagnostics=diagnostics)
    dense = [
        [_DenseSums.zeros(_vectors(job, part, axis), diagnostics=diagnostics) for part in job.matrix.parts]
        for _ in job.dense
    ]
    vectors_are_rows = job.vectors_are_rows(axis)
    tuned_buffer = np.empty(0, np.uint8)
    for start, stop, base in _blocks(job):
        for (_, tensor), sums in zip(job.dense, dense, strict=True):
            nbytes = (stop - start) * tensor.row_length * tensor.itemsize
            tuned_buffer = tuned_buffer if tuned_buffer.size >= nbytes else np.empty(nbytes, np.uint8)
            tuned = tensor.read_rows(start, stop, tuned_buffer)
            for tile in job.tiles(start, stop):
                cpu.add_dense(
                    base[tile.rows],
                    tuned[tile.rows],
                    tile.columns,
                    sums[tile.part].sums,
                    tile.vectors(axis).start,
                    vectors_are_rows=vectors_are_rows,
                    weighted_ulp2=sums[tile.part].weighted_ulp2,
                )
        low_rank.add(start, stop, base)
    rows = [
        _dense_row(job, part, axis, state, tensor, part_sums)
        for (state, tensor), sums in zip(job.dense, dense, strict=True)
        for part, part_sums in zip(job.matrix.parts, sums, strict=True)
    ]
    return rows + low_rank.rows()


@dataclass(frozen=True)
class _DenseSums:
    """The sums of the vectors of one part of a stored tuned matrix, as `cpu.add_dense` adds to them."""

    sums: NDArray[np.float64]
    weighted_ulp2: Vector | None

    @classmethod
    def zeros(cls, vectors: int, *, diagnostics: bool) -> _DenseSums:
        return cls(np.zeros((cpu.SUMS, vectors)), np.zeros(vectors) if diagnostics else None)


class _LowRankPass:
    """The adapters of one job: their factors, their share of the pass over the base, and their rows of the table."""

    def __init__(self, job: Job, axis: Axis, *, diagnostics: bool) -> None:
        self._job, self._axis, self._diagnostics = job, axis, diagnostics
        self._loaded = [(state, update, load_update(update)) for state, update in job.updates]
        # DoRA rescales output vectors: measured along the inputs it first needs their sums, then a pass of its own.
        self._second_pass = [axis == "in" and update.magnitude is not None for _, update in job.updates]
        self._first_axis: list[Axis] = ["out" if second else axis for second in self._second_pass]
        self._sums = {
            (index, first): LowRankSums(updates, first)
            for index, part in enumerate(job.matrix.parts)
            for first in sorted(set(self._first_axis))
            if (updates := [factors for factors, _ in self._of(part, first)])
        }

    def _of(self, part: Part, axis: Axis) -> list[tuple[Factors, Vector | None]]:
        outputs = self._job.outputs_of(part)
        return [
            (factors.of_outputs(outputs), None if magnitude is None else magnitude[outputs])
            for (_, _, (factors, magnitude)), first in zip(self._loaded, self._first_axis, strict=True)
            if first == axis
        ]

    def add(self, start: int, stop: int, base: NDArray[Any]) -> None:
        if not self._loaded:
            return
        wide = widen(base)
        for tile in self._job.tiles(start, stop):
            for axis in ("out", "in"):
                if sums := self._sums.get((tile.part, axis)):
                    block = wide[tile.rows, tile.columns]
                    block = block if self._job.vectors_are_rows(axis) else block.T
                    sums.add(block, tile.vectors(axis), tile.length(axis))

    def rows(self) -> list[MatrixChange]:
        """The table's rows of every update, once the base has passed."""
        parts = self._job.matrix.parts
        changes: dict[tuple[int, int], VectorChanges] = {}
        rescaled: dict[tuple[int, int], _Rescaled] = {}
        for (part, axis), low_rank in self._sums.items():
            members = [index for index, first in enumerate(self._first_axis) if first == axis]
            for index, sums, (factors, magnitude) in zip(
                members, low_rank.sums(), self._of(parts[part], axis), strict=True
            ):
                if magnitude is None:
                    changes[index, part] = vector_changes(*sums)
                elif self._second_pass[index]:
                    rescaled[index, part] = _Rescaled.of(sums, factors, magnitude)
                else:
                    changes[index, part] = vector_changes_of_dora(*sums, magnitude)
        changes |= self._rescaled_along_inputs(rescaled)
        return [
            _row(
                self._job,
                parts[part],
                self._axis,
                state,
                changes[index, part],
                update.A.dtype,
                _unchanged_vectors(changes[index, part]),
                delta_d_floor=None,
                diagnostics=MatrixDiagnostics.of(changes[index, part], delta_m_floor=None, delta_d_floor=None)
                if self._diagnostics
                else MatrixDiagnostics(),
            )
            for index, (state, update, _) in enumerate(self._loaded)
            for part in range(len(parts))
        ]

    def _rescaled_along_inputs(
        self, rescaled: Mapping[tuple[int, int], _Rescaled]
    ) -> dict[tuple[int, int], VectorChanges]:
        """DoRA's changes along the inputs: one more pass over the base for all updates."""
        if not rescaled:
            return {}
        for start, stop, base in _blocks(self._job):
            wide = widen(base)
            for tile in self._job.tiles(start, stop):
                w0 = wide[tile.rows, tile.columns]
                w0 = w0.T if self._job.matrix.in_by_out else w0
                for (_, part), update in rescaled.items():
                    if part == tile.part:
                        update.add(w0, tile.outputs, tile.inputs)
        return {key: vector_changes(*update.sums) for key, update in rescaled.items()}


@dataclass(frozen=True)
class _Rescaled:
    """A DoRA update whose sums along the inputs are being taken."""

    factors: Factors
    scale_change: Vector
    sums: NDArray[np.float64]

    @classmethod
    def of(cls, output_sums: tuple[Vector, Vector, Vector], factors: Factors, magnitude: Vector) -> _Rescaled:
        a, p, q = output_sums
        v = vector_changes(a, p, q)
        norm = v.magnitude + v.magnitude_change
        scale_change = np.divide(magnitude - norm, norm, out=-np.ones_like(norm), where=norm != 0)
        return cls(factors, scale_change, np.zeros((3, factors.A.shape[1])))

    def add(self, w0: NDArray[np.float64], outputs: slice, inputs: slice) -> None:
        d = dora_update(w0, self.factors, self.scale_change, outputs, inputs)
        for row, (x, y) in enumerate(((w0, w0), (w0, d), (d, d))):
            self.sums[row, inputs] += np.einsum("ij,ij->j", x, y)


def load_update(update: LowRankUpdate) -> tuple[Factors, Vector | None]:
    """An adapter's factors as matrices (a convolution's flattened) and DoRA's magnitude as a vector."""
    A = widen(update.A.read()).reshape(update.rank, -1)
    B = widen(update.B.read()).reshape(-1, update.rank)
    magnitude = None if update.magnitude is None else widen(update.magnitude.read()).ravel()
    return Factors(B, A, update.scale), magnitude


def _blocks(job: Job) -> Iterator[tuple[int, int, NDArray[Any]]]:
    """The base's stored rows, block by block; each is valid until the next."""
    row_bytes = max(job.base.row_length * job.base.itemsize, 1)
    rows = max(1, (ADAPTER_BLOCK_BYTES if job.updates else DENSE_BLOCK_BYTES) // row_bytes)
    buffer = np.empty(min(rows, job.rows) * row_bytes, np.uint8)
    for start in range(0, job.rows, rows):
        stop = min(start + rows, job.rows)
        yield start, stop, job.base.read_rows(start, stop, buffer)


def _vectors(job: Job, part: Part, axis: Axis) -> int:
    outputs, inputs = job.shape_of(part)
    return outputs if axis == "out" else inputs


def _dense_row(
    job: Job, part: Part, axis: Axis, state: State, tensor: StoredTensor, dense: _DenseSums
) -> MatrixChange:
    sums = dense.sums
    changes = vector_changes(sums[cpu.A], sums[cpu.P], sums[cpu.Q])
    outputs, inputs = job.shape_of(part)
    unchanged = float(sums[cpu.UNCHANGED].sum()) / (outputs * inputs)
    d_floor = delta_d_floor(sums[cpu.ULP2], changes)
    diagnostics = MatrixDiagnostics()
    if dense.weighted_ulp2 is not None:
        m_floor = delta_m_floor(dense.weighted_ulp2, changes)
        diagnostics = MatrixDiagnostics.of(changes, delta_m_floor=m_floor, delta_d_floor=d_floor)
    return _row(
        job,
        part,
        axis,
        state,
        changes,
        tensor.dtype,
        unchanged,
        delta_d_floor=d_floor,
        diagnostics=diagnostics,
    )


def _unchanged_vectors(changes: VectorChanges) -> float:
    """Share of the elements in vectors without any update: an adapter moves the others whole."""
    return float(np.mean(changes.update_norm2 == 0))


def _row(
    job: Job,
    part: Part,
    axis: Axis,
    state: State,
    changes: VectorChanges,
    tuned_dtype: str,
    unchanged: float,
    *,
    delta_d_floor: float | None,
    diagnostics: MatrixDiagnostics,
) -> MatrixChange:
    outputs, inputs = job.shape_of(part)
    m0, dm = changes.magnitude, changes.magnitude_change
    delta_m, delta_d = float(np.mean(np.abs(dm))), float(np.mean(changes.turn))
    base_norm, update_norm = math.sqrt(np.sum(m0**2)), math.sqrt(np.sum(changes.update_norm2))
    finite = all(map(math.isfinite, (delta_m, delta_d, base_norm, update_norm)))

    def metric(value: float | None) -> float | None:
        return value if finite else None

    return MatrixChange(
        method=state.method,
        step=state.step,
        layer=job.matrix.layer,
        module=part.module,
        name=job.base.name,
        axis=axis,
        vectors=outputs if axis == "out" else inputs,
        length=inputs if axis == "out" else outputs,
        delta_m=metric(delta_m),
        delta_d=metric(delta_d),
        delta_m_signed=metric(float(np.mean(dm))),
        rel_delta_m=metric(_ratio(delta_m, float(np.mean(m0)))),
        update_norm=metric(update_norm),
        rel_update_norm=metric(_ratio(update_norm, base_norm)),
        unchanged_fraction=metric(unchanged),
        delta_d_floor=metric(delta_d_floor),
        base_dtype=job.base.dtype,
        tuned_dtype=tuned_dtype,
        zero_vectors=int(np.sum((m0 == 0) | (m0 + dm == 0))) if finite else None,
        **(asdict(diagnostics) if finite else {}),
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None

"""Carry out a plan: stream the bytes of each job through the kernels, and get one row of the table for each pair.

A job's memory is a block of rows of the base and one of a tuned matrix for each thread, whatever the model's size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from wdanalysis.checkpoints.dtypes import widen
from wdanalysis.checkpoints.model import StoredMatrix
from wdanalysis.checkpoints.names import Part
from wdanalysis.checkpoints.storage import Progress
from wdanalysis.checkpoints.tensors import LowRankUpdate, StoredTensor
from wdanalysis.decomposition import Axis
from wdanalysis.kernels import cpu
from wdanalysis.kernels.chance import mean_squared_cosine
from wdanalysis.kernels.cores import available_cores
from wdanalysis.kernels.lowrank import Array, Factors, LowRankSums
from wdanalysis.kernels.rescale import rescaled_update, rescaling_less_one, vector_changes_of_dora
from wdanalysis.kernels.sums import Vector, VectorChanges, vector_changes
from wdanalysis.measure.plan import Job, Plan, State, tiles
from wdanalysis.measure.rounding import (
    NOT_ROUNDED,
    BaseSample,
    BaseSamples,
    Rounding,
    grid_of,
    holds_all_of,
    off_grid,
    on_grid,
)
from wdanalysis.measure.rows import STORED, MatrixChange, Update, row
from wdanalysis.measure.vectors import MatrixVectors

DENSE_BLOCK_BYTES = 1 << 20
"""How much of a stored matrix a thread holds at once: base and tuned together fit in a second-level cache."""

ADAPTER_BLOCK_BYTES = 1 << 23
"""The same where adapters are measured: a product of matrices wants more rows."""

Measured: TypeAlias = tuple[MatrixChange, VectorChanges]
"""A row of the table, and what it sums up."""


def stream(
    plan: Plan,
    axis: Axis,
    *,
    diagnostics: bool = True,
    keep_vectors: Callable[[MatrixVectors], object] | None = None,
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
    keep_vectors
        Given the vectors of every row that has values, before the row is yielded.
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
        running: deque[tuple[Job, Future[list[Measured]]]] = deque()
        try:
            while True:
                while len(running) < 4 * threads and (job := next(jobs, None)) is not None:
                    running.append((job, pool.submit(_measure, job, axis, diagnostics=diagnostics)))
                if not running:
                    return
                job, future = running.popleft()
                measured = future.result()
                for one, changes in measured:
                    if keep_vectors and one.delta_d is not None:
                        keep_vectors(MatrixVectors.of(one, changes))
                done += job.nbytes
                if progress:
                    progress(done, total)
                yield [one for one, _ in measured]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _measure(job: Job, axis: Axis, *, diagnostics: bool) -> list[Measured]:
    """Measure one matrix of the base against everything that the job compares with it."""
    matrix = job.matrix
    dense = [_DensePass(matrix, state, tensor, axis, diagnostics=diagnostics) for state, tensor in job.dense]
    low_rank = _LowRankPass(job, axis) if job.updates else None
    samples = BaseSamples(matrix, axis, wanted=any(tuned.wants_sample for tuned in dense))
    tuned_buffer = np.empty(0, np.uint8)
    for start, stop, base in _blocks(job):
        samples.add(start, stop, base)
        for tuned in dense:
            tuned_buffer = tuned.add(start, stop, base, tuned_buffer)
        if low_rank:
            low_rank.add(start, stop, widen(base))
    rows = [of_part for tuned in dense for of_part in tuned.rows(samples)]
    return rows + low_rank.rows(diagnostics=diagnostics) if low_rank else rows


class _DensePass:
    """A stored tuned matrix: the sums of the vectors of each part, as `cpu.add_dense` adds to them."""

    def __init__(
        self, matrix: StoredMatrix, state: State, tensor: StoredTensor, axis: Axis, *, diagnostics: bool
    ) -> None:
        self._matrix, self._state, self._tensor, self._axis = matrix, state, tensor, axis
        self._diagnostics = diagnostics
        self._is_on_grid = holds_all_of(tensor.dtype, matrix.dtype)
        self.wants_sample = diagnostics or not self._is_on_grid
        weighted = diagnostics and not self._is_on_grid
        vectors = [_vectors(matrix, part, axis) for part in matrix.parts]
        self._sums = [np.zeros((cpu.SUMS, count)) for count in vectors]
        self._weighted_ulp2 = [np.zeros(count) if weighted else None for count in vectors]

    def add(self, start: int, stop: int, base: NDArray[Any], buffer: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Add stored rows `start:stop`; the buffer that they were read into is returned for the next ones."""
        nbytes = (stop - start) * self._tensor.row_length * self._tensor.itemsize
        buffer = buffer if buffer.size >= nbytes else np.empty(nbytes, np.uint8)
        tuned = self._tensor.read_rows(start, stop, buffer)
        for tile in tiles(self._matrix, self._matrix.parts, start, stop):
            cpu.add_dense(
                base[tile.rows],
                tuned[tile.rows],
                tile.columns,
                self._sums[tile.part],
                tile.vectors(self._axis).start,
                vectors_are_rows=self._matrix.vectors_are_rows(self._axis),
                weighted_ulp2=self._weighted_ulp2[tile.part],
            )
        return buffer

    def rows(self, samples: BaseSamples) -> Iterator[Measured]:
        """The table's row of every part, and its vectors, once the base has passed."""
        for index, (part, sums) in enumerate(zip(self._matrix.parts, self._sums, strict=True)):
            changes = vector_changes(sums[cpu.A], sums[cpu.P], sums[cpu.Q])
            outputs, inputs = self._matrix.shape_of(part)
            of_part = row(
                self._matrix,
                part,
                self._axis,
                self._state,
                changes,
                update=STORED,
                tuned_dtype=self._tensor.precision,
                unchanged_fraction=float(sums[cpu.UNCHANGED].sum()) / (outputs * inputs),
                diagnostics=self._diagnostics,
                rounding=self._rounding(index, changes, samples.of(index)),
            )
            yield of_part, changes

    def _rounding(self, part: int, changes: VectorChanges, sample: BaseSample | None) -> Rounding:
        if self._tensor.stored_as:  # calculated, and not rounded since
            return NOT_ROUNDED
        outputs, inputs = self._matrix.shape_of(self._matrix.parts[part])
        length = inputs if self._axis == "out" else outputs
        dtype = self._tensor.dtype
        grid = "on" if self._is_on_grid or not sample else grid_of(sample.values, dtype)
        if grid == "off":
            return off_grid(self._sums[part][cpu.ULP2], self._weighted_ulp2[part], changes, length)
        is_needed = self._diagnostics or grid == "mixed"
        return on_grid(sample if is_needed else None, dtype, changes, length, grid=grid)


@dataclass(frozen=True)
class _Place:
    """Where an update's sums are taken: along which axis, and of which of the job's parts (the last is the whole)."""

    part: int
    axis: Axis


class _LowRankPass:
    """The adapters of one job: their factors, their share of the pass over the base, and their rows of the table.

    DoRA rescales the vectors of one axis, those of the whole matrix. Measured along that axis, its sums and its
    magnitude give the change. Along the other, or for some of the outputs where magnitudes belong to inputs, the sums
    give c = m/‖v‖, and the rescaled rows need a pass of their own.
    """

    def __init__(self, job: Job, axis: Axis) -> None:
        self._job, self._axis = job, axis
        whole = Part("", ((0, job.matrix.outputs),))
        self._parts = (*job.matrix.parts, whole)
        self._updates = [load_update(update) for _, update in job.updates]
        self._members: dict[_Place, list[int]] = {}
        for part in range(len(job.matrix.parts)):
            for index, factors in enumerate(self._updates):
                members = self._members.setdefault(self._place(part, factors), [])
                if index not in members:
                    members.append(index)
        self._sums = {
            place: LowRankSums([self._of(place.part, index) for index in members], place.axis)
            for place, members in self._members.items()
        }

    def _place(self, part: int, factors: Factors) -> _Place:
        """Where the sums are taken from which the change of a part is found."""
        if factors.magnitude is None:
            return _Place(part, self._axis)
        is_share = self._parts[part].size < self._job.matrix.outputs
        needs_whole = is_share and factors.magnitude_axis == "in"
        return _Place(len(self._parts) - 1 if needs_whole else part, factors.magnitude_axis)

    def _of(self, part: int, index: int) -> Factors:
        return self._updates[index].of_outputs(outputs_of(self._parts[part]))

    def add(self, start: int, stop: int, wide: Array) -> None:
        """Add stored rows `start:stop` of the base, in float64."""
        for tile in tiles(self._job.matrix, self._parts, start, stop):
            for axis in ("out", "in"):
                if sums := self._sums.get(_Place(tile.part, axis)):
                    block = wide[tile.rows, tile.columns]
                    block = block if self._job.matrix.vectors_are_rows(axis) else block.T
                    sums.add(block, tile.vectors(axis), tile.length(axis))

    def rows(self, *, diagnostics: bool) -> list[Measured]:
        """The table's row of every update, and its vectors, once the base has passed."""
        changes = self._changes()
        alignments = {
            place: mean_squared_cosine(sums.sample) if diagnostics else 0.0
            for place, sums in self._sums.items()
        }
        return [
            (
                row(
                    self._job.matrix,
                    part,
                    self._axis,
                    state,
                    changes[index, at],
                    update=_kind(self._updates[index], alignments[self._place(at, self._updates[index])]),
                    tuned_dtype=update.A.dtype,
                    # an adapter moves a vector whole, or not at all
                    unchanged_fraction=float(np.mean(changes[index, at].update_norm2 == 0)),
                    diagnostics=diagnostics,
                ),
                changes[index, at],
            )
            for index, (state, update) in enumerate(self._job.updates)
            for at, part in enumerate(self._job.matrix.parts)
        ]

    def _changes(self) -> dict[tuple[int, int], VectorChanges]:
        """What each update did to the vectors of each part."""
        sums = {
            (place, index): of_index
            for place, low_rank in self._sums.items()
            for index, of_index in zip(self._members[place], low_rank.sums(), strict=True)
        }
        changes: dict[tuple[int, int], VectorChanges] = {}
        rescaled: dict[tuple[int, int], _Rescaled] = {}
        for index in range(len(self._updates)):
            for part in range(len(self._job.matrix.parts)):
                factors = self._of(part, index)
                place = self._place(part, factors)
                a, p, q = sums[place, index]
                if factors.magnitude is None:
                    changes[index, part] = vector_changes(a, p, q)
                elif place == _Place(part, self._axis):
                    changes[index, part] = vector_changes_of_dora(a, p, q, factors.magnitude)
                else:
                    v = vector_changes(a, p, q)
                    less_one = rescaling_less_one(factors.magnitude, v.magnitude + v.magnitude_change)
                    vectors = _vectors(self._job.matrix, self._parts[part], self._axis)
                    rescaled[index, part] = _Rescaled(factors, less_one, self._axis, np.zeros((3, vectors)))
        if rescaled:
            self._add_rescaled(rescaled)
        return changes | {key: vector_changes(*update.sums) for key, update in rescaled.items()}

    def _add_rescaled(self, rescaled: dict[tuple[int, int], _Rescaled]) -> None:
        """One more pass over the base for all updates whose rows have to be built."""
        matrix = self._job.matrix
        for start, stop, base in _blocks(self._job):
            wide = widen(base)
            for tile in tiles(matrix, matrix.parts, start, stop):
                w0 = wide[tile.rows, tile.columns]
                w0 = w0.T if matrix.in_by_out else w0
                for (_, part), update in rescaled.items():
                    if part == tile.part:
                        update.add(w0, tile.outputs, tile.inputs)


@dataclass(frozen=True)
class _Rescaled:
    """A DoRA update whose sums are being taken along another axis than that of its magnitudes."""

    factors: Factors
    less_one: Vector
    axis: Axis
    sums: Array

    def add(self, w0: Array, outputs: slice, inputs: slice) -> None:
        """Add a block of the base, out × in."""
        d = rescaled_update(w0, self.factors, self.less_one, outputs, inputs)
        vectors, of_vector = (outputs, "ij,ij->i") if self.axis == "out" else (inputs, "ij,ij->j")
        for row_of_sums, (x, y) in zip(self.sums, ((w0, w0), (w0, d), (d, d)), strict=True):
            row_of_sums[vectors] += np.einsum(of_vector, x, y)


def load_update(update: LowRankUpdate) -> Factors:
    """An adapter's factors as matrices (a convolution's flattened), with DoRA's magnitude as a vector."""
    return Factors(
        B=widen(update.B.read()).reshape(-1, update.rank),
        A=widen(update.A.read()).reshape(update.rank, -1),
        scale=update.scale,
        magnitude=None if update.magnitude is None else widen(update.magnitude.read()).ravel(),
        magnitude_axis=update.magnitude_axis,
    )


def _kind(factors: Factors, alignment: float) -> Update:
    return Update("low-rank" if factors.magnitude is None else "dora", factors.A.shape[0], alignment)


def outputs_of(part: Part) -> NDArray[np.intp]:
    """The output features of a part, in its order."""
    return np.concatenate([np.arange(start, stop) for start, stop in part.runs])


def _vectors(matrix: StoredMatrix, part: Part, axis: Axis) -> int:
    outputs, inputs = matrix.shape_of(part)
    return outputs if axis == "out" else inputs


def _blocks(job: Job) -> Iterator[tuple[int, int, NDArray[Any]]]:
    """The base's stored rows, block by block; each is valid until the next."""
    row_bytes = max(job.matrix.row_length * job.base.itemsize, 1)
    rows = max(1, (ADAPTER_BLOCK_BYTES if job.updates else DENSE_BLOCK_BYTES) // row_bytes)
    buffer = np.empty(min(rows, job.matrix.rows) * row_bytes, np.uint8)
    for start in range(0, job.matrix.rows, rows):
        stop = min(start + rows, job.matrix.rows)
        yield start, stop, job.base.read_rows(start, stop, buffer)

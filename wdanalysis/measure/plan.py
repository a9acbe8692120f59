"""Pair the base with every tuned checkpoint and plan which bytes to read: one job for each stored matrix of the base.

Everything here comes from file headers. A job names one matrix of the base and all that is to be compared with it, so
that its bytes are read once for every step of every method.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from wdanalysis.checkpoints.model import Model, StoredMatrix, describe, times
from wdanalysis.checkpoints.names import ATTENTION_ROLES, Matrix, ModuleSelection, Part
from wdanalysis.checkpoints.tensors import Checkpoint, LowRankUpdate, Series, StoredTensor
from wdanalysis.decomposition import Axis
from wdanalysis.errors import CheckpointError, ComparisonError

_VOCABULARY_ROLES = {"embed", "lm_head"}


@dataclass(frozen=True)
class State:
    """One tuned checkpoint of one method."""

    method: str
    checkpoint: Checkpoint

    @property
    def step(self) -> int | None:
        """Training step, where it is known."""
        return self.checkpoint.step

    @property
    def run(self) -> str:
        """Which of the method's runs; empty where it has one."""
        return self.checkpoint.run

    @property
    def training(self) -> tuple[str, str]:
        """Method and run: what its steps are steps of."""
        return self.method, self.run


@dataclass(frozen=True)
class Skipped:
    """One matrix that is in a checkpoint and not in the table, and why."""

    method: str
    step: int | None
    name: str
    reason: str
    run: str = ""


@dataclass(frozen=True)
class Tile:
    """Where a share of a block of stored rows lies, in the block and in its part's out × in matrix."""

    part: int
    rows: slice
    columns: slice
    outputs: slice
    inputs: slice

    def vectors(self, axis: Axis) -> slice:
        """The vectors of the part that it holds elements of."""
        return self.outputs if axis == "out" else self.inputs

    def length(self, axis: Axis) -> slice:
        """The elements of those vectors that it holds."""
        return self.inputs if axis == "out" else self.outputs


def tiles(matrix: Matrix, parts: Sequence[Part], start: int, stop: int) -> Iterator[Tile]:
    """What stored rows `start:stop` of a matrix bring to each of its parts."""
    for index, part in enumerate(parts):
        output = 0
        for first, last in part.runs:
            if matrix.in_by_out:
                outputs = slice(output, output + last - first)
                yield Tile(index, slice(0, stop - start), slice(first, last), outputs, slice(start, stop))
            elif first < stop and start < last:
                low, high = max(first, start), min(last, stop)
                rows, columns = slice(low - start, high - start), slice(0, matrix.row_length)
                outputs = slice(output + low - first, output + high - first)
                yield Tile(index, rows, columns, outputs, columns)
            output += last - first


@dataclass(frozen=True)
class Job:
    """One stored matrix of the base, and everything to compare with it."""

    matrix: StoredMatrix
    dense: tuple[tuple[State, StoredTensor], ...] = ()
    updates: tuple[tuple[State, LowRankUpdate], ...] = ()

    @property
    def base(self) -> StoredTensor:
        """Where the matrix is stored."""
        return self.matrix.tensor

    @property
    def nbytes(self) -> int:
        """Bytes to read, without the adapters' own few."""
        return self.matrix.nbytes + sum(
            self.matrix.rows * tensor.row_length * tensor.itemsize for _, tensor in self.dense
        )


@dataclass(frozen=True)
class Plan:
    """All jobs of a run, in the order in which the base's files hold them, and what is left out."""

    jobs: tuple[Job, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    modules_chosen: str
    """``given``, ``attention`` (recognised projections) or ``all`` (none was recognised)."""

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(job.nbytes for job in self.jobs)


def plan(
    base: Checkpoint,
    methods: Mapping[str, Series],
    *,
    modules: Sequence[str] | str | None = None,
    layers: Iterable[int] | None = None,
) -> Plan:
    """Decide what is compared with what.

    Parameters
    ----------
    base
        A whole model, not an adapter.
    methods
        Each method's checkpoints.
    modules
        As in `compare`; None means the attention projections, or every matrix where none is recognised.
    layers
        Layer indices to keep; None keeps all, and matrices outside the layers too.

    Raises
    ------
    ComparisonError
        The base is an adapter; a checkpoint shares no name with it; a matrix has another shape; nothing is selected.
    """
    if base.is_adapter:
        raise ComparisonError(f"{base.path} is an adapter; BASE must be the model that it was trained on")
    states = [
        State(method, checkpoint) for method, series in methods.items() for checkpoint in series.checkpoints
    ]
    # A base file without its config borrows that of a tuned model.
    model_configs = (state.checkpoint.config for state in states if not state.checkpoint.is_adapter)
    model = describe(base, next((config for config in model_configs if config), None))
    choice = _Choice.of(model, modules, layers)
    pairing = _Pairing(model, choice)
    for state in states:
        pairing.pair_tensors(state)
        pairing.pair_updates(state)
    if not pairing.jobs:
        raise _nothing_selected(base, modules, layers, choice, pairing.skipped)
    notes = dict.fromkeys([*pairing.notes, *choice.idle(model)])
    return Plan(pairing.in_order(), tuple(pairing.skipped), tuple(notes), choice.modules_chosen)


@dataclass(frozen=True)
class _Choice:
    """Which matrices of the base are to be compared; `matrices` has them by their stored names."""

    selection: ModuleSelection | None
    layers: frozenset[int] | None
    modules_chosen: str
    matrices: Mapping[str, StoredMatrix] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Model, modules: Sequence[str] | str | None, layers: Iterable[int] | None) -> _Choice:
        kept_layers = None if layers is None else frozenset(layers)
        if modules is not None:
            return cls(ModuleSelection.parse(modules), kept_layers, "given")._among(model)
        attention = ModuleSelection.parse(sorted(ATTENTION_ROLES))
        choice = cls(attention, kept_layers, "attention")._among(model)
        return choice if choice.matrices else cls(None, kept_layers, "all")._among(model)

    def _among(self, model: Model) -> _Choice:
        found = {name: self.of_matrix(matrix) for name, matrix in model.matrices.items()}
        return replace(self, matrices={name: chosen for name, chosen in found.items() if chosen is not None})

    def of_matrix(self, matrix: StoredMatrix | None) -> StoredMatrix | None:
        """The selected parts of a matrix; None where nothing of it is selected."""
        if matrix is None or (self.layers is not None and matrix.layer not in self.layers):
            return None
        if self.selection is None:
            return matrix
        parts = tuple(part for part in matrix.parts if self.selection.matches(part.module, matrix.name))
        return replace(matrix, parts=parts) if parts else None

    def of_stacks(self, names: Iterable[str]) -> list[str]:
        """Those of the 3-D tensors of fused experts that the selection means."""
        selection = self.selection
        return [n for n in names if selection is None or selection.matches(n.split(".")[-1], n)]

    def idle(self, model: Model) -> list[str]:
        """Sentences on what of the selection means nothing in the base."""
        notes = []
        if self.selection is not None and self.modules_chosen == "given":
            places = [(part.module, name) for name, matrix in model.matrices.items() for part in matrix.parts]
            notes = [
                f"modules: {word!r} selects no matrix of BASE"
                for word, alone in self.selection.words()
                if not any(alone.matches(module, name) for module, name in places)
            ]
        present = {matrix.layer for matrix in self.matrices.values()}
        if absent := sorted((self.layers or set()) - present):
            notes.append(f"no selected matrix is in layer {', '.join(map(str, absent))}")
        return notes


class _Pairing:
    """The jobs so far: one for each stored matrix, way to read it (a tied one may have two) and number of rows."""

    def __init__(self, model: Model, choice: _Choice) -> None:
        self._model, self._choice = model, choice
        self.jobs: dict[tuple[str, bool, int], Job] = {}
        self.skipped: list[Skipped] = []
        self.notes: list[str] = []
        for name, matrix in choice.matrices.items():
            if not matrix.tensor.is_float:
                self._skip(None, name, f"is stored as {matrix.dtype}, not as floats")
            if matrix.note:
                self.notes.append(f"{name}: {matrix.note}")
        for name in choice.of_stacks(model.expert_stacks):
            self._skip(None, name, "is a stack of experts' matrices, which are not compared")

    def in_order(self) -> tuple[Job, ...]:
        """All jobs, in the order in which the base's files hold their matrices."""
        place = {name: index for index, name in enumerate(self._model.checkpoint.tensors)}
        return tuple(sorted(self.jobs.values(), key=lambda job: place[job.base.name]))

    def pair_tensors(self, state: State) -> None:
        """Pair the whole tensors of a tuned checkpoint with the chosen matrices."""
        base, tuned = self._model.checkpoint, state.checkpoint
        if tuned.is_adapter and not tuned.tensors:
            return
        try:
            matching = self._model.match(tuned)
        except CheckpointError as error:
            raise ComparisonError(f"{tuned.path} cannot be matched with {base.path}: {error}") from error
        if not matching.pairs and not tuned.is_adapter:
            raise ComparisonError(
                f"no tensor of {tuned.path} has the name of one in {base.path} "
                f"({_example(tuned.tensors)} there, {_example(base.tensors)} here): are they of the same model?"
            )
        for name, tuned_name in matching.pairs.items():
            matrix = self._choice.matrices.get(name)
            if matrix is not None and matrix.tensor.is_float:
                self._pair(state, matrix, tuned.tensors[tuned_name])
        if not tuned.is_adapter:
            for name in matching.only_base:
                if name in self._choice.matrices:
                    self._skip(state, name, "is in BASE, but not in this checkpoint")
        for name in matching.only_tuned:
            if self._choice.of_matrix(self._model.matrix_of(tuned.tensors[name], name)) is not None:
                self._skip(state, name, "is in this checkpoint, but not in BASE")

    def pair_updates(self, state: State) -> None:
        """Pair an adapter's updates with the chosen matrices."""
        base, updates, formulas = (
            self._model.checkpoint,
            state.checkpoint.updates,
            state.checkpoint.formulas,
        )
        targets = [(update, self._model.target(update)) for update in updates]
        formulas_of = [(update, self._model.target_of_formula(update)) for update in formulas]
        modules = [update.module for update in updates] + [formula.module for formula in formulas]
        if modules and not any(target for _, target in (*targets, *formulas_of)):
            raise ComparisonError(
                f"none of the {len(modules)} modules that {state.checkpoint.path} adapts (such as "
                f"{modules[0]}) is in {base.path} ({_example(base.tensors)} there): is it the "
                "model that the adapter was trained on?"
            )
        for update, target in targets:
            if target is None:
                self._skip(state, update.module, "is adapted, but not in BASE")
            elif self._choice.of_matrix(target.matrix) is not None and target.tensor.is_float:
                matrix, fitted = target.fitted()
                self._add(self._choice.of_matrix(matrix) or matrix, updates=((state, fitted),))
        for formula, name in formulas_of:
            if name is None:
                self._skip(state, formula.module, "is adapted, but not in BASE")
            elif (chosen := self._choice.matrices.get(name)) is not None and chosen.tensor.is_float:
                self._add(chosen, dense=((state, formula.of(chosen.tensor)),))

    def _pair(self, state: State, matrix: StoredMatrix, tuned: StoredTensor) -> None:
        if not tuned.is_float:
            self._skip(state, matrix.tensor.name, f"is stored as {tuned.dtype}, not as floats")
            return
        if tuned.shape != matrix.shape:
            matrix = self._common_rows(matrix, tuned)
        self._add(matrix, dense=((state, tuned),))

    def _common_rows(self, matrix: StoredMatrix, tuned: StoredTensor) -> StoredMatrix:
        """The rows that both have, where a vocabulary was resized."""
        base = matrix.tensor
        if not {part.role for part in matrix.parts} <= _VOCABULARY_ROLES or tuned.shape[1:] != base.shape[1:]:
            raise ComparisonError(
                f"{base.name} is {times(base.shape)} in {base.path} and {times(tuned.shape)} in {tuned.path}: "
                "these are different models, or leave it out by choosing modules",
                parameter="modules",
            )
        rows = min(base.rows, tuned.rows)
        self.notes.append(
            f"{base.name} has {base.rows} rows in BASE and {tuned.rows} in {tuned.path} (a resized vocabulary): "
            f"the first {rows} are compared"
        )
        return matrix.first_rows(rows)

    def _add(
        self,
        matrix: StoredMatrix,
        *,
        dense: tuple[tuple[State, StoredTensor], ...] = (),
        updates: tuple[tuple[State, LowRankUpdate], ...] = (),
    ) -> None:
        """Compare one more tuned tensor or update with a matrix of the base."""
        key = (matrix.tensor.name, matrix.in_by_out, matrix.rows)
        job = self.jobs.get(key) or Job(matrix)
        self.jobs[key] = replace(job, dense=job.dense + dense, updates=job.updates + updates)

    def _skip(self, state: State | None, name: str, reason: str) -> None:
        if state is None:
            self.skipped.append(Skipped("BASE", self._model.checkpoint.step, name, reason))
        else:
            self.skipped.append(Skipped(state.method, state.step, name, reason, state.run))


def _nothing_selected(
    base: Checkpoint,
    modules: Sequence[str] | str | None,
    layers: Iterable[int] | None,
    choice: _Choice,
    skipped: Sequence[Skipped],
) -> ComparisonError:
    if choice.matrices and skipped:
        first = skipped[0]
        return ComparisonError(
            f"no selected matrix of {base.path} can be compared: {first.name} {first.reason}"
        )
    if choice.matrices:
        return ComparisonError(
            f"none of the {len(choice.matrices)} selected matrices of {base.path} (such as "
            f"{_example(choice.matrices)}) was tuned in any method: choose other modules, or all",
            parameter="modules",
        )
    given = [name for name, value in (("modules", modules), ("layers", layers)) if value is not None]
    selected = f"the chosen {' and '.join(given)} select" if given else "there is"
    return ComparisonError(
        f"{selected} no matrix of {base.path} ({len(base.tensors)} tensors, such as {_example(base.tensors)}): "
        "inspect it for its roles and layers",
        parameter=given[0] if given else None,
    )


def _example(names: Iterable[str]) -> str:
    return next(iter(names), "nothing")

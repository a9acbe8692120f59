"""Pair the base with every tuned checkpoint and plan which bytes to read: one job for each stored matrix of the base.

Everything here comes from file headers. A job names one matrix of the base and all that is to be compared with it, so
that its bytes are read once for every step of every method.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wdanalysis.checkpoints.names import (
    ATTENTION_ROLES,
    Architecture,
    Matrix,
    ModuleSelection,
    NameIndex,
    Part,
    match,
    recognise,
)
from wdanalysis.checkpoints.steps import is_generic
from wdanalysis.checkpoints.tensors import Checkpoint, LowRankUpdate, Series, StoredTensor
from wdanalysis.decomposition import Axis
from wdanalysis.errors import CheckpointError, ComparisonError

_VOCABULARY_MODULES = {"embed", "lm_head"}


@dataclass(frozen=True)
class State:
    """One tuned checkpoint of one method."""

    method: str
    checkpoint: Checkpoint

    @property
    def step(self) -> int | None:
        """Training step, where it is known."""
        return self.checkpoint.step


@dataclass(frozen=True)
class Skipped:
    """One matrix that is in a checkpoint and not in the table, and why."""

    method: str
    step: int | None
    name: str
    reason: str


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


@dataclass(frozen=True)
class Job:
    """One stored matrix of the base, and everything to compare with it."""

    base: StoredTensor
    matrix: Matrix
    rows: int
    dense: tuple[tuple[State, StoredTensor], ...] = ()
    updates: tuple[tuple[State, LowRankUpdate], ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes to read, without the adapters' own few."""
        tensors = [self.base, *(tensor for _, tensor in self.dense)]
        return sum(self.rows * tensor.row_length * tensor.itemsize for tensor in tensors)

    def outputs_of(self, part: Part) -> NDArray[np.intp]:
        """The output features of a part, in its order."""
        return np.concatenate([np.arange(start, min(stop, self._outputs)) for start, stop in part.runs])

    def shape_of(self, part: Part) -> tuple[int, int]:
        """(out, in) of a part."""
        inputs = self.rows if self.matrix.in_by_out else self.base.row_length
        return sum(max(min(stop, self._outputs) - start, 0) for start, stop in part.runs), inputs

    def vectors_are_rows(self, axis: Axis) -> bool:
        """Whether a vector is a row of the stored matrix (otherwise a column)."""
        return (axis == "out") != self.matrix.in_by_out

    def tiles(self, start: int, stop: int) -> Iterator[Tile]:
        """What stored rows `start:stop` bring to each part."""
        for index, part in enumerate(self.matrix.parts):
            output = 0
            for first, unbounded_last in part.runs:
                last = min(unbounded_last, self._outputs)
                if self.matrix.in_by_out:
                    outputs = slice(output, output + last - first)
                    yield Tile(index, slice(0, stop - start), slice(first, last), outputs, slice(start, stop))
                elif first < stop and start < last:
                    low, high = max(first, start), min(last, stop)
                    rows, columns = slice(low - start, high - start), slice(0, self.base.row_length)
                    yield Tile(
                        index, rows, columns, slice(output + low - first, output + high - first), columns
                    )
                output += last - first

    @property
    def _outputs(self) -> int:
        return self.base.row_length if self.matrix.in_by_out else self.rows


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
    architecture = _architecture(base, states)
    chosen = _Choice.of(architecture, base, modules, layers)
    jobs = _Jobs()
    skipped: list[Skipped] = []
    notes: list[str] = []
    for name, matrix in chosen.matrices.items():
        tensor = base.tensors[name]
        if not tensor.is_float:
            skipped.append(Skipped("BASE", base.step, name, f"is stored as {tensor.dtype}, not as floats"))
        if matrix.note:
            notes.append(f"{name}: {matrix.note}")
    skipped.extend(
        Skipped("BASE", base.step, name, "is a stack of experts' matrices, which are not compared")
        for name in chosen.expert_stacks(base)
    )
    index = NameIndex(base.tensors)
    for state in states:
        _pair_tensors(state, base, chosen, jobs, skipped, notes)
        _pair_updates(state, base, index, chosen, jobs, skipped)
    if not jobs:
        raise ComparisonError(_nothing_selected(base, modules, layers, chosen, skipped))
    notes.extend(f"--modules: {word!r} selects no matrix of BASE" for word in chosen.idle_words(base))
    present = {matrix.layer for matrix in chosen.matrices.values()}
    if absent := sorted((chosen.layers or set()) - present):
        notes.append(f"no selected matrix is in layer {', '.join(map(str, absent))}")
    return Plan(jobs.in_order_of(base), tuple(skipped), tuple(dict.fromkeys(notes)), chosen.modules_chosen)


class _Jobs:
    """The jobs so far: one for each stored matrix, way to read it (a tied one may have two) and number of rows."""

    def __init__(self) -> None:
        self._jobs: dict[tuple[str, bool, int], Job] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def add(
        self,
        tensor: StoredTensor,
        matrix: Matrix,
        rows: int,
        *,
        dense: tuple[State, StoredTensor] | None = None,
        update: tuple[State, LowRankUpdate] | None = None,
    ) -> None:
        """Compare one more tuned tensor or update with a matrix of the base."""
        key = (tensor.name, matrix.in_by_out, rows)
        job = self._jobs.get(key) or Job(tensor, matrix, rows)
        self._jobs[key] = replace(
            job,
            dense=job.dense if dense is None else (*job.dense, dense),
            updates=job.updates if update is None else (*job.updates, update),
        )

    def in_order_of(self, base: Checkpoint) -> tuple[Job, ...]:
        """All jobs, in the order in which the base's files hold their matrices."""
        place = {name: index for index, name in enumerate(base.tensors)}
        return tuple(sorted(self._jobs.values(), key=lambda job: place[job.base.name]))


@dataclass(frozen=True)
class _Choice:
    """Which matrices of the base are to be compared."""

    architecture: Architecture
    selection: ModuleSelection | None
    layers: frozenset[int] | None
    matrices: Mapping[str, Matrix]
    modules_chosen: str

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        base: Checkpoint,
        modules: Sequence[str] | str | None,
        layers: Iterable[int] | None,
    ) -> _Choice:
        kept_layers = None if layers is None else frozenset(layers)
        if modules is not None:
            selection = ModuleSelection.parse(modules)
            choice = cls(architecture, selection, kept_layers, {}, "given")
            return replace(choice, matrices=choice._matrices(base))
        choice = cls(
            architecture, ModuleSelection.parse(sorted(ATTENTION_ROLES)), kept_layers, {}, "attention"
        )
        matrices = choice._matrices(base)
        if not matrices:
            choice = cls(architecture, None, kept_layers, {}, "all")
            matrices = choice._matrices(base)
        return replace(choice, matrices=matrices)

    def _matrices(self, base: Checkpoint) -> dict[str, Matrix]:
        found = ((name, self.matrix(name, tensor.shape)) for name, tensor in base.tensors.items())
        return {name: matrix for name, matrix in found if matrix is not None}

    def idle_words(self, base: Checkpoint) -> list[str]:
        """What of the selection means nothing in the base, in any layer."""
        if self.selection is None or self.modules_chosen != "given":
            return []
        matrices = (
            (matrix, name)
            for name, tensor in base.tensors.items()
            if (matrix := self.architecture.matrix(name, tensor.shape))
        )
        places = [(part.module, name) for matrix, name in matrices for part in matrix.parts]
        return [
            word
            for word, alone in self.selection.words()
            if not any(alone.matches(module, name) for module, name in places)
        ]

    def expert_stacks(self, base: Checkpoint) -> list[str]:
        """The 3-D tensors of fused experts that the selection means."""
        return [
            name
            for name, tensor in base.tensors.items()
            if len(tensor.shape) == 3
            and "experts" in name.split(".")
            and (self.selection is None or self.selection.matches(name.split(".")[-1], name))
        ]

    def matrix(self, name: str, shape: tuple[int, ...]) -> Matrix | None:
        """The selected parts of a stored matrix; None where nothing of it is selected."""
        matrix = self.architecture.matrix(name, shape)
        if matrix is None or (self.layers is not None and matrix.layer not in self.layers):
            return None
        if self.selection is None:
            return matrix
        parts = tuple(part for part in matrix.parts if self.selection.matches(part.module, name))
        return replace(matrix, parts=parts) if parts else None


def _architecture(base: Checkpoint, states: Sequence[State]) -> Architecture:
    """The base's architecture; a base file without its config borrows that of a tuned model."""
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    model_configs = (state.checkpoint.config for state in states if not state.checkpoint.is_adapter)
    return recognise(shapes, base.config or next((config for config in model_configs if config), None))


def _pair_tensors(
    state: State, base: Checkpoint, chosen: _Choice, jobs: _Jobs, skipped: list[Skipped], notes: list[str]
) -> None:
    checkpoint = state.checkpoint
    if checkpoint.is_adapter and not checkpoint.tensors:
        return
    tied = False if checkpoint.is_adapter else (checkpoint.config or {}).get("tie_word_embeddings")
    try:
        matching = match(
            base.tensors, checkpoint.tensors, metadata=checkpoint.metadata, tie_word_embeddings=tied
        )
    except CheckpointError as error:
        raise ComparisonError(f"{checkpoint.path} cannot be matched with {base.path}: {error}") from error
    if not matching.pairs and not checkpoint.is_adapter:
        raise ComparisonError(
            f"no tensor of {checkpoint.path} has the name of one in {base.path} "
            f"({_example(checkpoint.tensors)} there, {_example(base.tensors)} here): are they of the same model?"
        )
    for base_name, tuned_name in matching.pairs.items():
        matrix, tuned = chosen.matrices.get(base_name), checkpoint.tensors[tuned_name]
        if matrix is None or not base.tensors[base_name].is_float:
            continue
        if tuned.is_float:
            rows = _common_rows(base.tensors[base_name], tuned, matrix, notes)
            jobs.add(base.tensors[base_name], matrix, rows, dense=(state, tuned))
        else:
            reason = f"is stored as {tuned.dtype}, not as floats"
            skipped.append(Skipped(state.method, state.step, base_name, reason))
    if not checkpoint.is_adapter:
        reason = "is in BASE, but not in this checkpoint"
        missing = (name for name in matching.only_base if name in chosen.matrices)
        skipped.extend(Skipped(state.method, state.step, name, reason) for name in missing)
    for name in matching.only_tuned:
        if chosen.matrix(name, checkpoint.tensors[name].shape) is not None:
            skipped.append(Skipped(state.method, state.step, name, "is in this checkpoint, but not in BASE"))


def _common_rows(base: StoredTensor, tuned: StoredTensor, matrix: Matrix, notes: list[str]) -> int:
    """How many rows to compare: all of them, or the common ones where a vocabulary was resized."""
    if tuned.shape == base.shape:
        return base.rows
    roles = {part.module.rsplit(".", 1)[-1] for part in matrix.parts}
    if roles <= _VOCABULARY_MODULES and tuned.shape[1:] == base.shape[1:]:
        rows = min(base.rows, tuned.rows)
        notes.append(
            f"{base.name} has {base.rows} rows in BASE and {tuned.rows} in {tuned.path} (a resized vocabulary): "
            f"the first {rows} are compared"
        )
        return rows
    raise ComparisonError(
        f"{base.name} is {_times(base.shape)} in {base.path} and {_times(tuned.shape)} in {tuned.path}: "
        "these are different models, or leave it out with --modules"
    )


def _pair_updates(
    state: State, base: Checkpoint, index: NameIndex, chosen: _Choice, jobs: _Jobs, skipped: list[Skipped]
) -> None:
    updates = state.checkpoint.updates
    targets = {update.module: index.tensor_of(update.module) for update in updates}
    if updates and not any(targets.values()):
        raise ComparisonError(
            f"none of the {len(updates)} modules that {state.checkpoint.path} adapts (such as {updates[0].module}) "
            f"is in {base.path} ({_example(base.tensors)} there): is it the model that the adapter was trained on?"
        )
    for update in updates:
        name = targets[update.module]
        if name is None:
            skipped.append(Skipped(state.method, state.step, update.module, "is adapted, but not in BASE"))
            continue
        tensor = base.tensors[name]
        # By the adapter's own name for it: lm_head may be stored as the embedding that it is tied to.
        matrix = chosen.matrix(f"{update.module}.weight", tensor.shape)
        if matrix is not None and tensor.is_float:
            if update.magnitude is not None and update.magnitude_axis == "in":
                raise ComparisonError(
                    f"{state.checkpoint.path} has its magnitudes along the input axis, which is compared as whole "
                    "matrices: merge it into its base with `wd-analyze merge` and compare the merged model"
                )
            matrix, fitted = orient(matrix, tensor, update)
            jobs.add(tensor, matrix, tensor.rows, update=(state, fitted))


def orient(matrix: Matrix, tensor: StoredTensor, update: LowRankUpdate) -> tuple[Matrix, LowRankUpdate]:
    """The matrix, lying as the adapter's factors fit it, and the update, as wide as the matrix.

    A name that is recognised tells best; then the adapter's `fan_in_fan_out`, one word for all of its modules, which
    PEFT leaves as its last module had it; then the shapes.

    Raises
    ------
    ComparisonError
        The factors fit neither way.
    """
    stored = (tensor.rows, tensor.row_length)
    guesses = (
        (matrix.in_by_out, update.in_by_out)
        if matrix.recognised
        else (update.in_by_out, not update.in_by_out)
    )
    for in_by_out in guesses:
        outputs, inputs = stored[::-1] if in_by_out else stored
        fitted = update.of_inputs(inputs)
        if fitted.shape == (outputs, inputs):
            if in_by_out == matrix.in_by_out:
                return matrix, fitted
            if len(matrix.parts) == 1:
                whole = replace(matrix.parts[0], runs=((0, outputs),))
                return replace(matrix, in_by_out=in_by_out, parts=(whole,)), fitted
    raise ComparisonError(
        f"{update.A.path} adapts {update.module} as {_times(update.shape)} (out × in), but {tensor.name} in "
        f"{tensor.path} is stored as {_times(stored)}: is it the model that the adapter was trained on?"
    )


def _nothing_selected(
    base: Checkpoint,
    modules: Sequence[str] | str | None,
    layers: Iterable[int] | None,
    chosen: _Choice,
    skipped: Sequence[Skipped],
) -> str:
    if chosen.matrices and skipped:
        first = skipped[0]
        return f"no selected matrix of {base.path} can be compared: {first.name} {first.reason}"
    if chosen.matrices:
        return (
            f"none of the {len(chosen.matrices)} selected matrices of {base.path} (such as "
            f"{_example(chosen.matrices)}) was tuned in any method: choose others with --modules, or --modules all"
        )
    options = " and ".join(
        option
        for option, given in (("--modules", modules is not None), ("--layers", layers is not None))
        if given
    )
    selected = f"{options} chose" if options else "there is"
    return (
        f"{selected} no matrix of {base.path} ({len(base.tensors)} tensors, such as {_example(base.tensors)}): "
        f"`wd-analyze inspect {base.path}` lists its roles and layers"
    )


def _example(names: Iterable[str]) -> str:
    return next(iter(names), "nothing")


def _times(shape: Iterable[int]) -> str:
    return " × ".join(map(str, shape))


def base_mismatch(base: Checkpoint, adapter: Checkpoint) -> str | None:
    """A sentence, where an adapter says that it was trained on a model of another name than the base's."""
    trained_on = (adapter.config or {}).get("base_model_name_or_path")
    if not trained_on or Path(str(trained_on)).name.lower() in {name.lower() for name in _identities(base)}:
        return None
    return f"{adapter.path} says that it was trained on {trained_on}, and BASE is {base.path}"


def _identities(base: Checkpoint) -> set[str]:
    """The names by which the base may be known: its own, its folder's, its config's."""
    path = base.path.absolute()
    own = [path.name] if path.is_dir() else [path.stem, *([path.parent.name] if is_generic(path) else [])]
    configured = Path(str((base.config or {}).get("_name_or_path", ""))).name
    hub = [part.rsplit("--", 1)[-1] for part in path.parts if part.startswith("models--")]
    return {*own, configured, *hub}

"""A checkpoint with every matrix described, and what of other checkpoints belongs to which of them.

A tensor's name is read once, here. What compares or merges models takes the matrices as they are described, asks which
tensor of a tuned checkpoint (`Model.match`) or which update of an adapter (`Model.target`) belongs to each, and reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from wdanalysis.checkpoints.architectures import EXPERT
from wdanalysis.checkpoints.experts import expert_role
from wdanalysis.checkpoints.names import (
    Architecture,
    Matching,
    Matrix,
    NameIndex,
    Part,
    canonical,
    match,
    model_types,
    recognise,
)
from wdanalysis.checkpoints.tensors import Checkpoint, FormulaUpdate, LowRankUpdate, StoredTensor
from wdanalysis.errors import ComparisonError


@dataclass(frozen=True)
class StoredMatrix(Matrix):
    """A tensor of a checkpoint as the weight matrix that it holds.

    Attributes
    ----------
    tensor
        Where its numbers are. It may have another name: a matrix that is tied is kept under that of the other, that of
        an expert is a share of its stack.
    """

    tensor: StoredTensor = field(kw_only=True)

    @property
    def dtype(self) -> str:
        """As stored."""
        return self.tensor.dtype

    @property
    def stored_name(self) -> str:
        """That of the tensor that holds its numbers, maybe with those of other experts."""
        return self.tensor.name if self.of_stack is None else self.tensor.name.rpartition("[")[0]

    @property
    def nbytes(self) -> int:
        """Of the rows that count, for a float dtype."""
        return self.rows * self.row_length * self.tensor.itemsize

    def first_rows(self, rows: int) -> StoredMatrix:
        """Return the matrix of the first rows as stored: a vocabulary before it grew."""
        cut = replace(self, shape=(rows, *self.shape[1:]))
        runs = (tuple((start, min(stop, cut.outputs)) for start, stop in part.runs) for part in self.parts)
        parts = zip(self.parts, runs, strict=True)
        return replace(cut, parts=tuple(replace(part, runs=of_part) for part, of_part in parts))

    def share_of(self, tensor: StoredTensor) -> StoredTensor:
        """Return of a tensor that is shaped as the base's what this matrix is of it."""
        if self.of_stack is None or self.expert is None:
            return tensor
        return tensor.of_stack(self.expert, self.of_stack)

    def turned(self) -> StoredMatrix | None:
        """Return the matrix read the other way round; None where several projections share its outputs."""
        if len(self.parts) > 1:
            return None
        turned = replace(self, in_by_out=not self.in_by_out)
        return replace(turned, parts=(Part(self.parts[0].module, ((0, turned.outputs),)),))


@dataclass(frozen=True)
class Target:
    """The weight that an update of an adapter changes.

    Attributes
    ----------
    update
        As the adapter has it.
    tensor
        Where the weight is stored.
    is_tied
        Whether only under the name of another weight, which the update does not name.
    matrix
        The weight, by the adapter's own name for it; None where it is no matrix.
    """

    update: LowRankUpdate
    tensor: StoredTensor
    is_tied: bool
    matrix: StoredMatrix | None

    def fitted(self) -> tuple[StoredMatrix, LowRankUpdate]:
        """Return the matrix, lying as the factors fit it, and the update, as wide as the matrix.

        A name that is recognised tells best; then the adapter's `fan_in_fan_out`, one word for all of its modules,
        which PEFT leaves as its last module had it; then the shapes.

        Raises
        ------
        ComparisonError
            It is no matrix, or the factors or the magnitude fit neither way.
        """
        matrix, update = self.matrix, self.update
        if matrix is None:
            raise ComparisonError(
                f"{self.tensor.name} in {self.tensor.path} is no matrix, but {update.A.path} adapts it"
            )
        as_configured = matrix.in_by_out == update.in_by_out
        ways = [matrix, None if matrix.recognised and as_configured else matrix.turned()]
        for way in ways if matrix.recognised or as_configured else reversed(ways):
            if way and (fitted := update.of_inputs(way.inputs)).shape == (way.outputs, way.inputs):
                _check_magnitude(fitted)
                return way, fitted
        raise ComparisonError(
            f"{update.A.path} adapts {update.module} as {times(update.shape)} (out × in), but {self.tensor.name} in "
            f"{self.tensor.path} is stored as {times((matrix.rows, matrix.row_length))}: is it the model that the "
            "adapter was trained on?"
        )


@dataclass(frozen=True)
class Model:
    """A checkpoint and what its tensors mean; made by `describe`.

    Attributes
    ----------
    checkpoint
        Where the tensors come from.
    architecture
        How their names are read.
    matrices
        Every weight matrix by its stored name, in the order of the files; those of a stack of experts by its name and
        their index, ``experts.gate_up_proj[3]``.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    matrices: Mapping[str, StoredMatrix]

    def matrix_of(self, tensor: StoredTensor, name: str | None = None) -> StoredMatrix | None:
        """Read any tensor, under its own or another name, as a matrix of this architecture; None where it is none."""
        matrix = self.architecture.matrix(name or tensor.name, tensor.shape)
        return None if matrix is None else StoredMatrix(**vars(matrix), tensor=tensor)

    @property
    def unread_stacks(self) -> list[str]:
        """The names of weights of three dimensions of which no matrix could be made out."""
        read = {matrix.stored_name for matrix in self.matrices.values()}
        return [
            name
            for name, tensor in self.checkpoint.tensors.items()
            if name not in read and self.architecture.is_unread_stack(name, tensor.shape)
        ]

    def match(self, tuned: Checkpoint) -> Matching:
        """Say which whole tensor of a tuned checkpoint belongs to which of the model.

        Raises
        ------
        CheckpointError
            Two could belong to one.
        """
        tied = False if tuned.is_adapter else (tuned.config or {}).get("tie_word_embeddings")
        names = self.checkpoint.tensors, tuned.tensors
        return match(*names, metadata=tuned.metadata, tie_word_embeddings=tied)

    def target(self, update: LowRankUpdate) -> Target | None:
        """Find the weight that an update changes; None where the model does not have it."""
        name = self._index.tensor_of(update.module)
        if name is None:
            return None
        tensor, meant = self.checkpoint.tensors[name], f"{update.module}.weight"
        matrix = self.matrices.get(name) if meant == name else self.matrix_of(tensor, meant)
        is_stored = meant == name or self._index.find(meant) or self._index.find(update.module)
        return Target(update, tensor, not is_stored, matrix)

    def target_of_formula(self, update: FormulaUpdate) -> str | None:
        """Name the tensor that a formula's update changes; None where the model does not have it."""
        return self._index.tensor_of(update.module)

    def is_tied(self, name: str) -> bool:
        """Whether a tensor of this name, which is not stored, is there as the one that it is tied to."""
        return self._index.find_tied(name) is not None

    @cached_property
    def _index(self) -> NameIndex:
        return NameIndex(self.checkpoint.tensors)


def describe(checkpoint: Checkpoint, config: Mapping[str, Any] | None = None) -> Model:
    """Say of every tensor of a model what it means, from names and shapes alone.

    Parameters
    ----------
    checkpoint
        A whole model.
    config
        `config.json`, where the checkpoint has none of its own.
    """
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    model = Model(checkpoint, recognise(shapes, checkpoint.config or config), {})
    matrices = {
        matrix.name: StoredMatrix(**vars(matrix), tensor=tensor)
        for name, tensor in checkpoint.tensors.items()
        for matrix in model.architecture.matrices(name, tensor.shape)
    }
    of_tensors = {
        name: replace(matrix, tensor=matrix.share_of(matrix.tensor)) for name, matrix in matrices.items()
    }
    return replace(model, matrices=of_tensors)


def has_experts_apart(checkpoint: Checkpoint) -> bool:
    """Whether it holds or adapts experts each by itself, and not in stacks."""
    names = (*checkpoint.tensors, *(f"{update.module}.weight" for update in checkpoint.updates))
    return any(EXPERT.search(name) for name in names)


def with_experts_apart(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with each expert's gate, up and down under a name of its own, as models had them on disk.

    Stacks of which the experts lie as in × out, or gate and up take turns, are left: no model has them apart.
    """
    if not any(map(_above_experts, checkpoint.tensors)):
        return checkpoint
    architecture = describe(checkpoint).architecture
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        matrices = architecture.matrices(name, tensor.shape)
        above = _above_experts(name)
        parts = [part for matrix in matrices for part in matrix.parts]
        is_split = bool(matrices) and all(matrix.of_stack and not matrix.in_by_out for matrix in matrices)
        if above is None or not is_split or any(part.role == "gate_up" or part.stride > 1 for part in parts):
            tensors[name] = tensor
            continue
        for matrix in matrices:
            of_expert = StoredMatrix(**vars(matrix), tensor=tensor).share_of(tensor)
            for part in matrix.parts:
                own_name = f"{above}.{matrix.expert}.{part.role}_proj.weight"
                tensors[own_name] = of_expert.rows_between(*part.runs[0], own_name)
    return replace(checkpoint, tensors=tensors)


def _above_experts(name: str) -> str | None:
    """``….experts`` of ``….experts.gate_up_proj``; None where that is no name of a stack."""
    above = name.removesuffix(".weight").rpartition(".")[0]
    return (
        above if above.endswith(".experts") and expert_role(canonical(name).removesuffix(".weight")) else None
    )


def types_mismatch(base: Checkpoint, tuned: Checkpoint) -> str | None:
    """Return a sentence where two models say in `config.json` that they are of different types.

    A text model is of the type of the multimodal model that has it.
    """
    types = [model_types(checkpoint.config or {}) for checkpoint in (base, tuned)]
    ours, theirs = ({name.removesuffix("_text") for name in of_one} for of_one in types)
    if tuned.is_adapter or not ours or not theirs or ours & theirs:
        return None
    named = [
        str((checkpoint.config or {}).get("model_type") or min(of_one))
        for checkpoint, of_one in zip((base, tuned), types, strict=True)
    ]
    return (
        f"{tuned.path} is of the type {named[1]} by its config.json and BASE of the type {named[0]}: are they the same "
        "model?"
    )


def _check_magnitude(update: LowRankUpdate) -> None:
    if (magnitude := update.magnitude) is not None and magnitude.size != update.vectors:
        raise ComparisonError(
            f"{magnitude.name} in {magnitude.path} has {magnitude.size} numbers for {update.vectors} vectors: is it "
            "the model that the adapter was trained on?"
        )


def times(shape: Iterable[int]) -> str:
    """A shape for reading: ``8 × 4``."""
    return " × ".join(map(str, shape))

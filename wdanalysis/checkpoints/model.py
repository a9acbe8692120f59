"""A checkpoint with every matrix described, and what of other checkpoints belongs to which of them.

A tensor's name is read once, here. What compares or merges models takes the matrices as they are described, asks which
tensor of a tuned checkpoint (`Model.match`) or which update of an adapter (`Model.target`) belongs to each, and reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from wdanalysis.checkpoints.names import Architecture, Matching, Matrix, NameIndex, Part, match, recognise
from wdanalysis.checkpoints.tensors import Checkpoint, FormulaUpdate, LowRankUpdate, StoredTensor
from wdanalysis.errors import ComparisonError


@dataclass(frozen=True)
class StoredMatrix(Matrix):
    """A tensor of a checkpoint as the weight matrix that it holds.

    Attributes
    ----------
    tensor
        Where its numbers are. It may have another name: a matrix that is tied is kept under that of the other.
    """

    tensor: StoredTensor = field(kw_only=True)

    @property
    def dtype(self) -> str:
        """As stored."""
        return self.tensor.dtype

    @property
    def nbytes(self) -> int:
        """Of the rows that count, for a float dtype."""
        return self.rows * self.row_length * self.tensor.itemsize

    def first_rows(self, rows: int) -> StoredMatrix:
        """Return the matrix of the first rows as stored: a vocabulary before it grew."""
        cut = replace(self, shape=(rows, *self.shape[1:]))
        runs = (tuple((start, min(stop, cut.outputs)) for start, stop in part.runs) for part in self.parts)
        return replace(cut, parts=tuple(map(Part, (part.module for part in self.parts), runs)))

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
        Every weight matrix by its stored name, in the order of the files.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    matrices: Mapping[str, StoredMatrix]

    def matrix_of(self, tensor: StoredTensor, name: str | None = None) -> StoredMatrix | None:
        """Read any tensor, under its own or another name, as a matrix of this architecture; None where it is none."""
        matrix = self.architecture.matrix(name or tensor.name, tensor.shape)
        return None if matrix is None else StoredMatrix(**vars(matrix), tensor=tensor)

    @property
    def expert_stacks(self) -> list[str]:
        """The names of 3-D tensors that hold a matrix for each expert, which are not read as matrices."""
        return [
            name
            for name, tensor in self.checkpoint.tensors.items()
            if len(tensor.shape) == 3 and "experts" in name.split(".")
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
    read = ((name, model.matrix_of(tensor, name)) for name, tensor in checkpoint.tensors.items())
    return replace(model, matrices={name: matrix for name, matrix in read if matrix is not None})


def _check_magnitude(update: LowRankUpdate) -> None:
    if (magnitude := update.magnitude) is not None and magnitude.size != update.vectors:
        raise ComparisonError(
            f"{magnitude.name} in {magnitude.path} has {magnitude.size} numbers for {update.vectors} vectors: is it "
            "the model that the adapter was trained on?"
        )


def times(shape: Iterable[int]) -> str:
    """A shape for reading: ``8 × 4``."""
    return " × ".join(map(str, shape))

"""What every checkpoint format turns into: tensors that are described at once and read by rows.

A format module (`safetensors_files.py`, `torch_files.py`) makes one `StoredTensor` for each tensor that a
file holds, from the file's header alone. Nothing is read until `StoredTensor.read_rows` is called, and then
only the rows that are asked for, so memory is bounded by a block of rows and not by the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wdanalysis.checkpoints.dtypes import FLOATS, STORED_TYPES, widen
from wdanalysis.decomposition import Axis
from wdanalysis.errors import CheckpointError


class RowReader(Protocol):
    """Reads rows of one stored tensor; one for each format. Must be safe to call from several threads."""

    def __call__(self, start: int, stop: int, buffer: NDArray[np.uint8] | None) -> NDArray[Any]:
        """Return rows `start:stop` as a 2-D array of the storage dtype, in `buffer` where that is of use."""
        ...


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, known from its header.

    Attributes
    ----------
    name
        The name in the file.
    shape
        As stored.
    dtype
        In the safetensors spelling: ``F32``, ``BF16``, ``I64``, ``F8_E4M3`` …
    path
        The file that holds it.
    reader
        How to read rows of it.
    raw
        How to read its bytes, of any dtype; None where its numbers are not stored, but calculated.
    stored_as
        What its numbers are calculated from, where that is not `dtype`: ``NF4``, ``Q4_K``, the dtype of an adapter's
        factors.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    path: Path
    reader: RowReader = field(repr=False, compare=False)
    raw: Callable[[], NDArray[np.uint8]] | None = field(default=None, repr=False, compare=False)
    stored_as: str = ""

    @property
    def precision(self) -> str:
        """What the table names: `stored_as`, else `dtype`."""
        return self.stored_as or self.dtype

    @property
    def is_float(self) -> bool:
        """Whether the three sums can be taken of it: F64, F32, F16 or BF16."""
        return self.dtype in FLOATS

    @property
    def rows(self) -> int:
        """Length of the first dimension; a scalar is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_length(self) -> int:
        """Elements in a row: the product of all dimensions but the first; a convolution reads as a matrix."""
        return math.prod(self.shape[1:])

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of an element of a float tensor."""
        return STORED_TYPES[self.dtype].bits // 8

    def read_rows(self, start: int, stop: int, buffer: NDArray[np.uint8] | None = None) -> NDArray[Any]:
        """Read rows `start:stop` as a (stop − start) × `row_length` array of `dtypes.FLOATS[dtype]`.

        Parameters
        ----------
        start, stop
            Rows of the first dimension, `0 <= start <= stop <= rows`.
        buffer
            Bytes to read into, to save an allocation; the result may be a view of it and is then valid until
            the buffer is used again.

        Raises
        ------
        CheckpointError
            The tensor is not of a float dtype, or the file ended or could not be read.
        """
        return self.reader(start, stop, buffer)

    def read(self) -> NDArray[Any]:
        """Read the whole tensor, a small one, in its own shape and storage dtype."""
        return self.read_rows(0, self.rows).reshape(self.shape)

    def read_bytes(self) -> NDArray[np.uint8]:
        """Read all bytes of the tensor, of any dtype, in C order.

        Raises
        ------
        CheckpointError
            The file ended or could not be read.
        """
        return self.read().reshape(-1).view(np.uint8) if self.raw is None else self.raw()

    def first_columns(self, count: int) -> StoredTensor:
        """Return the first `count` columns of a matrix, as a tensor of their own."""

        def read(start: int, stop: int, buffer: NDArray[np.uint8] | None) -> NDArray[Any]:
            return self.reader(start, stop, buffer)[:, :count]

        return replace(self, shape=(self.rows, count), reader=read, raw=None)


@dataclass(frozen=True)
class WeightsFile:
    """What a format module makes of one file.

    Attributes
    ----------
    path
        The file.
    format
        ``safetensors`` or ``PyTorch``.
    tensors
        Every tensor by its name in the file.
    metadata
        safetensors' `__metadata__`.
    notes
        Sentences on what the file holds beside tensors.
    """

    path: Path
    format: str
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LowRankUpdate:
    """What an adapter does to one weight: W0 + scale · B A, and for DoRA its magnitude.

    Attributes
    ----------
    module
        The adapted module's name as in the adapter file, without PEFT's prefix and without ``.weight``.
    A, B
        (r × in) and (out × r); a convolution's factors keep their trailing dimensions.
    scale
        α/r, α/√r, … as PEFT computes it.
    magnitude
        DoRA's vector m, one number for each vector along `magnitude_axis`; None for LoRA.
    in_by_out
        Whether the base stores this weight as in × out (GPT-2's Conv1D, an embedding), so that it gets (BA)ᵀ,
        by the adapter's configuration. PEFT saves there the flag of the module that it adapted last: where
        Conv1D and Linear are mixed, the base's own shape must decide.
    shared_factor
        Whether A is one matrix for modules of different widths, of which each takes its first columns (VeRA).
    magnitude_axis
        ``out``, as in PEFT, or ``in`` where our own training was told so.
    """

    module: str
    A: StoredTensor
    B: StoredTensor
    scale: float
    magnitude: StoredTensor | None = None
    in_by_out: bool = False
    shared_factor: bool = False
    magnitude_axis: Axis = "out"

    @property
    def rank(self) -> int:
        """R, from the tensor and not from the configuration."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of B A: (out, in)."""
        return self.B.shape[0], self.A.row_length

    @property
    def vectors(self) -> int:
        """How many there are along `magnitude_axis`."""
        return self.shape[0 if self.magnitude_axis == "out" else 1]

    def of_inputs(self, inputs: int) -> LowRankUpdate:
        """Return the update of a module with so many input features: the same, but for a shared A."""
        if not self.shared_factor or inputs >= self.A.row_length:
            return self
        return replace(self, A=self.A.first_columns(inputs), shared_factor=False)


@dataclass(frozen=True)
class FormulaUpdate:
    """What an adapter does to one weight, where that is not W0 + scale · B A: the tuned weight by a formula.

    Attributes
    ----------
    module
        The adapted module's name as in the adapter file, without prefix and without ``.weight``.
    method
        ``LoHa``, ``IA³``, ``OFT`` …
    factors
        The adapter's tensors that the formula takes; the first names file and dtype.
    tuned
        Returns the tuned weight for the base's, both in float64 and in the shape in which the base stores it. Raises
        ValueError where the factors do not fit that shape.
    """

    module: str
    method: str
    factors: tuple[StoredTensor, ...]
    tuned: Callable[[NDArray[np.float64]], NDArray[np.float64]] = field(repr=False, compare=False)

    def of(self, base: StoredTensor) -> StoredTensor:
        """Return the tuned weight as a tensor; it is calculated whole when its first rows are read.

        Reading it raises `CheckpointError` where the factors do not fit the base.
        """
        return StoredTensor(
            name=base.name,
            shape=base.shape,
            dtype="F64",
            path=self.factors[0].path,
            reader=_Calculated(self, base),
            stored_as=self.factors[0].dtype,
        )


class _Calculated:
    """`RowReader` of a formula's weight, which is kept from its first row to its last."""

    def __init__(self, update: FormulaUpdate, base: StoredTensor) -> None:
        self._update, self._base = update, base
        self._lock, self._rows = Lock(), np.empty((0, 0))

    def __call__(self, start: int, stop: int, buffer: NDArray[np.uint8] | None) -> NDArray[Any]:
        with self._lock:
            if not self._rows.size:
                self._rows = self._calculate().reshape(self._base.rows, self._base.row_length)
            rows = self._rows[start:stop]
            if stop >= self._base.rows:
                self._rows = np.empty((0, 0))
            return rows

    def _calculate(self) -> NDArray[np.float64]:
        update, base = self._update, self._base
        weight = widen(base.read()).reshape(base.shape)
        try:
            tuned = update.tuned(weight)
        except ValueError as error:
            raise self._misfit(str(error)) from error
        if tuned.shape != base.shape:
            raise self._misfit(f"the update is {tuned.shape}")
        return np.ascontiguousarray(tuned, dtype=np.float64)

    def _misfit(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._update.factors[0].path} adapts {self._update.module} by {self._update.method}, which does not fit "
            f"{self._base.name} of shape {self._base.shape} in {self._base.path} ({what}): is it the model that the "
            "adapter was trained on?"
        )


@dataclass(frozen=True)
class Checkpoint:
    """One state of a model: whole tensors, or an adapter's updates, or both.

    Attributes
    ----------
    path
        The file or folder that the user would name.
    format
        What it is, in a person's words: ``safetensors``, ``safetensors, 2 shards``, ``PEFT adapter (DoRA)`` …
    tensors
        Whole tensors by the name in the file. For an adapter these are the tensors that it replaces
        (`modules_to_save`), under their names in the base model.
    updates
        An adapter's low-rank updates.
    formulas
        Its updates of another form.
    step
        Training step, where the path or the trainer's state tells it.
    config
        The model's `config.json`, or an adapter's `adapter_config.json`, where there is one.
    metadata
        safetensors' `__metadata__`, merged over the files.
    files
        Every file that is read.
    notes
        Sentences on what was found and left out, or is worth a warning.
    method
        An adapter's: ``LoRA``, ``DoRA``, ``VeRA``, ``DVoRA``; None for a model.
    run
        Which of the runs (seeds) of its method it is of; empty where there is one.
    applied_to
        An adapter's: how it reads beside its base, where that tells more than it does alone.
    """

    path: Path
    format: str
    tensors: Mapping[str, StoredTensor]
    updates: tuple[LowRankUpdate, ...] = ()
    formulas: tuple[FormulaUpdate, ...] = ()
    step: int | None = None
    config: Mapping[str, Any] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    method: str | None = None
    run: str = ""
    applied_to: Callable[[Checkpoint], Checkpoint] | None = field(default=None, repr=False, compare=False)

    def on(self, base: Checkpoint) -> Checkpoint:
        """Return an adapter as it reads beside its base: widths that its file does not tell, how weights lie.

        Reads headers only. Raises `CheckpointError` where the two do not fit together.
        """
        if self.applied_to is None:
            return self
        read = self.applied_to(base)
        return replace(self, tensors=read.tensors, updates=read.updates, formulas=read.formulas)

    @property
    def is_adapter(self) -> bool:
        """Whether it needs a base model to be a model."""
        return bool(self.updates or self.formulas) or self.method is not None


@dataclass(frozen=True)
class Series:
    """A method's checkpoints in the order of their runs and steps.

    Attributes
    ----------
    path
        The file or folder that the user named.
    name
        The method's name: the folder's own (that of the folder above for a single step), or the file's stem.
    checkpoints
        In the order of `run` and `step`; the only one of a run may have no step.
    notes
        Sentences on what lies in the folder and was left out.
    """

    path: Path
    name: str
    checkpoints: tuple[Checkpoint, ...]
    notes: tuple[str, ...] = ()

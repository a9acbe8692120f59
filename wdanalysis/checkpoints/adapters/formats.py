"""What every format of adapters turns into, and the interface of one: its name, its keys, and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from wdanalysis.checkpoints.dtypes import FLOATS, widen
from wdanalysis.checkpoints.model import Model, describe
from wdanalysis.checkpoints.names import NameIndex
from wdanalysis.checkpoints.tensors import Checkpoint, FormulaUpdate, LowRankUpdate, StoredTensor
from wdanalysis.decomposition import Axis

Weight: TypeAlias = NDArray[np.float64]
Formula: TypeAlias = Callable[[Weight], Weight]
"""From the weight of the base to the tuned one, both float64 and of one shape."""

WITH_MAGNITUDE: Mapping[str, str] = MappingProxyType({"LoRA": "DoRA", "VeRA": "DVoRA"})
"""What a method is called when its modules have a magnitude as well."""


@dataclass(frozen=True)
class AdapterSource:
    """What is there to read an adapter from.

    Attributes
    ----------
    path
        The file or folder, for messages.
    tensors
        All tensors of the adapter, by their names in the file.
    config
        `adapter_config.json`; None where there is none.
    alpha
        The scale's numerator as the user gives it, for an adapter that does not bring its own.
    base
        The model that it is to be applied to, where it is known: an adapter may be read alone, to be inspected.
    metadata
        safetensors' `__metadata__`.
    dora_axis
        The axis of its magnitudes as the user gives it, where neither their shape nor their writer tells it.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any] | None
    alpha: float | None
    base: Checkpoint | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    dora_axis: Axis | None = None

    def base_tensor(self, module: str) -> StoredTensor | None:
        """Return the base's weight of a module, or the parameter of this name; None where it is not known."""
        name = None if self._names is None else self._names.tensor_of(module)
        return None if name is None or self.base is None else self.base.tensors[name]

    def in_by_out(self, module: str, shape: tuple[int, int] | None = None) -> bool:
        """Whether the base stores a module's weight as in × out.

        Its shape tells where it fits `shape` (out × in) one way only, then a name that is known, then the adapter's
        `fan_in_fan_out`.
        """
        flag = bool((self.config or {}).get("fan_in_fan_out", False))
        tensor = self.base_tensor(module)
        if tensor is None or self._model is None:
            return flag
        stored = (tensor.rows, tensor.row_length)
        if shape is not None and stored in (shape, shape[::-1]) and shape != shape[::-1]:
            return stored != shape
        matrix = self._model.matrices.get(tensor.name)
        return (
            matrix.in_by_out if matrix is not None and matrix.recognised else flag and len(tensor.shape) == 2
        )

    def is_embedding(self, module: str) -> bool:
        """Whether a module's weight is a table of vectors, as far as the name tells."""
        tensor = self.base_tensor(module)
        matrix = None if tensor is None or self._model is None else self._model.matrices.get(tensor.name)
        return matrix is not None and matrix.parts[0].role == "embed"

    @cached_property
    def _names(self) -> NameIndex | None:
        return None if self.base is None else NameIndex(self.base.tensors)

    @cached_property
    def _model(self) -> Model | None:
        return None if self.base is None else describe(self.base)


@dataclass(frozen=True)
class Adapter:
    """What an adapter holds.

    Attributes
    ----------
    updates, tensors, notes, formulas
        As in `Checkpoint`.
    directions
        ``LoRA``, ``VeRA``, ``LoHa`` …: what tunes the directions.
    format
        The name of its format.
    """

    updates: tuple[LowRankUpdate, ...]
    tensors: Mapping[str, StoredTensor]
    notes: tuple[str, ...]
    directions: str = "LoRA"
    format: str = "PEFT"
    formulas: tuple[FormulaUpdate, ...] = ()

    @property
    def method(self) -> str:
        """``LoRA``, ``VeRA`` …; ``DoRA`` or ``DVoRA`` if any module has a magnitude."""
        has_magnitude = any(update.magnitude for update in self.updates)
        return WITH_MAGNITUDE.get(self.directions, self.directions) if has_magnitude else self.directions


@dataclass(frozen=True)
class AdapterFormat:
    """One format.

    Attributes
    ----------
    name
        What it is called: ``PEFT``, ``kohya`` …
    recognises
        Whether a file with these names of tensors is of this format.
    read
        Sort its tensors into low-rank updates and tensors that replace those of the base. Raises `CheckpointError`
        where its tensors do not fit together, or its scale is not known.
    types
        The `peft_type`s of `adapter_config.json` that mean this format, whatever the names are.
    """

    name: str
    recognises: Callable[[Collection[str]], bool]
    read: Callable[[AdapterSource], Adapter]
    types: Collection[str] = field(default=())


def on_matrix(formula: Formula, *, in_by_out: bool) -> Formula:
    """Apply a formula that is written for an out × in matrix to a weight as it is stored, a convolution too."""

    def tuned(weight: Weight) -> Weight:
        matrix = weight.reshape(weight.shape[0], -1)
        return (formula(matrix.T).T if in_by_out else formula(matrix)).reshape(weight.shape)

    return tuned


def wide(tensor: StoredTensor) -> Weight:
    """Read a factor whole, in float64 and its own shape."""
    numbers: Weight = widen(tensor.read()).reshape(tensor.shape)
    return numbers


def computed(
    like: StoredTensor, shape: tuple[int, ...], numbers: Callable[[], Weight], dtype: str = "F64"
) -> StoredTensor:
    """Return a factor that is calculated from stored ones, whole, whenever rows of it are read.

    Parameters
    ----------
    like
        Gives name and file, and the stored type that the table names.
    shape, dtype
        Of the factor.
    numbers
        Its elements.
    """

    def read(start: int, stop: int, buffer: NDArray[np.uint8] | None) -> NDArray[Any]:
        return numbers().reshape(shape[0], -1)[start:stop].astype(FLOATS[dtype])

    return StoredTensor(like.name, shape, dtype, like.path, read, stored_as=like.precision)

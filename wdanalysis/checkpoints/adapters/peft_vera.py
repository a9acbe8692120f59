"""VeRA adapters: one frozen pair A, B for the whole model, and two trained vectors for each module.

A module's update is ΔW = diag(λ_b) B[:out] · diag(λ_d) A[:, :in] (Kopiczko et al., 2024): a low-rank update like LoRA's
with the scale 1, whose factors are computed when they are read. With a magnitude vector beside it, it is DVoRA (§5.4).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wdanalysis.checkpoints.adapters.formats import Adapter, AdapterFormat, AdapterSource
from wdanalysis.checkpoints.adapters.peft_config import Scaling
from wdanalysis.checkpoints.adapters.peft_lora import read_low_rank
from wdanalysis.checkpoints.dtypes import widen, working_type
from wdanalysis.checkpoints.tensors import StoredTensor
from wdanalysis.errors import CheckpointError

SCALING_VECTOR = re.compile(
    r"(?P<module>.+)\.vera_lambda_(?P<side>[bd])(?P<adapter>\.(?!weight$)[^.]+)?(?:\.weight)?"
)
PROJECTION = re.compile(r"(?:.+\.)?vera_(?P<factor>[AB])(?:\.(?!weight$)[^.]+)?(?:\.weight)?")
"""Keys of PEFT's VeRA: λ_b and λ_d of a module, and the shared A and B, which a state dict repeats in every module."""

FACTOR_OF_SIDE = {"d": "A", "b": "B"}


def recognises(names: Collection[str]) -> bool:
    """Whether any is a scaling vector of VeRA or DVoRA."""
    return any(SCALING_VECTOR.fullmatch(name) for name in names)


def read(source: AdapterSource) -> Adapter:
    """Read the updates, whose scale is 1: the vectors have it."""
    low_rank = replace(source, tensors=as_low_rank(source.path, source.tensors))
    scaling = Scaling(source.path, alpha=1.0, divides_by_rank=False)
    adapter = replace(read_low_rank(low_rank, scaling, shares_inputs=True), directions="VeRA")
    if source.alpha is None or source.config is not None:
        return adapter
    unused = f"alpha = {source.alpha:g} was not used, because {source.path} is VeRA's, which has none."
    return replace(adapter, notes=(*adapter.notes, unused))


def as_low_rank(path: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Give each module its own factors, under the keys that LoRA's have.

    Parameters
    ----------
    path
        The file or folder, for messages.
    tensors
        All tensors of the adapter, by their names in the file.

    Returns
    -------
    dict
        Every tensor that is not VeRA's as it was; for each module ``lora_A``, r × the *widest* module's inputs, and
        ``lora_B``, out × r.

    Raises
    ------
    CheckpointError
        The shared projections were not saved, or a vector does not fit them.
    """
    shared: dict[str, StoredTensor] = {}
    low_rank: dict[str, StoredTensor] = {}
    vectors: list[tuple[re.Match[str], StoredTensor]] = []
    for name, tensor in tensors.items():
        if match := PROJECTION.fullmatch(name):
            shared.setdefault(match["factor"], tensor)
        elif match := SCALING_VECTOR.fullmatch(name):
            vectors.append((match, tensor))
        else:
            low_rank[name] = tensor
    if missing := [f"vera_{factor}" for factor in "AB" if factor not in shared]:
        raise CheckpointError(
            f"{path} is a VeRA adapter without {' and '.join(missing)}, which its training drew at random; save it "
            "with `save_projection=True`, or merge it into its base."
        )
    for match, vector in vectors:
        factor = FACTOR_OF_SIDE[match["side"]]
        key = f"{match['module']}.lora_{factor}{match['adapter'] or ''}.weight"
        low_rank[key] = _scaled(path, vector, shared[factor], exactly=factor == "A")
    return low_rank


@dataclass(frozen=True)
class ScaledRows:
    """`RowReader` of diag(vector) · matrix, in float32 as PEFT computes it (float64 where either is stored so)."""

    vector: StoredTensor
    matrix: StoredTensor

    def __call__(self, start: int, stop: int, buffer: NDArray[np.uint8] | None) -> NDArray[Any]:
        """As in `RowReader`."""
        vector, rows = (
            widen(tensor.read_rows(start, stop), working_type(tensor.dtype))
            for tensor in (self.vector, self.matrix)
        )
        scaled: NDArray[Any] = vector * rows
        return scaled


def _scaled(path: Path, vector: StoredTensor, matrix: StoredTensor, *, exactly: bool) -> StoredTensor:
    fits = len(vector.shape) == 1 and len(matrix.shape) == 2
    if not fits or vector.rows > matrix.rows or (exactly and vector.rows != matrix.rows):
        raise CheckpointError(
            f"{vector.name!r} in {path} has the shape {vector.shape}, which does not fit {matrix.name!r} of shape "
            f"{matrix.shape}; save the adapter again."
        )
    for tensor in (vector, matrix):
        if not tensor.is_float:
            raise CheckpointError(
                f"{tensor.name!r} in {path} is stored as {tensor.dtype}; save the adapter in a float dtype of 16 bits "
                "or more."
            )
    dtype = "F64" if "F64" in (vector.dtype, matrix.dtype) else "F32"
    return StoredTensor(
        vector.name, (vector.rows, matrix.row_length), dtype, vector.path, ScaledRows(vector, matrix)
    )


FORMAT = AdapterFormat("PEFT", recognises, read)

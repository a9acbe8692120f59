"""VeRA adapters: one frozen pair A, B for the whole model, and two trained vectors for each module.

A module's update is ΔW = diag(λ_b) B[:out] · diag(λ_d) A[:, :in] (Kopiczko et al., 2024): a low-rank update like LoRA's
with the scale 1, whose factors are computed when they are read. With a magnitude vector beside it, it is DVoRA (§5.4).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wdanalysis.checkpoints.adapters.formats import Adapter, AdapterFormat, AdapterSource, Weight, computed
from wdanalysis.checkpoints.adapters.peft_config import Scaling
from wdanalysis.checkpoints.adapters.peft_keys import PEFT_PREFIX
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
    low_rank = replace(source, tensors=as_low_rank(source))
    scaling = Scaling(source.path, alpha=1.0, divides_by_rank=False)
    adapter = replace(read_low_rank(low_rank, scaling, shares_inputs=True), directions="VeRA")
    if source.alpha is None or source.config is not None:
        return adapter
    unused = f"alpha = {source.alpha:g} was not used, because {source.path} is VeRA's, which has none."
    return replace(adapter, notes=(*adapter.notes, unused))


def as_low_rank(source: AdapterSource) -> dict[str, StoredTensor]:
    """Give each module its own factors, under the keys that LoRA's have.

    Parameters
    ----------
    source
        All tensors of the adapter, and the base, from whose widths shared projections that were not saved are drawn.

    Returns
    -------
    dict
        Every tensor that is not VeRA's as it was; for each module ``lora_A``, r × the *widest* module's inputs, and
        ``lora_B``, out × r.

    Raises
    ------
    CheckpointError
        The shared projections cannot be told, or a vector does not fit them.
    """
    path = source.path
    shared: dict[str, StoredTensor] = {}
    low_rank: dict[str, StoredTensor] = {}
    vectors: list[tuple[re.Match[str], StoredTensor]] = []
    for name, tensor in source.tensors.items():
        if match := PROJECTION.fullmatch(name):
            shared.setdefault(match["factor"], tensor)
        elif match := SCALING_VECTOR.fullmatch(name):
            vectors.append((match, tensor))
        else:
            low_rank[name] = tensor
    if shared.keys() != {"A", "B"}:
        shared = _drawn(source, vectors)
    for match, vector in vectors:
        factor = FACTOR_OF_SIDE[match["side"]]
        key = f"{match['module']}.lora_{factor}{match['adapter'] or ''}.weight"
        low_rank[key] = _scaled(path, vector, shared[factor], exactly=factor == "A")
    return low_rank


def _drawn(
    source: AdapterSource, vectors: list[tuple[re.Match[str], StoredTensor]]
) -> dict[str, StoredTensor]:
    """Draw A and B again, as PEFT does: from their seed, as wide as the widest of the modules.

    Alone, without a base, an adapter does not tell these widths: then they are those of its vectors, and the numbers of
    A and B are not to be had.
    """
    seed = (source.config or {}).get("projection_prng_key")
    if not isinstance(seed, int):
        raise CheckpointError(
            f"{source.path} is a VeRA adapter without vera_A and vera_B, which its training drew at random, and "
            "without their seed; save it with `save_projection=True`, or merge it into its base."
        )
    rank = max((vector.size for match, vector in vectors if match["side"] == "d"), default=0)
    outputs = max((vector.size for match, vector in vectors if match["side"] == "b"), default=0)
    if not rank or not outputs:
        raise CheckpointError(
            f"{source.path} holds no vera_lambda_b and vera_lambda_d; save the adapter again."
        )
    like = vectors[0][1]
    if source.base is None:
        return {
            "A": computed(like, (rank, 1), _unknown(source.path), "F32"),
            "B": computed(like, (outputs, rank), _unknown(source.path), "F32"),
        }
    inputs = 0
    for match, vector in vectors:
        module = PEFT_PREFIX.sub("", match["module"])
        base = source.base_tensor(module)
        if base is not None and match["side"] == "b":
            sides = base.row_length, base.rows
            inputs = max(inputs, sides[source.in_by_out(module, (vector.size, _other(sides, vector.size)))])
    if not inputs:
        raise CheckpointError(
            f"none of the modules that {source.path} adapts is in {source.base.path}: is it the model that the adapter "
            "was trained on?"
        )
    draw = _Draw(seed, rank, inputs, outputs)
    return {
        "A": computed(like, (rank, inputs), lambda: draw()[0], "F32"),
        "B": computed(like, (outputs, rank), lambda: draw()[1], "F32"),
    }


def _other(sides: tuple[int, int], one: int) -> int:
    return sides[0] if sides[1] == one else sides[1]


def _unknown(path: Path) -> Callable[[], Weight]:
    def numbers() -> Weight:
        raise CheckpointError(
            f"{path} is a VeRA adapter without vera_A and vera_B, which are drawn as wide as its base is; compare it "
            "with its base."
        )

    return numbers


class _Draw:
    """A and B by Kaiming's uniform law from one generator, A first."""

    def __init__(self, seed: int, rank: int, inputs: int, outputs: int) -> None:
        self._seed, self._shapes, self._lock = seed, ((rank, inputs), (outputs, rank)), Lock()
        self._drawn: tuple[Weight, Weight] | None = None

    def __call__(self) -> tuple[Weight, Weight]:
        import torch

        with self._lock:
            if self._drawn is None:
                generator = torch.Generator(device="cpu").manual_seed(self._seed)
                A, B = (
                    torch.empty(shape).uniform_(-bound, bound, generator=generator).numpy()
                    for shape in self._shapes
                    for bound in [math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))]
                )
                self._drawn = A, B
            return self._drawn


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


FORMAT = AdapterFormat("PEFT", recognises, read, types=("VERA", "DVORA", "DVORA_IN"))

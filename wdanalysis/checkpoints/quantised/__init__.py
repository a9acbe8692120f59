"""Quantised weights, of whatever format, as the weights that they stand for.

A format finds its weights among a checkpoint's tensors (`formats.QuantisedFormat`), and what it finds takes their place
as one tensor that is dequantised block by block when it is read (`blocks.QuantisedWeight`). A new one is a module here
and its place in `FORMATS`. The arithmetic is numpy's; each format is tested against the library that owns it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wdanalysis.checkpoints.architectures import EMBEDDINGS
from wdanalysis.checkpoints.names import recognise
from wdanalysis.checkpoints.quantised import (
    bitsandbytes_files,
    four_bit_floats,
    gptq_files,
    hqq_files,
    packed_groups,
    scaled,
)
from wdanalysis.checkpoints.quantised.blocks import turned
from wdanalysis.checkpoints.quantised.formats import PackedSource, QuantisedFormat
from wdanalysis.checkpoints.tensors import StoredTensor
from wdanalysis.errors import CheckpointError

__all__ = ["FORMATS", "QUANTISATION", "dequantised"]

FORMATS: tuple[QuantisedFormat, ...] = (
    scaled.TORCHAO,
    bitsandbytes_files.FOUR_BIT,
    bitsandbytes_files.INT8,
    hqq_files.FORMAT,
    gptq_files.FORMAT,
    packed_groups.COMPRESSED,
    packed_groups.MLX,
    four_bit_floats.EXPERTS,
    four_bit_floats.FORMAT,
    scaled.FORMAT,
    scaled.CASTS,
)
"""In the order in which they are tried; a tensor belongs to the first that takes it."""

_CODES = re.compile(
    r"\.(?:qweight|qzeros|W_q|weight_packed|_weight_qdata|weight\._data)$|\.quant_state\.|\.absmax$|_blocks$"
)
"""Names that only quantised weights have."""

_NO_CODES = ("I64", "BOOL")
"""Types of positions and masks."""

QUANTISATION = ("quantization_config", "quantization", "compression_config")
"""Keys of `config.json` that say how a model is quantised."""


def dequantised(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    config: Mapping[str, Any] | None,
    metadata: Mapping[str, str],
) -> dict[str, StoredTensor]:
    """Put for every quantised weight the weight that it stands for, in its place.

    Parameters
    ----------
    path
        The checkpoint, for messages.
    tensors
        As stored.
    config
        `config.json`, where there is one.
    metadata
        safetensors' `__metadata__`.

    Raises
    ------
    CheckpointError
        A quantised weight lacks a part, its parts do not fit together, or its format is not read.
    """
    settings = next((s for key in QUANTISATION if isinstance(s := (config or {}).get(key), dict)), {})
    left = dict(tensors)
    weights: dict[str, StoredTensor] = {}
    names: set[str] = set()
    for quantised in FORMATS:
        for weight in list(quantised.find(PackedSource(path, left, settings, metadata))):
            stored = tensors.get(weight.name)
            if weight.name in names or (stored is not None and stored not in weight.parts):
                raise CheckpointError(
                    f"{path} has {weight.name} twice, also as {weight.parts[0].name}; save it again."
                )
            names.add(weight.name)
            weights[weight.parts[0].name] = weight.tensor()
            for part in weight.parts:
                left.pop(part.name, None)
    _check_nothing_left(path, left, settings)
    in_order = (weights.get(name) or left.get(name) for name in tensors)
    found = {tensor.name: tensor for tensor in in_order if tensor is not None}
    return _as_the_model_has_them(found, config) if weights else found


def _check_nothing_left(path: Path, left: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of which only what is not quantised could be compared."""
    method = settings.get("quant_method")
    for name, tensor in left.items():
        is_packed = method is not None and len(tensor.shape) > 1 and tensor.dtype not in _NO_CODES
        is_codes = is_packed or _CODES.search(name)
        if name.endswith(".absmax") or (is_codes and not tensor.is_float):
            by = f" by {method}" if method else ""
            raise CheckpointError(
                f"{path} is quantised{by}, and the layout of {name} ({tensor.dtype}, {tensor.shape}) is not read; "
                "dequantise it with the library that wrote it and save that."
            )


def _as_the_model_has_them(
    tensors: dict[str, StoredTensor], config: Mapping[str, Any] | None
) -> dict[str, StoredTensor]:
    """Quantising makes a linear layer, out × in, of GPT-2's Conv1D; its weight is stored as in × out."""
    architecture = recognise({name: tensor.shape for name, tensor in tensors.items()}, config)
    for name, tensor in tensors.items():
        if not tensor.is_quantised or len(tensor.shape) != 2:
            continue
        matrix = architecture.matrix(name, tensor.shape)
        if matrix and matrix.in_by_out and matrix.parts[0].role not in EMBEDDINGS:
            tensors[name] = turned(tensor)
    return tensors

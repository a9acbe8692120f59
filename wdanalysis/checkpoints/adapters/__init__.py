"""Adapters: from tensors and configuration to what they do to each weight, a module for each format.

Each adapted module becomes a `LowRankUpdate`, or a `FormulaUpdate` where that is not W0 + s·BA; what replaces a tensor
of the base outright (`modules_to_save`, trained biases, a resized embedding) gets the name that it has in the base. A
new format is a module with an `AdapterFormat`, and a place in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from wdanalysis.checkpoints.adapters import (
    kohya,
    peft_formulas,
    peft_general,
    peft_lora,
    peft_vera,
    unsupported,
)
from wdanalysis.checkpoints.adapters.formats import Adapter, AdapterFormat, AdapterSource
from wdanalysis.checkpoints.adapters.peft_config import check_readable, peft_type
from wdanalysis.checkpoints.tensors import Checkpoint, StoredTensor
from wdanalysis.decomposition import Axis

__all__ = ["FORMATS", "Adapter", "AdapterFormat", "AdapterSource", "is_adapter", "read_adapter"]

FORMATS: tuple[AdapterFormat, ...] = (
    kohya.FORMAT,
    *unsupported.FORMATS,
    peft_vera.FORMAT,
    *peft_formulas.FORMATS,
    peft_lora.FORMAT,
)
"""Every format that is known by its keys; the first that recognises them reads an adapter, and the last one what none
recognises."""


def is_adapter(names: Iterable[str]) -> bool:
    """Whether tensors of these names belong to an adapter of any format."""
    names = tuple(names)
    return any(known.recognises(names) for known in FORMATS)


def read_adapter(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    config: Mapping[str, Any] | None,
    alpha: float | None,
    base: Checkpoint | None = None,
    *,
    metadata: Mapping[str, str] = MappingProxyType({}),
    dora_axis: Axis | None = None,
) -> Adapter:
    """Sort an adapter's tensors into updates and tensors that replace those of the base.

    Parameters
    ----------
    path
        The file or folder, for messages.
    tensors
        All tensors of the adapter, by their names in the file.
    config
        `adapter_config.json`; None where there is none.
    alpha
        The scale's numerator where `config` is None; not used otherwise, nor by VeRA, which has no scale.
    base
        The model that the adapter is applied to, where it is known.
    metadata, dora_axis
        As in `AdapterSource`.

    Raises
    ------
    CheckpointError
        It tunes no weights, its tensors do not fit together or to the base, or α is not known.
    """
    if config is not None:
        check_readable(path, config)
    source = AdapterSource(path, tensors, config, alpha, base, metadata, dora_axis)
    return _format_of(tensors, config).read(source)


def _format_of(names: Iterable[str], config: Mapping[str, Any] | None) -> AdapterFormat:
    """Return the format that the configuration names, or else the one that knows the keys."""
    if config is not None and config.get("peft_type"):
        kind = peft_type(config)
        return next((known for known in FORMATS if kind in known.types), peft_general.FORMAT)
    names = tuple(names)
    return next((known for known in FORMATS if known.recognises(names)), FORMATS[-1])

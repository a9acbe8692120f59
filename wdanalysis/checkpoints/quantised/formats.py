"""The interface of a quantised format: its name, and how its weights are found among a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wdanalysis.checkpoints.quantised.blocks import QuantisedWeight, misfit
from wdanalysis.checkpoints.tensors import StoredTensor


@dataclass(frozen=True)
class PackedSource:
    """What is there to find quantised weights in.

    Attributes
    ----------
    path
        The checkpoint, for messages.
    tensors
        Those that no other format took.
    settings
        What `config.json` says of the quantisation; empty where it says nothing.
    metadata
        safetensors' `__metadata__`.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    settings: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def ending(self, suffix: str) -> Iterator[tuple[str, StoredTensor]]:
        """Every tensor whose name ends so, with the name before it."""
        for name, tensor in self.tensors.items():
            if name.endswith(suffix):
                yield name.removesuffix(suffix), tensor

    def part(self, of: StoredTensor, name: str, what: str) -> StoredTensor:
        """A tensor that a weight cannot do without.

        Raises
        ------
        CheckpointError
            It is not there.
        """
        if name not in self.tensors:
            raise misfit(of, what, f"{name} is not there")
        return self.tensors[name]

    def parts(self, *names: str) -> tuple[StoredTensor, ...]:
        """Those of the names that are there."""
        return tuple(self.tensors[name] for name in names if name in self.tensors)


@dataclass(frozen=True)
class QuantisedFormat:
    """One format.

    Attributes
    ----------
    name
        What it is called: ``bitsandbytes``, ``GPTQ`` …
    find
        Yields every weight of this format. Raises `CheckpointError` where a weight lacks a part, or they do not fit
        together.
    """

    name: str
    find: Callable[[PackedSource], Iterator[QuantisedWeight]]

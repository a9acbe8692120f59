"""What each method of tuning trains, and what it takes where nothing else is said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class Method:
    """A method of tuning.

    Attributes
    ----------
    name
        By which plans, folders and the command know it.
    update
        How the direction is updated: ``lora``, ``vera``; None: every weight itself is trained.
    magnitude
        Whether m is trained as well.
    learning_rate
        Where none is given: Table 8's for LoRA and DoRA, Table 11's for VeRA and DVoRA, the usual one for full tuning.
    rank
        Where none is given; VeRA's shared matrices cost no trained parameters, and its authors take large ones.
    """

    name: str
    update: Literal["lora", "vera"] | None
    magnitude: bool
    learning_rate: float
    rank: int | None = None


FULL_TUNING = "ft"

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Method(FULL_TUNING, None, magnitude=False, learning_rate=2e-5),
            Method("lora", "lora", magnitude=False, learning_rate=2e-4, rank=8),
            Method("dora", "lora", magnitude=True, learning_rate=2e-4, rank=8),
            Method("vera", "vera", magnitude=False, learning_rate=4e-3, rank=256),
            Method("dvora", "vera", magnitude=True, learning_rate=4e-3, rank=256),
        )
    }
)
"""Every method by its name."""

ADAPTER_METHODS: Mapping[str, Method] = MappingProxyType(
    {name: method for name, method in METHODS.items() if method.update is not None}
)
"""Those that leave the weights and train an adapter beside them."""

"""The types in which numbers are stored: the only table of them, and the only way from their bits to numbers.

A type has its name in safetensors' spelling wherever the package speaks of it. numpy has no bfloat16: its numbers
travel as their 16 bits (uint16), and `widen` or `to_torch` makes numbers of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StoredType:
    """One type.

    Attributes
    ----------
    name
        In safetensors' spelling.
    bits
        Of one number.
    torch
        torch's name of it; None where torch has none.
    storage
        The numpy type in which its numbers travel; None where the three sums cannot be taken of them.
    fraction_bits
        Of their significand, without the leading one: ulp(w) = 2^(exponent of w − fraction bits).
    """

    name: str
    bits: int
    torch: str | None = None
    storage: type[np.generic] | None = None
    fraction_bits: int = 0


STORED_TYPES: Mapping[str, StoredType] = MappingProxyType(
    {
        stored.name: stored
        for stored in (
            StoredType("F64", 64, "float64", np.float64, 52),
            StoredType("F32", 32, "float32", np.float32, 23),
            StoredType("F16", 16, "float16", np.float16, 10),
            StoredType("BF16", 16, "bfloat16", np.uint16, 7),
            StoredType("F8_E4M3", 8, "float8_e4m3fn"),
            StoredType("F8_E5M2", 8, "float8_e5m2"),
            StoredType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
            StoredType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
            StoredType("F8_E8M0", 8, "float8_e8m0fnu"),
            StoredType("F6_E2M3", 6),
            StoredType("F6_E3M2", 6),
            StoredType("F4", 4),
            StoredType("C64", 64, "complex64"),
            StoredType("I64", 64, "int64"),
            StoredType("I32", 32, "int32"),
            StoredType("I16", 16, "int16"),
            StoredType("I8", 8, "int8"),
            StoredType("U64", 64, "uint64"),
            StoredType("U32", 32, "uint32"),
            StoredType("U16", 16, "uint16"),
            StoredType("U8", 8, "uint8"),
            StoredType("BOOL", 8, "bool"),
        )
    }
)
"""Every type of the safetensors format, by its name."""

FLOATS: Mapping[str, type[np.generic]] = MappingProxyType(
    {stored.name: stored.storage for stored in STORED_TYPES.values() if stored.storage is not None}
)
"""The types that can be compared, with the numpy type in which each travels."""

OF_TORCH: Mapping[str, str] = MappingProxyType(
    {stored.torch: stored.name for stored in STORED_TYPES.values() if stored.torch is not None}
)
"""The name of a type by torch's name of it."""


def of_torch(dtype: torch.dtype) -> str:
    """Return the name of a torch type; torch's own name where safetensors has none."""
    name = str(dtype).removeprefix("torch.")
    return OF_TORCH.get(name, name)


def torch_type(name: str) -> torch.dtype:
    """Return torch's type of this name.

    >>> torch_type("BF16")
    torch.bfloat16
    """
    import torch

    dtype: torch.dtype = getattr(torch, STORED_TYPES[name].torch or name)
    return dtype


def working_type(*names: str) -> type[np.float32] | type[np.float64]:
    """Return the type to calculate in: float32, or float64 where one of these types is."""
    return np.float64 if "F64" in names else np.float32


def widen(stored: NDArray[Any], to: type[np.floating[Any]] = np.float64) -> NDArray[Any]:
    """Return the numbers of a stored block, exactly; a view of it where they are already of that type.

    Parameters
    ----------
    stored
        Of one of the numpy types of `FLOATS`.
    to
        float64, or float32 for numbers that are not stored in 64 bits.

    Examples
    --------
    >>> widen(np.array([0x3F80, 0xC000], np.uint16))
    array([ 1., -2.])
    """
    numbers = bfloat16_value(stored) if stored.dtype == np.uint16 else stored
    return numbers.astype(to, copy=False)


def narrow(numbers: NDArray[Any], name: str) -> NDArray[Any]:
    """Return numbers rounded to the nearest of a type (ties to even), as that type is stored.

    Parameters
    ----------
    numbers
        float32 or float64, none of them NaN where the type is bfloat16.
    name
        One of `FLOATS`.

    Examples
    --------
    >>> narrow(np.array([1.0, -2.0]), "BF16")
    array([16256, 49152], dtype=uint16)
    """
    with np.errstate(over="ignore"):
        if name != "BF16":
            return numbers.astype(FLOATS[name])
        bits = numbers.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bfloat16_value(bits: Any) -> Any:
    """Return the float32 numbers of bfloat16's bits, their upper half: of an array, or compiled, of one."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


def to_torch(stored: NDArray[Any]) -> torch.Tensor:
    """Return a stored block as a torch tensor of its own type; both share their memory."""
    import torch

    tensor = torch.from_numpy(stored)
    return tensor.view(torch.bfloat16) if stored.dtype == np.uint16 else tensor


def from_torch(tensor: torch.Tensor) -> NDArray[Any]:
    """Return the numbers of a contiguous torch tensor on the CPU as they are stored; both share their memory."""
    import torch

    stored: NDArray[Any] = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return stored

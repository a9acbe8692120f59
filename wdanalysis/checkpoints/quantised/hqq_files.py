"""HQQ: codes of a weight that is reshaped into groups, with a scale and a zero, not rounded, for each.

The weight is groups × group size, or the other way round (`axis`). Packed are whole rows of that: the first half of
them lies in the high bits, the second in the low ones (or ten tenths in words of 32 bits, for codes of three).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from wdanalysis.checkpoints.dtypes import FLOATS, OF_TORCH
from wdanalysis.checkpoints.quantised.blocks import (
    Block,
    Codes,
    Floats,
    Kept,
    QuantisedWeight,
    codes_of,
    floats_of,
    misfit,
)
from wdanalysis.checkpoints.quantised.formats import PackedSource, QuantisedFormat
from wdanalysis.checkpoints.tensors import StoredTensor

_PACKINGS = {"8bit_u8": (8, 8), "4bit_u8": (4, 8), "3bit_32": (3, 30), "2bit_u8": (2, 8), "1bit_u8": (1, 8)}
"""Bits of a code, and of all codes in a word."""


def _find(source: PackedSource) -> Iterator[QuantisedWeight]:
    for module, packed in source.ending(".W_q"):
        part = {
            name: source.part(packed, f"{module}.{name}", "HQQ")
            for name in ("scale", "zero", "shape", "packing")
        }
        shape = tuple(int(n) for n in _integers(part["shape"]))
        packing = _text(part["packing"])
        dtype = OF_TORCH.get(
            _text(source.tensors.get(f"{module}.compute_dtype")).removeprefix("torch."), "F16"
        )
        scale, zero = part["scale"], part["zero"]
        if packing not in _PACKINGS or len(shape) != 2 or min(shape) < 1 or dtype not in FLOATS:
            raise misfit(
                packed, "HQQ", f"its packing {packing!r}, shape {shape} or dtype is not one that is read"
            )
        size = math.prod(shape)
        if not (scale.dtype in FLOATS and zero.dtype in FLOATS and scale.size and scale.size == zero.size):
            raise misfit(scale, "HQQ", "its scales or zeros are quantised themselves, or do not fit together")
        if size % scale.size:
            raise misfit(scale, "HQQ", f"{size} elements do not have {scale.size} groups")
        bits = (
            int(_integers(source.tensors[f"{module}.nbits"])[0]) if f"{module}.nbits" in source.tensors else 0
        )
        names = _KEYS & {
            name.removeprefix(f"{module}.") for name in source.tensors if name.startswith(f"{module}.")
        }
        parts = (packed, *(source.tensors[f"{module}.{name}"] for name in sorted(names)))
        rows = _Hqq(packed, scale, zero, shape, packing)
        dtype = "F32" if dtype == "F64" else dtype
        yield QuantisedWeight(
            f"{module}.weight", shape, dtype, f"HQQ-{bits or _PACKINGS[packing][0]}", parts, rows
        )


_KEYS = frozenset(
    {"nbits", "group_size", "shape", "scale", "zero", "axis", "packing", "unpack_view_dtype", "view_as_float"}
    | {
        "quant_scale",
        "quant_zero",
        "compute_dtype",
        "offload_meta",
        "encoded_state_dict",
        "stores_quant_config",
    }
    | {"channel_wise", "optimize", "round_zero", "packed_dim"}
)


class _Hqq:
    """Rows of a weight of HQQ; the codes, a byte each, are kept while it is read."""

    def __init__(
        self,
        packed: StoredTensor,
        scale: StoredTensor,
        zero: StoredTensor,
        shape: tuple[int, int],
        packing: str,
    ) -> None:
        self._packed, self._scale, self._zero, self._shape, self._packing = (
            packed,
            scale,
            zero,
            shape,
            packing,
        )
        self._kept = Kept(shape[0], self._read)

    def _read(self) -> tuple[Codes, Floats, Floats]:
        """Codes by element, and scales and zeros by group."""
        bits, width = _PACKINGS[self._packing]
        stored = np.dtype(np.uint32 if width == 30 else np.uint8)
        words = self._packed.read_bytes().view(stored)  # some are stored as floats of the same bits
        shifts = range(width - bits, -1, -bits)
        codes = np.concatenate([words >> shift & ((1 << bits) - 1) for shift in shifts]).astype(np.uint8)
        size = math.prod(self._shape)
        if len(codes) < size:
            raise ValueError(f"it has {len(codes)} codes for {size} elements")
        return codes[:size], floats_of(self._scale), floats_of(self._zero)

    def __call__(self, start: int, stop: int) -> Block:
        codes, scale, zero = self._kept.until(stop)
        elements = slice(start * self._shape[1], stop * self._shape[1])
        place = np.arange(elements.start, elements.stop)
        by_columns = len(self._scale.shape) == 2 and self._scale.shape[0] == 1 and self._scale.size > 1
        group = place % scale.size if by_columns else place // (math.prod(self._shape) // scale.size)
        of_rows = (stop - start, self._shape[1])
        scales, zeros = (of.reshape(-1)[group].reshape(of_rows) for of in (scale, zero))
        return Block(codes[elements].reshape(of_rows), scales, zeros)


def _integers(tensor: StoredTensor) -> Codes:
    return (
        codes_of(tensor).reshape(-1)
        if tensor.dtype in ("I64", "I32", "U8")
        else floats_of(tensor).reshape(-1)
    )


def _text(tensor: StoredTensor | None) -> str:
    return "" if tensor is None else tensor.read_bytes().tobytes().decode(errors="replace")


FORMAT = QuantisedFormat("HQQ", _find)

"""HQQ: codes of a weight that is reshaped into groups, with a scale and a zero, not rounded, for each.

The weight is groups × group size, or the other way round (`axis`). Packed are whole rows of that: the first half of
them lies in the high bits, the second in the low ones (or ten tenths in words of 32 bits, for codes of three).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

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


class _Layout(NamedTuple):
    """What HQQ stores of a weight beside its numbers."""

    shape: tuple[int, int]
    packing: str
    dtype: str


def _find(source: PackedSource) -> Iterator[QuantisedWeight]:
    for module, packed in source.ending(".W_q"):
        part = {name: source.part(packed, f"{module}.{name}", "HQQ") for name in _NEEDED}
        scale, zero, layout = part["scale"], part["zero"], _layout(packed, part, source.tensors.get)
        if not (scale.dtype in FLOATS and zero.dtype in FLOATS and scale.size and scale.size == zero.size):
            raise misfit(scale, "HQQ", "its scales or zeros are quantised themselves, or do not fit together")
        if math.prod(layout.shape) % scale.size:
            raise misfit(scale, "HQQ", f"{math.prod(layout.shape)} elements do not have {scale.size} groups")
        bits = int(_integers(part["nbits"])[0])
        parts = (packed, *source.parts(*(f"{module}.{name}" for name in _KEYS)))
        rows = _Hqq(packed, scale, zero, layout)
        yield QuantisedWeight(f"{module}.weight", layout.shape, layout.dtype, f"HQQ-{bits}", parts, rows)


def _layout(
    packed: StoredTensor, part: Mapping[str, StoredTensor], find: Callable[[str], StoredTensor | None]
) -> _Layout:
    shape, packing = [int(n) for n in _integers(part["shape"])], _text(part["packing"])
    dtype = find(packed.name.removesuffix("W_q") + "compute_dtype")
    name = "F16" if dtype is None else OF_TORCH.get(_text(dtype).removeprefix("torch."), "")
    if (
        packing not in _PACKINGS
        or len(shape) != 2
        or min(shape) < 1
        or name not in FLOATS
        or not part["nbits"].size
    ):
        raise misfit(
            packed, "HQQ", f"its packing {packing!r}, shape {tuple(shape)} or dtype is not one that is read"
        )
    return _Layout((shape[0], shape[1]), packing, "F32" if name == "F64" else name)


_NEEDED = ("scale", "zero", "shape", "packing", "nbits")
_KEYS = (
    *_NEEDED,
    *(
        "group_size",
        "axis",
        "unpack_view_dtype",
        "view_as_float",
        "quant_scale",
        "quant_zero",
        "compute_dtype",
    ),
    *("offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero"),
)
"""What HQQ saves beside the codes."""


class _Hqq:
    """Rows of a weight of HQQ; the codes, a byte each, are kept while it is read."""

    def __init__(
        self, packed: StoredTensor, scale: StoredTensor, zero: StoredTensor, layout: _Layout
    ) -> None:
        self._packed, self._scale, self._zero = packed, scale, zero
        self._shape, self._packing, self._dtype = layout
        self._kept = Kept(self._shape[0], self._read)

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
        return Block(codes[elements].reshape(of_rows), scales, zeros, rounded_to=self._dtype)


def _integers(tensor: StoredTensor) -> Codes:
    return (
        codes_of(tensor).reshape(-1)
        if tensor.dtype in ("I64", "I32", "U8")
        else floats_of(tensor).reshape(-1)
    )


def _text(tensor: StoredTensor) -> str:
    return tensor.read_bytes().tobytes().decode(errors="replace")


FORMAT = QuantisedFormat("HQQ", _find)

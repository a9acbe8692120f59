"""MXFP4 and NVFP4: two E2M1 numbers in a byte, the first in the low bits, with a scale for each 32 or 16 of them.

MXFP4: the scale is a power of two (E8M0). gpt-oss, compressed-tensors, Quark, DeepSeek.
NVFP4: the scale is E4M3, times one float for the tensor. ModelOpt stores that as `weight_scale_2`,
compressed-tensors its inverse as `weight_global_scale`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import numpy as np

from wdanalysis.checkpoints.quantised.blocks import (
    Block,
    CodeBook,
    Floats,
    Kept,
    QuantisedWeight,
    codes_of,
    floats_of,
    misfit,
)
from wdanalysis.checkpoints.quantised.formats import PackedSource, QuantisedFormat
from wdanalysis.checkpoints.quantised.packing import float_values, unpack_nibbles
from wdanalysis.checkpoints.quantised.scaled import scales_of
from wdanalysis.checkpoints.tensors import StoredTensor

_BYTES = ("U8", "I8")


@cache
def e2m1() -> CodeBook:
    """The levels of a float of four bits."""
    return CodeBook.of(float_values("F4"))


class _Rows:
    """Rows of a weight in bytes of two numbers, with a scale for each group along the last dimension."""

    def __init__(
        self,
        packed: StoredTensor,
        scale: StoredTensor,
        *,
        factor: StoredTensor | None = None,
        divides: bool = False,
        turned: bool = False,
    ) -> None:
        self._packed, self._scale, self._factor = packed, scale, factor
        self._divides, self._turned = divides, turned
        self._group = 2 * packed.size // scale.size
        self._kept = Kept(packed.rows, self._read)

    def _read(self) -> Floats:
        scale = scales_of(self._scale)
        if self._factor is None:
            return scale
        factor = floats_of(self._factor).reshape(())
        return np.asarray(scale / factor if self._divides else scale * factor, np.float32)

    def __call__(self, start: int, stop: int) -> Block:
        scale = np.repeat(self._kept.until(stop)[start:stop], self._group, axis=-1)
        codes = unpack_nibbles(codes_of(self._packed, start, stop).view(np.uint8)).reshape(scale.shape)
        if self._turned:
            codes, scale = codes.swapaxes(-1, -2), scale.swapaxes(-1, -2)
        return Block(codes, scale, book=e2m1())


def _find_experts(source: PackedSource) -> Iterator[QuantisedWeight]:
    """gpt-oss: experts × rows × groups × 16 bytes, which stand for a weight that is stored as in × out."""
    for name, packed in source.ending("_blocks"):
        if packed.dtype != "U8" or len(packed.shape) < 3:
            continue
        scale = source.part(packed, f"{name}_scales", "MXFP4")
        if scale.dtype not in ("U8", "F8_E8M0") or scale.shape != packed.shape[:-1] or not packed.size:
            raise misfit(
                scale, "MXFP4", f"its shape {scale.shape} does not fit blocks of shape {packed.shape}"
            )
        *lead, rows = packed.shape[:-2]
        inputs = 2 * math.prod(packed.shape[-2:])
        shape = (*lead, inputs, rows) if lead else (rows, inputs)
        reader = _Rows(packed, scale, turned=bool(lead))
        yield QuantisedWeight(name, shape, "BF16", "MXFP4", (packed, scale), reader)


def _find(source: PackedSource) -> Iterator[QuantisedWeight]:
    for name, packed in source.tensors.items():
        weight = name.removesuffix("_packed")
        scales = source.parts(
            f"{weight}_scale", f"{weight}_scale_inv", f"{weight.removesuffix('.weight')}.scale"
        )
        if packed.dtype not in _BYTES or len(packed.shape) < 2 or not scales or not packed.size:
            continue
        scale, shape = scales[0], (*packed.shape[:-1], 2 * packed.shape[-1])
        groups = scale.shape[:-1] == packed.shape[:-1] and scale.shape[-1] and shape[-1] / scale.shape[-1]
        if scale.dtype in ("U8", "F8_E8M0") and groups == 32:
            yield QuantisedWeight(weight, shape, "BF16", "MXFP4", (packed, scale), _Rows(packed, scale))
        elif scale.dtype == "F8_E4M3" and groups == 16:
            factors = source.parts(f"{weight}_scale_2", f"{weight}_global_scale")
            if len(factors) != 1 or factors[0].size != 1:
                raise misfit(packed, "NVFP4", f"{weight}_scale_2 or {weight}_global_scale is not there")
            divides = factors[0].name.endswith("_global_scale")
            rows = _Rows(packed, scale, factor=factors[0], divides=divides)
            yield QuantisedWeight(weight, shape, "BF16", "NVFP4", (packed, scale, *factors), rows)


EXPERTS = QuantisedFormat("MXFP4 of gpt-oss", _find_experts)
FORMAT = QuantisedFormat("MXFP4 or NVFP4", _find)

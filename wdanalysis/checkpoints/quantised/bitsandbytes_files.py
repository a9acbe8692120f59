"""bitsandbytes: NF4 and FP4 by a table of sixteen levels, and LLM.int8() by row."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from wdanalysis.checkpoints.dtypes import FLOATS, OF_TORCH
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
from wdanalysis.checkpoints.quantised.packing import unpack_nibbles
from wdanalysis.checkpoints.tensors import StoredTensor

_STATE = ".quant_state.bitsandbytes__"
_INT8_UNIT = np.float32(7.874015718698502e-3)  # 1/127, as bitsandbytes writes it
_4BIT_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


@dataclass(frozen=True)
class _State:
    """The JSON that is stored beside a weight of four bits."""

    kind: str
    blocksize: int
    dtype: str
    shape: tuple[int, ...]
    nested_blocksize: int | None
    nested_offset: float

    @classmethod
    def of(cls, tensor: StoredTensor) -> _State:
        try:
            match json.loads(tensor.read_bytes().tobytes().decode()):
                case {"quant_type": str(kind), "blocksize": int(size), "dtype": str(dtype), **more}:
                    shape: Any = more.get("shape")
                case _:
                    raise misfit(
                        tensor, "a weight of bitsandbytes", "it has no type, block size, dtype and shape"
                    )
        except (ValueError, RecursionError) as error:
            raise misfit(tensor, "a weight of bitsandbytes", "it is no JSON") from error
        nested: Any = more.get("nested_blocksize")
        offset: Any = more.get("nested_offset", 0.0)
        stored = OF_TORCH.get(dtype, dtype)
        sizes = [size, *(shape if isinstance(shape, list) else []), *([] if nested is None else [nested])]
        if (
            stored not in FLOATS
            or not (isinstance(shape, list) and shape)
            or not all(type(n) is int and 0 < n < 2**40 for n in sizes)
            or not isinstance(offset, int | float)
        ):
            raise misfit(tensor, "a weight of bitsandbytes", "its sizes or its dtype cannot be")
        return cls(
            kind.upper(), size, "F32" if stored == "F64" else stored, tuple(shape), nested, float(offset)
        )


def _find_4bit(source: PackedSource) -> Iterator[QuantisedWeight]:
    for name, tensor in source.tensors.items():
        weight_name, found, _ = name.partition(_STATE)
        if not found:
            continue
        state = _State.of(tensor)
        codes = source.part(tensor, weight_name, state.kind)
        absmax = source.part(tensor, f"{weight_name}.absmax", state.kind)
        levels = source.part(tensor, f"{weight_name}.quant_map", state.kind)
        nested = source.parts(f"{weight_name}.nested_absmax", f"{weight_name}.nested_quant_map")
        size, blocks = math.prod(state.shape), -(-math.prod(state.shape) // state.blocksize)
        if codes.dtype not in ("U8", "I8") or codes.size * 2 != size + size % 2:
            raise misfit(
                codes, state.kind, f"it is {codes.shape} {codes.dtype} for a weight of shape {state.shape}"
            )
        if absmax.size != blocks or levels.size != 16 or (state.nested_blocksize and len(nested) != 2):
            raise misfit(absmax, state.kind, f"its {absmax.size} blocks are not those of shape {state.shape}")
        parts = (codes, tensor, *source.parts(*(weight_name + part for part in _4BIT_PARTS)))
        rows = _FourBit(state, codes, absmax, levels, nested)
        yield QuantisedWeight(weight_name, state.shape, state.dtype, state.kind, parts, rows)


class _FourBit:
    """Rows of NF4 or FP4: codes lie one after the other, without regard to rows, the first in the high bits."""

    def __init__(
        self,
        state: _State,
        codes: StoredTensor,
        absmax: StoredTensor,
        levels: StoredTensor,
        nested: tuple[StoredTensor, ...],
    ) -> None:
        self._state, self._codes, self._absmax, self._levels, self._nested = (
            state,
            codes,
            absmax,
            levels,
            nested,
        )
        self._length = math.prod(state.shape[1:])
        self._kept = Kept(state.shape[0], self._read)

    def _read(self) -> tuple[Floats, CodeBook]:
        """The largest magnitude of each block, and what the codes stand for in it."""
        absmax = self._absmax
        scale = floats_of(absmax).reshape(-1)
        if self._state.nested_blocksize and len(self._nested) == 2:
            largest, levels = (floats_of(part).reshape(-1) for part in self._nested)
            of_block = np.arange(len(scale)) // self._state.nested_blocksize
            scale = levels[codes_of(absmax).reshape(-1)] * largest[of_block] + np.float32(
                self._state.nested_offset
            )
        return scale, CodeBook.of(floats_of(self._levels).reshape(-1))

    def __call__(self, start: int, stop: int) -> Block:
        scale, book = self._kept.until(stop)
        first, last = start * self._length, stop * self._length
        per_row = self._codes.row_length  # one byte in the files that bitsandbytes writes
        packed = codes_of(self._codes, first // 2 // per_row, -(-last // 2 // per_row))
        skipped = first - first // 2 // per_row * per_row * 2
        codes = unpack_nibbles(packed.reshape(-1).view(np.uint8), high_first=True)[
            skipped : skipped + last - first
        ]
        blocksize = self._state.blocksize
        of_blocks = np.repeat(scale[first // blocksize : -(-last // blocksize)], blocksize)
        of_codes = of_blocks[first % blocksize :][: last - first]
        return Block(codes.reshape(stop - start, -1), of_codes.reshape(stop - start, -1), book=book)


def _find_int8(source: PackedSource) -> Iterator[QuantisedWeight]:
    for module, scale in source.ending(".SCB"):
        codes = source.part(scale, f"{module}.weight", "LLM.int8()")
        if codes.dtype != "I8" or len(codes.shape) != 2 or scale.size != codes.rows:
            raise misfit(codes, "LLM.int8()", f"it is {codes.shape} {codes.dtype} for {scale.size} scales")
        parts = (codes, scale, *source.parts(f"{module}.weight_format"))
        yield QuantisedWeight(codes.name, codes.shape, "F32", "INT8", parts, _Int8(codes, scale))


@dataclass(frozen=True)
class _Int8:
    """Rows of LLM.int8()."""

    codes: StoredTensor
    scale: StoredTensor

    def __call__(self, start: int, stop: int) -> Block:
        largest = floats_of(self.scale).reshape(-1, 1)[start:stop]
        return Block(codes_of(self.codes, start, stop), largest * _INT8_UNIT)


FOUR_BIT = QuantisedFormat("bitsandbytes 4-bit", _find_4bit)
INT8 = QuantisedFormat("bitsandbytes 8-bit", _find_int8)

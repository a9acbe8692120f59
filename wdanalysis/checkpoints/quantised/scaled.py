"""Codes of eight bits, each in an element of its own, with a scale for the tensor, each row, or each block: FP8, INT8.

So store transformers' fine-grained FP8, FBGEMM, compressed-tensors, ModelOpt, Quark, ComfyUI and torchao. Small floats
without a scale are what they stand for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
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
from wdanalysis.checkpoints.quantised.packing import SMALL_FLOATS, float_values
from wdanalysis.checkpoints.tensors import StoredTensor

_EDGE = 128
"""Of a block where config.json does not say it; the last one of a row or column may be smaller."""


def scales_of(tensor: StoredTensor) -> Floats:
    """Read scales of any type; bytes are exponents (E8M0)."""
    return float_values("F8_E8M0")[codes_of(tensor)] if tensor.dtype == "U8" else floats_of(tensor)


def calculated_in(scale: StoredTensor) -> str:
    """The type that a product with this scale has."""
    return {"F64": "F32"}.get(scale.dtype, scale.dtype) if scale.dtype in FLOATS else "BF16"


class Scaled:
    """Rows of a weight (… × out × in) with a scale and perhaps a zero for each block of it.

    Parameters
    ----------
    codes
        The weight.
    scale, zero
        With as many dimensions as the weight, one for each block; or one for each row, or one.
    block
        Rows and columns of a block; found from the shapes where None.

    Raises
    ------
    CheckpointError
        The scales fit no blocks of the weight.
    """

    def __init__(
        self,
        codes: StoredTensor,
        scale: StoredTensor,
        zero: StoredTensor | None = None,
        block: Sequence[int] | None = None,
    ) -> None:
        self._codes, self._scale, self._zero = codes, scale, zero
        *self._lead, outputs, self._inputs = codes.shape
        self._outputs = outputs
        self._grid = self._grid_of(scale)
        if zero is not None and zero.size != scale.size:
            raise misfit(zero, "quantised weights", f"it has {zero.size} zeros for {scale.size} scales")
        edges = block or (None, None)
        self._block = tuple(
            self._edge(length, count, edge)
            for length, count, edge in zip((outputs, self._inputs), self._grid[-2:], edges, strict=True)
        )
        self._book = _book(codes.dtype) if codes.dtype in SMALL_FLOATS else None
        self._kept = Kept(codes.rows, self._read)

    def _grid_of(self, scale: StoredTensor) -> tuple[int, ...]:
        """The scales' shape with all dimensions of the weight."""
        if scale.size == 1:
            return (*(1 for _ in self._lead), 1, 1)
        if len(scale.shape) == 1 and scale.size == self._outputs and not self._lead:
            return (scale.size, 1)
        leads = scale.shape[:-2]
        if len(scale.shape) != len(self._codes.shape) or leads not in (tuple(self._lead), (1,) * len(leads)):
            raise self._unfit()
        return scale.shape

    def _edge(self, length: int, count: int, edge: int | None) -> int:
        for size in (edge, _EDGE):
            if size and -(-length // size) == count:
                return size
        if count and length % count == 0:
            return length // count
        raise self._unfit()

    def _unfit(self) -> Exception:
        shape, scale = self._codes.shape, self._scale
        return misfit(
            scale, "quantised weights", f"its shape {scale.shape} does not divide a weight of shape {shape}"
        )

    def _read(self) -> tuple[Floats, Floats | None]:
        """Scales and zeros, for every row of blocks, lead by lead."""
        lead = (*self._lead, *self._grid[-2:])
        scale, zero = (
            None if part is None else np.broadcast_to(read(part).reshape(self._grid), lead)
            for part, read in ((self._scale, scales_of), (self._zero, floats_of))
        )
        assert scale is not None
        return scale, zero

    def __call__(self, start: int, stop: int) -> Block:
        """Rows `start:stop` of the first dimension."""
        scale, zero = self._kept.until(stop)
        codes = codes_of(self._codes, start, stop)
        of_elements = self._of_elements
        zeros = 0.0 if zero is None else of_elements(zero, start, stop)
        return Block(codes, of_elements(scale, start, stop), zeros, book=self._book)

    def _of_elements(self, grid: Floats, start: int, stop: int) -> Floats:
        """For each element of the rows the entry of its block; one for a row where a row has one."""
        height, width = self._block
        if self._lead:
            rows = np.repeat(grid[start:stop], height, axis=-2)[..., : self._outputs, :]
        else:
            rows = grid[np.arange(start, stop) // height]
        return rows if rows.shape[-1] == 1 else np.repeat(rows, width, axis=-1)[..., : self._inputs]


_BOOKS: dict[str, CodeBook] = {}


def _book(dtype: str) -> CodeBook:
    return _BOOKS.setdefault(dtype, CodeBook.of(float_values(dtype)))


def _find(source: PackedSource) -> Iterator[QuantisedWeight]:
    for name, codes in source.tensors.items():
        if codes.dtype not in (*SMALL_FLOATS, "I8") or len(codes.shape) < 2 or not codes.size:
            continue
        stem = name.removesuffix(".weight")
        scales = source.parts(f"{name}_scale_inv", f"{name}_scale", f"{stem}.scale_weight", f"{stem}.scale")
        if not scales:
            continue
        scale, *others = scales
        if others or scale.dtype not in (*FLOATS, "F8_E8M0", "U8"):
            raise misfit(
                scale,
                "quantised weights",
                "it is one of several, or its type is none of scales",
            )
        zero = source.tensors.get(f"{name}_zero_point")
        parts = (codes, scale, *([] if zero is None else [zero]))
        rows = Scaled(codes, scale, zero, _block_of(source))
        yield QuantisedWeight(
            name, codes.shape, calculated_in(scale), codes.dtype.replace("I8", "INT8"), parts, rows
        )


def _block_of(source: PackedSource) -> Sequence[int] | None:
    """As config.json has it: transformers' `weight_block_size`, compressed-tensors' `block_structure`."""
    block = source.settings.get("weight_block_size")
    groups = source.settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        block = block or (weights.get("block_structure") if isinstance(weights, dict) else None)
    match block:
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
    return None


@dataclass(frozen=True)
class _Cast:
    """Rows of small floats without a scale."""

    codes: StoredTensor

    def __call__(self, start: int, stop: int) -> Block:
        codes = codes_of(self.codes, start, stop).reshape(stop - start, -1)
        return Block(codes, np.ones((1, 1), np.float32), book=_book(self.codes.dtype))


def _find_casts(source: PackedSource) -> Iterator[QuantisedWeight]:
    for name, codes in source.tensors.items():
        if codes.dtype in SMALL_FLOATS and codes.shape and codes.size:
            yield QuantisedWeight(name, codes.shape, "F16", codes.dtype, (codes,), _Cast(codes))


_TORCHAO_TYPES = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")


def _find_torchao(source: PackedSource) -> Iterator[QuantisedWeight]:
    for name, text in source.metadata.items():
        module, dot, parameter = name.rpartition(".")
        prefix = f"{module}{dot}_{parameter}_"
        codes = source.tensors.get(f"{prefix}qdata")
        if codes is None:
            continue
        kind, data = _described(codes, text)
        if kind not in _TORCHAO_TYPES or codes.dtype not in (*SMALL_FLOATS, "I8"):
            raise misfit(
                codes, f"torchao's {kind}", "this kind is not read: dequantise the model with torchao"
            )
        scale = source.part(codes, f"{prefix}scale", "torchao")
        zero = source.tensors.get(f"{prefix}zero_point")
        match data:
            case {"block_size": [*_, int(height), int(width)], "dtype": {"_data": str(torch_name)}}:
                dtype = OF_TORCH.get(torch_name, torch_name)
            case _:
                raise misfit(codes, "torchao", "its metadata has no block size and dtype")
        if dtype not in FLOATS or height < 1 or width < 1 or len(codes.shape) < 2:
            raise misfit(codes, "torchao", "its block size or its dtype cannot be")
        match data:
            case {"target_dtype": {"_data": str(target)}}:
                precision = target.upper()
            case _:
                precision = codes.dtype.replace("I8", "INT8")
        parts = (codes, scale, *([] if zero is None else [zero]))
        rows = Scaled(codes, scale, zero, (height, width))
        yield QuantisedWeight(name, codes.shape, {"F64": "F32"}.get(dtype, dtype), precision, parts, rows)


def _described(codes: StoredTensor, text: str) -> tuple[str, dict[str, Any]]:
    try:
        match json.loads(text):
            case {"_type": str(kind), "_data": dict(data)}:
                return kind, data
    except (ValueError, RecursionError):
        pass
    raise misfit(codes, "torchao", "its metadata is no JSON of torchao")


FORMAT = QuantisedFormat("scaled FP8 or INT8", _find)
CASTS = QuantisedFormat("FP8 without scales", _find_casts)
TORCHAO = QuantisedFormat("torchao", _find_torchao)

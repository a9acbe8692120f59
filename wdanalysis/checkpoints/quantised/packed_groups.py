"""Codes in words of 32 bits along each row, with a scale for each group: compressed-tensors' packed weights, and MLX.

compressed-tensors: (q − 2^(bits−1) − zero) · scale, zeros packed along the outputs in the same way, groups in order or
by `weight_g_idx`. MLX: q · scale + bias, or for its modes mxfp4, nvfp4 and mxfp8 small floats times the scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from wdanalysis.checkpoints.dtypes import FLOATS
from wdanalysis.checkpoints.quantised.blocks import (
    Block,
    CodeBook,
    Floats,
    Kept,
    QuantisedWeight,
    codes_of,
    floats_of,
    misfit,
    spread,
)
from wdanalysis.checkpoints.quantised.formats import PackedSource, QuantisedFormat
from wdanalysis.checkpoints.quantised.four_bit_floats import e2m1
from wdanalysis.checkpoints.quantised.packing import float_values, unpack_bits
from wdanalysis.checkpoints.quantised.scaled import calculated_in
from wdanalysis.checkpoints.tensors import StoredTensor

_WORDS = ("I32", "U32")


class _CompressedRows:
    """Rows of a packed weight of compressed-tensors."""

    def __init__(
        self,
        packed: StoredTensor,
        scale: StoredTensor,
        zero: StoredTensor | None,
        group: StoredTensor | None,
        inputs: int,
        bits: int,
    ) -> None:
        self._packed, self._scale, self._zero, self._group = packed, scale, zero, group
        self._inputs, self._bits = inputs, bits
        self._kept = Kept(packed.rows, self._read)

    def _read(self) -> tuple[Floats, Floats, Any]:
        """Scales and zeros (in codes), outputs × groups, and the group of each input where not in order."""
        rows, half = self._packed.rows, 1 << (self._bits - 1)
        scale = np.broadcast_to(
            floats_of(self._scale).reshape(-1, self._scale.row_length or 1), (rows, self._groups)
        )
        zero = np.full((1, 1), half, np.float32)
        if self._zero is not None and self._zero.dtype in _WORDS:
            words = np.ascontiguousarray(codes_of(self._zero).view(np.uint32).T)
            zero = unpack_bits(words, self._bits, rows).T.astype(np.float32)
        elif self._zero is not None:
            zero = floats_of(self._zero).reshape(-1, self._groups) + half
        order = None if self._group is None else codes_of(self._group).reshape(-1)
        return (
            scale,
            np.broadcast_to(zero, (rows, self._groups)),
            None if order is None or (order < 0).any() else order,
        )

    @property
    def _groups(self) -> int:
        return self._scale.row_length if len(self._scale.shape) == 2 else 1

    def __call__(self, start: int, stop: int) -> Block:
        scale, zero, order = self._kept.until(stop)
        codes = unpack_bits(codes_of(self._packed, start, stop).view(np.uint32), self._bits, self._inputs)
        scales, zeros = (
            spread(of[start:stop], self._inputs) if order is None else of[start:stop][:, order]
            for of in (scale, zero)
        )
        return Block(codes, scales, zeros)


def _find_compressed(source: PackedSource) -> Iterator[QuantisedWeight]:
    what = "a packed weight of compressed-tensors"
    for weight, packed in source.ending("_packed"):
        if packed.dtype not in _WORDS or len(packed.shape) != 2 or not packed.size:
            continue
        scale = source.part(packed, f"{weight}_scale", what)
        zero, group, shape = (
            source.tensors.get(f"{weight}_{part}") for part in ("zero_point", "g_idx", "shape")
        )
        if shape is None or shape.dtype not in ("I64", "I32") or shape.size != 2:
            raise misfit(packed, what, f"{weight}_shape is not there or no shape of a matrix")
        outputs, inputs = (int(n) for n in codes_of(shape).reshape(-1))
        bits = packed.row_length * 32 // inputs if inputs > 0 else 0
        groups = scale.row_length if len(scale.shape) == 2 else 1
        fits = (
            outputs == packed.rows
            and 1 <= bits <= 8
            and -(-inputs * bits // 32) == packed.row_length
            and scale.dtype in FLOATS
            and scale.size in (1, outputs * groups)
            and groups > 0
            and (group is not None or inputs % groups == 0)
            and (group is None or group.size == inputs)
        )
        if not fits:
            raise misfit(
                packed, what, f"its {packed.shape} words and {scale.shape} scales are not those of its shape"
            )
        parts = (packed, scale, *(part for part in (shape, zero, group) if part is not None))
        rows = _CompressedRows(packed, scale, zero, group, inputs, bits)
        yield QuantisedWeight(weight, (outputs, inputs), calculated_in(scale), f"INT{bits}", parts, rows)


class _Mode(NamedTuple):
    """How MLX reads codes: their width, the size of a group, and what codes and scales stand for; None: themselves."""

    bits: int
    group: int
    codes: str | None = None
    scales: str | None = None


_MLX_FLOATS: Mapping[str, _Mode] = {
    "mxfp4": _Mode(4, 32, "F4", "F8_E8M0"),
    "nvfp4": _Mode(4, 16, "F4", "F8_E4M3"),
    "mxfp8": _Mode(8, 32, "F8_E4M3", "F8_E8M0"),
}


class _MlxRows:
    """Rows of a weight of MLX; a weight of several matrices is read as all their rows."""

    def __init__(
        self,
        packed: StoredTensor,
        scales: StoredTensor,
        biases: StoredTensor | None,
        mode: _Mode,
        inputs: int,
    ) -> None:
        self._packed, self._scales, self._biases = packed, scales, biases
        self._mode, self._inputs = mode, inputs
        self._book = (
            None
            if mode.codes is None
            else e2m1()
            if mode.bits == 4
            else CodeBook.of(float_values(mode.codes))
        )

    def __call__(self, start: int, stop: int) -> Block:
        mode = self._mode
        codes = unpack_bits(codes_of(self._packed, start, stop).view(np.uint32), mode.bits, self._inputs)
        if mode.scales is None:
            scales = floats_of(self._scales, start, stop)
        else:
            scales = float_values(mode.scales)[codes_of(self._scales, start, stop)]
        scales = np.repeat(scales, mode.group, axis=-1)
        if self._biases is None:
            return Block(codes, scales, book=self._book)
        offset = np.repeat(floats_of(self._biases, start, stop), mode.group, axis=-1)
        return Block(codes, scales, offset=offset)


def _find_mlx(source: PackedSource) -> Iterator[QuantisedWeight]:
    for module, scales in source.ending(".scales"):
        packed = source.tensors.get(f"{module}.weight")
        if packed is None or packed.dtype not in ("U32", "I32") or len(packed.shape) < 2 or not packed.size:
            continue
        biases = source.parts(f"{module}.biases", f"{module}.qbiases")
        mode = _mode_of(source, module, packed, scales, has_biases=bool(biases))
        inputs = scales.shape[-1] * mode.group if scales.shape else 0
        fits = (
            packed.shape[:-1] == scales.shape[:-1]
            and inputs * mode.bits == 32 * packed.shape[-1]
            and all(part.shape == scales.shape for part in biases)
            and len(biases) < 2
            and all(part.dtype in FLOATS for part in biases)
            and (scales.dtype in FLOATS if mode.scales is None else scales.dtype == "U8")
        )
        if not fits:
            raise misfit(
                packed,
                "MLX",
                f"{packed.shape} words and {scales.shape} scales do not fit {mode.bits} bits",
            )
        bias = biases[0] if biases else None
        precision = f"MLX-{mode.bits}" if mode.codes is None else f"MLX-{_name_of(mode)}"
        yield QuantisedWeight(
            packed.name,
            (*packed.shape[:-1], inputs),
            calculated_in(scales),
            precision,
            (packed, scales, *biases),
            _MlxRows(packed, scales, bias, mode, inputs),
        )


def _name_of(mode: _Mode) -> str:
    return next(name.upper() for name, other in _MLX_FLOATS.items() if other == mode)


def _mode_of(
    source: PackedSource, module: str, packed: StoredTensor, scales: StoredTensor, *, has_biases: bool
) -> _Mode:
    """As config.json has it, for the module or for all."""
    own = source.settings.get(module)
    settings = {**source.settings, **(own if isinstance(own, dict) else {})}
    if not has_biases and settings.get("mode") in _MLX_FLOATS:
        return _MLX_FLOATS[settings["mode"]]
    match settings:
        case {"bits": int(bits), "group_size": int(group)} if 1 <= bits <= 8 and group > 0 and has_biases:
            return _Mode(bits, group)
    raise misfit(packed, "MLX", "config.json does not say with how many bits and in which groups")


COMPRESSED = QuantisedFormat("compressed-tensors", _find_compressed)
MLX = QuantisedFormat("MLX", _find_mlx)

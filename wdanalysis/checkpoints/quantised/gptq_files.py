"""GPTQ and AWQ: codes of 2, 3, 4 or 8 bits in words of 32, with a scale and a zero for each output's group of inputs.

Both store the weight as in × out; it stands for the weight of an `nn.Linear`, out × in.

    GPTQ: the words run along the inputs: qweight is (in · bits/32, out). The group of an input is in `g_idx`. Zeros are
    stored less one, but for the format ``gptq_v2`` and auto-round's own.
    AWQ: they run along the outputs: qweight is (in, out · bits/32), and in a word eight outputs lie in an order of
    their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wdanalysis.checkpoints.dtypes import FLOATS
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
from wdanalysis.checkpoints.quantised.packing import unpack_bits
from wdanalysis.checkpoints.tensors import StoredTensor

_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
_WIDTHS = (2, 3, 4, 8)
_GPTQ_FORMATS = ("gptq", "gptq_v2", None)
_PLAIN_ZEROS = ("gptq_v2", "auto_round", "auto_round:gptqmodel")
"""Values of `checkpoint_format`, or of auto-round's `packing_format`, of layouts that store zeros as they are."""


@dataclass(frozen=True)
class _Module:
    """The tensors of one module."""

    qweight: StoredTensor
    qzeros: StoredTensor
    scales: StoredTensor
    g_idx: StoredTensor | None

    @property
    def groups(self) -> int:
        return self.scales.shape[0]

    @property
    def outputs(self) -> int:
        return self.scales.shape[1]

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        return (self.qweight, self.qzeros, self.scales, *([self.g_idx] if self.g_idx else []))


def _find(source: PackedSource) -> Iterator[QuantisedWeight]:
    for module, qweight in source.ending(".qweight"):
        what = "a weight of GPTQ or AWQ"
        tensors = _Module(
            qweight,
            source.part(qweight, f"{module}.qzeros", what),
            source.part(qweight, f"{module}.scales", what),
            source.tensors.get(f"{module}.g_idx"),
        )
        is_words = qweight.dtype in ("I32", "U32") and tensors.qzeros.dtype in ("I32", "U32")
        are_matrices = all(len(t.shape) == 2 for t in (qweight, tensors.qzeros, tensors.scales))
        if not is_words or not are_matrices or tensors.scales.dtype not in FLOATS or not tensors.scales.size:
            raise misfit(
                qweight, what, f"it is {qweight.shape} {qweight.dtype}, which is another layout of these"
            )
        if qweight.shape[1] == tensors.outputs:
            yield _gptq(source, f"{module}.weight", tensors)
        else:
            yield _awq(source, f"{module}.weight", tensors)


def _gptq(source: PackedSource, name: str, module: _Module) -> QuantisedWeight:
    layout = source.settings.get("checkpoint_format")
    if layout not in _GPTQ_FORMATS:
        raise misfit(module.qweight, "GPTQ", f"its layout {layout!r} is not read")
    words = module.qweight.rows
    bits = _width(source, module, words * 32)
    inputs = module.g_idx.size if module.g_idx else words * 32 // bits
    if -(-inputs * bits // 32) != words or module.qzeros.shape != (
        module.groups,
        -(-module.outputs * bits // 32),
    ):
        raise misfit(module.qweight, f"GPTQ with {bits} bits", f"its words are not those of {inputs} inputs")
    if module.g_idx is None and inputs % module.groups:
        raise misfit(
            module.qweight, "GPTQ", f"{inputs} inputs cannot have {module.groups} groups without a g_idx"
        )
    has_plain_zeros = layout in _PLAIN_ZEROS or source.settings.get("packing_format") in _PLAIN_ZEROS
    rows = _Gptq(module, inputs, bits, stored_less=0 if has_plain_zeros else 1)
    return QuantisedWeight(
        name, (module.outputs, inputs), module.scales.dtype, f"GPTQ-{bits}", module.parts, rows
    )


def _width(source: PackedSource, module: _Module, stored_bits: int) -> int:
    """Bits of a code: as the number of inputs tells it, or as configured."""
    if module.g_idx is not None and module.g_idx.size:
        bits = stored_bits // module.g_idx.size
    else:
        bits = source.settings.get("bits", 0)
    if bits not in _WIDTHS:
        reason = (
            f"codes of {bits} bits are not read" if bits else "config.json does not say with how many bits"
        )
        raise misfit(module.qweight, "GPTQ", reason)
    return int(bits)


class _Gptq:
    """Rows (outputs) of a weight of GPTQ: columns of its words, which are kept while it is read."""

    def __init__(self, module: _Module, inputs: int, bits: int, *, stored_less: int) -> None:
        self._module, self._inputs, self._bits, self._stored_less = module, inputs, bits, stored_less
        self._kept = Kept(module.outputs, self._read)

    def _read(self) -> tuple[NDArray[np.uint32], Floats, Floats, NDArray[np.int64]]:
        """Words, scales and zeros, by output, and the group of each input."""
        module = self._module
        words = codes_of(module.qzeros).view(np.uint32)
        if self._bits != 3:  # the one was taken from words as a whole
            words = words + np.uint32(
                self._stored_less * sum(1 << place for place in range(0, 32, self._bits))
            )
        zeros = unpack_bits(words, self._bits, module.outputs)
        if self._bits == 3:
            zeros = (zeros + self._stored_less).astype(np.uint8) & np.uint8(7)
        if module.g_idx is None:
            group = np.arange(self._inputs) // (self._inputs // module.groups)
        else:
            group = codes_of(module.g_idx).reshape(-1).astype(np.int64)
        if group.min(initial=0) < 0 or group.max(initial=0) >= module.groups:
            raise ValueError(f"an input is of group {group.max()}, and there are {module.groups}")
        words = codes_of(module.qweight).view(np.uint32)
        return words, floats_of(module.scales).T, zeros.T.astype(np.float32), group

    def __call__(self, start: int, stop: int) -> Block:
        words, scales, zeros, group = self._kept.until(stop)
        codes = unpack_bits(np.ascontiguousarray(words[:, start:stop].T), self._bits, self._inputs)
        return Block(codes, scales[start:stop][:, group], zeros[start:stop][:, group])


def _awq(source: PackedSource, name: str, module: _Module) -> QuantisedWeight:
    inputs, words = module.qweight.shape
    bits = source.settings.get("bits", source.settings.get("w_bit", 4))
    fits = bits == 4 and words * 8 == module.outputs and module.qzeros.shape == (module.groups, words)
    if not fits or inputs % module.groups or str(source.settings.get("version", "gemm")).startswith("gemv"):
        raise misfit(module.qweight, "AWQ", "its layout is not that of its GEMM version, which alone is read")
    shape = (module.outputs, inputs)
    return QuantisedWeight(name, shape, module.scales.dtype, "AWQ-4", module.parts, _Awq(module, inputs))


class _Awq:
    """Rows (outputs) of a weight of AWQ: codes of its words, which are kept while it is read."""

    def __init__(self, module: _Module, inputs: int) -> None:
        self._module, self._group = module, inputs // module.groups
        self._kept = Kept(module.outputs, self._read)

    def _read(self) -> tuple[NDArray[np.uint32], Floats, Floats]:
        zeros = self._codes(codes_of(self._module.qzeros).view(np.uint32))
        words = codes_of(self._module.qweight).view(np.uint32)
        return words, floats_of(self._module.scales).T, zeros.T.astype(np.float32)

    def _codes(self, words: NDArray[np.uint32]) -> Codes:
        """Codes of rows of words, each code at its own output."""
        in_words = unpack_bits(words, 4, 8 * words.shape[1]).reshape(*words.shape, 8)
        return in_words[..., _AWQ_ORDER].reshape(len(words), -1)

    def __call__(self, start: int, stop: int) -> Block:
        words, scales, zeros = self._kept.until(stop)
        first, last = start // 8, -(-stop // 8)
        codes = self._codes(np.ascontiguousarray(words[:, first:last])).T
        scale, zero = (np.repeat(of[start:stop], self._group, axis=1) for of in (scales, zeros))
        return Block(codes[start - 8 * first : stop - 8 * first], scale, zero)


FORMAT = QuantisedFormat("GPTQ or AWQ", _find)

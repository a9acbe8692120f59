"""What may have become of a weight that an adapter was to be merged into: each possibility as a formula of W0.

Everything lies as the base stores it: blocks of rows, with `left` and `right` such that the update is s·left·right. For
DoRA the magnitudes belong to the stored rows or to the stored columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeAlias

import numpy as np
import torch

from wdanalysis.checkpoints.dtypes import STORED_TYPES, torch_type, widen
from wdanalysis.checkpoints.model import StoredMatrix
from wdanalysis.checkpoints.tensors import FormulaUpdate, LowRankUpdate, StoredTensor
from wdanalysis.kernels.lowrank import Array
from wdanalysis.kernels.rescale import rescaling
from wdanalysis.kernels.sums import Vector
from wdanalysis.measure.stream import load_update

BLOCK_BYTES = 1 << 20
"""How much of a stored matrix is in memory at once, before it is widened."""

Weight: TypeAlias = Callable[[slice, Array], Array]
"""From rows of W0 (which, and their numbers) to the same rows of what W may be."""

SMALLEST = {"F16": 2.0**-14, "F64": 2.0**-1022}
"""The smallest normal number of a dtype; 2⁻¹²⁶ in the others."""

TWICE = 0.02
"""A factor on the update that is nearer to 2 than this is called twice."""


def blocks(tensor: StoredTensor, *others: StoredTensor) -> Iterator[tuple[slice, list[Array]]]:
    """Yield the rows of tensors of one shape side by side, in float64."""
    step = max(1, BLOCK_BYTES // max(tensor.row_length * tensor.itemsize, 1))
    for start in range(0, tensor.rows, step):
        stop = min(start + step, tensor.rows)
        yield slice(start, stop), [widen(one.read_rows(start, stop)) for one in (tensor, *others)]


def rounded(numbers: Array, dtype: str) -> Array:
    """Return numbers as a tensor of a dtype holds them."""
    return torch.from_numpy(np.ascontiguousarray(numbers)).to(torch_type(dtype)).double().numpy()


def inner(x: Array, y: Array) -> float:
    """Σ xy of two matrices."""
    return float(np.einsum("ij,ij->", x, y))


def ulp(numbers: Array, dtype: str) -> Array:
    """The step of a dtype's grid at each number."""
    powers = (np.ascontiguousarray(numbers).view(np.uint64) & np.uint64(0x7FF << 52)).view(np.float64)
    smallest = SMALLEST.get(dtype, 2.0**-126)
    steps: Array = np.maximum(powers, smallest) * 2.0 ** -STORED_TYPES[dtype].fraction_bits
    return steps


class Expected(Protocol):
    """What an update makes of one stored weight, and what else may have been made of it."""

    @property
    def merged(self) -> Weight:
        """W as it should be."""
        ...

    def others(self, found: StoredTensor) -> Mapping[str, Weight]:
        """What a merge that went wrong makes, by the word for it."""
        ...

    def factor(self, found: StoredTensor) -> float:
        """T of W0 + t·ΔW that fits best what was found."""
        ...


@dataclass(frozen=True)
class ByFormula:
    """An update that is no s·BA."""

    base: StoredTensor
    update: FormulaUpdate

    @cached_property
    def _tuned(self) -> StoredTensor:
        return self.update.of(self.base)

    @property
    def merged(self) -> Weight:
        """W by the formula."""
        return lambda place, _: self._tuned.read_rows(place.start, place.stop)

    def others(self, found: StoredTensor) -> Mapping[str, Weight]:
        """A multiple of it."""
        t = self.factor(found)
        return {_times(t): lambda place, w0: w0 + t * (self.merged(place, w0) - w0)}

    def factor(self, found: StoredTensor) -> float:
        """⟨W − W0, ΔW⟩ / ‖ΔW‖²."""
        along = square = 0.0
        for place, (w0, w) in blocks(self.base, found):
            u = self.merged(place, w0) - w0
            along, square = along + inner(w - w0, u), square + inner(u, u)
        return along / square if square else 0.0


@dataclass(frozen=True)
class _Sums:
    """Of each vector that has a magnitude Σ w0², Σ w0·u, Σ u², Σ w·w0 and Σ w·u; of each across those Σ (w0 + u)²."""

    aa: Vector
    au: Vector
    uu: Vector
    wa: Vector
    wu: Vector
    across: Vector


class LowRank:
    """W0 + s·BA, and for DoRA m·V/‖V‖ with V = W0 + s·BA."""

    def __init__(self, matrix: StoredMatrix, update: LowRankUpdate) -> None:
        factors = load_update(update)
        self._base, self._scale, self._m = matrix.tensor, factors.scale, factors.magnitude
        self._of_rows = matrix.vectors_are_rows(factors.magnitude_axis)
        turned = matrix.in_by_out
        self._left, self._right = (factors.A.T, factors.B.T) if turned else (factors.B, factors.A)
        self._is_square = matrix.rows == matrix.row_length

    def _u(self, place: slice) -> Array:
        return self._scale * (self._left[place] @ self._right)

    def _v(self, place: slice, w0: Array) -> Array:
        return w0 + self._u(place)

    def _along(self, numbers: Vector, place: slice, *, crossed: bool = False) -> Array:
        """One number for each vector, laid beside a block."""
        return numbers[place, None] if self._of_rows != crossed else numbers[None, :]

    def _rescaled(
        self, of: Weight, norm: Vector, *, crossed: bool = False, m_crossed: bool = False
    ) -> Weight:
        """M·V/norm; crossed: of the vectors along the axis that has no magnitudes."""
        assert self._m is not None
        m = self._m
        if crossed == m_crossed:
            c = rescaling(m, norm)
            return lambda place, w0: self._along(c, place, crossed=crossed) * of(place, w0)
        one_over = rescaling(np.ones_like(norm), norm)
        return lambda place, w0: (
            self._along(m, place, crossed=m_crossed)
            * self._along(one_over, place, crossed=crossed)
            * of(place, w0)
        )

    @cached_property
    def merged(self) -> Weight:
        """Eq. 1, and with magnitudes Eq. 5."""
        return self._v if self._m is None else self._rescaled(self._v, self._v_norm())

    @cached_property
    def _own(self) -> _Sums:
        return self._sums(self._base)

    def _v_norm(self) -> Vector:
        """‖V‖ of each vector that has a magnitude."""
        squares = np.zeros(self._base.rows if self._of_rows else self._base.row_length)
        for place, (w0,) in blocks(self._base):
            v = self._v(place, w0)
            squares[place if self._of_rows else slice(None)] += np.einsum(
                "ij,ij->i" if self._of_rows else "ij,ij->j", v, v
            )
        return np.sqrt(squares)

    @staticmethod
    def _norm(sums: _Sums, t: float = 1.0) -> Vector:
        """‖W0 + t·u‖ of each vector that has a magnitude."""
        norm: Vector = np.sqrt(np.maximum(sums.aa + 2 * t * sums.au + t * t * sums.uu, 0.0))
        return norm

    def _sums(self, found: StoredTensor) -> _Sums:
        rows, columns = self._base.rows, self._base.row_length
        own = np.zeros((5, rows if self._of_rows else columns))
        across = np.zeros(columns if self._of_rows else rows)
        into_own, into_across = ("ij,ij->i", "ij,ij->j") if self._of_rows else ("ij,ij->j", "ij,ij->i")
        for place, (w0, w) in blocks(self._base, found):
            u = self._u(place)
            v = w0 + u
            of_own, of_across = (place, slice(None)) if self._of_rows else (slice(None), place)
            pairs = ((w0, w0), (w0, u), (u, u), (w, w0), (w, u))
            for sums, (x, y) in zip(own, pairs, strict=True):
                sums[of_own] += np.einsum(into_own, x, y)
            across[of_across] += np.einsum(into_across, v, v)
        aa, au, uu, wa, wu = own
        return _Sums(aa, au, uu, wa, wu, across)

    def factor(self, found: StoredTensor) -> float:
        """T by least squares: of each vector w ≈ α·w0 + β·u, where α is 1 without magnitudes, and t = β/α."""
        s = self._sums(found)
        if not s.uu.sum():
            return 0.0
        if self._m is None:
            return float(np.sum(s.wu - s.au) / np.sum(s.uu))
        determinant = s.aa * s.uu - s.au**2
        alpha = s.wa * s.uu - s.wu * s.au
        beta = s.wu * s.aa - s.wa * s.au
        told = (determinant > 0) & (alpha != 0)
        t = np.divide(beta, alpha, out=np.zeros_like(beta), where=told)
        return float(np.sum(t[told] * s.uu[told]) / np.sum(s.uu[told])) if told.any() else 0.0

    def others(self, found: StoredTensor) -> Mapping[str, Weight]:
        """The faults that merges have had, each as its formula."""
        t = self.factor(found)

        def multiple(place: slice, w0: Array) -> Array:
            return w0 + t * self._u(place)

        def transposed(place: slice, w0: Array) -> Array:
            return w0 + self._scale * (self._right.T[place] @ self._left.T)

        if self._m is None:
            return {_times(t): multiple} | ({"transposed": transposed} if self._is_square else {})
        norm, base_norm = self._norm(self._own), np.sqrt(self._own.aa)
        faults = {
            "magnitudes left out": self._v,
            "BA left out": self._rescaled(lambda _, w0: w0, base_norm),
            "divided by ‖W0‖": self._rescaled(self._v, base_norm),
            "merged twice": self._twice(norm),
            _times(t): self._rescaled(multiple, self._norm(self._own, t)),
        }
        if self._is_square:
            across = np.sqrt(self._own.across)
            faults |= {
                "other axis": self._rescaled(self._v, across, crossed=True, m_crossed=True),
                "magnitudes on the other axis": self._rescaled(self._v, norm, m_crossed=True),
                "norm of the other axis": self._rescaled(self._v, across, crossed=True),
            }
        return faults

    def _twice(self, norm: Vector) -> Weight:
        """The merged weight, merged again: m·V'/‖V'‖ with V' = c·V + u."""
        assert self._m is not None
        c, own = rescaling(self._m, norm), self._own
        # V' = c·w0 + (1 + c)·u
        norm2 = c**2 * own.aa + 2 * c * (1 + c) * own.au + (1 + c) ** 2 * own.uu

        def again(place: slice, w0: Array) -> Array:
            return self._along(c, place) * self._v(place, w0) + self._u(place)

        return self._rescaled(again, np.sqrt(np.maximum(norm2, 0.0)))


def _times(t: float) -> str:
    if abs(t - 2) < TWICE:
        return "twice"
    return f"{t:.3g} times" if t >= 0 else f"subtracted ({t:.3g} times)"

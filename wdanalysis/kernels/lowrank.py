"""The three sums of an adapter's update, from its factors: no merged matrix.

Seen from the vectors, an update is ΔW = s · G Fᵀ: each vector i gets d_i = s · F G_iᵀ. Along the output axis G is the
adapter's B and F its Aᵀ, along the input axis the other way round. With W₀ as vectors × length,

    p_i = s · G_i · (W₀ F)_i              q_i = s² · G_i (FᵀF) G_iᵀ

so one product of W₀ with all adapters' F side by side serves every step of every method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from wdanalysis.decomposition import Axis
from wdanalysis.kernels.sums import Vector

Array = NDArray[np.float64]

SAMPLE = 64
"""So many vectors of the base are kept, to tell how alike its vectors are."""


@dataclass(frozen=True)
class Factors:
    """An update of the direction, ΔV = scale · B A, in float64, and what the vectors are then rescaled to.

    Attributes
    ----------
    B
        out × r.
    A
        r × in.
    scale
        s.
    magnitude
        DoRA's m, one number for each vector along `magnitude_axis`; None where V = W₀ + ΔV is the tuned matrix itself.
    magnitude_axis
        What m rescales.
    """

    B: Array
    A: Array
    scale: float
    magnitude: Vector | None = None
    magnitude_axis: Axis = "out"

    def of_outputs(self, outputs: NDArray[np.intp]) -> Factors:
        """The update of these output features alone (q's share of a fused projection)."""
        m = self.magnitude
        return replace(
            self,
            B=self.B[outputs],
            magnitude=m[outputs] if m is not None and self.magnitude_axis == "out" else m,
        )

    def sides(self, axis: Axis) -> tuple[Array, Array]:
        """G (vectors × r) and F (length × r)."""
        return (self.B, self.A.T) if axis == "out" else (self.A.T, self.B)


class LowRankSums:
    """Adds up a = Σ w₀² and W₀ F over blocks of W₀, and then gives the sums of every update.

    Parameters
    ----------
    updates
        The updates of one matrix, of any ranks.
    axis
        What a vector is.
    """

    def __init__(self, updates: Sequence[Factors], axis: Axis) -> None:
        self._updates, self._axis = updates, axis
        self._length_sides = np.concatenate([update.sides(axis)[1] for update in updates], axis=1)
        vectors = updates[0].sides(axis)[0].shape[0]
        self._a = np.zeros(vectors)
        self._product = np.zeros((vectors, self._length_sides.shape[1]))
        self._sampled = np.unique(np.linspace(0, vectors - 1, SAMPLE).astype(np.intp))
        self.sample = np.zeros((len(self._sampled), len(self._length_sides)))
        """Some vectors of W₀, evenly over the matrix, once all blocks are added: n × length."""

    def add(self, block: Array, vectors: slice, length: slice) -> None:
        """Add a block of W₀, given as vectors × length with the place where it lies."""
        self._a[vectors] += np.einsum("ij,ij->i", block, block)
        self._product[vectors] += block @ self._length_sides[length]
        first, stop = np.searchsorted(self._sampled, (vectors.start, vectors.stop))
        self.sample[first:stop, length] = block[self._sampled[first:stop] - vectors.start]

    def sums(self) -> list[tuple[Vector, Vector, Vector]]:
        """(a, p, q) of each vector, for each update in the order given."""
        ranks = [update.A.shape[0] for update in self._updates]
        products = np.split(self._product, np.cumsum(ranks)[:-1], axis=1)
        return [(self._a, *self._update_sums(*pair)) for pair in zip(self._updates, products, strict=True)]

    def _update_sums(self, update: Factors, product: Array) -> tuple[Vector, Vector]:
        G, F = update.sides(self._axis)
        s = update.scale
        p = s * np.einsum("ir,ir->i", G, product)
        q = s**2 * np.einsum("ir,ir->i", G @ (F.T @ F), G)
        return p, np.maximum(q, 0.0)

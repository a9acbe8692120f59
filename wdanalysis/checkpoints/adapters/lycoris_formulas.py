"""What LyCORIS' algorithms make of a weight, in float64: each formula as LyCORIS 4.1 has it.

A weight is out × in, or out × in × kernel; its matrix is out × the rest. s = α/r.

=====  ==========================================================================
LoRA   W + s·up·down; with a core (Tucker) the convolution up · core · down
LoHa   W + s·(w1a·w1b ∘ w2a·w2b)
LoKr   W + s·(w1 ⊗ w2); s = 1 where neither factor is itself a product
GLoRA  W + s·(W·a1·a2 + b1·b2)
full   W + diff
IA³    W·(1 + w), along outputs or inputs
OFT    g·RᵀW, R of blocks (I + Q)(I − Q)⁻¹ with Q = P − Pᵀ
BOFT   the same for every stage of a butterfly
=====  ==========================================================================

With a magnitude m (`dora_scale`), V of the formula becomes m·V/‖V‖.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from wdanalysis.checkpoints.adapters.formats import Formula, Weight, wide
from wdanalysis.checkpoints.tensors import StoredTensor
from wdanalysis.decomposition import Axis

Parts: TypeAlias = Mapping[str, StoredTensor]


def matrix(weight: Weight) -> Weight:
    """See a weight as out × the rest; ValueError where it is a single number."""
    if weight.ndim == 0:
        raise ValueError("a factor is a single number")
    return weight.reshape(weight.shape[0], -1)


# --- formulas -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Added:
    """W + ΔW, where ΔW needs no W; also for some of its outputs alone.

    Attributes
    ----------
    change
        ΔW, outputs first.
    rows
        Which outputs of ΔW are meant.
    """

    change: Callable[[], Weight]
    rows: slice | None = None

    def __call__(self, weight: Weight) -> Weight:
        """Return the tuned weight; ValueError where ΔW does not fit."""
        change = matrix(self.change())
        change = change if self.rows is None else change[self.rows]
        if change.shape != matrix(weight).shape:
            raise ValueError(f"the update is {change.shape}")
        return weight + change.reshape(weight.shape)


@dataclass(frozen=True)
class Decomposed:
    """m·V/‖V‖ (Eq. 5), with V a formula of the base's weight. A vector of zeros stays as it is.

    Attributes
    ----------
    direction
        V.
    magnitude
        m.
    axis
        What a vector is.
    rows
        Which outputs are meant, where that is not all: those of `direction`, and along ``out`` of m.
    """

    direction: Formula
    magnitude: StoredTensor
    axis: Axis
    rows: slice | None = None

    def __call__(self, weight: Weight) -> Weight:
        """Return the tuned weight; ValueError where m does not fit."""
        v = self.direction(weight)
        m = wide(self.magnitude).ravel()
        m = m if self.rows is None else m[self.rows]
        return scaled(v, m, norms(v, self.axis), self.axis)


def norms(weight: Weight, axis: Axis) -> Weight:
    """Return ‖w‖ of every vector; one of ``in`` has all outputs and the whole kernel."""
    along = weight if axis == "out" else np.moveaxis(weight, 1, 0)
    lengths: Weight = np.linalg.norm(matrix(along), axis=1)
    return lengths


def scaled(v: Weight, magnitude: Weight, norm: Weight, axis: Axis) -> Weight:
    """Return m·v/norm of every vector."""
    if magnitude.size != norm.size:
        raise ValueError(f"the magnitude has {magnitude.size} numbers for {norm.size} {axis}put features")
    factor = np.divide(magnitude, norm, out=np.zeros_like(norm), where=norm != 0)
    shape = [1] * v.ndim
    shape[0 if axis == "out" else 1] = -1
    return v * factor.reshape(shape)


def of_rows(formula: Formula, rows: slice) -> Formula:
    """Return the formula of some of the outputs; ValueError where they cannot be told apart from the others."""
    if isinstance(formula, Added):
        return replace(formula, rows=rows)
    if isinstance(formula, Decomposed) and formula.axis == "out":
        return replace(formula, direction=of_rows(formula.direction, rows), rows=rows)
    raise ValueError("its outputs are tuned together")


@dataclass(frozen=True)
class Joined:
    """Formulas of some rows each; the other rows stay as they are."""

    pieces: tuple[tuple[slice, Formula], ...]

    def __call__(self, weight: Weight) -> Weight:
        """Return the tuned weight."""
        tuned = weight.copy()
        for rows, formula in self.pieces:
            tuned[rows] = formula(weight[rows])
        return tuned


# --- algorithms ---------------------------------------------------------------------------------------------


def tucker(core: Weight, up: Weight, down: Weight) -> Weight:
    """Σ core[i,j,…]·up[i,p]·down[j,q], as p × q × …: up is rank × out and down rank × in."""
    change: Weight = np.einsum("ij...,ip,jq->pq...", core, up, down, optimize=True)
    return change


def lora(parts: Parts, scale: float) -> Formula:
    """W + s·up·down."""

    def change() -> Weight:
        up, down = matrix(wide(parts["up"])), matrix(wide(parts["down"]))
        if "mid" not in parts:
            return scale * (up @ down)
        return scale * tucker(wide(parts["mid"]), up.T, down)

    return Added(change)


def loha(parts: Parts, scale: float) -> Formula:
    """W + s·(w1 ∘ w2)."""

    def factor(which: str) -> Weight:
        a, b = wide(parts[f"hada_w{which}_a"]), wide(parts[f"hada_w{which}_b"])
        core = parts.get(f"hada_t{which}")
        return matrix(a) @ matrix(b) if core is None else tucker(wide(core), a, b)

    return Added(lambda: scale * factor("1") * factor("2"))


def lokr(parts: Parts, scale: float) -> Formula:
    """W + s·(w1 ⊗ w2); the kernel belongs to w2, so that its matrix is what w1 multiplies."""

    def factor(which: str) -> Weight:
        if whole := parts.get(f"lokr_w{which}"):
            return matrix(wide(whole))
        a, b = wide(parts[f"lokr_w{which}_a"]), wide(parts[f"lokr_w{which}_b"])
        core = parts.get(f"lokr_t{which}")
        return matrix(a) @ matrix(b) if core is None else matrix(tucker(wide(core), a, b))

    def change() -> Weight:
        product: Weight = np.kron(factor("1"), factor("2")).astype(np.float64, copy=False)
        return scale * product

    return Added(change)


def full(parts: Parts, scale: float) -> Formula:
    """W + diff."""
    return Added(lambda: wide(parts["diff"]))


def glora(parts: Parts, scale: float) -> Formula:
    """W + s·(W·a1·a2 + b1·b2)."""

    def tuned(weight: Weight) -> Weight:
        a1, a2, b1, b2 = (matrix(wide(parts[f"{name}.weight"])) for name in ("a1", "a2", "b1", "b2"))
        core = parts.get("bm.weight")
        of_base = np.einsum("oi...,ij,jk->ok...", weight, a1, a2, optimize=True)
        added = b1 @ b2 if core is None else tucker(wide(core), b1.T, b2)
        sum_of_weights: Weight = weight + scale * (of_base + added.reshape(weight.shape))
        return sum_of_weights

    return tuned


def ia3(parts: Parts, scale: float) -> Formula:
    """W·(1 + w), along the inputs where `on_input` says so."""

    def tuned(weight: Weight) -> Weight:
        w = wide(parts["weight"]).ravel()
        axis: Axis = "in" if bool(parts["on_input"].read_bytes().any()) else "out"
        return scaled(weight, 1 + w, np.ones(weight.shape[0 if axis == "out" else 1]), axis)

    return tuned


def rotations(blocks: Weight, limit: float) -> Weight:
    """Cayley's (I + Q)(I − Q)⁻¹ of every block P, with Q = P − Pᵀ no longer than `limit`, where that is not 0."""
    q = blocks - np.swapaxes(blocks, -1, -2)
    length = float(np.linalg.norm(q))
    if 0 < limit < length:
        q = q * (limit / length)
    identity = np.eye(blocks.shape[-1])
    turned: Weight = (identity + q) @ np.linalg.inv(identity - q)
    return turned


def oft(parts: Parts, constraint: float) -> Formula:
    """g·RᵀW with R block-diagonal (blocks of three dimensions), or a product of butterflies (four)."""

    def tuned(weight: Weight) -> Weight:
        blocks = wide(parts["oft_blocks"])
        rotation = rotations(blocks, constraint * weight.shape[0])
        rows = matrix(weight)
        if blocks.ndim == 3:
            number, size, _ = blocks.shape
            turned = np.einsum("knm,kni->kmi", rotation, rows.reshape(number, size, -1)).reshape(rows.shape)
        else:
            turned = butterfly(rotation, rows)
        g = matrix(wide(parts["rescale"])) if "rescale" in parts else 1.0
        rotated: Weight = (g * turned).reshape(weight.shape)
        return rotated

    return tuned


def butterfly(rotation: Weight, rows: Weight) -> Weight:
    """Turn pairs of groups of rows, whose distance doubles from stage to stage."""
    size = rotation.shape[-1]
    for stage, blocks in enumerate(rotation):
        pair = (-1, 2, 2**stage * (size // 2), rows.shape[1])
        swapped = np.swapaxes(rows.reshape(pair), 1, 2)
        turned = np.einsum("bij,bjr->bir", blocks, swapped.reshape(-1, size, rows.shape[1]))
        rows = np.swapaxes(turned.reshape(swapped.shape), 1, 2).reshape(rows.shape)
    return rows


@dataclass(frozen=True)
class Algorithm:
    """One algorithm of LyCORIS.

    Attributes
    ----------
    name
        What it is called.
    needs
        Parts of which all must be there; each a name, or several of which one must be.
    formula
        Makes the tuned weight of the parts and s (OFT: its constraint).
    rank_of
        Parts of which the first that is there has the rank as its first dimension; without one s is 1.
    """

    name: str
    needs: tuple[tuple[str, ...], ...]
    formula: Callable[[Parts, float], Formula]
    rank_of: tuple[str, ...] = ()

    def fits(self, parts: Parts) -> bool:
        """Whether a module with these parts is of this algorithm, and whole."""
        return all(any(part in parts for part in one_of) for one_of in self.needs)


ALGORITHMS: tuple[Algorithm, ...] = (
    Algorithm("LoRA", (("up",), ("down",)), lora, ("down",)),
    Algorithm(
        "LoHa",
        tuple((f"hada_w{which}_{side}",) for which in "12" for side in "ab"),
        loha,
        ("hada_w1_b",),
    ),
    Algorithm(
        "LoKr",
        tuple((f"lokr_w{which}", f"lokr_w{which}_{side}") for which in "12" for side in "ab"),
        lokr,
        ("lokr_w1_b", "lokr_w2_b"),
    ),
    Algorithm(
        "GLoRA", tuple((f"{name}.weight",) for name in ("a1", "a2", "b1", "b2")), glora, ("a2.weight",)
    ),
    Algorithm("OFT", (("oft_blocks",),), oft),
    Algorithm("IA³", (("weight",), ("on_input",)), ia3),
    Algorithm("full", (("diff",),), full),
)
"""Every algorithm; DyLoRA is saved as LoRA, and BOFT as OFT of four dimensions."""

"""How an update lies to its base: what reports on fine-tuning and reinforcement learning give of 2025 and 2026.

Sparsity, shift of the spectrum, turn of the top subspaces, which elements changed, how early an update points where it
ends, and the shape of the spectra. The definitions are those of arXiv 2606.07082 (appendices C.3 and E), most of them
taken over from arXiv 2511.08567; docs/method.md has them all. As with the spectra, whole matrices are held in float64,
one base and one tuned at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from wdanalysis.checkpoints.storage import Progress
from wdanalysis.kernels.lowrank import Factors
from wdanalysis.measure.plan import Plan
from wdanalysis.measure.spectra import (
    Array,
    BaseVectors,
    Decomposed,
    Pair,
    Update,
    by_initialisation,
    effective_rank,
    observe,
    subspace_similarity,
)

MOST_DIRECTIONS = 512
"""The default k is this, or half of the shorter side where that is less."""

PRINCIPAL_RANK = 64
"""The same for the rank of the base's principal part."""

ROWS = 256
"""How many rows are counted at once."""

NEGLIGIBLE = 1e-12
"""Singular values under this share of the largest are taken for zero by Hill's index."""

_COUNTS = ("step", "layer", "subspace", "directions")
_MEASURES = (
    *("sparsity", "nss", "left_angle_mean", "left_angle_max", "right_angle_mean", "right_angle_max"),
    *("overlap_principal", "overlap_smallest", "overlap_by_chance"),
)
_STEP_SIMILARITY = ("step_similarity", "step_similarity_by_chance", "step_similarity_by_initialisation")
_SHAPES = tuple(f"{which}_{of}" for of in ("hill", "entropy") for which in ("base", "tuned", "update"))

GEOMETRY_COLUMNS = (
    *("method", "step", "layer", "module", "name"),
    *("subspace", *_MEASURES, "directions", *_STEP_SIMILARITY, *_SHAPES, "run"),
)
"""The columns of `measure_geometry`'s table."""


@dataclass(frozen=True)
class GeometryOptions:
    """What the geometry is taken of.

    Attributes
    ----------
    k
        Dimensions of the top subspaces that the angles are between; None: 512, or half of the shorter side where that
        is less.
    rank
        Of the base's principal part; None: 64, or half of the shorter side where that is less.
    share
        α: the share of elements that are "the largest" of the base's principal part, and "the smallest" of the base.
        The paper has 0.3 in its text and 0.5 in its appendix.
    directions
        K of Sim_K: how many of an update's directions are compared between steps.
    tail
        How many of the largest singular values Hill's index is taken of; None: half of those that are not zero.

    Raises
    ------
    ValueError
        A number is too small, or `share` is not between 0 and 1.

    Examples
    --------
    >>> GeometryOptions(k=64).share
    0.3
    """

    k: int | None = None
    rank: int | None = None
    share: float = 0.3
    directions: int = 16
    tail: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share lies between 0 and 1, not at {self.share}")
        for name, number, least in (
            ("k", self.k, 1),
            ("rank", self.rank, 1),
            ("directions", self.directions, 1),
            ("tail", self.tail, 2),
        ):
            if number is not None and number < least:
                raise ValueError(f"{name} is a number of at least {least}, not {number}")

    def subspace(self, shape: tuple[int, int]) -> int:
        """K of a matrix of this shape."""
        return _at_most(self.k, MOST_DIRECTIONS, min(shape))

    def principal_rank(self, shape: tuple[int, int]) -> int:
        """The rank of the principal part of a base of this shape."""
        return _at_most(self.rank, PRINCIPAL_RANK, min(shape))


def _at_most(chosen: int | None, most: int, shorter: int) -> int:
    return min(most, max(1, shorter // 2)) if chosen is None else min(chosen, shorter)


def in_bfloat16(values: Array) -> NDArray[np.float32]:
    """The bfloat16 numbers nearest to these, of two equally near ones the even.

    >>> in_bfloat16(np.array([1.0, 1.003, 1.006]))
    array([1.       , 1.       , 1.0078125], dtype=float32)
    """
    with np.errstate(over="ignore"):
        bits = values.astype(np.float32).view(np.uint32)
    bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def visibly_changed(W0: Array, d: Array) -> NDArray[np.bool_]:
    """Which elements of W₀ + d differ from those of W₀ once both are stored in bfloat16.

    The paper's rule is |w − w₀| > η·max(|w|, |w₀|) of the rounded numbers, η = 10⁻³; two that differ do so by 2⁻⁸ of
    the larger or more.

    >>> visibly_changed(np.array([[1.0, 1.0, 0.0]]), np.array([[1e-3, 1e-2, 0.0]]))
    array([[False,  True, False]])
    """
    changed = np.empty(d.shape, np.bool_)
    for start in range(0, len(d), ROWS):
        w0, change = W0[start : start + ROWS], d[start : start + ROWS]
        changed[start : start + ROWS] = in_bfloat16(w0) != in_bfloat16(w0 + change)
    return changed


def spectral_shift(base: Array, tuned: Array) -> float:
    """NSS = ‖σ(W) − σ(W₀)‖₂ / ‖σ(W₀)‖₂, of all singular values, falling; NaN for a base of zero."""
    norm = float(np.linalg.norm(base))
    return float(np.linalg.norm(tuned - base)) / norm if norm > 0 else np.nan


def principal_angles(U: Array, V: Array) -> Array:
    """The angles in degrees between the spaces of two orthonormal bases, n × k: cos θ_i = σ_i(UᵀV), θ rising.

    Small angles come from their sines, which are the singular values of V − UUᵀV: the cosine of an angle of 1e-6
    degrees is 1 to the last digit.
    """
    M = U.T @ V
    cosines = np.linalg.svd(M, compute_uv=False)
    R = V - U @ M
    sines = np.sqrt(np.maximum(np.linalg.eigvalsh(R.T @ R), 0.0))
    by_cosine, by_sine = np.arccos(np.clip(cosines, 0, 1)), np.arcsin(np.clip(sines, 0, 1))
    angles: Array = np.degrees(np.where(cosines**2 < 0.5, by_cosine, by_sine))
    return angles


def hill(values: Array, tail: int | None = None) -> float:
    """Hill's tail index [mean_{i<k} log(σ_i/σ_k)]⁻¹ of the k largest; NaN for fewer than two, or equal ones.

    Parameters
    ----------
    values
        σ₁ ≥ σ₂ ≥ …
    tail
        k; None: half of those that are not zero. Fewer where there are fewer.

    Examples
    --------
    >>> round(hill(np.exp([2.0, 1.0, 0.0]), 3), 12)
    0.666666666667
    """
    if not values.size or not values[0] > 0:
        return np.nan
    positive = values[values > NEGLIGIBLE * values[0]]
    largest = positive[: max(2, len(positive) // 2) if tail is None else tail]
    if len(largest) < 2 or largest[0] == largest[-1]:
        return np.nan
    return float(1 / np.mean(np.log(largest[:-1] / largest[-1])))


def entropy(values: Array, count: int) -> float:
    """−Σ p log p / log n with p_i = σ_i/Σσ: 1 where all n are equal, 0 for one direction alone; NaN for zero."""
    return float(np.log(effective_rank(values)) / np.log(count)) if count > 1 else np.nan


@dataclass(frozen=True)
class Mask:
    """A share of a matrix's elements: those beyond a threshold, and of those that lie on it as many as are missing.

    Stored types have few numbers, and many elements are equal. Which of them belong to a mask is drawn in thought:
    each counts by its chance, so that no number depends on the order of elements.
    """

    beyond: NDArray[np.bool_]
    at: NDArray[np.bool_]
    chance: float

    @classmethod
    def largest(cls, scores: Array, count: int) -> Mask:
        """The `count` elements with the largest scores."""
        threshold = np.partition(scores, scores.size - count, axis=None)[scores.size - count]
        beyond, at = scores > threshold, scores == threshold
        return cls(beyond, at, (count - np.count_nonzero(beyond)) / np.count_nonzero(at))

    def share_of(self, elements: NDArray[np.bool_]) -> float:
        """The share of these elements that are in the mask: |M★ ∩ M| / |M|; NaN for none."""
        within = np.count_nonzero(self.beyond & elements) + self.chance * np.count_nonzero(self.at & elements)
        count = np.count_nonzero(elements)
        return float(within / count) if count else np.nan


def low_rank_part(W0: Array, U: Array) -> Array:
    """The best approximation of W₀ with rank r, U_rU_rᵀW₀, from its top r left singular vectors."""
    return U @ (U.T @ W0)


class _BaseGeometry:
    """What all tuned matrices are compared with."""

    def __init__(self, base: BaseVectors, options: GeometryOptions) -> None:
        W0 = base.matrix
        self.matrix, self.values = W0, base.decomposed.values
        k, r = (
            min(most, base.decomposed.rank)
            for most in (options.subspace(W0.shape), options.principal_rank(W0.shape))
        )
        left = base.decomposed.left(max(k, r))
        self.k, self.left, self.right = k, left[:, :k], base.decomposed.right(k)
        count = max(1, round(options.share * W0.size))
        self.principal = Mask.largest(np.abs(low_rank_part(W0, left[:, :r])), count)
        self.smallest = Mask.largest(-np.abs(W0), count)
        self.share = count / W0.size


@dataclass(frozen=True)
class _Directions:
    """What the similarity between steps needs of a step's update."""

    row: dict[str, Any]
    right: Array
    factors: Factors | None
    is_last: bool


class GeometryTaker:
    """Takes the rows of the table, with what `observe` shows.

    Parameters
    ----------
    options
        What is taken.
    """

    def __init__(self, options: GeometryOptions) -> None:
        self._options = options
        self._rows: list[dict[str, Any]] = []
        self._base: _BaseGeometry | None = None
        self._directions: dict[tuple[str, str], list[_Directions]] = {}

    def add(self, pair: Pair) -> None:
        """Take a matrix's row."""
        row: dict[str, Any] = dict(pair.key)
        if pair.base is None or pair.update is None:
            self._rows.append(row)
            return
        self._base = self._base or _BaseGeometry(pair.base, self._options)
        row |= _row(self._base, pair.update, self._options)
        self._rows.append(row)
        self._directions.setdefault(pair.state.training, []).append(
            _Directions(row, pair.update.right, pair.update.factors, pair.is_last)
        )

    def finish_matrix(self) -> None:
        """Compare each step's update with the last one's of its run."""
        for steps in self._directions.values():
            if last := next((step for step in steps if step.is_last), None):
                for step in steps:
                    if step is not last:
                        step.row.update(_step_similarity(step, last, self._options.directions))
        self._base, self._directions = None, {}

    def table(self) -> pd.DataFrame:
        """`GEOMETRY_COLUMNS`, a row for every matrix that was added."""
        floats = dict.fromkeys((*_MEASURES, *_STEP_SIMILARITY, *_SHAPES), "float64")
        table = pd.DataFrame(self._rows, columns=list(GEOMETRY_COLUMNS))
        return table.astype(dict.fromkeys(_COUNTS, "Int64") | floats)


def measure_geometry(
    plan: Plan, options: GeometryOptions | None = None, *, progress: Progress | None = None
) -> pd.DataFrame:
    """Take the geometry of every matrix of a plan.

    Parameters
    ----------
    plan
        From `wdanalysis.measure.plan.plan`.
    options
        None: the defaults of `GeometryOptions`.
    progress
        Called with the matrices done and the number of all.

    Returns
    -------
    DataFrame
        `GEOMETRY_COLUMNS`, a row for every method, run, step and matrix. Empty where an element is not finite, and what
        an update of zero has not.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import torch
    >>> from safetensors.torch import save_file
    >>> from wdanalysis.checkpoints import open_checkpoint, open_series
    >>> from wdanalysis.measure.plan import plan
    >>> base, tuned = (Path(tempfile.mkdtemp()) / "w.safetensors" for _ in range(2))
    >>> save_file({"q_proj.weight": torch.diag(torch.tensor([4.0, 3.0, 0.5, 0.25]))}, base)
    >>> save_file({"q_proj.weight": torch.diag(torch.tensor([4.0, 3.0, 0.5, 5.25]))}, tuned)
    >>> table = measure_geometry(plan(open_checkpoint(base), {"FT": open_series(tuned)}), GeometryOptions(k=2))
    >>> table[["method", "subspace", "sparsity", "left_angle_mean", "left_angle_max"]].to_dict("records")
    [{'method': 'FT', 'subspace': 2, 'sparsity': 0.9375, 'left_angle_mean': 45.0, 'left_angle_max': 90.0}]
    """
    options = options or GeometryOptions()
    taker = GeometryTaker(options)
    observe(plan, [taker], directions=options.directions, progress=progress)
    return taker.table()


def _row(base: _BaseGeometry, update: Update, options: GeometryOptions) -> dict[str, Any]:
    W0, d = base.matrix, update.change()
    shorter = min(W0.shape)
    tuned = Decomposed(update.tuned if isinstance(update.tuned, np.ndarray) else W0 + d)
    k = min(base.k, tuned.rank)
    changed = visibly_changed(W0, d)
    spectra = {"base": base.values, "tuned": tuned.values, "update": update.values}
    return {
        "subspace": k,
        "sparsity": 1 - np.count_nonzero(changed) / changed.size,
        "nss": spectral_shift(base.values, tuned.values),
        **_angles("left", base.left[:, :k], tuned.left(k)),
        **_angles("right", base.right[:, :k], tuned.right(k)),
        "overlap_principal": base.principal.share_of(changed),
        "overlap_smallest": base.smallest.share_of(changed),
        "overlap_by_chance": base.share,
        **{f"{which}_hill": hill(values, options.tail) for which, values in spectra.items()},
        **{f"{which}_entropy": entropy(values, shorter) for which, values in spectra.items()},
    }


def _angles(side: str, U: Array, V: Array) -> dict[str, float]:
    if not U.size:
        return {}
    angles = principal_angles(U, V)
    return {f"{side}_angle_mean": float(angles.mean()), f"{side}_angle_max": float(angles.max())}


def _step_similarity(step: _Directions, last: _Directions, directions: int) -> dict[str, Any]:
    """Sim_K of a step's update and the last one's."""
    K = min(directions, step.right.shape[1], last.right.shape[1])
    if not K:
        return {}
    by_factors = by_initialisation((step.factors, step.factors), (step.factors, last.factors), [(K, K)])
    values = (subspace_similarity(step.right[:, :K], last.right[:, :K]), K / len(step.right), *by_factors)
    return {"directions": K, **dict(zip(_STEP_SIMILARITY, values, strict=True))}

"""Singular values of base, tuned matrix and update: how many directions an update has, and which are new.

Slow beside ΔM and ΔD, and therefore only on demand; whole matrices are held in float64, one base and one tuned at a
time. The update of LoRA is never formed: its singular vectors come from its factors' QR decompositions, and the tuned
matrix W₀ + s·BA is only ever multiplied with vectors. Top singular vectors come by Lanczos (ARPACK), to full accuracy.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from wdanalysis.checkpoints.dtypes import widen
from wdanalysis.checkpoints.storage import Progress
from wdanalysis.checkpoints.tensors import StoredTensor
from wdanalysis.kernels.lowrank import Factors
from wdanalysis.kernels.rescale import rescaled_update, rescaling_less_one
from wdanalysis.measure.plan import Job, Plan, State
from wdanalysis.measure.stream import load_update, outputs_of

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

TOP = 10
"""How many of the largest singular values are given, and how many singular vectors may be intruders."""

INTRUDER_COSINE = 0.5
"""ε of arXiv 2410.21228: a singular vector without such a cosine to any of the base's is an intruder."""

SUBSPACES = (1, 2, 4, 8)
"""The i and j of φ(i, j)."""

SMALL = 256
"""A matrix whose shorter side is no longer is decomposed whole."""

_KEYS = ("method", "step", "layer", "module", "name")
_COUNTS = ("rank", "intruder_dimensions")
_TOP_VALUES = tuple(f"{which}_s{i + 1}" for which in ("base", "tuned", "update") for i in range(TOP))

SPECTRA_COLUMNS = (*_KEYS, "rank", "stable_rank", "effective_rank", "intruder_dimensions", *_TOP_VALUES)
"""The columns of `Spectra.matrices`."""

SIMILARITY_COLUMNS = (
    *("method_a", "step_a", "method_b", "step_b", "layer", "module", "name"),
    *("i", "j", "similarity", "by_chance"),
)
"""The columns of `Spectra.similarity`."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Spectra:
    """What `measure_spectra` found.

    Attributes
    ----------
    matrices
        `SPECTRA_COLUMNS`, a row for every method, step and matrix: ``rank``, the rank that an adapter's factors can
        have (the shorter side of a matrix that is stored whole); ``stable_rank`` and ``effective_rank`` of the update;
        ``intruder_dimensions``; and the largest singular values of W₀, W and ΔW, ``base_s1`` … ``update_s10``.
        Empty where an element is not finite, and the ranks of an update that is zero.
    similarity
        `SIMILARITY_COLUMNS`, for every matrix and pair of methods at their last steps: `subspace_similarity` of
        the updates' top i and top j right singular vectors, and what random directions would have, max(i, j) / length.
    """

    matrices: pd.DataFrame
    similarity: pd.DataFrame


@dataclass(frozen=True)
class Update:
    """ΔW, known by its singular values (all of them, falling) and its top right singular vectors.

    Attributes
    ----------
    values
        σ₁ ≥ σ₂ ≥ …
    right
        in × i, at most max(`SUBSPACES`) columns, none for a direction whose σ is zero.
    tuned
        W = W₀ + ΔW, for products with vectors.
    """

    values: Array
    right: Array
    tuned: Array | LinearOperator


def stable_rank(values: Array) -> float:
    """‖ΔW‖²_F / σ₁² = Σ σ_i² / σ₁²; NaN for zero."""
    return float(np.sum((values / values[0]) ** 2)) if values.size and values[0] > 0 else np.nan


def effective_rank(values: Array) -> float:
    """Exp of the entropy of p_i = σ_i / Σ σ (Roy & Vetterli, EUSIPCO 2007); NaN for zero."""
    total = float(values.sum())
    if not total > 0:
        return np.nan
    p = values[values > 0] / total
    return float(np.exp(-np.sum(p * np.log(p))))


def subspace_similarity(U: Array, V: Array) -> float:
    """φ = ‖UᵀV‖²_F / min(i, j) of two orthonormal bases, n × i and n × j (LoRA, §7.2): 0 orthogonal, 1 contained."""
    return float(np.sum((U.T @ V) ** 2) / min(U.shape[1], V.shape[1]))


def top_singular(matrix: Array | LinearOperator, count: int) -> tuple[Array, Array, Array]:
    """The largest singular values, falling, with their vectors.

    Parameters
    ----------
    matrix
        m × n.
    count
        How many; fewer where the matrix is smaller.

    Returns
    -------
    U, values, V
        m × k, k and n × k with k = min(count, m, n).
    """
    from scipy.sparse.linalg import svds

    shorter = min(matrix.shape)
    if isinstance(matrix, np.ndarray) and (shorter <= max(SMALL, 2 * count) or not matrix.any()):
        U, values, Vh = np.linalg.svd(matrix, full_matrices=False)
    elif shorter <= 2 * count:
        return top_singular(np.asarray(matrix @ np.eye(matrix.shape[1])), count)
    else:
        start = np.random.default_rng(0).standard_normal(shorter)
        U, values, Vh = svds(matrix, k=count, v0=start, solver="arpack")
        falling = np.argsort(values)[::-1]
        U, values, Vh = U[:, falling], values[falling], Vh[falling]
    return U[:, :count], values[:count], Vh[:count].T


def low_rank_svd(factors: Factors) -> tuple[Array, Array, Array]:
    """Singular values and vectors of s·BA without forming it: B = Q_B R_B, Aᵀ = Q_A R_A, and s·R_B R_Aᵀ is r × r.

    Returns
    -------
    U, values, V
        out × k, k and in × k, with k = min(r, out, in).
    """
    Q_B, R_B = np.linalg.qr(factors.B)
    Q_A, R_A = np.linalg.qr(factors.A.T)
    U, values, Vh = np.linalg.svd(factors.scale * (R_B @ R_A.T), full_matrices=False)
    return Q_B @ U, values, Q_A @ Vh.T


def intruder_dimensions(tuned_vectors: Array, base: BaseVectors, cosine: float = INTRUDER_COSINE) -> int:
    """How many left singular vectors of W have no |cos| ≥ ε to any left singular vector of W₀ (arXiv 2410.21228).

    The base's top vectors settle it for most; only where they do not are all of them computed.
    """
    nearest = np.abs(base.top.T @ tuned_vectors).max(axis=0)
    if (nearest < cosine).any():
        nearest = np.abs(base.all.T @ tuned_vectors).max(axis=0)
    return int(np.sum(nearest < cosine))


def singular_values(matrix: Array) -> Array:
    """All singular values, falling, min(m, n) of them.

    A large matrix gives the roots of the eigenvalues of its Gram matrix, several times sooner; they are right to about
    1e-8 of the largest, and 0 where they are lost in its rounding.
    """
    shorter = min(matrix.shape)
    if shorter <= SMALL:
        return np.linalg.svd(matrix, compute_uv=False).astype(np.float64)
    squares = np.linalg.eigvalsh(matrix @ matrix.T if shorter == matrix.shape[0] else matrix.T @ matrix)[::-1]
    return np.sqrt(np.where(squares > shorter * np.finfo(np.float64).eps * squares[0], squares, 0.0))


class BaseVectors:
    """The left singular vectors of W₀: the top ones, and all of them once they are asked for."""

    def __init__(self, matrix: Array, count: int = TOP) -> None:
        self._matrix = matrix
        self._all: Array | None = None
        self.top, self.values, _ = top_singular(matrix, count)

    @property
    def all(self) -> Array:
        """All of them, out × min(out, in)."""
        if self._all is None:
            self._all = np.linalg.svd(self._matrix, full_matrices=False)[0]
        return self._all


class SpectraInterrupted(KeyboardInterrupt):
    """Ctrl-C while singular values are taken; `spectra` holds those of the matrices that were done."""

    def __init__(self, spectra: Spectra) -> None:
        super().__init__()
        self.spectra = spectra


def measure_spectra(plan: Plan, *, progress: Progress | None = None) -> Spectra:
    """Take the singular values of every matrix of a plan.

    Parameters
    ----------
    plan
        From `wdanalysis.measure.plan.plan`.
    progress
        Called with the matrices done and the number of all.

    Raises
    ------
    SpectraInterrupted
        On Ctrl-C.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import torch
    >>> from safetensors.torch import save_file
    >>> from wdanalysis.checkpoints import open_checkpoint, open_series
    >>> from wdanalysis.measure.plan import plan
    >>> base, tuned = (Path(tempfile.mkdtemp()) / "w.safetensors" for _ in range(2))
    >>> save_file({"q_proj.weight": torch.eye(4)}, base)
    >>> save_file({"q_proj.weight": torch.eye(4) + torch.diag(torch.tensor([2.0, 1.0, 0.0, 0.0]))}, tuned)
    >>> spectra = measure_spectra(plan(open_checkpoint(base), {"FT": open_series(tuned)}))
    >>> spectra.matrices[["method", "update_s1", "update_s2", "stable_rank"]].to_dict("records")
    [{'method': 'FT', 'update_s1': 2.0, 'update_s2': 1.0, 'stable_rank': 1.25}]
    """
    matrices: list[dict[str, object]] = []
    similarities: list[dict[str, object]] = []
    try:
        _measure(plan, matrices, similarities, progress or (lambda done, total: None))
    except KeyboardInterrupt:
        raise SpectraInterrupted(_tables(matrices, similarities)) from None
    return _tables(matrices, similarities)


def _measure(
    plan: Plan, matrices: list[dict[str, object]], similarities: list[dict[str, object]], progress: Progress
) -> None:
    """Add the rows of both tables, matrix by matrix."""
    last = _last_steps(plan)
    total = sum(len(job.matrix.parts) * (len(job.dense) + len(job.updates)) for job in plan.jobs)
    progress(0, total)
    for job in plan.jobs:
        W0 = _whole(job, job.base)
        for part in job.matrix.parts:
            outputs = outputs_of(part)
            place = {"layer": job.matrix.layer, "module": part.module, "name": job.base.name}
            base = BaseVectors(W0[outputs]) if np.isfinite(W0[outputs]).all() else None
            at_last: list[tuple[State, Update]] = []
            for state, update in _updates(job, W0, outputs, finite=base is not None):
                key = {"method": state.method, "step": state.step, **place}
                matrices.append(key | (_row(update, base) if base and update else {}))
                if update and last[state.method] == state.step:
                    at_last.append((state, update))
                progress(len(matrices), total)
            similarities += [place | row for row in _similarities(at_last)]


def _tables(matrices: list[dict[str, object]], similarities: list[dict[str, object]]) -> Spectra:
    integers = dict.fromkeys(("step", "layer", *_COUNTS), "Int64")
    floats = dict.fromkeys(("stable_rank", "effective_rank", *_TOP_VALUES), "float64")
    table = pd.DataFrame(matrices, columns=list(SPECTRA_COLUMNS)).astype(integers | floats)
    pairs = pd.DataFrame(similarities, columns=list(SIMILARITY_COLUMNS))
    return Spectra(table, pairs.astype({"step_a": "Int64", "step_b": "Int64", "layer": "Int64"}))


def _last_steps(plan: Plan) -> dict[str, int | None]:
    """Each method's last step; one that is not known counts as the last."""
    steps: dict[str, set[int | None]] = {}
    for job in plan.jobs:
        for state, _ in (*job.dense, *job.updates):
            steps.setdefault(state.method, set()).add(state.step)
    return {method: max(of, key=lambda step: (step is None, step or 0)) for method, of in steps.items()}


def _whole(job: Job, tensor: StoredTensor) -> Array:
    """What a job compares of a stored matrix, as out × in."""
    stored = widen(tensor.read_rows(0, job.matrix.rows))
    return stored.T if job.matrix.in_by_out else stored


def _updates(
    job: Job, W0: Array, outputs: NDArray[np.intp], *, finite: bool
) -> Iterator[tuple[State, Update | None]]:
    """Every tuned matrix's update of these outputs; None where it or the base is not finite."""
    for state, tensor in job.dense:
        if not finite:
            yield state, None
            continue
        W = _whole(job, tensor)[outputs]
        yield state, _dense_update(W, W - W0[outputs]) if np.isfinite(W).all() else None
    for state, low_rank in job.updates:
        factors = load_update(low_rank)
        if not finite or not (np.isfinite(factors.A).all() and np.isfinite(factors.B).all()):
            yield state, None
        elif factors.magnitude is None:
            yield state, _low_rank_update(W0[outputs], factors.of_outputs(outputs))
        else:
            d = _dora_update(W0, factors, outputs)
            yield state, _dense_update(W0[outputs] + d, d) if np.isfinite(d).all() else None


def _dense_update(W: Array, d: Array) -> Update:
    _, top, right = top_singular(d, max(SUBSPACES))
    return Update(singular_values(d), right[:, top > 0], W)


def _low_rank_update(W0: Array, factors: Factors) -> Update:
    from scipy.sparse.linalg import aslinearoperator

    _, values, right = low_rank_svd(factors)
    BA = aslinearoperator(factors.scale * factors.B) @ aslinearoperator(factors.A)
    right = right[:, : max(SUBSPACES)]
    return Update(values, right[:, values[: max(SUBSPACES)] > 0], aslinearoperator(W0) + BA)


def _dora_update(W0: Array, factors: Factors, outputs: NDArray[np.intp]) -> Array:
    """W − W₀ of these outputs; the norms of input vectors are those of the whole matrix."""
    if factors.magnitude_axis == "in":
        return _rescaled(W0, factors)[outputs]
    return _rescaled(W0[outputs], factors.of_outputs(outputs))


def _rescaled(W0: Array, factors: Factors) -> Array:
    assert factors.magnitude is not None
    V = W0 + factors.scale * (factors.B @ factors.A)
    norm = np.linalg.norm(V, axis=1 if factors.magnitude_axis == "out" else 0)
    return rescaled_update(W0, factors, rescaling_less_one(factors.magnitude, norm))


def _row(update: Update, base: BaseVectors) -> dict[str, object]:
    vectors, tuned, _ = top_singular(update.tuned, TOP)
    tops = {"base": base.values, "tuned": tuned, "update": update.values[:TOP]}
    return {
        "rank": len(update.values),
        "stable_rank": stable_rank(update.values),
        "effective_rank": effective_rank(update.values),
        "intruder_dimensions": intruder_dimensions(vectors, base),
        **{f"{which}_s{i + 1}": float(value) for which, of in tops.items() for i, value in enumerate(of)},
    }


def _similarities(updates: Sequence[tuple[State, Update]]) -> Iterator[dict[str, object]]:
    for (a, update_a), (b, update_b) in itertools.combinations(updates, 2):
        U, V = update_a.right, update_b.right
        for i, j in itertools.product(SUBSPACES, repeat=2):
            if i <= U.shape[1] and j <= V.shape[1]:
                yield {
                    **{"method_a": a.method, "step_a": a.step, "method_b": b.method, "step_b": b.step},
                    **{"i": i, "j": j, "similarity": subspace_similarity(U[:, :i], V[:, :j])},
                    "by_chance": max(i, j) / U.shape[0],
                }

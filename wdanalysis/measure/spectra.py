"""Singular values of base, tuned matrix and update: how many directions an update has, and which are new.

Slow beside ΔM and ΔD, and therefore only on demand; whole matrices are held in float64, one base and one tuned at a
time. The update of LoRA is never formed: its singular vectors come from its factors' QR decompositions, and the tuned
matrix W₀ + s·BA is only ever multiplied with vectors. Top singular vectors come by Lanczos (ARPACK), to full accuracy.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

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
from wdanalysis.writing import encodable

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

TOP = 10
"""How many of the largest singular values are given, and how many singular vectors may be intruders."""

INTRUDER_COSINE = 0.5
"""ε of arXiv 2410.21228: a singular vector without such a cosine to any of the base's is an intruder."""

SUBSPACES = (1, 2, 4, 8)
"""The i and j of φ(i, j)."""

DRAWS = 32
"""How many pairs of adapters without structure `by_initialisation` is the mean of; fewer for ranks over 32, whose
similarity hardly differs from draw to draw."""

SMALL = 256
"""A matrix whose shorter side is no longer is decomposed whole."""

_KEYS = ("method", "step", "layer", "module", "name")
_COUNTS = ("rank", "intruder_dimensions")
_TOP_VALUES = tuple(f"{which}_s{i + 1}" for which in ("base", "tuned", "update") for i in range(TOP))

SPECTRA_COLUMNS = (
    *(*_KEYS, "rank", "stable_rank", "effective_rank", "intruder_dimensions", *_TOP_VALUES),
    "run",
)
"""The columns of `Spectra.matrices`."""

SIMILARITY_COLUMNS = (
    *("method_a", "step_a", "method_b", "step_b", "layer", "module", "name"),
    *("i", "j", "similarity", "by_chance", "by_initialisation"),
    *("run_a", "run_b"),
)
"""The columns of `Spectra.similarity`."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Spectra:
    """What `measure_spectra` found.

    Attributes
    ----------
    matrices
        `SPECTRA_COLUMNS`, a row for every method, run, step and matrix: ``rank``, the rank that an adapter's factors
        can have (the shorter side of a matrix that is stored whole); ``stable_rank`` and ``effective_rank`` of the
        update; ``intruder_dimensions``; and the largest singular values of W₀, W and ΔW, ``base_s1`` … ``update_s10``.
        Empty where an element is not finite, and the ranks of an update that is zero.
    similarity
        `SIMILARITY_COLUMNS`, for every matrix and pair of methods at their last steps, or of their runs, those of one
        method among them: `subspace_similarity` of the updates' top i and top j right singular vectors, what random
        directions would have, max(i, j) / length, and for two adapters what their A's alone would give,
        `by_initialisation`.
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
        in × i, as many columns as were asked for at most, none for a direction whose σ is zero.
    tuned
        W = W₀ + ΔW, for products with vectors.
    factors
        An adapter's; None where W is stored.
    whole
        ΔW, out × in, where it was formed; see `change`.
    """

    values: Array
    right: Array
    tuned: Array | LinearOperator
    factors: Factors | None = None
    whole: Array | None = field(default=None, repr=False)

    def change(self) -> Array:
        """ΔW, out × in."""
        if self.whole is not None:
            return self.whole
        assert self.factors is not None
        return (self.factors.scale * self.factors.B) @ self.factors.A


@dataclass(frozen=True)
class Pair:
    """A base matrix and one tuned one, as `observe` shows them to those that take their numbers.

    Attributes
    ----------
    state
        Whose the tuned matrix is.
    place
        ``layer``, ``module`` and ``name``.
    is_last
        Whether it is of its run's last step.
    base, update
        None where an element of the base, or of either, is not finite.
    """

    state: State
    place: dict[str, object]
    is_last: bool
    base: BaseVectors | None
    update: Update | None

    @property
    def key(self) -> dict[str, object]:
        """The columns of a row that tell whose it is."""
        return {
            **{"method": self.state.method, "run": encodable(self.state.run), "step": self.state.step},
            **self.place,
        }


class Taker(Protocol):
    """What takes numbers of whole matrices."""

    def add(self, pair: Pair) -> None:
        """Take those of one."""

    def finish_matrix(self) -> None:
        """Take what needs all steps and methods of a matrix: all of them were added."""


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
    if min(matrix.shape) <= SMALL:
        return np.linalg.svd(matrix, compute_uv=False).astype(np.float64)
    return _roots(np.linalg.eigvalsh(_gram(matrix))[::-1])


def values_and_right(matrix: Array, count: int) -> tuple[Array, Array]:
    """All singular values, and the top right singular vectors of those that are not zero.

    Those of a large matrix come from its Gram matrix, as in `singular_values`; its top vectors by Lanczos.

    Returns
    -------
    values, V
        min(m, n) and n × k, k ≤ count.
    """
    from scipy.sparse.linalg import eigsh

    shorter = min(matrix.shape)
    if shorter <= max(SMALL, 2 * count) or not matrix.any():
        _, top, right = top_singular(matrix, count)
        return singular_values(matrix), right[:, top > 0]
    gram = _gram(matrix)
    values = _roots(np.linalg.eigvalsh(gram)[::-1])
    squares, near = eigsh(gram, count, v0=np.random.default_rng(0).standard_normal(shorter))
    near = near[:, np.argsort(squares)[::-1]][:, values[:count] > 0]
    return values, near if len(near) == matrix.shape[1] else np.linalg.qr(matrix.T @ near)[0]


def _gram(matrix: Array) -> Array:
    """WWᵀ of a wide matrix, WᵀW of a tall one."""
    return matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix


def _roots(squares: NDArray[Any]) -> Array:
    """Singular values from the falling eigenvalues of a Gram matrix."""
    return np.sqrt(np.where(squares > len(squares) * np.finfo(np.float64).eps * squares[0], squares, 0.0))


class Decomposed:
    """All singular values of a matrix, with the singular vectors of as many as are asked for.

    Those of a large matrix come from its Gram matrix, as in `singular_values`.

    Parameters
    ----------
    matrix
        out × in.
    """

    def __init__(self, matrix: Array) -> None:
        self._matrix, self._wide = matrix, matrix.shape[0] <= matrix.shape[1]
        self._far: Array | None = None
        if min(matrix.shape) <= SMALL:
            U, self.values, Vh = np.linalg.svd(matrix, full_matrices=False)
            self._near, self._far = (U, Vh.T) if self._wide else (Vh.T, U)
        else:
            squares, near = np.linalg.eigh(_gram(matrix))
            self.values, self._near = _roots(squares[::-1]), near[:, ::-1]

    @property
    def rank(self) -> int:
        """How many singular values are not zero but for rounding."""
        return int(np.sum(self.values > max(self._matrix.shape) * np.finfo(np.float64).eps * self.values[0]))

    def left(self, count: int | None = None) -> Array:
        """The top left singular vectors, out × count; all whose σ is not zero by default."""
        return self._vectors(self._wide, count)

    def right(self, count: int | None = None) -> Array:
        """The top right singular vectors, in × count."""
        return self._vectors(not self._wide, count)

    def _vectors(self, near: bool, count: int | None) -> Array:
        if near:
            return self._near[:, :count]
        if self._far is not None:
            return self._far[:, :count]
        count = self.rank if count is None else min(count, self.rank)
        times = self._matrix.T if self._wide else self._matrix
        return np.linalg.qr(times @ self._near[:, :count])[0]  # columns σ v, orthogonal but for rounding


class BaseVectors:
    """The singular vectors of W₀: the top left ones, and all of them once they are asked for."""

    def __init__(self, matrix: Array, count: int = TOP) -> None:
        self.matrix, self._count = matrix, count

    @cached_property
    def _top(self) -> tuple[Array, Array]:
        return top_singular(self.matrix, self._count)[:2]

    @property
    def top(self) -> Array:
        """The top left ones, out × count."""
        return self._top[0]

    @property
    def values(self) -> Array:
        """Their singular values."""
        return self._top[1]

    @cached_property
    def decomposed(self) -> Decomposed:
        """All of it; one serves every step of every method."""
        return Decomposed(self.matrix)

    @cached_property
    def all(self) -> Array:
        """All left ones, out × min(out, in)."""
        return self.decomposed.left()


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
    taker = SpectraTaker()
    try:
        observe(plan, [taker], progress=progress)
    except KeyboardInterrupt:
        raise SpectraInterrupted(taker.spectra()) from None
    return taker.spectra()


def observe(
    plan: Plan, takers: Sequence[Taker], *, directions: int = 0, progress: Progress | None = None
) -> None:
    """Show every base matrix with each of its tuned ones to those that take numbers of them, in the plan's order.

    Parameters
    ----------
    plan
        From `wdanalysis.measure.plan.plan`.
    takers
        What is read and decomposed once serves all of them. After Ctrl-C they hold what was done until then.
    directions
        How many right singular vectors of an update they need, beyond max(`SUBSPACES`).
    progress
        Called with the matrices done and the number of all.
    """
    progress = progress or (lambda done, total: None)
    last = _last_steps(plan)
    done, total = 0, sum(len(job.matrix.parts) * (len(job.dense) + len(job.updates)) for job in plan.jobs)
    progress(0, total)
    for job in plan.jobs:
        W0 = _whole(job, job.base)
        for part in job.matrix.parts:
            outputs = outputs_of(part)
            place: dict[str, object] = {
                "layer": job.matrix.layer,
                "module": part.module,
                "name": job.base.name,
            }
            base = BaseVectors(W0[outputs]) if np.isfinite(W0[outputs]).all() else None
            wanted = max(*SUBSPACES, directions)
            for state, update in _updates(job, W0, outputs, finite=base is not None, directions=wanted):
                pair = Pair(state, place, last[state.training] == state.step, base, update)
                for taker in takers:
                    taker.add(pair)
                done += 1
                progress(done, total)
            for taker in takers:
                taker.finish_matrix()


class SpectraTaker:
    """Takes both tables of `Spectra`."""

    def __init__(self) -> None:
        self._matrices: list[dict[str, object]] = []
        self._similarities: list[dict[str, object]] = []
        self._first: dict[tuple[str, str], Pair] = {}
        self._last: dict[tuple[str, str], Pair] = {}

    def add(self, pair: Pair) -> None:
        """Take a matrix's row."""
        self._matrices.append(pair.key | (_row(pair.update, pair.base) if pair.base and pair.update else {}))
        if pair.update:
            training = pair.state.training
            if training not in self._first or _earlier(pair, self._first[training]):
                self._first[training] = _without_matrices(pair)
            if pair.is_last:
                self._last[training] = _without_matrices(pair)

    def finish_matrix(self) -> None:
        """Take the similarity of the last updates of all methods and runs."""
        self._similarities += _similarities(self._last, self._first)
        self._first, self._last = {}, {}

    def spectra(self) -> Spectra:
        """All that was taken."""
        return _tables(self._matrices, self._similarities)


def _earlier(one: Pair, other: Pair) -> bool:
    return (one.state.step or 0) < (other.state.step or 0)


def _without_matrices(pair: Pair) -> Pair:
    """What similarity needs of it; the matrices themselves may go."""
    assert pair.update is not None
    return replace(pair, base=None, update=replace(pair.update, tuned=np.empty((0, 0)), whole=None))


def _tables(matrices: list[dict[str, object]], similarities: list[dict[str, object]]) -> Spectra:
    integers = dict.fromkeys(("step", "layer", *_COUNTS), "Int64")
    floats = dict.fromkeys(("stable_rank", "effective_rank", *_TOP_VALUES), "float64")
    table = pd.DataFrame(matrices, columns=list(SPECTRA_COLUMNS)).astype(integers | floats)
    pairs = pd.DataFrame(similarities, columns=list(SIMILARITY_COLUMNS))
    return Spectra(table, pairs.astype({"step_a": "Int64", "step_b": "Int64", "layer": "Int64"}))


def _last_steps(plan: Plan) -> dict[tuple[str, str], int | None]:
    """The last step of each method's runs; one that is not known counts as the last."""
    steps: dict[tuple[str, str], set[int | None]] = {}
    for job in plan.jobs:
        for state, _ in (*job.dense, *job.updates):
            steps.setdefault(state.training, set()).add(state.step)
    return {training: max(of, key=lambda step: (step is None, step or 0)) for training, of in steps.items()}


def _whole(job: Job, tensor: StoredTensor) -> Array:
    """What a job compares of a stored matrix, as out × in."""
    stored = widen(tensor.read_rows(0, job.matrix.rows))
    return stored.T if job.matrix.in_by_out else stored


def _updates(
    job: Job, W0: Array, outputs: NDArray[np.intp], *, finite: bool, directions: int
) -> Iterator[tuple[State, Update | None]]:
    """Every tuned matrix's update of these outputs; None where it or the base is not finite."""
    for state, tensor in job.dense:
        if not finite:
            yield state, None
            continue
        W = _whole(job, tensor)[outputs]
        yield state, _dense_update(W, W - W0[outputs], directions) if np.isfinite(W).all() else None
    for state, low_rank in job.updates:
        factors = load_update(low_rank)
        if not finite or not (np.isfinite(factors.A).all() and np.isfinite(factors.B).all()):
            yield state, None
        elif factors.magnitude is None:
            yield state, _low_rank_update(W0[outputs], factors.of_outputs(outputs), directions)
        else:
            d = _dora_update(W0, factors, outputs)
            of_part = factors.of_outputs(outputs)
            finite_update = np.isfinite(d).all()
            yield state, _dense_update(W0[outputs] + d, d, directions, of_part) if finite_update else None


def _dense_update(W: Array, d: Array, directions: int, factors: Factors | None = None) -> Update:
    values, right = values_and_right(d, directions)
    return Update(values, right, W, factors, d)


def _low_rank_update(W0: Array, factors: Factors, directions: int) -> Update:
    from scipy.sparse.linalg import aslinearoperator

    _, values, right = low_rank_svd(factors)
    BA = aslinearoperator(factors.scale * factors.B) @ aslinearoperator(factors.A)
    right = right[:, :directions]
    return Update(values, right[:, values[:directions] > 0], aslinearoperator(W0) + BA, factors)


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


def _similarities(
    last: Mapping[tuple[str, str], Pair], first: Mapping[tuple[str, str], Pair]
) -> Iterator[dict[str, object]]:
    """The rows of a matrix: of the last updates of every two methods or runs."""
    for a, b in itertools.combinations(last.values(), 2):
        assert a.update is not None
        assert b.update is not None
        U, V = a.update.right[:, : max(SUBSPACES)], b.update.right[:, : max(SUBSPACES)]
        sizes = [
            (i, j) for i, j in itertools.product(SUBSPACES, repeat=2) if i <= U.shape[1] and j <= V.shape[1]
        ]
        expected = by_initialisation(
            (_factors(first[a.state.training]), _factors(a)),
            (_factors(first[b.state.training]), _factors(b)),
            sizes,
        )
        for (i, j), by_factors in zip(sizes, expected, strict=True):
            yield {
                **a.place,
                **{f"{column}_a": a.key[column] for column in ("method", "run", "step")},
                **{f"{column}_b": b.key[column] for column in ("method", "run", "step")},
                **{"i": i, "j": j, "similarity": subspace_similarity(U[:, :i], V[:, :j])},
                **{"by_chance": max(i, j) / U.shape[0], "by_initialisation": by_factors},
            }


def _factors(pair: Pair) -> Factors | None:
    assert pair.update is not None
    return pair.update.factors


Course = tuple[Factors | None, Factors | None]
"""An adapter at its first kept step and now; None where it is no adapter."""


def by_initialisation(
    a: Course, b: Course, sizes: Sequence[tuple[int, int]], *, draws: int | None = None
) -> list[float]:
    """φ(i, j) that two adapters would have by where their A's started alone.

    Each starts with its A of its first kept step, goes on from there in random directions, every row of A as far as it
    really went, and has a random B: the mean over seeded draws. A's that share a seed begin in the same rows, and so
    the updates of two runs are similar before they have learned anything.

    Parameters
    ----------
    a, b
        Both adapters.
    sizes
        The i and j; NaN for those that a random product cannot have.
    draws
        Of how many pairs of adapters it is the mean; None: `DRAWS`, at least four.

    Examples
    --------
    >>> A, B = np.eye(4, 100), np.ones((50, 4))
    >>> shared = (Factors(B, A, 1.0), Factors(B, A, 1.0))
    >>> np.round(by_initialisation(shared, shared, [(4, 4)]), 3)
    array([1.])
    """
    if a[0] is None or a[1] is None or b[0] is None or b[1] is None:
        return [np.nan] * len(sizes)
    # seeded by the adapters themselves: with one seed for all, the means over layers would share one error
    rng = np.random.default_rng([zlib.crc32(now.A.tobytes()) for now in (a[1], b[1])])
    draws = draws or min(DRAWS, max(4, DRAWS * 32 // len(a[1].A)))
    total = np.zeros(len(sizes))
    for _ in range(draws):
        U, V = _random_directions(a[0], a[1], rng), _random_directions(b[0], b[1], rng)
        total += [
            subspace_similarity(U[:, :i], V[:, :j]) if i <= U.shape[1] and j <= V.shape[1] else np.nan
            for i, j in sizes
        ]
    return [float(mean) for mean in total / draws]


def _random_directions(first: Factors, now: Factors, rng: np.random.Generator) -> Array:
    """The right singular vectors of a random B times an A that went as far as it did, in random directions."""
    start = first.A if first.A.shape == now.A.shape else now.A
    distance = np.linalg.norm(now.A - start, axis=1, keepdims=True)
    way = rng.standard_normal(start.shape)
    A = start + distance * way / np.linalg.norm(way, axis=1, keepdims=True)
    return low_rank_svd(Factors(rng.standard_normal(now.B.shape), A, 1.0))[2]

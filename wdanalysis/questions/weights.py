"""What the weights of an adapter say by themselves, without a base: how large each update is and which rank it needs.

An update is s·BA. With B = Q_B R_B and Aᵀ = Q_A R_A its singular values are those of s·R_B R_Aᵀ, which is r × r: no
matrix of the model's size is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from wdanalysis.checkpoints.names import Architecture, recognise
from wdanalysis.checkpoints.series import open_series
from wdanalysis.checkpoints.tensors import Checkpoint, LowRankUpdate
from wdanalysis.decomposition import Axis
from wdanalysis.errors import CheckpointError
from wdanalysis.kernels.cores import available_cores
from wdanalysis.kernels.lowrank import Array, Factors
from wdanalysis.kernels.sums import Vector
from wdanalysis.measure.stream import load_update

if TYPE_CHECKING:
    from wdanalysis.figures import Figure

ENERGIES = (90, 95, 99)
"""Per cent of Σ σ² of which the rank is told."""

OUTLYING = 5.0
"""A module whose robust z is beyond this, either way, is an outlier of its family."""

LEAST_FAMILY = 8
"""A family of fewer modules has no outliers: its spread is not known."""

MODULE_COLUMNS = (
    "run",
    "step",
    "layer",
    "module",
    "name",
    "rank",
    "scale",
    "norm",
    "share",
    "sigma_max",
    "stable_rank",
    *(f"rank_{energy}" for energy in ENERGIES),
    "m_mean",
    "m_spread",
    "m_min",
    "m_max",
    "robust_z",
    "outlier",
)


@dataclass(frozen=True)
class AdapterWeights:
    """What `adapter_weights` found.

    Attributes
    ----------
    path, name, method
        What was read, what `compare` would call it, and ``LoRA``, ``DoRA`` …
    modules
        A row for each adapted module and step: `rank` r and `scale` s; `norm` ‖s·BA‖ and its `share` of Σ ‖s·BA‖² over
        the step; `sigma_max`, the largest singular value; `stable_rank` ‖s·BA‖²/σ₁²; `rank_90` …, the fewest singular
        values that have that much of Σ σ²; DoRA's magnitudes: `m_mean`, `m_spread` (standard deviation over mean),
        `m_min` and `m_max`; `robust_z` of log `norm` among the modules of its kind, and whether it is an `outlier`
        (`OUTLYING`). Empty where there is no value.
    singular_values
        A row for each of them: `run`, `step`, `name`, `index` from 1, `sigma`.
    notes
        Sentences on what was left out.

    Examples
    --------
    >>> found = wd.adapter_weights("sample_checkpoints/lora")
    >>> found.by_layer().head(2)  # of the last step
       layer  share
    0      0   0.24
    1      1   0.13
    """

    path: Path
    name: str
    method: str
    modules: pd.DataFrame
    singular_values: pd.DataFrame
    notes: tuple[str, ...]

    def last(self) -> pd.DataFrame:
        """Return the rows of the last step (of the first run, where there are several)."""
        table = self.modules
        of_run: pd.DataFrame = table[table["run"] == table["run"].iloc[0]]
        return of_run if of_run["step"].isna().all() else of_run[of_run["step"] == of_run["step"].max()]

    def by_module(self) -> pd.DataFrame:
        """Sum up the last step by kind of module: the median of each number, and the largest rank that any needs."""
        ranks = {f"rank_{energy}": (f"rank_{energy}", "max") for energy in ENERGIES}
        grouped = self.last().groupby("module", sort=False)
        summed: pd.DataFrame = grouped.agg(
            modules=("name", "size"),
            rank=("rank", "max"),
            norm=("norm", "median"),
            share=("share", "sum"),
            stable_rank=("stable_rank", "median"),
            **ranks,
            m_mean=("m_mean", "median"),
            m_spread=("m_spread", "median"),
            outliers=("outlier", "sum"),
        ).reset_index()
        return summed

    def by_layer(self) -> pd.DataFrame:
        """Share of Σ ‖s·BA‖² of the last step by layer, the largest first: which blocks carry the adapter."""
        shares = self.last().dropna(subset="layer").groupby("layer")["share"].sum()
        return shares.sort_values(ascending=False, kind="stable").reset_index()

    def figure(self, **choices: Any) -> Figure:
        """Draw ‖s·BA‖ and the rank for 95 % of its energy by layer (`wdanalysis.figures.weights_figure.weights`)."""
        from wdanalysis.figures.weights_figure import weights

        return weights(self.last(), **choices)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain numbers, None where there is none."""
        sigma = self.singular_values.groupby(["run", "step", "name"], sort=False, dropna=False)["sigma"]
        rows = self.modules.astype(object).where(self.modules.notna(), None).to_dict("records")
        for row, (_, values) in zip(rows, sigma, strict=True):
            row["singular_values"] = values.tolist()
        return {
            "path": str(self.path),
            "name": self.name,
            "method": self.method,
            "modules": rows,
            "notes": list(self.notes),
        }


def adapter_weights(
    path: str | Path, *, alpha: float | None = None, dora_axis: Axis | None = None
) -> AdapterWeights:
    """Read every update of an adapter, or of a folder of its steps, as a matrix s·BA; no base is needed.

    Parameters
    ----------
    path
        A file or folder.
    alpha
        LoRA's α for an adapter file without its `adapter_config.json`.
    dora_axis
        The axis of its magnitudes, where neither their shape nor their writer tells it.

    Raises
    ------
    CheckpointError
        It is no adapter, is damaged, or has no update of the form s·BA.

    Examples
    --------
    >>> found = wd.adapter_weights("sample_checkpoints/dora/checkpoint-240")
    >>> found.by_module()[["module", "modules", "rank", "rank_95"]].head(2)
      module  modules  rank  rank_95
    0   down       10     8        8
    1     up       10     8        8
    """
    series = open_series(path, alpha=alpha, dora_axis=dora_axis)
    notes = [*series.notes]
    kept: list[pd.DataFrame] = []
    sigmas: list[pd.DataFrame] = []
    for checkpoint in series.checkpoints:
        if not checkpoint.is_adapter:
            raise CheckpointError(f"{checkpoint.path} is no adapter; compare it with its base instead.")
        notes += [*checkpoint.notes, *_left_out(checkpoint)]
        rows, values = _of_checkpoint(checkpoint)
        kept.append(rows)
        sigmas.append(values)
        notes += _faults(checkpoint, rows)
    modules = pd.concat(kept, ignore_index=True)
    if modules.empty:
        raise CheckpointError(f"{series.path} has no update s·BA to look at{_why_none(series.checkpoints)}.")
    method = series.checkpoints[-1].method or "LoRA"
    singular_values = pd.concat(sigmas, ignore_index=True)
    return AdapterWeights(
        Path(path), series.name, method, modules, singular_values, tuple(dict.fromkeys(notes))
    )


def _of_checkpoint(checkpoint: Checkpoint) -> tuple[pd.DataFrame, pd.DataFrame]:
    shapes = {f"{update.module}.weight": update.shape for update in checkpoint.updates}
    measure = partial(_measured, checkpoint, recognise(shapes, None))
    with ThreadPoolExecutor(available_cores(), thread_name_prefix="wd-analyze") as pool:
        measured = list(pool.map(measure, checkpoint.updates))
    rows = pd.DataFrame([row for row, _ in measured], columns=list(MODULE_COLUMNS))
    squares = rows["norm"] ** 2
    rows["share"] = squares / total if (total := squares.sum()) else np.nan
    rows["robust_z"] = _robust_z(rows)
    rows["outlier"] = rows["robust_z"].abs() > OUTLYING
    for column in ("step", "layer"):
        rows[column] = rows[column].astype("Int64")
    for column in ("m_mean", "m_spread", "m_min", "m_max"):
        rows[column] = rows[column].astype(float)
    sigma = [
        {"run": row["run"], "step": row["step"], "name": row["name"], "index": place, "sigma": value}
        for row, values in measured
        for place, value in enumerate(values, 1)
    ]
    columns = ["run", "step", "name", "index", "sigma"]
    return rows, pd.DataFrame(sigma, columns=columns).astype({"step": "Int64"})


def _measured(
    checkpoint: Checkpoint, architecture: Architecture, update: LowRankUpdate
) -> tuple[dict[str, Any], Vector]:
    name = f"{update.module}.weight"
    matrix = architecture.matrix(name, update.shape)
    factors = load_update(update)
    sigma = singular_values(factors.B, factors.A, factors.scale)
    return {
        "run": checkpoint.run,
        "step": checkpoint.step,
        "layer": matrix.layer if matrix else None,
        "module": "+".join(part.module for part in matrix.parts) if matrix else update.module,
        "name": update.module,
        "rank": update.rank,
        "scale": update.scale,
        **_spectrum(sigma),
        **_magnitudes(factors),
    }, sigma


def singular_values(B: Array, A: Array, scale: float = 1.0) -> Vector:
    """Return the singular values of s·BA, the largest first; NaN where a factor is not finite.

    Parameters
    ----------
    B, A
        out × r and r × in.
    scale
        s.

    Examples
    --------
    >>> singular_values(np.array([[3.0], [4.0]]), np.array([[0.0, 2.0]]), scale=0.5)
    array([5.])
    """
    if not (np.isfinite(B).all() and np.isfinite(A).all()):
        return np.full(min(*B.shape, *A.shape), np.nan)
    R_B: Array = np.asarray(np.linalg.qr(B, mode="r"))
    R_A: Array = np.asarray(np.linalg.qr(A.T, mode="r"))
    sigma: Vector = np.linalg.svd(R_B @ R_A.T, compute_uv=False).astype(np.float64)
    return abs(scale) * sigma


def _spectrum(sigma: Vector) -> dict[str, Any]:
    energy = sigma**2
    total = float(energy.sum())
    if not total > 0:  # nothing was trained, or a NaN
        return {"norm": total, "sigma_max": total}
    reached = np.cumsum(energy) / total
    ranks = {f"rank_{share}": int(np.sum(reached < share / 100 * (1 - 1e-12))) + 1 for share in ENERGIES}
    return {
        "norm": total**0.5,
        "sigma_max": float(sigma[0]),
        "stable_rank": total / float(energy[0]),
        **ranks,
    }


def _magnitudes(factors: Factors) -> dict[str, float]:
    m = factors.magnitude
    if m is None or not np.isfinite(m).all():
        return {}
    mean = float(m.mean())
    spread = float(m.std()) / mean if mean else np.nan
    return {"m_mean": mean, "m_spread": spread, "m_min": float(m.min()), "m_max": float(m.max())}


def _robust_z(rows: pd.DataFrame) -> pd.Series[float]:
    """0.6745 · (x − median)/MAD of x = log ‖s·BA‖ among the modules of a kind (Iglewicz and Hoaglin 1993)."""
    x = np.log(rows["norm"].where(rows["norm"] > 0))

    def of_family(family: pd.Series[float]) -> pd.Series[float]:
        away = family - family.median()
        mad = away.abs().median()
        is_known = family.count() >= LEAST_FAMILY and mad > 0
        return 0.6745 * away / mad if is_known else away * np.nan

    z: pd.Series[float] = x.groupby(rows["module"]).transform(of_family)
    return z


def _left_out(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.formulas:
        methods = ", ".join(dict.fromkeys(formula.method for formula in checkpoint.formulas))
        yield (
            f"{len(checkpoint.formulas)} modules that {checkpoint.path} adapts by {methods} were left out: their "
            "update is not s·BA; compare the adapter with its base."
        )
    if checkpoint.tensors:
        yield f"{len(checkpoint.tensors)} whole tensors of {checkpoint.path} were left out: they are no updates."


def _faults(checkpoint: Checkpoint, rows: pd.DataFrame) -> Iterator[str]:
    for is_fault, what in (
        (rows["norm"] == 0, "are zero (B or A was never trained)"),
        (rows["norm"].isna(), "are not finite (NaN or infinite)"),
    ):
        if is_fault.any():
            first = rows.loc[is_fault, "name"].iloc[0]
            yield f"{is_fault.sum()} of {len(rows)} updates of {checkpoint.path} {what}, such as {first}."


def _why_none(checkpoints: Iterable[Checkpoint]) -> str:
    methods = dict.fromkeys(formula.method for one in checkpoints for formula in one.formulas)
    return f": it adapts by {', '.join(methods)}; compare it with its base" if methods else ""

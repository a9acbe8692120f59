"""What r, and which points, updates without structure would show: with the norms, ranks, steps and axis of the run.

Layers differ in the lengths of their vectors and steps in the size of the update, so ΔM and ΔD of random updates go
together too. A measured r says something of training where it lies outside the band of theirs. The null models:

- whole matrices (``stored``) and adapters (``low-rank``): each matrix's update is an isotropic random walk, of the
  adapter's rank, with the observed ‖ΔW‖ at each step. The table has what one would make of ΔM and ΔD, by closed forms
  (`wdanalysis.kernels.chance`).
- ``dora``: the turn is the observed one, and each m makes a random walk of its own, of the same size in all layers:
  m − m₀ ~ N(0, S²) with S² = Σ (m − m₀)² / vectors over the panel's layers at that step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import erf

DRAWS = 999
SEED = 0

BAND = 0.95
"""A band holds this share of what chance gives. Its ends come from `DRAWS` draws; they are taken so far out that it
holds no less with a probability of 95 %."""

_TAIL = (0.5 - BAND / 2) - 1.645 * math.sqrt((0.5 - BAND / 2) * (0.5 + BAND / 2) / DRAWS)
_QUANTILES = (0.5, _TAIL, 1 - _TAIL)

NULL_COLUMNS = ("r_null", "r_null_low", "r_null_high")
"""Median and band of r over the draws."""

CURVE_COLUMNS = ("method", "module", "step", "layer", "delta_d", "delta_m_low", "delta_m", "delta_m_high")
"""The columns of `null_curve`."""

_KEYS = ["method", "module", "axis"]
_SCOPES = ("pooled", "within_step")
_OF_MATRIX = ["run", "name", "layer"]
_NUMBERS = (
    *("delta_d", "null_delta_d", "null_delta_d_sd", "null_delta_m", "null_delta_m_sd"),
    *("update_norm", "delta_m_norm", "vectors", "length", "base_norm", "rank"),
)
_TWO_SIDED = 1.959963984540054
_LEAST_SPREAD = 1e-12

Numbers = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Walks:
    """The points of a metrics table as their null models have them; arrays of one number for each point.

    Attributes
    ----------
    delta_d, delta_d_sd, delta_m, delta_m_sd
        Expectations and standard deviations of one draw; NaN where the table does not carry a null.
    size
        How far the walk has come: ‖ΔW‖, and for ``dora`` S.
    radial_d, radial_m
        The share of each variance that comes from the sign of ρ, to first order: a vector that grows by ρ turns less.
        It moves ΔD and ΔM in opposite directions.
    fixed
        The share of the rest of ΔM's variance that stays from step to step: an adapter's A is drawn once.
    panel
        Which method, module and axis a point is of, from 0 in the table's order.
    matrix
        Which matrix.
    place
        Which of the matrix's steps, from 0.
    step
        Which step, of those of its panel.
    """

    delta_d: Numbers
    delta_d_sd: Numbers
    delta_m: Numbers
    delta_m_sd: Numbers
    size: Numbers
    radial_d: Numbers
    radial_m: Numbers
    fixed: Numbers
    panel: Labels
    matrix: Labels
    place: Labels
    step: Labels

    @classmethod
    def of(cls, metrics: pd.DataFrame) -> Walks:
        """Take them from rows of the metrics table."""
        rows = metrics.reindex(columns=[*_KEYS, *_OF_MATRIX, "step", "update", *_NUMBERS])
        seen, d, d_sd, m, m_sd, size, m_norm, vectors, length, base_norm, rank = (
            rows[name].to_numpy(np.float64, na_value=np.nan) for name in _NUMBERS
        )
        panel, matrix, step = (
            _labels(rows, names) for names in (_KEYS, _KEYS + _OF_MATRIX, [*_KEYS, "step"])
        )
        order = pd.Series(rows["step"].to_numpy(np.float64, na_value=np.inf))
        place = order.groupby(matrix).rank("first").to_numpy().astype(np.int64) - 1
        is_dora = rows["update"].eq("dora").to_numpy(bool, na_value=False)
        with np.errstate(invalid="ignore", divide="ignore"):
            sigma = size / np.sqrt(vectors * length)  # of ρ
            m0 = base_norm / np.sqrt(vectors)
            from_sign_d = 2 * d * sigma / m0  # standard deviations of one vector's
            from_sign_m = sigma * erf(m0 * d / sigma / math.sqrt(2))
            from_factor = m / np.sqrt(2 * rank)
            radial_d, radial_m, fixed = (
                np.nan_to_num(np.minimum(1, sd_of_one**2 / vectors / sd**2))
                for sd_of_one, sd in ((from_sign_d, d_sd), (from_sign_m, m_sd), (from_factor, m_sd))
            )
        spread, folded = _spread(m_norm, vectors, step), math.sqrt(2 / math.pi)
        return cls(
            delta_d=np.where(is_dora, seen, d),
            delta_d_sd=np.where(is_dora, 0.0, d_sd),
            delta_m=np.where(is_dora, folded * spread, m),
            delta_m_sd=np.where(is_dora, spread * np.sqrt((1 - folded**2) / vectors), m_sd),
            size=np.where(is_dora, spread, size),
            radial_d=radial_d,
            radial_m=radial_m,
            fixed=fixed,
            panel=panel,
            matrix=matrix,
            place=place,
            step=step,
        )

    @property
    def known(self) -> NDArray[np.bool_]:
        """Which points have a null."""
        numbers = np.array([self.delta_d, self.delta_d_sd, self.delta_m, self.delta_m_sd])
        return np.asarray(np.isfinite(numbers).all(axis=0))

    def where(self, kept: NDArray[np.bool_]) -> Walks:
        """Those points alone."""
        return Walks(**{name: values[kept] for name, values in vars(self).items()})

    def draw(self, generator: np.random.Generator, draws: int) -> tuple[Numbers, Numbers]:
        """(n × draws) ΔD and ΔM: what is expected, and noise that is the walk's over the steps of a matrix."""
        sign, noise_d, noise_m = noise = generator.standard_normal((3, len(self.size), draws))
        last = np.full(self.matrix.max(initial=-1) + 1, -1)  # each matrix's point before
        for place in range(self.place.max(initial=-1) + 1):
            (now,) = np.nonzero(self.place == place)
            before = last[self.matrix[now]]
            last[self.matrix[now]] = now
            now, before = now[before >= 0], before[before >= 0]
            kept = self._kept(before, now)[:, :, None]
            noise[:, now] = kept * noise[:, before] + np.sqrt(1 - kept**2) * noise[:, now]
        noise_d = -_column(self.radial_d) * sign + _column(1 - self.radial_d) * noise_d
        noise_m = _column(self.radial_m) * sign + _column(1 - self.radial_m) * noise_m
        return (
            self.delta_d[:, None] + self.delta_d_sd[:, None] * noise_d,
            np.abs(self.delta_m[:, None] + self.delta_m_sd[:, None] * noise_m),
        )

    def _kept(self, before: NDArray[np.intp], now: NDArray[np.intp]) -> Numbers:
        """Correlation of the three noises at one step and the next of a walk.

        Of d and so of ρ it is κ = σ/σ′; of what is even in d, |ρ| and Σ d², κ².
        """
        sizes = self.size[before], self.size[now]
        low, high = np.minimum(*sizes), np.maximum(*sizes)
        kappa = np.divide(low, high, out=np.ones_like(high), where=high > 0)
        return np.array([kappa, kappa**2, kappa**2 + (1 - kappa**2) * self.fixed[now]])


def null_r(metrics: pd.DataFrame) -> pd.DataFrame:
    """Correlate ΔM with ΔD in draws of each panel's null model.

    Parameters
    ----------
    metrics
        The metrics table, with diagnostics.

    Returns
    -------
    DataFrame
        method, module, axis, scope (``pooled``, ``within_step``) and `NULL_COLUMNS`, over `DRAWS` draws from a fixed
        seed. Empty where the table has no diagnostics, and where there is no r.

    Examples
    --------
    >>> null_r(run.metrics).query("module == 'q'").round(1)[["method", "scope", "r_null_low", "r_null_high"]]
      method        scope  r_null_low  r_null_high
    0     ft       pooled         0.7          0.9
    2   dora       pooled         0.2          0.7
    4     ft  within_step         0.2          0.8
    6   dora  within_step        -0.5          0.6
    """
    walks, keys = Walks.of(metrics), metrics[_KEYS].drop_duplicates()
    measured = metrics["delta_m"].notna().to_numpy(bool)
    bands = [_bands(walks.where((walks.panel == panel) & measured)) for panel in range(len(keys))]
    table = pd.concat([keys.assign(scope=scope) for scope in _SCOPES])
    numbers = np.array(bands).reshape(-1, len(_SCOPES), len(NULL_COLUMNS)).swapaxes(0, 1)
    return table.assign(**dict(zip(NULL_COLUMNS, np.concatenate(numbers).T, strict=True))).reset_index(
        drop=True
    )


def _bands(walks: Walks) -> Numbers:
    """Median, low and high end of r in draws of one panel: of all points, and within steps."""
    empty: Numbers = np.full((len(_SCOPES), len(NULL_COLUMNS)), np.nan)
    if len(walks.size) < 3 or not walks.known.all():
        return empty
    d, m = walks.draw(np.random.default_rng(SEED), DRAWS)
    _, step = np.unique(walks.step, return_inverse=True)
    bands = empty.copy()
    for band, group in zip(bands, (np.zeros_like(step), step), strict=True):
        r = _pearson_within(d, m, group)
        if np.isfinite(r).all():
            band[:] = np.quantile(r, _QUANTILES)
    return bands


def null_curve(metrics: pd.DataFrame) -> pd.DataFrame:
    """Give every point's place under its panel's null model, to draw a band.

    Parameters
    ----------
    metrics
        The metrics table, with diagnostics.

    Returns
    -------
    DataFrame
        `CURVE_COLUMNS`, in the table's order: the expected ΔD and ΔM, and the ends of the interval that holds
        `BAND` of one draw's ΔM. Rows without a null are left out.
    """
    walks = Walks.of(metrics)
    margin = _TWO_SIDED * walks.delta_m_sd
    numbers = {
        "delta_d": walks.delta_d,
        "delta_m_low": np.maximum(walks.delta_m - margin, 0.0),
        "delta_m": walks.delta_m,
        "delta_m_high": walks.delta_m + margin,
    }
    table = metrics.assign(**numbers)[list(CURVE_COLUMNS)]
    known: pd.DataFrame = table[walks.known].reset_index(drop=True)
    return known


def reading(r: float, low: float, high: float, *, update: str) -> str | None:
    """Say how r lies to the band of its null model; None where there is no band.

    Parameters
    ----------
    r, low, high
        `pearson_r`, `r_null_low` and `r_null_high`.
    update
        The panel's `update`: of what the null model is.

    Examples
    --------
    >>> reading(0.97, 0.85, 0.96, update="low-rank")
    'r = +0.97; random updates of the same size would give +0.85 … +0.96.'
    >>> reading(0.46, 0.38, 0.80, update="dora")
    'r = +0.46 is what chance gives: magnitudes that move at random as far would have +0.38 … +0.80.'
    """
    if not all(map(math.isfinite, (r, low, high))):
        return None
    what = "magnitudes that move at random as far" if update == "dora" else "random updates of the same size"
    band = f"{_signed(low)} … {_signed(high)}"
    if low <= r <= high:
        return f"r = {_signed(r)} is what chance gives: {what} would have {band}."
    return f"r = {_signed(r)}; {what} would give {band}."


def _labels(rows: pd.DataFrame, names: list[str]) -> Labels:
    """Number the combinations of the columns, in the order in which they come."""
    return rows.groupby(names, sort=False, dropna=False).ngroup().to_numpy().astype(np.int64)


def _spread(m_norm: Numbers, vectors: Numbers, group: Labels) -> Numbers:
    """S of each point's step: √(Σ (m − m₀)² / vectors) over the matrices of that step."""
    known = np.isfinite(m_norm)
    square = np.bincount(group, weights=np.where(known, m_norm, 0.0) ** 2)
    count = np.bincount(group, weights=np.where(known, vectors, 0.0))
    spread: Numbers = np.sqrt(np.divide(square, count, out=np.full(len(square), np.nan), where=count > 0))
    return spread[group]


def _column(share: Numbers) -> Numbers:
    """The standard deviation of a share of the variance, one for each row of an (n × draws) array."""
    deviation: Numbers = np.sqrt(share)[:, None]
    return deviation


def _pearson_within(x: Numbers, y: Numbers, group: Labels) -> Numbers:
    """Pearson's r of each column of two (n × draws) arrays, after taking out each group's mean; NaN without spread."""
    of_group = np.eye(group.max() + 1)[group]
    mean = (of_group / of_group.sum(axis=0)).T
    u, v = (values - of_group @ (mean @ values) for values in (x, y))
    flat = [
        np.abs(centred).max(axis=0) <= _LEAST_SPREAD * np.abs(values).max(axis=0)
        for centred, values in ((u, x), (v, y))
    ]
    uu, uv, vv = (np.einsum("ij,ij->j", one, other) for one, other in ((u, u), (u, v), (v, v)))
    r: Numbers = np.divide(uv, np.sqrt(uu * vv), out=np.full_like(uu, np.nan), where=~(flat[0] | flat[1]))
    return np.clip(r, -1, 1)


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")

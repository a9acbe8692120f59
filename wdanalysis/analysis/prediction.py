"""What a run's schedule of learning rates predicts of ΔM and ΔD, and how well that is met.

Three laws, derived in docs/method.md ("What the schedule predicts"). With D the `diffusion` of the schedule, which is
about S2 = Σ lr², and c = 1 − Π(1 − lr·wd):

    low-rank   ΔM ≈ mean m(1 − cos)                             turning alone; neither fit nor schedule
    dora       ΔM ≈ mean |N(−c·m₀, D)|, that is √(2D/π) for wd = 0      no fit
    stored     ΔD ≈ g · L·D/(2·(1 − c)²) · mean 1/m₀²           one fitted g for a method and a role
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from wdanalysis.analysis.table import labels
from wdanalysis.checkpoints.schedules import Schedule, ScheduleSums

_SUMS = tuple(field.name for field in dataclasses.fields(ScheduleSums))
SCHEDULE_COLUMNS = ("method", "step", *_SUMS, "source", "run")
"""The columns of `schedule_table`."""

_CHECKPOINT = ("method", "run", "step")

PREDICTION_COLUMNS = (
    *("method", "module", "axis", "step", "layer", "name", "law", "quantity", "predicted", "observed"),
    *("fitted", "r2", "bias", "p_value", "q_value", "run"),
)
"""The columns of `predictions`."""

LEAST_R2 = 0.9
"""A law is said to hold from this R² of a panel on."""

MOST_BIAS = 0.1
"""And where the mean prediction is within this share of the mean observation."""

SIGNIFICANT = 0.01
"""And, where it tells layers apart, where its `q_value` is not above."""

FEWEST_LAYERS = 6
"""And from so many matrices on."""

FEWEST_STEPS = 3
"""And so many steps, where it predicts the same for every layer."""

PERMUTATIONS = 4_999
"""Of the layers, for `p_value`."""


@dataclass(frozen=True)
class Law:
    """A prediction.

    Attributes
    ----------
    update
        The rows that it is of, by their column `update`.
    quantity
        The column that it predicts.
    predict
        From rows of the metrics table beside the sums of their schedules to the predictions.
    fitted
        Whether the prediction is up to a factor, which is fitted to each panel.
    sentence
        What is said where it holds; it may name `r2`, `fitted` and `decay`.
    """

    update: str
    quantity: str
    predict: Callable[[pd.DataFrame], pd.Series[float]]
    fitted: bool
    sentence: str


def turning(rows: pd.DataFrame) -> pd.Series[float]:
    """ΔM of vectors that get longer only by turning: m − m₀ = m(1 − cos) where d has no radial part."""
    return rows["centrifugal"]


def diffusing_magnitude(rows: pd.DataFrame) -> pd.Series[float]:
    """ΔM of a trained m whose gradients are noise: the mean |N(−c·m₀, D)| over the vectors.

    The m₀ of a matrix are taken as normal of their own mean and variance, so that −c·m₀ + N(0, D) is normal as well.
    """
    mean = rows["delta_m"] / rows["rel_delta_m"]
    variance = np.maximum(rows["base_norm"] ** 2 / rows["vectors"].astype(float) - mean**2, 0)
    shrink = 1 - rows["kept"]
    sd = np.sqrt(rows["diffusion"] + shrink**2 * variance)
    return pd.Series(mean_absolute_normal(-shrink * mean, sd), rows.index)


def diffusing_weights(rows: pd.DataFrame) -> pd.Series[float]:
    """ΔD of vectors whose L elements each diffuse on their own: L·D/(2·kept²) · mean 1/m₀²."""
    spread = rows["length"].astype(float) * rows["diffusion"] / rows["kept"] ** 2
    return spread / 2 * rows["mean_inverse_m0_squared"]


LAWS: Mapping[str, Law] = {
    "turning": Law(
        "low-rank",
        "delta_m",
        turning,
        False,
        "ΔM is what turning alone does to lengths, the mean m(1 − cos): R² = {r2:.2f} without a fit.",
    ),
    "diffusing_magnitude": Law(
        "dora",
        "delta_m",
        diffusing_magnitude,
        False,
        "ΔM is that of magnitudes which only diffuse under Adam's steps{decay}: R² = {r2:.2f} without a fit.",
    ),
    "diffusing_weights": Law(
        "stored",
        "delta_d",
        diffusing_weights,
        True,
        "ΔD is in every layer about {fitted:.2g} × what Adam's steps in random directions turn: R² = {r2:.2f} with "
        "this one number fitted.",
    ),
}
"""Every law by its name in the table."""


def mean_absolute_normal(mean: ArrayLike, sd: ArrayLike) -> NDArray[np.float64]:
    """E|N(mean, sd²)|: sd·√(2/π)·exp(−mean²/2sd²) + mean·erf(mean/(sd·√2)).

    >>> mean_absolute_normal([0.0, 3.0], [1.0, 0.0]).round(4)
    array([0.7979, 3.    ])
    """
    from scipy.special import erf

    mean, sd = np.asarray(mean, float), np.asarray(sd, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(sd > 0, mean / sd, np.copysign(np.inf, mean))
    around = np.exp(-(ratio**2) / 2)
    folded: NDArray[np.float64] = sd * np.sqrt(2 / np.pi) * around + mean * erf(ratio / np.sqrt(2))
    return folded


def schedule_table(
    schedules: Mapping[tuple[str, str], Schedule], checkpoints: Iterable[tuple[str, str, int | None]]
) -> pd.DataFrame:
    """Sum up the schedules at the steps of checkpoints.

    Parameters
    ----------
    schedules
        By method and run, which is "" where a method has one; a run without a schedule gets no row.
    checkpoints
        Method, run and step of each. One whose step is not known counts as the run's last.

    Returns
    -------
    DataFrame
        `SCHEDULE_COLUMNS`, a row for every checkpoint that lies within its schedule.
    """
    rows = []
    for method, run, step in dict.fromkeys(checkpoints):
        if (schedule := schedules.get((method, run))) is None:
            continue
        if sums := schedule.sums(len(schedule.learning_rates) if step is None else step):
            whose = {"method": method, "run": run, "step": step, "source": schedule.source}
            rows.append(whose | dataclasses.asdict(sums))
    table = pd.DataFrame(rows, columns=list(SCHEDULE_COLUMNS))
    return table.astype({"step": "Int64", **dict.fromkeys(_SUMS, "float64")})


def predictions(metrics: pd.DataFrame, schedules: pd.DataFrame | None = None) -> pd.DataFrame:
    """Put what is observed beside what the laws of this module predict.

    Parameters
    ----------
    metrics
        The metrics table with diagnostics; a law whose columns it lacks predicts nothing, nor does one of a matrix that
        was not changed.
    schedules
        As `schedule_table` makes it; None or empty where no schedule is known: then only `turning` predicts.

    Returns
    -------
    DataFrame
        `PREDICTION_COLUMNS`, a row for every run, step and matrix that a law speaks of. Of the whole panel (method,
        run, module and law) are `fitted`, the fitted factor (empty for laws without); `r2` = 1 − Σ(observed −
        predicted)² / Σ(observed − mean observed)², which is negative where a law without a fit does worse than the
        panel's own mean; `bias`, mean predicted over mean observed less 1; `p_value`, the share of permutations of
        the layers that fit as well (empty where all layers get the same prediction), and `q_value`, the same with the
        false discovery rate over the panels held (Benjamini and Hochberg).
    """
    sums = schedule_table({}, ()) if schedules is None else schedules
    rows = metrics.assign(run=labels(metrics, "run"))
    rows = rows.merge(sums[[*_CHECKPOINT, *_SUMS]], on=list(_CHECKPOINT), how="left")
    told = pd.concat([_told_by(name, law, rows) for name, law in LAWS.items()]).sort_index()
    x, y = told["predicted"].to_numpy(float), told["observed"].to_numpy(float)
    panels = [*told.groupby(["method", "run", "module", "axis", "law"], sort=False).indices.values()]
    fits = [_fit(x[at], y[at], told.iloc[at], fitted=LAWS[told["law"].iloc[at[0]]].fitted) for at in panels]
    q_values = _q_values([fit.p_value for fit in fits])
    of_panels = np.full((len(told), 5), np.nan)
    for at, fit, q in zip(panels, fits, q_values, strict=True):
        of_panels[at] = (*dataclasses.astuple(fit), q)
    told[["fitted", "r2", "bias", "p_value", "q_value"]] = of_panels
    told["predicted"] = x * told["fitted"].fillna(1.0)
    return told[list(PREDICTION_COLUMNS)].reset_index(drop=True)


def holds(panel: pd.DataFrame) -> bool:
    """Whether the law of one panel's predictions, of one run, holds.

    It does where R² ≥ `LEAST_R2`, |bias| ≤ `MOST_BIAS`, from `FEWEST_LAYERS` matrices; and where no other order of the
    layers would do as well (`q_value` ≤ `SIGNIFICANT`), or, if the law tells none apart, from `FEWEST_STEPS` steps.
    """
    first = panel.iloc[0]
    if _tells_layers_apart(panel):
        is_no_chance = first["q_value"] <= SIGNIFICANT
    else:
        is_no_chance = panel["step"].nunique() >= FEWEST_STEPS
    return bool(
        is_no_chance
        and panel["name"].nunique() >= FEWEST_LAYERS
        and first["r2"] >= LEAST_R2
        and abs(first["bias"]) <= MOST_BIAS
    )


def reading(panel: pd.DataFrame) -> str | None:
    """The sentence of one panel's predictions where its law holds in every run; None where it does not.

    The numbers of several runs are those of the run with the least R².
    """
    runs = [of_run for _, of_run in panel.groupby(labels(panel, "run"), sort=False)]
    if not all(map(holds, runs)):
        return None
    worst = min(runs, key=lambda of_run: float(of_run["r2"].iloc[0]))
    law, r2, fitted = worst[["law", "r2", "fitted"]].iloc[0]
    decay = " and shrink by weight decay" if _tells_layers_apart(worst) else ""
    sentence = LAWS[law].sentence.format(r2=r2, fitted=fitted, decay=decay)
    of_runs = f" This R² is the least of {len(runs)} runs." if len(runs) > 1 else ""
    return f"{sentence}{of_runs}"


def _tells_layers_apart(panel: pd.DataFrame) -> bool:
    return bool(pd.notna(panel["p_value"].iloc[0]))


def readings(table: pd.DataFrame) -> pd.DataFrame:
    """Read every panel of `predictions`, all runs of it: method, module, axis, rule (``prediction``) and sentence."""
    panels = table.groupby(["method", "module", "axis", "law"], sort=False)
    read = [(key, reading(panel)) for key, panel in panels]
    rows = [(*key[:3], "prediction", sentence) for key, sentence in read if sentence is not None]
    return pd.DataFrame(rows, columns=["method", "module", "axis", "rule", "sentence"], dtype=str)


def _told_by(name: str, law: Law, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that a law speaks of, with `law`, `quantity`, `observed`, and `predicted` before a fit."""
    empty = rows.iloc[:0].reindex(columns=[*rows.columns, "law", "quantity", "predicted", "observed"])
    if "update" not in rows:
        return empty
    # The trained m of DoRA is the length of an output's vector.
    axis = rows["axis"].eq("out") | (law.update != "dora")
    rows = rows[rows["update"].eq(law.update) & axis & rows["update_norm"].gt(0)]
    try:
        predicted = law.predict(rows)
    except KeyError:  # measured without diagnostics
        return empty
    rows = rows.assign(law=name, quantity=law.quantity, predicted=predicted, observed=rows[law.quantity])
    told = rows[["predicted", "observed"]].to_numpy(float, na_value=np.nan)
    kept: pd.DataFrame = rows[np.isfinite(told).all(axis=1) & (told[:, 0] > 0)]
    return kept


@dataclass(frozen=True)
class _Fit:
    """How a panel meets its law; `fitted` is NaN for one without a fit."""

    fitted: float
    r2: float
    bias: float
    p_value: float


def _fit(x: NDArray[np.float64], y: NDArray[np.float64], rows: pd.DataFrame, *, fitted: bool) -> _Fit:
    """Hold observations y of a panel's rows against predictions x, which are positive."""
    factor = float(x @ y / (x @ x)) if fitted else 1.0
    around = float(np.sum((y - y.mean()) ** 2))
    return _Fit(
        fitted=factor if fitted else np.nan,
        r2=1 - float(np.sum((y - factor * x) ** 2)) / around if around > 0 else np.nan,
        bias=factor * float(x.mean()) / float(y.mean()) - 1 if y.mean() else np.nan,
        p_value=_p_of_layers(x, y, rows),
    )


def _p_of_layers(predicted: NDArray[np.float64], observed: NDArray[np.float64], rows: pd.DataFrame) -> float:
    """The share of orders of the layers whose predictions fit as well as those in the layers' own order.

    A layer keeps its steps together. With the squares of observations and predictions given, the fit is the better the
    larger Σ observed·predicted, with a fitted factor and without. NaN where predictions are the same for all layers.
    """
    layers, layer = np.unique(rows["name"].to_numpy(str), return_inverse=True)
    steps, step = np.unique(rows["step"].to_numpy(float, na_value=-1), return_inverse=True)
    x, y = np.full((2, len(layers), len(steps)), np.nan)
    x[layer, step], y[layer, step] = predicted, observed
    whole = np.isfinite(x).all(axis=1)
    x, y = x[whole], y[whole]
    if len(x) < 2 or np.ptp(x, axis=0).max() <= 1e-9 * np.abs(x).max():
        return float("nan")
    products = y @ x.T
    shuffled = products[np.arange(len(x)), _orders(len(x))].sum(axis=1)
    as_good = shuffled >= np.trace(products) * (1 - 1e-12)
    return float((1 + as_good.sum()) / (1 + PERMUTATIONS))


@cache
def _orders(layers: int) -> NDArray[np.int64]:
    """`PERMUTATIONS` orders of so many layers, always the same."""
    return np.random.default_rng(0).permuted(np.tile(np.arange(layers), (PERMUTATIONS, 1)), axis=1)


def _q_values(p_values: list[float]) -> NDArray[np.float64]:
    """Benjamini and Hochberg's adjusted p-values; NaN stays NaN and does not count."""
    from scipy.stats import false_discovery_control

    p = np.array(p_values, float)
    known = np.isfinite(p)
    q = np.full(len(p), np.nan)
    if known.any():
        q[known] = false_discovery_control(p[known])
    return q

"""Several runs (seeds) of one method: their mean, and what differs between them.

Runs of one base share its layers, so these intervals speak of new runs of the same model and data; intervals over
layers (`wdanalysis.analysis.regression`) speak of other layers. One holds nothing of the other's spread.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from wdanalysis.analysis.intervals import CONFIDENCE
from wdanalysis.analysis.readings import READING_COLUMNS
from wdanalysis.analysis.regression import at_last_step, fit
from wdanalysis.analysis.table import labels

FEWEST_RUNS = 3
"""An interval across runs asks for so many; two give a half-width of 12.7 standard errors."""

_NUMBERS = ("r_mean", "r_low", "r_high", "slope_mean", "slope_low", "slope_high")

RUN_COLUMNS = ("method", "module", "axis", "run", "runs", "n", *_NUMBERS, "reason")
"""The columns of `across_runs`."""

_ROW = ("method", "step", "layer", "module", "name", "axis", "law", "quantity")
"""What tells a row of the metrics table, or of the predictions, from the others of its run."""

_COUNTED = ("zero_vectors",)
"""Whole numbers of which the largest of the runs is kept; others are the same in all."""


def has_runs(metrics: pd.DataFrame) -> bool:
    """Whether a method of a metrics table has several runs."""
    return "run" in metrics and bool(set(metrics["run"].dropna().unique()) - {""})


def in_all_runs(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return the rows whose matrix and step all runs of their method have: means over others would mix runs."""
    if not has_runs(metrics):
        return metrics
    metrics = metrics.assign(run=labels(metrics, "run"))
    runs = metrics.groupby("method")["run"].transform("nunique")
    having = metrics.groupby(_row_of(metrics), dropna=False)["run"].transform("nunique")
    return metrics[having == runs]


def of_last_step(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the last step that all runs of a method have of a module; an unknown step counts as the last.

    Unlike `in_all_runs`, this keeps the matrices that only some of the runs have there.
    """
    if not has_runs(metrics):
        return at_last_step(metrics)
    order = metrics["step"].astype("Float64").fillna(np.inf).astype(float)
    panel = metrics.groupby(["method", "module"], observed=True).ngroup()
    seen = pd.DataFrame({"panel": panel, "order": order, "run": labels(metrics, "run")}).drop_duplicates()
    having = seen.groupby(["panel", "order"], as_index=False).size()
    runs = seen.groupby("panel")["run"].nunique()
    common = having[having["size"] == having["panel"].map(runs)]
    return metrics[order == panel.map(common.groupby("panel")["order"].max())]


def _row_of(table: pd.DataFrame) -> list[str]:
    return [column for column in _ROW if column in table]


def averaged(metrics: pd.DataFrame) -> pd.DataFrame:
    """Take the mean over the runs of every method, step and matrix, so that layers and steps stay the points.

    Parameters
    ----------
    metrics
        The metrics table, or the predictions.

    Returns
    -------
    DataFrame
        A row for every method, step and matrix (and law) that all runs of the method have, with `run` empty; numbers
        are means, empty where a run has none. A table without runs is returned as it is.

    Examples
    --------
    >>> seeds = [run.metrics.query("method == 'ft'").assign(run=name) for name in ("seed-0", "seed-1")]
    >>> len(averaged(pd.concat(seeds))), len(averaged(seeds[0])), len(seeds[0])
    (80, 80, 80)
    """
    if not has_runs(metrics):
        return metrics
    rows = in_all_runs(metrics)
    groups = rows.groupby(_row_of(rows), sort=False, dropna=False)
    table = rows.drop_duplicates(_row_of(rows)).assign(run="").reset_index(drop=True)
    floats = [str(column) for column in table.select_dtypes("float64")]
    means, known = groups[floats].mean(), groups[floats].count()
    whole = known.eq(groups.size(), axis=0)
    table[floats] = means.where(whole).to_numpy()
    for column in set(_COUNTED) & set(table):
        table[column] = groups[column].max().array
    return table


def across_runs(metrics: pd.DataFrame) -> pd.DataFrame:
    """Correlate ΔM with ΔD in each run, over all layers and steps, and give the mean over runs with its interval.

    Parameters
    ----------
    metrics
        The metrics table.

    Returns
    -------
    DataFrame
        `RUN_COLUMNS`. For each method with several runs, module and axis a row with `run` empty: the number of `runs`
        with a line, the least `n` of their points, `r_mean` = tanh of the mean of atanh r, `slope_mean`, and the
        intervals of both by Student's t over the runs; or the `reason` for which there are none. Then a row for each
        run, with its own r and slope. Only matrices and steps that all runs have are counted.

    Examples
    --------
    >>> dora = run.metrics.query("method == 'dora' and module == 'q'")
    >>> factors = np.random.default_rng(0).uniform(0.9, 1.1, (3, len(dora)))
    >>> seeds = [dora.assign(run=f"seed-{i}", delta_m=dora.delta_m * factors[i]) for i in range(3)]
    >>> across_runs(pd.concat(seeds))[["run", "runs", "r_mean", "r_low", "r_high"]].round(2)
          run  runs  r_mean  r_low  r_high
    0             3    0.44   0.35    0.52
    1  seed-0     1    0.42    NaN     NaN
    2  seed-1     1    0.48    NaN     NaN
    3  seed-2     1    0.42    NaN     NaN
    """
    rows: list[dict[str, object]] = []
    compared = in_all_runs(metrics)
    compared = compared[compared["run"].ne("")] if has_runs(metrics) else compared.iloc[:0]
    for key, panel in compared.groupby(["method", "module", "axis"], sort=False):
        place = dict(zip(("method", "module", "axis"), key, strict=True))
        lines = {run: fit(own["delta_d"], own["delta_m"]) for run, own in panel.groupby("run", sort=False)}
        known = [line for line in lines.values() if math.isfinite(line.slope)]
        r = mean_of_runs(np.array([line.pearson_r for line in known]), of_correlations=True)
        slope = mean_of_runs(np.array([line.slope for line in known]))
        rows.append(
            place
            | {"run": "", "runs": len(known), "n": min(line.n for line in lines.values())}
            | dict(zip(_NUMBERS, (*r, *slope), strict=True))
            | {"reason": _why_no_interval(len(known), len(lines), r)}
        )
        rows += [
            place
            | {"run": run, "runs": 1, "n": line.n, "r_mean": line.pearson_r, "slope_mean": line.slope}
            | {"reason": ""}
            for run, line in lines.items()
        ]
    table = pd.DataFrame(rows, columns=list(RUN_COLUMNS))
    return table.astype(dict.fromkeys(_NUMBERS, "float64") | {"runs": "int64", "n": "int64"})


def mean_of_runs(values: ArrayLike, *, of_correlations: bool = False) -> tuple[float, float, float]:
    """Return the mean over runs and its interval by Student's t, NaN under `FEWEST_RUNS` runs.

    Parameters
    ----------
    values
        (k,) a number of each run.
    of_correlations
        Whether they are r: mean and interval are then taken of atanh r, and turned back.

    Examples
    --------
    >>> np.round(mean_of_runs([1.0, 2.0, 3.0]), 3)
    array([ 2.   , -0.484,  4.484])
    """
    of_runs = np.asarray(values, dtype=np.float64)
    count = len(of_runs)
    if not count:
        return math.nan, math.nan, math.nan
    with np.errstate(divide="ignore", invalid="ignore"):  # r = ±1
        scaled = np.arctanh(of_runs) if of_correlations else of_runs
        mean = float(scaled.mean())
        half_width = _half_width(scaled) if count >= FEWEST_RUNS else math.nan
    low, high = mean - half_width, mean + half_width
    if of_correlations:
        mean, low, high = map(math.tanh, (mean, low, high))
    return mean, low, high


def _half_width(scaled: NDArray[np.float64]) -> float:
    count = len(scaled)
    error = scaled.std(ddof=1) / math.sqrt(count)
    return float(stdtrit(count - 1, 0.5 + CONFIDENCE / 2) * error)


def _why_no_interval(known: int, all_of_them: int, r: tuple[float, float, float]) -> str:
    """The reason for which there is no interval; empty where there is one."""
    without = f", as {all_of_them - known} of {all_of_them} have no line" if known < all_of_them else ""
    if known < FEWEST_RUNS:
        return f"{known} {'run' if known == 1 else 'runs'}{without}: an interval asks for {FEWEST_RUNS}"
    return "" if math.isfinite(r[1]) else "the r of a run is 1 or −1"


def run_readings(across: pd.DataFrame) -> pd.DataFrame:
    """Say in a sentence what the runs of each panel show, as rows of the table of readings.

    Parameters
    ----------
    across
        As `across_runs` gives it.

    Returns
    -------
    DataFrame
        The columns of `wdanalysis.analysis.readings.readings`, with the rule ``runs``.
    """
    rows = []
    panels = across.groupby(["method", "module", "axis"], sort=False)
    for key, panel in panels:
        mean, own = panel.iloc[0], panel["r_mean"].iloc[1:].dropna()
        if own.empty:
            continue
        if math.isfinite(mean["r_low"]):
            r, low, high = (_r(mean[column]) for column in ("r_mean", "r_low", "r_high"))
            text = f"Over {mean['runs']} runs r is {r}, 95 % {low} … {high}"
        else:
            text = f"r of each run: {', '.join(map(_r, own))} ({mean['reason']})"
        signs = "; its sign differs from run to run" if own.min() < 0 < own.max() else ""
        rows.append([*key, "runs", f"{text}{signs}."])
    return pd.DataFrame(rows, columns=list(READING_COLUMNS), dtype=str)


def _r(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")

"""How ΔM goes with ΔD: correlation and least-squares line, pooled as in the paper and within its parts.

The paper's Figures 2 and 7 pool the matrices of every layer and step in one panel, one regression line and
one Pearson r (§3.2). A pooled r mixes what happens within a layer with what happens across layers, and the
two can have opposite signs (Simpson's paradox); so the same numbers are given for every scope of `SCOPES`.

The sums of squares are written out and not taken from `scipy.stats`: a table of 32 layers, 7 modules and 3
methods asks for a thousand fits, the degrees of freedom differ within groups, and `scipy.stats` alone takes
a second to import. It is what the tests compare with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtr, stdtrit

from wdanalysis.analysis.table import units

CONFIDENCE = 0.95
"""Coverage of every interval and band."""

SCOPES = ("pooled", "step", "layer", "within_step", "within_layer")
"""`pooled`: all points. `step`: one row a step, across its layers. `layer`: one row a layer, across its
steps. `within_step`, `within_layer`: all points after taking out each group's mean."""

FIT_COLUMNS = (
    *("n", "pearson_r", "r_low", "r_high", "p_value", "spearman_r"),
    *("slope", "slope_low", "slope_high", "intercept"),
)
"""Columns of `correlations` that are fields of `Fit`."""

UNSHRUNK_COLUMNS = {"pearson_r_unshrunk": "pearson_r", "slope_unshrunk": "slope"}
"""Columns of `correlations` that are fields of the `Fit` of ΔM without its uniform shrink."""

BOOTSTRAP_COLUMNS = {
    "r_boot_low": "r_low",
    "r_boot_high": "r_high",
    "slope_boot_low": "slope_low",
    "slope_boot_high": "slope_high",
}
"""Columns of `correlations` that are fields of `Bootstrap`."""

CORRELATION_COLUMNS = (
    *("method", "module", "axis", "scope", "group"),
    *FIT_COLUMNS,
    *UNSHRUNK_COLUMNS,
    *BOOTSTRAP_COLUMNS,
)
"""The columns of `correlations`."""

BOOTSTRAP_DRAWS = 2000
BOOTSTRAP_SEED = 0
FEWEST_LAYERS = 4
"""`bootstrap` asks for so many layers."""

LEAST_SPREAD = 1e-12
"""Values whose range is below this share of the largest differ by rounding only."""

NAN = float("nan")


@dataclass(frozen=True)
class Fit:
    """Correlation of y with x and the line y = intercept + slope · x; NaN where there is no value.

    Attributes
    ----------
    n
        Number of points.
    pearson_r, r_low, r_high
        Pearson's r and its interval by Fisher's z; the interval asks for four points.
    p_value
        Two-sided, of r = 0 (equally of slope = 0), by Student's t.
    spearman_r
        Pearson's r of the ranks, ties at their mean rank.
    slope, slope_low, slope_high, intercept
        The line and the interval of its slope by Student's t.
    x_mean, x_std
        Centre and population standard deviation of x (of x − its group's mean), which `band` needs.

    Examples
    --------
    >>> line = fit([0, 1, 2, 3], [1.0, 2.9, 5.1, 7.0])
    >>> line.line([0, 10]).round(2)
    array([ 0.97, 21.17])
    >>> low, high = line.band([1.5])
    >>> bool(low < line.line(1.5) < high)
    True
    """

    n: int
    pearson_r: float = NAN
    r_low: float = NAN
    r_high: float = NAN
    p_value: float = NAN
    spearman_r: float = NAN
    slope: float = NAN
    slope_low: float = NAN
    slope_high: float = NAN
    intercept: float = NAN
    x_mean: float = NAN
    x_std: float = NAN

    def line(self, x: ArrayLike) -> NDArray[np.float64]:
        """Return intercept + slope · x, of x's shape."""
        return self.intercept + self.slope * np.asarray(x, dtype=np.float64)

    def band(self, x: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the lower and upper edge of the confidence band of the mean of y at x, each of x's shape.

        The half-width is t · s · √(1/n + (x − x̄)²/Sxx): the slope's half-width times √(Sxx/n + (x − x̄)²).
        """
        distance = np.asarray(x, dtype=np.float64) - self.x_mean
        half_width = (self.slope_high - self.slope) * np.hypot(self.x_std, distance)
        return self.line(x) - half_width, self.line(x) + half_width


def fit(x: ArrayLike, y: ArrayLike, *, groups: ArrayLike | None = None) -> Fit:
    """Fit y = intercept + slope · x by least squares, and correlate.

    With `groups` each group keeps a mean of its own: the slope is that of a regression with a dummy
    variable for each group, and r is that of the values less their group's mean. G groups cost G − 1
    degrees of freedom, of the p-value, of the slope's interval and of Fisher's z alike; the intercept is
    that of the line through the mean of all points.

    Parameters
    ----------
    x, y
        (n,) numbers. A point with a NaN or an infinity is left out.
    groups
        (n,) labels; a missing label is a group of its own.

    Returns
    -------
    Fit
        Every number NaN, but for `n`, where x or y has no spread beyond rounding or where there are fewer
        than three points (with G groups: fewer than G + 2).

    Examples
    --------
    >>> line = fit([1, 2, 3, 4], [2.0, 4.1, 5.9, 8.0])
    >>> round(line.slope, 2), round(line.pearson_r, 4), line.n
    (1.98, 0.9995, 4)
    """
    points = np.array([x, y], dtype=np.float64)
    known = np.isfinite(points).all(axis=0)
    points = points[:, known]
    n = points.shape[1]
    group = np.zeros(n, dtype=np.intp)
    if groups is not None:
        group, _ = pd.factorize(np.asarray(groups)[known], use_na_sentinel=False)
    freedom = n - 2 - int(group.max(initial=0))
    if freedom < 1:
        return Fit(n)
    centred = np.array([_less_group_means(values, group) for values in points])
    if (np.ptp(centred, axis=1) <= LEAST_SPREAD * np.abs(points).max(axis=1)).any():
        return Fit(n)
    u, v = centred
    x_mean, y_mean = points.mean(axis=1)

    slope = (u @ v) / (u @ u)
    residual = v - slope * u
    slope_error = np.sqrt((residual @ residual) / freedom / (u @ u))
    half_width = stdtrit(freedom, 0.5 + CONFIDENCE / 2) * slope_error
    r = _pearson(u, v)
    with np.errstate(divide="ignore"):  # r = ±1: t and z are infinite, as they should
        t = r * np.sqrt(freedom / ((1 - r) * (1 + r)))
        z = np.arctanh(r)
    r_low = r_high = NAN
    if freedom > 1:
        z_half_width = ndtri(0.5 + CONFIDENCE / 2) / np.sqrt(freedom - 1)  # n − 3 − (G − 1)
        r_low, r_high = np.tanh(z - z_half_width), np.tanh(z + z_half_width)
    return Fit(
        n,
        pearson_r=float(r),
        r_low=float(r_low),
        r_high=float(r_high),
        p_value=float(2 * stdtr(freedom, -abs(t))),
        spearman_r=float(_pearson(_centred_ranks(u), _centred_ranks(v))),
        slope=float(slope),
        slope_low=float(slope - half_width),
        slope_high=float(slope + half_width),
        intercept=float(y_mean - slope * x_mean),
        x_mean=float(x_mean),
        x_std=float(np.sqrt(u @ u / n)),
    )


@dataclass(frozen=True)
class Bootstrap:
    """Intervals of r and of the slope from resampled layers; NaN where there is none."""

    r_low: float = NAN
    r_high: float = NAN
    slope_low: float = NAN
    slope_high: float = NAN


def bootstrap(x: ArrayLike, y: ArrayLike, layers: ArrayLike) -> Bootstrap:
    """Draw whole layers with replacement, and take the percentiles of r and of the slope over the draws.

    Matrices of one layer at several steps are not independent, as `Fit`'s intervals have it; their layers nearly
    are. A layer that is drawn twice counts twice, with all of its points.

    Parameters
    ----------
    x, y
        (n,) numbers. A point with a NaN or an infinity is left out.
    layers
        (n,) labels; a point without one is left out.

    Returns
    -------
    Bootstrap
        Percentile intervals of coverage `CONFIDENCE` over `BOOTSTRAP_DRAWS` draws from a fixed seed. NaN under
        `FEWEST_LAYERS` layers, and where the points have no line.
    """
    points = np.array([x, y], dtype=np.float64)
    known = np.isfinite(points).all(axis=0) & pd.Series(layers).notna().to_numpy()
    u, v = points = points[:, known]
    layer, names = pd.factorize(np.asarray(layers)[known])
    count = len(names)
    if count < FEWEST_LAYERS or np.isnan(fit(u, v).slope):
        return Bootstrap()
    mean, scale = points.mean(axis=1, keepdims=True), points.std(axis=1, keepdims=True)
    u, v = (points - mean) / scale  # of order one: the sums of squares keep their digits
    terms = (np.ones_like(u), u, v, u * u, u * v, v * v)
    of_layer = np.array([np.bincount(layer, weights=term, minlength=count) for term in terms])
    times = np.random.default_rng(BOOTSTRAP_SEED).multinomial(
        count, [1 / count] * count, size=BOOTSTRAP_DRAWS
    )
    n, su, sv, suu, suv, svv = of_layer @ times.T
    uu, uv, vv = suu - su * su / n, suv - su * sv / n, svv - sv * sv / n
    has_line = (uu > LEAST_SPREAD * n) & (vv > LEAST_SPREAD * n)  # not one layer's single point over and over
    uu, uv, vv = uu[has_line], uv[has_line], vv[has_line]
    tails = (0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2)
    r_low, r_high = np.quantile(np.clip(uv / np.sqrt(uu * vv), -1, 1), tails)
    slope_low, slope_high = np.quantile(uv / uu * (scale[1] / scale[0]), tails)
    return Bootstrap(float(r_low), float(r_high), float(slope_low), float(slope_high))


NO_LABEL = -1
"""Stands for the layer or the step of a row that has none."""


@dataclass(frozen=True)
class Points:
    """Some rows of the metrics table as arrays, which are cut into parts far sooner than a table is.

    Attributes
    ----------
    delta_d, delta_m, delta_m_unshrunk
        (n,) numbers, NaN where a cell is empty or the table lacks the column.
    step, layer
        (n,) labels, `NO_LABEL` where a cell is empty.
    """

    delta_d: NDArray[np.float64]
    delta_m: NDArray[np.float64]
    delta_m_unshrunk: NDArray[np.float64]
    step: NDArray[np.int64]
    layer: NDArray[np.int64]

    @classmethod
    def of(cls, rows: pd.DataFrame) -> Points:
        """Take them from rows of the metrics table."""
        numbers = ("delta_d", "delta_m", "delta_m_unshrunk")
        nothing = np.full(len(rows), np.nan)
        return cls(
            *(
                rows[name].to_numpy(np.float64, na_value=np.nan) if name in rows else nothing
                for name in numbers
            ),
            *(labels.to_numpy(np.int64, na_value=NO_LABEL) for labels in (rows["step"], units(rows))),
        )

    def where(self, kept: NDArray[np.bool_]) -> Points:
        """Return those points alone."""
        return Points(*(getattr(self, field.name)[kept] for field in fields(self)))

    def by_step(self) -> Iterator[tuple[object, Points]]:
        """Yield every step and its points in order; those without a step last, as a step of their own (NA)."""
        for step in sorted(set(self.step.tolist()), key=lambda step: (step == NO_LABEL, step)):
            yield pd.NA if step == NO_LABEL else step, self.where(self.step == step)

    def by_layer(self) -> Iterator[tuple[int, Points]]:
        """Yield every layer and its points in order; those without a layer are left out."""
        for layer in sorted(set(self.layer.tolist()) - {NO_LABEL}):
            yield layer, self.where(self.layer == layer)


def correlations(metrics: pd.DataFrame) -> pd.DataFrame:
    """Correlate ΔM (y) with ΔD (x) for each method, module and axis, in every scope of `SCOPES`.

    Parameters
    ----------
    metrics
        The metrics table: a row per method, step and matrix, with the columns method, step, layer, module,
        axis, delta_m and delta_d; and delta_m_unshrunk, where it has diagnostics.

    Returns
    -------
    DataFrame
        `CORRELATION_COLUMNS`, with the numbers of `Fit`; `pearson_r_unshrunk` and `slope_unshrunk` are those of
        delta_m_unshrunk on ΔD; the `boot` columns, of scope `pooled` alone, are those of `bootstrap`. `group` is the
        step of a `step` row and the layer of a `layer` row and otherwise empty. A row without ΔM or ΔD is not counted
        in `n`. A checkpoint without a step is a step of its own; a matrix without a layer takes no part in `layer`,
        `within_layer` and the bootstrap.

    Examples
    --------
    >>> table = correlations(run.metrics).query("scope == 'within_layer' and module == 'q'")
    >>> table[["method", "n", "pearson_r"]].round(2)
       method   n  pearson_r
    16     ft  40       0.85
    50   dora  40       0.85
    """
    rows = [
        dict(zip(("method", "module", "axis"), key, strict=True))
        | {"scope": scope, "group": group}
        | {name: getattr(line, name) for name in FIT_COLUMNS}
        | {name: getattr(unshrunk, number) for name, number in UNSHRUNK_COLUMNS.items()}
        | {name: getattr(resampled, number) for name, number in BOOTSTRAP_COLUMNS.items()}
        for key, matrices in metrics.groupby(["method", "module", "axis"], sort=False)
        for scope, group, line, unshrunk, resampled in _scoped_fits(Points.of(matrices))
    ]
    table = pd.DataFrame(rows, columns=list(CORRELATION_COLUMNS))
    numbers = {*FIT_COLUMNS, *UNSHRUNK_COLUMNS, *BOOTSTRAP_COLUMNS}
    return table.astype(dict.fromkeys(numbers, "float64") | {"group": "Int64", "n": "int64"})


def summary(metrics: pd.DataFrame) -> pd.DataFrame:
    """Sum up each method and module in a row.

    Parameters
    ----------
    metrics
        The metrics table, as for `correlations`.

    Returns
    -------
    DataFrame
        method, module, axis; of the last step: `matrices` (their number), `step`, and the means `delta_m` and
        `delta_d`; of all steps and layers: `n`, `pearson_r`, `r_low`, `r_high` and `slope` of the pooled fit.
    """
    keys = ["method", "module", "axis"]
    last = at_last_step(metrics).groupby(keys, sort=False)
    means = last.agg(
        matrices=("step", "size"),
        step=("step", "max"),
        delta_m=("delta_m", "mean"),
        delta_d=("delta_d", "mean"),
    )
    numbers = ["n", "pearson_r", "r_low", "r_high", "slope"]
    fits = {key: fit(rows["delta_d"], rows["delta_m"]) for key, rows in metrics.groupby(keys, sort=False)}
    pooled = pd.DataFrame(
        [[*key, *(getattr(line, number) for number in numbers)] for key, line in fits.items()],
        columns=keys + numbers,
    )
    return means.reset_index().merge(pooled, on=keys)


def at_last_step(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the last step that a method has of a module; one without a step counts as the last."""
    order = metrics["step"].astype("Float64").fillna(np.inf)
    return metrics[order == order.groupby([metrics["method"], metrics["module"]]).transform("max")]


def _scoped_fits(points: Points) -> Iterator[tuple[str, object, Fit, Fit, Bootstrap]]:
    """Yield scope, group, both fits and the bootstrap for the rows of one method, module and axis."""
    in_a_layer = points.where(points.layer != NO_LABEL)
    resampled = bootstrap(in_a_layer.delta_d, in_a_layer.delta_m, in_a_layer.layer)
    yield "pooled", pd.NA, *_both_fits(points), resampled
    for step, of_step in points.by_step():
        yield "step", step, *_both_fits(of_step), Bootstrap()
    for layer, of_layer in points.by_layer():
        yield "layer", layer, *_both_fits(of_layer), Bootstrap()
    yield "within_step", pd.NA, *_both_fits(points, points.step), Bootstrap()
    yield "within_layer", pd.NA, *_both_fits(in_a_layer, in_a_layer.layer), Bootstrap()


def _both_fits(points: Points, groups: NDArray[np.int64] | None = None) -> tuple[Fit, Fit]:
    """The fit of ΔM, and of ΔM without its uniform shrink."""
    x, y, unshrunk = points.delta_d, points.delta_m, points.delta_m_unshrunk
    has_unshrunk = bool(np.isfinite(unshrunk).any())
    return fit(x, y, groups=groups), fit(x, unshrunk, groups=groups) if has_unshrunk else Fit(0)


def _less_group_means(values: NDArray[np.float64], group: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return the values less their group's mean."""
    means = np.bincount(group, weights=values) / np.bincount(group)
    centred: NDArray[np.float64] = values - means[group]
    return centred


def _centred_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the ranks less their mean; equal values share the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(count) - (count - 1) / 2
    centred: NDArray[np.float64] = mean_rank[place] - (len(values) + 1) / 2
    return centred


def _pearson(u: NDArray[np.float64], v: NDArray[np.float64]) -> np.float64:
    """Return the correlation of two vectors of mean zero."""
    return np.float64(np.clip((u @ v) / np.sqrt((u @ u) * (v @ v)), -1, 1))

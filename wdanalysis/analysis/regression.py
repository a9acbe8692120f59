"""How ΔM goes with ΔD: correlation and least-squares line, pooled as in the paper and within its parts.

The paper's Figures 2 and 7 pool the matrices of every layer and step in one panel, one regression line and
one Pearson r (§3.2). A pooled r mixes what happens within a layer with what happens across layers, and the
two can have opposite signs (Simpson's paradox); so the same numbers are given for every scope of `SCOPES`.

Intervals and p-values come from the layers (`wdanalysis.analysis.intervals`). The sums of squares are written out and
not taken from `scipy.stats`: a table of 32 layers, 7 modules and 3 methods asks for a thousand fits, and `scipy.stats`
alone takes a second to import. It is what the tests compare with.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from wdanalysis.analysis.badges import badge
from wdanalysis.analysis.intervals import (
    FEWEST_LAYERS,
    LEAST_SPREAD,
    NAN,
    by_layer,
    false_discovery,
    permutation_p,
)
from wdanalysis.analysis.nulls import NULL_COLUMNS, null_r
from wdanalysis.analysis.table import units

SCOPES = ("pooled", "step", "layer", "within_step", "within_layer")
"""`pooled`: all points. `step`: one row a step, across its layers. `layer`: one row a layer, across its
steps. `within_step`, `within_layer`: all points after taking out each group's mean."""

PANEL_SCOPES = ("pooled", "within_step")
"""The scopes with one row a panel that summary and readings are made of."""

FIT_COLUMNS = (
    *("n", "pearson_r", "r_low", "r_high", "p_value", "spearman_r"),
    *("slope", "slope_low", "slope_high", "intercept"),
)
"""Columns of `correlations` that are fields of `Fit`."""

UNSHRUNK_COLUMNS = {"pearson_r_unshrunk": "pearson_r", "slope_unshrunk": "slope"}
"""Columns of `correlations` that are fields of the `Fit` of ΔM without its uniform shrink."""

LAYER_COLUMNS = ("layers", "leave_out_low", "leave_out_high", "leave_out_layer", "leave_out_p", "leverage")
"""More columns that are fields of `Fit`."""

PART_COLUMNS = ("r_within", "r_between", "w_d", "w_m")
"""Columns that are fields of `Parts`, in `pooled` rows."""

FOUR_COLUMNS = ("r_four_low", "r_four_median", "r_four_high")
"""Columns that sum up `step_choices`, in `pooled` rows."""

CORRELATION_COLUMNS = (
    *("method", "module", "axis", "scope", "group"),
    *FIT_COLUMNS,
    *UNSHRUNK_COLUMNS,
    *LAYER_COLUMNS,
    "q_value",
    *PART_COLUMNS,
    *FOUR_COLUMNS,
    *NULL_COLUMNS,
)
"""The columns of `correlations`."""

SUMMARY_COLUMNS = (
    *("method", "module", "step", "delta_m", "delta_d"),
    *("pearson_r", "r_low", "r_high", "slope", "badge"),
)
"""The columns of `summary`: ten at most."""

STEP_CHOICE_COLUMNS = ("method", "module", "axis", "steps", "r")
"""The columns of `step_choices`."""

CHOSEN_STEPS = 4
"""So many steps the paper's figures show; `step_choices` chooses so many of a longer series."""

MOST_CHOICES = 500
"""All choices are made up to so many, else so many at random."""

CHOICE_SEED = 0


@dataclass(frozen=True)
class Fit:
    """Correlation of y with x and the line y = intercept + slope · x; NaN where there is no value.

    Attributes
    ----------
    n
        Number of points.
    pearson_r, r_low, r_high
        Pearson's r and its interval from the layers; the interval asks for six.
    p_value
        Two-sided, by exchanging the layers' paths of y (`wdanalysis.analysis.intervals.permutation_p`).
    spearman_r
        Pearson's r of the ranks, ties at their mean rank.
    slope, slope_low, slope_high, intercept
        The line and the interval of its slope from the layers.
    layers
        How many layers the points have.
    leave_out_low, leave_out_high, leave_out_layer, leave_out_p
        The range of r when one layer is left out, the label of the one that moves it most (None where there are too
        few), and the p-value without that one.
    leverage
        The largest point's: 1/n of its group + its share in the sum of squares of x; from 0 to 1.
    x_mean, t, level_variance, level_slope_covariance, slope_variance
        Centre of x, and what `band` needs of the layers.

    Examples
    --------
    >>> line = fit([0, 1, 2, 3, 4, 5], [1.0, 2.9, 5.1, 7.0, 9.2, 10.8], layers=range(6))
    >>> line.line([0, 10]).round(2)
    array([ 1.01, 20.96])
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
    layers: int = 0
    leave_out_low: float = NAN
    leave_out_high: float = NAN
    leave_out_layer: object = None
    leave_out_p: float = NAN
    leverage: float = NAN
    x_mean: float = NAN
    t: float = NAN
    level_variance: float = NAN
    level_slope_covariance: float = NAN
    slope_variance: float = NAN

    def line(self, x: ArrayLike) -> NDArray[np.float64]:
        """Return intercept + slope · x, of x's shape."""
        return self.intercept + self.slope * np.asarray(x, dtype=np.float64)

    def band(self, x: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the lower and upper edge of the confidence band of the line at x, each of x's shape.

        With v, c and s the layers' variance of the line's height at x̄, its covariance with the slope and the slope's
        variance, the half-width is t · √(v + 2c·(x − x̄) + s·(x − x̄)²); NaN where there is no interval.
        """
        distance = np.asarray(x, dtype=np.float64) - self.x_mean
        of_height = self.level_variance + distance * (
            2 * self.level_slope_covariance + distance * self.slope_variance
        )
        half_width = self.t * np.sqrt(np.maximum(of_height, 0))
        return self.line(x) - half_width, self.line(x) + half_width


def fit(
    x: ArrayLike,
    y: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    layers: ArrayLike | None = None,
    steps: ArrayLike | None = None,
) -> Fit:
    """Fit y = intercept + slope · x by least squares, and correlate.

    With `groups` each group keeps a mean of its own: the slope is that of a regression with a dummy variable for each
    group, and r is that of the values less their group's mean; the intercept is that of the line through the mean of
    all points.

    Parameters
    ----------
    x, y
        (n,) numbers. A point with a NaN or an infinity is left out.
    groups
        (n,) labels; a missing label is a group of its own.
    layers
        (n,) labels of the units that intervals and p-value come from. Without them, or where a point has none, there is
        neither.
    steps
        (n,) labels: which points of a layer's path stand for which of another's. By default all are of one step.

    Returns
    -------
    Fit
        Every number NaN, but for `n` and `layers`, where x or y has no spread beyond rounding or where there are fewer
        than three points (with G groups: fewer than G + 2).

    Examples
    --------
    >>> line = fit([1, 2, 3, 4], [2.0, 4.1, 5.9, 8.0])
    >>> round(line.slope, 2), round(line.pearson_r, 4), line.n
    (1.98, 0.9995, 4)
    """
    points = np.array([x, y], dtype=np.float64)
    known: NDArray[np.bool_] = np.asarray(np.isfinite(points).all(axis=0))
    points = points[:, known]
    n = points.shape[1]
    group = _codes(groups, known)
    layer, labels = pd.factorize(np.asarray(layers)[known]) if layers is not None else (group, ())
    freedom = n - 2 - int(group.max(initial=0))
    if freedom < 1:
        return Fit(n, layers=len(labels))
    centred = np.array([_less_group_means(values, group) for values in points])
    if (np.ptp(centred, axis=1) <= LEAST_SPREAD * np.abs(points).max(axis=1)).any():
        return Fit(n, layers=len(labels))
    u, v = centred
    x_mean, y_mean = points.mean(axis=1)
    slope = (u @ v) / (u @ u)
    line = Fit(
        n,
        pearson_r=float(_pearson(u, v)),
        spearman_r=float(_pearson(_centred_ranks(u), _centred_ranks(v))),
        slope=float(slope),
        intercept=float(y_mean - slope * x_mean),
        layers=len(labels),
        leverage=float((u * u / (u @ u) + 1 / np.bincount(group)[group]).max()),
        x_mean=float(x_mean),
    )
    if not len(labels) or (layer < 0).any():
        return line
    return _with_layers(line, points, group, layer, labels, _codes(steps, known))


def _with_layers(
    line: Fit,
    points: NDArray[np.float64],
    group: NDArray[np.intp],
    layer: NDArray[np.intp],
    labels: Sequence[object] | NDArray[Any],
    step: NDArray[np.intp],
) -> Fit:
    """Add what the layers say, of points that have a line."""
    about_mean = points - points.mean(axis=1, keepdims=True)
    scale_x, scale_y = scale = np.sqrt((about_mean**2).mean(axis=1))
    u, v = about_mean / scale[:, None]  # of order one: sums of squares keep their digits
    found = by_layer(u, v, group, layer)
    most_moving = int(found.leave_out_layer)
    inside = _less_group_means(u, group), _less_group_means(v, group)
    kept = layer != most_moving
    rest = (inside[0][kept], inside[1][kept], step[kept], layer[kept])
    per = scale_y / scale_x
    return replace(
        line,
        r_low=float(found.r_low),
        r_high=float(found.r_high),
        p_value=permutation_p(*inside, step, layer),
        slope_low=float(found.slope_low * per),
        slope_high=float(found.slope_high * per),
        leave_out_low=float(found.leave_out_low),
        leave_out_high=float(found.leave_out_high),
        leave_out_layer=labels[most_moving] if most_moving >= 0 else None,
        leave_out_p=NAN if kept.all() else permutation_p(*rest, fewest=FEWEST_LAYERS - 1),
        t=float(found.t),
        level_variance=float(found.level_variance * scale_y**2),
        level_slope_covariance=float(found.level_slope_covariance * scale_y * per),
        slope_variance=float(found.slope_variance * per**2),
    )


def _codes(labels: ArrayLike | None, known: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Codes of the known points' labels; without labels all have one."""
    if labels is None:
        return np.zeros(int(known.sum()), dtype=np.intp)
    return np.asarray(pd.factorize(np.asarray(labels)[known], use_na_sentinel=False)[0])


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

    def r(self, *, within_steps: bool = False) -> float:
        """Pearson's r of finite points, of each less its step's mean or of all; NaN where there is no spread."""
        group = np.unique(self.step, return_inverse=True)[1] if within_steps else np.zeros_like(self.step)
        u, v = (_less_group_means(values, group) for values in (self.delta_d, self.delta_m))
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(_pearson(u, v))

    def by_step(self) -> Iterator[tuple[object, Points]]:
        """Yield every step and its points in order; those without a step last, as a step of their own (NA)."""
        for step in sorted(set(self.step.tolist()), key=lambda step: (step == NO_LABEL, step)):
            yield pd.NA if step == NO_LABEL else step, self.where(self.step == step)

    def by_layer(self) -> Iterator[tuple[int, Points]]:
        """Yield every layer and its points in order; those without a layer are left out."""
        for layer in sorted(set(self.layer.tolist()) - {NO_LABEL}):
            yield layer, self.where(self.layer == layer)


@dataclass(frozen=True)
class Parts:
    """A pooled r taken apart: r = w_d · w_m · r_within + √((1 − w_d²)(1 − w_m²)) · r_between; NaN where there is none.

    Attributes
    ----------
    r_within
        Of the values less their step's mean: the layers at the same step.
    r_between
        Of the steps' means, each counted as often as it has points; NaN where there is one step.
    w_d, w_m
        Square roots of the within-step share in the sum of squares of ΔD and of ΔM.
    """

    r_within: float = NAN
    r_between: float = NAN
    w_d: float = NAN
    w_m: float = NAN

    @property
    def from_within(self) -> float:
        """The part of r that is of layers at the same step; the rest is of steps."""
        return self.w_d * self.w_m * self.r_within


def parts(x: ArrayLike, y: ArrayLike, steps: ArrayLike) -> Parts:
    """Take the r of y with x apart into layers at the same step and steps.

    Examples
    --------
    >>> found = parts([1, 2, 3, 4], [2, 1, 4, 3], steps=[10, 10, 20, 20])
    >>> round(found.r_within, 2), round(found.r_between, 2), round(found.from_within, 2)
    (-1.0, 1.0, -0.2)
    """
    points = np.array([x, y], dtype=np.float64)
    known: NDArray[np.bool_] = np.asarray(np.isfinite(points).all(axis=0))
    points, step = points[:, known], _codes(steps, known)
    if np.isnan(fit(*points).pearson_r):
        return Parts()
    whole = (
        _less_group_means(points[0], np.zeros_like(step)),
        _less_group_means(points[1], np.zeros_like(step)),
    )
    within = [_less_group_means(values, step) for values in whole]
    between = [all_of - inside for all_of, inside in zip(whole, within, strict=True)]
    square, inside, outside = (
        np.array([values @ values for values in of]) for of in (whole, within, between)
    )
    w_d, w_m = np.sqrt(inside / square)
    r_within = _pearson(*within) if (inside > LEAST_SPREAD**2 * square).all() else NAN
    r_between = _pearson(*between) if (outside > LEAST_SPREAD**2 * square).all() else NAN
    return Parts(float(r_within), float(r_between), float(w_d), float(w_m))


def choose_steps(points: Points) -> tuple[list[tuple[int, ...]], NDArray[np.float64]]:
    """The pooled r over each choice of `CHOSEN_STEPS` of the steps, where there are more.

    Returns
    -------
    choices, r
        The steps of each choice, and (choices,) numbers, NaN where a choice has no line. All choices up to
        `MOST_CHOICES`, else so many different ones from a fixed seed.
    """
    known = np.isfinite(points.delta_d) & np.isfinite(points.delta_m) & (points.step != NO_LABEL)
    u, v, step = points.delta_d[known], points.delta_m[known], points.step[known]
    steps, code = np.unique(step, return_inverse=True)
    if len(steps) <= CHOSEN_STEPS or np.isnan(fit(u, v).pearson_r):
        return [], np.empty(0)
    if comb(len(steps), CHOSEN_STEPS) <= MOST_CHOICES:
        chosen = np.array(list(combinations(range(len(steps)), CHOSEN_STEPS)))
    else:
        generator, found = np.random.default_rng(CHOICE_SEED), set[tuple[int, ...]]()
        while len(found) < MOST_CHOICES:
            one = generator.choice(len(steps), CHOSEN_STEPS, replace=False)
            found.add(tuple(sorted(one.tolist())))
        chosen = np.array(sorted(found))
    u, v = (u - u.mean()) / u.std(), (v - v.mean()) / v.std()
    terms = (np.ones_like(u), u, v, u * u, u * v, v * v)
    sums = np.array([np.bincount(code, term) for term in terms])[:, chosen].sum(axis=2)
    n, su, sv, suu, suv, svv = sums
    uu, uv, vv = suu - su * su / n, suv - su * sv / n, svv - sv * sv / n
    has_line = (n > 2) & (uu > LEAST_SPREAD * n) & (vv > LEAST_SPREAD * n)
    r = np.full(len(chosen), np.nan)
    r[has_line] = np.clip(uv[has_line] / np.sqrt(uu[has_line] * vv[has_line]), -1, 1)
    return [tuple(steps[one].tolist()) for one in chosen], r


def step_choices(metrics: pd.DataFrame) -> pd.DataFrame:
    """Correlate ΔM with ΔD over every choice of four steps: which steps one looks at may decide the sign.

    Parameters
    ----------
    metrics
        The metrics table.

    Returns
    -------
    DataFrame
        `STEP_CHOICE_COLUMNS`, a row for each method, module, axis and choice of `CHOSEN_STEPS` steps (as text, such as
        "60 120 180 240"): the pooled r over them. All choices up to `MOST_CHOICES`, else so many from a fixed seed. No
        rows for a series of four steps or fewer.

    Examples
    --------
    >>> step_choices(run.metrics)  # four steps leave no choice
    Empty DataFrame
    Columns: [method, module, axis, steps, r]
    Index: []
    """
    rows = [
        (*key, " ".join(map(str, steps)), r)
        for key, matrices in metrics.groupby(["method", "module", "axis"], sort=False)
        for steps, r in zip(*choose_steps(Points.of(matrices)), strict=True)
    ]
    return pd.DataFrame(rows, columns=list(STEP_CHOICE_COLUMNS)).astype({"r": "float64"})


def correlations(metrics: pd.DataFrame, scopes: Collection[str] = SCOPES) -> pd.DataFrame:
    """Correlate ΔM (y) with ΔD (x) for each method, module and axis, in every scope of `SCOPES`.

    Parameters
    ----------
    metrics
        The metrics table: a row per method, step and matrix, with the columns method, step, layer, module,
        axis, delta_m and delta_d; and delta_m_unshrunk, where it has diagnostics.
    scopes
        Which to give.

    Returns
    -------
    DataFrame
        `CORRELATION_COLUMNS`, with the numbers of `Fit`. Intervals, p-value and what leaving out a layer does are those
        of the layers; scope `layer` has none. `q_value` holds the rate of false discoveries over the rows of one scope.
        `pearson_r_unshrunk` and `slope_unshrunk` are those of delta_m_unshrunk on ΔD. The numbers of `parts` and the
        range over `step_choices` stand in `pooled` rows. `group` is the step of a `step` row and the layer of a `layer`
        row and otherwise empty. A row without ΔM or ΔD is not counted in `n`. A checkpoint without a step is a step of
        its own; a matrix without a layer takes no part in `layer` and `within_layer`, and where it takes part there is
        no interval. `NULL_COLUMNS`, of the scopes `pooled` and `within_step`, are those of
        `wdanalysis.analysis.nulls.null_r`.

    Examples
    --------
    >>> table = correlations(run.metrics).query("scope == 'within_layer' and module == 'q'")
    >>> table[["method", "n", "pearson_r"]].round(2)
       method   n  pearson_r
    16     ft  40       0.85
    50   dora  40       0.85
    """
    rows = [
        dict(zip(("method", "module", "axis"), key, strict=True)) | numbers
        for key, matrices in metrics.groupby(["method", "module", "axis"], sort=False)
        for numbers in _scoped_rows(Points.of(matrices), scopes)
    ]
    table = pd.DataFrame(rows, columns=[name for name in CORRELATION_COLUMNS if name not in NULL_COLUMNS])
    for _, of_scope in table.groupby("scope"):
        table.loc[of_scope.index, "q_value"] = false_discovery(of_scope["p_value"])
    table = table.merge(null_r(metrics), how="left", on=["method", "module", "axis", "scope"])
    whole = {"group": "Int64", "n": "int64", "layers": "int64", "leave_out_layer": "Int64"}
    numbers = set(CORRELATION_COLUMNS[5:]) - set(whole)
    return table.astype(dict.fromkeys(numbers, "float64") | whole)


def summary(metrics: pd.DataFrame, correlated: pd.DataFrame | None = None) -> pd.DataFrame:
    """Sum up each method and module in a row.

    Parameters
    ----------
    metrics
        The metrics table, as for `correlations`.
    correlated
        The table of `correlations`, where it is there already.

    Returns
    -------
    DataFrame
        `SUMMARY_COLUMNS`: of the last step, `step` and the means `delta_m` and `delta_d`; of all steps and layers,
        `pearson_r`, `r_low`, `r_high` and `slope` of the pooled fit; and the `badge`: what the layers, compared at the
        same step, can be said to do (`wdanalysis.analysis.badges.badge`).
    """
    keys = ["method", "module", "axis"]
    table = correlations(metrics, PANEL_SCOPES) if correlated is None else correlated
    last = at_last_step(metrics).groupby(keys, sort=False)
    means = last.agg(step=("step", "max"), delta_m=("delta_m", "mean"), delta_d=("delta_d", "mean"))
    pooled = table[table["scope"] == "pooled"]
    within_step = table[table["scope"] == "within_step"]
    badges = within_step[keys].assign(badge=[badge(row) for _, row in within_step.iterrows()])
    joined = means.reset_index().merge(pooled.drop(columns="group"), on=keys).merge(badges, on=keys)
    return joined[list(SUMMARY_COLUMNS)]


def at_last_step(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the last step that a method has of a module; one without a step counts as the last."""
    order = metrics["step"].astype("Float64").fillna(np.inf)
    return metrics[order == order.groupby([metrics["method"], metrics["module"]]).transform("max")]


def _scoped_rows(points: Points, scopes: Collection[str]) -> Iterator[dict[str, object]]:
    """Yield the numbers of every scope for the rows of one method, module and axis."""
    if "pooled" in scopes:
        _, choices = choose_steps(points)
        four = np.nanquantile(choices, (0, 0.5, 1)) if np.isfinite(choices).any() else (NAN,) * 3
        found = parts(points.delta_d, points.delta_m, points.step)
        yield (
            _numbers("pooled", points, layers=points.layer)
            | {name: getattr(found, name) for name in PART_COLUMNS}
            | dict(zip(FOUR_COLUMNS, four, strict=True))
        )
    for step, of_step in points.by_step() if "step" in scopes else ():
        yield _numbers("step", of_step, step, layers=of_step.layer)
    for layer, of_layer in points.by_layer() if "layer" in scopes else ():
        yield _numbers("layer", of_layer, layer)
    if "within_step" in scopes:
        yield _numbers("within_step", points, groups=points.step, layers=points.layer)
    if "within_layer" in scopes:
        in_a_layer = points.where(points.layer != NO_LABEL)
        yield _numbers("within_layer", in_a_layer, groups=in_a_layer.layer, layers=in_a_layer.layer)


def _numbers(
    scope: str,
    points: Points,
    group: object = pd.NA,
    *,
    groups: NDArray[np.int64] | None = None,
    layers: NDArray[np.int64] | None = None,
) -> dict[str, object]:
    """The row of a scope: the fit of ΔM, and r and slope of ΔM without its uniform shrink."""
    x, y, unshrunk = points.delta_d, points.delta_m, points.delta_m_unshrunk
    units = None if layers is None else np.where(layers == NO_LABEL, np.nan, layers)
    line = fit(x, y, groups=groups, layers=units, steps=points.step)
    other = fit(x, unshrunk, groups=groups) if np.isfinite(unshrunk).any() else Fit(0)
    return (
        {"scope": scope, "group": group}
        | {name: getattr(line, name) for name in (*FIT_COLUMNS, *LAYER_COLUMNS)}
        | {name: getattr(other, number) for name, number in UNSHRUNK_COLUMNS.items()}
    )


def _less_group_means(values: NDArray[np.float64], group: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return the values less their group's mean."""
    means = np.bincount(group, weights=values) / np.bincount(group)
    centred: NDArray[np.float64] = values - means[group]
    return centred


def _centred_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the ranks less their mean; equal values share the mean of their ranks."""
    order = np.argsort(values)
    in_order, place = values[order], np.arange(len(values), dtype=np.float64)
    if (in_order[1:] == in_order[:-1]).any():
        _, first, count = np.unique(in_order, return_index=True, return_counts=True)
        place = np.repeat(first + (count - 1) / 2, count)
    centred = np.empty_like(place)
    centred[order] = place - (len(values) - 1) / 2
    return centred


def _pearson(u: NDArray[np.float64], v: NDArray[np.float64]) -> np.float64:
    """Return the correlation of two vectors of mean zero."""
    return np.float64(np.clip((u @ v) / np.sqrt((u @ u) * (v @ v)), -1, 1))

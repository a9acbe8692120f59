"""What the numbers of a panel (one method, one module) say, in sentences.

Every sentence comes from a rule: a function of the panel that returns a sentence, or nothing where the numbers do not
carry one. The thresholds are the constants below and those of `wdanalysis.analysis.badges`. How often a sentence is
printed where it is false is counted in tests/analysis/test_sentences.py and told in docs/reading.md. A panel without
values gets no sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import chdtri

from wdanalysis.analysis import nulls
from wdanalysis.analysis.badges import (
    AS_CHANCE,
    FALLS,
    NONE,
    ONE_LAYER,
    RISES,
    TOO_FEW,
    badge,
    is_significant,
    without_most_moving,
)
from wdanalysis.analysis.floors import NEAR_FLOOR, erased, near_floor
from wdanalysis.analysis.intervals import FEWEST_LAYERS
from wdanalysis.analysis.jackknife import apart_from_zero, fisher, interval
from wdanalysis.analysis.panel import Panel, panels
from wdanalysis.analysis.regression import Points, choose_steps
from wdanalysis.analysis.table import units

READING_COLUMNS = ("method", "module", "axis", "rule", "sentence")
"""The columns of `readings`."""

MIXES = 0.3
"""A pooled r this far from that of layers at the same step is taken apart in a sentence."""

EITHER_SIGN = 0.1
"""The range of r over the choices of steps is told where it reaches this far on both sides of zero."""

LARGE_SHRINK_SHARE = 0.5
"""A uniform shrink is worth a sentence where it explains this share of ΔM."""

ONE_FACTOR = 0.2
"""Layers share one factor where their factors' standard deviation is at most this part of their mean."""

MUCH_ERASED = 0.1
"""From this share on it is said how much of a random update's ΔD rounding erases."""

MOSTLY_UNCHANGED = 0.5
"""The share of unchanged elements from which on it is said."""

FEW_VECTORS = 25.0
"""A vector is said to have turned far more than most where its 1 − cos is this many times the median (and so its angle
five times), and twice what chance gives."""

BY_CHANCE = 0.05
"""Among alike vectors, the largest 1 − cos exceeds what is said to be chance's in this share of matrices."""


def unchanged(panel: Panel) -> str | None:
    """Nothing moved: ΔM and ΔD of every matrix are 0."""
    if panel.is_unchanged:
        return "Nothing changed: every compared matrix equals the base."
    return None


def trend(panel: Panel) -> str | None:
    """How ΔM goes with ΔD across the layers at the same step, with the badge's rule, or why nothing is read.

    A trend is told where q < 0.05 over the panels of the table, p < 0.05 with the same sign without the layer that
    moves r most, and r is outside the band of updates without structure, where that is known; where
    r is inside it, nothing is said here.
    """
    if panel.is_unchanged or panel.rows.empty:
        return None
    row = panel.within_step
    found, layers = badge(row), row["layers"]
    if found == TOO_FEW:
        few = (
            "No layers are" if not layers else "One layer is" if layers == 1 else f"Only {layers} layers are"
        )
        return f"{few} known: an interval, a p-value and a trend ask for {FEWEST_LAYERS}."
    if found in (AS_CHANCE, ONE_LAYER) or not math.isfinite(row["pearson_r"]):
        return None
    r = f"r = {_r(row['pearson_r'])}{_interval(row)}, {layers} layers"
    if not math.isfinite(row["q_value"]):
        return f"The layers do not have the same steps, so no trend is read: {r}."
    q = f"{_q(row['q_value'])} over {_count(panel.panels, 'panel')}"
    if found == NONE:
        without = f", but {_without(row)}" if is_significant(row["q_value"]) else ""
        return f"No clear trend across layers at the same step: {r}; {q}{without}."
    without = f"{_r(row['leave_out_low'])} … {_r(row['leave_out_high'])} without any one layer"
    few = (
        " The interval holds 0 since few layers carry the spread."
        if row["r_low"] <= 0 <= row["r_high"]
        else ""
    )
    return f"At the same step, layers {_TRENDS[found]}: {r}; {without}; {q}.{few}"


def one_layer(panel: Panel) -> str | None:
    """One layer makes the trend: without it an r of `RESTS` or more turns its sign, or a significant one is none."""
    row = panel.within_step
    if badge(row) != ONE_LAYER:
        return None
    return (
        f"The trend across layers rests on layer {row['leave_out_layer']}: at the same step r = "
        f"{_r(row['pearson_r'])}, {_without(row, 'it')}."
    )


def chance(panel: Panel) -> str | None:
    """How the pooled r lies to what updates without structure would show, where there is a null model."""
    row = panel.pooled
    low, high = row.get("r_null_low", math.nan), row.get("r_null_high", math.nan)
    updates = set(panel.rows["update"].dropna()) if "update" in panel.rows else set()
    if panel.is_unchanged or len(updates) != 1:
        return None
    return nulls.reading(row["pearson_r"], low, high, update=str(updates.pop()))


def pooled_parts(panel: Panel) -> str | None:
    """The pooled r is `MIXES` or more from that of layers at the same step: what of it is of layers, what of steps.

    That the two differ is asked of layers like these: without each in turn, the interval of artanh r − artanh r_within
    does not hold 0.
    """
    row = panel.pooled
    if not math.isfinite(row["r_between"]) or not abs(row["pearson_r"] - row["r_within"]) >= MIXES:
        return None
    if not apart_from_zero(interval(panel.points, _z_less_within)):
        return None
    whole, of_layers = (round(r, 2) for r in (row["pearson_r"], row["w_d"] * row["w_m"] * row["r_within"]))
    return (
        f"The pooled r of {_r(whole)} is {_r(of_layers)} from layers at the same step "
        f"(their r = {_r(row['r_within'])}{_interval(panel.within_step)}) and {_r(whole - of_layers)} from the steps."
    )


def step_choice(panel: Panel) -> str | None:
    """Over the choices of four steps of a longer series, r reaches `EITHER_SIGN` or more on both sides of zero.

    The steps are said to decide the sign where the intervals of the least and of the greatest r hold no 0: then
    other layers like these would have both signs too.
    """
    low, high = panel.pooled["r_four_low"], panel.pooled["r_four_high"]
    if not (low <= -EITHER_SIGN and high >= EITHER_SIGN):
        return None
    points = panel.points
    choices, r = choose_steps(points)
    extremes = [points.where(np.isin(points.step, choices[at])) for at in (np.nanargmin(r), np.nanargmax(r))]
    decides = all(apart_from_zero(interval(chosen, _z)) for chosen in extremes)
    also = "; which steps one looks at decides its sign" if decides else ""
    return f"Over the choices of four steps r goes from {_r(low)} to {_r(high)}{also}."


def shrink(panel: Panel) -> str | None:
    """A uniform shrink or growth explains `LARGE_SHRINK_SHARE` of the last step's ΔM or more.

    It has one sign in all matrices, of `FEWEST_LAYERS` layers or more: in a single one, a few long vectors may pass for
    it. The share is 1 − Σ delta_m_unshrunk / Σ delta_m over the matrices. It is one factor where the matrices' own
    factors have a standard deviation of at most `ONE_FACTOR` times their mean, else one factor for each matrix.
    """
    rows = panel.last[panel.last["shrink"].notna()]
    if units(rows).nunique() < FEWEST_LAYERS or not rows["delta_m"].sum() > 0:
        return None
    share = 1 - rows["delta_m_unshrunk"].sum() / rows["delta_m"].sum()
    factors = rows["shrink"]
    one_sign = (factors > 0).all() or (factors < 0).all()
    if share < LARGE_SHRINK_SHARE or not one_sign:
        return None
    what = "shrink" if factors.mean() > 0 else "growth"
    sizes = factors.abs()
    if len(rows) > 1 and sizes.std(ddof=0) > ONE_FACTOR * sizes.mean():
        low, high = _percent(sizes.min()), _percent(sizes.max())
        return f"{_whole_percent(share)} of ΔM is a uniform {what} of each matrix, by {low} to {high}."
    return f"{_whole_percent(share)} of ΔM is one common {what} of {_percent(sizes.mean())}."


def without_shrink(panel: Panel) -> str | None:
    """Taking out each matrix's uniform shrink changes the trend across layers that `trend` reads.

    A trend without it asks for p < 0.05 over the number of panels, and for p < 0.05 with the same sign
    without the layer that moves r most.
    """
    if shrink(panel) is None or (before := badge(panel.within_step)) not in _READABLE:
        return None
    line = panel.unshrunk
    if not (math.isfinite(line.leave_out_low) and math.isfinite(line.p_value)):
        return None
    turns = line.leave_out_low <= 0 <= line.leave_out_high
    clear = is_significant(line.p_value, panel.panels) and is_significant(line.leave_out_p) and not turns
    after = NONE if not clear else RISES if line.pearson_r > 0 else FALLS
    if before == after or (before not in (RISES, FALLS) and after == NONE):
        return None
    what = "there is no clear trend across layers at the same step"
    if after != NONE:
        what = f"layers {_TRENDS[after]} at the same step"
    return f"Without that, {what} (r = {_r(line.pearson_r)}; {_q(line.p_value, 'p')})."


def rounding(panel: Panel) -> str | None:
    """Rounding to the stored dtype made ΔD, or erased of it.

    Off the grid: some matrices' ΔD is under `NEAR_FLOOR` times what rounding makes by itself, as
    `wdanalysis.analysis.floors.near_floor` has it. On it: at the last step, rounding erases a share of ΔD of
    `MUCH_ERASED` or more (the matrices' median) of random updates that are stored as ones of this size. What it erased
    of this one, the stored numbers cannot tell: an update of few elements loses less.
    """
    if panel.is_unchanged:
        return None
    sentences = []
    off = panel.rows[panel.rows["floor_ratio"].notna() & near_floor(panel.rows)]
    if count := len(off):
        of = f"All {count} points" if count == len(panel.rows) else f"{count} of {len(panel.rows)} points"
        what = f"rounding{_to_dtypes(off)}"
        sentences.append(f"{of} may be rounding: ΔD is under {NEAR_FLOOR:g} × what {what} makes by itself.")
    share = erased(panel.last).median()
    if share >= MUCH_ERASED:
        sentences.append(
            f"Rounding{_to_dtypes(panel.last)} erases about {_whole_percent(share)} of the ΔD of random updates of "
            "this size: a change of under half a step between its numbers is stored as none."
        )
    return " ".join(sentences) or None


def _to_dtypes(rows: pd.DataFrame) -> str:
    """Name what the rows' matrices are rounded to."""
    dtypes = "/".join(sorted(rows["tuned_dtype"].dropna().unique()))
    return f" to {dtypes}" if dtypes else ""


def few_elements(panel: Panel) -> str | None:
    """At the last step, at least `MOSTLY_UNCHANGED` of all the matrices' elements are stored as the base's own.

    Whether training left them so is another question where they are rounded.
    """
    if panel.is_unchanged:
        return None
    share, vectors, length = _numbers(panel.last, "unchanged_fraction", "vectors", "length")
    elements = np.where(np.isfinite(share), vectors * length, 0.0)
    if not elements.sum() > 0 or (all_of := np.nansum(share * elements) / elements.sum()) < MOSTLY_UNCHANGED:
        return None
    return f"{_whole_percent(all_of)} of the elements are stored as they were."


def few_vectors(panel: Panel) -> str | None:
    """At the last step, the largest 1 − cos is at least `FEW_VECTORS` times the median one (the matrices' median).

    And twice what the largest of as many alike vectors is at most (`largest_by_chance`). Matrices of which rounding
    decides ΔD are left out: a few stored steps are all that is left of them.
    """
    most, median, vectors, length, rank = _numbers(
        panel.last, "delta_d_max", "delta_d_median", "vectors", "length", "rank"
    )
    if not (most >= FEW_VECTORS * median).any():
        return None
    told = (median > 0) & ~near_floor(panel.last).to_numpy()
    if not told.any() or (ratio := np.median(most[told] / median[told])) < FEW_VECTORS:
        return None
    by_chance = np.median(largest_by_chance(vectors, length, rank)[told])
    if not ratio >= 2 * by_chance:
        return None
    return (
        f"At least one vector turned far more than most: the largest 1 − cos is {ratio:.0f} × the median, where "
        f"chance gives alike vectors {by_chance:.2g} × at most."
    )


def largest_by_chance(vectors: ArrayLike, length: ArrayLike, rank: ArrayLike) -> NDArray[np.float64]:
    """What the largest 1 − cos over the median one exceeds with the probability `BY_CHANCE` where vectors are alike.

    1 − cos is in proportion to the squared length of the update across the vector: χ² of length − 1 degrees of freedom,
    and for an update of a lower rank of that.

    Parameters
    ----------
    vectors, length, rank
        How many vectors there are, of how many elements, and the rank of the update; NaN where that is full.

    Examples
    --------
    >>> largest_by_chance(4096, [4096, 4096, 4096], [np.nan, 8, 1]).round(2)
    array([ 1.1 ,  5.02, 42.05])
    """
    freedom = np.fmin(np.asarray(length, float) - 1, rank)
    return np.asarray(chdtri(freedom, BY_CHANCE / np.asarray(vectors, float)) / chdtri(freedom, 0.5))


RULES: Mapping[str, Callable[[Panel], str | None]] = MappingProxyType(
    {
        "unchanged": unchanged,
        "trend": trend,
        "one_layer": one_layer,
        "chance": chance,
        "pooled_parts": pooled_parts,
        "step_choice": step_choice,
        "shrink": shrink,
        "without_shrink": without_shrink,
        "rounding": rounding,
        "few_elements": few_elements,
        "few_vectors": few_vectors,
    }
)
"""Every rule by its name in the table, in the order in which sentences are read."""


def readings(metrics: pd.DataFrame, correlated: pd.DataFrame | None = None) -> pd.DataFrame:
    """Read every panel of a metrics table.

    Parameters
    ----------
    metrics
        The metrics table. Without diagnostics the rules that need them say nothing.
    correlated
        Its table of `wdanalysis.analysis.regression.correlations`, where it is there already. Columns r_null_low and
        r_null_high in it are what updates without structure would show: no trend is told that lies between.

    Returns
    -------
    DataFrame
        `READING_COLUMNS`, a row for every sentence: what it is about, the name of its rule, and the sentence.

    Examples
    --------
    >>> readings(run.metrics)[["method", "module", "rule"]].head(3)
      method module          rule
    0     ft      q     one_layer
    1     ft      q        chance
    2     ft      q  pooled_parts
    """
    rows = [
        [*key, name, text]
        for key, panel in panels(metrics, correlated)
        for name, rule in RULES.items()
        if (text := rule(panel))
    ]
    return pd.DataFrame(rows, columns=list(READING_COLUMNS), dtype=str)


_TRENDS = {RISES: "that turned more changed magnitude more", FALLS: "that turned more changed magnitude less"}
_READABLE = (RISES, FALLS, NONE, ONE_LAYER)


def _numbers(rows: pd.DataFrame, *columns: str) -> NDArray[np.float64]:
    """(columns, rows) numbers; NaN where a cell is empty."""
    return np.array([rows[column].to_numpy(np.float64, na_value=np.nan) for column in columns])


def _z(points: Points) -> float:
    """Artanh r of all points."""
    return fisher(points.r())


def _z_less_within(points: Points) -> float:
    """What r gains, on that scale, by the steps."""
    return fisher(points.r()) - fisher(points.r(within_steps=True))


def _interval(row: Mapping[str, float]) -> str:
    low, high = row["r_low"], row["r_high"]
    return f" [{_r(low)}, {_r(high)}]" if math.isfinite(low) else ""


def _without(row: Mapping[str, float], what: str = "") -> str:
    r, p = _r(without_most_moving(row)), _q(row["leave_out_p"], "p")
    return f"without {what or 'layer ' + str(row['leave_out_layer'])} r = {r} ({p})"


def _q(value: float, name: str = "q") -> str:
    return f"{name} < 0.001" if value < 0.001 else f"{name} = {value:.3g}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _r(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _whole_percent(share: float) -> str:
    """A share in whole percent, which says 100 only where it is all."""
    percent = 100 * share
    return f"{min(percent, 99):.0f} %" if 99.5 <= percent < 100 else f"{percent:.0f} %"

"""What the numbers of a panel (one method, one module) say, in sentences.

Every sentence comes from a rule: a function of the panel that returns a sentence, or nothing where the numbers do not
carry one. The thresholds are the constants below. A panel without values gets no sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pandas as pd

from wdanalysis.analysis.floors import NEAR_FLOOR, erased
from wdanalysis.analysis.regression import Fit, Points, at_last_step, fit

READING_COLUMNS = ("method", "module", "axis", "rule", "sentence")
"""The columns of `readings`."""

FEWEST_LAYERS = 6
"""A trend across layers is read from so many layers at least."""

FEWEST_STEPS = 3
"""A trend within a layer is read from so many steps at least."""

SIGNIFICANT = 0.05
"""A trend across layers whose p-value is not below is no clear trend."""

CLEAR = 0.5
"""A layer whose r over its steps is closer to zero has no clear trend."""

MOST = 0.8
"""From this share of the layers on it is "most"."""

LARGE_SHRINK_SHARE = 0.5
"""A uniform shrink is worth a sentence where it explains this share of ΔM."""

ONE_FACTOR = 0.2
"""Layers share one factor where their factors' standard deviation is at most this part of their mean."""

HIDES = 0.5
"""A pooled r that is this far from both the r within layers and the r across them stands for neither."""

MUCH_ERASED = 0.1
"""From this share on it is said how much of ΔD rounding erased."""

MOSTLY_UNCHANGED = 0.5
"""The share of unchanged elements from which on it is said."""

FEW_VECTORS = 10.0
"""A few vectors are said to have moved most where the largest 1 − cos is this many times the median."""


_READ = (
    *("method", "module", "step", "layer", "delta_m", "delta_d"),
    *("shrink", "delta_m_unshrunk", "floor_ratio", "delta_d_median", "delta_d_max"),
    *("unchanged_fraction", "tuned_dtype", "grid", "delta_d_bias"),
)
"""Columns that rules read; a table may lack those of diagnostics."""


@dataclass(frozen=True)
class Panel:
    """The rows of one method and module, and the fits that the rules read.

    Attributes
    ----------
    rows
        Those with values; the columns of `_READ`.
    last
        Those of the last step.
    layers
        How many layers they are of.
    across
        ΔM on ΔD across the layers of the last step: layers are nearly independent of each other, steps are not.
    unshrunk
        The same for ΔM without each matrix's uniform shrink.
    pooled
        Over all layers and steps.
    within
        The r of every layer over its steps, of those that have one and `FEWEST_STEPS` steps.
    """

    rows: pd.DataFrame
    last: pd.DataFrame
    layers: int
    across: Fit
    unshrunk: Fit
    pooled: Fit
    within: tuple[float, ...]

    @classmethod
    def of(cls, metrics: pd.DataFrame) -> Panel:
        """Take it from a method's and module's rows of the metrics table."""
        rows = metrics.reindex(columns=list(_READ))
        rows = rows[np.isfinite(rows[["delta_m", "delta_d"]].to_numpy(float, na_value=np.nan)).all(axis=1)]
        last = at_last_step(rows)
        points, at_last = Points.of(rows), Points.of(last[last["layer"].notna()])
        by_layer = [
            fit(of_layer.delta_d, of_layer.delta_m)
            for _, of_layer in points.by_layer()
            if len(set(of_layer.step.tolist())) >= FEWEST_STEPS
        ]
        return cls(
            rows=rows,
            last=last,
            layers=len(set(at_last.layer.tolist())),
            across=fit(at_last.delta_d, at_last.delta_m),
            unshrunk=fit(at_last.delta_d, at_last.delta_m_unshrunk),
            pooled=fit(points.delta_d, points.delta_m),
            within=tuple(line.pearson_r for line in by_layer if math.isfinite(line.pearson_r)),
        )


def unchanged(panel: Panel) -> str | None:
    """Nothing moved: ΔM and ΔD of every matrix are 0."""
    if len(panel.rows) and not panel.rows[["delta_m", "delta_d"]].any(axis=None):
        return "Nothing changed: every compared matrix equals the base."
    return None


def trend(panel: Panel) -> str | None:
    """How ΔM goes with ΔD, within layers and across them.

    Within layers: "every" where the r of each layer over its steps has the same sign and |r| ≥ `CLEAR`, "most" where at
    least `MOST` of them do, else no common trend; from `FEWEST_LAYERS` layers of `FEWEST_STEPS` steps. Across layers,
    at the last step: rises or falls where p < `SIGNIFICANT`, else no clear trend; from `FEWEST_LAYERS` layers.
    """
    if unchanged(panel) or panel.rows.empty:
        return None
    clauses = [clause for clause in (_within(panel), _across(panel)) if clause]
    if panel.layers < FEWEST_LAYERS:
        clauses.append(f"Too few layers ({panel.layers}) to read a trend across them")
    return "; ".join([*clauses[:1], *map(_lower, clauses[1:])]) + "." if clauses else None


def pooled_hides(panel: Panel) -> str | None:
    """The pooled r differs by `HIDES` or more from both the median r within layers and the r across layers.

    Only where both of these can be read.
    """
    if _within(panel) is None or _across(panel) is None:
        return None
    within, pooled = float(np.median(panel.within)), panel.pooled.pearson_r
    if min(abs(pooled - within), abs(pooled - panel.across.pearson_r)) >= HIDES:
        return f"The pooled r of {_r(pooled)} mixes the two and describes neither."
    return None


def shrink(panel: Panel) -> str | None:
    """A uniform shrink or growth explains `LARGE_SHRINK_SHARE` of the last step's ΔM or more.

    The share is 1 − Σ delta_m_unshrunk / Σ delta_m over the matrices. It is one factor where the matrices' own factors
    have a standard deviation of at most `ONE_FACTOR` times their mean, else one factor for each matrix.
    """
    rows = panel.last[panel.last["shrink"].notna()]
    if rows.empty or not rows["delta_m"].sum() > 0:
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
    """Taking out each matrix's uniform shrink changes the trend across layers that `trend` reads."""
    if shrink(panel) is None:
        return None
    before, after = _direction(panel, panel.across), _direction(panel, panel.unshrunk)
    if before is None or after is None or before == after:
        return None
    what = "there is no clear trend" if after == 0 else f"ΔM {_TRENDS[after]}"
    return f"Without that, {what} across layers (r = {_r(panel.unshrunk.pearson_r)})."


def rounding(panel: Panel) -> str | None:
    """Rounding to the stored dtype made ΔD, or erased of it.

    Off the grid: some matrices' ΔD is under `NEAR_FLOOR` times what rounding makes by itself. On it: at the last step,
    rounding erased a share of ΔD of `MUCH_ERASED` or more (the matrices' median).
    """
    if unchanged(panel):
        return None
    sentences = []
    off = panel.rows[panel.rows["floor_ratio"] < NEAR_FLOOR]
    if count := len(off):
        of = f"All {count} points" if count == len(panel.rows) else f"{count} of {len(panel.rows)} points"
        what = f"rounding{_to_dtypes(off)}"
        sentences.append(f"{of} may be rounding: ΔD is under {NEAR_FLOOR:g} × what {what} makes by itself.")
    share = erased(panel.last).median()
    if share >= MUCH_ERASED:
        sentences.append(
            f"Rounding{_to_dtypes(panel.last)} erased about {_whole_percent(share)} of ΔD: "
            "a change of under half a step between its numbers is stored as none."
        )
    return " ".join(sentences) or None


def _to_dtypes(rows: pd.DataFrame) -> str:
    """Name what the rows' matrices are rounded to."""
    dtypes = "/".join(sorted(rows["tuned_dtype"].dropna().unique()))
    return f" to {dtypes}" if dtypes else ""


def few_elements(panel: Panel) -> str | None:
    """At the last step, at least `MOSTLY_UNCHANGED` of the elements are the base's own (the matrices' median)."""
    share = panel.last["unchanged_fraction"].median()
    if share >= MOSTLY_UNCHANGED and not unchanged(panel):
        return f"{_whole_percent(share)} of the elements are unchanged."
    return None


def few_vectors(panel: Panel) -> str | None:
    """At the last step, the largest 1 − cos is at least `FEW_VECTORS` times the median one (the matrices' median)."""
    rows = panel.last[panel.last["delta_d_median"] > 0]
    ratio = (rows["delta_d_max"] / rows["delta_d_median"]).median()
    if ratio >= FEW_VECTORS:
        return (
            f"A few vectors turned far more than the others: the largest 1 − cos is {ratio:.0f} × the median."
        )
    return None


RULES: Mapping[str, Callable[[Panel], str | None]] = MappingProxyType(
    {
        "unchanged": unchanged,
        "trend": trend,
        "pooled_hides": pooled_hides,
        "shrink": shrink,
        "without_shrink": without_shrink,
        "rounding": rounding,
        "few_elements": few_elements,
        "few_vectors": few_vectors,
    }
)
"""Every rule by its name in the table, in the order in which sentences are read."""


def readings(metrics: pd.DataFrame) -> pd.DataFrame:
    """Read every panel of a metrics table.

    Parameters
    ----------
    metrics
        The metrics table. Without diagnostics the rules that need them say nothing.

    Returns
    -------
    DataFrame
        `READING_COLUMNS`, a row for every sentence: what it is about, the name of its rule, and the sentence.

    Examples
    --------
    >>> readings(run.metrics)[["method", "module", "rule"]].head(3)
      method module          rule
    0     ft      q         trend
    1     ft      q  pooled_hides
    2     ft      v         trend
    """
    rows = []
    for key, of_panel in metrics.groupby(["method", "module", "axis"], sort=False):
        panel = Panel.of(of_panel)
        rows += [[*key, name, text] for name, rule in RULES.items() if (text := rule(panel))]
    return pd.DataFrame(rows, columns=list(READING_COLUMNS), dtype=str)


def reading(metrics: pd.DataFrame) -> str:
    """The sentences of one panel's rows in a line; empty where there are none."""
    panel = Panel.of(metrics)
    return " ".join(text for rule in RULES.values() if (text := rule(panel)))


_TRENDS = {1: "rises with ΔD", -1: "falls as ΔD rises"}


def _within(panel: Panel) -> str | None:
    """The clause on what happens within layers."""
    if len(panel.within) < FEWEST_LAYERS:
        return None
    for sign, goes in _TRENDS.items():
        share = float(np.mean(sign * np.array(panel.within) >= CLEAR))
        if share >= MOST:
            where = "every layer" if share == 1 else f"most layers ({_whole_percent(share)})"
            return f"ΔM {goes} within {where}"
    return "Within layers ΔM has no common trend"


def _across(panel: Panel) -> str | None:
    """The clause on what happens across layers."""
    direction = _direction(panel, panel.across)
    if direction is None:
        return None
    r = f"(r = {_r(panel.across.pearson_r)}, n = {panel.across.n})"
    if direction == 0:
        return f"Across layers there is no clear trend {r}"
    return f"Across layers ΔM {_TRENDS[direction]} {r}"


def _direction(panel: Panel, line: Fit) -> int | None:
    """1 for rising, −1 for falling, 0 for neither; None where there are too few layers or no line."""
    if panel.layers < FEWEST_LAYERS or not math.isfinite(line.pearson_r):
        return None
    return int(np.sign(line.pearson_r)) if line.p_value < SIGNIFICANT else 0


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _r(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _whole_percent(share: float) -> str:
    """A share in whole percent, which says 100 only where it is all."""
    percent = 100 * share
    return f"{min(percent, 99):.0f} %" if 99.5 <= percent < 100 else f"{percent:.0f} %"

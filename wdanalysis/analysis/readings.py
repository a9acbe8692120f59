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

import pandas as pd

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
from wdanalysis.analysis.floors import NEAR_FLOOR, erased
from wdanalysis.analysis.intervals import FEWEST_LAYERS
from wdanalysis.analysis.panel import Panel, panels

READING_COLUMNS = ("method", "module", "axis", "rule", "sentence")
"""The columns of `readings`."""

MIXES = 0.3
"""A pooled r this far from that of layers at the same step is taken apart in a sentence."""

EITHER_SIGN = 0.1
"""Choices of steps are said to decide the sign where r reaches this far on both sides of zero."""

LARGE_SHRINK_SHARE = 0.5
"""A uniform shrink is worth a sentence where it explains this share of ΔM."""

ONE_FACTOR = 0.2
"""Layers share one factor where their factors' standard deviation is at most this part of their mean."""

MUCH_ERASED = 0.1
"""From this share on it is said how much of ΔD rounding erased."""

MOSTLY_UNCHANGED = 0.5
"""The share of unchanged elements from which on it is said."""

FEW_VECTORS = 10.0
"""A few vectors are said to have moved most where the largest 1 − cos is this many times the median."""


def unchanged(panel: Panel) -> str | None:
    """Nothing moved: ΔM and ΔD of every matrix are 0."""
    if len(panel.rows) and not panel.rows[["delta_m", "delta_d"]].any(axis=None):
        return "Nothing changed: every compared matrix equals the base."
    return None


def trend(panel: Panel) -> str | None:
    """How ΔM goes with ΔD across the layers at the same step, with the badge's rule, or why nothing is read.

    A trend is told where q < 0.05 over the panels of the table, also without the layer that moves r most p <
    0.05 with the same sign, and r is outside the band of updates without structure, where that is known; where
    r is inside it, nothing is said here.
    """
    if unchanged(panel) or panel.rows.empty:
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
    if unchanged(panel) or len(updates) != 1:
        return None
    return nulls.reading(row["pearson_r"], low, high, update=str(updates.pop()))


def pooled_parts(panel: Panel) -> str | None:
    """The pooled r is `MIXES` or more from that of layers at the same step: what of it is of layers, what of steps."""
    row = panel.pooled
    if not math.isfinite(row["r_between"]) or not abs(row["pearson_r"] - row["r_within"]) >= MIXES:
        return None
    whole, of_layers = (round(r, 2) for r in (row["pearson_r"], row["w_d"] * row["w_m"] * row["r_within"]))
    return (
        f"The pooled r of {_r(whole)} is {_r(of_layers)} from layers at the same step "
        f"(their r = {_r(row['r_within'])}) and {_r(whole - of_layers)} from the steps."
    )


def step_choice(panel: Panel) -> str | None:
    """Over the choices of four steps of a longer series, r reaches `EITHER_SIGN` or more on both sides of zero."""
    low, high = panel.pooled["r_four_low"], panel.pooled["r_four_high"]
    if low <= -EITHER_SIGN and high >= EITHER_SIGN:
        return f"Which four steps one looks at decides the sign of r: from {_r(low)} to {_r(high)}."
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

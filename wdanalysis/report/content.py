"""What the page holds, as plain data: a comparison's tables column by column, and its provenance as lists of facts."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from wdanalysis.analysis.badges import AS_CHANCE, FALLS, NONE, ONE_LAYER, RISES, TOO_FEW
from wdanalysis.analysis.floors import near_floor, why_near_floor
from wdanalysis.analysis.nulls import null_curve
from wdanalysis.analysis.runs import has_runs
from wdanalysis.analysis.step_bins import step_bins
from wdanalysis.figures import style
from wdanalysis.figures.profiles import SQUASHED
from wdanalysis.figures.scatter_figure import LEAST_SHARE, NULL_ROOM
from wdanalysis.report.words import GLOSSARY, LABELS, MEANINGS

if TYPE_CHECKING:
    from wdanalysis.analysis.findings import Findings
    from wdanalysis.measure.spectra import Spectra
    from wdanalysis.results.provenance import Run

MOST_ROWS = 20_000
"""Rows of the metrics table that go into the page; a browser draws more of them slowly."""

SIGNS: Mapping[str, str] = {
    RISES: "▲",
    FALLS: "▼",
    NONE: "○",
    AS_CHANCE: "≈",
    ONE_LAYER: "◐",
    TOO_FEW: "·",
}
"""The sign of each badge."""

LAYER_COLOURS = 64
"""Steps of the scale that colours layers."""

DARK_START = 0.3
"""Where the layers' scale (from 0 to 1) begins on a dark page, on which its first colours would vanish."""


def data(
    findings: Findings, run: Run, spectra: Spectra | None = None, geometry: pd.DataFrame | None = None
) -> dict[str, Any]:
    """Gather what the page's scripts draw: JSON-ready, without NaN.

    Returns
    -------
    dict
        `tables`, each `{rows, columns}` as `table` makes them; `marked`, 1 for each row of the metrics whose ΔD
        rounding decides, and how; `step_ranges`, each `{name, steps}`, that share a marker; `rules`, the thresholds
        that the figures have too; `badges`, the sign of each; `colours` of methods and layers.
    """
    drawn = thinned_by_steps(findings.averaged)
    tables = {
        "summary": findings.summary,
        "null": null_curve(drawn),
        "metrics": drawn,
        "correlations": findings.correlations,
        "diagnostics": findings.diagnostics,
        "skipped": skipped(run),
        "inputs": inputs(run),
    }
    where_any = {
        "runs": findings.across_runs,
        "predictions": findings.predictions,
        "step_choices": findings.step_choices,
    }
    tables |= {name: thinned(found) for name, found in where_any.items() if len(found)}
    if spectra is not None:
        tables |= {"spectra": spectra.matrices, "similarity": spectra.similarity}
    if geometry is not None:
        tables["geometry"] = geometry
    scale = style.layer_colours()
    return {
        "tables": {name: table(frame) for name, frame in tables.items()},
        "marked": {"rows": near_floor(drawn).astype(int).tolist(), "why": why_near_floor(drawn)},
        "step_ranges": step_ranges(drawn["step"]),
        "badges": dict(SIGNS),
        "rules": {
            "squashed": SQUASHED,
            "least_share": LEAST_SHARE,
            "null_room": NULL_ROOM,
        },
        "colours": {
            "methods": list(style.COLOURS),
            "layers": [_hex(colour) for colour in scale(np.linspace(0, 1, LAYER_COLOURS))],
            "layers_dark": [_hex(colour) for colour in scale(np.linspace(DARK_START, 1, LAYER_COLOURS))],
        },
    }


def thinned(table: pd.DataFrame) -> pd.DataFrame:
    """Return at most `MOST_ROWS` rows, evenly spaced over the table, which is in order of method, step and layer."""
    if len(table) <= MOST_ROWS:
        return table
    return table.iloc[np.linspace(0, len(table) - 1, MOST_ROWS).round().astype(int)]


def thinned_by_steps(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return at most `MOST_ROWS` rows: of each method as many of its steps as fit, evenly spaced, the last among them.

    A step stays whole, so that no layer is missing where it is drawn. Where not even one step of each method fits, rows
    are left out as `thinned` does.
    """
    if len(metrics) <= MOST_ROWS:
        return metrics
    order = metrics["step"].astype("Float64").fillna(math.inf).astype(float)
    ranks = order.groupby(metrics["method"]).rank("dense").astype(int)
    counts = ranks.groupby(metrics["method"]).transform("max")
    for most in range(int(counts.max()), 0, -1):
        # Of n steps, those at which k·most/n passes a whole number: `most` of them, and n itself.
        kept = (most >= counts) | (ranks * most // counts > (ranks - 1) * most // counts)
        if kept.sum() <= MOST_ROWS:
            return metrics[kept]
    return thinned(metrics)


def step_ranges(steps: pd.Series) -> list[dict[str, Any]]:
    """Return the few ranges of steps that share a marker, as on the figures: their names, and the steps of each."""
    ranges: dict[str, list[int]] = {}
    for step, at in step_bins(steps.dropna()).items():
        ranges.setdefault(at.name, []).append(step)
    return [{"name": name, "steps": of_range} for name, of_range in ranges.items()]


def table(frame: pd.DataFrame) -> dict[str, Any]:
    """Turn a table into its columns: numbers with null where a cell is empty, text as levels and codes.

    Returns
    -------
    dict
        `rows`, their number, and `columns`, each `{name, label, values}` or `{name, label, levels, codes}` with the
        code −1 where a cell is empty.
    """
    return {"rows": len(frame), "columns": [_column(str(name), frame[name]) for name in frame.columns]}


def skipped(run: Run) -> pd.DataFrame:
    """Return a row for all that was left out: method, run (where a method has several), step, name, reason."""
    rows = pd.DataFrame(run.skipped, columns=["method", "run", "step", "name", "reason"])
    return _without_empty_run(rows)


def inputs(run: Run) -> pd.DataFrame:
    """Return a row for every file that was read.

    Its columns are method, run (where a method has several), step, format, path, bytes, modified and header_sha256.
    """
    rows = [
        (
            *(method, checkpoint.run, checkpoint.step, checkpoint.format),
            *(file.path, file.bytes, file.modified, file.header_sha256),
        )
        for method, checkpoints in run.inputs.items()
        for checkpoint in checkpoints
        for file in checkpoint.files
    ]
    columns = ["method", "run", "step", "format", "path", "bytes", "modified", "header_sha256"]
    return _without_empty_run(pd.DataFrame(rows, columns=columns).astype({"step": "Int64", "bytes": "Int64"}))


@dataclass(frozen=True)
class Panel:
    """What the overview says of a method in a module.

    Attributes
    ----------
    badge, sign
        The badge and its sign, so that colour is never alone.
    r
        r of layers at the same step, with its interval, as text; "" where there is none.
    place
        What its link goes to: the charts of this panel.
    """

    badge: str
    sign: str
    r: str
    place: str


def overview(findings: Findings) -> dict[str, dict[str, Panel]]:
    """Return the panels of each method by module; a panel without a row in the summary is missing."""
    table = findings.correlations
    layers = table[table["scope"] == "within_step"].set_index(["method", "module"])
    panels: dict[str, dict[str, Panel]] = {}
    for method, module, found in findings.summary[["method", "module", "badge"]].itertuples(index=False):
        of_layers = layers.loc[[(method, module)]].iloc[0]
        ends = (of_layers["pearson_r"], of_layers["r_low"], of_layers["r_high"])
        r, *interval = (style.decimals(end) if math.isfinite(end) else "" for end in ends)
        chosen = f"#explore?module={_in_hash(module)}&methods={_in_hash(method)}"
        text = f"{r} [{', '.join(interval)}]" if all(interval) else r
        panels.setdefault(method, {})[module] = Panel(found, SIGNS[found], text, chosen)
    return panels


def figure_links(files: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
    """Return for each kind of figure the text and address of each of its files beside the page."""
    links: dict[str, list[tuple[str, str]]] = {}
    for file in files:
        kind, _, of = PurePosixPath(file).stem.partition("_")
        links.setdefault(kind, []).append((of or kind, quote(file)))
    return links


def _in_hash(name: str) -> str:
    """Return a name as the page's scripts write it into its address (`encodeURIComponent`)."""
    return quote(name, safe="-_.!~*'()")


def readings(table: pd.DataFrame) -> dict[str, list[tuple[str, str]]]:
    """Return for each method the modules, and what their numbers say in words, from the table of readings."""
    panels = table.groupby(["method", "module"], sort=False)["sentence"].agg(" ".join).reset_index()
    return {
        str(method): list(zip(of_method["module"], of_method["sentence"], strict=True))
        for method, of_method in panels.groupby("method", sort=False)
    }


def skipped_reasons(run: Run) -> list[tuple[str, int]]:
    """Return each reason for which something was left out, with how often."""
    return Counter(skip.reason for skip in run.skipped).most_common()


def provenance(run: Run) -> Iterator[tuple[str, str]]:
    """Yield name and value of what made the numbers: date, command, options, versions, time."""
    if run.date:
        yield "measured", run.date
    if run.command:
        yield "command", shlex.join(run.command)
    for option, value in dataclasses.asdict(run.options).items():
        if value is not None:
            yield option, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if run.seconds:
        parts = dataclasses.asdict(run.seconds).items()
        yield "time", ", ".join(f"{part} {value:.3g} s" for part, value in parts if value is not None)
    if run.bytes_read:
        yield "read", f"{run.bytes_read / 1e6:,.1f} MB"
    yield "versions", ", ".join(f"{package} {version}" for package, version in run.versions.items())


def label(column: str) -> str:
    """Return the heading of a column."""
    return LABELS.get(column, column.replace("_", " "))


def glossary() -> list[tuple[str, str, str]]:
    """Return column, heading and meaning of what the page explains at its end."""
    return [(column, label(column), MEANINGS[column]) for column in GLOSSARY]


def _without_empty_run(rows: pd.DataFrame) -> pd.DataFrame:
    return rows if has_runs(rows) else rows.drop(columns="run")


def _column(name: str, values: pd.Series) -> dict[str, Any]:
    head = {"name": name, "label": label(name), "meaning": MEANINGS.get(name, "")}
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        return {**head, "values": [_number(value) for value in values.tolist()]}
    codes, levels = pd.factorize(values)
    return {**head, "levels": [str(level) for level in levels], "codes": codes.tolist()}


def _number(value: Any) -> float | int | None:
    return None if pd.isna(value) or not math.isfinite(value) else value


def _hex(colour: tuple[float, ...]) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in colour[:3])

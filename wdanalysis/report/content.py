"""What the page holds, as plain data: a comparison's tables column by column, and its provenance as lists of facts."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from wdanalysis.analysis.floors import near_floor, why_near_floor
from wdanalysis.analysis.nulls import null_curve
from wdanalysis.analysis.runs import has_runs
from wdanalysis.analysis.table import apart
from wdanalysis.figures import style
from wdanalysis.figures.profiles import SQUASHED
from wdanalysis.figures.scatter_figure import LEAST_SHARE, NULL_ROOM

if TYPE_CHECKING:
    from wdanalysis.analysis.findings import Findings
    from wdanalysis.measure.spectra import Spectra
    from wdanalysis.results.provenance import Run

MOST_ROWS = 20_000
"""Rows of the metrics table that go into the page; a browser draws more of them slowly."""

LABELS: Mapping[str, str] = {
    "delta_m": "ΔM",
    "delta_d": "ΔD",
    "delta_m_signed": "ΔM signed",
    "rel_delta_m": "ΔM relative",
    "delta_m_floor": "ΔM floor",
    "delta_d_floor": "ΔD floor",
    "delta_m_unshrunk": "ΔM unshrunk",
    "delta_m_median": "ΔM median",
    "delta_m_p90": "ΔM 90 %",
    "delta_m_max": "ΔM max",
    "delta_d_median": "ΔD median",
    "delta_d_p90": "ΔD 90 %",
    "delta_d_max": "ΔD max",
    "pearson_r": "Pearson r",
    "r_low": "r low",
    "r_high": "r high",
    "p_value": "p",
    "q_value": "q (FDR)",
    "spearman_r": "Spearman ρ",
    "leave_out_low": "r low, one layer out",
    "leave_out_high": "r high, one layer out",
    "leave_out_layer": "layer that moves r most",
    "leverage": "largest leverage",
    "r_within": "r within steps",
    "r_between": "r between steps",
    "w_d": "w of ΔD",
    "w_m": "w of ΔM",
    "r_four_low": "r low, four steps",
    "r_four_median": "r median, four steps",
    "r_four_high": "r high, four steps",
    "r_null": "r of the null",
    "r_null_low": "r low of the null",
    "r_null_high": "r high of the null",
    "pearson_r_unshrunk": "r unshrunk",
    "mean_rho": "ρ mean",
    "mean_abs_rho": "|ρ| mean",
    "radial_share": "radial share",
    "null_delta_m": "ΔM of the null",
    "null_delta_m_sd": "ΔM of the null, sd",
    "null_delta_d": "ΔD of the null",
    "null_delta_d_sd": "ΔD of the null, sd",
    "mean_inverse_m0_squared": "1/m0² mean",
    "matrix_delta_m": "|‖W‖ − ‖W0‖|",
    "matrix_delta_d": "1 − cos(W, W0)",
    "mean_angle": "angle, degrees",
    "delta_m_bias": "ΔM bias",
    "delta_d_bias": "ΔD bias",
    "r2": "R²",
    "header_sha256": "header SHA-256",
    "r_mean": "r, mean over runs",
    "slope_mean": "slope, mean over runs",
}
"""Headings of columns that read better than their names; another column's is its name without underscores."""

LAYER_COLOURS = 64
"""Steps of the scale that colours layers."""

DARK_START = 70
"""Where the layers' scale (of 256) begins on a dark page, on which its first colours would vanish."""


def data(
    findings: Findings, run: Run, spectra: Spectra | None = None, geometry: pd.DataFrame | None = None
) -> dict[str, Any]:
    """Gather what the page's scripts draw: JSON-ready, without NaN.

    Returns
    -------
    dict
        `tables`, each `{rows, columns}` as `table` makes them; `marked`, 1 for each row of the metrics whose ΔD
        rounding decides, and how; `rules`, the thresholds that the figures have too;
        `colours` of methods and layers.
    """
    tables = {
        "summary": findings.summary,
        "null": null_curve(thinned(findings.averaged)),
        "metrics": thinned(apart(findings.averaged)),
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
    drawn = thinned(findings.averaged)
    scale = [_hex(colour) for colour in style.layer_colours().colors]  # type: ignore[attr-defined]
    return {
        "tables": {name: table(frame) for name, frame in tables.items()},
        "marked": {"rows": near_floor(drawn).astype(int).tolist(), "why": why_near_floor(drawn)},
        "rules": {
            "squashed": SQUASHED,
            "least_share": LEAST_SHARE,
            "null_room": NULL_ROOM,
        },
        "colours": {
            "methods": list(style.COLOURS),
            "layers": _sampled(scale),
            "layers_dark": _sampled(scale[DARK_START:]),
        },
    }


def thinned(table: pd.DataFrame) -> pd.DataFrame:
    """Return at most `MOST_ROWS` rows, evenly spaced over the table, which is in order of method, step and layer."""
    if len(table) <= MOST_ROWS:
        return table
    return table.iloc[np.linspace(0, len(table) - 1, MOST_ROWS).round().astype(int)]


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

    Its columns are method, run (where a method has several), step, format, path, bytes and header_sha256.
    """
    rows = [
        (
            *(method, checkpoint.run, checkpoint.step, checkpoint.format),
            *(file.path, file.bytes, file.header_sha256),
        )
        for method, checkpoints in run.inputs.items()
        for checkpoint in checkpoints
        for file in checkpoint.files
    ]
    columns = ["method", "run", "step", "format", "path", "bytes", "header_sha256"]
    return _without_empty_run(pd.DataFrame(rows, columns=columns).astype({"step": "Int64", "bytes": "Int64"}))


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
    """Yield name and value of what made the numbers: command, options, versions, time."""
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


def _without_empty_run(rows: pd.DataFrame) -> pd.DataFrame:
    return rows if has_runs(rows) else rows.drop(columns="run")


def _column(name: str, values: pd.Series) -> dict[str, Any]:
    head = {"name": name, "label": LABELS.get(name, name.replace("_", " "))}
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        return {**head, "values": [_number(value) for value in values.tolist()]}
    codes, levels = pd.factorize(values)
    return {**head, "levels": [str(level) for level in levels], "codes": codes.tolist()}


def _number(value: Any) -> float | int | None:
    return None if pd.isna(value) or not math.isfinite(value) else value


def _sampled(scale: list[str]) -> list[str]:
    return [scale[int(place)] for place in np.linspace(0, len(scale) - 1, LAYER_COLOURS)]


def _hex(colour: tuple[float, ...]) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in colour[:3])

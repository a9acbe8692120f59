"""`wd-analyze compare`: the main job."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from wdanalysis.cli import console, options
from wdanalysis.decomposition import Axis

if TYPE_CHECKING:
    from wdanalysis.comparison import Comparison

DEFAULT_OUT = Path("wd-analysis")


def compare(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The pre-trained model: a file or folder.")],
    tuned: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TUNED…",
            help="Tuned checkpoints: a file, a folder with one checkpoint or adapter, or a folder of steps each.",
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="Name the method of a TUNED path; otherwise its folder's name. Repeatable.",
        ),
    ] = None,
    axis: Annotated[
        Axis,
        typer.Option(
            help="One vector per output feature (as the paper's code and PEFT) or per input feature."
        ),
    ] = "out",
    modules: Annotated[
        str | None,
        typer.Option(
            metavar="ROLES|all|REGEX",
            help="Roles such as q,v; all; or a regular expression on names.",
            show_default="the attention projections that a method changed",
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="0-11,20", help="Layers to keep.", show_default="all")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(metavar="500,1000", help="Training steps to keep.", show_default="all")
    ] = None,
    alpha: options.Alpha = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results.")] = DEFAULT_OUT,
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        typer.Option(help="Where to compute; auto takes the best that there is."),
    ] = "auto",
    diagnostics: Annotated[
        bool,
        typer.Option(help="Also measure uniform shrink, rounding floors and the spread over the vectors."),
    ] = True,
    spectra: Annotated[
        bool,
        typer.Option(
            "--spectra", help="Also take singular values: ranks, intruder dimensions, similarity. Slow."
        ),
    ] = False,
    vectors: Annotated[
        bool, typer.Option("--vectors", help="Also keep what each single vector did: vectors.parquet.")
    ] = False,
    figures: options.Figures = "all",
    format: Annotated[options.Format, typer.Option(help="How figures are stored.")] = "png",
    report: Annotated[bool, typer.Option(help="Write report.html, one page with everything.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace results that are in DIR.")] = False,
    quiet: options.Quiet = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the table.")
    ] = False,
) -> None:
    """Measure ΔM and ΔD of tuned checkpoints against their base; write tables and figures.

    Example: wd-analyze compare base.safetensors ft/ lora/ --modules q,v
    """
    named = options.labelled(tuned or [], label or [])
    if not named:
        raise typer.BadParameter("give at least one tuned checkpoint", param_hint="TUNED…")
    kinds = options.figure_kinds(figures)
    kept_layers, kept_steps = options.layer_numbers(layers), options.step_numbers(steps)

    from wdanalysis.errors import WdAnalysisError
    from wdanalysis.results.folder import check_free

    if device == "cuda":
        raise WdAnalysisError("this version measures on the CPU only; leave out --device cuda.")

    check_free(out, force=force)

    from wdanalysis import comparison
    from wdanalysis.report import NEEDS, is_available

    with console.progress_bars(quiet=quiet or as_json) as (progress, spectra_progress):
        try:
            measured = comparison.compare(
                base,
                named,
                axis=axis,
                modules=modules,
                layers=kept_layers,
                steps=kept_steps,
                alpha=alpha,
                diagnostics=diagnostics,
                spectra=spectra,
                vectors=vectors,
                progress=progress,
                spectra_progress=spectra_progress,
            )
        except comparison.Interrupted as interrupted:
            partial = _with_command(interrupted.comparison)
            if partial.metrics.empty:
                raise
            partial.save(out, figures=[], force=force, report=False)
            raise WdAnalysisError(
                f"interrupted; the {len(partial.metrics)} rows measured so far are in {out} "
                '(its run.json says "complete": false).'
            ) from None
    compared = _with_command(measured)
    written = compared.save(out, figures=kinds, format=format, force=force, report=report)
    if as_json:
        console.lines(json.dumps(_as_json(compared, out, written), ensure_ascii=False))
    elif not quiet:
        console.warn(compared.warnings)
        if report and not is_available():
            console.warn([f"no report.html was written: {NEEDS}"])
        _print(compared, out, written)


def _with_command(compared: Comparison) -> Comparison:
    """Note the line that was typed, where it was this command's."""
    if Path(sys.argv[0]).stem not in {"wd-analyze", "cli"}:
        return compared
    return dataclasses.replace(compared, run=dataclasses.replace(compared.run, command=tuple(sys.argv)))


def _print(compared: Comparison, out: Path, written: list[Path]) -> None:
    console.summary_table(compared.summary())
    feature = "output" if compared.axis == "out" else "input"
    console.lines(
        f"Axis {compared.axis}: one vector per {feature} feature. ΔM, ΔD: means over the layers at the last step. "
        "r, slope: ΔM on ΔD over all layers and steps."
    )
    console.readings(compared.readings())
    if skipped := Counter(compared.skipped["reason"]):
        reasons = "; ".join(f"{count} × {reason}" for reason, count in skipped.most_common())
        console.lines(f"Left out: {skipped.total()} ({reasons}); run.json names each.")
    figures = sum(path.parent != out for path in written)
    tables = ", ".join(path.name for path in written if path.parent == out)
    console.lines(f"Wrote {out}/: {tables}" + (f", {figures} figures in figures/" if figures else ""))


def _as_json(compared: Comparison, out: Path, written: list[Path]) -> dict[str, object]:
    return {
        "out": str(out),
        "axis": compared.axis,
        "rows": len(compared.metrics),
        "summary": [_null_where_empty(row) for row in compared.summary().to_dict("records")],
        "readings": compared.readings().to_dict("records"),
        "diagnostics": [_null_where_empty(row) for row in compared.diagnostics().to_dict("records")],
        "skipped": compared.run.to_json()["skipped"],
        "warnings": compared.warnings,
        "files": [str(path) for path in written],
    }


def _null_where_empty(row: dict[Hashable, Any]) -> dict[str, Any]:
    """A row of a table with null where a cell is empty; numbers keep all their digits."""
    import pandas as pd

    return {str(key): None if pd.isna(value) else value for key, value in row.items()}

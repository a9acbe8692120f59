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
from wdanalysis.figures.kinds import PAPER_X, PAPER_Y, QUANTITIES

if TYPE_CHECKING:
    from wdanalysis.comparison import Comparison

DEFAULT_OUT = Path("wd-analysis")


def compare(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The pre-trained model: a file or folder.")],
    tuned: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TUNED…",
            help="Tuned checkpoints: a file, a folder with one checkpoint or adapter, a folder of steps, or one of "
            "runs (seed-0, seed-1 …) each.",
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="Name the method of a TUNED path; otherwise its folder's name. Repeatable: paths of one name "
            "are its steps, or its runs (seeds) where they hold the same steps.",
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
    dora_axis: options.DoraAxis = None,
    applied_as: options.AppliedAs = None,
    lr: Annotated[
        float | None,
        typer.Option(
            callback=options.positive,
            help="Peak learning rate of the runs, for predictions.",
            show_default="from the files beside the checkpoints",
        ),
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(min=0, help="Their weight decay.", show_default="from those files; else 0"),
    ] = None,
    schedule: Annotated[
        Literal["linear", "cosine", "constant"] | None,
        typer.Option(help="With --lr: how the learning rate falls.", show_default="linear"),
    ] = None,
    schedule_steps: Annotated[
        int | None, typer.Option(min=1, help="With --lr: steps of a whole run.", show_default="needed")
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, help="With --lr: steps of warmup among them.")] = 0,
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
    geometry: Annotated[
        bool,
        typer.Option(
            "--geometry",
            help="Also take sparsity, spectral shift, principal angles, overlaps and tails. Slower still.",
        ),
    ] = False,
    geometry_with: options.GeometryText = None,
    merge_stacks: options.MergeStacks = False,
    vectors: Annotated[
        bool, typer.Option("--vectors", help="Also keep what each single vector did: vectors.parquet.")
    ] = False,
    figures: options.Figures = "all",
    format: Annotated[options.Format, typer.Option(help="How figures are stored.")] = "png",
    x: options.X = PAPER_X,
    y: options.Y = PAPER_Y,
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
    for name, column in (("--x", x), ("--y", y)):
        if QUANTITIES[column].diagnostic and not diagnostics:
            raise typer.BadParameter(f"{column} is not measured without diagnostics", param_hint=name)
    geometry_chosen = options.geometry(geometry_with) if geometry_with else geometry
    kept_layers, kept_steps = options.layer_numbers(layers), options.step_numbers(steps)
    if lr is None and (schedule or schedule_steps or warmup):
        raise typer.BadParameter("a schedule needs its peak: give --lr", param_hint="--schedule")
    if lr is not None and schedule_steps is None:
        raise typer.BadParameter("give the steps of a whole run: --schedule-steps", param_hint="--lr")

    from wdanalysis.errors import WdAnalysisError
    from wdanalysis.results.folder import check_free

    if device == "cuda":
        raise WdAnalysisError("this version measures on the CPU only; leave out --device cuda.")

    check_free(out, force=force)

    from wdanalysis import Schedule, comparison
    from wdanalysis.report import NEEDS, is_available

    given = None
    if lr is not None and schedule_steps is not None:
        given = Schedule.named(
            schedule or "linear", lr, steps=schedule_steps, warmup=warmup, weight_decay=weight_decay or 0.0
        )
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
                dora_axis=dora_axis,
                applied_as=applied_as,
                schedule=given,
                weight_decay=weight_decay,
                diagnostics=diagnostics,
                spectra=spectra,
                geometry=geometry_chosen,
                merge_stacks=merge_stacks,
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
    written = compared.save(out, figures=kinds, format=format, force=force, report=report, x=x, y=y)
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
        "r, slope: ΔM on ΔD over all layers and steps, with the 95 % interval that the layers give; "
        "layers: how ΔM goes with ΔD across them at the same step."
    )
    across = compared.across_runs()
    for method, runs in across[across["run"] != ""].groupby("method", sort=False)["run"].unique().items():
        console.lines(f"{method}: means over {len(runs)} runs ({', '.join(runs)}); runs.csv has each.")
    console.readings(compared.readings())
    if skipped := Counter(compared.skipped["reason"]):
        reasons = "; ".join(f"{count} × {reason}" for reason, count in skipped.most_common())
        console.lines(f"Left out: {skipped.total()} ({reasons}); run.json names each.")
    figures = sum(path.parent != out for path in written)
    tables = ", ".join(path.name for path in written if path.parent == out)
    console.lines(f"Wrote {out}/: {tables}" + (f", {figures} figures in figures/" if figures else ""))


def _as_json(compared: Comparison, out: Path, written: list[Path]) -> dict[str, object]:
    across = compared.across_runs()
    return {
        "out": str(out),
        "axis": compared.axis,
        "rows": len(compared.metrics),
        "summary": [_null_where_empty(row) for row in compared.summary().to_dict("records")],
        "readings": compared.readings().to_dict("records"),
        **({"runs": [_null_where_empty(row) for row in across.to_dict("records")]} if len(across) else {}),
        "diagnostics": [_null_where_empty(row) for row in compared.diagnostics().to_dict("records")],
        "skipped": compared.run.to_json()["skipped"],
        "warnings": compared.warnings,
        "files": [str(path) for path in written],
    }


def _null_where_empty(row: dict[Hashable, Any]) -> dict[str, Any]:
    """A row of a table with null where a cell is empty; numbers keep all their digits."""
    import pandas as pd

    return {str(key): None if pd.isna(value) else value for key, value in row.items()}

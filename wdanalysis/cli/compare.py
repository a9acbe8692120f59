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
from wdanalysis.cli.figure_options import FigureChoice, with_figure_options
from wdanalysis.cli.options import NUMBERS, OUTPUT, PREDICTIONS, SUBJECT
from wdanalysis.decomposition import Axis
from wdanalysis.figures.kinds import KINDS, QUANTITIES

if TYPE_CHECKING:
    from wdanalysis.checkpoints.schedules import Schedule
    from wdanalysis.comparison import Comparison

DEFAULT_OUT = Path("wd-analysis")


@with_figure_options
def compare(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE", help="The pre-trained model: a file or folder.", rich_help_panel=SUBJECT
        ),
    ],
    tuned: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TUNED…",
            help="Tuned checkpoints: a file, a folder with one checkpoint or adapter, a folder of steps, or one of "
            "runs (seed-0, seed-1 …) each.",
            rich_help_panel=SUBJECT,
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="Name the method of a TUNED path; else its folder's name. Repeatable: paths of one name "
            "are its steps, or its runs (seeds) where they hold the same steps.",
            rich_help_panel=SUBJECT,
        ),
    ] = None,
    modules: Annotated[
        str | None,
        typer.Option(
            metavar="ROLES",
            help="Such as q,v; all; or a regular expression on names.",
            show_default="attention that changed",
            autocompletion=options.complete_roles,
            rich_help_panel=SUBJECT,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(metavar="0-11,20", help="Layers to keep.", show_default="all", rich_help_panel=SUBJECT),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="500,1000", help="Training steps to keep.", show_default="all", rich_help_panel=SUBJECT
        ),
    ] = None,
    merge_stacks: Annotated[bool, options.merge_stacks(SUBJECT)] = False,
    alpha: Annotated[float | None, options.alpha(SUBJECT)] = None,
    axis: Annotated[
        Axis,
        typer.Option(
            help="A vector is an output feature (as in the paper's code and PEFT), or an input feature.",
            rich_help_panel=NUMBERS,
        ),
    ] = "out",
    diagnostics: Annotated[
        bool,
        typer.Option(
            "--diagnostics/--no-diagnostics",
            help="Uniform shrink, rounding floors, spread over the vectors.",
            rich_help_panel=NUMBERS,
        ),
    ] = True,
    vectors: Annotated[
        bool,
        typer.Option(
            "--vectors", help="Keep what each vector did: vectors.parquet.", rich_help_panel=NUMBERS
        ),
    ] = False,
    spectra: Annotated[
        bool,
        typer.Option(
            "--spectra",
            help="Singular values: ranks, intruder dimensions, similarity. Slow.",
            rich_help_panel=NUMBERS,
        ),
    ] = False,
    geometry: Annotated[
        bool,
        typer.Option(
            "--geometry",
            help="Sparsity, spectral shift, principal angles, overlaps, tails. Slower still.",
            rich_help_panel=NUMBERS,
        ),
    ] = False,
    geometry_with: options.GeometryText = None,
    lr: Annotated[
        float | None,
        typer.Option(
            callback=options.positive,
            metavar="RATE",
            help="Peak learning rate of the runs.",
            show_default="from files beside the checkpoints",
            rich_help_panel=PREDICTIONS,
        ),
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="DECAY",
            help="Where those files do not tell it.",
            show_default="0",
            rich_help_panel=PREDICTIONS,
        ),
    ] = None,
    schedule: Annotated[
        Literal["linear", "cosine", "constant"] | None,
        typer.Option(help="With --lr: how it falls.", show_default="linear", rich_help_panel=PREDICTIONS),
    ] = None,
    schedule_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="With --lr, and needed: steps of a whole run.",
            rich_help_panel=PREDICTIONS,
        ),
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="With --lr: steps of warmup among them.",
            show_default="0",
            rich_help_panel=PREDICTIONS,
        ),
    ] = None,
    *,
    drawn: FigureChoice,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the results.", rich_help_panel=OUTPUT)
    ] = DEFAULT_OUT,
    report: Annotated[
        bool,
        typer.Option(
            "--report/--no-report", help="Write report.html, a page with everything.", rich_help_panel=OUTPUT
        ),
    ] = True,
    force: Annotated[
        bool, typer.Option("--force", help="Replace results that are in DIR.", rich_help_panel=OUTPUT)
    ] = False,
    quiet: Annotated[bool, options.quiet(OUTPUT)] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of text.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Measure ΔM and ΔD of tuned checkpoints against their base; write tables and figures.

    Example: wd-analyze compare base.safetensors ft/ lora/ --modules q,v
    """
    named = options.labelled(tuned or [], label or [])
    if not named:
        raise typer.BadParameter("give at least one tuned checkpoint", param_hint="TUNED…")
    kept_layers, kept_steps = options.layer_numbers(layers), options.step_numbers(steps)
    _check_figures(drawn, kept_steps, diagnostics=diagnostics, vectors=vectors)
    geometry_chosen = options.geometry(geometry_with) if geometry_with else geometry
    given = _schedule(lr, schedule, schedule_steps, warmup, weight_decay or 0.0)

    from wdanalysis.results.folder import check_free, state

    check_free(out, force=force)

    from wdanalysis import comparison
    from wdanalysis.report import NEEDS, is_available

    with console.progress_bars(quiet=quiet or as_json) as progress:
        try:
            measured = comparison.compare(
                base,
                named,
                axis=axis,
                modules=modules,
                layers=kept_layers,
                steps=kept_steps,
                alpha=alpha,
                schedule=given,
                weight_decay=weight_decay if given is None else None,
                diagnostics=diagnostics,
                spectra=spectra,
                geometry=geometry_chosen,
                merge_stacks=merge_stacks,
                vectors=vectors,
                progress=progress,
            )
        except comparison.Interrupted as interrupted:
            partial = _with_command(interrupted.comparison)
            if partial.metrics.empty:
                raise
            partial.save(out, figures=[], force=force, report=False)
            raise console.CutShortError(
                f"interrupted; the {len(partial.metrics)} rows measured so far are in {out} "
                '(its run.json says "complete": false).'
            ) from None
        compared = _with_command(measured)
        try:
            written = compared.save(
                out, figures=drawn.kinds, look=drawn.look, force=force, report=report, progress=progress
            )
        except KeyboardInterrupt:
            raise console.CutShortError(f"interrupted; {state(out)}.") from None
    if as_json:
        console.lines(json.dumps(_as_json(compared, out, written), ensure_ascii=False))
    elif not quiet:
        console.warn(compared.warnings)
        if report and not is_available():
            console.warn([f"no report.html was written: {NEEDS}"])
        _print(compared, out, written)


def _check_figures(
    drawn: FigureChoice, kept_steps: list[int] | None, *, diagnostics: bool, vectors: bool
) -> None:
    """Refuse figures of what is not going to be measured."""
    of_vectors = [kind for kind in drawn.kinds or () if KINDS[kind].table == "vectors"]
    if of_vectors and not vectors and set(drawn.kinds or ()) < set(KINDS):
        raise typer.BadParameter(
            f"{of_vectors[0]} shows single vectors: add --vectors", param_hint="--figures"
        )
    if drawn.look is None:
        return
    for name, column in (("--x", drawn.look.x), ("--y", drawn.look.y)):
        if QUANTITIES[column].diagnostic and not diagnostics:
            raise typer.BadParameter(f"{column} is not measured without diagnostics", param_hint=name)
    step = drawn.look.step
    if kept_steps is not None and step is not None and step not in kept_steps:
        raise typer.BadParameter(f"{step} is not among the --steps to keep", param_hint="--step")


def _schedule(
    lr: float | None, shape: str | None, steps: int | None, warmup: int | None, weight_decay: float
) -> Schedule | None:
    """The schedule that the options describe; half a one is wrong usage."""
    if lr is None:
        for name, value in (("--schedule", shape), ("--schedule-steps", steps), ("--warmup", warmup)):
            if value is not None:
                raise typer.BadParameter("a schedule needs its peak: give --lr", param_hint=name)
        return None
    if steps is None:
        raise typer.BadParameter("give the steps of a whole run: --schedule-steps", param_hint="--lr")

    from wdanalysis import Schedule

    return Schedule.named(shape or "linear", lr, steps=steps, warmup=warmup or 0, weight_decay=weight_decay)


def _with_command(compared: Comparison) -> Comparison:
    """Note the line that was typed, where it was this command's."""
    started = Path(sys.argv[0])
    is_module = started.name == "__main__.py" and started.parent.name in {"wdanalysis", "cli"}
    if not (is_module or started.stem in {"wd-analyze", "cli"}):
        return compared
    return dataclasses.replace(compared, run=dataclasses.replace(compared.run, command=tuple(sys.argv)))


def _print(compared: Comparison, out: Path, written: list[Path]) -> None:
    console.summary_table(compared.summary())
    feature = "output" if compared.axis == "out" else "input"
    console.paragraph(
        f"Axis {compared.axis}: one vector per {feature} feature. ΔM, ΔD: means over the layers at the last step. "
        "r, slope: ΔM on ΔD over all layers and steps, with the 95 % interval that the layers give; "
        "layers: how ΔM goes with ΔD across them at the same step."
    )
    across = compared.across_runs()
    for method, runs in across[across["run"] != ""].groupby("method", sort=False)["run"].unique().items():
        console.paragraph(f"{method}: means over {len(runs)} runs ({', '.join(runs)}); runs.csv has each.")
    console.readings(compared.readings())
    if skipped := Counter(compared.skipped["reason"]):
        reasons = "; ".join(f"{count} × {reason}" for reason, count in skipped.most_common())
        console.paragraph(f"Left out: {skipped.total()} ({reasons}); run.json names each.")
    pictures = [path for path in written if path.parent != out and path.suffix != ".md"]
    tables = ", ".join(path.name for path in written if path.parent == out)
    figures = f", {len(pictures)} figures in figures/" if pictures else ""
    console.paragraph(f"Wrote {out}/: {tables}{figures}")
    pages = [path for path in written if path.suffix == ".html"]
    if to_open := [*pages, *pictures]:
        console.lines(f"Open {to_open[0]}")


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

"""`wd-analyze train`: the checkpoints that `compare` compares."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wdanalysis.cli import console, options
from wdanalysis.errors import TrainingError, WdAnalysisError

if TYPE_CHECKING:
    from wdanalysis.training.injection import ParameterCount
    from wdanalysis.training.run.loop import MethodRun
    from wdanalysis.training.run.plan import TrainingPlan
    from wdanalysis.training.run.recipes import Recipe
    from wdanalysis.training.run.trainer import Progress

DEFAULT_OUT = Path("wd-training")
NEEDED = ("transformers", "accelerate")


class Scheduler(StrEnum):
    """How the learning rate falls."""

    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"
    CONSTANT_WITH_WARMUP = "constant_with_warmup"


class DType(StrEnum):
    """Of the base weights in memory."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Quantization(StrEnum):
    """Of the base of an adapter."""

    FOUR_BITS = "4bit"


WHAT, ADAPTERS, OPTIMIZATION, OUTPUT = (
    "What to train, and on what",
    "Adapters",
    "Optimization",
    "Run and output",
)


def train(
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Of ft,lora,dora,vera,dvora; several see the same batches in the same order.",
            show_default="dora, or the recipe's",
            rich_help_panel=WHAT,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|HUB-ID",
            help="A causal language model. --dry-run takes a config.json as well.",
            show_default="the bundled base",
            rich_help_panel=WHAT,
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="Text, or JSON with text or instruction, input, output (loss on the answer only); a file or a folder. "
            "May be repeated.",
            show_default="documentation in Python's library",
            rich_help_panel=WHAT,
        ),
    ] = None,
    eval_data: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="Held-out data. May be repeated.", rich_help_panel=WHAT),
    ] = None,
    eval_fraction: Annotated[
        float | None,
        typer.Option(
            min=0, max=0.999, help="Share of --data to hold out.", show_default="0.05", rich_help_panel=WHAT
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a block or record.", show_default="256", rich_help_panel=WHAT),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Settings of the paper (Tables 8 to 11); options override them.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    list_recipes: Annotated[
        bool, typer.Option("--list-recipes", help="Print every recipe and exit.", rich_help_panel=WHAT)
    ] = False,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="r.", show_default="8; VeRA, DVoRA 256", rich_help_panel=ADAPTERS),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(callback=options.positive, help="α.", show_default="2 r", rich_help_panel=ADAPTERS),
    ] = None,
    dropout: Annotated[
        float | None,
        typer.Option(min=0, max=0.999, help="Before A.", show_default="0", rich_help_panel=ADAPTERS),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            metavar="q,v | all | REGEX", help="What is adapted.", show_default="q,v", rich_help_panel=ADAPTERS
        ),
    ] = None,
    magnitude_targets: Annotated[
        str | None,
        typer.Option(
            metavar="ROLES|REGEX",
            help="Where DoRA trains m (paper, section 5.6).",
            show_default="as --targets",
            rich_help_panel=ADAPTERS,
        ),
    ] = None,
    axis: Annotated[
        options.AxisChoice | None,
        typer.Option(
            help="m for each output or each input feature.", show_default="out", rich_help_panel=ADAPTERS
        ),
    ] = None,
    full_gradient: Annotated[
        bool,
        typer.Option("--full-gradient", help="Gradient through the norm (Eq. 6).", rich_help_panel=ADAPTERS),
    ] = False,
    quantize: Annotated[
        Quantization | None,
        typer.Option(help="Base of an adapter in 4 bits (QLoRA).", rich_help_panel=ADAPTERS),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            callback=options.positive,
            help="Peak learning rate.",
            show_default="ft 2e-5; lora, dora 2e-4; vera, dvora 4e-3",
            rich_help_panel=OPTIMIZATION,
        ),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(min=0, help="AdamW's.", show_default="0", rich_help_panel=OPTIMIZATION)
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Examples on a device.", show_default="8", rich_help_panel=OPTIMIZATION),
    ] = None,
    accumulation: Annotated[
        int | None,
        typer.Option(min=1, help="Batches in a step.", show_default="1", rich_help_panel=OPTIMIZATION),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Instead of --epochs.", rich_help_panel=OPTIMIZATION)
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            callback=options.positive,
            help="Passes over the data.",
            show_default="3; bundled data: 200 steps",
            rich_help_panel=OPTIMIZATION,
        ),
    ] = None,
    warmup: Annotated[
        float | None,
        typer.Option(
            min=0, help="Steps; below 1, a share of all.", show_default="0", rich_help_panel=OPTIMIZATION
        ),
    ] = None,
    scheduler: Annotated[
        Scheduler | None,
        typer.Option(help="After the warmup.", show_default="linear", rich_help_panel=OPTIMIZATION),
    ] = None,
    dtype: Annotated[
        DType | None,
        typer.Option(
            help="Of the base in memory.",
            show_default="auto: ft float32, adapters as stored; float32 on a CPU",
            rich_help_panel=OPTIMIZATION,
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=OPTIMIZATION
        ),
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Of data order, held-out share, adapters, dropout.",
            show_default="0",
            rich_help_panel=OPTIMIZATION,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Gets a folder for each method.", rich_help_panel=OUTPUT)
    ] = DEFAULT_OUT,
    save_steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Steps between checkpoints.", show_default="four, evenly", rich_help_panel=OUTPUT
        ),
    ] = None,
    live: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Measure ΔM and ΔD every N steps, into DIR/METHOD/live.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option(metavar="LOGGER", help="tensorboard, wandb … May be repeated.", rich_help_panel=OUTPUT),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoints in DIR.", rich_help_panel=OUTPUT)
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Count trainable parameters without loading a weight.", rich_help_panel=OUTPUT
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object instead of the table.", rich_help_panel=OUTPUT),
    ] = False,
) -> None:
    """Tune a model by full tuning, LoRA, DoRA, VeRA or DVoRA, and keep checkpoints to compare.

    Several GPUs, FSDP and mixed precision: accelerate launch -m wdanalysis.cli train …

    Example: wd-analyze train --method ft,lora,dora --model base/ --data text/ --steps 400 --out runs/
    """
    if missing := [package for package in NEEDED if find_spec(package) is None]:
        raise TrainingError(f"training needs {missing[0]}: install it with `pip install wdanalysis[train]`.")
    if list_recipes:
        _print_recipes(as_json=as_json)
        return
    console.quieten_libraries()

    from wdanalysis.training.run.recipes import recipe as find_recipe

    chosen = None if recipe is None else find_recipe(recipe)
    given = {
        "methods": None if method is None else tuple(name.strip() for name in method.split(",")),
        "model": model,
        "data": None if data is None else tuple(data),
        "eval_data": None if eval_data is None else tuple(eval_data),
        "eval_fraction": eval_fraction,
        "max_length": max_length,
        "rank": rank,
        "alpha": alpha,
        "dropout": dropout,
        "targets": targets,
        "magnitude_targets": magnitude_targets,
        "axis": None if axis is None else axis.value,
        "full_gradient": full_gradient or None,
        "quantize": None if quantize is None else quantize.value,
        "learning_rate": lr,
        "weight_decay": weight_decay,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "steps": steps,
        "epochs": epochs,
        "warmup": warmup,
        "scheduler": None if scheduler is None else scheduler.value,
        "dtype": None if dtype is None else dtype.value,
        "gradient_checkpointing": gradient_checkpointing or None,
        "seed": seed,
        "save_steps": save_steps,
    }
    plan = _plan(chosen, {name: value for name, value in given.items() if value is not None})
    if dry_run:
        _dry_run(plan, chosen, as_json=as_json)
        return
    if chosen and not (plan.model and plan.data):
        raise TrainingError(
            f"the recipe {chosen.name} is for {chosen.model} and {chosen.data}: "
            "say where they are with --model and --data."
        )
    _train(plan, out, resume=resume, live=live, report_to=report_to or [], quiet=quiet, as_json=as_json)


def _plan(recipe: Recipe | None, given: Mapping[str, Any]) -> TrainingPlan:
    from wdanalysis.training.run.plan import BUNDLED_STEPS, TrainingPlan, recipe_settings

    if "steps" in given and "epochs" in given:
        raise typer.BadParameter("give --steps or --epochs, not both", param_hint="--steps")
    default: dict[str, Any] = {} if "data" in given or "epochs" in given else {"steps": BUNDLED_STEPS}
    return TrainingPlan(**{**(default if recipe is None else recipe_settings(recipe)), **given})


def _dry_run(plan: TrainingPlan, recipe: Recipe | None, *, as_json: bool) -> None:
    from wdanalysis.training.run.loop import count_methods, sentence_of

    counts = count_methods(
        plan if recipe is None or plan.model else dataclasses.replace(plan, model=recipe.model)
    )
    if as_json:
        _print_json([_as_json(method, counted) for method, counted in counts.items()])
        return
    for method, counted in counts.items():
        console.lines(sentence_of(method, counted))


def _train(
    plan: TrainingPlan,
    out: Path,
    *,
    resume: bool,
    live: int | None,
    report_to: Sequence[str],
    quiet: bool,
    as_json: bool,
) -> None:
    main = os.environ.get("RANK", "0") == "0"  # accelerate starts one process for each device
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]

    from wdanalysis.training.run import loop

    def say(sentence: str) -> None:
        (sys.stderr if as_json else sys.stdout).write(f"{sentence}\n")

    with _step_progress(shown=main and not quiet) as progress:
        try:
            runs = loop.train(
                plan,
                out,
                resume=resume,
                live_every=live,
                report_to=report_to,
                progress=progress,
                say=None if quiet else say,
            )
        except loop.TrainingInterrupted as interrupted:
            raise WdAnalysisError(str(interrupted)) from None
    if not main:
        return
    if as_json:
        _print_json([_run_as_json(run) for run in runs], out=str(out))
    elif not quiet:
        _print(plan, runs, out)


def _print(plan: TrainingPlan, runs: Sequence[MethodRun], out: Path) -> None:
    headings = [("method", "left"), ("steps", "right"), ("loss", "right"), ("held-out before", "right"),
                ("after", "right"), ("checkpoints", "left")]  # fmt: skip
    rows = []
    for run in runs:
        held_out = run.losses["held_out_loss"].dropna()
        loss = run.losses["loss"].dropna()
        rows.append(
            (
                run.method,
                str(run.losses["step"].max()),
                console.number(loss.iloc[-1], 4),
                console.number(held_out.iloc[0] if len(held_out) else None, 4),
                console.number(held_out.iloc[-1] if len(held_out) else None, 4),
                ", ".join(path.name.rpartition("-")[2] for path in run.checkpoints),
            )
        )
    console.table(headings, rows)
    base = plan.model or _bundled()
    console.lines(
        f"Losses in nats a token: {out}/losses.png and losses.csv in each folder.",
        f"Compare: wd-analyze compare {base} {' '.join(str(run.folder) for run in runs)}",
    )


def _bundled() -> Path:
    from wdanalysis.training.bundled import bundled_model_folder

    return bundled_model_folder()


def _as_json(method: str, counted: ParameterCount) -> dict[str, Any]:
    return {
        "method": method,
        "trainable": counted.trainable,
        "total": counted.total,
        "percent": counted.percent,
    }


def _run_as_json(run: MethodRun) -> dict[str, Any]:
    return {
        **_as_json(run.method, run.parameters),
        "folder": str(run.folder),
        "checkpoints": [str(path) for path in run.checkpoints],
        "losses": json.loads(run.losses.to_json(orient="records")),
    }


def _print_json(methods: list[dict[str, Any]], **more: Any) -> None:
    """One method's object itself, or the list of several under ``methods``."""
    found = {**more, **methods[0]} if len(methods) == 1 else {**more, "methods": methods}
    console.lines(json.dumps(found, ensure_ascii=False))


def _print_recipes(*, as_json: bool) -> None:
    from wdanalysis.training.run.recipes import RECIPES

    if as_json:
        console.lines(
            json.dumps([dataclasses.asdict(recipe) for recipe in RECIPES.values()], ensure_ascii=False)
        )
        return
    console.lines("\n\n".join(recipe.describe() for recipe in RECIPES.values()))


@contextmanager
def _step_progress(*, shown: bool) -> Iterator[Progress | None]:
    """Show method, step, loss and time left on standard error, where that is a terminal."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(method: str, step: int, last: int, loss: float | None) -> None:
            if method not in tasks:
                tasks[method] = bar.add_task(method, total=last, loss="–")
            bar.update(tasks[method], completed=step, loss="–" if loss is None else f"{loss:.3f}")

        yield show

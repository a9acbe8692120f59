"""`wd-analyze train`: the checkpoints that `compare` compares."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wdanalysis.cli import console
from wdanalysis.cli.options import option_name, several_of
from wdanalysis.cli.plan_options import given_settings, with_plan_options
from wdanalysis.errors import TrainingError
from wdanalysis.training.bundled import bundled_model_folder
from wdanalysis.training.methods import METHODS
from wdanalysis.training.run.plan import ADAPTERS, BUNDLED_STEPS, INPUTS, OUTPUT, TrainingPlan, plan_fields

if TYPE_CHECKING:
    from wdanalysis.training.injection import ParameterCount
    from wdanalysis.training.run.loop import MethodRun
    from wdanalysis.training.run.recipes import Recipe

DEFAULT_OUT = Path("wd-training")
NEEDED = ("transformers", "accelerate")

OF_MAGNITUDE = ("axis", "magnitude_targets", "full_gradient")
"""Settings of methods that train m."""


def _recipes() -> Iterable[str]:
    from wdanalysis.training.run.recipes import RECIPES

    return RECIPES


@with_plan_options
def train(
    *,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Settings of the paper (Tables 8 to 11); options override them.",
            autocompletion=several_of(_recipes, separator=None),
            rich_help_panel=INPUTS,
        ),
    ] = None,
    list_recipes: Annotated[
        bool, typer.Option("--list-recipes", help="Print every recipe and exit.", rich_help_panel=INPUTS)
    ] = False,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Gets a folder for each method.", rich_help_panel=OUTPUT)
    ] = DEFAULT_OUT,
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
    **given: Any,
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

    chosen, settings = None if recipe is None else find_recipe(recipe), given_settings(given)
    plan = _plan(chosen, settings)
    for name in settings:
        if objection := _objection(name, plan, is_watched=live is not None):
            raise typer.BadParameter(objection, param_hint=option_name(name))
    if dry_run:
        _dry_run(plan, chosen, as_json=as_json)
        return
    if chosen and not (plan.model and plan.data):
        raise TrainingError(
            f"the recipe {chosen.name} is for {chosen.model} and {chosen.data}: say where they are.",
            parameter="data" if plan.model else "model",
        )
    _train(plan, out, resume=resume, live=live, report_to=report_to or [], quiet=quiet, as_json=as_json)


def _plan(recipe: Recipe | None, given: Mapping[str, Any]) -> TrainingPlan:
    if "steps" in given and "epochs" in given:
        raise typer.BadParameter("give --steps or --epochs, not both", param_hint="--steps")
    default: dict[str, Any] = {} if "data" in given or "epochs" in given else {"steps": BUNDLED_STEPS}
    return TrainingPlan(**{**(default if recipe is None else recipe.settings()), **given})


def _objection(name: str, plan: TrainingPlan, *, is_watched: bool) -> str | None:
    """Why a setting means nothing beside the others; None where it means something.

    The axis is that of m, and of what is measured while a model is trained.
    """
    methods, named = [METHODS[method] for method in plan.methods], ", ".join(plan.methods)
    if name == "axis" and is_watched:
        return None
    if plan_fields()[name].setting.panel == ADAPTERS and not any(method.update for method in methods):
        return f"{named}: no adapter is trained"
    if name in OF_MAGNITUDE and not any(method.magnitude for method in methods):
        return f"{named}: no magnitude is trained; dora and dvora train one"
    if name == "alpha" and not any(method.update == "lora" for method in methods):
        return f"{named}: there is no α"
    if name == "eval_fraction" and plan.eval_data:
        return "the data of --eval-data is held out, and no share of --data"
    if name == "eval_fraction" and not plan.data and plan.eval_fraction:
        return "what is held out of the bundled text is fixed: give --data, or 0 to hold out nothing"
    if name == "warmup" and plan.warmup and plan.scheduler == "constant":
        return "with --scheduler constant there is none: constant_with_warmup has one"
    return None


def _dry_run(plan: TrainingPlan, recipe: Recipe | None, *, as_json: bool) -> None:
    from wdanalysis.training.run.model import count_methods, sentence_of

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

    from wdanalysis.training.run import loop

    loop.quieten_transformers()

    def say(sentence: str) -> None:
        (sys.stderr if as_json else sys.stdout).write(f"{sentence}\n")

    with console.training_bars(quiet=quiet or not main) as progress:
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
            raise console.CutShortError(str(interrupted), parameter="resume") from None
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
    base = plan.model or bundled_model_folder()
    console.lines(
        f"Losses in nats a token: {out}/losses.png and losses.csv in each folder.",
        f"Compare: wd-analyze compare {base} {' '.join(str(run.folder) for run in runs)}",
    )


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

"""`wd-analyze verify`: whether an adapter is merged into a model, all of it and once."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wdanalysis.cli import console, options
from wdanalysis.decomposition import Axis

if TYPE_CHECKING:
    from wdanalysis.questions.verify import Verification

SHOWN = 40
"""So many modules that are not as they should be are listed; --json has all."""


def verify(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The model that the adapter was trained on.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The adapter.")],
    merged: Annotated[
        Path, typer.Argument(metavar="MERGED", help="The model that it is said to be merged into.")
    ],
    alpha: Annotated[float | None, options.alpha()] = None,
    dora_axis: Annotated[Axis | None, options.dora_axis()] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    quiet: Annotated[bool, options.quiet()] = False,
) -> None:
    """Check that an adapter is in a merged model: all of it, once, at its scale, on its axis, with its magnitudes.

    Exits with 1 where it is not.

    Example: wd-analyze verify base/ dora/checkpoint-500/ merged/
    """
    console.quieten_libraries()

    from wdanalysis.questions.verify import verify as verify_checkpoints

    with console.progress_bars(quiet=quiet or as_json) as tell:
        progress = None if tell is None else functools.partial(tell, "checking")
        found = verify_checkpoints(base, adapter, merged, alpha=alpha, dora_axis=dora_axis, progress=progress)
    if as_json:
        console.lines(json.dumps(found.as_json(), ensure_ascii=False))
    elif not quiet:
        _print(found)
    if not found.holds:
        raise typer.Exit(1)


def _print(found: Verification) -> None:
    from wdanalysis.questions.verify import MERGED

    for sentence in found.sentences():
        console.paragraph(sentence)
    wrong = found.modules[found.modules["status"] != MERGED]
    if len(wrong):
        console.table(
            [("module", "left"), ("share of the update", "right"), ("scale", "right"), ("found", "right"),
             ("dtype", "left"), ("status", "left")],
            [
                (
                    row["module"],
                    console.number(row["share"]),
                    console.number(row["scale"]),
                    console.number(row["found_scale"]),
                    row["dtype"],
                    row["status"],
                )
                for row in wrong.head(SHOWN).to_dict("records")
            ],
        )  # fmt: skip
    if len(wrong) > SHOWN:
        console.paragraph(f"… and {len(wrong) - SHOWN} more.")
    console.warn(found.notes)

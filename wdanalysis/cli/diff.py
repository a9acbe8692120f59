"""`wd-analyze diff`: what one checkpoint is to another."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from wdanalysis.cli import console, options

if TYPE_CHECKING:
    from wdanalysis.questions.diff import Difference

ANSWERS = {
    "identical": "B is identical to A.",
    "incomplete": "What both have is identical.",
    "cast": "B is A in another dtype.",
    "quantised": "One of the two is quantised.",
    "tuned": "B is A, tuned.",
    "continued": "B goes on from A.",
    "unrelated": "B is unrelated to A.",
}
"""The first sentence, by verdict."""

SHOWN = 20
"""So many names are listed of what only one has."""


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A model, or an adapter.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another; also an adapter of A.")],
    axis: Annotated[
        Literal["out", "in"],
        typer.Option(help="ΔM and ΔD by output feature (row of a Linear) or input feature."),
    ] = "out",
    alpha: Annotated[float | None, options.alpha()] = None,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 1 where they are not identical.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    quiet: Annotated[bool, options.quiet()] = False,
) -> None:
    """Say what one checkpoint is to another: identical, cast, quantised, tuned, continued or unrelated, and why.

    Example: wd-analyze diff base/ tuned/ --exit-code
    """
    console.quieten_libraries()

    from wdanalysis.questions.diff import diff as diff_checkpoints

    with console.progress_bars(quiet=quiet or as_json) as tell:
        progress = None if tell is None else functools.partial(tell, "reading")
        found = diff_checkpoints(a, b, axis=axis, alpha=alpha, progress=progress)
    if as_json:
        console.lines(json.dumps(found.as_json(), ensure_ascii=False))
    elif not quiet:
        _print(found)
    if exit_code and found.verdict != "identical":
        raise typer.Exit(1)


def _print(found: Difference) -> None:
    console.heading(ANSWERS[found.verdict])
    for sentence in found.evidence:
        console.paragraph(sentence, "  ")
    if found.verdict != "identical" and len(found.tensors):
        console.table(
            [("module", "left"), ("tensors", "right"), ("identical", "right"), ("changed", "right"),
             ("‖ΔW‖/‖W₀‖", "right"), (f"ΔM ({found.axis})", "right"), (f"ΔD ({found.axis})", "right")],
            [
                (
                    row["module"],
                    str(row["tensors"]),
                    str(row["identical"]),
                    str(row["tensors"] - row["identical"]),
                    console.number(row["rel_update_norm"]),
                    console.number(row["delta_m"]),
                    console.number(row["delta_d"]),
                )
                for row in found.by_module().to_dict("records")
            ],
        )  # fmt: skip
    for side, names in (("A", found.only_a), ("B", found.only_b)):
        if len(names) > 3:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            console.paragraph(f"Only in {side}: {', '.join(names[:SHOWN])}{more}.")
    console.warn(found.notes)

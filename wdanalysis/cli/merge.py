"""`wd-analyze merge`: an adapter and its base as one model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Literal

import typer

from wdanalysis.cli import console, options


def merge(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The model that the adapter was trained on.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A LoRA, DoRA, VeRA or DVoRA adapter.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    dtype: Annotated[
        Literal["keep", "float32", "bfloat16", "float16"],
        typer.Option(help="How float tensors are stored; keep: as in BASE."),
    ] = "keep",
    alpha: Annotated[float | None, options.alpha()] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is in OUT.")] = False,
    quiet: Annotated[bool, options.quiet()] = False,
) -> None:
    """Merge an adapter into its base, tensor by tensor: a model in safetensors that needs no adapter.

    Example: wd-analyze merge base/ dora/checkpoint-500/ merged/ --dtype bfloat16
    """
    console.quieten_libraries()

    from wdanalysis.merging.merge import merge as merge_checkpoints

    with console.progress_bars(quiet=quiet) as tell:
        progress = None if tell is None else functools.partial(tell, "writing")
        merged = merge_checkpoints(
            base, adapter, out, dtype=dtype, force=force, alpha=alpha, progress=progress
        )
    if quiet:
        return
    console.warn(merged.notes)
    replaced = f", {merged.replaced} tensors replaced" if merged.replaced else ""
    console.paragraph(f"{merged.folder}: {merged.method} merged into {merged.matrices} matrices{replaced}")

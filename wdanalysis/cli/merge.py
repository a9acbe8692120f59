"""`wd-analyze merge`: an adapter and its base as one model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from wdanalysis.cli import console, options


class DTypeChoice(StrEnum):
    """How float tensors are stored."""

    KEEP = "keep"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def merge(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The model that the adapter was trained on.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A LoRA, DoRA, VeRA or DVoRA adapter.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    dtype: Annotated[
        DTypeChoice, typer.Option(help="How float tensors are stored; keep: as in BASE.")
    ] = DTypeChoice.KEEP,
    alpha: Annotated[
        float | None,
        typer.Option(
            callback=options.positive,
            help="LoRA's α, for an adapter file without its adapter_config.json.",
            show_default="from the config",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is in OUT.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Merge an adapter into its base, tensor by tensor: a model in safetensors that needs no adapter.

    Example: wd-analyze merge base/ dora/checkpoint-500/ merged/ --dtype bfloat16
    """
    console.quieten_libraries()

    from wdanalysis.merging.merge import merge as merge_checkpoints

    with console.progress_bars(quiet=quiet) as (progress, _):
        merged = merge_checkpoints(
            base, adapter, out, dtype=dtype.value, force=force, alpha=alpha, progress=progress
        )
    if quiet:
        return
    console.warn(merged.notes)
    replaced = f", {merged.replaced} tensors replaced" if merged.replaced else ""
    console.lines(f"{merged.folder}: {merged.method} merged into {merged.matrices} matrices{replaced}")

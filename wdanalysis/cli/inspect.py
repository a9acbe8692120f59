"""`wd-analyze inspect`: what a file or folder is, from headers alone; of an adapter also what its weights say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wdanalysis.cli import console, options
from wdanalysis.decomposition import Axis

if TYPE_CHECKING:
    from wdanalysis.checkpoints.inspection import CheckpointSummary, Inspection, ModuleCount
    from wdanalysis.questions.weights import AdapterWeights


LONGEST_SETTING = 100
"""Characters of an adapter's setting that go into the table."""

BLOCKS = 5
"""So many layers are named of those that carry an adapter."""


def inspect(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH…", help="Files or folders.")],
    weights: Annotated[
        bool,
        typer.Option(
            "--weights",
            help="Of adapters, without a base: size and singular values of every update, the rank that it needs, "
            "magnitudes, outliers, which layers carry it.",
        ),
    ] = False,
    figure: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --weights of one adapter: draw them by layer (.png, .pdf, .svg).",
            show_default=False,
        ),
    ] = None,
    alpha: Annotated[float | None, options.alpha()] = None,
    dora_axis: Annotated[Axis | None, options.dora_axis()] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list instead.")] = False,
) -> None:
    """Say what files and folders are: format, dtypes, matrices by role and layer, steps, adapter settings, size.

    Example: wd-analyze inspect lora/ --json
    """
    if figure is not None and (not weights or len(paths) > 1):
        raise typer.BadParameter("is drawn of the --weights of one adapter", param_hint="--figure")
    if weights:
        _weights(paths, alpha, dora_axis, figure, as_json=as_json)
    else:
        _headers(paths, alpha, dora_axis, as_json=as_json)


def _headers(paths: list[Path], alpha: float | None, dora_axis: Axis | None, *, as_json: bool) -> None:
    from wdanalysis.checkpoints.inspection import inspect as inspect_path

    inspections = [inspect_path(path, alpha=alpha, dora_axis=dora_axis) for path in paths]
    adapters = (checkpoint.adapter for found in inspections for checkpoint in found.checkpoints)
    if alpha is not None and all(adapter is None for adapter in adapters):
        raise typer.BadParameter("there is no adapter among these", param_hint="--alpha")
    if as_json:
        console.lines(
            json.dumps([dataclasses.asdict(found) for found in inspections], default=str, ensure_ascii=False)
        )
        return
    for place, found in enumerate(inspections):
        if place:
            console.lines("")
        _print(found)


def _weights(
    paths: list[Path], alpha: float | None, dora_axis: Axis | None, figure: Path | None, *, as_json: bool
) -> None:
    from wdanalysis.questions.weights import adapter_weights

    found = [adapter_weights(path, alpha=alpha, dora_axis=dora_axis) for path in paths]
    if figure is not None:
        from wdanalysis.figures import style

        style.save(found[0].figure(), figure)
    if as_json:
        console.lines(json.dumps([of.as_json() for of in found], ensure_ascii=False))
        return
    for place, of in enumerate(found):
        if place:
            console.lines("")
        _print_weights(of)


def _print_weights(found: AdapterWeights) -> None:
    table = found.last()
    steps = "" if table["step"].isna().all() else f", step {table['step'].iloc[0]}"
    console.lines(f"{found.path}: {found.method}{steps}, {_count(len(table), 'update')}")
    has_magnitudes = bool(table["m_mean"].notna().any())
    console.table(
        [("module", "left"), ("updates", "right"), ("‖s·BA‖", "right"), ("share", "right"), ("stable rank", "right"),
         ("rank for 90 / 95 / 99 %", "right"), ("of", "right"),
         *[("‖m‖ mean", "right"), ("spread", "right")] * has_magnitudes, ("outliers", "right")],
        [
            (
                row["module"],
                str(row["modules"]),
                console.number(row["norm"]),
                f"{100 * row['share']:.0f} %",
                console.number(row["stable_rank"]),
                " / ".join(console.number(row[f"rank_{energy}"], 12) for energy in (90, 95, 99)),
                str(row["rank"]),
                *[console.number(row["m_mean"]), console.number(row["m_spread"])] * has_magnitudes,
                str(row["outliers"]),
            )
            for row in found.by_module().to_dict("records")
        ],
    )  # fmt: skip
    layers = found.by_layer()
    if len(layers) > 1:
        most = ", ".join(
            f"{row['layer']} ({100 * row['share']:.0f} %)" for row in layers.head(BLOCKS).to_dict("records")
        )
        console.paragraph(f"Layers with the largest shares of the updates' squared norm: {most}.")
    for row in table[table["outlier"]].to_dict("records"):
        console.paragraph(
            f"{row['name']} stands out of its kind: ‖s·BA‖ {console.number(row['norm'])}, robust z "
            f"{console.signed(row['robust_z'], '+.1f')}.",
            "  ",
        )
    console.warn(found.notes)


def _print(found: Inspection) -> None:
    checkpoints = found.checkpoints
    console.lines(f"{found.path}: {found.name}, {_count(len(checkpoints), 'checkpoint')}")
    console.table(
        [("step", "right"), ("format", "left"), ("family", "left"), ("tensors", "right"), ("parameters", "right"),
         ("dtypes", "left"), ("size", "right")],
        [
            (
                console.number(checkpoint.step, 12),
                checkpoint.format,
                checkpoint.family,
                f"{checkpoint.tensors:,}",
                f"{checkpoint.parameters:,}",
                ", ".join(f"{dtype} × {count}" for dtype, count in checkpoint.dtypes.items()),
                _bytes(checkpoint.nbytes),
            )
            for checkpoint in checkpoints
        ],
    )  # fmt: skip
    last: CheckpointSummary = checkpoints[-1]
    console.table(
        [("module", "left"), ("matrices", "right"), ("layers", "left"), ("out × in", "left")],
        [
            (module.module, str(module.matrices), _ranges(module.layers), _shapes(module))
            for module in last.modules
        ],
    )
    if last.adapter is not None:
        console.table(
            [("adapter", "left"), ("", "left")],
            [(key, _shortened(value)) for key, value in last.adapter.items()],
        )
    console.warn(found.notes)


def _shapes(module: ModuleCount) -> str:
    shown = [f"{outputs} × {inputs}" for outputs, inputs in module.shapes[:3]]
    return ", ".join(shown) + (f" and {len(module.shapes) - 3} more" if len(module.shapes) > 3 else "")


def _ranges(layers: tuple[int, ...]) -> str:
    """Layers 0, 1, 2, 5 as ``0–2, 5``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs) or "–"


def _shortened(value: Any) -> str:
    """A setting on a line; of a long list or mapping its beginning and its length (`--json` has all of it)."""
    if isinstance(value, dict):
        value = [f"{key}: {of_key}" for key, of_key in value.items()]
    if not isinstance(value, list | tuple):
        return str(value)
    text = ", ".join(map(str, value))
    return text if len(text) <= LONGEST_SETTING else f"{value[0]} and {len(value) - 1} more"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _bytes(number: int) -> str:
    size = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"

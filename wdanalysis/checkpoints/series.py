"""A method's checkpoints by step: which entries of a folder belong to them, and which do not and why."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from wdanalysis.checkpoints.folders import (
    WEIGHTS_NAMES,
    holds_checkpoint,
    holds_named_weights,
    is_weights_file,
    open_checkpoint,
    weights_sets,
)
from wdanalysis.checkpoints.steps import known_step, method_name, named_step
from wdanalysis.checkpoints.tensors import Series
from wdanalysis.errors import CheckpointError


def open_series(
    path: str | Path, *, alpha: float | None = None, steps: Collection[int] | None = None
) -> Series:
    """Open a file, a folder with one checkpoint or adapter, or a folder of steps, reading headers only.

    Parameters
    ----------
    path
        A file or folder.
    alpha
        LoRA's α for adapters that have no `adapter_config.json`.
    steps
        Keep these steps only; None keeps all.

    Raises
    ------
    CheckpointError
        Nothing there can be read, two entries have the same step, or a step of `steps` is not there.
    """
    path = Path(path)
    try:
        entries = _step_entries(path) if path.is_dir() else []
        by_step, notes = _by_step(path, entries) if entries else ({known_step(path)[0]: path}, [])
    except OSError as error:
        raise CheckpointError(f"{path} could not be read: {error.strerror}.") from error
    if steps is not None:
        if absent := sorted(set(steps) - by_step.keys()):
            known = sorted(step for step in by_step if step is not None)
            raise CheckpointError(
                f"{path} has no step {', '.join(map(str, absent))}; "
                + (
                    f"it has {', '.join(map(str, known))}."
                    if known
                    else "the step of its checkpoint is not known."
                )
            )
        by_step = {step: entry for step, entry in by_step.items() if step in steps}
    ordered = sorted(by_step.items(), key=lambda item: item[0] or 0)
    checkpoints = tuple(open_checkpoint(entry, alpha=alpha) for _, entry in ordered)
    return Series(path, method_name(path, is_series=bool(entries)), checkpoints, tuple(notes))


def _step_entries(folder: Path) -> list[Path]:
    """List the folders, and the files of weights that are no shards of an index, whose names tell a step."""
    entries = [
        entry
        for entry in sorted(folder.iterdir())
        if named_step(entry) is not None and (entry.is_dir() or is_weights_file(entry))
    ]
    if any(entry.is_file() for entry in entries):
        indexed = {file for found in weights_sets(folder) if found.index for file in found.files}
        entries = [entry for entry in entries if entry not in indexed]
    if holds_named_weights(folder):
        # DeepSpeed keeps its own state in `global_step500/` beside the model of that step.
        entries = [entry for entry in entries if entry.is_file() or holds_checkpoint(entry)]
    return entries


def _by_step(folder: Path, entries: list[Path]) -> tuple[dict[int | None, Path], list[str]]:
    """Sort a folder's checkpoints by their steps, and note what lies beside them."""
    by_step: dict[int | None, Path] = {}
    for entry in entries:
        step, _ = known_step(entry)
        if step in by_step:
            raise CheckpointError(
                f"{folder} has step {step} twice, as {by_step[step].name} and as {entry.name}; "
                "move one of them away or pass one of them."
            )
        by_step[step] = entry

    notes = []
    others = [folder] if holds_named_weights(folder) else []
    others += [
        folder / found.name
        for found in weights_sets(folder)
        if found.name not in WEIGHTS_NAMES and not set(found.files) & set(entries)
    ]
    others += [
        entry
        for entry in sorted(folder.iterdir())
        if entry not in entries and entry.is_dir() and holds_checkpoint(entry)
    ]
    for other in others:
        name = f"The model in {folder} itself" if other == folder else f"{other}"
        step, _ = known_step(other)
        if step is None:
            notes.append(f"{name} was left out, as its step is not known.")
        elif step in by_step:
            notes.append(f"{name} was left out, as its step {step} is there as {by_step[step].name}.")
        else:
            by_step[step] = other
    return by_step, notes

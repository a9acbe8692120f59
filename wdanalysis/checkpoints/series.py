"""A method's checkpoints by run and step: which entries of a folder belong to them, and which do not and why."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wdanalysis.checkpoints.folders import (
    WEIGHTS_NAMES,
    holds_checkpoint,
    holds_named_weights,
    is_weights_file,
    open_checkpoint,
    weights_sets,
)
from wdanalysis.checkpoints.steps import (
    is_generic,
    known_step,
    method_name,
    named_step,
    names_run,
    natural_order,
    run_names,
)
from wdanalysis.checkpoints.tensors import Checkpoint, Series
from wdanalysis.errors import CheckpointError, ComparisonError


@dataclass(frozen=True)
class _Found:
    """Where one checkpoint lies, and what it is called."""

    path: Path
    step: int | None
    run: str = ""


def open_series(
    path: str | Path, *, alpha: float | None = None, steps: Collection[int] | None = None
) -> Series:
    """Open a file, a folder with one checkpoint or adapter, a folder of steps, or one of runs, reading headers only.

    A folder of runs has folders with names such as `seed-0` (`wdanalysis.checkpoints.steps.RUN_NAME`), each a
    checkpoint or a folder of steps, and neither steps nor weights of its own.

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
        Nothing there can be read, two entries have the same step, a step of `steps` is not there, or runs of one method
        are of different kinds.
    """
    path = Path(path)
    try:
        runs, notes = _run_folders(path) if path.is_dir() else ([], [])
        entries = _step_entries(path) if path.is_dir() and not runs else []
        found = []
        for place in runs or [path]:
            of_place, more = _checkpoints(place)
            found += [replace(one, run=place.name if len(runs) > 1 else "") for one in of_place]
            notes += more
    except OSError as error:
        raise CheckpointError(f"{path} could not be read: {error.strerror}.") from error
    if steps is not None and (absent := sorted(set(steps) - {one.step for one in found})):
        known = sorted({one.step for one in found if one.step is not None})
        raise CheckpointError(
            f"{path} has no step {', '.join(map(str, absent))}; "
            + (
                f"it has {', '.join(map(str, known))}."
                if known
                else "the step of its checkpoint is not known."
            )
        )
    wanted = [one for one in found if steps is None or one.step in steps]
    checkpoints = [replace(open_checkpoint(one.path, alpha=alpha), run=one.run) for one in wanted]
    name = method_name(path, is_series=bool(entries or runs))
    return _series(path, name, checkpoints, [*notes, *_without_steps(name, found, wanted)])


def joined(name: str, parts: Sequence[Series]) -> Series:
    """Make one series of all that is called `name`.

    Where no step is there twice, all are steps of one run. Otherwise each path is a run, named by what tells the paths
    apart; paths of single steps that lie in one folder are of one run.

    Raises
    ------
    ComparisonError
        A path is given twice, or one folder has a step twice.
    CheckpointError
        The runs are of different kinds.
    """
    if len(parts) == 1:
        return parts[0]
    pairs = [(part, checkpoint) for part in parts for checkpoint in part.checkpoints]
    places = [os.path.realpath(checkpoint.path) for _, checkpoint in pairs]
    if twice := [places.index(place) for place in places if places.count(place) > 1]:
        raise ComparisonError(f"{pairs[twice[0]][1].path} is given twice for {name!r}; leave one out")
    notes = [note for part in parts for note in part.notes]
    steps = [checkpoint.step for _, checkpoint in pairs]
    if len(set(steps)) == len(steps) and not any(checkpoint.run for _, checkpoint in pairs):
        return _series(parts[0].path, name, [checkpoint for _, checkpoint in pairs], notes)
    homes = [_home(part, checkpoint) for part, checkpoint in pairs]
    names = run_names(set(homes))
    known: dict[tuple[Path, int | None], Path] = {}
    for home, (_, checkpoint) in zip(homes, pairs, strict=True):
        other = known.setdefault((home, checkpoint.step), checkpoint.path)
        if other != checkpoint.path:
            at = "no known step" if checkpoint.step is None else f"step {checkpoint.step}"
            raise ComparisonError(
                f"{other} and {checkpoint.path} are both called {name!r} and have {at}; "
                "give one of them a name of its own",
                parameter="label",
            )
    checkpoints = [
        replace(checkpoint, run=names[home]) for home, (_, checkpoint) in zip(homes, pairs, strict=True)
    ]
    return _series(parts[0].path, name, checkpoints, notes)


def of_steps(series: Series, steps: Collection[int]) -> Series:
    """Keep some steps of a series; there are no checkpoints in it where it has none of them."""
    kept = [checkpoint for checkpoint in series.checkpoints if checkpoint.step in steps]
    notes = [*series.notes, *_without_steps(series.name, series.checkpoints, kept)]
    return _series(series.path, series.name, kept, notes)


def by_run(series: Series) -> dict[str, Series]:
    """Take a series apart into those of its runs, each with the folder that its checkpoints lie in as its path."""
    checkpoints: dict[str, list[Checkpoint]] = {}
    for checkpoint in series.checkpoints:
        checkpoints.setdefault(checkpoint.run, []).append(checkpoint)
    if len(checkpoints) < 2:
        return dict.fromkeys(checkpoints, series)
    homes = {
        run: Path(os.path.commonpath([os.path.abspath(one.path) for one in of_run]))
        for run, of_run in checkpoints.items()
    }
    return {
        run: replace(series, path=homes[run], checkpoints=tuple(of_run))
        for run, of_run in checkpoints.items()
    }


def with_common_steps(series: Series) -> Series:
    """Note the steps that not all runs of a series have, which no mean over runs is of.

    Raises
    ------
    CheckpointError
        The runs have no step in common.
    """
    steps: dict[str, set[int | None]] = {}
    for checkpoint in series.checkpoints:
        steps.setdefault(checkpoint.run, set()).add(checkpoint.step)
    every, common = set().union(*steps.values()), set.intersection(*steps.values())
    if not common:
        has = "; ".join(f"{run}: {_listed(of_run)}" for run, of_run in steps.items())
        raise CheckpointError(
            f"the runs of {series.name} have no step in common ({has}); keep steps that all have, or give each a "
            "label of its own",
            parameter="label",
        )
    if every == common:
        return series
    note = (
        f"not all runs of {series.name} have step {_listed(every - common)}: means over runs are of step "
        f"{_listed(common)}"
    )
    return replace(series, notes=(*series.notes, note))


def _without_steps(
    name: str, all_of_them: Iterable[_Found | Checkpoint], kept: Iterable[_Found | Checkpoint]
) -> list[str]:
    """Note the runs that have none of the steps that are kept."""
    lost = {one.run for one in all_of_them} - {one.run for one in kept} - {""}
    return [f"{run} of {name} was left out, as it has none of the chosen steps." for run in sorted(lost)]


def _series(path: Path, name: str, checkpoints: Sequence[Checkpoint], notes: Sequence[str]) -> Series:
    """Order checkpoints by run and step, and see that their runs are of one kind."""
    by_run: dict[str, list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        by_run.setdefault(checkpoint.run, []).append(checkpoint)
    if len(by_run) == 1:
        checkpoints = [replace(checkpoint, run="") for checkpoint in checkpoints]
    elif by_run:
        _check_same_kind(path, by_run)
    ordered = sorted(checkpoints, key=lambda c: (natural_order(c.run), c.step is None, c.step))
    return Series(path, name, tuple(ordered), tuple(notes))


def _check_same_kind(path: Path, by_run: Mapping[str, Sequence[Checkpoint]]) -> None:
    """Refuse runs of one method of which one is a model and another an adapter, or adapters of two kinds."""
    kinds = {run: of_run[0].method or "a model" for run, of_run in by_run.items()}
    (first, kind), *others = kinds.items()
    for run, other in others:
        if other != kind:
            raise CheckpointError(
                f"{first} and {run} (of {path}) are no runs of one method: one is {kind}, the other {other}; "
                "give each a label of its own",
                parameter="label",
            )


def _home(part: Series, checkpoint: Checkpoint) -> Path:
    """Where the run lies that a checkpoint is of: its folder, that of its steps, or a file."""
    if checkpoint.run:
        return Path(os.path.abspath(part.path / checkpoint.run))
    place = Path(os.path.abspath(part.path))
    if checkpoint.path != part.path:
        return place
    if place.is_file() and is_generic(place):
        place = place.parent
    return place if named_step(place) is None else place.parent


def _listed(steps: Iterable[int | None]) -> str:
    return ", ".join(
        "unknown" if step is None else str(step) for step in sorted(steps, key=lambda s: s or -1)
    )


def _run_folders(folder: Path) -> tuple[list[Path], list[str]]:
    """List the folders of a method's runs, and note what is no run; nothing where the folder is none of runs."""
    inside = sorted(
        (entry for entry in folder.iterdir() if entry.is_dir()), key=lambda entry: natural_order(entry.name)
    )
    named = [entry for entry in inside if names_run(entry)]
    if not named or holds_checkpoint(folder) or _step_entries(folder):
        return [], []
    full = [entry for entry in named if holds_checkpoint(entry) or _step_entries(entry)]
    if not full:
        return [], []
    notes = [f"{entry} was left out, as it holds no checkpoint." for entry in named if entry not in full]
    notes += [
        f"{entry} was left out, as its name tells no run."
        for entry in inside
        if entry not in named and (holds_checkpoint(entry) or _step_entries(entry))
    ]
    return full, notes


def _checkpoints(place: Path) -> tuple[list[_Found], list[str]]:
    """Find the checkpoints of one run, and note what lies beside them."""
    entries = _step_entries(place) if place.is_dir() else []
    by_step, notes = _by_step(place, entries) if entries else ({known_step(place)[0]: place}, [])
    return [_Found(entry, step) for step, entry in by_step.items()], notes


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

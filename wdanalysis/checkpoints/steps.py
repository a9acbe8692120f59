"""Which training step a file or folder is, by its name and by the trainer's state."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from wdanalysis.checkpoints.storage import read_json
from wdanalysis.errors import CheckpointError

STEP_NAME = re.compile(
    r"(?:.*[-_.=])?(?:checkpoint|ckpt|global_?step|steps?|iter|iteration)[-_= ]?(\d{1,18})(?:-tokens\d+[BM])?"
    r"|(\d{1,18})",
    re.IGNORECASE,
)
"""``checkpoint-500``, ``global_step500``, ``epoch=0-step=500``, ``iter_0001000``, ``500``, OLMo's
``step1000-tokens4B``; without suffix."""

EPOCH_NAME = re.compile(r"(?:.*[-_.=])?epochs?[-_=]?(\d{1,18})", re.IGNORECASE)
"""``epoch_3``, ``epoch-3``: the step is then the number of the epoch."""

FILE_NAME = re.compile(r"model[-_](\d{1,18})", re.IGNORECASE)
"""``model_500.pt``: a step in the name of a file only, since folders are called so for other reasons."""

RUN_NAME = re.compile(
    r"(?:.*[-_.])?(?:seed|run|rep(?:eat|licate)?|trial)[-_=. ]?\d{1,18}|s\d{1,18}", re.IGNORECASE
)
"""``seed-0``, ``seed_1``, ``run2``, ``rep3``, ``trial-4``, also after a word (``ft-seed-0``); and ``s0``. A name
that tells a step tells no run."""

GENERIC_FILE = re.compile(
    r"(?:(?:pytorch_|adapter_|diffusion_pytorch_)?model|consolidated)(?:[-.].*)?", re.IGNORECASE
)
"""Stems that say neither step nor method, such as ``adapter_model``; the folder's name does."""

TRAINER_STATE = "trainer_state.json"


def named_step(path: Path) -> int | None:
    """Return the step that the name of a file or folder tells."""
    is_file = path.is_file()
    name = path.stem if is_file else path.name
    patterns = (STEP_NAME, EPOCH_NAME, FILE_NAME) if is_file else (STEP_NAME, EPOCH_NAME)
    match = next((match for pattern in patterns if (match := pattern.fullmatch(name))), None)
    return int(next(filter(None, match.groups()))) if match else None


def known_step(path: Path) -> tuple[int | None, list[str]]:
    """Return the step of a checkpoint, and notes on how it is known.

    The `global_step` of a folder's `trainer_state.json` wins over its name. A file whose name tells nothing
    (`model.safetensors`) has its folder's step.

    Raises
    ------
    CheckpointError
        `trainer_state.json` cannot be read.
    """
    path = Path(os.path.abspath(path))
    by_name = named_step(path)
    if path.is_file():
        if by_name is None and is_generic(path):
            return known_step(path.parent)
    elif (state := read_json(path / TRAINER_STATE)) is not None and "global_step" in state:
        by_state = state["global_step"]
        if not isinstance(by_state, int):
            raise CheckpointError(
                f"{path / TRAINER_STATE} has no whole number as global_step; correct or delete it."
            )
        if by_name not in (None, by_state):
            return by_state, [f"{path.name} is step {by_state} by its {TRAINER_STATE}, and was read as that."]
        return by_state, []
    is_epoch = by_name is not None and EPOCH_NAME.fullmatch(path.stem if path.is_file() else path.name)
    return by_name, [f"{path.name} tells its epoch, which was taken as its step."] if is_epoch else []


def names_run(path: Path) -> bool:
    """Whether a folder's name says that it is one of several runs of a method."""
    return RUN_NAME.fullmatch(path.name) is not None and named_step(path) is None


def natural_order(name: str) -> list[str | int]:
    """Return what sorts names as a person would: by the numbers in them.

    >>> sorted(["seed-10", "seed-9"], key=natural_order)
    ['seed-9', 'seed-10']
    """
    return [int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", name)]


def run_names(paths: Collection[Path]) -> dict[Path, str]:
    """Name runs by what differs in their paths: what all end in is left out, then as few folders as tell them apart.

    >>> list(run_names([Path("runs/seed-0/ft"), Path("runs/seed-1/ft")]).values())
    ['seed-0', 'seed-1']
    """
    whole = {path: Path(os.path.abspath(path)) for path in paths}
    stems = {path: at.with_suffix("") if at.is_file() else at for path, at in whole.items()}
    chosen = stems if len(set(stems.values())) == len(stems) else whole
    ends = {path: list(reversed(at.parts)) for path, at in chosen.items()}
    while len({end[0] for end in ends.values()}) == 1 and min(map(len, ends.values())) > 1:
        ends = {path: end[1:] for path, end in ends.items()}
    depth = 1
    while len({tuple(end[:depth]) for end in ends.values()}) < len(ends):
        depth += 1
    return {path: "/".join(reversed(end[:depth])) for path, end in ends.items()}


def is_generic(path: Path) -> bool:
    """Whether a file has a name that transformers, PEFT or diffusers gives to any model."""
    return GENERIC_FILE.fullmatch(path.stem) is not None


def method_name(path: Path, *, is_series: bool) -> str:
    """Name the method whose checkpoint, or series of them, is at `path`.

    It is the folder's own name, or that of the folder above where the folder is a single step; a file's stem,
    or its folder's name where the stem is a step or is the same for every model.
    """
    path = Path(os.path.abspath(path))
    if path.is_file():
        if named_step(path) is None and not is_generic(path):
            return path.stem
        is_step, path = named_step(path) is not None, path.parent
        if is_step:
            return path.name
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.rsplit("--", 1)[
            -1
        ]  # the hub's cache: models--org--name/snapshots/<commit>
    is_step = named_step(path) is not None and not is_series
    return path.parent.name if is_step and path.parent.name else path.name

"""A method's folder: the settings of its run, its checkpoints, and whether it may be gone on with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wdanalysis.errors import OutputError, TrainingError
from wdanalysis.writing import write_whole

TRAINING_JSON = "training.json"
TRAINER_STATE = "trainer_state.json"
CHECKPOINT = "checkpoint-"


@dataclass(frozen=True)
class RunFolder:
    """``OUT/<method>/``, with ``training.json`` and ``checkpoint-<step>/``."""

    path: Path

    def checkpoints(self) -> list[Path]:
        """Return every complete checkpoint by its step: one without a readable trainer state was cut short."""
        found = [
            path
            for path in self.path.glob(f"{CHECKPOINT}*")
            if path.name.removeprefix(CHECKPOINT).isdecimal()
        ]
        return sorted((path for path in found if _state(path)), key=_step)

    def last_checkpoint(self) -> Path | None:
        """Return the checkpoint to go on from."""
        return next(reversed(self.checkpoints()), None)

    def is_finished(self) -> bool:
        """Whether the last checkpoint is that of the run's last step."""
        last = self.last_checkpoint()
        if last is None:
            return False
        state = _state(last)
        return bool(state["global_step"] >= state["max_steps"])

    def check(self, *, resume: bool) -> None:
        """Refuse a folder that holds a run, unless that is to be gone on with, or is none of ours.

        Raises
        ------
        OutputError
            The path is a file, or holds a run that is not to be resumed.
        TrainingError
            It is to be resumed, but does not say with what settings it was made.
        """
        for path in (self.path, *self.path.parents):
            if path.exists() and not path.is_dir():
                raise OutputError(f"{path} is a file: name a folder.", parameter="out")
        checkpoints = any(self.path.glob(f"{CHECKPOINT}*"))
        described = (self.path / TRAINING_JSON).is_file()
        if not resume and (checkpoints or described):
            raise OutputError(
                f"{self.path} already holds a run: resume it, or choose another folder.", parameter="resume"
            )
        if checkpoints and not described:
            raise TrainingError(
                f"{self.path} holds checkpoints without {TRAINING_JSON}, so that they cannot be resumed: "
                "choose another folder.",
                parameter="out",
            )

    def check_same(self, settings: Mapping[str, Any]) -> None:
        """Refuse to go on with a run of other settings.

        Parameters
        ----------
        settings
            Of the run that is asked for.

        Raises
        ------
        TrainingError
            They differ from those of the folder; the message names the first that does.
        """
        file = self.path / TRAINING_JSON
        if not file.is_file():
            return
        try:
            earlier = json.loads(file.read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(f"{file} cannot be read, so that the run cannot be resumed.") from error
        for name in settings:
            if earlier.get(name) != settings[name]:
                raise TrainingError(
                    f"{self.path} holds another run: its {name.replace('_', ' ')} is {_shown(earlier.get(name))}, not "
                    f"{_shown(settings[name])}; resume it with its own settings, or choose another folder.",
                    parameter="out",
                )

    def describe(self, settings: Mapping[str, Any], more: Mapping[str, Any]) -> None:
        """Write ``training.json``: the settings, and what is worth knowing beside them.

        Raises
        ------
        OutputError
            The folder cannot be written.
        """
        text = json.dumps({"settings": settings, **more}, indent=2, ensure_ascii=False) + "\n"
        write_whole(self.path / TRAINING_JSON, lambda file: file.write(text.encode()))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(CHECKPOINT))


def _state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state, which it writes last; empty where it is not there whole."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) and {"global_step", "max_steps"} <= state.keys() else {}


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)

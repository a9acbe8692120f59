"""A run's schedule of learning rates, from what a trainer leaves beside its checkpoints.

Two kinds of files are read, as text and JSON: ``losses.csv`` with ``training.json`` (`wd-analyze train`), and
``trainer_state.json`` (transformers). ``training_args.bin`` is a pickle, and is not opened.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wdanalysis.checkpoints.steps import TRAINER_STATE, named_step
from wdanalysis.checkpoints.storage import read_json
from wdanalysis.checkpoints.tensors import Series
from wdanalysis.errors import CheckpointError, ComparisonError

LOSSES_CSV, TRAINING_JSON = "losses.csv", "training.json"
BETA1 = 0.9
"""Adam's, where nobody says another: torch's and transformers' default."""

SHAPES: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {
        "linear": lambda done: 1 - done,
        "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
        "constant": lambda done: 1.0,
    }
)
"""The share of the peak learning rate that is left where this share of the steps after the warmup is done."""


@dataclass(frozen=True)
class ScheduleSums:
    """What a prediction needs of a schedule up to one step.

    Attributes
    ----------
    s1, s2
        Σ lr and Σ lr².
    diffusion
        Σ lr² as Adam's first moment delivers it: the variance of a trained number whose gradient is noise
        (`Schedule.sums`).
    lr_wd
        Σ lr·wd: how many time scales of the rotational equilibrium, 1/(lr·wd) steps, were trained.
    kept
        Π (1 − lr·wd): the share of a weight that decay left.
    equilibrium_turn
        √(2·lr·wd·(1 − β₁)/(1 + β₁)) with the mean lr: radians a step at rotational equilibrium.
    equilibrium_steps
        1/(lr·wd) with the mean lr: the steps that it takes to get there; infinite without decay.
    """

    s1: float
    s2: float
    diffusion: float
    lr_wd: float
    kept: float
    equilibrium_turn: float
    equilibrium_steps: float


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every update of a run under Adam or AdamW.

    Attributes
    ----------
    learning_rates
        Of the first update, the second …
    weight_decay
        Decoupled, as AdamW's; None where it is not known, which counts as 0.
    beta1
        Adam's β₁.
    source
        The file that tells it; ``given`` where a person did.

    Examples
    --------
    >>> schedule = wd.Schedule.named("linear", 1e-3, steps=100, weight_decay=0.1)
    >>> schedule.learning_rates[:2]
    (0.001, 0.00099)
    >>> sums = schedule.sums(100)
    >>> round(sums.s1, 5), round(1 - sums.kept, 5)
    (0.0505, 0.00504)
    """

    learning_rates: tuple[float, ...]
    weight_decay: float | None = None
    beta1: float = BETA1
    source: str = "given"

    @classmethod
    def named(
        cls,
        shape: str,
        learning_rate: float,
        *,
        steps: int,
        warmup: int = 0,
        weight_decay: float | None = 0.0,
        beta1: float = BETA1,
    ) -> Schedule:
        """Make the schedule that transformers calls so.

        Update k = 1 … `steps` has the rate of k − 1 done: a linear one starts at the peak and ends at peak/steps, and
        with a warmup the first update has the rate 0.

        Parameters
        ----------
        shape
            ``linear``, ``cosine`` or ``constant``, after the warmup.
        learning_rate
            The peak.
        steps
            Of the whole run, warmup included.
        warmup
            Steps of it, in which the rate rises linearly from 0.
        weight_decay, beta1
            As in the class.

        Raises
        ------
        ComparisonError
            There is no such shape, or a number makes no schedule.
        """
        if shape not in SHAPES:
            raise ComparisonError(
                f"there is no schedule {shape!r}: choose of {', '.join(SHAPES)}.", parameter="schedule"
            )
        if not (math.isfinite(learning_rate) and learning_rate > 0 and steps >= 1 and 0 <= warmup <= steps):
            raise ComparisonError(
                f"a peak of {learning_rate:g}, {steps} steps and {warmup} of warmup are no schedule: the peak and the "
                "steps are positive, and the warmup is no longer than the run.",
                parameter="learning_rate",
            )
        left = (
            done / warmup if done < warmup else SHAPES[shape]((done - warmup) / max(1, steps - warmup))
            for done in range(steps)
        )
        return cls(tuple(learning_rate * share for share in left), weight_decay, beta1)

    @classmethod
    def logged(
        cls,
        rates: Mapping[int, float],
        *,
        until: int = 0,
        last: int | None = None,
        weight_decay: float | None = None,
    ) -> Schedule:
        """Make it of rates that were logged at some steps, with straight lines between them and on at both ends.

        A rate counts as that of the update with its number. Older versions of transformers log the rate of the next
        update instead: seen by a 0 at the last step of the run, and put right.

        Parameters
        ----------
        rates
            By step, at least one.
        until
            A step that was reached, if no rate was logged there.
        last
            The run's last step, where it is known.
        weight_decay
            As in the class.
        """
        steps = sorted(rates)
        of_next = len(steps) > 1 and steps[-1] == last and rates[steps[-1]] == 0
        known = np.array(steps) + of_next
        updates = np.arange(1, max(steps[-1], until) + 1)
        filled = _along_lines(updates, known, np.array([rates[step] for step in steps]))
        return cls(tuple(filled.tolist()), weight_decay)

    def with_decay(self, weight_decay: float | None) -> Schedule:
        """Return it with this weight decay where its own is not known."""
        return self if self.weight_decay is not None else replace(self, weight_decay=weight_decay)

    def sums(self, step: int) -> ScheduleSums | None:
        """Sum it up to a step; None for one that lies outside.

        With u_k = m̂_k of Adam over √v̂, and gradients that are noise of one size, gradient j goes with the weight
        (1 − β₁)·β₁^(k−j)/(1 − β₁^k) into the update k. So its share in the way until step n is

            w_j = Σ_{k=j}^{n} lr_k · (1 − β₁)·β₁^(k−j)/(1 − β₁^k) · Π_{i>k} (1 − lr_i·wd)

        and `diffusion` is Σ w_j². Without decay, Σ_k of the factors beside lr_k is 1 in the middle of a long run, so
        that w_j ≈ lr_j and the sum is S2; the first gradients weigh more (bias correction: 2.6 lr the first), and the
        last are not delivered yet.
        """
        if not 0 < step <= len(self.learning_rates):
            return None
        from scipy.signal import lfilter

        lr, wd, beta = np.array(self.learning_rates[:step]), self.weight_decay or 0.0, self.beta1
        left = np.cumprod(1 - lr * wd)
        k = np.arange(1, step + 1)
        after: NDArray[np.float64] = left[-1] / left if left.all() else np.append(np.zeros(step - 1), 1.0)
        delivered = lr * (1 - beta) / (1 - beta**k) * after
        weights = lfilter([1.0], [1.0, -beta], delivered[::-1])
        s1 = float(lr.sum())
        rate = s1 / step * wd
        return ScheduleSums(
            s1=s1,
            s2=float(lr @ lr),
            diffusion=float(weights @ weights),
            lr_wd=s1 * wd,
            kept=float(left[-1]),
            equilibrium_turn=math.sqrt(2 * rate * (1 - beta) / (1 + beta)),
            equilibrium_steps=1 / rate if rate else math.inf,
        )


def find_schedule(series: Series) -> Schedule | None:
    """Look for the schedule of a series of one run in its folders; None where none is told, or it cannot be read.

    ``losses.csv`` beside a ``training.json``, which tells the weight decay, comes before ``trainer_state.json``, which
    does not; of several of these the last step's, which knows all steps before.
    """
    folders = list(dict.fromkeys(_folders(series)))
    for read, name in ((_of_losses, LOSSES_CSV), (_of_trainer_state, TRAINER_STATE)):
        for folder in folders:
            try:
                schedule = read(folder)
            except (CheckpointError, OSError, ValueError, KeyError, TypeError):
                continue  # a prediction is no reason to stop a comparison
            if schedule is not None:
                return replace(schedule, source=str(folder / name))
    return None


def _folders(series: Series) -> Iterator[Path]:
    """Where a schedule may lie, the likeliest first."""
    for checkpoint in reversed(series.checkpoints):
        folder = _folder_of(checkpoint.path)
        yield folder
        if named_step(Path(os.path.abspath(folder))) is not None:
            yield Path(os.path.normpath(folder / ".."))
    yield _folder_of(series.path)


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _of_losses(folder: Path) -> Schedule | None:
    settings = (read_json(folder / TRAINING_JSON) or {}).get("settings")
    if not isinstance(settings, dict) or not (folder / LOSSES_CSV).is_file():
        return None
    with (folder / LOSSES_CSV).open(encoding="utf-8", newline="") as file:
        rates = _rates((row["step"], row["learning_rate"]) for row in csv.DictReader(file))
    last, decay = settings.get("steps"), float(settings["weight_decay"])
    return Schedule.logged(rates, last=last, weight_decay=decay) if rates else None


def _of_trainer_state(folder: Path) -> Schedule | None:
    state = read_json(folder / TRAINER_STATE) or {}
    history: list[Mapping[str, Any]] = state.get("log_history", [])
    rates = _rates((entry["step"], entry["learning_rate"]) for entry in history if "learning_rate" in entry)
    if not rates:
        return None
    return Schedule.logged(rates, until=int(state.get("global_step", 0)), last=state.get("max_steps"))


def _along_lines(
    steps: NDArray[np.int64], known: NDArray[np.int64], rates: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Rates at steps, on straight lines through the known ones; never below 0."""
    if len(known) == 1:
        return np.full(len(steps), rates[0])
    segment = np.clip(np.searchsorted(known, steps, side="right") - 1, 0, len(known) - 2)
    slopes = np.diff(rates) / np.diff(known)
    line: NDArray[np.float64] = rates[segment] + slopes[segment] * (steps - known[segment])
    return np.maximum(line, 0.0)


def _rates(logged: Iterable[tuple[Any, Any]]) -> dict[int, float]:
    """Rates by step, from 1 on; those that are empty or not finite are left out."""
    rates = {int(step): float(rate) for step, rate in logged if rate not in (None, "")}
    return {step: rate for step, rate in rates.items() if step > 0 and math.isfinite(rate) and rate >= 0}

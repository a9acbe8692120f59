"""Many training steps as a few ranges of one width, for markers that a reader can tell apart."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

MOST_BINS = 7
"""So many markers are told apart."""

_ROUND = (1, 2, 5)


@dataclass(frozen=True)
class StepBin:
    """The steps from `first` to `last`, both included."""

    first: int
    last: int

    @property
    def name(self) -> str:
        """Return "500", or "501–1000"."""
        return f"{self.first}" if self.first == self.last else f"{self.first}–{self.last}"


def step_bins(steps: Iterable[int], most: int = MOST_BINS) -> dict[int, StepBin]:
    """Return the bin of every step: itself where there are few, else one of at most `most` ranges of equal width.

    Parameters
    ----------
    steps
        Training steps, in any order and with repeats.
    most
        How many bins there may be.

    Returns
    -------
    dict
        The bin by step, in the order of training. The width is 1, 2 or 5 times a power of ten, and a range ends at a
        multiple of it; the first holds step 0 as well. A range without steps has no bin.

    Examples
    --------
    >>> [at.name for at in step_bins([60, 240, 120]).values()]
    ['60', '120', '240']
    >>> [at.name for at in dict.fromkeys(step_bins(range(0, 5001, 100)).values())]
    ['0–1000', '1001–2000', '2001–3000', '3001–4000', '4001–5000']
    """
    known = sorted(set(map(int, steps)))
    if len(known) <= most:
        return {step: StepBin(step, step) for step in known}
    widths = (factor * 10**power for power in itertools.count() for factor in _ROUND)
    width = next(w for w in widths if _place(known[-1], w) - _place(known[0], w) < most)
    return {step: _range(_place(step, width), width) for step in known}


def _place(step: int, width: int) -> int:
    """Return the number of the range of a step; the first one, of number 0, begins with step 0."""
    return max(0, step - 1) // width


def _range(place: int, width: int) -> StepBin:
    return StepBin(place * width + (place > 0), (place + 1) * width)

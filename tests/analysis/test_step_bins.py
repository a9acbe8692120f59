"""Ranges of steps: few, of one width, round, and every step in one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from wdanalysis.analysis.step_bins import MOST_BINS, step_bins


@pytest.mark.parametrize("seed", range(20))
def test_every_step_is_in_one_of_at_most_seven_ranges_of_one_round_width(seed) -> None:
    random = np.random.default_rng(seed)
    steps = random.integers(0, 10 ** random.integers(2, 7), 60)
    bins = step_bins(steps)
    assert list(bins) == sorted(set(steps.tolist()))
    assert all(at.first <= step <= at.last for step, at in bins.items())
    shown = list(dict.fromkeys(bins.values()))
    assert 1 < len(shown) <= MOST_BINS
    assert all(after.first > before.last for before, after in itertools.pairwise(shown))
    (width,) = {at.last - at.first + (at.first > 0) for at in shown}
    assert str(width).rstrip("0") in {"1", "2", "5"}
    assert all(at.last % width == 0 for at in shown)


def test_few_steps_are_themselves_in_any_order() -> None:
    assert [at.name for at in step_bins([7, 3, 3, 11]).values()] == ["3", "7", "11"]
    assert step_bins([]) == {}


def test_many_steps_are_named_by_their_round_edges() -> None:
    assert [at.name for at in dict.fromkeys(step_bins(range(100, 5001, 100)).values())] == [
        *("0–1000", "1001–2000", "2001–3000", "3001–4000", "4001–5000")
    ]
    assert {at.name for at in step_bins(range(9001, 9013)).values()} == {
        *("9001–9002", "9003–9004", "9005–9006", "9007–9008", "9009–9010", "9011–9012")
    }

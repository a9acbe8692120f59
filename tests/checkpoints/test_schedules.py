"""Schedules: read from what trainers write, made as transformers makes them, and summed up as Adam would."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import llama, write_steps

from wdanalysis.checkpoints import open_series
from wdanalysis.checkpoints.schedules import Schedule, find_schedule
from wdanalysis.errors import ComparisonError

SAMPLES = Path(__file__).parents[2] / "sample_checkpoints"


def trainer_state(folder: Path, step: int, *, every: int, peak: float = 1e-3, last: int = 40) -> None:
    """What transformers writes beside a checkpoint of a linear schedule."""
    logged = [
        {"step": k, "learning_rate": peak * (1 - (k - 1) / last), "loss": 1.0}
        for k in range(every, step + 1, every)
    ]
    state = {
        "global_step": step,
        "max_steps": last,
        "log_history": [*logged, {"step": step, "eval_loss": 2.0}],
    }
    (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_named_schedules_are_those_of_transformers(shape: str, warmup: int) -> None:
    import torch
    from transformers import get_scheduler

    steps, peak = 50, 3e-3
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    name = "constant_with_warmup" if shape == "constant" else shape
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    used = []
    for _ in range(steps):
        used.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    named = Schedule.named(shape, peak, steps=steps, warmup=warmup)
    assert named.learning_rates == pytest.approx(used, abs=1e-12)


def test_what_is_no_schedule_is_refused() -> None:
    with pytest.raises(ComparisonError, match="no schedule 'step'"):
        Schedule.named("step", 1e-3, steps=10)
    for wrong in ({"steps": 0}, {"steps": 10, "warmup": 11}):
        with pytest.raises(ComparisonError, match="are no schedule"):
            Schedule.named("linear", 1e-3, **wrong)
    with pytest.raises(ComparisonError, match="are no schedule"):
        Schedule.named("linear", math.inf, steps=10)


@pytest.mark.parametrize(("method", "peak", "decay"), [("ft-decay", 1e-3, 0.1), ("dora", 4e-3, 0.0)])
@pytest.mark.parametrize("entry", ["", "checkpoint-240", "checkpoint-60"])
def test_the_samples_tell_the_schedule_that_made_them(
    method: str, peak: float, decay: float, entry: str
) -> None:
    found = find_schedule(open_series(SAMPLES / method / entry))
    assert found is not None
    assert found.source.endswith("losses.csv")
    made = Schedule.named("linear", peak, steps=240, weight_decay=decay)
    assert found.learning_rates == pytest.approx(made.learning_rates, rel=1e-9)
    assert found.weight_decay == decay


@pytest.mark.parametrize("every", [1, 7])
def test_transformers_state_tells_the_rates_and_no_decay(tmp_path: Path, every: int) -> None:
    write_steps(tmp_path, llama(layers=1))
    for step in (10, 20, 30):
        trainer_state(tmp_path, step, every=every)
    (tmp_path / "checkpoint-30" / "training_args.bin").write_bytes(b"no pickle: never opened")
    found = find_schedule(open_series(tmp_path))
    assert found is not None
    assert found.learning_rates == pytest.approx([1e-3 * (1 - k / 40) for k in range(30)])
    assert found.weight_decay is None
    assert found.with_decay(0.1).weight_decay == 0.1
    assert found.with_decay(0.1).with_decay(0.2).weight_decay == 0.1


def test_rates_that_were_logged_after_the_scheduler_moved_are_of_the_next_update() -> None:
    used = [1e-3 * (1 - k / 40) for k in range(40)]
    after = {step: 1e-3 * (1 - step / 40) for step in range(1, 41)}
    assert Schedule.logged(after, last=40).learning_rates == pytest.approx(used)
    before = {step: 1e-3 * (1 - (step - 1) / 40) for step in range(1, 41)}
    assert Schedule.logged(before, last=40).learning_rates == pytest.approx(used)


def test_a_log_that_ends_before_the_checkpoint_goes_on_in_a_line_and_never_below_zero() -> None:
    assert Schedule.logged({2: 0.3, 4: 0.1}, until=6).learning_rates == pytest.approx(
        [0.4, 0.3, 0.2, 0.1, 0, 0]
    )
    assert Schedule.logged({2: 0.3}, until=3).learning_rates == (0.3, 0.3, 0.3)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("training.json", "{"),
        ("training.json", '{"settings": 3}'),
        ("training.json", '{"settings": {"weight_decay": "much"}}'),
        ("training.json", '{"settings": {}}'),
        ("losses.csv", "step,loss\n1,2\n"),
        ("losses.csv", "step,learning_rate\nfirst,1e-3\n"),
        ("losses.csv", ""),
        ("losses.csv", "step,learning_rate\n0,1e-3\n1,nan\n"),
    ],
)
def test_files_that_tell_no_schedule_are_passed_over(tmp_path: Path, name: str, text: str) -> None:
    write_steps(tmp_path, llama(layers=1))
    good = {
        "training.json": '{"settings": {"weight_decay": 0.1}}',
        "losses.csv": "step,learning_rate\n1,1e-3\n30,1e-4\n",
    }
    for file, content in (good | {name: text}).items():
        (tmp_path / file).write_text(content)
    assert find_schedule(open_series(tmp_path)) is None
    (tmp_path / name).write_text(good[name])
    assert find_schedule(open_series(tmp_path)) is not None


@pytest.mark.parametrize("log", ["3", '[{"step": 1, "learning_rate": "fast"}]', "[3]", "[]"])
def test_a_state_without_rates_is_passed_over(tmp_path: Path, log: str) -> None:
    write_steps(tmp_path, llama(layers=1), steps=(10,))
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text(
        f'{{"global_step": 10, "log_history": {log}}}'
    )
    assert find_schedule(open_series(tmp_path)) is None


def adam_on_noise(schedule: Schedule, start: float, numbers: int, seed: int = 0) -> np.ndarray:
    """Where AdamW brings numbers whose gradients are independent noise: (numbers,), by its own equations."""
    rng = np.random.default_rng(seed)
    x, first, second = np.full(numbers, start), np.zeros(numbers), np.zeros(numbers)
    scale = rng.lognormal(size=numbers)  # Adam does not see the size of gradients
    for k, lr in enumerate(schedule.learning_rates, 1):
        gradient = scale * rng.standard_normal(numbers)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        x *= 1 - lr * (schedule.weight_decay or 0.0)
        x -= lr * first / (1 - 0.9**k) / (np.sqrt(second / (1 - 0.999**k)) + 1e-12)
    return x


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("steps", "warmup", "decay"), [(30, 0, 0.0), (200, 20, 0.0), (200, 0, 5.0)])
def test_adam_on_noise_spreads_by_the_diffusion(shape: str, steps: int, warmup: int, decay: float) -> None:
    schedule = Schedule.named(shape, 2e-3, steps=steps, warmup=warmup, weight_decay=decay)
    sums = schedule.sums(steps)
    assert sums is not None
    end = adam_on_noise(schedule, 0.5, numbers=10_000)
    assert end.mean() == pytest.approx(0.5 * sums.kept, abs=4 * end.std() / 100)
    assert end.var() == pytest.approx(sums.diffusion, rel=0.05)  # a normal.s own error is 0.014


def test_without_decay_the_diffusion_of_a_long_run_is_the_sum_of_squares() -> None:
    sums = Schedule.named("linear", 1e-4, steps=20_000).sums(20_000)
    assert sums is not None
    assert sums.diffusion == pytest.approx(sums.s2, rel=0.01)
    assert sums.s1 == pytest.approx(1.0, rel=1e-3)
    assert sums.s2 == pytest.approx(1e-8 * 20_000 / 3, rel=1e-3)


def test_sums_by_hand() -> None:
    schedule = Schedule((0.1, 0.2), weight_decay=0.5)
    sums = schedule.sums(2)
    assert sums is not None
    # Weights of the gradients of steps 1 and 2 in the way until 2, with m̂₂ = (0.09 g₁ + 0.1 g₂)/0.19.
    w1, w2 = 0.1 * 0.9 + 0.2 * 0.09 / 0.19, 0.2 * 0.1 / 0.19
    assert sums.diffusion == pytest.approx(w1**2 + w2**2)
    assert (sums.s1, sums.s2, sums.lr_wd) == pytest.approx((0.3, 0.05, 0.15))
    assert sums.kept == pytest.approx(0.95 * 0.9)
    assert sums.equilibrium_steps == pytest.approx(1 / 0.075)
    assert sums.equilibrium_turn == pytest.approx(math.sqrt(2 * 0.075 * 0.1 / 1.9))
    assert schedule.sums(3) is None
    assert schedule.sums(0) is None


def test_the_source_is_named_as_the_checkpoints_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SAMPLES)
    assert [find_schedule(open_series(path)).source for path in ("dora", "dora/checkpoint-60")] == [  # type: ignore[union-attr]
        "dora/losses.csv"
    ] * 2
    monkeypatch.chdir(SAMPLES / "dora" / "checkpoint-60")
    assert find_schedule(open_series(".")).source == "../losses.csv"  # type: ignore[union-attr]

"""The bundled base model and the sample checkpoints: what they are, and that they learnt something."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from machine_paths import machine_paths
from safetensors.torch import load_file, save_file
from torch import Tensor

import wdanalysis as wd
from wdanalysis.training.bundled import bundled_model_folder
from wdanalysis.training.data.text import library_documentation, library_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES = Path(__file__).parents[1] / "sample_checkpoints"
FULLY_TUNED = ("ft", "ft-decay")
ADAPTERS = ("lora", "dora")
METHODS = (*FULLY_TUNED, *ADAPTERS)
STEPS = ("checkpoint-60", "checkpoint-120", "checkpoint-180", "checkpoint-240")
WINDOW = 256


@cache
def base_model() -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(bundled_model_folder(), dtype=torch.float32).eval()


def tuned_model(method: str, step: str) -> Any:
    """The model as transformers and PEFT load it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = SAMPLES / method / step
    if method in FULLY_TUNED:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(SAMPLES / "base", dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder).eval()


def windows(texts: Sequence[str], count: int) -> Tensor:
    """The first `count` windows of tokens of the texts, (count, WINDOW)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundled_model_folder())
    tokens: list[int] = []
    for text in texts:
        tokens += [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(tokens[: count * WINDOW]).view(count, WINDOW)


@cache
def documentation() -> Tensor:
    return windows(library_documentation(held_out=True), 16)


@torch.no_grad()
def loss(model: Any, batch: Tensor) -> float:
    return model(input_ids=batch, labels=batch).loss.item()


def held_out_losses(method: str) -> pd.Series[float]:
    """The held-out loss by step that was stored in training."""
    table = pd.read_csv(SAMPLES / method / "losses.csv", index_col="step")
    return table["held_out_loss"].dropna()


def test_the_bundled_base_is_small_enough_to_bundle() -> None:
    assert sum(path.stat().st_size for path in bundled_model_folder().glob("*.*")) <= 2.5e6


def test_all_samples_take_at_most_25_megabytes() -> None:
    assert sum(path.stat().st_size for path in SAMPLES.rglob("*") if path.is_file()) <= 25e6


def test_the_base_of_the_samples_is_the_bundled_one() -> None:
    for name in ("config.json", "model.safetensors"):
        assert (SAMPLES / "base" / name).read_bytes() == (bundled_model_folder() / name).read_bytes()


@pytest.mark.slow
def test_the_base_predicts_source_that_it_has_not_seen_far_better_than_frequencies_do() -> None:
    batch = windows(library_source(held_out=True), 32)
    frequencies = np.unique(batch, return_counts=True)[1] / batch.numel()
    unigram_entropy = -(frequencies * np.log(frequencies)).sum()
    assert loss(base_model(), batch) < 0.6 * unigram_entropy < 0.6 * math.log(2048)


def test_any_text_survives_the_bundled_tokenizer() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundled_model_folder())
    text = "def f(x):\n\t    return 'Grüße → 世界'  # \x00\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_four_steps_and_its_held_out_loss_falls_from_each_to_the_next(method: str) -> None:
    assert sorted(path.name for path in (SAMPLES / method).glob("checkpoint-*")) == sorted(STEPS)
    losses = held_out_losses(method)
    assert list(losses.index) == [0, 60, 120, 180, 240]
    assert losses.is_monotonic_decreasing
    assert losses.iloc[-1] < losses.iloc[0] - 0.3


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_transformers_and_peft_load_a_model_that_predicts_documentation_better_than_the_base(
    method: str,
) -> None:
    before = loss(base_model(), documentation())
    halfway, after = (loss(tuned_model(method, step), documentation()) for step in (STEPS[1], STEPS[3]))
    assert after < halfway < before - 0.3


@pytest.mark.parametrize("method", METHODS)
def test_the_comparison_is_that_of_the_weights_which_transformers_and_peft_load(method: str) -> None:
    rows = wd.compare(SAMPLES / "base", {method: SAMPLES / method}, modules=["v"], steps=[240]).metrics
    model = tuned_model(method, STEPS[3])
    tuned = (model if method in FULLY_TUNED else model.merge_and_unload()).state_dict()
    base = load_file(SAMPLES / "base" / "model.safetensors")
    assert len(rows) == 10
    for row in rows.itertuples():
        w0, w = base[row.name].double(), tuned[row.name].double()
        cosine = (w0 * w).sum(1) / (w0.norm(dim=1) * w.norm(dim=1))
        assert row.delta_m == pytest.approx((w.norm(dim=1) - w0.norm(dim=1)).abs().mean().item(), rel=1e-4)
        assert row.delta_d == pytest.approx((1 - cosine).mean().item(), rel=1e-4)


@pytest.mark.parametrize("method", FULLY_TUNED)
def test_rounding_to_float16_is_far_below_what_tuning_did(method: str) -> None:
    rows = wd.compare(SAMPLES / "base", {method: SAMPLES / method}, modules=["q", "v"]).metrics
    assert (rows["delta_d"] > 1e4 * rows["delta_d_floor"]).all()


def test_weight_decay_makes_magnitudes_smaller() -> None:
    run = wd.compare(
        SAMPLES / "base", {name: SAMPLES / name for name in FULLY_TUNED}, modules=["q", "k", "v", "o"]
    )
    signed = run.metrics.groupby(["method", "step"])["delta_m_signed"].mean().unstack("method")
    assert (signed["ft-decay"] < signed["ft"]).all()


def described_by(path: Path) -> str:
    """What a file says in words: the whole of a text, the header of a safetensors file."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        content = content[8 : 8 + int.from_bytes(content[:8], "little")]
    return content.decode("utf-8")


@pytest.mark.parametrize(
    "path", ["/home/ada/base", "/tmp/x/base", "/Users/ada/base", r"C:\Users\ada", "/opt/a"]
)
def test_a_path_of_a_machine_is_noticed_in_any_file(tmp_path: Path, path: str) -> None:
    settings = (SAMPLES / "ft" / "training.json").read_text(encoding="utf-8")
    naming = tmp_path / "training.json"
    naming.write_text(settings.replace('"model": null', f'"model": {json.dumps(path)}'), encoding="utf-8")
    weights = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(1)}, weights, metadata={"made_from": path})
    assert machine_paths(described_by(naming))
    assert machine_paths(described_by(weights))


def test_no_file_names_the_machine_that_made_it() -> None:
    files = [path for path in SAMPLES.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert len(files) > 40
    assert not [(path.name, found) for path in files if (found := machine_paths(described_by(path)))]

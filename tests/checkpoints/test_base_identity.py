"""Is BASE the model that an adapter was trained on? By what both hold; where they hold nothing, by published names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import wdanalysis as wd
from wdanalysis.checkpoints import open_checkpoint
from wdanalysis.checkpoints.base_identity import FIRST_ROWS, base_mismatch
from wdanalysis.training.injection import AdapterConfig, inject
from wdanalysis.training.peft_folder import save_adapter

SAMPLES = Path(__file__).parents[2] / "sample_checkpoints"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=24, vocab_size=32, **sizes))


def adapter_of(model: Any, folder: Path, *, targets: str = "q,v", base_name: str = "somewhere/else") -> Path:
    inject(model, AdapterConfig("dora", 3, targets=targets))
    save_adapter(model, folder, base_name=base_name)
    return folder


def mismatch(base: Path, adapter: Path) -> str | None:
    return base_mismatch(open_checkpoint(base), open_checkpoint(adapter))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_samples_are_of_their_base_wherever_it_lies(tmp_path: Path, method: str) -> None:
    for name in ("base", "bundled", "renamed"):
        shutil.copytree(SAMPLES / "base", tmp_path / name)
        assert wd.compare(tmp_path / name, SAMPLES / method, modules=["v"], steps=[60]).warnings == []


def test_the_base_of_training_is_known_under_any_name(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "moved")
    adapter = adapter_of(llama(), tmp_path / "adapter", targets="q,down,embed")
    assert mismatch(tmp_path / "moved", adapter) is None


def test_another_model_of_the_same_shape_and_name_is_noticed(tmp_path: Path) -> None:
    llama(seed=1).save_pretrained(tmp_path / "base")
    adapter = adapter_of(llama(), tmp_path / "adapter", base_name="base")
    (warning,) = wd.compare(tmp_path / "base", adapter).warnings
    assert "was trained on a base with other numbers than" in warning
    assert "q_proj.weight" in warning


def test_one_other_matrix_among_equal_ones_is_noticed(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    adapter = adapter_of(llama(), tmp_path / "adapter")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"
    weights[name][0, 5] *= 1.001
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    assert name in (mismatch(tmp_path / "base", adapter) or "")


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("trained", DTYPES[:3])
def test_a_base_that_was_loaded_in_another_precision_is_the_same(
    tmp_path: Path, stored: torch.dtype, trained: torch.dtype
) -> None:
    """As transformers loads it: the numbers on the disk, rounded to the type of training."""
    llama().to(stored).save_pretrained(tmp_path / "base")
    held = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=trained)
    assert mismatch(tmp_path / "base", adapter_of(held, tmp_path / "adapter")) is None
    llama(seed=1).to(stored).save_pretrained(tmp_path / "other")
    assert mismatch(tmp_path / "other", tmp_path / "adapter") is not None


def test_a_matrix_that_lies_the_other_way_round_is_known(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16))
    model.save_pretrained(tmp_path / "base")
    assert mismatch(tmp_path / "base", adapter_of(model, tmp_path / "adapter", targets="q,up")) is None


@pytest.mark.parametrize(
    "noted", ["no JSON", "[]", '{"a": 1}', '{"model.layers.0.self_attn.q_proj": "F9 00"}']
)
def test_what_cannot_be_understood_is_passed_over(tmp_path: Path, noted: str) -> None:
    llama().save_pretrained(tmp_path / "base")
    file = adapter_of(llama(), tmp_path / "adapter") / "adapter_model.safetensors"
    save_file(load_file(file), file, {FIRST_ROWS: noted})
    assert mismatch(tmp_path / "base", tmp_path / "adapter") is None


@pytest.mark.parametrize(
    ("trained_on", "folder", "configured", "other"),
    [
        ("org/llama", "base", "", False),  # nothing is known of the base
        ("runs/base", "base", "org/llama", True),  # reads like a name on the hub
        ("/data/runs/base", "base", "org/llama", False),
        ("./base", "base", "org/llama", False),
        ("org/llama", "base", "other/LLaMA", False),
        ("org/llama-chat", "base", "org/llama", True),
        ("org/llama-chat", "models--org--llama/snapshots/0a1b", "", True),
        ("org/llama", "models--org--llama/snapshots/0a1b", "", False),
        ("", "base", "org/llama", False),
    ],
)
def test_where_nothing_is_noted_two_published_names_tell(
    tmp_path: Path, trained_on: str, folder: str, configured: str, other: bool
) -> None:
    base = tmp_path / folder
    llama().save_pretrained(base)
    config = json.loads((base / "config.json").read_text()) | {"_name_or_path": configured}
    (base / "config.json").write_text(json.dumps(config))
    file = adapter_of(llama(seed=1), tmp_path / "adapter", base_name=trained_on) / "adapter_model.safetensors"
    save_file(load_file(file), file)
    sentence = mismatch(base, tmp_path / "adapter")
    assert (sentence is not None) == other
    assert not other or f"says that it was trained on {trained_on}" in str(sentence)

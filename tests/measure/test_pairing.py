"""What belongs together is compared, and what is left over or looks wrong is said first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

import wdanalysis as wd
from tests.checkpoint_files import llama, moved, write, write_model
from wdanalysis.checkpoints import open_checkpoint
from wdanalysis.checkpoints.tensors import Checkpoint, LowRankUpdate, Series, StoredTensor
from wdanalysis.errors import ComparisonError
from wdanalysis.measure.plan import plan
from wdanalysis.measure.stream import stream

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 32,
    "pad_token_id": 0,
}


def test_nothing_in_common_is_answered_with_the_closest_names(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", llama())
    renamed = {name.replace("model.layers", "decoder.blocks"): w for name, w in llama().items()}
    renamed = {name.replace("embed_tokens", "tokens"): w for name, w in renamed.items()}
    tuned = write(tmp_path / "tuned.safetensors", renamed)
    with pytest.raises(
        ComparisonError, match=r"closest: decoder\.blocks\.0\.\S+ there and model\.layers\.0\.\S+ here"
    ):
        wd.compare(base, {"FT": tuned})


def test_an_adapter_of_other_modules_is_answered_with_the_closest_names(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", llama())
    factors = {"decoder.blocks.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 8)}
    factors["decoder.blocks.0.self_attn.q_proj.lora_B.weight"] = torch.ones(8, 2)
    write(tmp_path / "lora" / "adapter_model.safetensors", factors)
    with pytest.raises(
        ComparisonError,
        match=r"closest: decoder\.blocks\.0\.self_attn\.q_proj there and model\.layers\.0\.self_attn\.q_proj",
    ):
        wd.compare(base, {"LoRA": tmp_path / "lora"}, alpha=2)


def test_unrelated_weights_and_two_model_types_are_the_first_warnings(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", llama(size=64))
    tuned = write_model(tmp_path / "tuned", llama(size=64, seed=7))
    (tuned / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    first, second = wd.compare(base, {"FT": tuned}).warnings[:2]
    assert first.startswith("FT has a mean ΔD of ")
    assert "is of the type mistral by its config.json and BASE of the type llama" in second


def test_a_tuned_model_is_not_called_unrelated(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", llama(size=64))
    tuned = write_model(tmp_path / "tuned", moved(llama(size=64), size=0.3))
    assert wd.compare(base, {"FT": tuned}).warnings == []


def test_a_text_model_is_of_the_type_of_its_multimodal_one(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", llama())
    inside = {name.replace("model.", "model.language_model.", 1): w for name, w in moved(llama()).items()}
    tuned = write_model(tmp_path / "tuned", inside)
    (tuned / "config.json").write_text(
        json.dumps({"model_type": "llava", "text_config": {"model_type": "llama", "num_attention_heads": 2}})
    )
    compared = wd.compare(base, {"VLM": tuned})
    assert compared.warnings == []
    assert len(compared.metrics) == 9


def test_what_is_passed_over_in_attention_blocks_is_named(tmp_path: Path) -> None:
    weights = llama()
    for layer in range(3):
        weights[f"model.layers.{layer}.self_attn.compressor.weight"] = torch.ones(4, 8)
        weights[f"model.layers.{layer}.self_attn.q_norm.weight"] = torch.ones(8, 8)
    base = write_model(tmp_path / "base", weights)
    tuned = write_model(tmp_path / "tuned", moved(weights))
    (warning,) = [w for w in wd.compare(base, {"FT": tuned}).warnings if "attention projections" in w]
    assert "as self_attn.compressor is none that is known" in warning


def _factor(name: str, values: np.ndarray) -> StoredTensor:
    return StoredTensor(name, values.shape, "F64", Path("adapter"), lambda start, stop, _: values[start:stop])


@pytest.mark.parametrize("kind", ["GptOss", "Qwen3Moe"])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_a_low_rank_update_of_one_expert_is_that_of_its_merged_matrix(
    kind: str, axis: Any, tmp_path: Path
) -> None:
    sizes = SIZES | {"head_dim": 4, "num_experts_per_tok": 1}
    sizes |= {"num_local_experts": 3} if kind == "GptOss" else {"num_experts": 3, "moe_intermediate_size": 24}
    torch.manual_seed(0)
    model = getattr(hf, f"{kind}ForCausalLM")(getattr(hf, f"{kind}Config")(**sizes)).double()
    name, expert = "model.layers.1.mlp.experts.gate_up_proj", 2
    base_weights = {key: torch.randn_like(w) for key, w in model.state_dict().items()}
    A, B = torch.randn(2, 16).double(), torch.randn(48, 2).double()
    tuned_weights = {key: w.clone() for key, w in base_weights.items()}
    update = 0.5 * B @ A
    tuned_weights[name][expert] += update.T if kind == "GptOss" else update
    paths = []
    for folder, weights in (("base", base_weights), ("tuned", tuned_weights)):
        paths.append(write(tmp_path / folder / "model.safetensors", weights).parent)
        model.config.save_pretrained(paths[-1])
    base, tuned = (open_checkpoint(path) for path in paths)
    low_rank = LowRankUpdate(
        name, _factor("A", A.numpy()), _factor("B", B.numpy()), 0.5, in_by_out=kind == "GptOss", expert=expert
    )
    adapter = Checkpoint(Path("adapter"), "PEFT adapter (LoRA)", {}, updates=(low_rank,), method="LoRA")
    methods = {
        "FT": Series(paths[1], "FT", (tuned,)),
        "LoRA": Series(Path("adapter"), "LoRA", (adapter,)),
    }
    planned = plan(base, methods, modules=["gate", "up"], layers=[1])
    rows = [row for rows in stream(planned, axis) for row in rows if row.expert == expert]
    dense = {row.module: row for row in rows if row.method == "FT"}
    factored = {row.module: row for row in rows if row.method == "LoRA"}
    assert set(dense) == set(factored) == {"gate", "up"}
    for module, row in dense.items():
        assert row.delta_m == pytest.approx(factored[module].delta_m, rel=1e-9)
        assert row.delta_d == pytest.approx(factored[module].delta_d, rel=1e-9)

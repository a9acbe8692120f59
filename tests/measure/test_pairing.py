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
from wdanalysis.checkpoints.tensors import Checkpoint, FormulaUpdate, Series, StoredTensor
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
        weights[f"model.layers.{layer}.attentions.0.proj_in.weight"] = torch.ones(8, 8)
    base = write_model(tmp_path / "base", weights)
    tuned = write_model(tmp_path / "tuned", moved(weights))
    (warning,) = [w for w in wd.compare(base, {"FT": tuned}).warnings if "attention projections" in w]
    assert "as self_attn.compressor is none that is known" in warning


@pytest.mark.parametrize("kind", ["GptOss", "Qwen3Moe"])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_a_formula_of_a_stack_of_experts_is_measured_expert_by_expert(
    kind: str, axis: Any, tmp_path: Path
) -> None:
    sizes = SIZES | {"head_dim": 4, "num_experts_per_tok": 1}
    sizes |= {"num_local_experts": 3} if kind == "GptOss" else {"num_experts": 3, "moe_intermediate_size": 24}
    torch.manual_seed(0)
    model = getattr(hf, f"{kind}ForCausalLM")(getattr(hf, f"{kind}Config")(**sizes)).double()
    name = "model.layers.1.mlp.experts.gate_up_proj"
    base_weights = {key: torch.randn_like(w) for key, w in model.state_dict().items()}
    update = torch.randn_like(base_weights[name]).numpy()
    tuned_weights = base_weights | {name: base_weights[name] + update}
    base_path, tuned_path = tmp_path / "base", tmp_path / "tuned"
    for folder, weights in ((base_path, base_weights), (tuned_path, tuned_weights)):
        write(folder / "model.safetensors", weights)
        model.config.save_pretrained(folder)
    factor = StoredTensor("factor", (1, 1), "F32", Path("adapter"), lambda *_: np.zeros((1, 1)))
    formula = FormulaUpdate(name, "LoRA", (factor,), lambda weight: weight + update)
    adapter = Checkpoint(Path("adapter"), "PEFT adapter (LoRA)", {}, formulas=(formula,), method="LoRA")
    methods = {
        "FT": Series(tuned_path, "FT", (open_checkpoint(tuned_path),)),
        "LoRA": Series(Path("adapter"), "LoRA", (adapter,)),
    }
    planned = plan(open_checkpoint(base_path), methods, modules=["gate", "up"], layers=[1])
    rows = [row for rows in stream(planned, axis) for row in rows]
    dense, calculated = (
        {(row.module, row.expert): (row.delta_m, row.delta_d) for row in rows if row.method == method}
        for method in methods
    )
    assert set(dense) == {(module, expert) for module in ("gate", "up") for expert in range(3)}
    for place, values in dense.items():
        assert calculated[place] == pytest.approx(values, rel=1e-9)

"""Folders that PEFT loads with our outputs, and PEFT's that give us theirs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from wdanalysis.checkpoints import open_checkpoint
from wdanalysis.decomposition import Axis
from wdanalysis.errors import CheckpointError, TrainingError
from wdanalysis.training.injection import AdapterConfig, count_parameters, inject
from wdanalysis.training.layers import adapted_modules
from wdanalysis.training.peft_folder import load_adapter, save_adapter

TOKENS = torch.arange(12).view(2, 6)


def new_model(kind: str = "llama") -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16)
        ).eval()
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=32,
            tie_word_embeddings=False,
        )
    ).eval()


def trained(config: AdapterConfig, kind: str = "llama") -> Any:
    """A model whose adapters have been somewhere."""
    model = new_model(kind)
    inject(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def in_peft(folder: Path, kind: str = "llama") -> nn.Module:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # keys that are missing or left over
        warnings.filterwarnings(
            "ignore", message="fan_in_fan_out is set|Model has `tie_word_embeddings=True`"
        )
        model: nn.Module = PeftModel.from_pretrained(new_model(kind), str(folder))
    return model.eval()


CONFIGS = {
    "LoRA": AdapterConfig("lora", 3, alpha=5.0, targets="q,k,v,up,down"),
    "DoRA": AdapterConfig("dora", 3, targets="q,k,v,up,down", dropout=0.1),
    "DoRA with lone magnitudes": AdapterConfig("dora", 3, targets="q,v", magnitude_targets="q,v,o,gate"),
    "VeRA": AdapterConfig("vera", 20, targets="q,k,up,down", seed=5),
    "LoRA of an embedding": AdapterConfig("lora", 3, targets="q,embed"),
    "DoRA of an embedding": AdapterConfig("dora", 3, targets="embed,lm_head"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_loads_what_we_save_with_the_same_outputs(
    config: AdapterConfig, kind: str, tmp_path: Path
) -> None:
    model = trained(config, kind)
    save_adapter(model, tmp_path / "adapter", base_name="some/base")
    torch.testing.assert_close(in_peft(tmp_path / "adapter", kind)(TOKENS).logits, model(TOKENS).logits)


PEFT_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 7},
    "DoRA": {"target_modules": ["q_proj", "down_proj"], "r": 3, "use_dora": True},
    "rslora": {"target_modules": ["q_proj", "v_proj"], "r": 4, "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "r": 4,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 5},
    },
    "embedding": {"target_modules": ["embed_tokens"], "r": 3, "use_dora": True},
    "modules to save": {"target_modules": ["q_proj"], "r": 3, "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("options", PEFT_OPTIONS.values(), ids=PEFT_OPTIONS)
def test_we_load_what_peft_saves_with_the_same_outputs(options: dict[str, Any], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    other = get_peft_model(new_model(), LoraConfig(init_lora_weights=False, **options)).eval()
    other.save_pretrained(tmp_path)
    model = new_model()
    names = load_adapter(model, tmp_path)
    torch.testing.assert_close(model(TOKENS).logits, other(TOKENS).logits)
    assert names == list(adapted_modules(model))


@pytest.mark.parametrize("saves_projections", [True, False])
def test_we_load_pefts_vera_also_without_its_projections(saves_projections: bool, tmp_path: Path) -> None:
    from peft import VeraConfig, get_peft_model

    torch.manual_seed(2)
    config = VeraConfig(
        r=20,
        target_modules=["q_proj", "down_proj"],
        projection_prng_key=3,
        save_projection=saves_projections,
        init_weights=False,
    )
    other = get_peft_model(new_model(), config).eval()
    other.save_pretrained(str(tmp_path))
    model = new_model()
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(TOKENS).logits, other(TOKENS).logits)


AXES: list[Axis] = ["out", "in"]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("method", ["lora", "dora", "vera", "dvora"])
def test_what_we_save_we_load_bit_by_bit(method: str, axis: Axis, tmp_path: Path) -> None:
    magnitudes = "all" if method in ("dora", "dvora") else None
    config = AdapterConfig(method, 4, targets="q,up", magnitude_targets=magnitudes, axis=axis, seed=3)
    model = trained(config)
    save_adapter(model, tmp_path, base_name="base")
    again = new_model()
    assert load_adapter(again, tmp_path) == list(adapted_modules(model))
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert count_parameters(again) == count_parameters(model)


@pytest.mark.parametrize("axis", AXES)
def test_lone_magnitudes_of_layers_wider_than_any_update_can_be_read(axis: Axis, tmp_path: Path) -> None:
    model = trained(AdapterConfig("dvora", 4, targets="q", magnitude_targets="q,up,down", axis=axis))
    save_adapter(model, tmp_path, base_name="base")
    assert len(open_checkpoint(tmp_path).updates) == 6
    again = new_model()
    load_adapter(again, tmp_path)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    ("method", "axis", "peft_type"),
    [("dvora", "out", "DVORA"), ("dora", "in", "DORA_IN"), ("dvora", "in", "DVORA_IN")],
)
def test_what_peft_does_not_know_it_refuses(method: str, axis: Axis, peft_type: str, tmp_path: Path) -> None:
    from peft import PeftModel

    save_adapter(trained(AdapterConfig(method, 4, axis=axis)), tmp_path, base_name="base")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == peft_type
    with pytest.raises((KeyError, ValueError)):
        PeftModel.from_pretrained(new_model(), str(tmp_path))


def test_dvora_keeps_veras_keys_and_the_magnitude(tmp_path: Path) -> None:
    save_adapter(trained(AdapterConfig("dvora", 4, targets="q")), tmp_path, base_name="base")
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert shapes["base_model.vera_A"] == (4, 16)
    assert shapes["base_model.vera_B"] == (16, 4)
    assert {name: shape for name, shape in shapes.items() if name.startswith(module)} == {
        f"{module}.vera_lambda_b": (16,),
        f"{module}.vera_lambda_d": (4,),
        f"{module}.lora_magnitude_vector": (16,),
    }


def test_a_wrapped_model_is_saved_under_plain_names(tmp_path: Path) -> None:
    model = trained(AdapterConfig("dora", 4))
    save_adapter(torch.compile(model), tmp_path, base_name="base")  # type: ignore[arg-type]
    torch.testing.assert_close(in_peft(tmp_path)(TOKENS).logits, model(TOKENS).logits)


def test_tensors_can_come_from_a_gathered_state_dict(tmp_path: Path) -> None:
    model = trained(AdapterConfig("lora", 4))
    state = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    save_adapter(model, tmp_path, base_name="base", state_dict=state)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    (name, *_) = adapted_modules(model)
    assert torch.equal(saved[f"base_model.model.{name}.lora_A.weight"], state[f"{name}.update.A"])


def test_nothing_of_this_machine_and_no_half_written_file_is_left(tmp_path: Path) -> None:
    save_adapter(trained(AdapterConfig("dora", 4)), tmp_path, base_name="some/base")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert str(tmp_path) not in (tmp_path / "adapter_config.json").read_text()


def test_a_model_without_adapters_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="The model has no adapters to save"):
        save_adapter(new_model(), tmp_path, base_name="base")


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    save_adapter(trained(AdapterConfig("dora", 4)), tmp_path, base_name="base")
    with pytest.raises(TrainingError, match=r"adapts '.*q_proj', which the model does not have"):
        load_adapter(new_model("gpt2"), tmp_path)


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_adapter(trained(AdapterConfig("dora", 4)), tmp_path, base_name="base")
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.lora_A.weight"))
    save_file(tensors | {name: torch.ones(4, 15)}, file)
    with pytest.raises(TrainingError, match=r"has the shape \(4, 15\), and the model's .* needs \(4, 16\)"):
        load_adapter(new_model(), tmp_path)


def test_a_folder_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises((TrainingError, CheckpointError), match=r"has no adapter_config\.json"):
        load_adapter(new_model(), tmp_path)


def test_a_model_with_adapters_takes_no_second(tmp_path: Path) -> None:
    model = trained(AdapterConfig("lora", 4))
    save_adapter(model, tmp_path, base_name="base")
    with pytest.raises(TrainingError, match="adapters already"):
        load_adapter(model, tmp_path)

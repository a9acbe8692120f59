"""Where adapters go, what is trained then, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from wdanalysis.errors import TrainingError
from wdanalysis.training.injection import AdapterConfig, count_parameters, inject
from wdanalysis.training.layers import DecomposedEmbedding, VeRAUpdate, adapted_modules, features
from wdanalysis.training.methods import ADAPTER_METHODS


def llama(device: str = "cpu") -> LlamaForCausalLM:
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=32,
            )
        )


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16)
    return GPT2LMHeadModel(config).eval()


TOKENS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q", "v"), {"q_proj", "v_proj"}),
        ("q,k,v,up,down", {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}),
        ("all", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["q_proj", "lm_head"], {"q_proj", "lm_head"}),
        (r"self_attn\.[qk]_proj$", {"q_proj", "k_proj"}),
        (r"layers\.1\.mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("embed", {"embed_tokens"}),
    ],
)
def test_targets_are_roles_or_regular_expressions_on_module_names(
    targets: str | list[str], expected: set[str]
) -> None:
    names = inject(llama(), AdapterConfig("lora", 2, targets=targets))
    assert {name.rpartition(".")[2] for name in names} == expected


def test_a_fused_projection_is_adapted_as_a_whole_and_conv1d_is_known() -> None:
    model = gpt2()
    assert inject(model, AdapterConfig("dora", 2, targets="q,up")) == [
        f"transformer.h.{layer}.{name}" for layer in (0, 1) for name in ("attn.c_attn", "mlp.c_fc")
    ]
    layer = adapted_modules(model)["transformer.h.0.attn.c_attn"]
    assert layer.stores_in_by_out
    assert features(layer.base) == (48, 16)


@pytest.mark.parametrize("method", ADAPTER_METHODS)
def test_only_the_adapters_are_trained_and_the_outputs_stay(method: str) -> None:
    model = llama()
    before = model(TOKENS).logits
    names = inject(model, AdapterConfig(method, 2))
    assert torch.equal(model(TOKENS).logits, before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    parts = ("A", "B") if ADAPTER_METHODS[method].update == "lora" else ("lambda_d", "lambda_b")
    expected = {f"{name}.update.{part}" for name in names for part in parts}
    if ADAPTER_METHODS[method].magnitude:
        expected |= {f"{name}.magnitude" for name in names}
    assert trained == expected


@pytest.mark.slow
@pytest.mark.parametrize("method", ADAPTER_METHODS)
def test_training_lowers_the_loss_and_changes_no_base_weight(method: str) -> None:
    model = llama()
    inject(model, AdapterConfig(method, 4, targets="all"))
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = model(TOKENS, labels=TOKENS).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.01
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in before.items())


def test_a_seed_gives_the_same_factors_whatever_was_drawn_before() -> None:
    factors = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        model = llama()
        torch.manual_seed(noise)
        inject(model, AdapterConfig("lora", 2, seed=7))
        factors.append([module.trained()[0] for module in adapted_modules(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*factors, strict=True))
    assert not torch.equal(factors[0][0], factors[0][2])


def test_magnitudes_can_be_trained_in_more_places_than_directions() -> None:
    """Table 6: m on Q K V O G U D, V on Q K V."""
    model = llama()
    inject(model, AdapterConfig("dora", 2, targets="q,k,v", magnitude_targets="q,k,v,o,gate,up,down"))
    modules = adapted_modules(model)
    assert len(modules) == 14
    assert sum(module.update is not None for module in modules.values()) == 6
    assert all(module.magnitude is not None for module in modules.values())
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None for module in modules.values() for p in module.trained())


def test_vera_shares_one_pair_of_projections_that_moves_with_the_model() -> None:
    model = llama()
    inject(model, AdapterConfig("vera", 64, targets="q,up,down"))
    updates = [m.update for m in adapted_modules(model).values() if isinstance(m.update, VeRAUpdate)]
    assert len({id(update.projection) for update in updates}) == 1
    assert tuple(updates[0].projection.A.shape) == (64, 24)
    assert tuple(updates[0].projection.B.shape) == (24, 64)
    model.to(torch.float64)
    assert len({update.projection.A.data_ptr() for update in updates}) == 1


@pytest.mark.parametrize("method", ADAPTER_METHODS)
def test_the_meta_device_counts_as_the_real_one(method: str) -> None:
    counts = []
    for device in ("cpu", "meta"):
        model = llama(device)
        inject(model, AdapterConfig(method, 3, targets="q,k,v,up,down"))
        counts.append(count_parameters(model))
    assert counts[0] == counts[1]
    shapes = [(16, 16), (8, 16), (8, 16), (24, 16), (16, 24)]
    of_method = {
        "lora": sum(3 * (out + width) for out, width in shapes),
        "vera": sum(3 + out for out, _ in shapes),
    }
    of_method["dora"] = of_method["lora"] + sum(out for out, _ in shapes)
    of_method["dvora"] = of_method["vera"] + sum(out for out, _ in shapes)
    assert counts[0].trainable == 2 * of_method[method]
    base = sum(p.numel() for p in llama("meta").parameters())
    assert counts[0].total == base + counts[0].trainable
    assert counts[0].percent == pytest.approx(100 * counts[0].trainable / counts[0].total)


def test_a_module_that_stands_in_two_places_is_adapted_in_both() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"q": shared, "k": shared, "v": nn.Linear(4, 4)})
    assert inject(model, AdapterConfig("lora", 2, targets="^[qkv]$")) == ["q", "v"]
    assert model["q"] is model["k"]
    assert model["q"] is adapted_modules(model)["q"]


def test_of_tied_embeddings_one_alone_can_be_adapted() -> None:
    model = gpt2()
    before = model(TOKENS).logits
    inject(model, AdapterConfig("dora", 2, targets="embed"))
    layer = adapted_modules(model)["transformer.wte"]
    assert isinstance(layer, DecomposedEmbedding)
    assert model.lm_head.weight is layer.weight
    assert torch.equal(model(TOKENS).logits, before)


def test_a_model_that_looks_at_a_layers_weight_finds_the_bases() -> None:
    model = llama()
    weight = model.model.layers[0].self_attn.q_proj.weight
    inject(model, AdapterConfig("dora", 2))
    assert model.model.layers[0].self_attn.q_proj.weight is weight


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"method": "dorra"}, r"'dorra' is no method; use one of lora, dora, vera, dvora\."),
        ({"method": "lora", "rank": 0}, r"Rank 0 is too small"),
        ({"method": "lora", "dropout": 1.0}, r"Dropout 1 is no probability under 1"),
        ({"method": "dora", "axis": "both"}, r"axis is 'out' or 'in', not 'both'"),
        ({"method": "lora", "full_gradient": True}, r"'lora' trains no magnitude"),
        ({"method": "vera", "magnitude_targets": "q"}, r"'vera' trains no magnitude"),
    ],
)
def test_a_configuration_that_means_nothing_is_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        AdapterConfig(**config)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            AdapterConfig("lora", targets="q_prj"),
            r"No module matches the targets 'q_prj'; the model has roles down, embed, gate, k, lm_head, o, q, up, v\.",
        ),
        (
            AdapterConfig("dora", 9, targets="v"),
            r"'model\.layers\.0\.self_attn\.v_proj' cannot be adapted\. Rank 9 does not fit a weight of 8 × 16; "
            r"use one from 1 to 8\.",
        ),
        (
            AdapterConfig("dora", targets="q,k", magnitude_targets="q"),
            r"'model\.layers\.0\.self_attn\.k_proj' is in the targets but not in the magnitude targets",
        ),
        (AdapterConfig("vera", targets="embed"), r"VeRA adapts no embeddings; leave them out of the targets"),
    ],
)
def test_what_the_model_cannot_give_is_refused_in_a_sentence(config: AdapterConfig, message: str) -> None:
    model = llama()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(TrainingError, match=message):
        inject(model, config)
    assert [name for name, _ in model.named_modules()] == before


def test_a_model_with_adapters_is_refused() -> None:
    model = llama()
    inject(model, AdapterConfig("lora", 2))
    with pytest.raises(TrainingError, match="The model has adapters already"):
        inject(model, AdapterConfig("dora", 2))


def test_the_output_projection_of_multihead_attention_which_is_never_called_is_left_alone() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    assert inject(model, AdapterConfig("lora", 2, targets="^.*$")) == ["linear1", "linear2"]

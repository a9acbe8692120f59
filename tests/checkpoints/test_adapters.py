"""Adapters that PEFT saved give the updates that PEFT would merge; what is no such update is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from wdanalysis.checkpoints import adapters, open_checkpoint, open_series
from wdanalysis.checkpoints.tensors import LowRankUpdate
from wdanalysis.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]


class Block(nn.Module):
    """One module of each kind that PEFT adapts by low rank."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.tokens = nn.Embedding(11, 6)
        self.q = nn.Linear(6, 4)
        self.v = nn.Linear(6, 4)
        self.c_attn = Conv1D(9, 6)
        self.conv = nn.Conv2d(3, 5, 2)
        self.head = nn.Linear(4, 3)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(4)


def adapted(targets: list[str], **options: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT corrects fan_in_fan_out and says so
        model = get_peft_model(
            Model(), LoraConfig(target_modules=targets, init_lora_weights=False, **options)
        )
    return model


def save_adapter(model: nn.Module, folder: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return folder


def assert_parsed_as_peft_has_it(updates: tuple[LowRankUpdate, ...], model: nn.Module) -> None:
    from peft.tuners.lora import Embedding, LoraLayer

    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert {update.module for update in updates} == layers.keys()
    for update in updates:
        layer = layers[update.module]
        assert update.scale == layer.scaling["default"]
        assert update.rank == layer.r["default"]
        is_embedding = isinstance(layer, Embedding)
        A = layer.lora_embedding_A["default"] if is_embedding else layer.lora_A["default"].weight
        B = layer.lora_embedding_B["default"] if is_embedding else layer.lora_B["default"].weight
        np.testing.assert_array_equal(update.A.read(), A.detach().numpy())
        np.testing.assert_array_equal(update.B.read(), B.detach().numpy())
        weight = layer.get_base_layer().weight
        features = (update.B.shape[0], update.A.shape[1])
        assert tuple(weight.shape[:2]) == (features[::-1] if update.in_by_out else features)
        if layer.use_dora["default"]:
            assert update.magnitude is not None
            m = layer.lora_magnitude_vector["default"].weight
            np.testing.assert_array_equal(update.magnitude.read(), m.detach().numpy())
        else:
            assert update.magnitude is None


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {"targets": ["q", "v"], "r": 2, "lora_alpha": 7},
    "rslora": {"targets": ["q", "v"], "r": 3, "lora_alpha": 7, "use_rslora": True},
    "rank pattern": {"targets": ["q", "v"], "r": 2, "rank_pattern": {"layers.0.v": 1, "v": 3}},
    "alpha pattern": {
        "targets": ["q", "v"],
        "r": 2,
        "alpha_pattern": {"^layers.1.q": 5, "layers.0.q": 6, "ayers.0.v": 9},
    },
    "both patterns": {
        "targets": ["q", "v"],
        "rank_pattern": {r"layers\.[01]\.q": 3},
        "alpha_pattern": {"layers.0.(q|v)": 4},
        "use_rslora": True,
    },
    "Conv1D": {"targets": ["c_attn"], "r": 2},
    "Embedding": {"targets": ["tokens"], "r": 2},
    "Conv2d": {"targets": ["conv"], "r": 2},
    "DoRA": {"targets": ["q", "v"], "r": 2, "use_dora": True},
    "DoRA of a Conv1D": {"targets": ["c_attn"], "r": 2, "use_dora": True},
    "DoRA of an Embedding": {"targets": ["tokens"], "r": 2, "use_dora": True},
    "DoRA of a Conv2d": {"targets": ["conv"], "r": 2, "use_dora": True},
    "Conv1D and Conv2d": {"targets": ["conv", "c_attn"], "r": 2},
    "mixed": {"targets": ["q", "tokens", "conv"], "r": 2},
}


@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_an_adapter_is_parsed_as_peft_has_it(tmp_path: Path, options: dict[str, Any], safe: bool) -> None:
    model = adapted(**options)
    save_adapter(model, tmp_path, safe_serialization=safe)
    checkpoint = open_checkpoint(tmp_path)
    assert_parsed_as_peft_has_it(checkpoint.updates, model)
    assert checkpoint.format == f"PEFT adapter ({'DoRA' if options.get('use_dora') else 'LoRA'})"
    assert checkpoint.is_adapter
    assert not checkpoint.tensors
    assert not checkpoint.notes


@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_an_unmerged_state_dict_is_the_same_adapter(tmp_path: Path, options: dict[str, Any]) -> None:
    model = adapted(**options)
    save_adapter(model, tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "unmerged.pt")
    checkpoint = open_checkpoint(tmp_path / "unmerged.pt")
    assert_parsed_as_peft_has_it(checkpoint.updates, model)
    assert not any("base_layer" in name or "lora" in name for name in checkpoint.tensors)
    assert any("Frozen tensors of the base were left out" in note for note in checkpoint.notes)


def test_of_several_patterns_the_one_counts_that_counts_when_peft_loads_the_adapter(tmp_path: Path) -> None:
    from peft import PeftModel

    save_adapter(adapted(["v"], r=2, alpha_pattern={"v": 3, "layers.0.v": 5}), tmp_path)
    loaded = PeftModel.from_pretrained(Model(), tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert_parsed_as_peft_has_it(checkpoint.updates, loaded)
    assert "In 1 of 2 modules, first layers.0.v, several keys of alpha_pattern match" in checkpoint.notes[0]


def test_modules_to_save_have_their_names_in_the_base(tmp_path: Path) -> None:
    model = adapted(["q"], r=2, modules_to_save=["head", "norm"])
    save_adapter(model, tmp_path)
    torch.save(model.state_dict(), tmp_path / "unmerged.pt")
    expected = {f"layers.{n}.head.{p}" for n in (0, 1) for p in ("weight", "bias")} | {
        "norm.weight",
        "norm.bias",
    }
    assert open_checkpoint(tmp_path).tensors.keys() == expected
    assert expected <= open_checkpoint(tmp_path / "unmerged.pt").tensors.keys()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_have_their_names_in_the_base(tmp_path: Path, bias: str) -> None:
    save_adapter(adapted(["q"], r=2, bias=bias), tmp_path)
    tensors = open_checkpoint(tmp_path).tensors
    assert "layers.0.q.bias" in tensors
    assert ("layers.0.v.bias" in tensors) == (bias == "all")


def test_a_resized_embedding_replaces_that_of_the_base(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules=["q_proj"], r=2))
    save_adapter(model, tmp_path, save_embedding_layers=True)
    assert open_checkpoint(tmp_path).tensors.keys() == {"model.embed_tokens.weight", "lm_head.weight"}


def test_the_configuration_is_kept(tmp_path: Path) -> None:
    save_adapter(adapted(["q"], r=2), tmp_path)
    configuration = json.loads((tmp_path / "adapter_config.json").read_text())
    configuration["base_model_name_or_path"] = "somebody/model"
    (tmp_path / "adapter_config.json").write_text(json.dumps(configuration))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == configuration
    assert tmp_path / "adapter_config.json" in checkpoint.files


def test_a_series_of_adapters(tmp_path: Path) -> None:
    for step in (20, 100):
        save_adapter(adapted(["q"], r=2), tmp_path / "lora" / f"checkpoint-{step}")
    series = open_series(tmp_path / "lora")
    assert [point.step for point in series.checkpoints] == [20, 100]
    assert series.name == "lora"


# Adapters written by hand: other spellings, and what PEFT itself never writes.

Write = Callable[..., Path]
PLAIN: Shapes = {"lora_A.weight": (2, 6), "lora_B.weight": (4, 2)}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write an adapter of one module ``layers.0.q``, with the given configuration or none."""

    def adapter(shapes: Shapes = PLAIN, prefix: str = "base_model.model.layers.0.q.", **config: Any) -> Path:
        tensors = {prefix + key: torch.rand(shape) for key, shape in shapes.items()}
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        if config:
            configuration = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
            (tmp_path / "adapter_config.json").write_text(json.dumps(configuration))
        return tmp_path

    return adapter


def test_an_adapter_without_its_configuration_asks_for_alpha(write: Write) -> None:
    folder = write()
    with pytest.raises(CheckpointError, match=r"without adapter_config\.json.*as alpha") as raised:
        open_checkpoint(folder)
    assert raised.value.parameter == "alpha"
    (update,) = open_checkpoint(folder / "adapter_model.safetensors", alpha=3).updates
    assert update.scale == 1.5


def test_a_configuration_wins_over_alpha_and_says_so(write: Write) -> None:
    checkpoint = open_checkpoint(write(use_dora=False), alpha=100)
    assert checkpoint.updates[0].scale == 2
    assert "alpha = 100 was not used" in checkpoint.notes[0]


def test_the_rank_is_that_of_the_tensors(write: Write) -> None:
    checkpoint = open_checkpoint(write(r=8, lora_alpha=8))
    assert checkpoint.updates[0].scale == 4
    assert "In 1 of 1 modules, first layers.0.q, the rank (2) differs" in checkpoint.notes[0]


@pytest.mark.parametrize(
    "magnitude",
    [
        "lora_magnitude_vector",
        "lora_magnitude_vector.weight",
        "lora_magnitude_vector.default",
        "lora_magnitude_vector.default.weight",
        "weight_m_wdecomp.weight",
        "magnitude",
        "weight_magnitude",
        "lora_magnitude",
    ],
)
def test_the_magnitude_has_several_spellings(write: Write, magnitude: str) -> None:
    (update,) = open_checkpoint(write({**PLAIN, magnitude: (4, 1)}), alpha=2).updates
    assert update.magnitude is not None
    assert update.module == "layers.0.q"


@pytest.mark.parametrize(
    ("A", "B"),
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora_A.mine.weight", "lora_B.mine.weight"),
        ("lora_A", "lora_B"),
        ("lora_a.weight", "lora_b.weight"),
    ],
)
def test_the_factors_have_several_spellings(write: Write, A: str, B: str) -> None:
    (update,) = open_checkpoint(write({A: (2, 6), B: (4, 2)}), alpha=2).updates
    assert (update.module, update.A.shape, update.B.shape) == ("layers.0.q", (2, 6), (4, 2))


def test_the_authors_fork_of_peft_calls_its_type_dora(write: Write) -> None:
    checkpoint = open_checkpoint(write({**PLAIN, "weight_m_wdecomp.weight": (4, 1)}, peft_type="DORA"))
    assert checkpoint.format == "PEFT adapter (DoRA)"


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "_orig_mod.base_model.model."])
def test_the_prefix_of_peft_is_taken_off(write: Write, prefix: str) -> None:
    assert open_checkpoint(write(prefix=f"{prefix}layers.0.q."), alpha=2).updates[0].module == "layers.0.q"


REFUSED: dict[str, tuple[Shapes, dict[str, Any], str]] = {
    "no B": ({"lora_A.weight": (2, 6)}, {}, r"has no lora_B for layers\.0\.q"),
    "no A": ({"lora_B.weight": (4, 2)}, {}, r"has no lora_A for layers\.0\.q"),
    "ranks that differ": (
        {"lora_A.weight": (2, 6), "lora_B.weight": (4, 3)},
        {},
        r"\(2, 6\) and lora_B \(4, 3\) of layers\.0\.q",
    ),
    "shards that were not gathered": (
        {"lora_A.weight": (0,), "lora_B.weight": (4, 2)},
        {},
        r"lora_A.weight' .* has the shape \(0,\)",
    ),
    "a magnitude of another length": (
        {**PLAIN, "lora_magnitude_vector": (6,)},
        {},
        r"magnitude of layers\.0\.q .* 6 numbers for 4",
    ),
    "DoRA without magnitude": (PLAIN, {"use_dora": True}, r"has no magnitude for layers\.0\.q"),
    "magnitude without DoRA": (
        {**PLAIN, "magnitude": (4,)},
        {"use_dora": False},
        r"has a magnitude for layers\.0\.q",
    ),
    "two adapters": (
        {
            "lora_A.a.weight": (2, 6),
            "lora_B.a.weight": (4, 2),
            "lora_A.b.weight": (2, 6),
            "lora_B.b.weight": (4, 2),
        },
        {},
        r"several adapters \(a, b\)",
    ),
    "unknown parts": ({**PLAIN, "lora_E": (2, 1)}, {}, r"holds '.*lora_E', which is no known part"),
    "one part twice": ({**PLAIN, "lora_A.default.weight": (2, 6)}, {}, r"holds the part '.*lora_A.*' twice"),
    "no factors": ({}, {"r": 2}, r"holds no lora_A and lora_B"),
    "kohya": (
        {"lora_down.weight": (2, 6), "lora_up.weight": (4, 2)},
        {},
        r"lora_down.*, which is no known part",
    ),
    "LoKr without configuration": (
        {"lokr_w1": (2, 2), "lokr_w2": (2, 3)},
        {},
        r"LoKr without adapter_config\.json",
    ),
    "PiSSA by iterations": (
        PLAIN,
        {"init_lora_weights": "pissa_niter_16"},
        r"initialised by pissa_niter_16, .* a randomised SVD .*path_initial_model_for_weight_conversion",
    ),
    "CorDA": (PLAIN, {"init_lora_weights": "corda"}, r"initialised by corda, .* calibration data"),
    "LoRA-GA": (PLAIN, {"init_lora_weights": "lora_ga"}, r"initialised by lora_ga, .* gradients"),
    "LoftQ": (PLAIN, {"init_lora_weights": "loftq"}, r"initialised by loftq, .* quantisation of its base"),
    "aLoRA": (PLAIN, {"alora_invocation_tokens": [1, 2]}, r"\(aLoRA\), so that no one weight"),
    "X-LoRA": (PLAIN, {"peft_type": "XLORA"}, r"type XLORA, which mixes"),
    "prompts": (
        {"prompt_embeddings": (2, 6)},
        {"peft_type": "PROMPT_TUNING"},
        r"PROMPT_TUNING, which changes no weight",
    ),
    "no alpha": (PLAIN, {"lora_alpha": None}, r"does not give lora_alpha"),
    "patterns that are no numbers": (PLAIN, {"alpha_pattern": {"q": "x"}}, r"does not give lora_alpha"),
    "a pattern that is no regular expression": (
        PLAIN,
        {"alpha_pattern": {"(q": 2}},
        r"is no regular expression",
    ),
    "AdaLoRA without E": (PLAIN, {"peft_type": "ADALORA"}, r"has no lora_E for layers\.0\.q"),
    "AdaLoRA without the rank that it began with": (
        {"lora_A": (2, 6), "lora_B": (4, 2), "lora_E": (2, 1)},
        {"peft_type": "ADALORA"},
        r"does not give init_r as a number",
    ),
    "another method's keys": (PLAIN, {"peft_type": "LOHA"}, r"lora_A\.weight', which is no known part"),
    "LoHa without a factor": (
        {"hada_w1_a": (4, 2), "hada_w1_b": (2, 6), "hada_w2_a": (4, 2)},
        {"peft_type": "LOHA", "alpha": 2},
        r"has no hada_w2_b for layers\.0\.q",
    ),
    "OFT of PEFT before 0.16": (
        {"oft_r": (2, 3, 3)},
        {"peft_type": "OFT"},
        r"oft_r', which is no part of PEFT's OFT as it is known here",
    ),
    "LoHa without alpha": (
        {"hada_w1_a": (4, 2), "hada_w1_b": (2, 6), "hada_w2_a": (4, 2), "hada_w2_b": (2, 6)},
        {"peft_type": "LOHA"},
        r"does not give alpha",
    ),
    "a setting that PEFT does not know": (
        {"hra_u": (6, 2)},
        {"peft_type": "HRA", "invented": 3},
        r"with invented, which PEFT .* does not know",
    ),
    "a type that PEFT does not know": (
        {"new_u": (6, 2)},
        {"peft_type": "NEWEST"},
        r"type NEWEST, which PEFT .* does not know",
    ),
} | {
    kind: (PLAIN, {"peft_type": kind}, rf"type {kind}, {reason}")
    for kind, reason in {
        "POLY": "which mixes its factors anew for each task",
        "LILY": "which mixes its factors anew for each token",
        "UNILORA": "which deals its numbers out",
        "TINYLORA": "which deals its vectors out",
        "FROD": "whose factors are computed from all weights",
        "BEFT": "which changes biases alone",
        "SHADOW": "which runs a second network",
    }.items()
}


@pytest.mark.parametrize(("shapes", "config", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_low_rank_update_is_refused(
    write: Write, shapes: Shapes, config: dict[str, Any], message: str
) -> None:
    folder = write(shapes, **config)
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(folder, alpha=2)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica", None])
def test_inits_that_leave_the_base_alone_are_read(write: Write, init: Any) -> None:
    assert len(open_checkpoint(write(init_lora_weights=init)).updates) == 1


def test_factors_in_float8_are_what_they_stand_for(write: Write) -> None:
    folder = write(use_dora=False)
    tensors = load_file(folder / "adapter_model.safetensors")
    small = {k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()}
    save_file(small, folder / "adapter_model.safetensors")
    (update,) = open_checkpoint(folder).updates
    assert update.A.precision == "F8_E4M3"
    expected = next(tensor for name, tensor in small.items() if "lora_A" in name)
    np.testing.assert_array_equal(update.A.read(), expected.half().numpy())


def test_an_adapter_folder_without_weights(write: Write) -> None:
    folder = write(use_dora=False)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has adapter_config\.json but no adapter_model\.safetensors"):
        open_checkpoint(folder)


def test_an_adapter_beside_a_model_asks_to_name_one(write: Write) -> None:
    folder = write(use_dora=False)
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"pass one of adapter_model\.safetensors, model\.safetensors\."
    ):
        open_checkpoint(folder)
    assert open_checkpoint(folder / "adapter_model.safetensors").updates
    assert list(open_checkpoint(folder / "model.safetensors").tensors) == ["w"]


def test_a_format_is_read_once_it_is_in_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def read(source: adapters.AdapterSource) -> adapters.Adapter:
        seen.append(sorted(source.tensors))
        return adapters.Adapter((), dict(source.tensors), (), format="new")

    new = adapters.AdapterFormat("new", lambda names: any("new_factor" in name for name in names), read)
    monkeypatch.setattr(adapters, "FORMATS", (new, *adapters.FORMATS))
    save_file({"q.new_factor": torch.ones(2)}, tmp_path / "adapter.safetensors")
    checkpoint = open_checkpoint(tmp_path / "adapter.safetensors")
    assert seen == [["q.new_factor"]]
    assert checkpoint.is_adapter
    assert checkpoint.format == "new adapter (LoRA)"

"""LoRA's variants, the initialisations that change the base and LoRA on experts, against what PEFT merges."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import BdLoraConfig, KasaConfig, LoraConfig
from peft_adapters import ATTENTION, Model, assert_merges_as_peft, trained
from safetensors.torch import load_file, save_file
from torch import nn

import wdanalysis as wd
from wdanalysis.checkpoints import open_checkpoint, open_series
from wdanalysis.errors import CheckpointError

CONVOLUTIONS = ["conv1", "conv2", "conv3", "pointwise"]
EVERY_MODULE = [*ATTENTION, *CONVOLUTIONS, "embed_tokens", "c_attn"]

EXACT: dict[str, dict[str, Any]] = {
    "everywhere": {"target_modules": EVERY_MODULE},
    "DoRA everywhere": {"target_modules": EVERY_MODULE, "use_dora": True},
    "biases of lora_B": {"target_modules": [*ATTENTION, *CONVOLUTIONS], "lora_bias": True},
    "blocks": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "use_bdlora": BdLoraConfig(
            target_modules_bd_a=["down_proj"], target_modules_bd_b=["q_proj"], nblocks=2, match_strict=False
        ),
    },
    "single tokens": {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [2, 5, 19]}},
    "minor components": {"target_modules": ATTENTION, "init_lora_weights": "orthogonal"},
}

OF_ANOTHER_BASE: dict[str, dict[str, Any]] = {
    "PiSSA": {"init_lora_weights": "pissa", "lora_alpha": 4},
    "PiSSA with another scale": {"init_lora_weights": "pissa", "lora_alpha": 7, "use_rslora": True},
    "PiSSA of a Conv1D": {"init_lora_weights": "pissa", "target_modules": ["c_attn"]},
    "DoRA from PiSSA": {"init_lora_weights": "pissa", "use_dora": True},
    "OLoRA": {"init_lora_weights": "olora", "lora_alpha": 6},
    "KaSA": {"kasa_config": KasaConfig(), "lora_alpha": 6},
}


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
def test_what_lora_does_to_each_weight_is_what_peft_merges(tmp_path: Path, options: dict[str, Any]) -> None:
    assert_merges_as_peft(tmp_path, *trained(tmp_path, LoraConfig(r=4, lora_alpha=6, **options)))


@pytest.mark.parametrize("options", OF_ANOTHER_BASE.values(), ids=OF_ANOTHER_BASE)
def test_what_an_initialisation_took_out_of_the_base_is_computed_again(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    config = LoraConfig(**{"r": 4, "target_modules": ATTENTION, **options})
    files = trained(tmp_path, config, load_as=torch.float32)  # in which PEFT decomposes
    assert_merges_as_peft(tmp_path, *files, rtol=2e-6)


def test_that_the_base_was_changed_is_said(tmp_path: Path) -> None:
    _, adapter, _ = trained(
        tmp_path, LoraConfig(target_modules=ATTENTION, init_lora_weights="pissa"), load_as=torch.float32
    )
    assert any(
        "was initialised by pissa: what that took out" in note for note in open_checkpoint(adapter).notes
    )


def test_an_adapter_that_peft_converted_needs_no_base(tmp_path: Path) -> None:
    """`path_initial_model_for_weight_conversion` writes s(BA − B₀A₀) as a LoRA of twice the rank."""
    assert open_checkpoint(_converted(tmp_path)).updates[0].rank == 8


def _converted(folder: Path) -> Path:
    from peft import get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    model = get_peft_model(Model(), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(folder / "start"))
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(
        str(folder / "adapter"), path_initial_model_for_weight_conversion=str(folder / "start")
    )
    return folder / "adapter"


def test_a_module_with_a_magnitude_alone_is_its_base_rescaled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    name = "layers.0.self_attn.q_proj"
    w0, m = torch.randn(6, 4).double(), torch.rand(6).double() + 0.5
    save_file({f"{name}.weight": w0}, tmp_path / "base.safetensors")
    (tmp_path / "adapter").mkdir()
    tensors = {f"base_model.model.{name}.lora_magnitude_vector": m}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "use_dora": True}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    compared = wd.compare(tmp_path / "base.safetensors", tmp_path / "adapter")
    row = compared.metrics.iloc[0]
    expected = m[:, None] * w0 / w0.norm(dim=1, keepdim=True)
    assert row.delta_m == pytest.approx(wd.delta_m(w0, expected), rel=1e-9)
    assert row.delta_d == pytest.approx(0, abs=1e-12)
    assert open_checkpoint(tmp_path / "adapter").method == "DoRA"


def test_pooled_inputs_of_qalora_are_spread_as_its_forward_pools_them(tmp_path: Path) -> None:
    from peft.tuners.lora.variants import QALoraLinearVariant

    torch.manual_seed(0)
    w0, A, B = torch.randn(6, 8).double(), torch.randn(2, 2).double(), torch.randn(6, 2).double()

    layer = SimpleNamespace(  # as much of PEFT's layer as its forward looks at
        lora_A={"default": nn.Linear(2, 2, bias=False).double()},
        lora_B={"default": nn.Linear(2, 6, bias=False).double()},
        lora_dropout={"default": nn.Identity()},
        scaling={"default": 1.5},
        qalora_group_size={"default": 4},
        in_features=8,
        training=False,
    )
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(A)
        layer.lora_B["default"].weight.copy_(B)
        x, nothing = torch.eye(8).double(), torch.zeros(8, 6).double()
        update = QALoraLinearVariant.forward(layer, "default", x, nothing).T
    save_file({"q_proj.weight": w0}, tmp_path / "base.safetensors")
    (tmp_path / "adapter").mkdir()
    tensors = {f"base_model.model.q_proj.lora_{part}.weight": t for part, t in (("A", A), ("B", B))}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_qalora": True, "qalora_group_size": 4}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    row = wd.compare(tmp_path / "base.safetensors", tmp_path / "adapter", modules="all").metrics.iloc[0]
    assert row.delta_d == pytest.approx(wd.delta_d(w0, w0 + update), rel=1e-9)


class Experts(nn.Module):
    def __init__(self, up: tuple[int, int], down: tuple[int, int], *, is_transposed: bool) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(0.1 * torch.randn(3, *up))
        self.down_proj = nn.Parameter(0.1 * torch.randn(3, *down))
        self.is_transposed = is_transposed


class MoE(nn.Module):
    """Stacks of three experts, stored as out × in or in × out, and a router."""

    def __init__(self, up: tuple[int, int], down: tuple[int, int], *, is_transposed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": nn.Module()}) for _ in range(2)])
        for layer in self.layers:
            layer["mlp"].experts = Experts(up, down, is_transposed=is_transposed)
            layer["mlp"].router = nn.Linear(4, 3)


STACKS: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "out × in": (lambda: MoE((12, 4), (4, 6)), None),
    "in × out": (lambda: MoE((4, 12), (6, 4), is_transposed=True), None),
    "square, out × in": (lambda: MoE((12, 4), (4, 4)), None),
    "square, in × out": (lambda: MoE((4, 8), (4, 4), is_transposed=True), "gpt_oss"),
}


@pytest.mark.parametrize(("make", "model_type"), STACKS.values(), ids=STACKS)
@pytest.mark.parametrize(
    "targets", [["experts.gate_up_proj", "experts.down_proj"], ["mlp.experts.down_proj", "router.weight"]]
)
def test_experts_are_adapted_as_peft_merges_them(
    tmp_path: Path, make: Callable[[], nn.Module], model_type: str | None, targets: list[str]
) -> None:
    config = LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=targets)
    base, adapter, merged = trained(tmp_path, config, make)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert_merges_as_peft(tmp_path, base, adapter, merged)


def test_before_0_19_the_first_side_of_a_stack_was_taken_for_its_inputs(tmp_path: Path) -> None:
    """As PEFT 0.18 had it: A over the second dimension of the parameter, B over the third."""
    torch.manual_seed(0)
    stack, A, B = (torch.randn(shape).double() for shape in ((3, 4, 4), (6, 4), (4, 6)))
    update = torch.einsum("ore,eri->eio", B.reshape(4, 2, 3), A.reshape(3, 2, 4)) * 1.5
    _assert_stack(tmp_path, stack, A, B, stack + update, peft_version="0.18.1")


def test_unsloth_writes_b_expert_after_expert(tmp_path: Path) -> None:
    """As its `extract_moe_lora_weights_for_grouped_mm` splits B: (out, expert, rank)."""
    torch.manual_seed(0)
    stack, A, B = (torch.randn(shape).double() for shape in ((3, 5, 4), (6, 4), (5, 6)))
    update = torch.einsum("oer,eri->eoi", B.reshape(5, 3, 2), A.reshape(3, 2, 4)) * 1.5
    mapping = {"base_model_class": "Qwen3MoeForCausalLM", "unsloth_fixed": True}
    adapter = _assert_stack(
        tmp_path, stack, A, B, stack + update, peft_version="0.19.0", auto_mapping=mapping
    )
    assert any("was written by Unsloth" in note for note in open_checkpoint(adapter).notes)


def _assert_stack(
    folder: Path, stack: torch.Tensor, A: torch.Tensor, B: torch.Tensor, expected: torch.Tensor, **config: Any
) -> Path:
    from wdanalysis.merging.merge import merge

    name = "layers.0.mlp.experts"
    save_file({f"{name}.down_proj": stack}, folder / "base.safetensors")
    adapter = folder / "adapter"
    adapter.mkdir()
    tensors = {f"base_model.model.{name}.lora_{part}.weight": t for part, t in (("A", A), ("B", B))}
    save_file(tensors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_parameters": ["experts.down_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    merged = merge(folder / "base.safetensors", adapter, folder / "merged")
    torch.testing.assert_close(load_file(merged.files[0])[f"{name}.down_proj"], expected)
    return adapter


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_an_adapter_of_fused_experts_is_read_against_experts_that_are_stored_apart(
    tmp_path: Path, names: tuple[str, str, str]
) -> None:
    """transformers 5 fuses in memory what Mixtral's files hold expert by expert."""
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=targets)
    fused, adapter, merged = trained(tmp_path, config, lambda: MoE((12, 4), (4, 6)))

    def apart(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight": weight.clone()
            for layer in range(2)
            for expert in range(3)
            for name, weight in zip(
                names,
                (
                    *state[f"layers.{layer}.mlp.experts.gate_up_proj"][expert].chunk(2),
                    state[f"layers.{layer}.mlp.experts.down_proj"][expert],
                ),
                strict=True,
            )
        }

    base = tmp_path / "apart.safetensors"
    save_file(apart(load_file(fused)), base)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors = {
        k.replace("base_model.model.layers", "base_model.model.model.layers"): t for k, t in tensors.items()
    }
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert_merges_as_peft(tmp_path, base, adapter, apart(dict(merged)))


def test_factors_that_fit_no_parameter_are_refused(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    _, adapter, _ = trained(tmp_path, config, lambda: MoE((12, 4), (4, 6)))
    save_file({"layers.0.mlp.experts.down_proj": torch.ones(3, 9, 9)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"do not fit its down_proj: is it the model"):
        wd.compare(tmp_path / "other.safetensors", adapter, modules="all")


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12}
    config = LlamaConfig(**sizes, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2)
    return LlamaForCausalLM(config)


def test_repeated_layers_have_their_new_numbers_and_their_own_updates(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], layer_replication=[[0, 2], [1, 3]])
    base, adapter, merged = trained(tmp_path, config, _llama)
    assert_merges_as_peft(tmp_path, base, adapter, merged)
    before = load_file(base)
    rows = wd.compare(base, adapter, modules="q").metrics.set_index("layer")
    assert list(rows.index) == [0, 1, 2, 3]
    for layer, original in enumerate([0, 1, 1, 2]):
        name = "model.layers.{}.self_attn.q_proj.weight"
        w0, w = before[name.format(original)], merged[name.format(layer)]
        assert rows.delta_d[layer] == pytest.approx(wd.delta_d(w0, w), rel=1e-9)


def test_layers_that_the_base_does_not_have_cannot_be_repeated(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 3]])
    base, adapter, _ = trained(tmp_path, config, _llama)
    path = adapter / "adapter_config.json"
    settings = json.loads(path.read_text())
    for ranges, message in (
        ([[0, 9]], r"repeats layer 3, which is not in"),
        ([[2, 1]], r"no list of ranges"),
    ):
        path.write_text(json.dumps({**settings, "layer_replication": ranges}))
        with pytest.raises(CheckpointError, match=message):
            wd.compare(base, adapter)


def test_adapters_that_repeat_other_layers_are_not_compared_at_once(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 3]])
    base, adapter, _ = trained(tmp_path, config, _llama)
    with pytest.raises(CheckpointError, match=r"do not repeat the same layers"):
        wd.compare(base, {"stretched": adapter, "FT": base})


def test_the_adapters_that_an_x_lora_mixes_are_no_steps(tmp_path: Path) -> None:
    from peft import XLoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"])
    for name in "ab":
        get_peft_model(_llama(), config).save_pretrained(str(tmp_path / name))
    model = _llama()
    model.config.use_cache = False
    mixed = {"0": str(tmp_path / "a"), "1": str(tmp_path / "b")}
    x = get_peft_model(model, XLoraConfig(task_type="CAUSAL_LM", hidden_size=8, adapters=mixed))
    x.save_pretrained(str(tmp_path / "x"))
    with pytest.raises(CheckpointError, match=r"type XLORA, which mixes .* pass one of the adapters"):
        open_series(tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"is one of the adapters of an X-LoRA"):
        open_series(tmp_path / "x" / "0")

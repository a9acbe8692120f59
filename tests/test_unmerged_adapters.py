"""Adapters that PEFT makes, compared without merging, against what PEFT itself merges in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import wdanalysis as wd
from wdanalysis.decomposition import Axis


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(24, 24), nn.Linear(24, 16)
        self.c_attn = Conv1D(30, 24)
        self.conv = nn.Conv2d(3, 8, 2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(40, 24)
        self.layers = nn.ModuleList([Block() for _ in range(2)])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(tokens)


CONFIGS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "rank and alpha patterns": {
        "rank_pattern": {"layers.1.q_proj": 7, "v_proj": 2},
        "alpha_pattern": {r"layers\.0\.q_proj": 3},
    },
    "DoRA": {"use_dora": True},
    "DoRA with rsLoRA": {"use_dora": True, "use_rslora": True},
}
TARGETS = ["q_proj", "v_proj", "c_attn", "conv", "embed_tokens"]


@pytest.fixture(params=CONFIGS)
def tuned(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A base file, an adapter that was moved from its start, and the weights that PEFT merges from them in float64."""
    torch.manual_seed(0)
    model = Model()
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    save_file(base, tmp_path / "base.safetensors")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **CONFIGS[request.param])
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_magnitude" in name:
                weight.mul_(1 + 0.02 * torch.randn_like(weight))
            elif "lora_" in name:
                weight.copy_(0.02 * torch.randn_like(weight))
    adapted.save_pretrained(str(tmp_path / "adapter"))

    exact = Model().double()
    exact.load_state_dict({name: weight.double() for name, weight in base.items()})
    merged = PeftModel.from_pretrained(exact, str(tmp_path / "adapter")).double().merge_and_unload()
    return tmp_path / "base.safetensors", tmp_path / "adapter", dict(merged.state_dict())


def as_linear(name: str, weight: torch.Tensor) -> torch.Tensor:
    """The weight as nn.Linear would store it, out × in."""
    return weight.T if "c_attn" in name or "embed" in name else weight.flatten(1)


def assert_radial_parts(row: Any, w0: torch.Tensor, w: torch.Tensor, axis: Axis) -> None:
    """The columns of ρ and of what turning adds, by their definitions."""
    dim = 1 if axis == "out" else 0
    rho = (w0 * (w - w0)).sum(dim) / w0.norm(dim=dim)
    turned = w.norm(dim=dim) * (1 - torch.nn.functional.cosine_similarity(w, w0, dim=dim))
    near = {"rel": 1e-6, "abs": 1e-9}
    assert row.mean_rho == pytest.approx(float(rho.mean()), **near), row.name
    assert row.mean_abs_rho == pytest.approx(float(rho.abs().mean()), **near), row.name
    assert row.centrifugal == pytest.approx(float(turned.mean()), **near), row.name
    assert row.radial_share == pytest.approx(float(rho.square().sum() / (w - w0).square().sum()), rel=1e-5)
    assert row.delta_m_signed == pytest.approx(row.mean_rho + row.centrifugal, rel=1e-9, abs=1e-15)
    if row.update == "low-rank":
        assert row.shrink == pytest.approx(-float((w0 * (w - w0)).sum() / (w0 * w0).sum()), **near)


@pytest.mark.parametrize("axis", ["out", "in"])
def test_unmerged_adapters_agree_with_peft_merging_them_in_float64(
    tuned: tuple[Path, Path, dict[str, torch.Tensor]], axis: Axis
) -> None:
    base_path, adapter, merged = tuned
    compared = wd.compare(base_path, {"tuned": adapter}, modules="all", axis=axis)
    from safetensors.torch import load_file

    base = load_file(base_path)
    assert len(compared.metrics) == 2 * 4 + 1
    for row in compared.metrics.itertuples():
        w0, w = as_linear(row.name, base[row.name]), as_linear(row.name, merged[row.name])
        assert row.delta_m == pytest.approx(wd.delta_m(w0, w, axis), rel=1e-6), row.name
        assert row.delta_d == pytest.approx(wd.delta_d(w0, w, axis), rel=1e-6), row.name
        norm = float((w - w0).norm())
        assert row.update_norm == pytest.approx(norm, rel=1e-6), row.name
        assert row.rel_update_norm == pytest.approx(norm / float(w0.double().norm()), rel=1e-6), row.name
        assert_radial_parts(row, w0.double(), w.double(), axis)
        assert (row.vectors, row.length) == (w0.shape if axis == "out" else w0.shape[::-1])


def test_an_adapter_at_its_start_changes_nothing(tmp_path: Path) -> None:
    model = Model()
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path / "adapter"))
    compared = wd.compare(tmp_path / "base.safetensors", tmp_path / "adapter")
    assert compared.metrics[["delta_m", "delta_d", "update_norm"]].eq(0).all(axis=None)
    assert compared.metrics["unchanged_fraction"].eq(1).all()
    assert any("identical to BASE" in warning for warning in compared.warnings)


def test_replaced_modules_of_an_adapter_are_compared_as_whole_matrices(tmp_path: Path) -> None:
    model = Model()
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    save_file(base, tmp_path / "base.safetensors")
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["v_proj"])
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "modules_to_save" in name:
                weight.add_(0.1)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    compared = wd.compare(tmp_path / "base.safetensors", tmp_path / "adapter", modules="all")
    v = compared.metrics.set_index("name").loc["layers.0.v_proj.weight"]
    w0 = base["layers.0.v_proj.weight"]
    assert v.delta_d == pytest.approx(wd.delta_d(w0, w0 + 0.1), rel=1e-5)
    assert v.tuned_dtype == "F32"


def test_steps_of_several_methods_share_one_pass_and_keep_their_own_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = {"layers.0.self_attn.q_proj.weight": torch.randn(12, 10)}
    save_file(base, tmp_path / "base.safetensors")
    expected = {}
    for method, rank in (("a", 2), ("b", 3)):
        for step in (5, 10):
            folder = tmp_path / method / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            A, B = torch.randn(rank, 10), 0.1 * torch.randn(12, rank)
            module = "base_model.model.layers.0.self_attn.q_proj"
            save_file(
                {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B},
                folder / "adapter_model.safetensors",
            )
            LoraConfig(r=rank, lora_alpha=4, target_modules=["q_proj"]).save_pretrained(str(folder))
            (w0,) = base.values()
            expected[method, step] = wd.delta_d(w0, w0.double() + 4 / rank * B.double() @ A.double())
    compared = wd.compare(tmp_path / "base.safetensors", [tmp_path / "a", tmp_path / "b"])
    found = compared.metrics.set_index(["method", "step"])["delta_d"]
    assert dict(found) == {key: pytest.approx(value, rel=1e-9) for key, value in expected.items()}


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("magnitude_axis", ["out", "in"])
@pytest.mark.parametrize("modules", ["all", "k"])
def test_magnitudes_of_a_fused_projection_rescale_all_of_it_whatever_part_is_measured(
    tmp_path: Path, axis: Axis, magnitude_axis: Axis, modules: str
) -> None:
    torch.manual_seed(0)
    size, name = 12, "h.0.attn.c_attn.weight"
    W0 = torch.randn(size, 3 * size).double()  # GPT-2 stores in × out
    A, B = torch.randn(2, size).double(), 0.1 * torch.randn(3 * size, 2).double()
    V = W0.T + 2 * B @ A
    dim = 1 if magnitude_axis == "out" else 0
    m = V.norm(dim=dim) * (1 + 0.1 * torch.randn(V.shape[1 - dim]).double())
    W = V * m.unsqueeze(dim) / V.norm(dim=dim, keepdim=True)

    save_file({name: W0}, tmp_path / "base.safetensors")
    prefix = "base_model.model.h.0.attn.c_attn.lora_"
    factors = {f"{prefix}A.weight": A, f"{prefix}B.weight": B, f"{prefix}magnitude_vector": m}
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA" if magnitude_axis == "out" else "DORA_IN", "r": 2, "lora_alpha": 4}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))

    base, tuned = tmp_path / "base.safetensors", {"DoRA": tmp_path / "adapter"}
    metrics = wd.compare(base, tuned, axis=axis, modules=modules).metrics
    assert list(metrics["module"]) == (["q", "k", "v"] if modules == "all" else ["k"])
    for row in metrics.itertuples():
        of_part = slice("qkv".index(row.module) * size, ("qkv".index(row.module) + 1) * size)
        w0, w = W0.T[of_part], W[of_part]
        assert row.delta_m == pytest.approx(wd.delta_m(w0, w, axis), rel=1e-9)
        assert row.delta_d == pytest.approx(wd.delta_d(w0, w, axis), rel=1e-9)
        assert row.update_norm == pytest.approx(float((w - w0).norm()), rel=1e-9)

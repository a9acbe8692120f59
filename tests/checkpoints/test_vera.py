"""VeRA adapters that PEFT saved give the updates that PEFT would merge; with a magnitude they are DVoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import wdanalysis as wd
from wdanalysis.checkpoints import open_checkpoint
from wdanalysis.decomposition import Axis
from wdanalysis.errors import CheckpointError, ComparisonError


class Model(nn.Module):
    """Modules of three shapes, so that the shared projections are larger than any one of them needs."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.down_proj = nn.Linear(12, 10), nn.Linear(20, 8)
        self.c_attn = Conv1D(18, 12)


@pytest.fixture
def base() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: weight.clone() for name, weight in Model().state_dict().items()}


@pytest.fixture
def adapter(base: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """A VeRA adapter in PEFT's own format, beside the base that it was trained on."""
    save_file(base, tmp_path / "base.safetensors")
    model = Model()
    model.load_state_dict(base)
    adapted = get_peft_model(model, VeraConfig(r=6, target_modules=["q_proj", "down_proj", "c_attn"]))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "vera_lambda" in name:
                weight.add_(0.3 * torch.randn_like(weight))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def merged_by_peft(base: dict[str, torch.Tensor], adapter: Path) -> dict[str, torch.Tensor]:
    model = Model().double()
    model.load_state_dict({name: weight.double() for name, weight in base.items()})
    return dict(PeftModel.from_pretrained(model, str(adapter)).double().merge_and_unload().state_dict())


def as_linear(name: str, weight: torch.Tensor) -> torch.Tensor:
    return weight.T if "c_attn" in name else weight


@pytest.mark.parametrize("axis", ["out", "in"])
def test_unmerged_vera_agrees_with_peft_merging_it_in_float64(
    base: dict[str, torch.Tensor], adapter: Path, axis: Axis
) -> None:
    merged = merged_by_peft(base, adapter)
    metrics = wd.compare(
        adapter.parent / "base.safetensors", {"VeRA": adapter}, modules="all", axis=axis
    ).metrics
    assert set(metrics["name"]) == {name for name in base if name.endswith("weight")}
    for row in metrics.itertuples():
        w0, w = as_linear(row.name, base[row.name]), as_linear(row.name, merged[row.name])
        assert row.delta_m == pytest.approx(wd.delta_m(w0, w, axis), rel=1e-6), row.name
        assert row.delta_d == pytest.approx(wd.delta_d(w0, w, axis), rel=1e-6), row.name


def test_with_a_magnitude_it_is_dvora_whose_rows_have_that_magnitude(
    base: dict[str, torch.Tensor], adapter: Path
) -> None:
    merged = merged_by_peft(base, adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    magnitudes = {
        name: torch.rand(as_linear(name, weight).shape[0]) + 0.5
        for name, weight in base.items()
        if name.endswith("weight")
    }
    for name, m in magnitudes.items():
        tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_magnitude_vector"] = m
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert open_checkpoint(adapter).format == "PEFT adapter (DVoRA)"
    metrics = wd.compare(adapter.parent / "base.safetensors", {"DVoRA": adapter}, modules="all").metrics
    for row in metrics.itertuples():
        w0, v = as_linear(row.name, base[row.name]), as_linear(row.name, merged[row.name])
        w = magnitudes[row.name][:, None] * v / v.norm(dim=1, keepdim=True)
        assert row.delta_m == pytest.approx(wd.delta_m(w0, w), rel=1e-6), row.name
        assert row.delta_d == pytest.approx(wd.delta_d(w0, w), rel=1e-6), row.name


def test_an_unmerged_state_dict_is_the_same_adapter(base: dict[str, torch.Tensor], adapter: Path) -> None:
    model = PeftModel.from_pretrained(Model(), str(adapter))
    torch.save(model.state_dict(), adapter.parent / "unmerged.pt")
    found = {update.module: update for update in open_checkpoint(adapter.parent / "unmerged.pt").updates}
    for update in open_checkpoint(adapter).updates:
        assert (found[update.module].A.read() == update.A.read()).all()
        assert (found[update.module].B.read() == update.B.read()).all()


def test_factors_in_bfloat16_are_widened(base: dict[str, torch.Tensor], adapter: Path) -> None:
    tensors = {k: v.bfloat16() for k, v in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    (q,) = (update for update in open_checkpoint(adapter).updates if update.module == "q_proj")
    prefix = "base_model.model.q_proj.vera_lambda_"
    A = tensors[f"{prefix}d"].float()[:, None] * tensors["base_model.vera_A"].float()
    B = tensors[f"{prefix}b"].float()[:, None] * tensors["base_model.vera_B"].float()[:10]
    assert (q.A.read() == A.numpy()).all()
    assert (q.B.read() == B.numpy()).all()
    assert q.scale == 1.0


@pytest.mark.parametrize("seed", [0, 77])
def test_projections_that_were_not_saved_are_drawn_again_from_their_seed(
    base: dict[str, torch.Tensor], tmp_path: Path, seed: int
) -> None:
    save_file(base, tmp_path / "base.safetensors")
    model = Model()
    model.load_state_dict(base)
    targets = ["q_proj", "down_proj", "c_attn"]
    config = VeraConfig(r=6, target_modules=targets, save_projection=False, projection_prng_key=seed)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "vera_lambda" in name:
                weight.add_(0.3 * torch.randn_like(weight))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    assert "base_model.vera_A" not in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    merged = merged_by_peft(base, tmp_path / "adapter")
    metrics = wd.compare(tmp_path / "base.safetensors", tmp_path / "adapter", modules="all").metrics
    assert len(metrics) == 3
    for row in metrics.itertuples():
        w0, w = as_linear(row.name, base[row.name]), as_linear(row.name, merged[row.name])
        assert row.delta_m == pytest.approx(wd.delta_m(w0, w), rel=1e-6), row.name
        assert row.delta_d == pytest.approx(wd.delta_d(w0, w), rel=1e-6), row.name


def test_a_seed_without_scaling_vectors_is_refused(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({"base_model.vera_A": tensors["base_model.vera_A"]}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no vera_lambda_b and vera_lambda_d"):
        open_checkpoint(adapter)


def test_projections_without_their_seed_are_asked_for(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: t for name, t in tensors.items() if "lambda" in name}, adapter / "adapter_model.safetensors"
    )
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"without vera_A and vera_B.*save_projection=True"):
        open_checkpoint(adapter)


def test_a_vector_that_does_not_fit_the_projections_is_named(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.q_proj.vera_lambda_d"] = torch.ones(5)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj\.vera_lambda_d' .* does not fit 'base_model\.vera_A'"):
        open_checkpoint(adapter)


def test_an_adapter_of_another_model_is_refused(adapter: Path) -> None:
    save_file({"q_proj.weight": torch.ones(9, 12)}, adapter.parent / "other.safetensors")
    with pytest.raises(ComparisonError, match="is it the model that the adapter was trained on"):
        wd.compare(adapter.parent / "other.safetensors", adapter, modules="all")


def test_vera_needs_no_configuration(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").unlink()
    checkpoint = open_checkpoint(adapter)
    assert {update.rank for update in checkpoint.updates} == {config["r"]}

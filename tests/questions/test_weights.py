"""What an adapter's weights say without a base: the singular values of the matrices that nobody builds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import llama, write, write_lora, write_model
from figure_tables import faults
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import wdanalysis as wd
from wdanalysis.cli import app
from wdanalysis.errors import CheckpointError
from wdanalysis.figures import style, weights
from wdanalysis.questions.weights import LEAST_FAMILY, OUTLYING, _robust_z, singular_values


def peft_llama(folder: Path, *, layers: int = 9, **of_lora: object) -> tuple[Path, dict[str, np.ndarray]]:
    """A Llama's adapter as PEFT saves it, and each ΔW as PEFT's own layer forms it, in float64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    targets = ["q_proj", "v_proj", "down_proj"]
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=5, lora_alpha=7, target_modules=targets, **of_lora)
    ).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.02)
            elif "magnitude" in name:
                weight.mul_(1 + 0.1 * torch.randn_like(weight))
    model.save_pretrained(str(folder))
    updates = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().numpy()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and isinstance(module, nn.Module) and hasattr(module, "lora_A")
    }
    return folder, updates


@pytest.mark.parametrize("of_lora", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_every_number_is_that_of_numpys_svd_of_pefts_update(tmp_path: Path, of_lora: dict[str, bool]) -> None:
    folder, updates = peft_llama(tmp_path / "adapter", **of_lora)
    found = wd.adapter_weights(folder)
    assert set(found.modules["name"]) == set(updates)
    total = sum(np.linalg.norm(update) ** 2 for update in updates.values())
    for row in found.modules.to_dict("records"):
        update = updates[row["name"]]
        sigma = np.linalg.svd(update, compute_uv=False)[:5]
        own = found.singular_values.query("name == @row['name']")["sigma"]
        np.testing.assert_allclose(own, sigma, rtol=1e-9)
        assert row["norm"] == pytest.approx(np.linalg.norm(update), rel=1e-9)
        assert row["share"] == pytest.approx(np.linalg.norm(update) ** 2 / total, rel=1e-9)
        assert row["stable_rank"] == pytest.approx(np.sum(sigma**2) / sigma[0] ** 2, rel=1e-9)
        for energy in (90, 95, 99):
            kept = [np.sum(sigma[:k] ** 2) / np.sum(sigma**2) for k in range(1, 6)]
            assert row[f"rank_{energy}"] == next(k for k, of in enumerate(kept, 1) if of >= energy / 100)
    assert dict(found.modules.groupby("module").size()) == {"q": 9, "v": 9, "down": 9}


def test_magnitudes_are_those_of_the_file(tmp_path: Path) -> None:
    folder, _ = peft_llama(tmp_path / "adapter", use_dora=True)
    stored = load_file(folder / "adapter_model.safetensors")
    for row in wd.adapter_weights(folder).modules.to_dict("records"):
        m = stored[f"base_model.model.{row['name']}.lora_magnitude_vector"].numpy()
        assert row["m_mean"] == pytest.approx(m.mean())
        assert row["m_spread"] == pytest.approx(m.std() / m.mean())
        assert (row["m_min"], row["m_max"]) == (m.min(), m.max())


def test_a_module_that_was_tuned_harder_than_its_kind_is_an_outlier(tmp_path: Path) -> None:
    folder, _ = peft_llama(tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.4.self_attn.v_proj.lora_B.weight"
    tensors[name] = tensors[name] * 30
    save_file(tensors, file)
    found = wd.adapter_weights(folder)
    outliers = found.modules[found.modules["outlier"]]
    assert "model.layers.4.self_attn.v_proj" in set(outliers["name"])
    assert found.by_layer()["layer"].iloc[0] == 4
    result = CliRunner().invoke(app, ["inspect", "--weights", str(folder)])
    assert "model.layers.4.self_attn.v_proj stands out of its kind" in result.output


def test_how_often_a_family_without_outliers_shows_one() -> None:
    """Norms that are alike but for noise: one in 30 families of 80 modules, one in six of the least."""
    import pandas as pd

    random = np.random.default_rng(0)
    shown = {}
    for size in (LEAST_FAMILY, 80):
        norms = np.exp(0.2 * random.standard_normal((400, size)))
        of = pd.DataFrame({"norm": norms.ravel(), "module": np.repeat(np.arange(400), size)})
        shown[size] = (_robust_z(of).abs() > OUTLYING).groupby(of["module"]).any().mean()
    assert shown[LEAST_FAMILY] < 1 / 6
    assert shown[80] < 1 / 30


def test_small_singular_values_keep_their_digits() -> None:
    random = np.random.default_rng(1)
    B, A = (
        np.linalg.qr(random.standard_normal((50, 3)))[0],
        np.linalg.qr(random.standard_normal((40, 3)))[0].T,
    )
    np.testing.assert_allclose(singular_values(B * [1, 1e-5, 1e-10], A), [1, 1e-5, 1e-10], rtol=1e-5)


def test_an_untrained_and_a_broken_update_are_named(tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "lora", llama())
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].zero_()
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"][0, 0] = float("nan")
    write(file, tensors)
    found = wd.adapter_weights(folder)
    assert len(found.notes) == 2
    assert "1 of 6 updates" in found.notes[0]
    assert "layers.0.self_attn.q_proj" in found.notes[0]
    assert "not finite" in found.notes[1]
    assert "layers.1.self_attn.q_proj" in found.notes[1]
    assert json.loads(json.dumps(found.as_json()))["modules"][0]["name"].startswith("model.layers")


def test_a_model_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no adapter"):
        wd.adapter_weights(write_model(tmp_path / "model", llama()))


def test_the_command_prints_a_table_json_and_a_figure(tmp_path: Path) -> None:
    figure = tmp_path / "weights.svg"
    arguments = ["inspect", "--weights", "sample_checkpoints/dora/checkpoint-240"]
    result = CliRunner().invoke(app, [*arguments, "--figure", str(figure)])
    assert result.exit_code == 0, result.output
    assert "rank for 90 / 95 / 99 %" in result.output
    assert "squared norm: 0 (22 %), 1 (13 %)" in result.output
    assert figure.read_text(encoding="utf-8").startswith("<?xml")
    (found,) = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert len(found["modules"]) == 50
    assert len(found["modules"][0]["singular_values"]) == 8


def test_a_figure_of_headers_is_wrong_usage(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["inspect", "sample_checkpoints/lora", "--figure", str(tmp_path / "a.png")]
    )
    assert result.exit_code == 2


@pytest.mark.parametrize("width", [3.25, 6.75])
@pytest.mark.parametrize("look", ["paper", "talk"])
def test_the_figure_is_legible_and_has_every_layer(look: str, width: float) -> None:
    table = wd.adapter_weights("sample_checkpoints/dora/checkpoint-240").last()
    with style.context(look):
        figure = weights(table, figsize=(width, None))
        assert faults(figure) == []
    norm = figure.axes[0]
    q = table[table["module"] == "q"].sort_values("layer")
    drawn = [line.get_ydata().tolist() for line in norm.lines if len(line.get_ydata()) == len(q)]
    assert q["norm"].tolist() in drawn

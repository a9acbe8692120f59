"""What loaders make of magnitudes: their rules written out in torch, as their repositories have them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import wdanalysis as wd
from wdanalysis.errors import CheckpointError, ComparisonError

MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def comfyui(dora_scale: torch.Tensor, weight: torch.Tensor, lora_diff: torch.Tensor) -> torch.Tensor:
    """`comfy/weight_adapter/base.py:weight_decompose` at strength 1 (v0.3.77), without its casts."""
    weight_calc = weight + lora_diff
    if dora_scale.shape[0] == weight_calc.shape[0]:
        weight_norm = weight.reshape(weight.shape[0], -1).norm(dim=1, keepdim=True)
    else:
        weight_norm = weight_calc.transpose(0, 1).norm(dim=1, keepdim=True).transpose(0, 1)
    return weight_calc * (dora_scale / (weight_norm + torch.finfo(weight.dtype).eps))


def dora(v: torch.Tensor, m: torch.Tensor, dim: int) -> torch.Tensor:
    return v * m / v.norm(dim=dim, keepdim=True)


def pair(
    folder: Path, out: int, inputs: int, scale: torch.Tensor, key: str = "dora_scale"
) -> tuple[Path, Path]:
    torch.manual_seed(1)
    base, adapter = folder / "base.safetensors", folder / "dora.safetensors"
    save_file({f"{MODULE}.weight": torch.randn(out, inputs, dtype=torch.float64)}, base)
    name = f"lora_unet_{MODULE.replace('.', '_')}"
    up, down = (torch.randn(*shape, dtype=torch.float64) for shape in ((out, 2), (2, inputs)))
    factors = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(1.0), key: scale}
    save_file({f"{name}.{part}": tensor for part, tensor in factors.items()}, adapter)
    return base, adapter


def weights(base: Path, adapter: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """W and ΔW."""
    from safetensors.torch import load_file

    (w,) = load_file(base).values()
    parts = {key.rpartition("_to_q.")[2]: tensor for key, tensor in load_file(adapter).items()}
    return w, 0.5 * parts["lora_up.weight"] @ parts["lora_down.weight"]


def column(size: int) -> torch.Tensor:
    return torch.rand(size, 1, dtype=torch.float64) + 1


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("loader", ["comfyui", "peft"])
def test_a_loader_s_weight_is_measured_from_the_base_and_from_the_intended_one(
    tmp_path: Path, loader: str, axis: str
) -> None:
    scale = column(6)
    base, adapter = pair(tmp_path, 6, 4, scale)
    w, change = weights(base, adapter)
    intended = dora(w + change, scale, 1)
    applied = {"comfyui": comfyui(scale, w, change), "peft": dora(w + change, scale, 1)}[loader]
    compared = wd.compare(base, {"D": adapter}, axis=axis, applied_as=loader, modules="all").metrics
    of = {row["method"]: row for _, row in compared.iterrows()}
    for method, (before, after) in {
        "D": (w, intended),
        f"D as {loader}": (w, applied),
        f"D as {loader}, from intended": (intended, applied),
    }.items():
        expected = [float(f(before, after, axis=axis)) for f in (wd.delta_m, wd.delta_d)]
        found = [of[method][name] for name in ("delta_m", "delta_d")] if method in of else [0.0, 0.0]
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-14)


def test_lycoris_own_axis_applied_to_magnitudes_of_the_outputs_of_a_square_weight(tmp_path: Path) -> None:
    scale = column(5)
    base, adapter = pair(tmp_path, 5, 5, scale)
    w, change = weights(base, adapter)
    wrong = dora(w + change, scale.T, 0)
    compared = wd.compare(base, {"D": adapter}, applied_as="lycoris", modules="all").metrics.set_index(
        "method"
    )
    assert compared.loc["D as lycoris", "delta_d"] == pytest.approx(float(wd.delta_d(w, wrong)), rel=1e-9)


def test_comfyui_spreads_magnitudes_of_one_dimension_over_the_columns(tmp_path: Path) -> None:
    scale = column(5).ravel()
    base, adapter = pair(tmp_path, 5, 5, scale)
    w, change = weights(base, adapter)
    options = {"dora_axis": "out", "applied_as": "comfyui", "modules": "all"}
    compared = wd.compare(base, {"D": adapter}, **options).metrics.set_index("method")
    expected = float(wd.delta_m(w, comfyui(scale, w, change)))
    assert compared.loc["D as comfyui", "delta_m"] == pytest.approx(expected, rel=1e-9)


def test_comfyui_leaves_a_weight_as_it_is_whose_magnitudes_it_cannot_spread(tmp_path: Path) -> None:
    scale = column(6).ravel()
    base, adapter = pair(tmp_path, 6, 4, scale)
    w, change = weights(base, adapter)
    with pytest.raises(RuntimeError, match="must match the size"):
        comfyui(scale, w, change)
    compared = wd.compare(base, {"D": adapter}, applied_as="comfyui", modules="all").metrics.set_index(
        "method"
    )
    assert compared.loc["D as comfyui", "update_norm"] == 0
    back = float(wd.delta_d(dora(w + change, scale[:, None], 1), w))
    assert compared.loc["D as comfyui, from intended", "delta_d"] == pytest.approx(back, rel=1e-9)


def test_a_loader_that_can_apply_no_module_is_refused(tmp_path: Path) -> None:
    base, adapter = pair(tmp_path, 6, 4, column(6))
    with pytest.raises(ComparisonError, match="lycoris can apply the magnitudes of no module"):
        wd.compare(base, {"D": adapter}, applied_as="lycoris", modules="all")


def test_modules_that_a_loader_cannot_apply_are_left_out_and_named(tmp_path: Path) -> None:
    names, tensors, adapter = ["attn1.to_q", "ff.net.2"], {}, {}
    for name, out in zip(names, (4, 6), strict=True):
        module = f"mid_block.attentions.0.transformer_blocks.0.{name}"
        tensors[f"{module}.weight"] = torch.randn(out, 4)
        key = f"lora_unet_{module.replace('.', '_')}"
        adapter |= {
            f"{key}.lora_up.weight": torch.randn(out, 2),
            f"{key}.lora_down.weight": torch.randn(2, 4),
        }
        adapter[f"{key}.dora_scale"] = torch.rand(out, 1)
    save_file(tensors, tmp_path / "base.safetensors")
    save_file(adapter, tmp_path / "d.safetensors")
    options = {"applied_as": "lycoris", "modules": "all"}
    compared = wd.compare(tmp_path / "base.safetensors", {"D": tmp_path / "d.safetensors"}, **options)
    assert (compared.metrics["method"] == "D").sum() == 2
    assert (compared.metrics["method"] == "D as lycoris").sum() == 1
    assert any("cannot apply the magnitudes of 1 modules" in warning for warning in compared.warnings)


def test_a_loader_without_magnitudes_to_apply_is_refused(tmp_path: Path) -> None:
    base, _ = pair(tmp_path, 6, 4, column(6))
    with pytest.raises(ComparisonError, match="magnitudes, which alone loaders apply differently"):
        wd.compare(base, {"FT": base}, applied_as="comfyui")


@pytest.mark.parametrize(("axis", "dim"), [("out", 1), ("in", 0)])
def test_a_magnitude_that_may_be_of_either_axis_is_never_guessed(tmp_path: Path, axis: str, dim: int) -> None:
    scale = column(5).ravel()
    base, adapter = pair(tmp_path, 5, 5, scale)
    with pytest.raises(CheckpointError, match=r"one number for each output or for each input") as refused:
        wd.compare(base, {"D": adapter}, modules="all")
    assert refused.value.parameter == "dora_axis"
    w, change = weights(base, adapter)
    tuned = dora(w + change, scale[:, None] if axis == "out" else scale, dim)
    found = wd.compare(base, {"D": adapter}, dora_axis=axis, modules="all").metrics.iloc[0]
    assert found["delta_m"] == pytest.approx(float(wd.delta_m(w, tuned)), rel=1e-9)
    assert found["delta_d"] == pytest.approx(float(wd.delta_d(w, tuned)), rel=1e-9)


@pytest.mark.parametrize(
    "key", ["lora_magnitude_vector", "magnitude", "weight_m_wdecomp.weight", "lora_magnitude"]
)
def test_a_writer_whose_magnitudes_are_of_outputs_needs_no_axis(tmp_path: Path, key: str) -> None:
    scale = column(5).ravel()
    base, adapter = pair(tmp_path, 5, 5, scale, key)
    w, change = weights(base, adapter)
    found = wd.compare(base, {"D": adapter}, modules="all").metrics.iloc[0]
    expected = float(wd.delta_m(w, dora(w + change, scale[:, None], 1)))
    assert found["delta_m"] == pytest.approx(expected, rel=1e-9)


def test_a_magnitude_alone_rescales_the_base(tmp_path: Path) -> None:
    base, _ = pair(tmp_path, 6, 4, column(6))
    adapter = tmp_path / "m.safetensors"
    scale = column(6)
    save_file({f"lora_unet_{MODULE.replace('.', '_')}.dora_scale": scale}, adapter)
    w, _ = weights(base, tmp_path / "dora.safetensors")
    found = wd.compare(base, {"m": adapter}, modules="all").metrics.iloc[0]
    assert found["delta_m"] == pytest.approx(float(wd.delta_m(w, dora(w, scale, 1))), rel=1e-9)
    assert found["delta_d"] == pytest.approx(0, abs=1e-12)

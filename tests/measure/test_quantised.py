"""Quantised weights as base and as tuned: what is compared, what the table names, and the floor of their grids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from checkpoint_files import write_lora
from quantised_files import MODULE, WEIGHT, gaussian, read_whole, the_weight, write_quantised

import wdanalysis as wd

AXES = pytest.mark.parametrize("axis", ["out", "in"])


def rows_of_eight_bits(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {WEIGHT: torch.round(weight / scale).to(torch.int8), f"{WEIGHT}_scale": scale}


def floats_of_eight_bits(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = weight.abs().max() / 448
    return {WEIGHT: (weight / scale).to(torch.float8_e4m3fn), f"{WEIGHT}_scale": scale}


def normal_floats(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    bnb = pytest.importorskip("bitsandbytes")
    codes, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
    return {WEIGHT: codes} | {f"{WEIGHT}.{name}": part for name, part in state.as_dict(packed=True).items()}


FORMATS = {"INT8": rows_of_eight_bits, "F8_E4M3": floats_of_eight_bits, "NF4": normal_floats}


def change(base: Path, tuned: Path, axis: str = "out") -> pd.Series:
    return wd.compare(base, tuned, modules="all", axis=axis).metrics.iloc[0]


@AXES
@pytest.mark.parametrize("precision", FORMATS)
def test_quantising_alone_makes_the_floor(tmp_path: Path, precision: str, axis: str) -> None:
    """A base in floats against itself, quantised: ΔM and ΔD are those of rounding, and the table says so."""
    weight = gaussian(256, 512)
    base = write_quantised(tmp_path / "base", {WEIGHT: weight})
    row = change(base, write_quantised(tmp_path / "tuned", FORMATS[precision](weight)), axis)
    assert (row.base_dtype, row.tuned_dtype, row.grid) == ("F32", precision, "off")
    # the wide cells of NF4 are fuller near 0 than far from it, and an error that is even over them is too large
    near = 0.2 if precision == "NF4" else 0.05
    assert row.delta_d_floor == pytest.approx(row.delta_d, rel=near)
    # ΔM has what the rounding of neighbours has in common as well: cells are not centred on their levels
    assert row.delta_m_floor == pytest.approx(row.delta_m, rel=0.3)
    assert row.floor_ratio == pytest.approx(1, rel=near)


@pytest.mark.parametrize("precision", FORMATS)
def test_what_is_measured_is_the_dequantised_weight(tmp_path: Path, precision: str) -> None:
    weight, tuned = gaussian(64, 96), gaussian(64, 96) + 0.1 * gaussian(64, 96, seed=1)
    base = write_quantised(tmp_path / "base", FORMATS[precision](weight))
    row = change(base, write_quantised(tmp_path / "tuned", {WEIGHT: tuned}))
    w0 = read_whole(the_weight(base)).double()
    assert (row.base_dtype, row.tuned_dtype) == (precision, "F32")
    assert row.delta_d == pytest.approx(wd.delta_d(w0, tuned.double()), rel=1e-9)
    assert row.delta_m == pytest.approx(wd.delta_m(w0, tuned.double()), rel=1e-9)


@pytest.mark.parametrize("precision", FORMATS)
def test_an_adapter_is_measured_against_the_quantised_base_that_it_was_trained_on(
    tmp_path: Path, precision: str
) -> None:
    weight = gaussian(64, 96)
    base = write_quantised(tmp_path / "base", FORMATS[precision](weight))
    adapter = write_lora(tmp_path / "lora", {WEIGHT: weight})
    w0 = read_whole(the_weight(base)).float()
    plain = write_quantised(tmp_path / "plain", {WEIGHT: w0})
    on_quantised, on_plain = (wd.compare(b, adapter).metrics.iloc[0] for b in (base, plain))
    assert on_quantised.delta_d == pytest.approx(on_plain.delta_d, rel=1e-12)
    assert on_quantised.delta_m == pytest.approx(on_plain.delta_m, rel=1e-12)
    assert on_quantised.base_dtype == precision
    assert pd.isna(on_quantised.delta_d_floor)


def test_quantised_against_quantised_compares_all(tmp_path: Path) -> None:
    """Both matrices are compared and not the embedding that is left; no floor is claimed, and it is said."""
    other = f"{MODULE.replace('q_proj', 'v_proj')}.weight"
    folders = []
    for seed in (0, 1):
        tensors = {}
        for name, place in ((WEIGHT, 0), (other, 2)):
            parts = rows_of_eight_bits(gaussian(32, 64, seed=seed + place))
            tensors |= {part.replace(WEIGHT, name): tensor for part, tensor in parts.items()}
        tensors["model.embed_tokens.weight"] = gaussian(10, 64)
        folders.append(write_quantised(tmp_path / str(seed), tensors))
    compared = wd.compare(*folders, modules="all")
    assert set(compared.metrics["name"]) == {WEIGHT, other, "model.embed_tokens.weight"}
    quantised = compared.metrics[compared.metrics["name"] != "model.embed_tokens.weight"]
    assert quantised["delta_d_floor"].isna().all()
    assert (quantised["delta_d"] > 0.5).all()
    assert any("no rounding floor is known" in warning for warning in compared.warnings)


def test_a_tuned_matrix_in_the_bases_own_type_lies_on_its_grid(tmp_path: Path) -> None:
    """A model that was merged in bfloat16 on its NF4 base: bfloat16's own grid, whatever the base was made from."""
    weight = gaussian(64, 128, dtype=torch.bfloat16)
    base = write_quantised(tmp_path / "base", normal_floats(weight))
    merged = (read_whole(the_weight(base)).float() + 0.1 * gaussian(64, 128, seed=1)).bfloat16()
    row = change(base, write_quantised(tmp_path / "tuned", {WEIGHT: merged}))
    assert (row.base_dtype, row.tuned_dtype, row.grid) == ("NF4", "BF16", "on")


@AXES
def test_the_floor_is_half_the_mean_of_the_squared_steps(tmp_path: Path, axis: str) -> None:
    """By the equation in numpy: ½ · mean over vectors of Σ step² / 12 / m²."""
    weight = gaussian(32, 48)
    base = write_quantised(tmp_path / "base", {WEIGHT: weight})
    folder = write_quantised(tmp_path / "tuned", rows_of_eight_bits(weight))
    w, scale = read_whole(the_weight(folder)).double().numpy(), (weight.abs().amax(1) / 127).double().numpy()
    along = 1 if axis == "out" else 0
    squares = np.broadcast_to(scale[:, None] ** 2, w.shape).sum(along)
    expected = 0.5 * np.mean(squares / 12 / (w**2).sum(along))
    assert change(base, folder, axis).delta_d_floor == pytest.approx(expected, rel=1e-5)

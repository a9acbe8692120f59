"""The matrix as one vector, and the mean angle, against float64 and extended precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from checkpoint_files import llama, write, write_lora
from safetensors.torch import load_file

import wdanalysis as wd

Q = "model.layers.0.self_attn.q_proj.weight"
AXES = pytest.mark.parametrize("axis", ["out", "in"])


def measured(folder: Path, base: torch.Tensor, tuned: torch.Tensor, axis: str = "out") -> pd.Series:
    files = (write(folder / f"{name}.safetensors", {Q: W}) for name, W in (("base", base), ("ft", tuned)))
    return wd.compare(*files, modules="all", axis=axis).metrics.iloc[0]


def pair(size: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    W0 = torch.randn(24, 36, generator=generator, dtype=torch.float64)
    return W0, W0 + size * torch.randn(W0.shape, generator=generator, dtype=torch.float64)


@AXES
@pytest.mark.parametrize("size", [3.0, 1e-1, 1e-3, 1e-5, 1e-7])
def test_they_are_those_of_the_flat_matrix(tmp_path: Path, size: float, axis: str) -> None:
    W0, W = pair(size)
    row = measured(tmp_path, W0, W, axis)
    w0, w = (X.flatten().numpy().astype(np.longdouble) for X in (W0, W))
    norm0, norm = np.sqrt(w0 @ w0), np.sqrt(w @ w)
    unit = w / norm - w0 / norm0
    assert row.matrix_delta_m == pytest.approx(float(abs(norm - norm0)), rel=1e-8)
    assert row.matrix_delta_d == pytest.approx(float(unit @ unit / 2), rel=1e-8)


@AXES
@pytest.mark.parametrize("size", [30.0, 1e-1, 1e-4, 1e-7])
def test_the_mean_angle_is_that_between_the_vectors(tmp_path: Path, size: float, axis: str) -> None:
    W0, W = pair(size)
    row = measured(tmp_path, W0, W, axis)
    u0, u = wd.decompose(W0, axis).direction, wd.decompose(W, axis).direction
    dim = 1 if axis == "out" else 0
    angles = 2 * torch.atan2((u - u0).norm(dim=dim), (u + u0).norm(dim=dim))  # Kahan's
    assert row.mean_angle == pytest.approx(float(torch.rad2deg(angles).mean()), rel=1e-7)


def test_doubling_and_reversing_a_matrix(tmp_path: Path) -> None:
    W0, _ = pair(0.0)
    double = measured(tmp_path / "double", W0, 2 * W0)
    assert double.matrix_delta_m == pytest.approx(float(W0.norm()))
    assert (double.matrix_delta_d, double.mean_angle) == pytest.approx((0, 0), abs=1e-6)
    reverse = measured(tmp_path / "reverse", W0, -W0)
    assert (reverse.matrix_delta_m, reverse.matrix_delta_d, reverse.mean_angle) == pytest.approx((0, 2, 180))


def test_a_matrix_that_becomes_zero_has_no_direction(tmp_path: Path) -> None:
    W0, _ = pair(0.0)
    row = measured(tmp_path, W0, 0 * W0)
    assert (row.matrix_delta_m, row.matrix_delta_d, row.mean_angle) == pytest.approx(
        (float(W0.norm()), 1, 90)
    )


@AXES
def test_an_adapter_has_those_of_its_merged_matrix(tmp_path: Path, axis: str) -> None:
    model = {name: weight.double() for name, weight in llama().items()}
    base, lora = write(tmp_path / "base.safetensors", model), write_lora(tmp_path / "lora", model)
    factors = load_file(lora / "adapter_model.safetensors")
    key = f"base_model.model.{Q.removesuffix('.weight')}.lora_"
    W = model[Q] + 2 * factors[f"{key}B.weight"].double() @ factors[f"{key}A.weight"].double()
    row = wd.compare(base, lora, axis=axis).metrics.query("name == @Q").iloc[0]
    merged = measured(tmp_path, model[Q], W, axis)
    columns = ["matrix_delta_m", "matrix_delta_d", "mean_angle"]
    assert row[columns].tolist() == pytest.approx(merged[columns].tolist(), rel=1e-7)

"""The radial and centrifugal parts of m − m₀, against float64 by hand, and what a row says of its update."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from checkpoint_files import write

import wdanalysis as wd
from wdanalysis.kernels.rescale import vector_changes_of_dora
from wdanalysis.kernels.sums import VectorChanges, vector_changes

SAMPLES = Path(__file__).parents[2] / "sample_checkpoints"
Q = "model.layers.0.self_attn.q_proj.weight"
AXES = pytest.mark.parametrize("axis", ["out", "in"])


def assert_exact(changes: VectorChanges) -> None:
    parts = changes.radial + changes.centrifugal
    np.testing.assert_allclose(changes.magnitude_change, parts, rtol=1e-12, atol=1e-15)


def changes_of(W0: np.ndarray, W: np.ndarray) -> VectorChanges:
    d = W - W0
    return vector_changes((W0**2).sum(1), (W0 * d).sum(1), (d**2).sum(1))


@pytest.mark.parametrize("size", [1e-7, 1e-2, 1.0, 30.0])
def test_length_changes_by_the_radial_part_and_by_turning(size: float) -> None:
    generator = np.random.default_rng(0)
    W0 = generator.normal(size=(200, 7))
    d = size * generator.normal(size=(200, 7))
    changes = changes_of(W0, W0 + d)
    np.testing.assert_allclose(
        changes.radial, ((W0 + d - W0) * W0).sum(1) / np.linalg.norm(W0, axis=1), rtol=1e-9
    )
    assert_exact(changes)


def test_vectors_of_zeros_have_no_radial_part_and_a_vector_that_became_zero_nothing_else() -> None:
    W0 = np.array([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0], [3.0, 4.0]])
    W = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [-3.0, -4.0]])
    changes = changes_of(W0, W)
    assert changes.radial.tolist() == [0, 0, -5, -10]
    assert changes.centrifugal.tolist() == [0, 5, 0, 10]
    assert_exact(changes)
    dora = vector_changes_of_dora(
        np.array([0.0, 25.0, 25.0]), np.zeros(3), np.zeros(3), np.array([2.0, 0.0, -5.0])
    )
    assert dora.radial.tolist() == [0, -5, -10]
    assert_exact(dora)


@AXES
def test_the_columns_of_a_stored_matrix_are_their_definitions(tmp_path: Path, axis: str) -> None:
    generator = torch.Generator().manual_seed(0)
    W0, d = torch.randn(2, 20, 30, generator=generator, dtype=torch.float64)
    paths = (
        write(tmp_path / f"{name}.safetensors", {Q: w}) for name, w in (("base", W0), ("ft", W0 + 0.3 * d))
    )
    row = wd.compare(*paths, modules="all", axis=axis).metrics.iloc[0]
    dim = 1 if axis == "out" else 0
    W = W0 + 0.3 * d
    rho = (W0 * (W - W0)).sum(dim) / W0.norm(dim=dim)
    turned = W.norm(dim=dim) * (1 - torch.nn.functional.cosine_similarity(W, W0, dim=dim))
    assert row["update"] == "stored"
    assert row["rank"] is pd.NA
    assert row.mean_rho == pytest.approx(float(rho.mean()), rel=1e-12)
    assert row.mean_abs_rho == pytest.approx(float(rho.abs().mean()), rel=1e-12)
    assert row.centrifugal == pytest.approx(float(turned.mean()), rel=1e-12)
    assert row.radial_share == pytest.approx(float(rho.square().sum() / (W - W0).square().sum()), rel=1e-12)
    assert row.delta_m_signed == pytest.approx(row.mean_rho + row.centrifugal, rel=1e-12)


def test_a_row_names_its_kind_of_update_and_its_rank() -> None:
    methods = [SAMPLES / name / "checkpoint-240" for name in ("ft", "lora", "dora")]
    table = wd.compare(SAMPLES / "base", methods, modules=["q"]).metrics.groupby("method").first()
    assert table["update"].to_dict() == {"ft": "stored", "lora": "low-rank", "dora": "dora"}
    assert table["rank"].fillna(0).to_dict() == {"ft": 0, "lora": 8, "dora": 8}
    nulls = table[["null_delta_m", "null_delta_m_sd", "null_delta_d", "null_delta_d_sd"]]
    assert nulls.loc[["ft", "lora"]].gt(0).all(axis=None)
    assert nulls.loc["dora"].isna().all()


def test_lora_in_the_sample_turns_and_hardly_grows() -> None:
    """What a fit to the magnitudes calls growth is the length that vectors gain by turning."""
    table = wd.compare(SAMPLES / "base", {"LoRA": SAMPLES / "lora" / "checkpoint-240"}, modules="all").metrics
    table = table[table["update_norm"] > 0]
    m0_rho = -table["shrink"] * table["base_norm"] ** 2
    m0_change = m0_rho + (table["update_norm"] ** 2 - table["delta_m_norm"] ** 2) / 2
    square = (table["base_norm"] ** 2).sum()
    assert m0_change.sum() / square > 0.04
    assert abs(m0_rho.sum() / square) < 0.005

"""Shrink, rounding floors and quantiles, against changes made by hand and against torch in float64."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from checkpoint_files import llama, moved, write, write_lora, write_steps
from safetensors.torch import load_file, save_file
from scipy import stats

import wdanalysis as wd
from wdanalysis.analysis.floors import near_floor
from wdanalysis.analysis.shrink import COMMON_SHRINK_COLUMNS
from wdanalysis.measure.rows import MatrixDiagnostics

Q = "model.layers.0.self_attn.q_proj.weight"
SAMPLES = Path(__file__).parents[2] / "sample_checkpoints"
AXES = pytest.mark.parametrize("axis", ["out", "in"])


def row_of(folder: Path, base: torch.Tensor, tuned: torch.Tensor, **options: object) -> pd.Series:
    """The table's row of one matrix."""
    paths = (write(folder / f"{name}.safetensors", {Q: w}) for name, w in (("base", base), ("ft", tuned)))
    return wd.compare(*paths, modules="all", **options).metrics.iloc[0]


def weights(rows: int = 64, columns: int = 512, seed: int = 0) -> torch.Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@AXES
def test_decay_by_a_known_factor_comes_back(tmp_path: Path, axis: str) -> None:
    W0 = weights().double()
    row = row_of(tmp_path, W0, (1 - 0.009) * W0, axis=axis)
    assert row.shrink == pytest.approx(0.009, rel=1e-9)
    assert row.shrink_share == pytest.approx(1, abs=1e-9)
    assert row.delta_m_unshrunk <= 1e-12 * row.delta_m


@AXES
def test_shrink_is_the_least_squares_factor_of_the_weights(tmp_path: Path, axis: str) -> None:
    W0 = weights().double()
    W = 0.99 * W0 + 1e-3 * weights(seed=1).double()
    row = row_of(tmp_path, W0, W, axis=axis)
    dim = 1 if axis == "out" else 0
    m0, m = W0.norm(dim=dim).numpy(), W.norm(dim=dim).numpy()
    kept = np.linalg.lstsq(W0.numpy().reshape(-1, 1), W.numpy().ravel(), rcond=None)[0].item()
    assert row.shrink == pytest.approx(1 - kept, rel=1e-9)
    assert row.delta_m_unshrunk == pytest.approx(np.abs(m - kept * m0).mean(), rel=1e-9)
    assert row.shrink_share == pytest.approx(
        1 - np.abs(m - kept * m0).mean() / np.abs(m - m0).mean(), rel=1e-9
    )
    assert row.base_norm == pytest.approx(float(W0.norm()))
    assert row.delta_m_norm == pytest.approx(np.linalg.norm(m - m0))


@AXES
def test_a_turn_is_no_growth(tmp_path: Path, axis: str) -> None:
    W0 = weights().double()
    update = 0.3 * weights(seed=1).double()
    update -= W0 * (W0 * update).sum() / (W0 * W0).sum()
    row = row_of(tmp_path, W0, W0 + update, axis=axis)
    assert row.delta_m_signed > 0.03 * float(W0.norm(dim=1 if axis == "out" else 0).mean())
    assert row.shrink == pytest.approx(0, abs=1e-12)
    assert row.shrink_share == pytest.approx(0, abs=1e-9)


def test_the_shrink_of_dora_is_that_of_its_magnitudes(tmp_path: Path) -> None:
    shutil.copytree(SAMPLES / "dora" / "checkpoint-240", tmp_path / "dora")
    file = tmp_path / "dora" / "adapter_model.safetensors"
    factors, base = load_file(file), load_file(SAMPLES / "base" / "model.safetensors")
    for key in factors:
        if "magnitude" in key:  # the vectors turn as they did, and every length is 0.99 of what it was
            name = key.removeprefix("base_model.model.").partition(".lora_")[0]
            factors[key] = 0.99 * base[f"{name}.weight"].float().norm(dim=1)
    save_file(factors, file)
    compared = wd.compare(SAMPLES / "base", tmp_path / "dora")
    assert compared.metrics["delta_d"].gt(0.01).all()
    assert compared.metrics["shrink"].to_numpy() == pytest.approx(0.01, rel=1e-4)
    assert compared.metrics["shrink_share"].to_numpy() == pytest.approx(1, abs=1e-4)
    (row,) = compared.diagnostics().itertuples()
    assert row.common_shrink == pytest.approx(0.01, rel=1e-4)
    assert row.explains


@AXES
def test_quantiles_are_those_of_the_vectors(tmp_path: Path, axis: str) -> None:
    W0, dim = weights().double(), 1 if axis == "out" else 0
    W = W0 * (1 + 0.1 * torch.randn(W0.shape, generator=torch.Generator().manual_seed(2)))
    row = row_of(tmp_path, W0, W, axis=axis)
    dm = (W.norm(dim=dim) - W0.norm(dim=dim)).abs()
    turn = 1 - torch.nn.functional.cosine_similarity(W0, W, dim=dim)
    for name, values in (("delta_m", dm), ("delta_d", turn)):
        found = [row[f"{name}_{which}"] for which in ("median", "p90", "max")]
        expected = [values.quantile(share).item() for share in (0.5, 0.9, 1.0)]
        assert found == pytest.approx(expected, rel=1e-9, abs=0)
        assert found[0] < found[1] < found[2]


@AXES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_matrix_that_was_only_rounded_is_at_its_floor(
    tmp_path: Path, dtype: torch.dtype, axis: str
) -> None:
    W0 = weights(1024, 1024)
    row = row_of(tmp_path, W0, W0.to(dtype), axis=axis)
    assert row.floor_ratio == pytest.approx(1, rel=0.1)
    assert row.delta_m / row.delta_m_floor == pytest.approx(1, rel=0.1)
    assert near_floor(row.to_frame().T).all()


@AXES
def test_the_floor_of_delta_m_is_that_of_the_ulps(tmp_path: Path, axis: str) -> None:
    W, dim = weights().bfloat16(), 1 if axis == "out" else 0
    row = row_of(tmp_path, weights(), W, axis=axis)
    ulp = (torch.nextafter(W.abs(), torch.tensor(torch.inf, dtype=torch.bfloat16)) - W.abs()).double()
    w = W.double()
    sigma = ((w / w.norm(dim=dim, keepdim=True) * ulp) ** 2 / 12).sum(dim).sqrt()
    folded = [stats.foldnorm.mean(0, scale=s) for s in sigma.numpy()]
    assert row.delta_m_floor == pytest.approx(np.mean(folded), rel=1e-9)


def test_an_update_far_above_rounding_is_not_near_the_floor(tmp_path: Path) -> None:
    W0 = weights()
    row = row_of(tmp_path, W0, (W0 + 0.1 * weights(seed=1)).bfloat16())
    assert row.floor_ratio == row.delta_d / row.delta_d_floor > 100


def test_an_adapter_has_shrink_and_quantiles_but_no_floor(tmp_path: Path) -> None:
    base, lora = write(tmp_path / "base.safetensors", llama()), write_lora(tmp_path / "lora", llama())
    table = wd.compare(base, lora).metrics
    assert table[["delta_m_floor", "floor_ratio"]].isna().all(axis=None)
    assert table[["shrink", "delta_m_p90", "delta_d_max"]].notna().all(axis=None)
    assert not near_floor(table).any()


@AXES
def test_an_adapter_has_the_diagnostics_of_its_merged_matrix(tmp_path: Path, axis: str) -> None:
    model = {name: weight.double() for name, weight in llama().items()}
    base, lora = write(tmp_path / "base.safetensors", model), write_lora(tmp_path / "lora", model)
    factors = load_file(lora / "adapter_model.safetensors")
    for name, W0 in list(model.items()):
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in factors:
            A, B = (factors[f"{key}{side}.weight"].double() for side in "AB")
            model[name] = W0 + 2 * B @ A
    merged = write(tmp_path / "merged.safetensors", model)
    table = wd.compare(base, {"LoRA": lora, "merged": merged}, axis=axis).metrics.set_index(
        ["method", "name"]
    )
    columns = ["shrink", "delta_m_unshrunk", "delta_m_p90", "delta_d_median", "base_norm", "delta_m_norm"]
    pd.testing.assert_frame_equal(table.loc["LoRA", columns], table.loc["merged", columns], rtol=1e-8)


def test_without_diagnostics_the_columns_are_empty_and_the_rest_is_the_same(tmp_path: Path) -> None:
    base, ft = write(tmp_path / "base.safetensors", llama()), write_steps(tmp_path / "ft", llama())
    tuned = [ft, write_lora(tmp_path / "lora", llama())]
    plain, full = (wd.compare(base, tuned, diagnostics=on).metrics for on in (False, True))
    further = list(MatrixDiagnostics.__dataclass_fields__)
    assert plain[further].isna().all(axis=None)
    pd.testing.assert_frame_equal(plain.drop(columns=further), full.drop(columns=further))


def test_an_unchanged_matrix_does_not_shrink_and_an_empty_one_has_no_factor(tmp_path: Path) -> None:
    row = row_of(tmp_path / "same", weights(), weights())
    assert (row.shrink, row.delta_m_unshrunk, row.delta_d_floor) == (0, 0, 0)
    assert pd.isna(row.shrink_share)
    row = row_of(tmp_path / "zero", torch.zeros(4, 4), torch.ones(4, 4))
    assert pd.isna(row.shrink)
    assert row.delta_m == 2


def decayed(lr: float, decay: float, steps: int, noise: float = 0.0) -> dict[str, torch.Tensor]:
    """The model after AdamW's decay in so many steps, and noise of a size relative to the weights."""
    kept = (1 - lr * decay) ** steps
    tuned = moved(llama(), size=noise, only="proj") if noise else llama()
    return {name: w.double() * kept if "proj" in name else w for name, w in tuned.items()}


def test_weight_decay_by_hand_is_the_common_shrink(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", llama())
    table = wd.compare(base, write(tmp_path / "ft.safetensors", decayed(1e-4, 0.1, 900))).diagnostics()
    assert tuple(table) == COMMON_SHRINK_COLUMNS
    row = table.iloc[0]
    assert row.common_shrink == pytest.approx(1 - (1 - 1e-5) ** 900, rel=1e-6)
    assert row.explained_share == pytest.approx(1, abs=1e-6)
    assert row.explains


def test_the_common_shrink_is_a_least_squares_fit_over_all_weights(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", llama())
    tuned = decayed(1e-4, 0.1, 900, noise=0.01)
    row = wd.compare(base, write(tmp_path / "ft.safetensors", tuned)).diagnostics().iloc[0]
    attention = [name for name in llama() if "self_attn" in name]
    m0 = np.concatenate([llama()[name].double().norm(dim=1).numpy() for name in attention])
    m = np.concatenate([tuned[name].double().norm(dim=1).numpy() for name in attention])
    w0, w = (torch.cat([model[name].double().ravel() for name in attention]) for model in (llama(), tuned))
    kept = float(np.linalg.lstsq(w0.numpy()[:, None], w.numpy())[0].item())
    assert row.matrices == len(attention)
    assert row.common_shrink == pytest.approx(1 - kept, rel=1e-9)
    explained = 1 - np.sum((m - kept * m0) ** 2) / np.sum((m - m0) ** 2)
    assert row.explained_share == pytest.approx(explained, rel=1e-9)


def test_tuning_without_decay_is_not_explained_by_a_common_shrink(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", llama())
    ft = write(tmp_path / "ft.safetensors", moved(llama(), size=0.05))
    row = wd.compare(base, ft).diagnostics().iloc[0]
    assert row.explained_share < 0.5
    assert not row.explains


def test_a_growth_is_no_shrink(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", llama())
    grown = {name: 1.01 * w.double() for name, w in llama().items()}
    row = wd.compare(base, write(tmp_path / "ft.safetensors", grown)).diagnostics().iloc[0]
    assert row.common_shrink == pytest.approx(-0.01, rel=1e-6)
    assert not row.explains


def test_matrices_that_were_not_tuned_take_no_part_in_the_common_shrink(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", llama())
    tuned = llama() | {name: 0.99 * w.double() for name, w in llama().items() if "q_proj" in name}
    compared = wd.compare(base, write(tmp_path / "ft.safetensors", tuned), modules="all")
    row = compared.diagnostics().iloc[0]
    assert row.matrices == 3
    assert row.common_shrink == pytest.approx(0.01, rel=1e-6)

"""The geometry of updates, against numpy's full decomposition, random ties drawn by hand, and PEFT's intruders."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from checkpoint_files import llama, moved, write, write_lora, write_model
from real_run import base_folder
from safetensors import safe_open
from scipy.linalg import subspace_angles
from scipy.stats import entropy as shannon

import wdanalysis as wd
from wdanalysis.comparison import Interrupted
from wdanalysis.kernels.lowrank import Factors
from wdanalysis.measure.geometry import (
    GEOMETRY_COLUMNS,
    GeometryOptions,
    Mask,
    entropy,
    hill,
    in_bfloat16,
    principal_angles,
    visibly_changed,
)
from wdanalysis.measure.spectra import Decomposed, by_initialisation, low_rank_svd, subspace_similarity

RNG = np.random.default_rng(0)
Matrix = np.ndarray


def by_hand(W0: Matrix, W: Matrix, k: int, rank: int, share: float = 0.3) -> dict[str, float]:
    """The definitions as they stand, by full decompositions, sorting and torch's bfloat16."""
    U0, s0, V0 = np.linalg.svd(W0, full_matrices=False)
    U, s, V = np.linalg.svd(W, full_matrices=False)
    ds = np.linalg.svd(W - W0, compute_uv=False)
    ds = ds[ds > 1e-12 * ds[0]]
    left, right = (np.degrees(subspace_angles(a, b)) for a, b in ((U0[:, :k], U[:, :k]), (V0[:k].T, V[:k].T)))
    count = round(share * W0.size)

    def top(scores: Matrix) -> set[int]:
        return set(np.argsort(-scores, axis=None, kind="stable")[:count].tolist())

    stored, stored0 = (torch.tensor(X).float().bfloat16().double().numpy() for X in (W, W0))
    changed = np.abs(stored - stored0) > 1e-3 * np.maximum(np.abs(stored), np.abs(stored0))
    M = set(np.flatnonzero(changed).tolist())
    return {
        "sparsity": 1 - changed.mean(),
        "nss": np.linalg.norm(s - s0) / np.linalg.norm(s0),
        "left_angle_mean": left.mean(),
        "left_angle_max": left.max(),
        "right_angle_mean": right.mean(),
        "right_angle_max": right.max(),
        "overlap_principal": len(M & top(np.abs((U0[:, :rank] * s0[:rank]) @ V0[:rank]))) / len(M),
        "overlap_smallest": len(M & top(-np.abs(W0))) / len(M),
        **{f"{name}_hill": hill_by_hand(v, len(v) // 2) for name, v in (("tuned", s), ("update", ds))},
        **{f"{name}_entropy": shannon(v) / np.log(len(s)) for name, v in (("base", s0), ("update", ds))},
    }


def hill_by_hand(s: Matrix, k: int) -> float:
    return 1 / (sum(np.log(s[i] / s[k - 1]) for i in range(k - 1)) / (k - 1))


def agree(row: pd.Series, expected: dict[str, float], rel: float = 1e-6) -> None:
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=rel)


def spread(rows: int, columns: int, decay: float = 0.99) -> Matrix:
    """A random matrix whose singular values lie apart, so that its top subspaces are well defined."""
    U, _, Vh = np.linalg.svd(RNG.standard_normal((rows, columns)), full_matrices=False)
    return (U * decay ** np.arange(len(Vh))) @ Vh


def geometry_of(folder: Path, W0: Matrix, W: Matrix, options: GeometryOptions | bool = True) -> pd.Series:
    """The row of two matrices that are stored in float64."""
    base, tuned = (
        write(folder / f"{name}.safetensors", {"model.layers.0.self_attn.q_proj.weight": torch.tensor(M)})
        for name, M in (("base", W0), ("tuned", W))
    )
    return wd.compare(base, {"FT": tuned}, geometry=options).geometry.iloc[0]


@pytest.mark.parametrize("shape", [(60, 40), (260, 280), (280, 260)])
@pytest.mark.parametrize("size", [1e-2, 1e-5])
def test_random_matrices_have_the_geometry_of_the_definitions(
    tmp_path: Path, shape: tuple[int, int], size: float
) -> None:
    W0 = spread(*shape)
    W = W0 + size / np.sqrt(max(shape)) * RNG.standard_normal(shape)
    row = geometry_of(tmp_path, W0, W)
    assert row["subspace"] == min(shape) // 2
    agree(row, by_hand(W0, W, k=min(shape) // 2, rank=min(64, min(shape) // 2)))


@pytest.mark.parametrize("name", ["attention.self.query", "intermediate.dense"])
def test_a_real_model_has_the_geometry_of_the_definitions(tmp_path: Path, name: str) -> None:
    with safe_open(base_folder() / "model.safetensors", "numpy") as stored:
        key = next(key for key in stored.keys() if f"layer.2.{name}.weight" in key)  # noqa: SIM118
        W0 = stored.get_tensor(key).astype(np.float64)
    W = W0 + 1e-3 * RNG.standard_normal(W0.shape)
    row = geometry_of(tmp_path, W0, W, GeometryOptions(k=20, rank=12, share=0.5))
    agree(row, by_hand(W0, W, k=20, rank=12, share=0.5))


def test_a_base_of_low_rank_has_no_more_directions_than_its_rank(tmp_path: Path) -> None:
    W0 = 30 * spread(300, 280)[:, :5] @ spread(5, 280, decay=0.5)
    W = W0 + 1e-3 * RNG.standard_normal(W0.shape)
    row = geometry_of(tmp_path, W0, W, GeometryOptions(k=50))
    assert row["subspace"] == 5
    assert row["base_hill"] == pytest.approx(hill_by_hand(np.linalg.svd(W0, compute_uv=False), 2))
    expected = by_hand(W0, W, k=5, rank=5)
    agree(row, {name: expected[name] for name in ("left_angle_mean", "right_angle_max", "overlap_principal")})


def dora_of(W0: Matrix, factors: Factors) -> Matrix:
    V = W0 + factors.scale * factors.B @ factors.A
    assert factors.magnitude is not None
    return factors.magnitude[:, None] * V / np.linalg.norm(V, axis=1, keepdims=True)


@pytest.mark.parametrize("size", [48, 300])
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_has_the_geometry_of_its_merged_matrix(tmp_path: Path, size: int, dora: bool) -> None:
    name = "model.layers.0.self_attn.q_proj"
    W0 = spread(size, size)
    B, A, m = 0.02 * RNG.standard_normal((size, 4)), RNG.standard_normal((4, size)), 1.1 + RNG.random(size)
    factors = Factors(B, A, 2.0, m if dora else None)
    W = dora_of(W0, factors) if dora else W0 + 2 * B @ A
    base = write(tmp_path / "base.safetensors", {f"{name}.weight": torch.tensor(W0)})
    merged = write(tmp_path / "merged.safetensors", {f"{name}.weight": torch.tensor(W)})
    tensors = {"lora_A.weight": A, "lora_B.weight": B} | ({"lora_magnitude_vector": m} if dora else {})
    write(
        tmp_path / "adapter" / "adapter_model.safetensors",
        {f"base_model.model.{name}.{key}": torch.tensor(value) for key, value in tensors.items()},
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "use_dora": dora}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    table = wd.compare(
        base, {"adapter": tmp_path / "adapter", "merged": merged}, geometry=GeometryOptions(tail=4)
    ).geometry.set_index("method")
    adapter, stored = table.loc["adapter"], table.loc["merged"]
    columns = [name for name in GEOMETRY_COLUMNS[5:] if not name.startswith(("step_", "directions", "run"))]
    pd.testing.assert_series_equal(
        adapter[columns].astype(float), stored[columns].astype(float), check_names=False, rtol=1e-6
    )
    expected = by_hand(W0, W, k=size // 2, rank=min(64, size // 2))
    agree(adapter, {key: value for key, value in expected.items() if "hill" not in key})


def test_the_sparsity_of_bfloat16_files_is_the_unchanged_fraction(tmp_path: Path) -> None:
    weights = {name: w.bfloat16() for name, w in llama(size=64).items()}
    tuned = {name: (w.float() * (1 + 3e-3 * torch.randn(w.shape))).bfloat16() for name, w in weights.items()}
    base, ft = write(tmp_path / "b.safetensors", weights), write(tmp_path / "t.safetensors", tuned)
    compared = wd.compare(base, ft, geometry=True)
    sparsity, unchanged = compared.geometry["sparsity"], compared.metrics["unchanged_fraction"]
    merged = compared.geometry.merge(compared.metrics, on=["name", "module"])
    assert 0.1 < sparsity.mean() < 0.9
    assert merged["sparsity"].tolist() == merged["unchanged_fraction"].tolist()
    assert len(merged) == len(unchanged)


def test_two_different_bfloat16_numbers_never_count_as_unchanged() -> None:
    bits = np.arange(0x0001, 0x7F7F, dtype=np.uint32)
    numbers, following = ((b << 16).view(np.float32).astype(np.float64) for b in (bits, bits + 1))
    assert visibly_changed(numbers[None], (following - numbers)[None]).all()
    assert (following - numbers > 1e-3 * following).all()  # the rule of the paper says the same of them


def test_numbers_are_rounded_to_bfloat16_as_torch_rounds_them() -> None:
    spread = RNG.standard_normal(4096) * 10.0 ** RNG.integers(-42, 38, 4096)
    halves = np.float32(1) + np.arange(64) * 2.0**-8
    values = np.concatenate([spread, halves, -halves, [0.0, -0.0, 3.4e38, 1e-45]])
    expected = torch.tensor(values).float().bfloat16().float().numpy()
    assert in_bfloat16(values).tolist() == expected.tolist()


def test_neighbouring_float16_numbers_are_unchanged_where_bfloat16_has_one_for_both() -> None:
    assert not visibly_changed(np.array([[1.0]]), np.array([[2.0**-10]])).any()


@pytest.mark.parametrize("turn", [1.0, 1e-3, 1e-9])
def test_principal_angles_are_scipys_however_small(turn: float) -> None:
    U = np.linalg.qr(RNG.standard_normal((80, 12)))[0]
    V = np.linalg.qr(U + turn * RNG.standard_normal((80, 12)))[0]
    expected = np.degrees(np.sort(subspace_angles(U, V)))
    np.testing.assert_allclose(principal_angles(U, V), expected, rtol=1e-5)


def test_orthogonal_spaces_are_at_a_right_angle() -> None:
    assert principal_angles(np.eye(6)[:, :2], np.eye(6)[:, 2:4]).tolist() == [90, 90]


def test_ties_count_by_the_chance_with_which_they_would_be_drawn() -> None:
    def drawn(scores: Matrix, count: int) -> set[int]:
        return set(np.lexsort((RNG.random(scores.size), -scores))[:count].tolist())

    scores, elements = RNG.integers(0, 4, 30).astype(float), RNG.random(30) < 0.4
    share = np.mean([len(drawn(scores, 9) & set(np.flatnonzero(elements))) for _ in range(4000)])
    assert Mask.largest(scores, 9).share_of(elements) == pytest.approx(share / elements.sum(), abs=0.01)


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_an_update_that_knows_nothing_of_the_base_has_the_overlap_of_chance(
    tmp_path: Path, share: float
) -> None:
    W0 = spread(200, 300)
    update = RNG.standard_normal(W0.shape) * (RNG.random(W0.shape) < 0.2)
    row = geometry_of(tmp_path, W0, W0 + update, GeometryOptions(share=share, rank=20))
    assert row["overlap_by_chance"] == share
    assert row["overlap_principal"] == pytest.approx(share, abs=0.02)
    assert row["overlap_smallest"] == pytest.approx(share, abs=0.02)


def test_storing_in_bfloat16_alone_leaves_the_changes_at_small_elements(tmp_path: Path) -> None:
    """A small update that knows nothing of the base looks "off-principal" by rounding alone."""
    W0 = torch.tensor(0.02 * RNG.standard_normal((300, 400))).bfloat16()
    update = torch.tensor(1e-5 * RNG.standard_normal(W0.shape))
    W = (W0.double() + update).bfloat16()
    row = geometry_of(tmp_path, W0.double().numpy(), W.double().numpy())
    assert row["sparsity"] == pytest.approx(0.86, abs=0.05)
    assert row["overlap_smallest"] > 0.9
    assert row["overlap_principal"] < 0.15


def test_hills_index_is_the_exponent_of_a_power_law() -> None:
    values = np.sort(np.random.default_rng(0).pareto(2.5, 20_000) + 1)[::-1]
    assert hill(values, 5_000) == pytest.approx(2.5, rel=0.05)


def test_hills_index_needs_two_different_values() -> None:
    assert np.isnan(hill(np.array([2.0])))
    assert np.isnan(hill(np.array([2.0, 2.0, 1.0]), 2))
    assert np.isnan(hill(np.zeros(3)))


def test_entropy_is_one_where_all_are_equal_and_zero_for_one_direction() -> None:
    assert entropy(np.ones(7), 7) == pytest.approx(1)
    assert entropy(np.array([3.0, 0, 0]), 3) == pytest.approx(0)
    assert np.isnan(entropy(np.zeros(3), 3))


def test_a_decomposition_gives_both_sides(tmp_path: Path) -> None:
    for shape in [(300, 400), (400, 300), (20, 30)]:
        W = spread(*shape)
        whole = Decomposed(W)
        U, s, Vh = np.linalg.svd(W, full_matrices=False)
        np.testing.assert_allclose(whole.values, s, rtol=1e-8)
        assert np.abs(np.sum(whole.left(9) * U[:, :9], axis=0)) == pytest.approx(np.ones(9))
        assert np.abs(np.sum(whole.right(9) * Vh[:9].T, axis=0)) == pytest.approx(np.ones(9))


def test_similarity_between_steps_is_that_to_the_last_update(tmp_path: Path) -> None:
    weights = llama(size=32, layers=1)
    end = moved(weights, size=0.1, seed=1)
    early = moved(end, size=0.05, seed=2)
    for step, model in ((1, early), (2, end)):
        write_model(tmp_path / "FT" / f"checkpoint-{step}", model)
    base = write(tmp_path / "base.safetensors", weights)
    table = wd.compare(base, {"FT": tmp_path / "FT"}, modules="q", geometry=GeometryOptions(directions=3))
    first, last = (row for _, row in table.geometry.iterrows())
    V, V_end = (
        np.linalg.svd((m[first["name"]] - weights[first["name"]]).double().numpy())[2][:3].T
        for m in (early, end)
    )
    assert first["step_similarity"] == pytest.approx(np.linalg.norm(V.T @ V_end) ** 2 / 3)
    assert first["step_similarity_by_chance"] == 3 / 32
    assert np.isnan(first["step_similarity_by_initialisation"])
    assert np.isnan(last["step_similarity"])


def adapter(A: Matrix, outputs: int) -> Factors:
    return Factors(RNG.standard_normal((outputs, len(A))), A, 1.0)


@pytest.mark.parametrize("shared", [True, False])
def test_by_initialisation_is_what_unrelated_runs_from_one_seed_have(shared: bool) -> None:
    r, inputs, outputs, sizes = 8, 64, 80, [(1, 1), (2, 8), (8, 8)]
    found, expected = [], []
    for _ in range(60):
        A0, other = RNG.standard_normal((r, inputs)), RNG.standard_normal((r, inputs))
        starts = (A0, A0 if shared else other)
        ends = [adapter(start + 0.4 * RNG.standard_normal(start.shape), outputs) for start in starts]
        U, V = (low_rank_svd(end)[2] for end in ends)
        found.append([subspace_similarity(U[:, :i], V[:, :j]) for i, j in sizes])
        a, b = ((adapter(start, outputs), end) for start, end in zip(starts, ends, strict=True))
        expected.append(by_initialisation(a, b, sizes))
    chance = [max(i, j) / inputs for i, j in sizes]
    np.testing.assert_allclose(np.mean(expected, axis=0), np.mean(found, axis=0), rtol=0.15, atol=0.02)
    if shared:
        assert (np.mean(found, axis=0) > 3 * np.array(chance)).all()
    else:
        np.testing.assert_allclose(np.mean(expected, axis=0), chance, rtol=0.2)


def test_the_samples_adapters_share_their_start() -> None:
    samples = Path("sample_checkpoints")
    compared = wd.compare(
        samples / "base", [samples / "lora", samples / "dora", samples / "ft"], modules=["q"], spectra=True
    )
    pairs = compared.spectra.similarity.query("i == 8 and j == 8").set_index(["method_a", "method_b"])
    of_adapters = pairs.loc[("lora", "dora")]
    assert of_adapters["by_initialisation"].mean() == pytest.approx(0.73, abs=0.03)
    assert of_adapters["similarity"].mean() == pytest.approx(0.92, abs=0.01)
    assert pairs.loc[("ft", "lora"), "by_initialisation"].isna().all()


def test_intruder_dimensions_are_pefts(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    intruders = pytest.importorskip("peft.tuners.lora.intruders")
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("q_proj", torch.nn.Linear(60, 40, bias=False))
    model.add_module("v_proj", torch.nn.Linear(40, 60, bias=False))
    write(tmp_path / "base.safetensors", model.state_dict())
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    tuned = peft.get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    tuned.save_pretrained(tmp_path / "lora")
    said: list[str] = []
    intruders.reduce_intruder_dimension(tuned, logging_sink=said.append)
    theirs = {}
    for line in said:
        if found := re.search(r"\b([qv])_proj: (?:Intruders: (\d+)|No intruders)", line):
            theirs[found[1]] = int(found[2] or 0)
    ours = wd.compare(tmp_path / "base.safetensors", tmp_path / "lora", modules="all", spectra=True)
    found = ours.spectra.matrices.set_index("module")["intruder_dimensions"].to_dict()
    assert {module.removesuffix("_proj"): count for module, count in found.items()} == theirs
    assert sum(theirs.values()) > 0


def test_an_update_of_zero_has_moved_nothing(tmp_path: Path) -> None:
    W0 = spread(30, 40)
    row = geometry_of(tmp_path, W0, np.where(np.arange(40) < 0, 1.0, W0))
    assert row[["sparsity", "nss"]].tolist() == [1, 0]
    assert row["left_angle_max"] == pytest.approx(0, abs=1e-5)
    assert row[["overlap_principal", "update_hill", "update_entropy"]].isna().all()


def test_a_base_of_zero_has_no_directions(tmp_path: Path) -> None:
    row = geometry_of(tmp_path, np.zeros((30, 40)), spread(30, 40))
    assert row["subspace"] == 0
    assert row[["nss", "left_angle_max", "base_hill", "base_entropy"]].isna().all()


def test_a_matrix_with_nan_has_an_empty_row(tmp_path: Path) -> None:
    weights = llama()
    broken = {
        name: torch.full_like(w, torch.nan) if "0.self_attn.q" in name else w for name, w in weights.items()
    }
    base, ft = write(tmp_path / "base.safetensors", weights), write(tmp_path / "ft.safetensors", broken)
    table = wd.compare(base, ft, modules="q", geometry=True).geometry.set_index("layer")
    assert table.loc[0, "subspace":].drop("run").isna().all()
    assert table.loc[1, "sparsity"] == 1


def test_geometry_is_saved_and_loaded_with_its_options(tmp_path: Path) -> None:
    weights = llama()
    base, lora = write(tmp_path / "base.safetensors", weights), write_lora(tmp_path / "lora", weights)
    compared = wd.compare(base, {"LoRA": lora}, geometry=GeometryOptions(k=3))
    assert tuple(compared.geometry) == GEOMETRY_COLUMNS
    compared.save(tmp_path / "out", figures=[], report=False)
    loaded = wd.Comparison.load(tmp_path / "out")
    assert loaded.geometry.equals(compared.geometry)
    assert loaded.spectra is None
    assert loaded.run.options.geometry == {
        **{"k": 3, "rank": None, "share": 0.3},
        **{"directions": 16, "tail": None},
    }
    assert (tmp_path / "out" / "geometry.csv").exists()


def test_spectra_and_geometry_of_one_walk_are_those_of_two(tmp_path: Path) -> None:
    weights = llama(size=300, layers=1)
    base = write(tmp_path / "base.safetensors", weights)
    ft = write(tmp_path / "ft.safetensors", moved(weights, size=0.05, only="q_proj"))
    both = wd.compare(base, ft, modules="q", spectra=True, geometry=True)
    assert both.spectra.matrices.equals(wd.compare(base, ft, modules="q", spectra=True).spectra.matrices)
    assert both.geometry.equals(wd.compare(base, ft, modules="q", geometry=True).geometry)


def test_ctrl_c_keeps_the_geometry_that_was_taken(tmp_path: Path) -> None:
    def stop(phase: str, done: int, _: int) -> None:
        if phase == "singular values" and done == 2:
            raise KeyboardInterrupt

    weights = llama(size=16)
    base, ft = (
        write(tmp_path / "base.safetensors", weights),
        write(tmp_path / "ft.safetensors", moved(weights)),
    )
    with pytest.raises(Interrupted) as interrupted:
        wd.compare(base, ft, geometry=True, progress=stop)
    partial = interrupted.value.comparison
    assert len(partial.geometry) == 2
    assert partial.geometry["nss"].notna().all()


def test_without_being_asked_no_geometry_is_taken(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", llama())
    assert wd.compare(base, write_lora(tmp_path / "lora", llama())).geometry is None


@pytest.mark.parametrize(
    "wrong", [{"k": 0}, {"rank": 0}, {"share": 1.0}, {"share": 0.0}, {"directions": 0}, {"tail": 1}]
)
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GeometryOptions(**wrong)

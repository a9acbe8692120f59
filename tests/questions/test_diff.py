"""Pairs of checkpoints of which it is known what the one is to the other, and their ΔM and ΔD by the definition."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import llama, moved, write_lora, write_model, write_steps
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import wdanalysis as wd
from wdanalysis.cli import app
from wdanalysis.errors import CheckpointError

WEIGHTS = llama(size=32)
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", WEIGHTS)


def test_a_copy_is_identical(base: Path, tmp_path: Path) -> None:
    found = wd.diff(base, write_model(tmp_path / "copy", WEIGHTS))
    assert found.verdict == "identical"
    assert set(found.tensors["state"]) == {"identical"}
    assert found.evidence == ("Of 16 tensors in both, 16 are identical.",)


def test_other_prefixes_are_no_difference(base: Path, tmp_path: Path) -> None:
    renamed = {name.removeprefix("model."): tensor for name, tensor in WEIGHTS.items()}
    assert wd.diff(base, write_model(tmp_path / "copy", renamed)).verdict == "identical"


@pytest.mark.parametrize("axis", ["out", "in"])
def test_a_tuned_model_has_delta_m_and_delta_d_of_the_definition(
    base: Path, tmp_path: Path, axis: str
) -> None:
    tuned = moved(WEIGHTS, 0.02, only="q_proj")
    found = wd.diff(base, write_model(tmp_path / "tuned", tuned), axis=axis)
    assert found.verdict == "tuned"
    changed = found.tensors[found.tensors["state"] == "changed"]
    assert changed["name"].tolist() == [name for name in WEIGHTS if "q_proj" in name]
    for row in changed.to_dict("records"):
        W0, W = WEIGHTS[row["name"]].double(), tuned[row["name"]].double()
        assert row["delta_m"] == pytest.approx(float(wd.delta_m(W0, W, axis=axis)), rel=1e-9)
        assert row["delta_d"] == pytest.approx(float(wd.delta_d(W0, W, axis=axis)), rel=1e-6)
        assert row["rel_update_norm"] == pytest.approx(float((W - W0).norm() / W0.norm()), rel=1e-9)
    assert found.by_module().set_index("module").loc["q", "changed"] == 3


def test_a_single_norm_that_moved_is_seen(base: Path, tmp_path: Path) -> None:
    tuned = {**WEIGHTS, "model.layers.1.input_layernorm.weight": torch.full((32,), 1.5)}
    found = wd.diff(base, write_model(tmp_path / "tuned", tuned))
    assert found.verdict == "tuned"
    (row,) = found.tensors[found.tensors["state"] == "changed"].to_dict("records")
    assert row["name"] == "model.layers.1.input_layernorm.weight"
    assert (row["rel_update_norm"], row["unchanged_fraction"]) == (0.5, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["narrower", "wider"])
@pytest.mark.parametrize("stored", ["as cast", "as float32"])
def test_a_cast_is_told_both_ways_and_when_it_was_undone(
    tmp_path: Path, dtype: torch.dtype, way: str, stored: str
) -> None:
    cast = {name: tensor.to(dtype) for name, tensor in WEIGHTS.items()}
    if stored == "as float32":
        cast = {name: tensor.float() for name, tensor in cast.items()}
    pair = [write_model(tmp_path / "full", WEIGHTS), write_model(tmp_path / "cast", cast)]
    found = wd.diff(*(pair if way == "narrower" else reversed(pair)))
    assert found.verdict == "cast"
    name = {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    assert found.tensors.set_index("name").loc[Q, "rounded_to"] == name


def test_the_same_numbers_in_a_wider_dtype_are_a_cast(tmp_path: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in WEIGHTS.items()}
    wide = {name: tensor.float() for name, tensor in half.items()}
    found = wd.diff(write_model(tmp_path / "half", half), write_model(tmp_path / "wide", wide))
    assert (found.verdict, set(found.tensors["state"])) == ("cast", {"cast"})


def test_two_casts_of_one_model_are_casts(tmp_path: Path) -> None:
    a, b = ({name: t.to(dtype) for name, t in WEIGHTS.items()} for dtype in (torch.bfloat16, torch.float16))
    assert wd.diff(write_model(tmp_path / "a", a), write_model(tmp_path / "b", b)).verdict == "cast"


def test_a_cast_of_a_tuned_model_is_tuned(base: Path, tmp_path: Path) -> None:
    tuned = {name: tensor.bfloat16() for name, tensor in moved(WEIGHTS, 0.05).items()}
    found = wd.diff(base, write_model(tmp_path / "tuned", tuned))
    assert found.verdict == "tuned"
    assert set(found.tensors["dtype_b"]) == {"BF16"}


@pytest.mark.parametrize("seed", range(5))
def test_independent_models_are_unrelated(base: Path, tmp_path: Path, seed: int) -> None:
    other = write_model(tmp_path / "other", llama(size=32, seed=100 + seed))
    assert wd.diff(base, other).verdict == "unrelated"


def test_models_of_other_names_or_shapes_are_unrelated(base: Path, tmp_path: Path) -> None:
    found = wd.diff(base, write_model(tmp_path / "shape", llama(size=16)))
    assert found.verdict == "unrelated"
    assert "20 × 32 and 20 × 16" in found.evidence[0]
    named = {f"blocks.{index}.weight": tensor for index, tensor in enumerate(WEIGHTS.values())}
    assert wd.diff(base, write_model(tmp_path / "named", named)).verdict == "unrelated"


def test_training_on_is_told_by_the_steps_or_by_how_far_it_went(base: Path, tmp_path: Path) -> None:
    write_steps(tmp_path / "run", WEIGHTS)
    found = wd.diff(tmp_path / "run/checkpoint-10", tmp_path / "run/checkpoint-30")
    assert found.verdict == "continued"
    assert "A is its step 10 and B its step 30" in found.evidence[-1]
    assert wd.diff(base, tmp_path / "run/checkpoint-30").verdict == "tuned"
    assert wd.diff(base, write_model(tmp_path / "far", moved(WEIGHTS, 0.7))).verdict == "continued"


def test_what_only_one_has_is_named(base: Path, tmp_path: Path) -> None:
    rest = {name: tensor for name, tensor in WEIGHTS.items() if "layers.2" not in name}
    rest["score.weight"] = torch.ones(2, 32)
    found = wd.diff(base, write_model(tmp_path / "rest", rest))
    assert found.verdict == "incomplete"
    assert found.only_b == ("score.weight",)
    assert set(found.only_a) == {name for name in WEIGHTS if "layers.2" in name}


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_a_quantised_model_is_called_so(base: Path, tmp_path: Path, kind: str) -> None:
    quantised = dict(WEIGHTS)
    for name in [name for name in WEIGHTS if "proj" in name]:
        weight = quantised.pop(name)
        if kind == "nf4":
            functional = pytest.importorskip("bitsandbytes").functional
            codes, state = functional.quantize_4bit(weight, quant_type="nf4")
            quantised[name] = codes
            quantised |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
        else:
            quantised[name] = weight.to(torch.float8_e4m3fn)
            quantised[f"{name}_scale_inv"] = torch.ones(1, 1)
    found = wd.diff(base, write_model(tmp_path / "quantised", quantised))
    assert found.verdict == "quantised"


def test_an_adapter_is_measured_against_its_base(base: Path, tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "lora", WEIGHTS)
    found = wd.diff(base, adapter)
    assert found.verdict == "tuned"
    assert found.evidence[0] == "Of 6 modules that B adapts, 6 changed."
    stored = load_file(adapter / "adapter_model.safetensors")
    stem = f"base_model.model.{Q.removesuffix('.weight')}"
    update = 2 * stored[f"{stem}.lora_B.weight"].double() @ stored[f"{stem}.lora_A.weight"].double()
    W0 = WEIGHTS[Q].double()
    row = found.tensors.set_index("name").loc[Q]
    assert row["delta_d"] == pytest.approx(float(wd.delta_d(W0, W0 + update)), rel=1e-6)
    with pytest.raises(CheckpointError, match="give the model first"):
        wd.diff(adapter, base)


def test_two_adapters_are_compared_by_their_updates(tmp_path: Path) -> None:
    first = write_lora(tmp_path / "first", WEIGHTS)
    assert wd.diff(first, write_lora(tmp_path / "copy", WEIGHTS)).verdict == "identical"
    assert wd.diff(first, write_lora(tmp_path / "other", WEIGHTS, seed=9)).verdict == "unrelated"
    later = write_lora(tmp_path / "later", WEIGHTS)
    file = later / "adapter_model.safetensors"
    tensors = {n: t + 1e-3 * torch.randn_like(t) * ("lora_B" in n) for n, t in load_file(file).items()}
    save_file(tensors, file)
    found = wd.diff(first, later)
    assert found.verdict == "continued"
    a, b = (load_file(at / "adapter_model.safetensors") for at in (first, later))
    for row in found.tensors.to_dict("records"):
        stem = f"base_model.model.{row['name']}.lora_"
        x, y = (2 * of[f"{stem}B.weight"].double() @ of[f"{stem}A.weight"].double() for of in (a, b))
        assert row["rel_update_norm"] == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-6)
        cos = float((x * y).sum() / x.norm() / y.norm())
        assert row["delta_d"] == pytest.approx(1 - cos, abs=1e-9)


def test_nan_and_integers_are_compared_as_they_are(tmp_path: Path) -> None:
    weights = {**WEIGHTS, "counts": torch.arange(5)}
    weights["model.layers.0.input_layernorm.weight"] = torch.full((32,), float("nan"))
    a = write_model(tmp_path / "a", weights)
    assert wd.diff(a, write_model(tmp_path / "b", weights)).verdict == "identical"
    found = wd.diff(a, write_model(tmp_path / "c", {**weights, "counts": torch.arange(5) + 1}))
    assert found.tensors.set_index("name").loc["counts", "state"] == "changed"


def test_the_command_prints_the_verdict_and_exits_with_it_where_asked(base: Path, tmp_path: Path) -> None:
    copy = write_model(tmp_path / "copy", WEIGHTS)
    tuned = write_model(tmp_path / "tuned", moved(WEIGHTS, 0.02, only="v_proj"))

    def run(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["diff", *map(str, arguments)])
        return result.exit_code, result.output

    assert run(base, copy, "--exit-code")[0] == 0
    code, output = run(base, tuned)
    assert (code, output.splitlines()[0]) == (0, "B is A, tuned.")
    assert "Of 16 tensors in both, 3 changed." in output
    assert run(base, tuned, "--exit-code", "--quiet") == (1, "")
    found = json.loads(run(base, tuned, "--json")[1])
    assert found["verdict"] == "tuned"
    assert len(found["tensors"]) == 16
    assert all(row["delta_d"] > 0 for row in found["tensors"] if row["module"] == "v")

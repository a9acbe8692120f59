"""Merges by PEFT, right ones and ones with a fault that merges have had: each is told for what it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import wdanalysis as wd
from wdanalysis.checkpoints import open_checkpoint
from wdanalysis.checkpoints.tensors import Checkpoint, FormulaUpdate
from wdanalysis.cli import app
from wdanalysis.errors import CheckpointError
from wdanalysis.questions.verify import Verification, _Check

Weights = dict[str, torch.Tensor]

TARGETS = ["q_proj", "v_proj", "down_proj"]
"""q is square, v and down are not."""

SCALE = 1.5


def model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(dtype)


@pytest.fixture(scope="module", params=["LoRA", "DoRA"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter as PEFT saves them; the updates are a tenth of the weights."""
    folder = tmp_path_factory.mktemp(request.param)
    base = model()
    base.save_pretrained(folder / "base")
    adapted = get_peft_model(
        base,
        LoraConfig(r=4, lora_alpha=4 * SCALE, target_modules=TARGETS, use_dora=request.param == "DoRA"),
    )
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.01)
            elif "magnitude" in name:
                weight.mul_(1 + 0.2 * torch.rand_like(weight))
    adapted.save_pretrained(str(folder / "adapter"))
    return folder / "base", folder / "adapter"


def merged_by_peft(trained: tuple[Path, Path], folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """As PEFT merges in a dtype."""
    base = LlamaForCausalLM.from_pretrained(trained[0], dtype=dtype)
    merged = PeftModel.from_pretrained(base, str(trained[1])).to(dtype).merge_and_unload()
    merged.save_pretrained(folder)
    return folder


def factors(adapter: Path) -> dict[str, Weights]:
    """A, B and m by module."""
    found: dict[str, Weights] = {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        module, _, kind = name.removeprefix("base_model.model.").partition(".lora_")
        found.setdefault(module, {})[kind.removesuffix(".weight")] = tensor.double()
    return found


def with_fault(trained: tuple[Path, Path], folder: Path, fault: Callable[..., torch.Tensor | None]) -> Path:
    """PEFT's own merge, in which `fault(w0, u, m, own)` stands for each module; None leaves PEFT's."""
    merged_by_peft(trained, folder)
    base, merged = (load_file(at / "model.safetensors") for at in (trained[0], folder))
    for module, of in factors(trained[1]).items():
        name = f"{module}.weight"
        u = SCALE * of["B"] @ of["A"]
        weight = fault(base[name].double(), u, of.get("magnitude_vector"), merged[name].double())
        if weight is not None:
            merged[name] = weight.float().contiguous()
    save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def statuses(found: Verification) -> dict[str, set[str]]:
    return found.modules.groupby("role")["status"].apply(set).to_dict()


def dora(w: torch.Tensor, m: torch.Tensor | None) -> torch.Tensor:
    return w if m is None else m[:, None] * w / w.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merge_by_peft_in_any_dtype_holds(
    trained: tuple[Path, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    found = wd.verify(*trained, merged_by_peft(trained, tmp_path / "merged", dtype))
    assert found.holds, found.sentences()
    assert found.modules["share"].between(0.9, 1.1).all()


def test_a_merge_that_was_cast_afterwards_holds_and_says_to_what(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = merged_by_peft(trained, tmp_path / "merged")
    file = folder / "model.safetensors"
    save_file({name: tensor.bfloat16().float() for name, tensor in load_file(file).items()}, file)
    found = wd.verify(*trained, folder)
    assert found.holds
    assert set(found.modules["dtype"]) == {"BF16"}


def test_half_the_modules(trained: tuple[Path, Path], tmp_path: Path) -> None:
    def only_square(w0: torch.Tensor, u: torch.Tensor, m: Any, own: torch.Tensor) -> torch.Tensor | None:
        return None if w0.shape[0] == w0.shape[1] else w0

    found = wd.verify(*trained, with_fault(trained, tmp_path / "merged", only_square))
    assert statuses(found) == {"q": {"merged"}, "v": {"missing"}, "down": {"missing"}}
    assert found.modules.set_index("role").loc["v", "share"].abs().max() == 0
    assert "is in 2 of 6 modules" in found.sentences()[0]


@pytest.mark.parametrize("times", [0.5, 2.0, -1.0, 1 / SCALE])
def test_another_scale(trained: tuple[Path, Path], tmp_path: Path, times: float) -> None:
    def scaled(w0: torch.Tensor, u: torch.Tensor, m: Any, own: torch.Tensor) -> torch.Tensor:
        return dora(w0 + times * u, m)

    found = wd.verify(*trained, with_fault(trained, tmp_path / "merged", scaled))
    assert not found.holds
    assert found.modules["found_scale"].to_numpy() == pytest.approx(times * SCALE, rel=1e-3)
    expected = {2.0: "twice", -1.0: "subtracted (-1 times)"}.get(times, f"{times:.3g} times")
    assert set(found.modules["status"]) == {expected}


def test_merged_twice(trained: tuple[Path, Path], tmp_path: Path) -> None:
    def again(w0: torch.Tensor, u: torch.Tensor, m: Any, own: torch.Tensor) -> torch.Tensor:
        return dora(own + u, m)

    found = wd.verify(*trained, with_fault(trained, tmp_path / "merged", again))
    assert set(found.modules["status"]) == {"merged twice" if "DoRA" in str(trained[0]) else "twice"}


def test_an_update_that_was_transposed(trained: tuple[Path, Path], tmp_path: Path) -> None:
    def transposed(w0: torch.Tensor, u: torch.Tensor, m: Any, own: torch.Tensor) -> torch.Tensor | None:
        return w0 + u.T if m is None and u.shape == u.T.shape else None

    if "DoRA" in str(trained[0]):
        pytest.skip("of LoRA")
    found = wd.verify(*trained, with_fault(trained, tmp_path / "merged", transposed))
    assert statuses(found) == {"q": {"transposed"}, "v": {"merged"}, "down": {"merged"}}


FAULTS: dict[str, Callable[..., torch.Tensor | None]] = {
    "magnitudes left out": lambda w0, u, m, own: w0 + u,
    "BA left out": lambda w0, u, m, own: dora(w0, m),
    "divided by ‖W0‖": lambda w0, u, m, own: m[:, None] * (w0 + u) / w0.norm(dim=1, keepdim=True),
    "other axis": lambda w0, u, m, own: (
        m[None, :] * (w0 + u) / (w0 + u).norm(dim=0, keepdim=True) if u.shape == u.T.shape else None
    ),
    "magnitudes on the other axis": lambda w0, u, m, own: (
        m[None, :] * (w0 + u) / (w0 + u).norm(dim=1, keepdim=True) if u.shape == u.T.shape else None
    ),
    "norm of the other axis": lambda w0, u, m, own: (
        m[:, None] * (w0 + u) / (w0 + u).norm(dim=0, keepdim=True) if u.shape == u.T.shape else None
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_faults_of_dora(
    trained: tuple[Path, Path], tmp_path: Path, fault: str, dtype: torch.dtype
) -> None:
    if "LoRA" in str(trained[0]):
        pytest.skip("of DoRA")
    folder = with_fault(trained, tmp_path / "merged", FAULTS[fault])
    file = folder / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    found = statuses(wd.verify(*trained, folder))
    assert found["q"] == {fault}
    if "axis" not in fault:
        assert found["down"] == {fault}
    else:
        assert found["down"] == {"merged"}


def test_something_that_no_fault_explains(trained: tuple[Path, Path], tmp_path: Path) -> None:
    def noise(w0: torch.Tensor, u: torch.Tensor, m: Any, own: torch.Tensor) -> torch.Tensor:
        return own + u.norm() / u.numel() ** 0.5 * torch.randn(u.shape, dtype=u.dtype)

    found = wd.verify(*trained, with_fault(trained, tmp_path / "merged", noise))
    assert set(found.modules["status"]) == {"something else"}


def test_a_merge_on_another_base_is_told_by_the_rest(trained: tuple[Path, Path], tmp_path: Path) -> None:
    folder = merged_by_peft(trained, tmp_path / "merged")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 1.01
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    found = wd.verify(*trained, folder)
    assert not found.holds
    assert dict(zip(found.others["name"], found.others["status"], strict=True)) == {
        "lm_head.weight": "changed beside the adapter",
        "model.norm.weight": "not in MERGED",
    }


@pytest.mark.parametrize("cast_first", [False, True])
def test_an_update_too_small_for_the_dtype_is_erased(tmp_path: Path, cast_first: bool) -> None:
    weight = (1 + torch.rand(32, 32)) * 0.1
    weight = weight if cast_first else weight.bfloat16().float()
    name = "model.layers.0.self_attn.q_proj"
    for at in ("base", "merged", "adapter"):
        (tmp_path / at).mkdir()
    save_file({f"{name}.weight": weight}, tmp_path / "base/model.safetensors")
    save_file({f"{name}.weight": weight.bfloat16()}, tmp_path / "merged/model.safetensors")
    low = {
        f"base_model.model.{name}.lora_A.weight": 1e-3 * torch.randn(2, 32).clamp(-2, 2),
        f"base_model.model.{name}.lora_B.weight": 1e-3 * torch.randn(32, 2).clamp(-2, 2),
    }
    save_file(low, tmp_path / "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    found = wd.verify(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert found.modules["status"].tolist() == ["erased by rounding"]
    assert not found.holds


def test_modules_to_save_and_what_is_absent_are_named(tmp_path: Path) -> None:
    base = model()
    base.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                weight.add_(0.01 * torch.randn_like(weight))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert wd.verify(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged").holds
    file = tmp_path / "merged/model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "score.weight": torch.ones(2, 48)}, file, metadata={"format": "pt"})
    found = wd.verify(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert found.holds
    assert "also has 1 tensor (score.weight)" in found.notes[0]
    tensors["lm_head.weight"] = load_file(tmp_path / "base/model.safetensors")["lm_head.weight"]
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    found = wd.verify(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert found.others["status"].tolist() == ["not replaced by the adapter's own"]
    assert found.modules["status"].tolist() == ["merged", "not in MERGED"]


@pytest.mark.parametrize("times", [0.0, 0.5, 1.0])
def test_an_update_by_formula_is_checked_as_well(tmp_path: Path, times: float) -> None:
    """IA³'s rescaled rows, of which a part is merged."""
    name, scale = "model.layers.0.mlp.down_proj", 1 + 0.2 * torch.rand(12, 1).double()
    weight = torch.randn(12, 20)
    tensors = {"base": weight, "merged": (weight.double() * (1 + times * (scale - 1))).float(), "l": scale}
    stored = {}
    for at, tensor in tensors.items():
        save_file({f"{name}.weight": tensor.contiguous()}, tmp_path / f"{at}.safetensors")
        stored[at] = open_checkpoint(tmp_path / f"{at}.safetensors")
    factors = tuple(stored["l"].tensors.values())
    update = FormulaUpdate(name, "IA³", factors, lambda W0: scale.numpy() * W0)
    adapter = Checkpoint(tmp_path, "PEFT adapter", {}, formulas=(update,), method="IA³")
    checks, others = _Check(stored["base"], adapter, stored["merged"]).run(None)
    assert not others
    assert [check.status for check in checks] == [{0.0: "missing", 0.5: "0.5 times", 1.0: "merged"}[times]]
    assert checks[0].share == pytest.approx(times, abs=1e-6)


def test_gpt2s_conv1d_is_checked_as_it_lies(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["c_attn", "c_proj"], use_dora=True, fan_in_fan_out=True)
    adapted = get_peft_model(base, config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.05)
            elif "magnitude" in name:
                weight.mul_(1 + 0.2 * torch.rand_like(weight))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    found = wd.verify(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert found.holds, found.sentences()
    assert len(found.modules) == 6


def test_a_nan_is_named(trained: tuple[Path, Path], tmp_path: Path) -> None:
    folder = merged_by_peft(trained, tmp_path / "merged", torch.bfloat16)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file)
    found = wd.verify(*trained, folder).modules.set_index("module")["status"]
    assert found["model.layers.0.self_attn.q_proj"] == "not finite (NaN or infinite)"


def test_the_command_prints_the_answer_and_exits_with_it(trained: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = map(str, trained)
    merged = str(merged_by_peft(trained, tmp_path / "merged"))
    result = CliRunner().invoke(app, ["verify", base, adapter, merged])
    assert (result.exit_code, "is in all 6 modules, once and whole" in result.output) == (0, True), (
        result.output
    )
    result = CliRunner().invoke(app, ["verify", base, adapter, base])
    assert result.exit_code == 1
    assert "missing: 6 modules" in result.output
    result = CliRunner().invoke(app, ["verify", base, adapter, base, "--json"])
    assert json.loads(result.output)["holds"] is False
    result = CliRunner().invoke(app, ["verify", base, adapter, base, "--quiet"])
    assert (result.exit_code, result.output) == (1, "")


def test_the_three_must_be_what_they_are_called(trained: tuple[Path, Path]) -> None:
    base, adapter = trained
    for given, word in (
        ((adapter, adapter, base), "BASE must be"),
        ((base, base, base), "is no adapter"),
        ((base, adapter, adapter), "MERGED must be"),
    ):
        with pytest.raises(CheckpointError, match=word):
            wd.verify(*given)

"""Experts' matrices mean what transformers' own experts do with them, stored each by itself or in one tensor."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

import wdanalysis as wd
from wdanalysis.checkpoints import open_checkpoint
from wdanalysis.checkpoints.dtypes import widen
from wdanalysis.checkpoints.model import Model, describe
from wdanalysis.checkpoints.storage import LocalFile

HIDDEN, INNER, EXPERTS = 16, 12, 3
LLAMA: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": INNER,
    "vocab_size": 32,
    "pad_token_id": 0,
}
LOCAL = LLAMA | {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
QWEN = LLAMA | {
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": INNER,
    "decoder_sparse_step": 1,
    "head_dim": 4,
}


def _deepseek() -> Any:
    config = hf.DeepseekV3Config(
        **LLAMA | {"num_key_value_heads": 4},
        n_routed_experts=EXPERTS,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=INNER,
        first_k_dense_replace=0,
        q_lora_rank=6,
        kv_lora_rank=6,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
    )
    return hf.DeepseekV3ForCausalLM(config)


def _dbrx() -> Any:
    config = hf.DbrxConfig(
        d_model=HIDDEN,
        n_heads=4,
        n_layers=2,
        vocab_size=32,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0},
        ffn_config={
            "ffn_hidden_size": INNER,
            "moe_num_experts": EXPERTS,
            "moe_top_k": 2,
            "hidden_size": HIDDEN,
        },
    )
    return hf.DbrxForCausalLM(config)


def _llama4() -> Any:
    config = hf.Llama4TextConfig(
        **LOCAL, intermediate_size_mlp=INNER, interleave_moe_layer_step=1, head_dim=4, moe_layers=[0, 1]
    )
    return hf.Llama4ForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**LOCAL)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**QWEN)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**LOCAL, head_dim=4)),
    "granitemoe": lambda: hf.GraniteMoeForCausalLM(hf.GraniteMoeConfig(**LOCAL)),
    "llama4": _llama4,
    "deepseek_v3": _deepseek,
    "dbrx": _dbrx,
}


def _model(kind: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[kind]().double().eval()
    model.set_experts_implementation("eager")
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.0 if name.endswith("bias") else 0.3)
    return model


def _in_memory(model: Any, folder: Path) -> Path:
    """The model under the names that it has in memory."""
    folder.mkdir()
    save_file({name: w.clone() for name, w in model.state_dict().items()}, folder / "model.safetensors")
    model.config.save_pretrained(folder)
    return folder


def _as_saved(model: Any, folder: Path) -> Path:
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
    return folder


def _experts(described: Model) -> dict[tuple[int | None, str, int], np.ndarray]:
    """Every expert's matrix as out × in, by layer, module and expert."""
    found = {}
    for matrix in described.matrices.values():
        if matrix.expert is not None:
            stored = widen(matrix.tensor.read_rows(0, matrix.rows))
            outputs = stored.T if matrix.in_by_out else stored
            for part in matrix.parts:
                rows = [i for start, stop in part.runs for i in range(start, stop, part.stride)]
                found[matrix.layer, part.module, matrix.expert] = outputs[rows]
    return found


def _module(model: Any) -> nn.Module:
    layer = model.get_submodule("transformer.blocks" if hasattr(model, "transformer") else "model.layers")[1]
    return next(module for name, module in layer.named_modules() if name.endswith("experts"))


def _output(model: Any, x: torch.Tensor, expert: int) -> torch.Tensor:
    """What one expert of the second layer makes of x, by the model's own code."""
    experts = _module(model)
    if type(experts).__name__ == "Llama4TextExperts":
        return experts(x.repeat(EXPERTS, 1)).view(EXPERTS, *x.shape)[expert].detach()
    chosen = torch.full((len(x), 1), expert)
    return experts(x, chosen, torch.ones(len(x), 1, dtype=x.dtype)).reshape(x.shape).detach()


@pytest.mark.parametrize("kind", MODELS)
def test_an_experts_matrices_are_those_that_the_model_itself_multiplies_by(kind: str, tmp_path: Path) -> None:
    model = _model(kind)
    x = torch.randn(5, HIDDEN, dtype=torch.float64)
    matrices = _experts(describe(open_checkpoint(_in_memory(model, tmp_path / "base"))))
    assert {key for key in matrices if key[0] == 1} == {
        (1, role, expert) for role in ("gate", "up", "down") for expert in range(EXPERTS)
    }
    for expert in range(EXPERTS):
        gate, up, down = (torch.from_numpy(matrices[1, role, expert]) for role in ("gate", "up", "down"))
        gated = x @ gate.T
        if kind == "gpt_oss":
            config = model.config
            gated = gated.clamp(max=config.swiglu_limit)
            raised = (x @ up.T).clamp(-config.swiglu_limit, config.swiglu_limit) + 1
            inner = gated * torch.sigmoid(gated * config.swiglu_alpha) * raised
        else:
            inner = nn.functional.silu(gated) * (x @ up.T)
        torch.testing.assert_close(inner @ down.T, _output(model, x, expert))


@pytest.mark.parametrize("kind", MODELS)
def test_an_experts_matrices_are_the_same_on_disk_and_in_memory(kind: str, tmp_path: Path) -> None:
    model = _model(kind)
    saved = _experts(describe(open_checkpoint(_as_saved(model, tmp_path / "saved"))))
    in_memory = _experts(describe(open_checkpoint(_in_memory(model, tmp_path / "memory"))))
    assert saved.keys() == in_memory.keys()
    for key, matrix in saved.items():
        np.testing.assert_array_equal(matrix, in_memory[key])


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4", "granitemoe", "dbrx", "mixtral"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_the_table_has_a_row_for_every_expert(kind: str, suffix: str, axis: str, tmp_path: Path) -> None:
    model = _model(kind)
    base = _in_memory(model, tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tuned = _in_memory(model, tmp_path / "tuned")
    if suffix == "bin":
        for folder in (base, tuned):
            torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
    before, after = (_experts(describe(open_checkpoint(folder))) for folder in (base, tuned))
    metrics = wd.compare(base, {"FT": tuned}, modules=["gate", "up", "down"], axis=axis).metrics
    assert set(metrics["module"][metrics["expert"].isna()]) <= {"shared.gate", "shared.up", "shared.down"}
    metrics = metrics[metrics["expert"].notna()]
    assert len(metrics) == 2 * 3 * EXPERTS
    for row in metrics.itertuples():
        W0, W = before[row.layer, row.module, row.expert], after[row.layer, row.module, row.expert]
        of_vector = 1 if axis == "out" else 0
        m0, m = (np.linalg.norm(w, axis=of_vector) for w in (W0, W))
        assert (row.vectors, row.length) == (W0.shape[1 - of_vector], W0.shape[of_vector])
        assert row.delta_m == pytest.approx(np.mean(np.abs(m - m0)))
        assert row.delta_d == pytest.approx(np.mean(1 - (W0 * W).sum(of_vector) / (m0 * m)))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("base_is_saved", [True, False])
def test_experts_on_disk_are_compared_with_those_in_memory(
    kind: str, base_is_saved: bool, tmp_path: Path
) -> None:
    model = _model(kind)
    ways = {"memory": _in_memory, "disk": _as_saved}
    before = {name: way(model, tmp_path / f"base {name}") for name, way in ways.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    after = {name: way(model, tmp_path / f"tuned {name}") for name, way in ways.items()}
    base, tuned = ("disk", "memory") if base_is_saved else ("memory", "disk")
    of_experts = ["gate", "up", "down"]
    mixed = wd.compare(before[base], {"FT": after[tuned]}, modules=of_experts)
    alike = wd.compare(before["memory"], {"FT": after["memory"]}, modules=of_experts)
    assert mixed.skipped.empty
    columns = ["layer", "module", "expert", "vectors", "length", "delta_m", "delta_d"]
    pd.testing.assert_frame_equal(mixed.metrics[columns], alike.metrics[columns])


def test_a_matrix_that_does_not_lie_in_rows_is_read_whole_and_once(tmp_path: Path) -> None:
    stack = torch.randn(EXPERTS, 4, 6).transpose(1, 2)
    torch.save({"model.layers.0.mlp.experts.down_proj": stack}, tmp_path / "model.pt")
    tensor = open_checkpoint(tmp_path / "model.pt").tensors["model.layers.0.mlp.experts.down_proj"]
    of_one = tensor.of_stack(1, EXPERTS)
    rows = [of_one.read_rows(start, start + 2) for start in (0, 2, 4)]
    np.testing.assert_array_equal(np.concatenate(rows), stack[1].numpy())


def test_of_an_experts_matrix_only_the_rows_that_are_asked_for_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = torch.randn(EXPERTS, 64, 32)
    save_file({"model.layers.0.mlp.experts.down_proj": stack}, tmp_path / "model.safetensors")
    of_one = describe(open_checkpoint(tmp_path / "model.safetensors")).matrices[
        "model.layers.0.mlp.experts.down_proj[2]"
    ]
    read: list[int] = []
    read_into = LocalFile.read_into
    monkeypatch.setattr(
        LocalFile,
        "read_into",
        lambda self, offset, buffer: read.append(buffer.nbytes) or read_into(self, offset, buffer),
    )
    np.testing.assert_array_equal(of_one.tensor.read_rows(5, 7), stack[2, 5:7].numpy())
    assert read == [2 * 32 * 4]

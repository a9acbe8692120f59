"""Whatever stands in a PEFT adapter's files, what comes out is an update or one of our own errors."""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from wdanalysis.checkpoints import open_checkpoint
from wdanalysis.errors import WdAnalysisError

BASE = {
    "layers.0.q_proj.weight": torch.randn(6, 4),
    "layers.0.q_proj.bias": torch.randn(6),
    "layers.0.conv.weight": torch.randn(6, 4, 2, 2),
    "layers.0.mlp.experts.gate_up_proj": torch.randn(3, 6, 4),
    "layers.0.mlp.experts.down_proj": torch.randn(3, 4, 4),
    "embed_tokens.weight": torch.randn(5, 4),
    "layers.0.norm.weight": torch.randn(4),
}

PARTS: dict[str, tuple[str, ...]] = {
    "LORA": (
        *("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_diag", "lora_magnitude_vector"),
        *("base_layer.lora_A.weight", "base_layer.lora_B.weight", "lora_embedding_A", "lora_embedding_B"),
        "token_adapter.trainable_tokens_delta",
    ),
    "VERA": ("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"),
    "ADALORA": ("lora_A", "lora_B", "lora_E"),
    "LOHA": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LOKR": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "IA3": ("ia3_l",),
    "OFT": ("oft_R.weight", "oft_embedding_R.weight"),
    "LN_TUNING": ("ln_tuning_layers.weight", "ln_tuning_layers.bias"),
    "TRAINABLE_TOKENS": ("trainable_tokens_delta",),
    "HRA": ("hra_u",),
    "SHIRA": ("shira_weight", "shira_indices"),
    "RANDLORA": ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"),
}

SETTINGS = (
    *("r", "alpha", "lora_alpha", "init_r", "rank_pattern", "alpha_pattern", "use_dora", "fan_in_fan_out"),
    *("init_lora_weights", "use_bdlora", "use_qalora", "qalora_group_size", "target_parameters", "bias"),
    *("feedforward_modules", "num_cayley_neumann_terms", "use_cayley_neumann", "coft", "eps", "block_share"),
    *("token_indices", "trainable_token_indices", "projection_prng_key", "peft_version", "auto_mapping"),
    *("layer_replication", "target_modules", "random_seed"),
)

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.sampled_from([0.5, float("nan"), 1e400, "pissa", "olora", "(q", "q_proj", "all", "0.18.0"]),
    st.lists(
        st.one_of(
            st.integers(-1, 6), st.sampled_from(["q_proj", "experts.gate_up_proj", "experts.down_proj"])
        )
    ),
    st.dictionaries(
        st.sampled_from(["q_proj", "embed_tokens", "nblocks", "unsloth_fixed"]), st.integers(-1, 4)
    ),
)
SENSIBLE = {"r": 2, "alpha": 3, "lora_alpha": 3, "init_r": 2}
MODULES = (
    "layers.0.q_proj",
    "layers.0.conv",
    "layers.0.mlp.experts",
    "embed_tokens",
    "layers.0.norm",
    "nowhere",
)
SIDES = st.sampled_from([1, 2, 4, 6, 6, 4, 2, 0, 3])


@pytest.mark.parametrize("kind", PARTS)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_only_our_own_errors_come_out(kind: str, data: st.DataObject) -> None:
    config = {**SENSIBLE, **data.draw(st.dictionaries(st.sampled_from(SETTINGS), VALUES, max_size=4))}
    names = st.tuples(st.sampled_from(MODULES), st.sampled_from(PARTS[kind]))
    tensors: dict[str, torch.Tensor] = {}
    for module, part in data.draw(st.lists(names, min_size=1, max_size=5, unique=True)):
        shape = data.draw(st.lists(SIDES, max_size=4) | st.tuples(SIDES, SIDES))
        dtype = data.draw(st.sampled_from([torch.float32] * 4 + [torch.bfloat16, torch.int64]))
        tensors[f"base_model.model.{module}.{part}"] = torch.ones(tuple(shape)).to(dtype)
    _read_all(kind, config, tensors)


def _read_all(kind: str, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_file(BASE, Path(folder) / "base.safetensors")
        save_file(tensors, Path(folder) / "adapter_model.safetensors")
        (Path(folder) / "adapter_config.json").write_text(json.dumps({"peft_type": kind, **config}))
        base = open_checkpoint(Path(folder) / "base.safetensors")
        try:
            adapter = open_checkpoint(Path(folder) / "adapter_model.safetensors").on(base)
        except WdAnalysisError:
            return
        for update in adapter.updates:
            for factor in (update.A, update.B):
                with suppress(WdAnalysisError):
                    factor.read()
        for formula in adapter.formulas:
            for name in BASE:
                if name.removesuffix(".weight") == formula.module.removesuffix(".weight"):
                    with suppress(WdAnalysisError):
                        formula.of(base.tensors[name]).read()

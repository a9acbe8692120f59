"""Whatever names, shapes and configuration a file has, they are read: every output once, and never a traceback."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from wdanalysis.checkpoints.names import closest, match, recognise
from wdanalysis.errors import WdAnalysisError

WORDS = [
    *(
        "model",
        "language_model",
        "visual",
        "encoder",
        "decoder",
        "down_blocks",
        "attentions",
        "layers",
        "h",
        "blocks",
    ),
    *(
        "transformer_blocks",
        "self_attn",
        "attn",
        "attention",
        "linear_attn",
        "cross_attn",
        "mlp",
        "ff",
        "net",
        "ffn",
    ),
    *(
        "experts",
        "shared_expert",
        "block_sparse_moe",
        "input_linear",
        "output_linear",
        "gate_up_proj",
        "down_proj",
    ),
    *(
        "q_proj",
        "qkv",
        "qkv_proj",
        "query_key_value",
        "c_attn",
        "in_proj_qkv",
        "kv_a_proj_with_mqa",
        "w1",
        "v1",
        "w2",
    ),
    *(
        "0",
        "1",
        "2",
        "17",
        "proj",
        "router",
        "layer",
        "to_q",
        "to_out",
        "conv",
        "weight_scale",
        "",
        "Ä",
        "[3]",
    ),
]
names = (
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=8)
    .map(".".join)
    .flatmap(lambda name: st.sampled_from([name, f"{name}.weight", f"{name}.weight"]))
)
shapes = st.lists(st.integers(0, 48), max_size=4).map(tuple)
TYPES = [
    "gpt_oss",
    "persimmon",
    "llama4",
    "dbrx",
    "falcon",
    "minimax",
    "gpt2",
    "gpt_bigcode",
    "of-tomorrow",
    None,
    3,
    [],
]
numbers = st.sampled_from([0, 1, 2, 3, 4, 8, -1, None, "4", 10**9])
configs: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "model_type": st.sampled_from(TYPES),
        "num_attention_heads": numbers,
        "num_key_value_heads": numbers,
        "num_local_experts": numbers,
        "ffn_config": st.sampled_from([None, 3, {"moe_num_experts": 3}, {"moe_num_experts": 0}]),
        "text_config": st.sampled_from([None, [], {"model_type": "persimmon"}, {"num_attention_heads": 2}]),
        "new_decoder_architecture": st.booleans(),
        "multi_query": st.booleans(),
    },
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(names, shapes, max_size=8), configs)
def test_every_output_of_a_matrix_belongs_to_one_part(
    tensors: dict[str, tuple[int, ...]], config: Any
) -> None:
    architecture = recognise(tensors, config)
    for name, shape in tensors.items():
        matrices = architecture.matrices(name, shape)
        elements = 0
        for matrix in matrices:
            outputs = [
                output
                for part in matrix.parts
                for start, stop in part.runs
                for output in range(start, stop, part.stride)
            ]
            assert sorted(outputs) == list(range(matrix.outputs))
            assert sum(part.size for part in matrix.parts) == matrix.outputs
            assert all(part.module for part in matrix.parts) or not name
            elements += matrix.rows * matrix.row_length
        size = 1
        for dimension in shape:
            size *= dimension
        assert elements in (0, size)


@settings(max_examples=300, deadline=None)
@given(st.lists(names, max_size=8), st.lists(names, max_size=8))
def test_names_match_or_are_refused_in_a_sentence(base: list[str], tuned: list[str]) -> None:
    closest(tuned, base)
    try:
        matching = match(base, tuned)
    except WdAnalysisError:
        return
    assert set(matching.pairs) <= set(base)
    assert set(matching.pairs.values()) <= set(tuned)

"""Files that no library would write: small right ones of which parts are missing or something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantised_files import MODULE, WEIGHT, write_quantised

from wdanalysis.checkpoints import open_checkpoint
from wdanalysis.errors import WdAnalysisError

TYPES = [
    *(
        torch.uint8,
        torch.int8,
        torch.int32,
        torch.int64,
        torch.uint32,
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
]


def words(*shape: int) -> torch.Tensor:
    return torch.full(shape, 0x76543210, dtype=torch.int32)


def codes(*shape: int) -> torch.Tensor:
    return torch.full(shape, 0x21, dtype=torch.uint8)


def text(content: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(content.encode()), dtype=torch.uint8)


STATE = {
    **{"quant_type": "nf4", "blocksize": 8, "dtype": "float16", "shape": [4, 8]},
    **{"nested_blocksize": 2, "nested_dtype": "float32", "nested_offset": 0.1},
}
RIGHT: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
    "bitsandbytes": (
        {},
        {
            **{
                "weight": codes(16, 1),
                "weight.absmax": codes(4),
                "weight.quant_map": torch.linspace(-1, 1, 16),
            },
            **{"weight.nested_absmax": torch.ones(2), "weight.nested_quant_map": torch.linspace(-1, 1, 256)},
            "weight.quant_state.bitsandbytes__nf4": text(json.dumps(STATE)),
        },
    ),
    "LLM.int8()": ({}, {"weight": codes(4, 8).view(torch.int8), "SCB": torch.ones(4)}),
    "GPTQ": (
        {"bits": 4},
        {
            **{"qweight": words(2, 8), "qzeros": words(2, 1), "scales": torch.ones(2, 8).half()},
            "g_idx": torch.arange(16, dtype=torch.int32) // 8,
        },
    ),
    "AWQ": (
        {"bits": 4, "quant_method": "awq"},
        {"qweight": words(16, 2), "qzeros": words(2, 2), "scales": torch.ones(2, 16).half()},
    ),
    "FP8": (
        {"weight_block_size": [2, 4]},
        {"weight": torch.ones(4, 8).to(TYPES[8]), "weight_scale": torch.ones(2, 2)},
    ),
    "INT8": (
        {},
        {
            **{"weight": codes(4, 8).view(torch.int8), "weight_scale": torch.ones(4, 1)},
            "weight_zero_point": torch.ones(4, 1, dtype=torch.int8),
        },
    ),
    "MXFP4": ({}, {"weight_packed": codes(2, 16), "weight_scale": codes(2, 1)}),
    "gpt-oss": ({}, {"x_blocks": codes(2, 3, 1, 16), "x_scales": codes(2, 3, 1)}),
    "NVFP4": (
        {},
        {
            "weight": codes(2, 8),
            "weight_scale": torch.ones(2, 1).to(TYPES[8]),
            "weight_scale_2": torch.ones(1),
        },
    ),
    "compressed-tensors": (
        {},
        {
            **{
                "weight_packed": words(8, 1),
                "weight_scale": torch.ones(8, 2),
                "weight_shape": torch.tensor([8, 8]),
            },
            **{"weight_zero_point": words(1, 2), "weight_g_idx": torch.arange(8, dtype=torch.int32) // 4},
        },
    ),
    "MLX": (
        {"bits": 4, "group_size": 4},
        {"weight": words(2, 1).view(torch.uint32), "scales": torch.ones(2, 2), "biases": torch.ones(2, 2)},
    ),
    "HQQ": (
        {},
        {
            **{
                "W_q": codes(2, 8),
                "scale": torch.ones(4, 1),
                "zero": torch.ones(4, 1),
                "shape": torch.tensor([4, 8]),
            },
            **{"nbits": torch.tensor(4), "packing": text("4bit_u8"), "compute_dtype": text("torch.float16")},
        },
    ),
    "torchao": (
        {},
        {
            **{"_weight_qdata": codes(4, 8).view(torch.int8), "_weight_scale": torch.ones(4, 1)},
            "_weight_zero_point": torch.zeros(4, 1, dtype=torch.int8),
        },
    ),
}
TORCHAO = json.dumps({"_type": "Int8Tensor", "_data": {"block_size": [1, 8], "dtype": {"_data": "bfloat16"}}})

SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "quant_method": st.sampled_from(["gptq", "awq", "fp8", "hqq", 3]),
        "bits": st.sampled_from([0, 2, 3, 4, 8, "4", None]),
        "group_size": st.sampled_from([-1, 0, 1, 2, 4, 32, "x"]),
        "weight_block_size": st.sampled_from([[128, 128], [0, 1], [2, 2], "x", None]),
        "config_groups": st.sampled_from(
            [{}, {"a": None}, {"a": {"weights": {"block_structure": [2, 2]}}}, []]
        ),
        "checkpoint_format": st.sampled_from(["gptq", "gptq_v2", "x", 1]),
        "version": st.sampled_from(["gemm", "gemv", 1]),
        "mode": st.sampled_from(["mxfp4", "nvfp4", "mxfp8", "affine", 1]),
    },
)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32]), max_size=3)

STATES = st.one_of(
    st.binary(max_size=40),
    st.fixed_dictionaries(
        {},
        optional={
            "quant_type": st.sampled_from(["nf4", "fp4", 1]),
            "blocksize": st.sampled_from([1, 2, 64, 0, -1, 1.5, "x"]),
            "dtype": st.sampled_from(["float16", "bfloat16", "float32", "float64", "int8", 1]),
            "shape": st.one_of(SHAPES, st.sampled_from([None, "x", [2**60, 2**60]])),
            "nested_blocksize": st.sampled_from([1, 2, 256, 0, None]),
            "nested_offset": st.sampled_from([0.0, 1, "x", None]),
        },
    ).map(lambda state: json.dumps(state).encode()),
)
KINDS = st.fixed_dictionaries(
    {},
    optional={
        "_type": st.sampled_from(["Int8Tensor", "Float8Tensor", "x", 1]),
        "_data": st.fixed_dictionaries(
            {},
            optional={
                "block_size": st.one_of(SHAPES, st.just("x")),
                "dtype": st.sampled_from([{"_data": "bfloat16"}, {"_data": "int8"}, {"_data": 1}, "x"]),
            },
        ),
    },
).map(json.dumps)


@st.composite
def something(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any type, shape and bytes."""
    kind = draw(st.sampled_from(["bytes", "state", "text", "shape"]))
    if kind == "state":
        return torch.frombuffer(bytearray(draw(STATES) or b" "), dtype=torch.uint8)
    if kind == "text":
        return text(
            draw(st.sampled_from(["4bit_u8", "3bit_32", "1bit_u8", "torch.bfloat16", "torch.int8", "x"]))
        )
    if kind == "shape":
        return torch.tensor(
            draw(st.lists(st.sampled_from([-1, 0, 2, 4, 8, 2**40]), max_size=3)), dtype=torch.int64
        )
    dtype, shape = draw(st.sampled_from(TYPES)), draw(SHAPES)
    size = int(np.prod(shape, dtype=int)) * dtype.itemsize
    content = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 256, size, np.uint8)
    return torch.from_numpy(content).view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize("name", RIGHT)
def test_the_right_ones_are_read(tmp_path: Path, name: str) -> None:
    configured, parts = RIGHT[name]
    metadata = {WEIGHT: TORCHAO} if name == "torchao" else None
    named = {f"{MODULE}.{part}": tensor for part, tensor in parts.items()}
    (tensor,) = open_checkpoint(
        write_quantised(tmp_path, named, configured, metadata=metadata)
    ).tensors.values()
    assert tensor.is_quantised
    assert tensor.steps is not None
    assert tensor.read().shape == tensor.shape
    assert tensor.steps(0, tensor.rows).shape == (tensor.rows, tensor.row_length)


@pytest.mark.parametrize("name", RIGHT)
@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_parts_of_any_kind_are_read_or_refused(tmp_path: Path, name: str, data: st.DataObject) -> None:
    configured, right = RIGHT[name]
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(right)), st.none() | something(), max_size=2))
    parts = {f"{MODULE}.{part}": tensor for part, tensor in (right | changes).items() if tensor is not None}
    configured = configured if data.draw(st.booleans()) else configured | data.draw(SETTINGS)
    described = TORCHAO if data.draw(st.booleans()) else data.draw(KINDS)
    folder = write_quantised(
        tmp_path, parts, configured, metadata={WEIGHT: described} if name == "torchao" else None
    )
    refused = None
    try:
        for tensor in open_checkpoint(folder).tensors.values():
            if tensor.is_float:
                assert tensor.read_rows(0, tensor.rows).size == tensor.size
            if tensor.steps:
                assert tensor.steps(0, tensor.rows).size == tensor.size
    except WdAnalysisError as error:
        refused = str(error)
    assert refused is None or refused.endswith(".")

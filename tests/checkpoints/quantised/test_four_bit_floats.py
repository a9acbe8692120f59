"""MXFP4 as gpt-oss and others store it, against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantised_files import MODULE, WEIGHT, check, write_quantised

from wdanalysis.checkpoints import open_checkpoint
from wdanalysis.errors import CheckpointError


def random_bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def exponents(*shape: int) -> torch.Tensor:
    return torch.randint(115, 130, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_the_experts_of_gpt_oss(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    name = "model.layers.0.mlp.experts.gate_up_proj"
    blocks, scales = random_bytes(3, 24, 2, 16), exponents(3, 24, 2)
    expected = convert_moe_packed_tensors(blocks, scales)
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    check(write_quantised(tmp_path, tensors, {"quant_method": "mxfp4"}), expected, "MXFP4", name)


@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv", "scale"])
@pytest.mark.parametrize("codes_dtype", [torch.int8, torch.uint8])
def test_a_matrix_in_bytes_of_two(tmp_path: Path, scale: str, codes_dtype: torch.dtype) -> None:
    """DeepSeek and Quark: int8 or uint8 codes with exponents for each 32."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes, scales = random_bytes(6, 48), exponents(6, 3)
    expected = Fp8Dequantize(None).convert({"weight": codes.view(torch.int8), "weight_scale_inv": scales})[
        "weight"
    ]
    check(
        write_quantised(tmp_path, {WEIGHT: codes.view(codes_dtype), f"{MODULE}.{scale}": scales}),
        expected,
        "MXFP4",
    )


def test_nvfp4_of_modelopt_by_the_equation(tmp_path: Path) -> None:
    codes, factor = random_bytes(4, 16), torch.tensor(0.003)
    scales = torch.rand(4, 2).to(torch.float8_e4m3fn)
    from transformers.integrations.mxfp4 import FP4_VALUES

    levels = torch.tensor(FP4_VALUES)
    numbers = torch.stack([levels[(codes & 15).long()], levels[(codes >> 4).long()]], dim=-1).reshape(4, 32)
    expected = (numbers * (scales.float() * factor).repeat_interleave(16, 1)).bfloat16()
    tensors = {WEIGHT: codes, f"{WEIGHT}_scale": scales, f"{WEIGHT}_scale_2": factor}
    check(write_quantised(tmp_path, tensors), expected, "NVFP4")


def test_nvfp4_needs_the_scale_of_the_tensor(tmp_path: Path) -> None:
    tensors = {WEIGHT: random_bytes(4, 16), f"{WEIGHT}_scale": torch.ones(4, 2).to(torch.float8_e4m3fn)}
    with pytest.raises(CheckpointError, match=r"weight_scale_2 or .*weight_global_scale is not there"):
        open_checkpoint(write_quantised(tmp_path, tensors))


def test_scales_of_other_blocks_are_refused(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{name}_blocks": random_bytes(3, 24, 2, 16), f"{name}_scales": exponents(3, 24, 3)}
    with pytest.raises(CheckpointError, match=r"\(3, 24, 3\) does not fit blocks of shape \(3, 24, 2, 16\)"):
        open_checkpoint(write_quantised(tmp_path, tensors))

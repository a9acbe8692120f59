"""torchao's tensors in safetensors, as it flattens them, against its own dequantisation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quantised_files import MODULE, WEIGHT, check, gaussian, write_quantised
from torch import nn

from wdanalysis.checkpoints import open_checkpoint
from wdanalysis.errors import CheckpointError

CONFIGS = {
    "Int8WeightOnlyConfig": ("INT8", {}),
    "Float8WeightOnlyConfig": ("F8_E4M3", {}),
    "IntxWeightOnlyConfig": ("INT4", {"weight_dtype": torch.int4}),
    "Int8DynamicActivationInt8WeightConfig": ("INT8", {}),
    "Float8DynamicActivationFloat8WeightConfig": ("F8_E4M3", {}),
}


@pytest.mark.formats
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_those_of_torchao(tmp_path: Path, config: str, dtype: torch.dtype) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    precision, options = CONFIGS[config]
    model = nn.Sequential(nn.Linear(96, 48, bias=False, dtype=dtype))
    model[0].weight.data = gaussian(48, 96, dtype=dtype)
    try:
        quantization.quantize_(model, getattr(quantization, config)(**options))
    except (AssertionError, RuntimeError) as error:
        pytest.skip(f"not on this machine: {error}")
    weight = model[0].weight.data
    tensors, metadata = flatten_tensor_state_dict({WEIGHT: weight})
    check(write_quantised(tmp_path, tensors, metadata=metadata), weight.dequantize(), precision)


def test_a_kind_that_is_not_read_is_named(tmp_path: Path) -> None:
    tensors = {
        f"{MODULE}._weight_qdata": torch.zeros(2, 4, dtype=torch.uint8),
        f"{MODULE}._weight_scale": torch.ones(1),
    }
    folder = write_quantised(
        tmp_path, tensors, metadata={WEIGHT: json.dumps({"_type": "Int4Tensor", "_data": {}})}
    )
    with pytest.raises(CheckpointError, match="torchao's Int4Tensor, but this kind is not read"):
        open_checkpoint(folder)


def test_parts_without_metadata_are_refused(tmp_path: Path) -> None:
    folder = write_quantised(tmp_path, {f"{MODULE}._weight_qdata": torch.zeros(2, 4, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"_weight_qdata .* is not read"):
        open_checkpoint(folder)

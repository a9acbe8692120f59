"""HQQ's layers as it saves them, against its own dequantisation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantised_files import MODULE, check, gaussian, write_quantised
from torch import nn

from wdanalysis.checkpoints import open_checkpoint
from wdanalysis.errors import CheckpointError


@pytest.mark.formats
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_those_of_hqq(tmp_path: Path, bits: int, axis: int, dtype: torch.dtype) -> None:
    core = pytest.importorskip("hqq.core.quantize")
    linear = nn.Linear(128, 48, bias=False)
    linear.weight.data = gaussian(48, 128)
    settings = core.BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    layer = core.HQQLinear(linear, settings, compute_dtype=dtype, device="cpu")
    tensors = {f"{MODULE}.{name}": tensor for name, tensor in layer.state_dict().items()}
    check(write_quantised(tmp_path, tensors, {"quant_method": "hqq"}), layer.dequantize(), f"HQQ-{bits}")


def test_a_part_that_is_not_there_is_named(tmp_path: Path) -> None:
    tensors = {f"{MODULE}.W_q": torch.zeros(2, 64, dtype=torch.uint8), f"{MODULE}.scale": torch.ones(4, 1)}
    with pytest.raises(CheckpointError, match=r"HQQ, but .*q_proj\.zero is not there"):
        open_checkpoint(write_quantised(tmp_path, tensors))

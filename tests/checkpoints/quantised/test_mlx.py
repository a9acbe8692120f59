"""MLX's quantised weights, against its own dequantisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantised_files import MODULE, WEIGHT, check, gaussian, read_whole, the_weight, write_quantised

from wdanalysis.checkpoints import open_checkpoint
from wdanalysis.errors import CheckpointError


def to_torch(array: Any, mx: Any) -> torch.Tensor:
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.astype(mx.float32))).bfloat16()
    numbers = np.array(array)
    return (
        torch.from_numpy(numbers.view(np.int32)).view(torch.uint32)
        if numbers.dtype == np.uint32
        else torch.from_numpy(numbers)
    )


@pytest.mark.formats
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(12, 128), (2, 12, 128)], ids=["matrix", "experts"])
def test_codes_are_those_of_mlx(tmp_path: Path, bits: int, dtype: str, shape: tuple[int, ...]) -> None:
    mx = pytest.importorskip("mlx.core")
    weight = mx.array(gaussian(*shape).numpy()).astype(getattr(mx, dtype))
    parts = mx.quantize(weight, group_size=64, bits=bits)
    expected = to_torch(mx.dequantize(*parts, group_size=64, bits=bits), mx)
    tensors = {
        f"{MODULE}.{n}": to_torch(p, mx) for n, p in zip(("weight", "scales", "biases"), parts, strict=True)
    }
    tensor = the_weight(
        write_quantised(tmp_path, tensors, {"group_size": 64, "bits": bits}, key="quantization")
    )
    assert tensor.precision == f"MLX-{bits}"
    read = read_whole(tensor)
    assert read.dtype == expected.dtype
    # MLX rounds the product and the sum each; we round once
    ulp = 2.0 ** -{"float32": 23, "float16": 10, "bfloat16": 7}[dtype]
    torch.testing.assert_close(read.float(), expected.float(), rtol=0, atol=ulp * float(expected.abs().max()))


@pytest.mark.formats
@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_floats_are_those_of_mlx(tmp_path: Path, mode: str) -> None:
    mx = pytest.importorskip("mlx.core")
    parts = mx.quantize(mx.array(gaussian(12, 128).numpy()).astype(mx.bfloat16), mode=mode)
    sizes = {"mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
    group, bits = sizes[mode]
    expected = to_torch(mx.dequantize(*parts, group_size=group, bits=bits, mode=mode), mx)
    tensors = {
        f"{MODULE}.{name}": to_torch(part, mx) for name, part in zip(("weight", "scales"), parts, strict=True)
    }
    settings = {"group_size": group, "bits": bits, "mode": mode}
    check(write_quantised(tmp_path, tensors, settings, key="quantization"), expected, f"MLX-{mode.upper()}")


def by_hand() -> dict[str, torch.Tensor]:
    return {
        WEIGHT: torch.full((2, 1), 0x76543210, dtype=torch.int32).view(torch.uint32),
        f"{MODULE}.scales": torch.tensor([[0.5], [1.0]]),
        f"{MODULE}.biases": torch.tensor([[-1.0], [2.0]]),
    }


def test_a_weight_by_hand(tmp_path: Path) -> None:
    expected = torch.tensor([[0.5], [1.0]]) * torch.arange(8.0) + torch.tensor([[-1.0], [2.0]])
    check(
        write_quantised(tmp_path, by_hand(), {"group_size": 8, "bits": 4}, key="quantization"),
        expected,
        "MLX-4",
    )


def test_a_module_may_have_its_own_width(tmp_path: Path) -> None:
    settings = {"group_size": 64, "bits": 8, MODULE: {"group_size": 8, "bits": 4}}
    assert the_weight(write_quantised(tmp_path, by_hand(), settings, key="quantization")).precision == "MLX-4"


@pytest.mark.parametrize("settings", [None, {"bits": 4}, {"group_size": 8, "bits": 8}])
def test_without_its_width_and_groups_it_is_refused(tmp_path: Path, settings: dict[str, int] | None) -> None:
    with pytest.raises(CheckpointError, match=r"with how many bits and in which groups|do not fit 8 bits"):
        open_checkpoint(write_quantised(tmp_path, by_hand(), settings, key="quantization"))

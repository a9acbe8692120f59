"""FP8 and INT8 with scales, against transformers' dequantisation and the equation in torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantised_files import MODULE, WEIGHT, check, gaussian, the_weight, write_quantised

from wdanalysis.checkpoints import open_checkpoint
from wdanalysis.errors import CheckpointError

FP8 = torch.float8_e4m3fn


def by_blocks(weight: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and a scale for each block, those at the edges smaller."""
    rows, columns = (-(-n // edge) for n, edge in zip(weight.shape, (height, width), strict=True))
    scale = torch.empty(rows, columns)
    codes = torch.empty(weight.shape, dtype=FP8)
    for i in range(rows):
        for j in range(columns):
            block = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
            scale[i, j] = weight[block].abs().max() / 448
            codes[block] = (weight[block] / scale[i, j]).to(FP8)
    return codes, scale


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_scale", "scale"])
def test_blocks_are_dequantised_as_transformers_does(tmp_path: Path, suffix: str) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes, scale = by_blocks(gaussian(256, 384), 128, 128)
    expected = Fp8Dequantize(None).convert({"weight": codes, "weight_scale_inv": scale})["weight"]
    check(write_quantised(tmp_path, {WEIGHT: codes, f"{MODULE}.{suffix}": scale}), expected, "F8_E4M3")


def test_blocks_are_cut_off_at_the_edges(tmp_path: Path) -> None:
    codes, scale = by_blocks(gaussian(200, 300), 128, 128)
    expected = codes.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :300]
    check(write_quantised(tmp_path, {WEIGHT: codes, f"{WEIGHT}_scale_inv": scale}), expected, "F8_E4M3")


def test_the_configured_block_decides(tmp_path: Path) -> None:
    codes, scale = by_blocks(gaussian(192, 192), 96, 64)
    expected = codes.float() * scale.repeat_interleave(96, 0).repeat_interleave(64, 1)
    settings = {"quant_method": "fp8", "weight_block_size": [96, 64]}
    check(
        write_quantised(tmp_path, {WEIGHT: codes, f"{WEIGHT}_scale_inv": scale}, settings),
        expected,
        "F8_E4M3",
    )


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (48, 1), (48,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codes_dtype", [FP8, torch.float8_e5m2, torch.int8])
def test_scales_of_a_tensor_and_of_rows(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype, codes_dtype: torch.dtype
) -> None:
    codes = (
        (100 * torch.randn(48, 64, generator=torch.Generator().manual_seed(0)))
        .clamp(-127, 127)
        .to(codes_dtype)
    )
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = codes.to(dtype) * (scale[:, None] if shape == (48,) else scale)
    precision = {torch.int8: "INT8", FP8: "F8_E4M3"}.get(codes_dtype, "F8_E5M2")
    check(write_quantised(tmp_path, {WEIGHT: codes, f"{WEIGHT}_scale": scale}), expected, precision)


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    blocks = [by_blocks(gaussian(96, 160, seed=expert), 128, 128) for expert in range(3)]
    codes, scale = (torch.stack(of_all) for of_all in zip(*blocks, strict=True))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    expected = codes.float() * scale.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :96, :160]
    check(write_quantised(tmp_path, {name: codes, f"{name}_scale_inv": scale}), expected, "F8_E4M3", name)


def test_powers_of_two_as_scales(tmp_path: Path) -> None:
    """MXFP8: exponents in bytes, as transformers reads them."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes = gaussian(8, 96).mul(1000).to(FP8)
    scale = torch.randint(110, 130, (8, 3), dtype=torch.uint8)
    expected = Fp8Dequantize(None).convert({"weight": codes, "weight_scale_inv": scale})["weight"]
    check(write_quantised(tmp_path, {WEIGHT: codes, f"{WEIGHT}_scale_inv": scale}), expected, "F8_E4M3")


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2])
def test_floats_without_scales_are_what_they_stand_for(tmp_path: Path, dtype: torch.dtype) -> None:
    codes = gaussian(16, 24).to(dtype)
    tensor = check(
        write_quantised(tmp_path, {WEIGHT: codes}), codes.half(), {FP8: "F8_E4M3"}.get(dtype, "F8_E5M2")
    )
    assert tensor.is_quantised


def test_a_scaled_checkpoint_of_comfyui(tmp_path: Path) -> None:
    codes, scale = gaussian(16, 24).mul(1000).to(FP8), torch.tensor(0.01)
    folder = write_quantised(tmp_path, {WEIGHT: codes, f"{MODULE}.scale_weight": scale})
    check(folder, codes.float() * scale, "F8_E4M3")


def test_scales_that_fit_no_blocks_are_refused(tmp_path: Path) -> None:
    folder = write_quantised(
        tmp_path, {WEIGHT: gaussian(48, 64).to(FP8), f"{WEIGHT}_scale": torch.ones(5, 1)}
    )
    with pytest.raises(
        CheckpointError, match=r"its shape \(5, 1\) does not divide a weight of shape \(48, 64\)"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("method", "part", "dtype"),
    [
        ("quanto", "weight._data", torch.int8),
        ("aqlm", "codes", torch.int16),
        ("bitnet", "weight", torch.uint8),
    ],
)
def test_what_is_not_quantised_is_not_compared_alone(
    tmp_path: Path, method: str, part: str, dtype: torch.dtype
) -> None:
    tensors = {
        f"{MODULE}.{part}": torch.zeros(4, 4, dtype=dtype),
        "model.embed_tokens.weight": gaussian(4, 4),
    }
    with pytest.raises(CheckpointError, match=rf"is quantised by {method}, and the layout of .*{part}"):
        open_checkpoint(write_quantised(tmp_path, tensors, {"quant_method": method}))


def test_a_method_that_is_not_read_is_named(tmp_path: Path) -> None:
    folder = write_quantised(
        tmp_path, {WEIGHT: torch.zeros(4, 4, dtype=torch.int8)}, {"quant_method": "eetq"}
    )
    with pytest.raises(
        CheckpointError, match=r"is quantised by eetq, and the layout of .*q_proj\.weight .* is not read"
    ):
        open_checkpoint(folder)


def test_the_steps_are_those_of_the_codes(tmp_path: Path) -> None:
    """Between 1 and 2 the numbers of E4M3 lie 1/8 apart."""
    codes = torch.full((2, 2), 1.5).to(FP8)
    folder = write_quantised(tmp_path, {WEIGHT: codes, f"{WEIGHT}_scale": torch.tensor([[2.0], [4.0]])})
    steps = the_weight(folder).steps
    assert steps is not None
    assert steps(0, 2).tolist() == [[0.25, 0.25], [0.5, 0.5]]

"""compressed-tensors' own files in all its layouts, against its own decompression."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_files import MODULE, WEIGHT, check, gaussian, read_whole, the_weight, write_quantised

from wdanalysis.checkpoints import open_checkpoint
from wdanalysis.errors import CheckpointError


def compressed(
    layout: str, shape: tuple[int, int], **weights: Any
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a compressed module, and what it decompresses to."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    weight = gaussian(*shape)
    state: dict[str, torch.Tensor] = {"weight": weight}
    factor = None
    if args.strategy == "tensor_group":
        factor = generate_gparam(weight.amin().reshape(1), weight.amax().reshape(1))
        state["weight_global_scale"] = factor
    if args.strategy == "tensor":
        low, high = weight.amin().reshape(1), weight.amax().reshape(1)
    elif args.strategy == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    else:
        groups = weight.reshape(shape[0], -1, args.group_size)
        low, high = groups.amin(-1), groups.amax(-1)
    scale, zero = calculate_qparams(low, high, args, global_scale=factor)
    state["weight_scale"] = scale
    if not args.symmetric:
        state["weight_zero_point"] = zero
    compressor = BaseCompressor.get_value_from_registry(layout)
    packed = compressor.compress(state, scheme)
    expected = compressor.decompress(dict(packed), scheme)["weight"]
    return {f"{MODULE}.{name}": tensor for name, tensor in packed.items()}, expected


@pytest.mark.formats
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "with zeros"])
@pytest.mark.parametrize("strategy", ["group", "channel"])
def test_packed_integers(tmp_path: Path, bits: int, symmetric: bool, strategy: str) -> None:
    group = {"group_size": 32} if strategy == "group" else {}
    tensors, expected = compressed(
        "pack-quantized", (64, 96), num_bits=bits, symmetric=symmetric, strategy=strategy, **group
    )
    check(write_quantised(tmp_path, tensors, {"quant_method": "compressed-tensors"}), expected, f"INT{bits}")


@pytest.mark.formats
@pytest.mark.parametrize("strategy", ["tensor", "channel"])
@pytest.mark.parametrize("layout", ["int-quantized", "naive-quantized"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "with zeros"])
def test_integers(tmp_path: Path, strategy: str, layout: str, symmetric: bool) -> None:
    tensors, expected = compressed(layout, (48, 64), num_bits=8, symmetric=symmetric, strategy=strategy)
    check(write_quantised(tmp_path, tensors), expected, "INT8")


@pytest.mark.formats
@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_floats_of_eight_bits(tmp_path: Path, strategy: str) -> None:
    tensors, expected = compressed("float-quantized", (48, 64), num_bits=8, type="float", strategy=strategy)
    check(write_quantised(tmp_path, tensors), expected, "F8_E4M3")


@pytest.mark.formats
@pytest.mark.parametrize(
    ("layout", "precision", "group", "strategy"),
    [("nvfp4-pack-quantized", "NVFP4", 16, "tensor_group"), ("mxfp4-pack-quantized", "MXFP4", 32, "group")],
)
def test_floats_of_four_bits(tmp_path: Path, layout: str, precision: str, group: int, strategy: str) -> None:
    scale_dtype = {"scale_dtype": torch.uint8} if precision == "MXFP4" else {}
    tensors, expected = compressed(
        layout, (16, 64), num_bits=4, type="float", strategy=strategy, group_size=group, **scale_dtype
    )
    tensor = the_weight(write_quantised(tmp_path, tensors))
    assert tensor.precision == precision
    # it calculates in bfloat16, and divides there
    torch.testing.assert_close(read_whole(tensor).float(), expected.float(), rtol=2**-7, atol=0)


def test_a_packed_weight_by_hand(tmp_path: Path) -> None:
    tensors = {
        f"{WEIGHT}_packed": torch.full((2, 1), 0x76543210, dtype=torch.int32),
        f"{WEIGHT}_scale": torch.tensor([[0.5], [1.0]]),
        f"{WEIGHT}_shape": torch.tensor([2, 8]),
    }
    expected = torch.tensor([[0.5], [1.0]]) * (torch.arange(8.0) - 8)
    check(write_quantised(tmp_path, tensors), expected, "INT4")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("weight_shape", None, "weight_shape is not there"),
        ("weight_shape", torch.tensor([2, 40]), "are not those of its shape"),
        ("weight_scale", torch.ones(2, 3), "are not those of its shape"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str
) -> None:
    tensors: dict[str, Any] = {
        f"{WEIGHT}_packed": torch.zeros(2, 1, dtype=torch.int32),
        f"{WEIGHT}_scale": torch.ones(2, 1),
        f"{WEIGHT}_shape": torch.tensor([2, 8]),
        f"{MODULE}.{name}": tensor,
    }
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_quantised(tmp_path, tensors))

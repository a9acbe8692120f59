"""GPTQ as GPTQModel packs it, and AWQ as auto-round does, against their own dequantisation."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantised_files import MODULE, check, gaussian, write_quantised
from torch import nn

from wdanalysis.checkpoints import open_checkpoint
from wdanalysis.errors import CheckpointError

Tensors = dict[str, torch.Tensor]
GROUP = 32


def grid(weight: torch.Tensor, bits: int, *, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros, outputs × groups."""
    groups = weight.reshape(weight.shape[0], -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    if symmetric:
        scale = 2 * torch.maximum(-low, high) / (2**bits - 1)
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    scale = (high - low) / (2**bits - 1)
    return scale, torch.round(-low / scale).clamp(1, 2**bits - 1)


def gptq(
    weight: torch.Tensor, bits: int, *, symmetric: bool, layout: str, act_order: bool
) -> tuple[Tensors, torch.Tensor]:
    """What GPTQModel packs and saves, and its weight, out × in."""
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=False)
    linear.weight.data = weight
    scale, zero = grid(weight, bits, symmetric=symmetric)
    packed: Any = TorchLinear(bits, GROUP, symmetric, act_order, inputs, outputs, register_buffers=True)
    group = torch.arange(inputs, dtype=torch.int32) // GROUP
    if act_order:
        group = group[torch.randperm(inputs, generator=torch.Generator().manual_seed(1))]
    packed.pack_original(linear, scale, zero, group)
    packed.post_init()
    expected = packed.dequantize_weight().T.contiguous()
    if layout == "gptq":
        convert_gptq_v2_to_v1_format_module(packed, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
    tensors = {f"{MODULE}.{name}": getattr(packed, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    return tensors, expected


@pytest.mark.formats
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "with zeros"])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "by activation"])
def test_gptq_is_dequantised_as_gptqmodel_does(
    tmp_path: Path, bits: int, symmetric: bool, layout: str, act_order: bool
) -> None:
    tensors, expected = gptq(gaussian(64, 96), bits, symmetric=symmetric, layout=layout, act_order=act_order)
    settings = {"quant_method": "gptq", "bits": bits, "checkpoint_format": layout}
    check(write_quantised(tmp_path, tensors, settings), expected, f"GPTQ-{bits}")


@pytest.mark.formats
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("module", "layout"),
    [("qlinear_torch", "auto_round"), ("qlinear_torch_zp", "auto_round:auto_gptq")],
)
def test_gptq_is_dequantised_as_auto_round_does(tmp_path: Path, bits: int, module: str, layout: str) -> None:
    """Its own layout stores zeros as they are, that of AutoGPTQ less one."""
    pytest.importorskip("auto_round")
    weight = gaussian(64, 96)
    linear = nn.Linear(96, 64, bias=False)
    linear.weight.data = weight
    scale, zero = grid(weight, bits, symmetric=False)
    writer: Any = import_module(f"auto_round_extension.torch.{module}")
    packed = writer.QuantLinear(bits, GROUP, 96, 64, bias=False)
    packed.device = torch.device("cpu")  # which 0.16 forgets to set where zeros are a tensor
    packed.pack(linear, scale, zero)
    packed.post_init()
    expected = packed(torch.eye(96)).T
    tensors = {f"{MODULE}.{name}": getattr(packed, name) for name in ("qweight", "qzeros", "scales")}
    settings = {"quant_method": "auto-round", "bits": bits, "packing_format": layout}
    check(write_quantised(tmp_path, tensors, settings), expected.half(), f"GPTQ-{bits}")


@pytest.mark.formats
def test_awq_is_dequantised_as_auto_round_does(tmp_path: Path) -> None:
    pytest.importorskip("auto_round")
    from auto_round.export.export_to_awq.utils import WQLinear_GEMM, dequantize_gemm

    weight = gaussian(48, 96, dtype=torch.float16)
    linear = nn.Linear(96, 48, bias=False, dtype=torch.float16)
    linear.weight.data = weight
    scale, zero = grid(weight.float(), 4, symmetric=False)
    packed = WQLinear_GEMM.from_linear(
        linear, 4, GROUP, scales=scale.T.half().contiguous(), zeros=zero.T.contiguous()
    )
    names = ("qweight", "qzeros", "scales")
    tensors = {f"{MODULE}.{name}": getattr(packed, name) for name in names}
    expected = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, GROUP).T.contiguous()
    assert (expected - weight).abs().max() < scale.max()  # it is the weight
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
    check(write_quantised(tmp_path, tensors, settings), expected, "AWQ-4")


def by_hand() -> Tensors:
    """Four bits, eight inputs, eight outputs, one group."""
    return {
        f"{MODULE}.qweight": torch.full((1, 8), 0x76543210, dtype=torch.int32),
        f"{MODULE}.qzeros": torch.full((1, 1), 0x22222222, dtype=torch.int32),
        f"{MODULE}.scales": torch.full((1, 8), 0.5, dtype=torch.float16),
    }


@pytest.mark.parametrize(("layout", "zero"), [({}, 3), ({"checkpoint_format": "gptq_v2"}, 2)])
def test_gptq_by_hand(tmp_path: Path, layout: dict[str, str], zero: int) -> None:
    expected = (0.5 * (torch.arange(8.0) - zero)).expand(8, 8).half()
    check(write_quantised(tmp_path, by_hand(), {"bits": 4} | layout), expected, "GPTQ-4")


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({}, {}, "does not say with how many bits"),
        ({"bits": 5}, {}, "codes of 5 bits are not read"),
        ({"bits": 4}, {"scales": None}, r"q_proj\.scales is not there"),
        ({"bits": 4, "checkpoint_format": "marlin"}, {}, "its layout 'marlin' is not read"),
        ({"bits": 8}, {}, "its words are not those of"),
        ({"bits": 4}, {"qweight": torch.zeros(8, 3, dtype=torch.int32)}, "not that of its GEMM version"),
        ({"bits": 4}, {"qweight": torch.zeros(8, dtype=torch.int32)}, "which is another layout of these"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, settings: dict[str, Any], change: dict[str, torch.Tensor | None], message: str
) -> None:
    tensors: dict[str, Any] = by_hand() | {f"{MODULE}.{name}": tensor for name, tensor in change.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_quantised(tmp_path, tensors, settings))


def test_a_group_that_is_not_there_is_refused_when_it_is_read(tmp_path: Path) -> None:
    tensors = by_hand() | {f"{MODULE}.g_idx": torch.arange(8, dtype=torch.int32)}
    (weight,) = open_checkpoint(write_quantised(tmp_path, tensors)).tensors.values()
    with pytest.raises(CheckpointError, match="an input is of group 7, and there are 1"):
        weight.read()

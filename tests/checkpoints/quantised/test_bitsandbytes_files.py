"""bitsandbytes' own files, against its own dequantisation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quantised_files import MODULE, WEIGHT, check, gaussian, read_whole, the_weight, write_quantised
from torch import nn

from wdanalysis.checkpoints import open_checkpoint
from wdanalysis.errors import CheckpointError

bnb = pytest.importorskip("bitsandbytes")

Tensors = dict[str, torch.Tensor]


def four_bit(
    weight: torch.Tensor, kind: str, *, nested: bool, blocksize: int = 64
) -> tuple[Tensors, torch.Tensor]:
    """The tensors that bitsandbytes saves, and its weight."""
    parameter = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type=kind, compress_statistics=nested, blocksize=blocksize
    ).to("cpu")
    linear = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, quant_type=kind)
    linear.weight = parameter
    state = nn.ModuleDict({"q_proj": linear}).state_dict()
    tensors = {f"model.layers.0.self_attn.{name}": tensor for name, tensor in state.items()}
    return tensors, bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_four_bits_are_those_of_bitsandbytes(
    tmp_path: Path, kind: str, nested: bool, dtype: torch.dtype
) -> None:
    tensors, expected = four_bit(gaussian(48, 320, dtype=dtype), kind, nested=nested)
    check(write_quantised(tmp_path, tensors), expected, kind.upper())


def test_rows_shorter_than_a_block_by_the_equation(tmp_path: Path) -> None:
    """bitsandbytes 0.50.2 dequantises them wrongly on a CPU: farther from the weight than its step is wide."""
    weight = gaussian(48, 16)
    tensors, _ = four_bit(weight, "nf4", nested=False)
    read = read_whole(tensor := the_weight(write_quantised(tmp_path, tensors)))
    assert tensor.steps is not None
    nearest = torch.from_numpy(tensor.steps(0, 48))  # of one-sided cells twice the distance that is possible
    assert ((read - weight).abs() <= nearest).all()


@pytest.mark.parametrize("shape", [(7, 33), (5, 64), (33, 7)])
def test_rows_need_not_end_with_a_block(tmp_path: Path, shape: tuple[int, int]) -> None:
    tensors, expected = four_bit(gaussian(*shape), "nf4", nested=True)
    check(write_quantised(tmp_path, tensors), expected.reshape(shape), "NF4")


def test_eight_bits_are_those_of_bitsandbytes(tmp_path: Path) -> None:
    codes, scale, _ = bnb.functional.int8_vectorwise_quant(gaussian(48, 320, dtype=torch.float16))
    tensors = {
        WEIGHT: codes,
        f"{MODULE}.SCB": scale,
        f"{MODULE}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    expected = bnb.functional.int8_vectorwise_dequant(codes, scale)
    check(write_quantised(tmp_path, tensors), expected, "INT8", rtol=2e-7)  # it multiplies in another order


def test_a_conv1d_is_turned_back(tmp_path: Path) -> None:
    """transformers hands bitsandbytes GPT-2's weights as out × in, and stores them as such."""
    tensors, expected = four_bit(gaussian(48, 64), "nf4", nested=False)
    tensors = {f"h.0.attn.c_attn.{name.rpartition('q_proj.')[2]}": tensor for name, tensor in tensors.items()}
    folder = write_quantised(tmp_path, tensors)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_head": 2}))
    check(folder, expected.T.contiguous(), "NF4", "h.0.attn.c_attn.weight")


@pytest.mark.parametrize("missing", ["absmax", "quant_map"])
def test_a_part_that_is_not_there_is_named(tmp_path: Path, missing: str) -> None:
    tensors, _ = four_bit(gaussian(4, 64), "nf4", nested=False)
    del tensors[f"{WEIGHT}.{missing}"]
    with pytest.raises(CheckpointError, match=rf"q_proj\.weight\.{missing} is not there"):
        open_checkpoint(write_quantised(tmp_path, tensors))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_a_weight_without_its_state_is_refused(tmp_path: Path, nested: bool) -> None:
    tensors, _ = four_bit(gaussian(4, 64), "nf4", nested=nested)
    del tensors[f"{WEIGHT}.quant_state.bitsandbytes__nf4"]
    with pytest.raises(CheckpointError, match=r"is quantised, and the layout of .*absmax"):
        open_checkpoint(write_quantised(tmp_path, tensors))


def test_the_parts_are_one_tensor(tmp_path: Path) -> None:
    tensors, _ = four_bit(gaussian(4, 64), "nf4", nested=True)
    folder = write_quantised(tmp_path, tensors | {"model.norm.weight": torch.ones(4)})
    assert set(open_checkpoint(folder).tensors) == {WEIGHT, "model.norm.weight"}
    assert the_weight(folder).size == 4 * 64

"""A model is described once: every matrix with what its name, shape and file tell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from wdanalysis.checkpoints import Checkpoint, LowRankUpdate, StoredTensor, open_checkpoint
from wdanalysis.checkpoints.model import Model, describe
from wdanalysis.errors import ComparisonError

EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
CROSS = "decoder.layers.0.encoder_attn.k_proj.weight"


def described(folder: Path, tensors: dict[str, torch.Tensor]) -> Model:
    save_file(tensors, folder / "model.safetensors")
    return describe(open_checkpoint(folder))


def update(module: str, out: int, inputs: int, **options: object) -> LowRankUpdate:
    def tensor(*shape: int) -> StoredTensor:
        ones = np.ones(shape, np.float32)
        return StoredTensor(
            "ones", shape, "F32", Path("adapter"), lambda start, stop, buffer: ones[start:stop]
        )

    if options.pop("magnitude", None):
        options["magnitude"] = tensor(out + 1)
    return LowRankUpdate(module, tensor(2, inputs), tensor(out, 2), 1.0, **options)


def test_a_matrix_has_its_place_its_shape_and_its_bytes(tmp_path: Path) -> None:
    model = described(
        tmp_path, {EXPERT: torch.ones(4, 6).bfloat16(), CROSS: torch.ones(8, 8), "norm.weight": torch.ones(8)}
    )
    assert set(model.matrices) == {EXPERT, CROSS}
    expert, cross = model.matrices[EXPERT], model.matrices[CROSS]
    assert (expert.layer, expert.expert, expert.stack, expert.parts[0].role) == (1, 3, "", "down")
    assert (expert.outputs, expert.inputs, expert.dtype, expert.nbytes) == (4, 6, "BF16", 48)
    assert (cross.layer, cross.expert, cross.stack, cross.parts[0].module) == (0, None, "cross", "cross.k")


def test_the_first_rows_are_those_of_a_vocabulary_before_it_grew(tmp_path: Path) -> None:
    model = described(
        tmp_path, {"lm_head.weight": torch.ones(9, 4), "model.embed_tokens.weight": torch.ones(9, 4)}
    )
    head, embed = (model.matrices[name].first_rows(7) for name in model.matrices)
    by_name = {matrix.name: matrix for matrix in (head, embed)}
    head, embed = by_name["lm_head.weight"], by_name["model.embed_tokens.weight"]
    assert (head.outputs, head.inputs, head.parts[0].size, head.nbytes) == (7, 4, 7, 112)
    assert (embed.outputs, embed.inputs, embed.parts[0].size, embed.nbytes) == (4, 7, 4, 112)


def test_an_update_finds_its_weight_under_another_spelling_and_lies_as_it_does(tmp_path: Path) -> None:
    model = described(tmp_path, {"blocks.0.mixer.weight": torch.ones(6, 4)})
    target = model.target(update("model.blocks.0.mixer", 4, 6))
    assert target is not None
    matrix, _ = target.fitted()
    assert (matrix.tensor.name, matrix.name) == ("blocks.0.mixer.weight", "model.blocks.0.mixer.weight")
    assert (matrix.in_by_out, matrix.outputs, matrix.inputs, matrix.parts[0].size) == (True, 4, 6, 4)
    assert model.target(update("blocks.1.mixer", 4, 6)) is None


def test_an_update_of_a_tied_weight_finds_the_one_that_was_kept(tmp_path: Path) -> None:
    model = described(tmp_path, {"model.embed_tokens.weight": torch.ones(9, 4)})
    target = model.target(update("lm_head", 9, 4))
    assert target is not None
    assert target.is_tied
    matrix, _ = target.fitted()
    assert (matrix.tensor.name, matrix.parts[0].module) == ("model.embed_tokens.weight", "lm_head")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"out": 5}, r"5 × 4 \(out × in\).*stored as 6 × 4"), ({"magnitude": True}, "7 numbers for 6 vectors")],
)
def test_factors_and_magnitudes_that_do_not_fit_are_named(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    model = described(tmp_path, {"layers.0.q_proj.weight": torch.ones(6, 4)})
    target = model.target(update("layers.0.q_proj", **{"out": 6, "inputs": 4, **options}))
    assert target is not None
    with pytest.raises(ComparisonError, match=message):
        target.fitted()


def test_the_bytes_of_a_tensor_are_those_of_its_file(tmp_path: Path) -> None:
    numbers = torch.arange(6, dtype=torch.int16).reshape(2, 3)
    save_file({"ids": numbers}, tmp_path / "a.safetensors")
    torch.save({"ids": numbers.T.contiguous().T}, tmp_path / "a.pt")
    for file in ("a.safetensors", "a.pt"):
        checkpoint: Checkpoint = open_checkpoint(tmp_path / file)
        assert checkpoint.tensors["ids"].read_bytes().tobytes() == numbers.numpy().tobytes()

"""A folder is read as transformers reads it, and a folder that cannot be read says what it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from wdanalysis.checkpoints import Checkpoint, open_checkpoint
from wdanalysis.errors import CheckpointError

Save = Callable[..., Path]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
    )


def assert_same_tensors(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    expected = model.state_dict()
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in checkpoint.tensors.items():
        np.testing.assert_array_equal(tensor.read(), expected[name].numpy())


def test_a_folder_of_one_file(tmp_path: Path, model: torch.nn.Module) -> None:
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert_same_tensors(checkpoint, model)
    assert checkpoint.format == "safetensors"
    assert checkpoint.config is not None
    assert checkpoint.config["model_type"] == "llama"
    assert {file.name for file in checkpoint.files} == {"model.safetensors", "config.json"}
    assert not checkpoint.is_adapter


def test_a_folder_of_shards_with_an_index(tmp_path: Path, model: torch.nn.Module) -> None:
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    shards = len(list(tmp_path.glob("*.safetensors")))
    checkpoint = open_checkpoint(tmp_path)
    assert_same_tensors(checkpoint, model)
    assert shards > 2
    assert checkpoint.format == f"safetensors, {shards} shards"
    assert_same_tensors(open_checkpoint(tmp_path / "model.safetensors.index.json"), model)


def test_shards_without_an_index(tmp_path: Path, model: torch.nn.Module) -> None:
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_same_tensors(open_checkpoint(tmp_path), model)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.fp16.safetensors", "weights.pt", "model_ema.pth"]
)
def test_a_folder_with_one_file_of_any_name(tmp_path: Path, save: Save, name: str) -> None:
    save(tmp_path / name)
    (tmp_path / "optimizer.pt").write_bytes(b"")
    (tmp_path / "training_args.bin").write_bytes(b"")
    (tmp_path / "rng_state.pth").write_bytes(b"")
    assert list(open_checkpoint(tmp_path).tensors) == ["w"]


def test_torch_shards_with_an_index(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "pytorch_model-00001-of-00002.bin", name="a")
    save(tmp_path / "pytorch_model-00002-of-00002.bin", name="b")
    weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == {"a", "b"}
    assert checkpoint.format == "PyTorch, 2 shards"


def test_safetensors_are_preferred_and_the_others_noted(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "model.safetensors", 1)
    save(tmp_path / "pytorch_model.bin", 2)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensors["w"].read()[0, 0] == 1
    assert checkpoint.notes == (f"{tmp_path} also holds pytorch_model.bin, left out.",)


def test_an_index_whose_shards_were_not_downloaded_does_no_harm_beside_safetensors(
    tmp_path: Path, save: Save
) -> None:
    save(tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"w": "absent.bin"}}')
    assert list(open_checkpoint(tmp_path).tensors) == ["w"]


def test_shards_may_be_symbolic_links(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "blobs" / "a.safetensors")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model-00001-of-00001.safetensors").symlink_to("../blobs/a.safetensors")
    weight_map = {"w": "model-00001-of-00001.safetensors"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert list(open_checkpoint(snapshot).tensors) == ["w"]


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/x.safetensors",
        "a/../../x.safetensors",
        r"..\x.safetensors",
        r"C:\x.safetensors",
    ],
)
def test_an_index_may_not_name_a_shard_outside_its_folder(tmp_path: Path, save: Save, shard: str) -> None:
    save(tmp_path / "x.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(CheckpointError, match=r"index\.json names the shard .* outside its own folder"):
        open_checkpoint(folder)


def test_an_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-1.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"names the shard model-1\.safetensors, which is not there"):
        open_checkpoint(tmp_path)


def test_an_index_that_names_a_tensor_which_its_shard_lacks(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "a.safetensors")
    index = {"weight_map": {"w": "a.safetensors", "v": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=r"says that tensor 'v' is in a\.safetensors, which does not hold"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"w": 1}}', '{"weight_map": []}'])
def test_an_index_without_a_weight_map(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json (is not|has no)"):
        open_checkpoint(tmp_path)


def test_an_incomplete_set_of_shards(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "model-00001-of-00003.safetensors")
    save(tmp_path / "model-00003-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"has 2 of 3 shards .*number 2 is missing"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "model-00001-of-00002.safetensors")
    save(tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"Tensor 'w' is both in .*00001.* and in .*00002"):
        open_checkpoint(tmp_path)


def test_one_shard_alone_says_that_there_are_more(tmp_path: Path, save: Save) -> None:
    path = save(tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"has 1 of 2 shards .*number 2 is missing"):
        open_checkpoint(path)


def test_unrelated_files_ask_to_name_one(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "a.safetensors")
    save(tmp_path / "b.safetensors")
    with pytest.raises(
        CheckpointError, match=r"several weight files; pass one of a\.safetensors, b\.safetensors\."
    ):
        open_checkpoint(tmp_path)


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent does not exist"):
        open_checkpoint(tmp_path / "absent")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is an empty folder"):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("")
    with pytest.raises(CheckpointError, match=r"holds no weights"):
        open_checkpoint(tmp_path)


def test_a_folder_of_folders_lists_them(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "lora" / "model.safetensors")
    save(tmp_path / "ft" / "model.safetensors")
    (tmp_path / "logs").mkdir()
    with pytest.raises(CheckpointError, match=r"pass one of the folders in it: ft, lora\."):
        open_checkpoint(tmp_path)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"notes\.txt is not a file of weights"):
        open_checkpoint(tmp_path / "notes.txt")


def test_a_config_that_is_damaged(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        open_checkpoint(tmp_path)


FOREIGN = {
    "a torch distributed checkpoint": ([".metadata", "__0_0.distcp"], "dcp_to_torch"),
    "an FSDP folder of the Trainer": (
        ["pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp"],
        "dcp_to_torch",
    ),
    "DeepSpeed ZeRO": (
        ["latest", "zero_to_fp32.py", "global_step5/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"],
        "zero_to_fp32",
    ),
    "a step of DeepSpeed ZeRO": (["zero_pp_rank_0_mp_rank_00_model_states.pt"], "zero_to_fp32"),
    "DeepSpeed in parallel parts": (
        ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"],
        "zero_to_fp32",
    ),
    "Megatron": (["mp_rank_00/model_optim_rng.pt"], "Megatron"),
    "GGUF": (["model.gguf"], "GGUF"),
}


@pytest.mark.parametrize(("files", "mend"), FOREIGN.values(), ids=FOREIGN)
def test_a_folder_of_another_format_says_how_to_convert_it(
    tmp_path: Path, files: list[str], mend: str
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(CheckpointError, match=mend):
        open_checkpoint(tmp_path)


def test_metadata_of_the_shards_is_merged(tmp_path: Path) -> None:
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({str(number): torch.zeros(1)}, tmp_path / name, metadata={f"key{number}": "value"})
    assert open_checkpoint(tmp_path).metadata == {"key1": "value", "key2": "value"}

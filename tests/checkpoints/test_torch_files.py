"""What `torch.save` wrote is read without running code."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wdanalysis.checkpoints import open_checkpoint
from wdanalysis.errors import CheckpointError


def save(path: Path, content: Any, *, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_every_float_dtype_hold_the_saved_bits(
    tmp_path: Path, dtype: torch.dtype, zipped: bool
) -> None:
    saved = torch.randn(5, 3, 2).to(dtype)
    stored = open_checkpoint(save(tmp_path / "m.pt", {"w": saved}, zipped=zipped)).tensors["w"]
    expected = (saved.view(torch.uint16) if dtype is torch.bfloat16 else saved).numpy()
    np.testing.assert_array_equal(stored.read(), expected)
    np.testing.assert_array_equal(stored.read_rows(1, 4), expected.reshape(5, 6)[1:4])


def test_a_transposed_view_reads_in_its_own_order(tmp_path: Path) -> None:
    saved = torch.arange(6.0).reshape(2, 3)
    stored = open_checkpoint(save(tmp_path / "m.pt", {"w": saved.T, "v": saved})).tensors["w"]
    np.testing.assert_array_equal(stored.read_rows(1, 3), [[1, 4], [2, 5]])


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "module"])
def test_a_nested_state_dict_is_found_and_the_rest_is_noted(tmp_path: Path, wrapper: str) -> None:
    checkpoint = open_checkpoint(
        save(tmp_path / "m.ckpt", {"epoch": 3, wrapper: {"w": torch.ones(2, 2)}, "optimizer": {}})
    )
    assert list(checkpoint.tensors) == ["w"]
    assert checkpoint.notes == (f"m.ckpt: read {wrapper!r} and left out epoch, optimizer.",)


def test_entries_that_are_no_tensors_are_noted(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "m.pt", {"w": torch.ones(2, 2), "version": 2}))
    assert checkpoint.notes == ("m.pt: left out version, which are not dense tensors.",)


def test_parameters_and_integers_are_listed_with_their_dtype(tmp_path: Path) -> None:
    content = {"w": torch.nn.Parameter(torch.ones(2)), "ids": torch.arange(3)}
    tensors = open_checkpoint(save(tmp_path / "m.pt", content)).tensors
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {"w": "F32", "ids": "I64"}
    with pytest.raises(CheckpointError, match=r"'ids' in .*m\.pt is stored as I64"):
        tensors["ids"].read()


class RunsCode:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("content", "name"),
    [
        (RunsCode(), r"posix\.mkdir"),
        (argparse.Namespace(lr=1), r"argparse\.Namespace"),
        (torch.nn.Linear(2, 2), "Linear"),
    ],
)
def test_a_pickle_that_needs_code_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, name: str, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "m.pt", {"w": torch.ones(2), "x": content}, zipped=zipped)
    with pytest.raises(CheckpointError, match=rf"m\.pt needs code .*{name}.*safetensors\.torch\.save_file"):
        open_checkpoint(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_program_is_never_run(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"m\.pt needs code .*TorchScript"):
        open_checkpoint(tmp_path / "m.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_called_so(tmp_path: Path, zipped: bool, part: float) -> None:
    path = save(tmp_path / "m.pt", {"w": torch.ones(500)}, zipped=zipped)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(CheckpointError, match=r"m\.pt is truncated, damaged or not written by torch\.save"):
        open_checkpoint(path)


@pytest.mark.parametrize("content", [b"hello world" * 100, b"PK\x03\x04 no archive", bytes(200)])
def test_another_kind_of_file_is_called_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"m\.bin is truncated, damaged or not written by torch\.save"):
        open_checkpoint(tmp_path / "m.bin")


def test_a_list_is_no_state_dict(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"m\.pt holds a list instead of a state dict"):
        open_checkpoint(save(tmp_path / "m.pt", [torch.ones(2)]))


def test_a_dictionary_without_tensors_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"m\.pt holds no tensors"):
        open_checkpoint(save(tmp_path / "m.pt", {"epoch": 3}))


def test_a_git_lfs_pointer_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    with pytest.raises(CheckpointError, match=r"m\.bin is a Git-LFS pointer .* run `git lfs pull`\."):
        open_checkpoint(tmp_path / "m.bin")

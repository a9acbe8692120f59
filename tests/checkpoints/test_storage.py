"""Files are read at an offset, by any number of threads, and closed."""

from __future__ import annotations

import gc
import hashlib
import os
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from wdanalysis.checkpoints import storage
from wdanalysis.checkpoints.storage import LocalFile, header_hash
from wdanalysis.errors import CheckpointError


def open_descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def test_bytes_are_read_from_an_offset(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    assert LocalFile(path).read(40, 3) == bytes([40, 41, 42])


def test_threads_read_right_where_the_system_cannot_read_at_an_offset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "preadv")
    monkeypatch.setattr(storage, "LARGEST_READ", 1000)  # several reads for each piece
    content = np.random.default_rng(0).integers(0, 256, 1 << 20).astype(np.uint8)
    (tmp_path / "file").write_bytes(content.tobytes())
    file = LocalFile(tmp_path / "file")

    def read(start: int) -> bool:
        view = np.empty(4096, np.uint8)
        file.read_into(start, view)
        return np.array_equal(view, content[start : start + 4096])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(0, 1 << 20, 4096)))
    with pytest.raises(CheckpointError, match=r"ended while it was read, 10 bytes too early"):
        file.read_into((1 << 20) - 10, np.empty(20, np.uint8))


def test_a_file_is_closed_with_the_last_reference(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    before = open_descriptors()
    file = LocalFile(path)
    assert open_descriptors() == before + 1
    del file
    gc.collect()
    assert open_descriptors() == before


def test_more_files_can_be_read_than_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "OPEN_FILES", 4)
    gc.collect()
    files = []
    for number in range(20):
        (tmp_path / str(number)).write_bytes(bytes([number]))
        files.append(LocalFile(tmp_path / str(number)))
    assert [file.read(0, 1)[0] for file in files] == list(range(20))
    assert sum(file._descriptor is not None for file in files) <= 4


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"12345678")
    file = LocalFile(path)
    os.truncate(path, 5)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors ended while it was read, 3 bytes too early"
    ):
        file.read_into(0, np.empty(8, np.uint8))


def test_a_file_that_was_replaced_is_not_read_on(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"12345678")
    file = pickle.loads(pickle.dumps(LocalFile(path)))  # a copy opens the file anew, as after many others
    (tmp_path / "new").write_bytes(b"123456789")
    os.replace(tmp_path / "new", path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed while it was read"):
        file.read(0, 8)


def test_the_hash_of_safetensors_is_that_of_its_header(tmp_path: Path) -> None:
    header = struct.pack("<Q", 2) + b"{}"
    (tmp_path / "a.safetensors").write_bytes(header + b"data")
    assert header_hash(tmp_path / "a.safetensors") == hashlib.sha256(header).hexdigest()

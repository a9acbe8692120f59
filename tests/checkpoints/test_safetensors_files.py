"""Headers are accepted and refused as by the safetensors package; rows hold what that package saved."""

from __future__ import annotations

import json
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from wdanalysis.checkpoints.safetensors_files import read_safetensors
from wdanalysis.errors import CheckpointError

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def write(path: Path, header: Any, data: bytes = b"\0" * 4) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def package_accepts(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return True
    except SafetensorError:
        return False


def we_accept(path: Path) -> bool:
    try:
        read_safetensors(path)
    except CheckpointError:
        return False
    return True


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (4, 3, 2, 2), (0, 3)])
def test_rows_of_every_float_dtype_hold_the_saved_bits(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    saved = torch.randn(shape).to(dtype)
    save_file({"before": torch.zeros(3), "w": saved}, tmp_path / "model.safetensors")
    stored = read_safetensors(tmp_path / "model.safetensors").tensors["w"]
    expected = (saved.view(torch.uint16) if dtype is torch.bfloat16 else saved).numpy()
    assert stored.shape == shape
    np.testing.assert_array_equal(stored.read(), expected)
    matrix = expected.reshape(stored.rows, stored.row_length)
    middle = stored.rows // 2
    np.testing.assert_array_equal(stored.read_rows(middle, stored.rows), matrix[middle:])


def test_rows_are_read_into_the_given_buffer(tmp_path: Path) -> None:
    save_file({"w": torch.arange(12.0).reshape(4, 3)}, tmp_path / "model.safetensors")
    stored = read_safetensors(tmp_path / "model.safetensors").tensors["w"]
    buffer = np.empty(1000, np.uint8)
    rows = stored.read_rows(1, 3, buffer)
    assert np.shares_memory(rows, buffer)
    np.testing.assert_array_equal(rows, [[3, 4, 5], [6, 7, 8]])


def test_threads_read_from_one_file_at_once(tmp_path: Path) -> None:
    saved = torch.randn(512, 33)
    save_file({"w": saved}, tmp_path / "model.safetensors")
    stored = read_safetensors(tmp_path / "model.safetensors").tensors["w"]
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda row: stored.read_rows(row, row + 1), range(512)))
    np.testing.assert_array_equal(np.concatenate(rows), saved.numpy())


def test_metadata_is_kept(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert read_safetensors(tmp_path / "model.safetensors").metadata == {"format": "pt"}


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_other_dtypes_are_listed_but_not_read(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"w": torch.zeros(2, 2).to(dtype)}, tmp_path / "model.safetensors")
    stored = read_safetensors(tmp_path / "model.safetensors").tensors["w"]
    assert not stored.is_float
    with pytest.raises(CheckpointError, match=rf"'w' in .*model.safetensors is stored as {stored.dtype}"):
        stored.read()


def test_an_entry_of_each_dtype_has_the_size_that_the_package_gives_it(tmp_path: Path) -> None:
    from wdanalysis.checkpoints.dtypes import STORED_TYPES

    for dtype, bits in ((stored.name, stored.bits) for stored in STORED_TYPES.values()):
        entry = {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}
        path = write(tmp_path / "a.safetensors", {"w": entry}, b"\0" * bits)
        assert package_accepts(path)
        assert we_accept(path)


HEADERS = {
    "valid": {"a": F32},
    "no tensors": {},
    "an unknown field": {"a": {**F32, "note": 1}},
    "null metadata": {"a": F32, "__metadata__": None},
    "metadata that is no string": {"a": F32, "__metadata__": {"x": 1}},
    "metadata that is a list": {"a": F32, "__metadata__": []},
    "a list": [],
    "not JSON": b"{'a': 1}",
    "not UTF-8": b'{"\xff": 1}',
    "zeros after the JSON": json.dumps({"a": F32}).encode() + b"\0\0",
    "spaces after the JSON": json.dumps({"a": F32}).encode() + b"   ",
    "nothing": b"",
    "an entry that is no object": {"a": 1},
    "no offsets": {"a": {"dtype": "F32", "shape": [1]}},
    "three offsets": {"a": {**F32, "data_offsets": [0, 4, 4]}},
    "a negative offset": {"a": {**F32, "data_offsets": [-4, 0]}},
    "reversed offsets": {"a": {**F32, "data_offsets": [4, 0]}},
    "a field twice": b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    "an unknown dtype": {"a": {**F32, "dtype": "F33"}},
    "a shape of floats": {"a": {**F32, "shape": [1.0]}},
    "a shape of booleans": {"a": {**F32, "shape": [True]}},
    "a negative shape": {"a": {**F32, "shape": [-1]}},
    "a shape beyond memory": {"a": {**F32, "shape": [2**40, 2**40]}},
    "a shape of another size": {"a": {**F32, "shape": [2]}},
    "a hole at the beginning": {"a": {**F32, "data_offsets": [4, 8]}},
    "an overlap": {"a": F32, "b": F32},
    "more data than described": {"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}},
    "less data than described": {"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}},
    "half a byte": {"a": {"dtype": "F4", "shape": [7], "data_offsets": [0, 4]}},
    "an empty tensor between": {"a": F32, "b": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_is_accepted_where_the_package_accepts_it(tmp_path: Path, header: Any) -> None:
    path = write(tmp_path / "a.safetensors", header)
    assert we_accept(path) == package_accepts(path)


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 200), value=st.integers(0, 255), cut=st.integers(0, 3))
def test_a_damaged_file_is_refused_where_the_package_refuses_it(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    two = {"a": F32, "b": {"dtype": "F16", "shape": [2, 3], "data_offsets": [4, 16]}}
    damaged = bytearray(write(path, two, b"\0" * 16).read_bytes())
    damaged[position % len(damaged)] = value
    path.write_bytes(damaged[: len(damaged) - cut])
    if not package_accepts(path):
        assert not we_accept(path)


def test_a_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    entry = json.dumps(F32).encode()
    path = write(tmp_path / "a.safetensors", b'{"a": %s, "a": %s}' % (entry, entry))
    with pytest.raises(CheckpointError, match=r"a\.safetensors .*the name 'a' occurs twice"):
        read_safetensors(path)


def test_a_truncated_file_says_how_many_bytes_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-1234])
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors is truncated: 1,234 of .* bytes are missing"
    ):
        read_safetensors(path)


def test_overlapping_tensors_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"a": F32, "b": F32})
    with pytest.raises(CheckpointError, match=r"tensor 'b' overlaps"):
        read_safetensors(path)


def test_a_header_longer_than_the_format_allows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001) + b"{}")
    with pytest.raises(CheckpointError, match=r"header would have 100,000,001 bytes"):
        read_safetensors(path)


def test_a_git_lfs_pointer_is_called_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors is a Git-LFS pointer .* run `git lfs pull`\."
    ):
        read_safetensors(path)

"""Files and folders appear whole or not at all, and nothing stays beside them."""

from __future__ import annotations

import errno
from contextlib import nullcontext
from pathlib import Path

import pytest

from wdanalysis.errors import OutputError
from wdanalysis.writing import appearing_file, appearing_folder, plain_errors, write_whole


def test_a_file_that_is_there_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = write_whole(tmp_path / "new" / "a.txt", lambda file: file.write(b"old"))

    def break_off() -> None:
        with appearing_file(path) as file:
            file.write(b"half")
            assert path.read_bytes() == b"old"
            raise ValueError("broke")

    with pytest.raises(ValueError, match="broke"):
        break_off()
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [None, OSError(errno.EIO, "broke"), KeyboardInterrupt()])
def test_a_folder_takes_its_place_or_leaves_the_old_one(tmp_path: Path, error: BaseException | None) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.txt").write_text("old")

    def fill() -> None:
        with appearing_folder(out) as folder:
            (folder / "a.txt").write_text("new")
            if error is not None:
                raise error

    with nullcontext() if error is None else pytest.raises(type(error)):
        fill()
    assert (out / "a.txt").read_text() == ("new" if error is None else "old")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_called_so(tmp_path: Path) -> None:
    with (
        pytest.raises(
            OutputError, match=r"the model cannot be written to .*: the disk is full \(.* MB free\)"
        ),
        plain_errors(tmp_path / "missing", "the model"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")

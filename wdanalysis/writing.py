"""Files and folders that appear whole, texts that can be written, and one sentence for what a file system refuses."""

from __future__ import annotations

import dataclasses
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wdanalysis.errors import OutputError

if TYPE_CHECKING:
    from io import BufferedWriter


def write_whole(path: Path, fill: Callable[[BufferedWriter], Any]) -> Path:
    """Let `fill` write a file, which is then whole or not there. Return `path`.

    Parameters
    ----------
    path
        The file; one that is there is replaced. Its folder is made where it is missing.
    fill
        Called with the open file.

    Raises
    ------
    OutputError
        The disk is full, or the folder may not be written.

    Examples
    --------
    >>> write_whole(tmp / "new" / "a.txt", lambda file: file.write(b"whole")).read_text()
    'whole'
    """
    with plain_errors(path.parent), appearing_file(path) as file:
        fill(file)
    return path


@contextmanager
def appearing_file(path: Path) -> Iterator[BufferedWriter]:
    """Give a file to fill beside `path`, which takes its place when all went well and goes when not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        with beside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def appearing_folder(path: Path) -> Iterator[Path]:
    """Give a folder to fill beside `path`, which takes its place when all went well and goes when not."""
    beside = _beside(path.absolute())
    old = beside.with_name(f"{beside.name}-old")
    try:
        beside.mkdir(parents=True)
        yield beside
        if path.exists():
            path.rename(old)
        beside.rename(path)
    except OSError:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def plain_errors(directory: Path, what: str = "results") -> Iterator[None]:
    """Turn what the file system refuses (OSError) into one sentence (OutputError)."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            reason = f"the disk is full ({free_bytes(directory) / 1e6:.1f} MB free)"
        else:
            reason = error.strerror or first_line(error)
        raise OutputError(f"{what} cannot be written to {directory}: {reason}.") from error


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}-{secrets.token_hex(4)}")


def free_bytes(path: Path) -> int:
    """What is free on the disk of a path, which need not exist."""
    path = path.absolute()
    return shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.exists())).free


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def encodable(value: Any) -> Any:
    """The value with what UTF-8 cannot hold in its texts (a file's name may) as escapes."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, Mapping):
        return {encodable(key): encodable(of_key) for key, of_key in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(encodable(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: encodable(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    return value

"""Files that appear whole or not at all, texts that can be written, and one sentence for what a file system refuses."""

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
    """Let `fill` write a file beside, then rename it: the file is whole or not there. Return `path`.

    Raises
    ------
    OutputError
        The disk is full, or the folder may not be written.
    """
    with plain_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        try:
            with beside.open("xb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            return beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


@contextmanager
def plain_errors(directory: Path) -> Iterator[None]:
    """Turn what the file system refuses (OSError) into one sentence (OutputError)."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(_existing(directory)).free
            reason = f"the disk is full ({free / 1e6:.1f} MB free)"
        else:
            reason = error.strerror or first_line(error)
        raise OutputError(f"results cannot be written to {directory}: {reason}.") from error


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


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

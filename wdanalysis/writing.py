"""Files that appear whole or not at all, and one sentence for what a file system refuses."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
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

    Examples
    --------
    >>> write_whole(tmp / "new" / "a.txt", lambda file: file.write(b"whole")).read_text()
    'whole'
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

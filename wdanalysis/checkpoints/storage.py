"""The bytes of files: the one place that a remote store would have to replace."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wdanalysis.errors import CheckpointError

Progress = Callable[[int, int], None]
"""Called with what is done so far and what there is to do in all: bytes, or matrices."""

LARGEST_READ = 1 << 24
"""Bytes in one read where the system cannot read at an offset into memory that is there."""

OPEN_FILES = 128
"""How many files are kept open; a long series of sharded checkpoints has more than a process may open."""


class LocalFile:
    """One file of the local file system, from which several threads may read at once.

    It stays open until `OPEN_FILES` others were opened after it, and is then opened anew at the next read.
    It is not memory-mapped, since mapped pages count as resident memory and are slow on network file systems.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    CheckpointError
        The file does not exist or may not be read.
    """

    _opened: ClassVar[deque[weakref.ref[LocalFile]]] = deque()
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: _Descriptor | None = None
        self._stat = _identity(self._open().status)

    @property
    def size(self) -> int:
        """Length in bytes when the file was first opened."""
        return self._stat[1]

    def read_into(self, offset: int, view: NDArray[np.uint8]) -> None:
        """Fill the contiguous `view` with the bytes from `offset` on.

        Raises
        ------
        CheckpointError
            The file ended before the view was full, changed since it was first opened, or could not be read.
        """
        descriptor = self._open()
        remaining = memoryview(view.data)
        try:
            while remaining:
                count = descriptor.read_into(remaining, offset)
                if count == 0:
                    raise CheckpointError(
                        f"{self.path} ended while it was read, {len(remaining):,} bytes too early; "
                        "download or save it again."
                    )
                offset, remaining = offset + count, remaining[count:]
        except OSError as error:
            raise CheckpointError(f"{self.path} could not be read: {error.strerror}.") from error

    def read(self, offset: int, count: int) -> bytes:
        """Return `count` bytes from `offset` on (a header; tensors are read by `read_into`)."""
        buffer = np.empty(count, np.uint8)
        self.read_into(offset, buffer)
        return buffer.tobytes()

    def _open(self) -> _Descriptor:
        if descriptor := self._descriptor:
            return descriptor
        with self._lock:
            if self._descriptor is None:
                descriptor = _Descriptor(self.path)
                if _identity(descriptor.status) != getattr(self, "_stat", _identity(descriptor.status)):
                    raise CheckpointError(
                        f"{self.path} changed while it was read; run again when it is complete."
                    )
                while len(self._opened) >= OPEN_FILES:
                    if oldest := self._opened.popleft()():
                        oldest._descriptor = None
                self._opened.append(weakref.ref(self))
                self._descriptor = descriptor
            return self._descriptor

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None where the file does not exist.

    Raises
    ------
    CheckpointError
        The file is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"{path} could not be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download or save it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; download or save it again.")
    return content


def header_hash(path: Path) -> str:
    """Return the SHA-256 of what identifies a file cheaply, in hexadecimal.

    For safetensors this is the header with its length, of any other file the first MiB.

    Raises
    ------
    CheckpointError
        The file could not be read.
    """
    file = LocalFile(path)
    length = 8 + int.from_bytes(file.read(0, 8), "little") if path.suffix == ".safetensors" else 2**20
    return hashlib.sha256(file.read(0, min(length, file.size))).hexdigest()


class _Descriptor:
    """An open file descriptor, closed when the last thread that reads from it lets go of it."""

    def __init__(self, path: Path) -> None:
        try:
            self.number = os.open(
                path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
            )
        except OSError as error:
            raise CheckpointError(f"{path} could not be opened: {error.strerror}.") from error
        weakref.finalize(self, os.close, self.number)
        self.status = os.fstat(self.number)
        self._seeking = threading.Lock()

    def read_into(self, view: memoryview, offset: int) -> int:
        """Read what is there from `offset` on, at most as much as fits; return how much that was."""
        if hasattr(os, "preadv"):
            return os.preadv(self.number, [view], offset)
        with self._seeking:  # Windows: the position belongs to the file, which threads share
            os.lseek(self.number, offset, os.SEEK_SET)
            data = os.read(self.number, min(len(view), LARGEST_READ))
        view[: len(data)] = data
        return len(data)


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns

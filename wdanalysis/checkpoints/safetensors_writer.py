"""Write a safetensors file without holding it: the header first, then the tensors' bytes as they come.

The header gives every tensor's dtype, shape and place, so that all of them have to be known at the start; of the data,
only what is being written is in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from wdanalysis.checkpoints.dtypes import STORED_TYPES
from wdanalysis.writing import appearing_file

ALIGNMENT = 8
"""The header is padded with spaces, so that the data begin at a multiple of this."""


@dataclass(frozen=True)
class Entry:
    """A tensor as the header describes it.

    Attributes
    ----------
    name
        Its name.
    dtype
        In the spelling of the format: ``F32``, ``BF16`` …
    shape
        Its shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bits(self) -> int:
        """Of one element."""
        return STORED_TYPES[self.dtype].bits

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape) * self.bits // 8


@contextmanager
def write_safetensors(
    path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]
) -> Iterator[Callable[[bytes | memoryview], None]]:
    """Give a function that appends bytes: those of `entries`, in C order, one after the other.

    Parameters
    ----------
    path
        The file, which appears when it is complete.
    entries
        Every tensor, in the order in which it will be written.
    metadata
        `__metadata__`.

    Raises
    ------
    ValueError
        Fewer or more bytes were appended than `entries` have.
    OSError
        The file cannot be written.
    """
    expected = sum(entry.nbytes for entry in entries)
    written = 0
    with appearing_file(path) as file:

        def append(data: bytes | memoryview) -> None:
            nonlocal written
            written += len(data)
            file.write(data)

        file.write(_header(entries, metadata))
        yield append
        if written != expected:
            raise ValueError(f"{written:,} bytes were written to {path}, and its tensors have {expected:,}")


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text

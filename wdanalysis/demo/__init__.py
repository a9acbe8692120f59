"""What `wd-analyze demo` compares: the query and value matrices of a small model, and of its tuning in three ways.

`sample_checkpoints/` in the repository says how they were trained, and `sample_checkpoints/make_demo.py` cut them out.
"""

from __future__ import annotations

from pathlib import Path

from wdanalysis.errors import OutputError
from wdanalysis.writing import write_whole

BASE, METHODS = "base", ("FT", "LoRA", "DoRA")
"""The folders that there are; each method has four steps."""

MODULES = ("q", "v")
"""The projections that are in them."""


def carried_folder() -> Path:
    """Where the package has them."""
    return Path(__file__).parent / "checkpoints"


def copy_checkpoints(folder: Path) -> Path:
    """Copy the checkpoints into a folder, for a user to look at and to compare in other ways. Return the folder.

    Raises
    ------
    OutputError
        The folder holds other files of the same names, which are left as they are, or it cannot be written.
    """
    carried = carried_folder()
    contents = {
        folder / path.relative_to(carried): path.read_bytes()
        for path in sorted(carried.rglob("*"))
        if path.is_file()
    }
    for path, content in contents.items():
        if path.exists() and (not path.is_file() or path.read_bytes() != content):
            raise OutputError(f"{path} is there and is none of the demo's files; choose another folder.")
    for path, content in contents.items():
        if not path.exists():
            _write(path, content)
    return folder


def _write(path: Path, content: bytes) -> None:
    write_whole(path, lambda file: file.write(content))

"""Where numbers come from: input files, versions, and texts that can be written down whatever they hold."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from typing import Any

from wdanalysis._version import __version__
from wdanalysis.checkpoints.storage import header_hash
from wdanalysis.checkpoints.tensors import Checkpoint
from wdanalysis.writing import encodable

__all__ = ["encodable", "input_files", "versions"]


def input_files(checkpoints: Iterable[Checkpoint]) -> list[dict[str, Any]]:
    """Every file that was read, by checkpoint, with its size and a hash of its header."""
    return [
        {
            "path": str(checkpoint.path),
            "format": checkpoint.format,
            "step": checkpoint.step,
            "files": [
                {"path": str(file), "bytes": file.stat().st_size, "header_sha256": header_hash(file)}
                for file in checkpoint.files
            ],
        }
        for checkpoint in checkpoints
    ]


def versions() -> dict[str, str]:
    """The versions of this package, of Python, and of what the numbers and figures are made with."""
    from importlib.metadata import version

    packages = ("numpy", "numba", "pandas", "scipy", "torch", "safetensors", "matplotlib")
    return {
        "wdanalysis": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }

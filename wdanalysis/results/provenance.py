"""Where numbers come from: input files, versions, and texts that can be written down whatever they hold."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from typing import Any

from wdanalysis._version import __version__
from wdanalysis.checkpoints.storage import header_hash
from wdanalysis.checkpoints.tensors import Checkpoint


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


def encodable(value: Any) -> Any:
    """The value with what UTF-8 cannot hold in its texts (a file's name may) as escapes."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, Mapping):
        return {encodable(key): encodable(of_key) for key, of_key in value.items()}
    return [encodable(item) for item in value] if isinstance(value, list | tuple) else value

"""Whether a base is the one that an adapter was trained on, as far as the two tell by what they hold.

Factors that do not fit the base's shapes are an error where they are paired (`model.Target.fitted`). Beyond that, our
own training notes in an adapter a hash of the first row of every matrix that it adapts. Others note a name. A path says
nothing, since folders are moved and renamed; two models that are published under different names are different.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from wdanalysis.checkpoints.dtypes import FLOATS, narrow, widen
from wdanalysis.checkpoints.names import NameIndex
from wdanalysis.checkpoints.tensors import Checkpoint, StoredTensor

FIRST_ROWS = "base_first_rows"
"""The entry of safetensors' `__metadata__` that holds `noted_rows`, as JSON."""

PUBLISHED = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""A name on the hub: ``owner/model``."""


def noted_rows(base: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Return what is noted in an adapter of the matrices that it adapts: `__metadata__`, empty where there is none.

    Parameters
    ----------
    base
        By adapted module its untuned weight as training holds it; one that is not stored as floats is left out.
    """
    hashes = {module: _first_row(tensor, tensor.dtype) for module, tensor in base.items() if tensor.is_float}
    return {FIRST_ROWS: json.dumps(hashes, sort_keys=True)} if hashes else {}


def base_mismatch(base: Checkpoint, adapter: Checkpoint) -> str | None:
    """Return a sentence where an adapter was trained on another model than the base; None where nothing says so.

    Raises
    ------
    CheckpointError
        A row of the base cannot be read.
    """
    hashes = _noted(adapter)
    if not hashes:
        return _other_name(base, adapter)
    index = NameIndex(base.tensors)
    for module, noted in hashes.items():
        tensor = base.tensors.get(index.tensor_of(module) or "")
        if tensor is not None and tensor.is_float and noted != _first_row(tensor, noted.partition(" ")[0]):
            return (
                f"{adapter.path} was trained on a base with other numbers than {base.path} has in {tensor.name}: "
                "another model, or this one in another precision"
            )
    return None


def _first_row(tensor: StoredTensor, dtype: str) -> str:
    """The type in which training held a matrix, and a hash of its first row rounded to that type."""
    row = narrow(widen(tensor.read_rows(0, 1)), dtype)
    return f"{dtype} {hashlib.sha256(row.tobytes()).hexdigest()[:16]}"


def _noted(adapter: Checkpoint) -> dict[str, str]:
    """The hashes in an adapter by module; none where it is not of our training, or they cannot be understood."""
    try:
        noted = json.loads(adapter.metadata.get(FIRST_ROWS, "{}"))
    except ValueError:
        return {}
    hashes = noted.items() if isinstance(noted, dict) else ()
    return {str(module): text for module, text in hashes if str(text).partition(" ")[0] in FLOATS}


def _other_name(base: Checkpoint, adapter: Checkpoint) -> str | None:
    trained_on = str((adapter.config or {}).get("base_model_name_or_path") or "")
    names = _published_names(base)
    own = {name.rpartition("/")[2].lower() for name in names}
    if not names or not PUBLISHED.fullmatch(trained_on) or trained_on.rpartition("/")[2].lower() in own:
        return None
    return f"{adapter.path} says that it was trained on {trained_on}, and {base.path} is {names[0]}"


def _published_names(base: Checkpoint) -> list[str]:
    """The names on the hub that a base has by its configuration and by the hub's cache, in which it may lie."""
    configured = str((base.config or {}).get("_name_or_path") or "")
    cached = (
        part.split("--", 1)[1] for part in Path(base.path).absolute().parts if part.startswith("models--")
    )
    names = [*(name.replace("--", "/", 1) for name in cached), configured]
    return [name for name in names if PUBLISHED.fullmatch(name)]

"""A diffusers pipeline: a folder with a `model_index.json` and a folder for each of its models.

It is one checkpoint, in which a tensor is called by its folder and its name there (``unet.conv_in.weight``), as it is
in the adapters that diffusers saves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from wdanalysis.checkpoints.blocks import FOLDERS
from wdanalysis.checkpoints.tensors import Checkpoint

INDEX = "model_index.json"


def components(folder: Path) -> Mapping[str, Path]:
    """Return the models in a pipeline's folder that are tuned, by name; none where it is no pipeline."""
    if not (folder / INDEX).is_file():
        return {}
    return {name: folder / name for name in FOLDERS if (folder / name).is_dir()}


def joined(folder: Path, parts: Mapping[str, Path], opened: Callable[[Path], Checkpoint]) -> Checkpoint:
    """Open the models of a pipeline as one checkpoint.

    Parameters
    ----------
    folder
        The pipeline's.
    parts
        From `components`.
    opened
        Opens one model.
    """
    models = {name: opened(path) for name, path in parts.items()}
    others = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and entry.name not in parts and any(entry.glob("*.safetensors"))
    )
    left_out = [f"{folder} also holds {', '.join(others)}, left out."] if others else []
    return Checkpoint(
        path=folder,
        format=f"diffusers pipeline ({', '.join(models)})",
        tensors={
            f"{name}.{key}": replace(tensor, name=f"{name}.{key}")
            for name, model in models.items()
            for key, tensor in model.tensors.items()
        },
        files=tuple(file for model in models.values() for file in model.files),
        notes=(*left_out, *(note for model in models.values() for note in model.notes)),
    )

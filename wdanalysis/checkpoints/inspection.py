"""What a file or folder is, from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wdanalysis.checkpoints.names import recognise
from wdanalysis.checkpoints.series import open_series
from wdanalysis.checkpoints.tensors import Checkpoint, StoredTensor
from wdanalysis.decomposition import Axis

_ADAPTER_SETTINGS = (
    "peft_type",
    "use_dora",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "modules_to_save",
    "bias",
    "fan_in_fan_out",
    "init_lora_weights",
    "base_model_name_or_path",
)


@dataclass(frozen=True)
class ModuleCount:
    """The matrices of one role.

    Attributes
    ----------
    module
        As in the metrics table: ``q``, ``decoder.q``, ``up`` …
    matrices
        How many there are.
    layers
        In which layers; empty outside them.
    shapes
        (out, in) of each, most frequent first.
    """

    module: str
    matrices: int
    layers: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class CheckpointSummary:
    """One checkpoint of an `Inspection`.

    Attributes
    ----------
    path, step, format
        As in `Checkpoint`; the format also says where weights are quantised, and how.
    family
        The architecture that the configuration or the names tell, or ``unknown``.
    tensors, parameters
        How many tensors, and elements in them; a quantised weight is one tensor of as many as it stands for.
    nbytes
        Size of its files.
    dtypes
        Tensors of each dtype, or quantised format.
    modules
        Matrices by role and layer; for an adapter, the modules that it adapts with the shape of BA.
    adapter
        The settings of an adapter that change its update, with ``ranks`` and ``scales`` as they are; None for a model.
    files
        Those that are read.
    """

    path: Path
    step: int | None
    format: str
    family: str
    tensors: int
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    modules: tuple[ModuleCount, ...]
    adapter: Mapping[str, Any] | None
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Inspection:
    """What a path is: the method's name, and each of its checkpoints.

    Attributes
    ----------
    path, name
        What was asked for, and what `compare` would call it.
    checkpoints
        In the order of their steps.
    notes
        Sentences on what was found and left out.
    """

    path: Path
    name: str
    checkpoints: tuple[CheckpointSummary, ...]
    notes: tuple[str, ...]


def inspect(path: str | Path, *, alpha: float | None = None, dora_axis: Axis | None = None) -> Inspection:
    """Say what a checkpoint file or folder, an adapter, or a folder of steps is. No tensor is read.

    Parameters
    ----------
    path
        A file or folder.
    alpha
        LoRA's α for an adapter file without its `adapter_config.json`.
    dora_axis
        The axis of an adapter's magnitudes, where neither their shape nor their writer tells it.

    Raises
    ------
    CheckpointError
        `path` is not a checkpoint, or is damaged.

    Examples
    --------
    >>> import tempfile
    >>> import torch
    >>> from safetensors.torch import save_file
    >>> file = Path(tempfile.mkdtemp()) / "tuned.safetensors"
    >>> save_file({"model.layers.0.self_attn.q_proj.weight": torch.ones(4, 2)}, file)
    >>> (checkpoint,) = inspect(file).checkpoints
    >>> checkpoint.modules
    (ModuleCount(module='q', matrices=1, layers=(0,), shapes=((4, 2),)),)
    """
    series = open_series(path, alpha=alpha, dora_axis=dora_axis)
    notes = [*series.notes, *(note for checkpoint in series.checkpoints for note in checkpoint.notes)]
    summaries = tuple(_summary(checkpoint) for checkpoint in series.checkpoints)
    return Inspection(Path(path), series.name, summaries, tuple(dict.fromkeys(notes)))


def _summary(checkpoint: Checkpoint) -> CheckpointSummary:
    factors = [
        tensor
        for update in checkpoint.updates
        for tensor in (update.A, update.B, update.magnitude)
        if tensor is not None
    ]
    factors += [tensor for formula in checkpoint.formulas for tensor in formula.factors]
    tensors = [*checkpoint.tensors.values(), *factors]
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    for update in checkpoint.updates:
        shapes[f"{update.module}.weight"] = update.shape[::-1] if update.in_by_out else update.shape
    architecture = recognise(shapes, None if checkpoint.is_adapter else checkpoint.config)
    found: dict[str, list[tuple[int | None, tuple[int, int]]]] = {}
    for name, shape in shapes.items():
        for matrix in architecture.matrices(name, shape):
            for part in matrix.parts:
                found.setdefault(part.module, []).append((matrix.layer, matrix.shape_of(part)))
    return CheckpointSummary(
        path=checkpoint.path,
        step=checkpoint.step,
        format=", quantised ".join(filter(None, [checkpoint.format, _quantised(tensors)])),
        family=architecture.family,
        tensors=len(tensors),
        parameters=sum(tensor.size for tensor in tensors),
        nbytes=sum(file.stat().st_size for file in checkpoint.files),
        dtypes=dict(Counter(tensor.precision for tensor in tensors).most_common()),
        modules=tuple(_count(module, places) for module, places in found.items()),
        adapter=_adapter_settings(checkpoint) if checkpoint.is_adapter else None,
        files=checkpoint.files,
    )


def _quantised(tensors: Iterable[StoredTensor]) -> str:
    """The formats of quantised weights: ``(NF4)``; empty where there are none."""
    formats = dict.fromkeys(tensor.precision for tensor in tensors if tensor.is_quantised)
    return f"({', '.join(formats)})" if formats else ""


def _count(module: str, places: Iterable[tuple[int | None, tuple[int, int]]]) -> ModuleCount:
    places = list(places)
    layers = sorted({layer for layer, _ in places if layer is not None})
    shapes = [shape for shape, _ in Counter(shape for _, shape in places).most_common()]
    return ModuleCount(module, len(places), tuple(layers), tuple(shapes))


def _adapter_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config or {}
    settings = {key: config[key] for key in _ADAPTER_SETTINGS if config.get(key) not in (None, {}, [], False)}
    return {
        **settings,
        "ranks": sorted({update.rank for update in checkpoint.updates}),
        "scales": sorted({update.scale for update in checkpoint.updates}),
    }

"""One checkpoint: a file of weights, a Hugging Face folder of one or many files, or an adapter's folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath

from wdanalysis.checkpoints import pipelines
from wdanalysis.checkpoints.adapters import is_adapter, read_adapter
from wdanalysis.checkpoints.quantised import dequantised
from wdanalysis.checkpoints.safetensors_files import read_safetensors
from wdanalysis.checkpoints.steps import known_step
from wdanalysis.checkpoints.storage import read_json
from wdanalysis.checkpoints.tensors import Checkpoint, StoredTensor, WeightsFile
from wdanalysis.checkpoints.torch_files import read_torch
from wdanalysis.decomposition import Axis
from wdanalysis.errors import CheckpointError

READERS: Mapping[str, Callable[[Path], WeightsFile]] = {
    ".safetensors": read_safetensors,
    ".bin": read_torch,
    ".pt": read_torch,
    ".pth": read_torch,
    ".ckpt": read_torch,
}
"""How a file is read, by its suffix."""

WEIGHTS_NAMES = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)
"""Names that transformers, PEFT and diffusers give to weights; the first that is there is the checkpoint."""

NOT_WEIGHTS = re.compile(
    r"(optimizer|optim_states|model_states|scheduler|scaler|rng_state|random_states|sampler|training_args|dataloader)",
    re.IGNORECASE,
)
"""Files of a training run that have a suffix of weights and hold none."""

SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5,})-of-(?P<count>\d{5,})")
INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
ADAPTER_CONFIG = "adapter_config.json"
MODEL_CONFIG = "config.json"

DCP = (
    "a distributed checkpoint of torch (FSDP); convert it with "
    "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pt`"
)
DEEPSPEED = "a DeepSpeed ZeRO checkpoint; where you trust it, convert it with its `zero_to_fp32.py`"

FOREIGN_CONTENT: Mapping[str, str] = {
    "*.distcp": DCP,
    "*/*.distcp": DCP,
    "*zero_pp_rank_*": DEEPSPEED,
    "global_step*/*zero_pp_rank_*": DEEPSPEED,
    "mp_rank_*_model_states.pt": DEEPSPEED,
    "global_step*/mp_rank_*": DEEPSPEED,
    "mp_rank_*/model_optim_rng.pt": "a Megatron checkpoint; convert it with Megatron's tools to safetensors",
    "*.gguf": "a GGUF model; pass the safetensors that it was made from",
    "tf_model.h5": "a TensorFlow model; save it from PyTorch as safetensors",
    "flax_model.msgpack": "a Flax model; save it from PyTorch as safetensors",
}
"""What else a folder may hold, by what its files match, and how to convert it."""


@dataclass(frozen=True)
class WeightsSet:
    """The files that make up one checkpoint: a single one, or shards with their index.

    Attributes
    ----------
    name
        What a user would pass to mean it: the file, the index, or the pattern of the shards.
    files
        The files of weights.
    index
        The index of the shards, where there is one.
    """

    name: str
    files: tuple[Path, ...]
    index: Path | None = None


def open_checkpoint(
    path: str | Path, *, alpha: float | None = None, dora_axis: Axis | None = None
) -> Checkpoint:
    """Open exactly one checkpoint, reading headers only.

    Parameters
    ----------
    path
        A file of weights, an index of shards, or a folder with one checkpoint or one adapter.
    alpha
        LoRA's α for an adapter that has no `adapter_config.json`.
    dora_axis
        The axis of an adapter's magnitudes, where neither their shape nor their writer tells it.

    Raises
    ------
    CheckpointError
        There is nothing there, nothing that can be read, or more than one checkpoint.
    """
    path = Path(path)
    try:
        if path.is_dir():
            if parts := pipelines.components(path):
                return pipelines.joined(path, parts, open_checkpoint)
            chosen, notes = find_weights(path)
            folder = path
        elif path.exists():
            chosen, notes = _weights_of_file(path)
            folder = path.parent
        else:
            raise CheckpointError(f"{path} does not exist; pass a file or folder on this machine.")
    except OSError as error:
        raise CheckpointError(f"{path} could not be read: {error.strerror}.") from error

    tensors, files = _read_set(chosen)
    step, step_notes = known_step(path)
    notes = [*notes, *step_notes, *(note for file in files for note in file.notes)]
    an_adapter = is_adapter(tensors) or _is_adapter_name(chosen.name)
    config_path = folder / (ADAPTER_CONFIG if an_adapter else MODEL_CONFIG)
    config = read_json(config_path)
    metadata = {key: value for file in files for key, value in file.metadata.items()}
    tensors = dequantised(path, tensors, config, metadata)
    shards = f", {len(files)} shards" if len(files) > 1 else ""
    checkpoint = Checkpoint(
        path=path,
        format=files[0].format + shards,
        tensors=tensors,
        step=step,
        config=config,
        metadata=metadata,
        files=(
            *chosen.files,
            *([chosen.index] if chosen.index else []),
            *([config_path] if config is not None else []),
        ),
        notes=tuple(notes),
    )
    if not an_adapter:
        return checkpoint

    def applied_to(base: Checkpoint | None) -> Checkpoint:
        adapter = read_adapter(
            path, tensors, config, alpha, base, metadata=checkpoint.metadata, dora_axis=dora_axis
        )
        return replace(
            checkpoint,
            format=f"{adapter.format} adapter ({adapter.method})",
            method=adapter.method,
            tensors=adapter.tensors,
            updates=adapter.updates,
            formulas=adapter.formulas,
            notes=(*notes, *adapter.notes),
            applied_to=applied_to,
        )

    return applied_to(None)


def find_weights(folder: Path) -> tuple[WeightsSet, list[str]]:
    """Find the one set of weights in a folder, and say in notes what other weights lie there.

    Parameters
    ----------
    folder
        The folder; not searched below.

    Raises
    ------
    CheckpointError
        It has none, or several of which none has a name that transformers or PEFT gives.
    """
    sets = weights_sets(folder)
    by_name = {found.name: found for found in sets}
    named = [name for name in WEIGHTS_NAMES if name in by_name]
    chosen = by_name[named[0]] if named else _only_one(sets)
    if chosen is None:
        raise CheckpointError(_why_no_checkpoint(folder, sets))
    if _is_adapter_name(chosen.name) and not _is_adapter_name(named[-1]):
        raise CheckpointError(f"{folder} holds both an adapter and a model; pass one of {', '.join(named)}.")
    others = [found.name for found in sets if found is not chosen]
    return chosen, [f"{folder} also holds {', '.join(others)}, left out."] if others else []


def holds_checkpoint(folder: Path) -> bool:
    """Whether weights that can be read lie in a folder itself, and not in one inside it."""
    return bool(weights_sets(folder)) or (folder / ADAPTER_CONFIG).exists()


def holds_named_weights(folder: Path) -> bool:
    """Whether a folder holds weights under a name that transformers or PEFT gives."""
    return any((folder / name).exists() for name in WEIGHTS_NAMES)


def mixes_adapters(folder: Path) -> bool:
    """Whether a folder is of an X-LoRA, with the adapters that it mixes in folders inside it."""
    return (read_json(folder / ADAPTER_CONFIG) or {}).get("peft_type") == "XLORA"


def is_weights_file(path: Path) -> bool:
    """Whether a file may hold weights, by its name."""
    return path.suffix in READERS and not NOT_WEIGHTS.search(path.name) and not path.name.startswith(".")


def weights_sets(folder: Path) -> list[WeightsSet]:
    """List the sets of weights in a folder, complete or not: by index, by names of shards, single files."""
    entries = [entry for entry in sorted(folder.iterdir()) if not entry.is_dir()]
    sets = [_indexed(entry) for entry in entries if entry.name.endswith(INDEX_SUFFIXES)]
    indexed = {file for found in sets for file in found.files}
    shards: dict[str, list[Path]] = {}
    for entry in entries:
        if not is_weights_file(entry) or entry in indexed:
            continue
        if shard := SHARD.fullmatch(entry.stem):
            shards.setdefault(f"{shard['stem']}-*-of-{shard['count']}{entry.suffix}", []).append(entry)
        else:
            sets.append(WeightsSet(entry.name, (entry,)))
    return sets + [WeightsSet(pattern, tuple(files)) for pattern, files in shards.items()]


def _indexed(index: Path) -> WeightsSet:
    files = sorted({index.parent / shard for shard in _weight_map(index).values()})
    return WeightsSet(index.name, tuple(files), index)


def _weights_of_file(path: Path) -> tuple[WeightsSet, list[str]]:
    if path.name.endswith(INDEX_SUFFIXES):
        return _indexed(path), []
    if path.suffix not in READERS:
        raise CheckpointError(f"{path} is not a file of weights; pass one of the kinds {', '.join(READERS)}.")
    return WeightsSet(path.name, (path,)), []


def _check_index(index: Path) -> None:
    """Every shard that an index names must be in its folder, by the words of its name and in fact.

    By the words and not by the target of a link: in the hub's cache every shard links to another folder.
    """
    for shard in sorted(set(_weight_map(index).values())):
        if PureWindowsPath(shard).anchor or ".." in re.split(r"[/\\]", shard):
            raise CheckpointError(
                f"{index} names the shard {shard!r} outside its own folder; "
                "put the shard there and correct the index."
            )
        if not (index.parent / shard).is_file():
            raise CheckpointError(
                f"{index} names the shard {shard}, which is not there; download or save it again."
            )
        if Path(shard).suffix not in READERS:
            raise CheckpointError(
                f"{index} names the shard {shard}, which is not one of {', '.join(READERS)}; "
                "save the model again."
            )


def _check_shards(chosen: WeightsSet) -> None:
    """Shards without an index must be all that their names count."""
    shards = [shard for file in chosen.files if (shard := SHARD.fullmatch(file.stem))]
    present = {int(shard["number"]) for shard in shards}
    for shard in shards:
        if missing := sorted(set(range(1, int(shard["count"]) + 1)) - present):
            raise CheckpointError(
                f"{chosen.files[0].parent} has {len(present)} of {int(shard['count'])} shards {chosen.name}, "
                f"and number {missing[0]} is missing; download or save it again."
            )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = (read_json(index) or {}).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(v, str) for v in weight_map.values())
    ):
        raise CheckpointError(f"{index} has no weight_map from tensors to shards; download or save it again.")
    return weight_map


def _is_adapter_name(name: str) -> bool:
    return name.startswith("adapter_model")


def _only_one(sets: list[WeightsSet]) -> WeightsSet | None:
    """Return the only set; of the same weights in both formats the one in safetensors."""
    if len(sets) < 2:
        return sets[0] if sets else None
    stems = {found.name.partition(".")[0] for found in sets}
    safe = [found for found in sets if found.files[0].suffix == ".safetensors"]
    return safe[0] if len(stems) == 1 and len(safe) == 1 else None


def _read_set(chosen: WeightsSet) -> tuple[dict[str, StoredTensor], list[WeightsFile]]:
    if chosen.index:
        _check_index(chosen.index)
    else:
        _check_shards(chosen)
    files = [READERS[path.suffix](path) for path in chosen.files]
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        if twice := next((name for name in file.tensors if name in tensors), None):
            raise CheckpointError(
                f"Tensor {twice!r} is both in {tensors[twice].path} and in {file.path}; "
                "keep the shards of one save only."
            )
        tensors |= file.tensors
    if chosen.index:
        weight_map = _weight_map(chosen.index)
        for name, shard in weight_map.items():
            if name not in tensors or tensors[name].path != chosen.index.parent / shard:
                raise CheckpointError(
                    f"{chosen.index} says that tensor {name!r} is in {shard}, which does not hold it; "
                    "download or save the shards again."
                )
        tensors = {name: tensors[name] for name in weight_map}
    return tensors, files


def _foreign(folder: Path) -> str | None:
    return next((reason for pattern, reason in FOREIGN_CONTENT.items() if any(folder.glob(pattern))), None)


def _leads_to_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of any kind, or folders (steps) that do."""
    return (
        holds_checkpoint(folder)
        or _foreign(folder) is not None
        or any(holds_checkpoint(entry) for entry in folder.iterdir() if entry.is_dir())
    )


def _why_no_checkpoint(folder: Path, sets: list[WeightsSet]) -> str:
    if sets:
        return f"{folder} holds several weight files; pass one of {', '.join(found.name for found in sets)}."
    if reason := _foreign(folder):
        return f"{folder} is {reason}."
    if (folder / ADAPTER_CONFIG).exists():
        return f"{folder} has {ADAPTER_CONFIG} but no adapter_model.safetensors; save the adapter again."
    entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
    if not entries:
        return f"{folder} is an empty folder; pass one that holds a checkpoint."
    if inner := [entry.name for entry in entries if entry.is_dir() and _leads_to_checkpoint(entry)]:
        return f"{folder} holds no weights itself; pass one of the folders in it: {', '.join(inner)}."
    return f"{folder} holds no weights ({', '.join(READERS)}); pass a folder that holds a checkpoint."

"""Merge an adapter into its base: weights that need no adapter, written tensor by tensor as safetensors.

Every method ends as W' = W0 + s·BA (Eq. 1), and with a magnitude as W' = m·(W0 + s·BA)/‖W0 + s·BA‖ (Eq. 5), so that a
merged model has no extra latency. Memory holds a block of rows and one adapter's factors, whatever the model's size.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from wdanalysis.checkpoints import open_checkpoint
from wdanalysis.checkpoints.base_identity import base_mismatch
from wdanalysis.checkpoints.dtypes import OF_TORCH, STORED_TYPES, torch_type
from wdanalysis.checkpoints.folders import holds_named_weights
from wdanalysis.checkpoints.model import describe
from wdanalysis.checkpoints.safetensors_writer import Entry, write_safetensors
from wdanalysis.checkpoints.storage import Progress, read_json
from wdanalysis.checkpoints.tensors import Checkpoint, FormulaUpdate, LowRankUpdate, StoredTensor
from wdanalysis.errors import CheckpointError, OutputError
from wdanalysis.merging.merged_weights import merged_blocks, row_ranges, wide_blocks, widened
from wdanalysis.writing import appearing_folder, free_bytes, plain_errors

DType = Literal["float32", "bfloat16", "float16", "keep"]

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*preprocessor_config.json",
    "processor_config.json",
    "configuration_*.py",
    "modeling_*.py",
)
"""Files beside the base's weights that the merged model needs as well."""

UNMERGEABLE_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "lora_bias": "trains biases of lora_B",
        "trainable_token_indices": "trains single tokens of an embedding",
    }
)
"""Fields of `adapter_config.json` that, when set, change more than the matrices that are merged here."""


@dataclass(frozen=True)
class Merged:
    """What `merge` wrote.

    Attributes
    ----------
    folder
        The merged model.
    files
        Its files of weights, without the index of the shards.
    method
        ``LoRA``, ``DoRA``, ``VeRA`` or ``DVoRA``.
    matrices
        How many matrices got an update.
    replaced
        How many tensors are the adapter's own (`modules_to_save`, biases).
    notes
        Sentences that are worth a warning.
    """

    folder: Path
    files: tuple[Path, ...]
    method: str
    matrices: int
    replaced: int
    notes: tuple[str, ...]


def merge(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    dtype: DType = "keep",
    force: bool = False,
    alpha: float | None = None,
    progress: Progress | None = None,
) -> Merged:
    """Write the model that a base and its adapter are together, as a folder that transformers loads.

    The arithmetic is in float32 (float64 for a base stored so), and is rounded once.

    Parameters
    ----------
    base
        A model's file or folder.
    adapter
        A LoRA, DoRA, VeRA or DVoRA adapter's file or folder.
    out
        The folder to make; it appears when it is complete. It has the base's shards, configuration and tokenizer.
    dtype
        How float tensors are stored: as in the base (``keep``), or all alike.
    force
        Whether a model that is in `out` is replaced.
    alpha
        LoRA's α for an adapter that has no `adapter_config.json`.
    progress
        Told after every block the bytes written and the bytes to write.

    Raises
    ------
    CheckpointError
        A checkpoint cannot be read; `base` is an adapter or `adapter` is none; a module is not in the base, or stored
        in a dtype that is no float; what is merged is not finite, or does not fit `dtype`.
    ComparisonError
        A module has another shape in the base.
    OutputError
        `out` exists and `force` is False, or holds something else than a model; the disk is too small.

    Examples
    --------
    >>> import tempfile
    >>> from safetensors.torch import load_file, save_file
    >>> folder, q = Path(tempfile.mkdtemp()), "layers.0.self_attn.q_proj"
    >>> save_file({f"{q}.weight": torch.zeros(2, 3)}, folder / "base.safetensors")
    >>> factors = {f"{q}.lora_A.weight": torch.ones(1, 3), f"{q}.lora_B.weight": torch.ones(2, 1)}
    >>> save_file(factors, folder / "adapter_model.safetensors")
    >>> merged = merge(folder / "base.safetensors", folder / "adapter_model.safetensors", folder / "merged", alpha=2)
    >>> load_file(merged.files[0])
    {'layers.0.self_attn.q_proj.weight': tensor([[2., 2., 2.],
            [2., 2., 2.]])}
    """
    out = Path(out)
    base_model, tuned = open_checkpoint(base), open_checkpoint(adapter, alpha=alpha)
    _check_mergeable(base_model, tuned)
    recipe = _Planning(base_model, tuned, dtype).recipe()
    _check_free(out, [base_model.path, tuned.path], force=force)
    _check_space(out, recipe.nbytes)
    with plain_errors(out, "the merged model"), appearing_folder(out) as folder:
        names = _shard_names(len(recipe.shards))
        total, done = recipe.nbytes, 0
        for name, tensors in zip(names, recipe.shards, strict=True):
            metadata = {"format": "pt", **base_model.metadata}
            with write_safetensors(folder / name, [t.entry for t in tensors], metadata) as write:
                for tensor in tensors:
                    for block in tensor.blocks():
                        write(block)
                        done += len(block)
                        if progress:
                            progress(done, total)
        if len(names) > 1:
            _write_index(folder, names, recipe)
        _copy_companions(base_model, tuned, folder, recipe)
    return Merged(
        folder=out,
        files=tuple(out / name for name in names),
        method=tuned.method or "",
        matrices=sum(tensor.update is not None for tensor in recipe.tensors),
        replaced=len(tuned.tensors),
        notes=tuple(dict.fromkeys([*base_model.notes, *tuned.notes, *recipe.notes])),
    )


# --- what becomes of each tensor ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the merged model: where its numbers come from, and how they are stored."""

    name: str
    source: StoredTensor
    dtype: str
    update: LowRankUpdate | None = None
    in_by_out: bool = False

    @property
    def entry(self) -> Entry:
        return Entry(self.name, self.dtype, self.source.shape)

    def blocks(self) -> Iterator[bytes | memoryview]:
        """Its bytes, block by block."""
        if not self.source.is_float:
            yield self.source.read_bytes().data
            return
        if self.update is None and self.source.dtype == self.dtype:
            for start, stop in row_ranges(self.source):
                yield self.source.read_rows(start, stop).tobytes()
            return
        for rows in wide_blocks(self.source) if self.update is None else self._merged():
            yield self._stored(rows)

    def _merged(self) -> Iterator[Tensor]:
        assert self.update is not None
        blocks = merged_blocks(self.source, self.update, in_by_out=self.in_by_out)
        for (start, stop), merged in zip(row_ranges(self.source), blocks, strict=True):
            if not merged.isfinite().all() and widened(self.source, start, stop).isfinite().all():
                raise CheckpointError(
                    f"{self.update.module} in {self.update.A.path} makes {self.source.name} of {self.source.path} "
                    "infinite or NaN: its training had diverged; merge an earlier checkpoint."
                )
            yield merged

    def _stored(self, rows: Tensor) -> memoryview:
        stored = rows.to(torch_type(self.dtype))
        if (stored.isinf() & rows.isfinite()).any():
            raise CheckpointError(
                f"{self.name} of {self.source.path} has numbers beyond the range of "
                f"{str(stored.dtype).removeprefix('torch.')}; merge as bfloat16 or float32.",
                parameter="dtype",
            )
        return memoryview(stored.contiguous().view(torch.uint8).numpy().reshape(-1).data)


@dataclass(frozen=True)
class _Recipe:
    """The merged model's tensors by file, and what else has to change for them."""

    shards: tuple[tuple[_Tensor, ...], ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    resized: bool = False

    @property
    def tensors(self) -> Iterable[_Tensor]:
        return (tensor for shard in self.shards for tensor in shard)

    @property
    def nbytes(self) -> int:
        return sum(tensor.entry.nbytes for tensor in self.tensors)


class _Planning:
    """What becomes of each tensor, decided tensor by tensor: it is kept, replaced, added or gets an update."""

    def __init__(self, base: Checkpoint, adapter: Checkpoint, dtype: DType) -> None:
        self._base, self._adapter, self._dtype = base, adapter, dtype
        self._model = describe(base)
        self._planned = {name: _Tensor(name, t, self._stored_as(t)) for name, t in base.tensors.items()}
        mismatch = base_mismatch(base, adapter)
        self._notes = [] if mismatch is None else [f"{mismatch}."]
        self._config: dict[str, Any] = {}
        self._resized = False
        if dtype != "keep":
            self._config["torch_dtype" if "torch_dtype" in (base.config or {}) else "dtype"] = dtype

    def recipe(self) -> _Recipe:
        """Go through the adapter's whole tensors, then its updates."""
        matching = self._model.match(self._adapter)
        for name, replacement in matching.pairs.items():
            self._replace(name, self._adapter.tensors[replacement])
        for name in matching.only_tuned:
            self._add(self._adapter.tensors[name])
        for update in self._adapter.updates:
            self._update(update)
        for formula in self._adapter.formulas:
            self._calculate(formula)
        shards = _shards(self._base, self._planned)
        return _Recipe(shards, self._config, tuple(self._notes), self._resized)

    def _replace(self, name: str, replacement: StoredTensor) -> None:
        source = self._base.tensors[name]
        if replacement.shape[1:] != source.shape[1:]:
            raise CheckpointError(
                f"{replacement.name} is {replacement.shape} in {replacement.path} and {source.shape} in "
                f"{source.path}: is it the model that the adapter was trained on?"
            )
        if replacement.shape != source.shape:
            self._resized = True
            if (self._base.config or {}).get("vocab_size") == source.rows:
                self._config["vocab_size"] = replacement.rows
        is_kept = self._dtype == "keep" and replacement.is_float
        self._planned[name] = _Tensor(
            name, replacement, source.dtype if is_kept else self._stored_as(replacement)
        )

    def _add(self, tensor: StoredTensor) -> None:
        self._planned[tensor.name] = _Tensor(tensor.name, tensor, self._stored_as(tensor))
        if self._model.is_tied(tensor.name):
            self._config["tie_word_embeddings"] = False

    def _calculate(self, formula: FormulaUpdate) -> None:
        name = self._model.target_of_formula(formula)
        if name is None:
            raise self._not_there(formula.module)
        self._planned[name] = replace(self._planned[name], source=formula.of(self._planned[name].source))

    def _not_there(self, module: str) -> CheckpointError:
        return CheckpointError(
            f"{module}, which {self._adapter.path} adapts, is not in {self._base.path} "
            f"({next(iter(self._base.tensors), 'nothing')} there): is it the model that the adapter was trained on?"
        )

    def _update(self, update: LowRankUpdate) -> None:
        target = self._model.target(update)
        if target is None:
            raise self._not_there(update.module)
        name = f"{update.module}.weight" if target.is_tied else target.tensor.name
        if target.is_tied:  # the weight gets a tensor of its own
            self._planned.setdefault(name, replace(self._planned[target.tensor.name], name=name, update=None))
            self._config["tie_word_embeddings"] = False
        planned = self._planned[name]
        if not planned.source.is_float:
            raise CheckpointError(
                f"{name} in {planned.source.path} is stored as {planned.source.dtype}; merge into a base in a float "
                "dtype of 16 bits or more."
            )
        if (other := planned.update) is not None:
            raise CheckpointError(
                f"{self._adapter.path} adapts {name} of {self._base.path} twice, as {update.module} and as "
                f"{other.module}; save the adapter again."
            )
        if planned.source is not target.tensor:  # the adapter has the whole tensor as well
            own_name = f"{update.module}.weight"
            target = replace(
                target, tensor=planned.source, matrix=self._model.matrix_of(planned.source, own_name)
            )
        matrix, fitted = target.fitted()
        self._planned[name] = replace(planned, update=fitted, in_by_out=matrix.in_by_out)
        if (self._base.config or {}).get("tie_word_embeddings") and matrix.parts[0].module == "embed":
            self._notes.append(
                f"{name} is tied to the output embedding, which the merged model changes with it, as PEFT's merge does."
            )

    def _stored_as(self, tensor: StoredTensor) -> str:
        if tensor.dtype not in STORED_TYPES:
            raise CheckpointError(
                f"{tensor.name} in {tensor.path} is stored as {tensor.dtype}, which safetensors does not have; "
                "leave it out of the checkpoint or store it as floats."
            )
        return tensor.dtype if self._dtype == "keep" or not tensor.is_float else OF_TORCH[self._dtype]


def _check_mergeable(base: Checkpoint, adapter: Checkpoint) -> None:
    if base.is_adapter:
        raise CheckpointError(f"{base.path} is an adapter; BASE must be the model that it was trained on.")
    if not adapter.is_adapter:
        raise CheckpointError(f"{adapter.path} is no adapter; there is nothing to merge into {base.path}.")
    for setting, reason in UNMERGEABLE_SETTINGS.items():
        if (adapter.config or {}).get(setting):
            raise CheckpointError(
                f"{adapter.path} has {setting}, which {reason}; merge it with PEFT's `merge_and_unload`."
            )


def _shards(base: Checkpoint, planned: Mapping[str, _Tensor]) -> tuple[tuple[_Tensor, ...], ...]:
    """The base's shards; what the base does not have comes into the last. The widest dtypes first, to be aligned."""
    by_file: dict[Path, list[_Tensor]] = {}
    for name, stored in base.tensors.items():
        by_file.setdefault(stored.path, []).append(planned[name])
    by_file[list(by_file)[-1]] += [tensor for name, tensor in planned.items() if name not in base.tensors]
    return tuple(
        tuple(sorted(tensors, key=lambda tensor: -tensor.entry.bits)) for tensors in by_file.values()
    )


# --- files --------------------------------------------------------------------------------------------------


def _check_free(out: Path, inputs: Iterable[Path], *, force: bool) -> None:
    """Refuse to overwrite, and to write over what is being read, before any work is done."""
    for path in inputs:
        if path.resolve().is_relative_to(out.resolve()):
            raise OutputError(f"{out} holds {path}, which is to be merged; choose another folder.")
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out} is a file; give a folder for the merged model.")
    if not any(out.iterdir()):
        return
    if not holds_named_weights(out):
        raise OutputError(f"{out} exists and holds no model; choose another folder.")
    if not force:
        raise OutputError(
            f"{out} already holds a model; give force to replace it, or choose another folder.",
            parameter="force",
        )


def _check_space(out: Path, nbytes: int) -> None:
    if (free := free_bytes(out.absolute().parent)) < nbytes:
        raise OutputError(
            f"the merged model needs {nbytes / 1e9:.2f} GB, and the disk of {out} has {free / 1e9:.2f} GB free."
        )


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_index(folder: Path, names: Iterable[str], recipe: _Recipe) -> None:
    weight_map = {
        tensor.name: name for name, shard in zip(names, recipe.shards, strict=True) for tensor in shard
    }
    index = {"metadata": {"total_size": recipe.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _copy_companions(base: Checkpoint, adapter: Checkpoint, folder: Path, recipe: _Recipe) -> None:
    """Copy what the base's weights need beside them; the tokenizer of an adapter that resized the vocabulary."""
    _copy(_folder_of(base), folder, COMPANIONS)
    if recipe.resized:
        _copy(_folder_of(adapter), folder, [name for name in COMPANIONS if name != "config.json"])
    config = read_json(folder / "config.json")
    if config is not None and recipe.config:
        _write_json(folder / "config.json", config | dict(recipe.config))


def _copy(source: Path, folder: Path, patterns: Iterable[str]) -> None:
    for path in {path for pattern in patterns for path in source.glob(pattern) if path.is_file()}:
        shutil.copy(path, folder / path.name)


def _folder_of(checkpoint: Checkpoint) -> Path:
    return checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

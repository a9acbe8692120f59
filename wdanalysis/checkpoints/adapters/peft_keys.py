"""The keys of PEFT's adapters: which tensor is which part of which module, and whether the parts fit together.

They come from `adapter_model.safetensors` (or `.bin`), where PEFT has taken the adapter's name out of the keys, or from
the state dict of a model that still carries its adapter (``q_proj.lora_A.default.weight`` beside
``q_proj.base_layer.weight``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wdanalysis.checkpoints.adapters.formats import AdapterSource, Formula, Weight, wide
from wdanalysis.checkpoints.adapters.peft_config import MERGE
from wdanalysis.checkpoints.tensors import FormulaUpdate, StoredTensor
from wdanalysis.decomposition import Axis
from wdanalysis.errors import CheckpointError

_ENDING = r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?:\.(?P<parameter>weight|bias))?"


def factor_pattern(prefix: str, parts: str) -> re.Pattern[str]:
    """Match the keys of a method's factors: ``MODULE.PREFIXpart``, with the adapter's name in a state dict."""
    return re.compile(rf"(?P<module>.+)\.{prefix}(?P<part>{parts}){_ENDING}")


FACTOR = factor_pattern("lora_", "(?:embedding_)?[AaBb]|diag")
MAGNITUDE = re.compile(
    r"(?P<module>.+)\.(?:(?:lora|vera)_magnitude_vector|weight_m_wdecomp|weight_magnitude|lora_magnitude|magnitude)"
    r"(?:\.(?!weight$)(?P<adapter>[^.]+))?(?:\.weight)?"
)
REPLACED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<parameter>.+)")
FROZEN = re.compile(r"(?P<module>.+)\.(?:base_layer|original_module)\.(?P<parameter>.+)")
TOKENS = re.compile(
    r"(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_(?P<part>delta|original)(?:\..+)?"
)
PEFT_PREFIX = re.compile(r"^(?:(?:module|_orig_mod|_fsdp_wrapped_module)\.)*base_model\.model\.")


@dataclass
class Factors:
    """The tensors of one adapted module, as they are found."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    embedding: bool = False


@dataclass
class Parts:
    """An adapter's tensors by what they are for."""

    modules: dict[str, Factors] = field(default_factory=dict)
    replaced: dict[str, StoredTensor] = field(default_factory=dict)
    tokens: dict[str, StoredTensor] = field(default_factory=dict)
    adapters: set[str] = field(default_factory=set)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, name: str, reason: str) -> None:
        """Note why a tensor is not read."""
        self.left_out.setdefault(reason, []).append(name)

    @property
    def notes(self) -> list[str]:
        """Sentences on what was left out."""
        return [f"{reason} ({len(names)}, first {names[0]})." for reason, names in self.left_out.items()]


def sort_parts(source: AdapterSource, factor: re.Pattern[str] = FACTOR) -> Parts:
    """Say of every tensor what it is for, where the method's factors have keys that match `factor`."""
    path, keeps_biases = source.path, (source.config or {}).get("bias", "none") != "none"
    parts = Parts()
    repeated = []
    for key, tensor in source.tensors.items():
        name = PEFT_PREFIX.sub("", key)
        if name.startswith("base_model.lora_model."):
            raise CheckpointError(
                f"{path} is one of the adapters of an X-LoRA, with names that no longer tell all layers; pass the "
                "adapter that it was made from."
            )
        found = factor.fullmatch(name)
        if match := found or MAGNITUDE.fullmatch(name):
            module = parts.modules.setdefault(match["module"], Factors())
            part = _part(found) if found else "magnitude"
            if part in module.tensors:
                repeated.append(key)
            module.tensors[part] = tensor
            module.embedding |= found is not None and found["part"].startswith("embedding_")
            parts.adapters.update(filter(None, [match["adapter"]]))
        elif match := REPLACED.fullmatch(name):
            parts.adapters.add(match["adapter"])
            parts.replaced[f"{match['module']}.{match['parameter']}"] = tensor
        elif match := TOKENS.fullmatch(name):
            if match["part"] == "delta":
                parts.tokens[match["module"]] = tensor
        elif match := FROZEN.fullmatch(name):
            if keeps_biases and match["parameter"] == "bias":
                parts.replaced[f"{match['module']}.bias"] = tensor
            else:
                parts.leave_out(name, "Frozen tensors of the base were left out, as BASE holds them")
        elif ".lora_" in name:
            raise CheckpointError(f"{path} holds {key!r}, which is no known part of its method; {MERGE}.")
        else:
            parts.replaced[name] = tensor
    if len(parts.adapters) > 1:
        raise CheckpointError(
            f"{path} holds several adapters ({', '.join(sorted(parts.adapters))}); "
            "save each in a folder of its own with `save_pretrained(selected_adapters=[…])`."
        )
    if repeated:
        raise CheckpointError(f"{path} holds the part {repeated[0]!r} twice; save the adapter again.")
    for factors in parts.modules.values():
        for tensor in factors.tensors.values():
            check_float(path, tensor)
    return parts


def _part(match: re.Match[str]) -> str:
    """Name a factor of a key: ``A`` for all of ``lora_A``, ``lora_a`` and ``lora_embedding_A``."""
    if match["parameter"] == "bias":
        return "bias"
    letter = match["part"].removeprefix("embedding_").upper()
    return letter if letter in ("A", "B") else match["part"]


def check_float(path: Path, tensor: StoredTensor) -> None:
    """Refuse a factor that no sum can be taken of."""
    if not tensor.is_float:
        raise CheckpointError(
            f"{tensor.name!r} in {path} is stored as {tensor.dtype}; "
            "save the adapter in a float dtype of 16 bits or more."
        )


def trained_tokens(source: AdapterSource, parts: Parts) -> Iterator[FormulaUpdate]:
    """Yield the embeddings of which an adapter trained single rows: their absolute values, by the configuration."""
    config = source.config or {}
    chosen = config.get("token_indices") or config.get("trainable_token_indices")
    for module, rows in parts.tokens.items():
        check_float(source.path, rows)
        places = _of_module(chosen, module) if isinstance(chosen, Mapping) else chosen
        if (
            not isinstance(places, Sequence)
            or not all(isinstance(place, int) and place >= 0 for place in places)
            or (len(places),) != rows.shape[:1]
        ):
            raise CheckpointError(
                f"{source.path} holds {rows.shape[0] if rows.shape else 0} trained tokens of {module}, and its "
                "adapter_config.json does not say which as many they are; save the adapter again."
            )
        yield FormulaUpdate(module, "trained tokens", (rows,), _rows_replaced(rows, list(places)))


def _of_module(chosen: Mapping[str, Any], module: str) -> Any:
    return next((places for name, places in chosen.items() if f".{module}".endswith(f".{name}")), None)


def _rows_replaced(rows: StoredTensor, places: list[int]) -> Formula:
    def tuned(weight: Weight) -> Weight:
        if max(places, default=-1) >= len(weight):
            raise ValueError(f"token {max(places)} was trained")
        replaced = weight.copy()
        replaced[places] = wide(rows).reshape(len(places), -1)
        return replaced

    return tuned


def complete(
    path: Path, parts: Parts, *, uses_dora: bool | None, axis: Axis, shares_inputs: bool
) -> Iterable[tuple[str, Factors]]:
    """Yield the modules in the order of the file, after checking that the tensors of each fit together."""
    for module, factors in parts.modules.items():
        has = factors.tensors
        for part, tensor in has.items():
            if part in ("A", "B") and (len(tensor.shape) < 2 or 0 in tensor.shape):
                raise CheckpointError(
                    f"{tensor.name!r} in {path} has the shape {tensor.shape}, as when sharded "
                    "parameters are not gathered before saving; gather them and save again."
                )
        if has.keys() == {"magnitude"}:
            yield module, factors
            continue
        if missing := [part for part in ("A", "B") if part not in has]:
            raise CheckpointError(
                f"{path} has no lora_{' and no lora_'.join(missing)} for {module}; save the adapter again."
            )
        if has["A"].shape[0] != has["B"].shape[1]:
            raise CheckpointError(
                f"lora_A {has['A'].shape} and lora_B {has['B'].shape} of {module} in {path} do not share "
                "a rank; save the adapter again (of a convolution in groups, each group gets an update over the inputs "
                "of all of them, so that no weight of its shape is tuned)."
            )
        vectors = has["B"].shape[0] if axis == "out" else has["A"].shape[1]
        numbers = has["magnitude"].size if "magnitude" in has else vectors
        if numbers > vectors or (numbers < vectors and not (shares_inputs and axis == "in")):
            raise CheckpointError(
                f"The magnitude of {module} in {path} has {numbers} numbers for "
                f"{vectors} {axis}put features; save the adapter again."
            )
        if uses_dora is not None and uses_dora != ("magnitude" in has):
            holds = "a magnitude" if "magnitude" in has else "no magnitude"
            raise CheckpointError(
                f"{path} has {holds} for {module}, but its adapter_config.json has use_dora "
                f"{str(uses_dora).lower()}; correct the one or save the other again."
            )
        yield module, factors

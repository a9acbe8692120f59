"""The keys of PEFT's adapters: which tensor is which part of which module, and whether the parts fit together.

They come from `adapter_model.safetensors` (or `.bin`), where PEFT has taken the adapter's name out of the keys, or from
the state dict of a model that still carries its adapter (``q_proj.lora_A.default.weight`` beside
``q_proj.base_layer.weight``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from wdanalysis.checkpoints.adapters.peft_config import MERGE
from wdanalysis.checkpoints.tensors import StoredTensor
from wdanalysis.decomposition import Axis
from wdanalysis.errors import CheckpointError

FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?:(?P<embedding>embedding_)?(?P<factor>[AaBb]))(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?"
    r"(?:\.(?P<parameter>weight|bias))?"
)
MAGNITUDE = re.compile(
    r"(?P<module>.+)\.(?:(?:lora|vera)_magnitude_vector|weight_m_wdecomp|weight_magnitude|lora_magnitude|magnitude)"
    r"(?:\.(?!weight$)(?P<adapter>[^.]+))?(?:\.weight)?"
)
REPLACED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<parameter>.+)")
FROZEN = re.compile(r"(?P<module>.+)\.(?:base_layer|original_module)\.(?P<parameter>.+)")
TOKENS = re.compile(r".+\.trainable_tokens_(?:delta|original)(?:\..+)?")
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
    adapters: set[str] = field(default_factory=set)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, name: str, reason: str) -> None:
        """Note why a tensor is not read."""
        self.left_out.setdefault(reason, []).append(name)

    @property
    def notes(self) -> list[str]:
        """Sentences on what was left out."""
        return [f"{reason} ({len(names)}, first {names[0]})." for reason, names in self.left_out.items()]


def sort_parts(path: Path, tensors: Mapping[str, StoredTensor], *, keeps_biases: bool) -> Parts:
    """Say of every tensor what it is for."""
    parts = Parts()
    repeated = []
    for key, tensor in tensors.items():
        name = PEFT_PREFIX.sub("", key)
        factor = FACTOR.fullmatch(name)
        if factor and factor["parameter"] == "bias":
            parts.leave_out(name, "Biases of lora_B were left out, as they change no matrix")
        elif match := factor or MAGNITUDE.fullmatch(name):
            module = parts.modules.setdefault(match["module"], Factors())
            part = factor["factor"].upper() if factor else "magnitude"
            if part in module.tensors:
                repeated.append(key)
            module.tensors[part] = tensor
            module.embedding |= factor is not None and factor["embedding"] is not None
            parts.adapters.update(filter(None, [match["adapter"]]))
        elif match := REPLACED.fullmatch(name):
            parts.adapters.add(match["adapter"])
            parts.replaced[f"{match['module']}.{match['parameter']}"] = tensor
        elif match := FROZEN.fullmatch(name):
            if keeps_biases and match["parameter"] == "bias":
                parts.replaced[f"{match['module']}.bias"] = tensor
            else:
                parts.leave_out(name, "Frozen tensors of the base were left out, as BASE holds them")
        elif TOKENS.fullmatch(name):
            parts.leave_out(name, "Tensors of single trained tokens were left out")
        elif ".lora_" in name:
            raise CheckpointError(f"{path} holds {key!r}, which is no part of LoRA or DoRA; {MERGE}.")
        else:
            parts.replaced[name] = tensor
    if len(parts.adapters) > 1:
        raise CheckpointError(
            f"{path} holds several adapters ({', '.join(sorted(parts.adapters))}); "
            "save each in a folder of its own with `save_pretrained(selected_adapters=[…])`."
        )
    if repeated:
        raise CheckpointError(f"{path} holds the part {repeated[0]!r} twice; save the adapter again.")
    return parts


def complete(
    path: Path, parts: Parts, *, uses_dora: bool | None, axis: Axis, shares_inputs: bool
) -> Iterable[tuple[str, Factors]]:
    """Yield the modules in the order of the file, after checking that the tensors of each fit together."""
    for module, factors in parts.modules.items():
        has = factors.tensors
        for part, tensor in has.items():
            if not tensor.is_float:
                raise CheckpointError(
                    f"{tensor.name!r} in {path} is stored as {tensor.dtype}; "
                    "save the adapter in a float dtype of 16 bits or more."
                )
            if part != "magnitude" and (len(tensor.shape) < 2 or 0 in tensor.shape):
                raise CheckpointError(
                    f"{tensor.name!r} in {path} has the shape {tensor.shape}, as when sharded "
                    "parameters are not gathered before saving; gather them and save again."
                )
        if missing := [part for part in ("A", "B") if part not in has]:
            raise CheckpointError(
                f"{path} has no lora_{' and no lora_'.join(missing)} for {module}; save the adapter again."
            )
        if has["A"].shape[0] != has["B"].shape[1]:
            raise CheckpointError(
                f"lora_A {has['A'].shape} and lora_B {has['B'].shape} of {module} in {path} do not share "
                "a rank; save the adapter again, or, for a convolution in groups, merge it into its base."
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

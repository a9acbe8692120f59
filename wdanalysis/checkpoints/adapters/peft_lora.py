"""LoRA and DoRA as PEFT saves them."""

from __future__ import annotations

from collections.abc import Collection

from wdanalysis.checkpoints.adapters.formats import Adapter, AdapterFormat, AdapterSource
from wdanalysis.checkpoints.adapters.peft_config import READABLE_TYPES, Scaling, peft_type
from wdanalysis.checkpoints.adapters.peft_keys import FACTOR, complete, sort_parts
from wdanalysis.checkpoints.tensors import LowRankUpdate
from wdanalysis.errors import CheckpointError


def recognises(names: Collection[str]) -> bool:
    """Whether any is a factor of LoRA."""
    return any(FACTOR.fullmatch(name) for name in names)


def read(source: AdapterSource) -> Adapter:
    """Read the updates with the scale of their configuration, or with the α that the user gives."""
    return read_low_rank(source, Scaling.of(source.path, source.config, source.alpha))


def read_low_rank(source: AdapterSource, scaling: Scaling, *, shares_inputs: bool = False) -> Adapter:
    """Read the updates of tensors with LoRA's keys.

    Parameters
    ----------
    source
        The tensors and their configuration.
    scaling
        By module.
    shares_inputs
        Whether A is one matrix for modules of different widths (VeRA).
    """
    path, config = source.path, source.config or {}
    axis = READABLE_TYPES[peft_type(config)]
    parts = sort_parts(path, source.tensors, keeps_biases=config.get("bias", "none") != "none")
    notes = [*parts.notes]
    if source.config is not None and source.alpha is not None:
        notes.append(
            f"alpha = {source.alpha:g} was not used, because {path} has its own adapter_config.json."
        )
    transposes = bool(config.get("fan_in_fan_out", False))
    uses_dora = config.get("use_dora")
    updates = tuple(
        LowRankUpdate(
            module=module,
            A=factors.tensors["A"],
            B=factors.tensors["B"],
            scale=scaling.scale(module, factors.tensors["A"].shape[0]),
            magnitude=factors.tensors.get("magnitude"),
            in_by_out=factors.embedding or (transposes and len(factors.tensors["A"].shape) == 2),
            shared_factor=shares_inputs,
            magnitude_axis=axis,
        )
        for module, factors in complete(
            path, parts, uses_dora=uses_dora, axis=axis, shares_inputs=shares_inputs
        )
    )
    if not updates and not parts.replaced:
        raise CheckpointError(
            f"{path} holds no lora_A and lora_B; save the adapter again with `save_pretrained`."
        )
    return Adapter(updates, parts.replaced, tuple([*notes, *scaling.notes(updates)]))


FORMAT = AdapterFormat("PEFT", recognises, read)

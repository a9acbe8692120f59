"""Adapters on disk, as PEFT has them: `adapter_config.json` and `adapter_model.safetensors`.

LoRA, DoRA and VeRA folders are PEFT's own, and PEFT loads them with the same outputs. A magnitude without an update of
the direction (§5.6), which PEFT does not know, is stored with an update of zeros (rank 1 for DoRA), which it does know.

Two kinds have no class in PEFT. They are stored in the same way under a `peft_type` that PEFT refuses, because under
one that it takes it would load them as something else:

- ``DVORA``: VeRA's keys, and beside a module's ``vera_lambda_b`` and ``vera_lambda_d`` its ``lora_magnitude_vector``;
- ``DORA_IN`` and ``DVORA_IN``: magnitudes along the input axis.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wdanalysis.checkpoints.adapters import read_adapter
from wdanalysis.checkpoints.adapters.peft_vera import ScaledRows
from wdanalysis.checkpoints.architectures import WRAPPERS
from wdanalysis.checkpoints.base_identity import noted_rows
from wdanalysis.checkpoints.folders import READERS, find_weights
from wdanalysis.checkpoints.names import NameIndex
from wdanalysis.checkpoints.storage import read_json
from wdanalysis.checkpoints.tensors import StoredTensor
from wdanalysis.errors import TrainingError
from wdanalysis.training.in_memory import STORAGE, stored
from wdanalysis.training.injection import (
    adapt,
    adaptable_layers,
    draw_projection,
    is_conv1d,
    make_lora,
    make_vera,
    put_in,
)
from wdanalysis.training.layers import (
    VERA_INITIAL_D,
    Adapted,
    LoRAUpdate,
    VeRAProjection,
    VeRAUpdate,
    adapted_modules,
    features,
)
from wdanalysis.writing import write_whole

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PROJECTIONS = {"A": "base_model.vera_A", "B": "base_model.vera_B"}
MAGNITUDE = "lora_magnitude_vector"
LORA_KEYS = {"A": "lora_A.weight", "B": "lora_B.weight"}
EMBEDDING_KEYS = {"A": "lora_embedding_A", "B": "lora_embedding_B"}
VERA_KEYS = {"lambda_b": "vera_lambda_b", "lambda_d": "vera_lambda_d"}
ALONG_INPUTS = "_IN"


# --- saving -------------------------------------------------------------------------------------------------


def save_adapter(
    model: nn.Module, folder: Path, *, base_name: str, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write the adapters of `model` as a folder that PEFT loads with the same outputs.

    The weights' header notes by what the base is known again: `checkpoints.base_identity.noted_rows`.

    Parameters
    ----------
    model
        With adapters, as `inject` leaves it; it may be wrapped by DDP or torch.compile.
    folder
        Made where it does not exist. Each file is written beside its place and then renamed.
    base_name
        The base model's path or hub id, for `base_model_name_or_path`.
    state_dict
        The model's, gathered, where its parameters are sharded.

    Raises
    ------
    TrainingError
        The model has no adapters.
    OutputError
        The folder cannot be written.
    """
    from safetensors.torch import save_file

    modules = {_without_wrappers(name): module for name, module in adapted_modules(model).items()}
    if not modules:
        raise TrainingError("The model has no adapters to save; call `inject` first.")
    parameters = {_without_wrappers(name): p for name, p in (state_dict or model.state_dict()).items()}
    first = next(module.update for module in modules.values() if module.update is not None)
    config = _shared_config(model, modules, base_name)
    if isinstance(first, VeRAUpdate):
        config |= _vera_config(modules, first)
        tensors = _projections(modules, first.projection)
    else:
        config |= _lora_config(modules)
        tensors = {}
    for name, module in modules.items():
        tensors |= _tensors_of(name, module, parameters, first)
    metadata = {"format": "pt", **noted_rows(_base_weights(modules, parameters))}
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_whole(folder / WEIGHTS, lambda file: save_file(on_cpu, file.name, metadata=metadata))
    write_whole(folder / CONFIG, lambda file: file.write(text.encode()))


def _base_weights(
    modules: Mapping[str, Adapted], parameters: Mapping[str, Tensor]
) -> dict[str, StoredTensor]:
    """The untuned weights of the adapted modules that are there as floats: neither quantised nor sharded."""
    weights = {
        name: weight for name in modules if (weight := parameters.get(f"{name}.base.weight")) is not None
    }
    return {
        name: stored(name, weight)
        for name, weight in weights.items()
        if type(weight) in (Tensor, nn.Parameter) and weight.dtype in STORAGE and weight.dim() == 2
    }


def _projections(modules: Mapping[str, Adapted], projection: VeRAProjection) -> dict[str, Tensor]:
    """A and B under PEFT's keys, with zeros as far as a lone magnitude's layer is wider than those with an update."""
    outputs, inputs = (
        max(sizes) for sizes in zip(*(features(m.base) for m in modules.values()), strict=True)
    )
    A, B = projection.A, projection.B
    return {
        PROJECTIONS["A"]: nn.functional.pad(A, (0, max(0, inputs - A.shape[1]))),
        PROJECTIONS["B"]: nn.functional.pad(B, (0, 0, 0, max(0, outputs - B.shape[0]))),
    }


def _tensors_of(
    name: str, module: Adapted, parameters: Mapping[str, Tensor], first: LoRAUpdate | VeRAUpdate
) -> dict[str, Tensor]:
    """One module's tensors under PEFT's keys; zeros where a lone magnitude has no update."""
    keys = VERA_KEYS if isinstance(first, VeRAUpdate) else _lora_keys(module)
    if module.update is not None:
        parts = {part: parameters[f"{name}.update.{part}"] for part in keys}
    else:
        out_features, in_features = features(module.base)
        shapes = {
            "A": (1, in_features),
            "B": (out_features, 1),
            "lambda_b": (out_features,),
            "lambda_d": (first.rank,),
        }
        parts = {part: torch.zeros(shapes[part]) for part in keys}
    tensors = {f"{PREFIX}{name}.{keys[part]}": tensor for part, tensor in parts.items()}
    if module.magnitude is not None:
        tensors[f"{PREFIX}{name}.{MAGNITUDE}"] = parameters[f"{name}.magnitude"]
    return tensors


def _shared_config(model: nn.Module, modules: Mapping[str, Adapted], base_name: str) -> dict[str, Any]:
    return {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": any(is_conv1d(module.base) for module in modules.values()),
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": sorted(modules),
        "task_type": "CAUSAL_LM" if "CausalLM" in type(model).__name__ else None,
    }


def _lora_config(modules: Mapping[str, Adapted]) -> dict[str, Any]:
    updates = {name: m.update for name, m in modules.items() if isinstance(m.update, LoRAUpdate)}
    ranks = {name: updates[name].rank if name in updates else 1 for name in modules}
    alphas = {name: _number(update.scale * update.rank) for name, update in updates.items()}
    (rank, _), *_ = Counter(update.rank for update in updates.values()).most_common(1)
    (alpha, _), *_ = Counter(alphas.values()).most_common(1)
    first = next(iter(modules.values()))
    return {
        "peft_type": "LORA" if first.magnitude is None or first.axis == "out" else f"DORA{ALONG_INPUTS}",
        "r": rank,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "lora_alpha": alpha,
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "lora_dropout": next(iter(updates.values())).dropout.p,
        "use_dora": first.magnitude is not None,
        "use_rslora": False,
        "init_lora_weights": True,
    }


def _vera_config(modules: Mapping[str, Adapted], update: VeRAUpdate) -> dict[str, Any]:
    first = next(iter(modules.values()))
    along = "" if first.axis == "out" else ALONG_INPUTS
    return {
        "peft_type": "VERA" if first.magnitude is None else f"DVORA{along}",
        "r": update.rank,
        "projection_prng_key": update.projection.seed,
        "save_projection": True,
        "vera_dropout": update.dropout.p,
        "d_initial": VERA_INITIAL_D,
        "init_weights": True,
    }


def _lora_keys(module: Adapted) -> Mapping[str, str]:
    return EMBEDDING_KEYS if isinstance(module.base, nn.Embedding) else LORA_KEYS


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _number(value: float) -> int | float:
    """An int where it is one, as PEFT writes α; without the digits that α/r·r adds."""
    value = round(value, 6)
    return int(value) if value == int(value) else value


# --- loading ------------------------------------------------------------------------------------------------


def load_adapter(model: nn.Module, folder: Path, *, full_gradient: bool = False) -> list[str]:
    """Adapt `model` as a folder says, one of `save_adapter` or of PEFT's LoRA, DoRA or VeRA.

    Whole tensors in the folder (`modules_to_save`, biases) replace the model's, and stay frozen.

    Parameters
    ----------
    model
        Without adapters.
    folder
        With `adapter_config.json` and the tensors.
    full_gradient
        As in `AdapterConfig`; it is no part of an adapter.

    Returns
    -------
    list of str
        Names of the adapted modules, in the order of the model.

    Raises
    ------
    TrainingError
        The model has adapters already, or a module or shape of the folder is not in it.
    CheckpointError
        The folder is no adapter that can be read.
    """
    if adapted_modules(model):
        raise TrainingError("The model has adapters already; load it anew before loading an adapter.")
    config = _read_config(folder)
    modules = _Modules.of(model, folder)
    weights, _ = find_weights(folder)
    tensors = {
        name: tensor for file in weights.files for name, tensor in READERS[file.suffix](file).tensors.items()
    }
    adapter = read_adapter(folder, _with_projections(tensors, modules, config), config, alpha=None)
    dropout = float(config.get("vera_dropout" if adapter.directions == "VeRA" else "lora_dropout") or 0.0)
    projection: VeRAProjection | None = None
    adapted: dict[str, Adapted] = {}
    for update in adapter.updates:
        name, layer = modules.find(update.module)
        A, B, magnitude = update.A.reader, update.B.reader, update.magnitude
        new: LoRAUpdate | VeRAUpdate | None = None
        if magnitude is None or any(_tensor(factor).any() for factor in (update.A, update.B)):
            if isinstance(A, ScaledRows) and isinstance(B, ScaledRows):
                projection = projection or _projection(A.matrix, B.matrix, layer, config)
                new = make_vera(layer, projection, dropout)
                parts = {"lambda_d": A.vector, "lambda_b": B.vector}
            else:
                new = make_lora(layer, update.rank, update.scale * update.rank, dropout)
                parts = {"A": update.A, "B": update.B}
            for part, tensor in parts.items():
                modules.fill(name, getattr(new, part), tensor)
        axis = update.magnitude_axis
        module = adapt(layer, new, magnitude is not None, axis=axis, full_gradient=full_gradient)
        if magnitude is not None and module.magnitude is not None:
            modules.fill(name, module.magnitude, magnitude)
        adapted[name] = module
    _replace_whole_tensors(model, folder, adapter.tensors)
    put_in(model, adapted)
    return list(adapted_modules(model))


def _with_projections(
    tensors: Mapping[str, StoredTensor], modules: _Modules, config: Mapping[str, Any]
) -> Mapping[str, StoredTensor]:
    """Add VeRA's A and B, drawn as in its training, where PEFT was told not to save them."""
    suffix = f".{VERA_KEYS['lambda_b']}"
    names = [key.removeprefix(PREFIX).removesuffix(suffix) for key in tensors if key.endswith(suffix)]
    if not names or any(key in tensors for key in PROJECTIONS.values()):
        return tensors
    layers = [layer for _, layer in map(modules.find, names)]
    drawn = draw_projection(layers, int(config["r"]), int(config.get("projection_prng_key") or 0))
    return {**tensors, **{key: stored(key, getattr(drawn, part)) for part, key in PROJECTIONS.items()}}


def _projection(
    A: StoredTensor, B: StoredTensor, layer: nn.Module, config: Mapping[str, Any]
) -> VeRAProjection:
    device: Any = layer.weight.device
    seed = int(config.get("projection_prng_key") or 0)
    return VeRAProjection(_tensor(A).to(device), _tensor(B).to(device), seed)


@dataclass(frozen=True)
class _Modules:
    """A model's layers, found by the names that an adapter has for them."""

    folder: Path
    layers: Mapping[str, nn.Module]
    index: NameIndex

    @classmethod
    def of(cls, model: nn.Module, folder: Path) -> _Modules:
        layers = adaptable_layers(model)
        return cls(folder, layers, NameIndex(f"{name}.weight" for name in layers))

    def find(self, name: str) -> tuple[str, nn.Module]:
        found = self.index.find(f"{name}.weight")
        if found is None:
            raise TrainingError(
                f"{self.folder} adapts '{name}', which the model does not have or which is no linear or embedding "
                "layer; load the base that the adapter was trained on."
            )
        return found.removesuffix(".weight"), self.layers[found.removesuffix(".weight")]

    def fill(self, name: str, parameter: nn.Parameter, tensor: StoredTensor) -> None:
        """Copy a stored tensor into a parameter of module `name`."""
        if tensor.size != parameter.numel():
            raise TrainingError(
                f"{tensor.name!r} in {self.folder} has the shape {tensor.shape}, and the model's '{name}' needs "
                f"{tuple(parameter.shape)}; load the base that the adapter was trained on."
            )
        with torch.no_grad():
            parameter.copy_(_tensor(tensor).reshape(parameter.shape))


def _replace_whole_tensors(model: nn.Module, folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Copy what an adapter stores whole into the model, before it is adapted."""
    state = model.state_dict()
    index = NameIndex(state)
    for name, tensor in tensors.items():
        found = index.find(name)
        if found is None or tuple(state[found].shape) != tensor.shape:
            raise TrainingError(
                f"{folder} holds '{name}' of shape {tensor.shape}, which the model does not have in that shape; "
                "load the base that the adapter was trained on, with its embeddings resized."
            )
        with torch.no_grad():
            state[found].copy_(_tensor(tensor))


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG)
    if config is None:
        raise TrainingError(
            f"{folder} has no {CONFIG}, so it is no adapter folder; pass one that PEFT wrote."
        )
    return config


def _tensor(described: StoredTensor) -> Tensor:
    tensor = torch.from_numpy(described.read().copy())
    return tensor.view(torch.bfloat16) if described.dtype == "BF16" else tensor

"""PEFT adapters (LoRA, DoRA, VeRA, DVoRA): from tensors and configuration to low-rank updates with their scales.

An adapter's tensors come from `adapter_model.safetensors` (or `.bin`), where PEFT has taken the adapter's
name out of the keys, or from the state dict of a model that still carries its adapter
(``q_proj.lora_A.default.weight`` beside ``q_proj.base_layer.weight``). Each adapted module becomes a
`LowRankUpdate`; what replaces a tensor of the base outright (`modules_to_save`, trained biases, a resized
embedding) gets the name that it has in the base.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from wdanalysis.checkpoints.tensors import LowRankUpdate, StoredTensor
from wdanalysis.checkpoints.vera import as_low_rank, is_vera
from wdanalysis.decomposition import Axis
from wdanalysis.errors import CheckpointError

MERGE = "merge it into its base with PEFT's `merge_and_unload` and pass the merged model"

UNREADABLE_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "layer_replication": f"repeats layers of the base, whose numbers then differ; {MERGE}",
        "alora_invocation_tokens": "acts on some tokens only (aLoRA), so that no one weight is tuned",
        "arrow_config": "routes tokens through several adapters (Arrow), so that no one weight is tuned",
        "monteclora_config": f"draws its weights at random (MonteCLoRA); {MERGE}",
        "kasa_config": f"changes the base weights as well (KaSA); {MERGE}",
        "use_bdlora": f"stores its factors as blocks (BD-LoRA); {MERGE}",
        "use_qalora": f"pools its inputs in groups (QALoRA); {MERGE}",
        "target_parameters": f"adapts three-dimensional parameters, which is not supported; {MERGE}",
    }
)
"""Fields of `adapter_config.json` that, when set, make W0 + scale·BA the wrong weight."""

UNREADABLE_TYPES: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(
        (
            "PROMPT_TUNING",
            "MULTITASK_PROMPT_TUNING",
            "P_TUNING",
            "PREFIX_TUNING",
            "CPT",
            "CARTRIDGE",
            "ADAPTION_PROMPT",
        ),
        "which changes no weight, so that there is nothing to compare",
    )
    | {"XLORA": "which mixes its adapters anew for each token, so that no one weight is tuned"}
)
"""PEFT types that have no tuned weights; every other type can at least be merged."""

READABLE_TYPES: Mapping[str, Axis] = MappingProxyType(
    {"LORA": "out", "DORA": "out", "VERA": "out", "DVORA": "out", "DORA_IN": "in", "DVORA_IN": "in"}
)
"""The axis of the magnitudes by `peft_type`: PEFT's name of both LoRA and DoRA, the name that the paper authors' fork
gives to DoRA, PEFT's name of VeRA, and the names under which our own training saves what PEFT does not have."""

WITH_MAGNITUDE: Mapping[str, str] = MappingProxyType({"LoRA": "DoRA", "VeRA": "DVoRA"})
"""What a method is called when its modules have a magnitude as well."""

CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Values of `init_lora_weights` (or how they begin) that subtract the initial B·A from the base."""

FOREIGN_KEYS: Mapping[str, str] = MappingProxyType(
    {
        r"\.lora_(down|up|mid)\.weight$": "kohya",
        r"\.hada_w[12]_": "LoHa",
        r"\.lokr_w[12]": "LoKr",
        r"\.ia3_l\b": "IA³",
        r"\.oft_(r|R|s|blocks)\b": "OFT",
    }
)
"""Keys of adapters that are not LoRA in PEFT's spelling, for files that come without a configuration."""

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

T = TypeVar("T")


@dataclass(frozen=True)
class Adapter:
    """What an adapter holds: see the attributes of the same names of `Checkpoint`."""

    updates: tuple[LowRankUpdate, ...]
    tensors: Mapping[str, StoredTensor]
    notes: tuple[str, ...]
    directions: str = "LoRA"

    @property
    def kind(self) -> str:
        """``LoRA`` or ``VeRA``; ``DoRA`` or ``DVoRA`` if any module has a magnitude."""
        has_magnitude = any(update.magnitude for update in self.updates)
        return WITH_MAGNITUDE[self.directions] if has_magnitude else self.directions


def is_adapter(names: Iterable[str]) -> bool:
    """Whether tensors of these names belong to an adapter of any kind."""
    names = tuple(names)
    return is_vera(names) or any(FACTOR.fullmatch(name) or _foreign_kind(name) for name in names)


def read_adapter(
    path: Path, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any] | None, alpha: float | None
) -> Adapter:
    """Sort an adapter's tensors into low-rank updates and tensors that replace those of the base.

    Parameters
    ----------
    path
        The file or folder, for messages.
    tensors
        All tensors of the adapter, by their names in the file.
    config
        `adapter_config.json`; None where there is none.
    alpha
        The scale's numerator where `config` is None; not used otherwise, nor by VeRA, which has no scale.

    Raises
    ------
    CheckpointError
        It is not of the form W0 + scale·BA, its tensors do not fit together, or α is not known.
    """
    if config is not None:
        _check_readable(path, config)
    axis = READABLE_TYPES[_peft_type(config or {})]
    if foreign := next((kind for name in tensors if (kind := _foreign_kind(name))), None):
        raise CheckpointError(
            f"{path} is a {foreign} adapter, which is not supported; merge it into its base first."
        )
    vera = is_vera(tensors)
    if vera:
        tensors = as_low_rank(path, tensors)
        scaling = _Scaling(path, alpha=1.0, divides_by_rank=False)
    elif config is not None:
        scaling = _Scaling.from_config(path, config)
    else:
        scaling = _Scaling.from_alpha(path, alpha)
    parts = _sort(path, tensors, keeps_biases=(config or {}).get("bias", "none") != "none")
    notes = [*parts.notes]
    if config is not None and alpha is not None:
        notes.append(f"alpha = {alpha:g} was not used, because {path} has its own adapter_config.json.")

    transposes = bool((config or {}).get("fan_in_fan_out", False))
    updates = tuple(
        LowRankUpdate(
            module=module,
            A=factors.tensors["A"],
            B=factors.tensors["B"],
            scale=scaling.scale(module, factors.tensors["A"].shape[0]),
            magnitude=factors.tensors.get("magnitude"),
            in_by_out=factors.embedding or (transposes and len(factors.tensors["A"].shape) == 2),
            shared_factor=vera,
            magnitude_axis=axis,
        )
        for module, factors in _complete(
            path, parts, uses_dora=(config or {}).get("use_dora"), axis=axis, shares_inputs=vera
        )
    )
    if not updates and not parts.replaced:
        raise CheckpointError(
            f"{path} holds no lora_A and lora_B; save the adapter again with `save_pretrained`."
        )
    if differing := [update for update in updates if scaling.rank(update.module) not in (None, update.rank)]:
        first = differing[0]
        notes.append(
            f"In {len(differing)} of {len(updates)} modules, first {first.module}, the rank ({first.rank}) "
            "differs from adapter_config.json; that of the tensors was used."
        )
    if ambiguous := [update.module for update in updates if scaling.is_ambiguous(update.module)]:
        notes.append(
            f"In {len(ambiguous)} of {len(updates)} modules, first {ambiguous[0]}, several keys of alpha_pattern "
            "match; the first in adapter_config.json was used, as PEFT does, but it may not have been so in training."
        )
    return Adapter(updates, parts.replaced, tuple(notes), directions="VeRA" if vera else "LoRA")


@dataclass(frozen=True)
class _Scaling:
    """α/r, α/√r or (VeRA) 1, with PEFT's patterns of modules that have an α or a rank of their own."""

    path: Path
    alpha: float
    default_rank: int | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    by_square_root: bool = False
    divides_by_rank: bool = True

    @classmethod
    def from_config(cls, path: Path, config: Mapping[str, Any]) -> _Scaling:
        alpha, rank = config.get("lora_alpha"), config.get("r")
        patterns = {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
        numbers = [
            alpha,
            *(n for pattern in patterns.values() if isinstance(pattern, dict) for n in pattern.values()),
        ]
        if not all(isinstance(pattern, dict) for pattern in patterns.values()) or not all(
            map(_is_number, numbers)
        ):
            raise CheckpointError(
                f"adapter_config.json of {path} does not give lora_alpha, rank_pattern and alpha_pattern "
                "as numbers; save the adapter again with `save_pretrained`."
            )
        return cls(path, alpha, rank, by_square_root=bool(config.get("use_rslora", False)), **patterns)  # type: ignore[arg-type]

    @classmethod
    def from_alpha(cls, path: Path, alpha: float | None) -> _Scaling:
        if alpha is None:
            raise CheckpointError(
                f"{path} is an adapter without adapter_config.json, so its scale is not known; "
                "put adapter_config.json beside it, or pass the lora_alpha of its training as --alpha."
            )
        return cls(path, alpha)

    def rank(self, module: str) -> int | None:
        """Return the rank that the configuration gives to a module."""
        return next(iter(self._matching(self.rank_pattern, module)), self.default_rank)

    def scale(self, module: str, rank: int) -> float:
        """Return α over the rank of the module's tensors, or over its square root (`use_rslora`)."""
        alpha = next(iter(self._matching(self.alpha_pattern, module)), self.alpha)
        if not self.divides_by_rank:
            return alpha
        return alpha / (math.sqrt(rank) if self.by_square_root else rank)

    def is_ambiguous(self, module: str) -> bool:
        """Whether the order of the patterns, which PEFT sorts when it saves, decides the module's α."""
        return len(set(self._matching(self.alpha_pattern, module))) > 1

    def _matching(self, pattern: Mapping[str, T], module: str) -> list[T]:
        """Collect the values of the keys that match; the first counts, as in PEFT's `get_pattern_key`."""
        try:
            return [value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)]
        except re.error as error:
            raise CheckpointError(
                f"adapter_config.json of {self.path} has a pattern that is no regular expression ({error}); "
                "correct its rank_pattern or alpha_pattern."
            ) from error


@dataclass
class _Factors:
    """The tensors of one adapted module, as they are found."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    embedding: bool = False


@dataclass
class _Parts:
    """An adapter's tensors by what they are for."""

    modules: dict[str, _Factors] = field(default_factory=dict)
    replaced: dict[str, StoredTensor] = field(default_factory=dict)
    adapters: set[str] = field(default_factory=set)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, name: str, reason: str) -> None:
        self.left_out.setdefault(reason, []).append(name)

    @property
    def notes(self) -> list[str]:
        return [f"{reason} ({len(names)}, first {names[0]})." for reason, names in self.left_out.items()]


def _sort(path: Path, tensors: Mapping[str, StoredTensor], *, keeps_biases: bool) -> _Parts:
    parts = _Parts()
    repeated = []
    for key, tensor in tensors.items():
        name = PEFT_PREFIX.sub("", key)
        factor = FACTOR.fullmatch(name)
        if factor and factor["parameter"] == "bias":
            parts.leave_out(name, "Biases of lora_B were left out, as they change no matrix")
        elif match := factor or MAGNITUDE.fullmatch(name):
            module = parts.modules.setdefault(match["module"], _Factors())
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


def _complete(
    path: Path, parts: _Parts, *, uses_dora: bool | None, axis: Axis, shares_inputs: bool
) -> Iterable[tuple[str, _Factors]]:
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


def _check_readable(path: Path, config: Mapping[str, Any]) -> None:
    kind = _peft_type(config)
    if kind not in READABLE_TYPES:
        reason = UNREADABLE_TYPES.get(kind, f"which is not supported; {MERGE}")
        raise CheckpointError(f"{path} is an adapter of PEFT's type {kind}, {reason}.")
    for setting, reason in UNREADABLE_SETTINGS.items():
        if config.get(setting):
            raise CheckpointError(f"{path} is an adapter with {setting}, which {reason}.")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGING_INITS):
        raise CheckpointError(
            f"{path} was initialised by {init}, which changes the base weights, so it is no update of the "
            "original base; convert it with `save_pretrained(…, path_initial_model_for_weight_conversion=…)`."
        )


def _peft_type(config: Mapping[str, Any]) -> str:
    return str(config.get("peft_type") or "LORA").upper()


def _foreign_kind(name: str) -> str | None:
    return next((kind for pattern, kind in FOREIGN_KEYS.items() if re.search(pattern, name)), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

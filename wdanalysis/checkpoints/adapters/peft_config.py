"""`adapter_config.json` of PEFT: which adapters have a tuned weight to tell, and with which scale."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from wdanalysis.checkpoints.tensors import LowRankUpdate
from wdanalysis.decomposition import Axis
from wdanalysis.errors import CheckpointError

MERGE = "merge it into its base with PEFT's `merge_and_unload` and pass the merged model"

UNREADABLE_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "alora_invocation_tokens": "acts on some tokens only (aLoRA), so that no one weight is tuned",
        "arrow_config": "routes tokens through several adapters (Arrow), so that no one weight is tuned",
        "monteclora_config": f"draws its weights at random (MonteCLoRA); {MERGE}",
    }
)
"""Fields of `adapter_config.json` that, when set, leave no tuned weight to be told from the file and the base."""

_NO_WEIGHT = "which changes no weight, so that there is nothing to compare"
_BY_INPUT = "so that no one weight is tuned"

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
        _NO_WEIGHT,
    )
    | {
        "BEFT": "which changes biases alone, so that there is no matrix to compare",
        "SHADOW": "which runs a second network beside the model and changes no weight",
        "XLORA": f"which mixes its adapters anew for each token, {_BY_INPUT}; pass one of the adapters that it mixes",
        "POLY": f"which mixes its factors anew for each task, {_BY_INPUT}",
        "LILY": f"which mixes its factors anew for each token, {_BY_INPUT}",
        "UNILORA": "which deals its numbers out to the modules in the order of the model, which no file tells; "
        + MERGE,
        "TINYLORA": "which deals its vectors out to the modules in the order of the model, which no file tells; "
        + MERGE,
        "FROD": f"whose factors are computed from all weights of the base at once; {MERGE}",
    }
)
"""PEFT types of which no tuned weight can be told, module by module, from the file and the base."""

MAGNITUDE_AXES: Mapping[str, Axis] = MappingProxyType({"DORA_IN": "in", "DVORA_IN": "in"})
"""The axis of the magnitudes by `peft_type`, where it is not PEFT's: names under which our own training saves what PEFT
does not have."""

UNTOLD_INITS: Mapping[str, str] = MappingProxyType(
    {
        "corda": "the activations of its calibration data",
        "lora_ga": "the gradients of its training data",
        "loftq": "the quantisation of its base",
        "pissa_niter_": "a randomised SVD",
    }
)
"""Values of `init_lora_weights` (or how they begin) that subtract an initial B·A which cannot be computed again, with
what it came from."""

T = TypeVar("T")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


SETTING_KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = MappingProxyType(
    {
        "target_parameters": ("a list of names", _is_names),
        "feedforward_modules": (
            "a name or a list of names",
            lambda value: isinstance(value, str) or _is_names(value),
        ),
        "use_bdlora": ("its settings by name", lambda value: isinstance(value, dict)),
        "auto_mapping": ("settings by name", lambda value: isinstance(value, dict)),
        "qalora_group_size": ("a number above 0", _is_count),
        "num_cayley_neumann_terms": ("a number above 0", _is_count),
        "eps": ("a number", _is_number),
    }
)
"""What a setting has to be, where it is there, so that it can be read."""


def check_readable(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse an adapter of which no tuned weight can be told, and say why."""
    kind = peft_type(config)
    for setting, (expected, is_right) in SETTING_KINDS.items():
        if (value := config.get(setting)) is not None and not is_right(value):
            raise CheckpointError(
                f"adapter_config.json of {path} has {setting} = {value!r}, which is not {expected}; save the adapter "
                "again with `save_pretrained`."
            )
    if reason := UNREADABLE_TYPES.get(kind):
        raise CheckpointError(f"{path} is an adapter of PEFT's type {kind}, {reason}.")
    for setting, reason in UNREADABLE_SETTINGS.items():
        if config.get(setting):
            raise CheckpointError(f"{path} is an adapter with {setting}, which {reason}.")
    init = config.get("init_lora_weights")
    for start, origin in UNTOLD_INITS.items():
        if isinstance(init, str) and init.lower().startswith(start):
            raise CheckpointError(
                f"{path} was initialised by {init}, which subtracts from the base weights what came from {origin} and "
                "is not in the file; convert it with `save_pretrained(…, path_initial_model_for_weight_conversion=…)`."
            )


def peft_type(config: Mapping[str, Any]) -> str:
    """Return PEFT's type of an adapter; LoRA where the configuration does not tell it."""
    return str(config.get("peft_type") or "LORA").upper()


@dataclass(frozen=True)
class Scaling:
    """α/r, α/√r or (VeRA) 1, with PEFT's patterns of modules that have an α or a rank of their own."""

    path: Path
    alpha: float
    default_rank: int | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    by_square_root: bool = False
    divides_by_rank: bool = True

    @classmethod
    def of(cls, path: Path, config: Mapping[str, Any] | None, alpha: float | None) -> Scaling:
        """Take it from the configuration, or from α where there is none."""
        return cls.from_alpha(path, alpha) if config is None else cls.from_config(path, config)

    @classmethod
    def from_config(cls, path: Path, config: Mapping[str, Any], key: str = "lora_alpha") -> Scaling:
        """Take it from `adapter_config.json`, where α has this key."""
        alpha, rank = config.get(key), config.get("r")
        patterns = {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
        numbers = [
            alpha,
            *(n for pattern in patterns.values() if isinstance(pattern, dict) for n in pattern.values()),
        ]
        if not all(isinstance(pattern, dict) for pattern in patterns.values()) or not all(
            map(_is_number, numbers)
        ):
            raise CheckpointError(
                f"adapter_config.json of {path} does not give {key}, rank_pattern and alpha_pattern "
                "as numbers; save the adapter again with `save_pretrained`."
            )
        return cls(path, alpha, rank, by_square_root=bool(config.get("use_rslora", False)), **patterns)  # type: ignore[arg-type]

    @classmethod
    def from_alpha(cls, path: Path, alpha: float | None) -> Scaling:
        """Take it from the α that the user gives."""
        if alpha is None:
            raise CheckpointError(
                f"{path} is an adapter without adapter_config.json, so its scale is not known; "
                "put adapter_config.json beside it, or pass the lora_alpha of its training as alpha.",
                parameter="alpha",
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

    def notes(self, updates: Sequence[LowRankUpdate]) -> Iterator[str]:
        """Sentences on modules whose tensors or patterns leave a doubt."""
        if differing := [u for u in updates if self.rank(u.module) not in (None, u.rank)]:
            first = differing[0]
            yield (
                f"In {len(differing)} of {len(updates)} modules, first {first.module}, the rank ({first.rank}) "
                "differs from adapter_config.json; that of the tensors was used."
            )
        if ambiguous := [u.module for u in updates if self.is_ambiguous(u.module)]:
            yield (
                f"In {len(ambiguous)} of {len(updates)} modules, first {ambiguous[0]}, several keys of alpha_pattern "
                "match; the first in adapter_config.json was used, as PEFT does, but it may not have been so in "
                "training."
            )

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

"""`adapter_config.json` of PEFT: which adapters are a low-rank update of one weight, and with which scale."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
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

CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Values of `init_lora_weights` (or how they begin) that subtract the initial B·A from the base."""

T = TypeVar("T")


def check_readable(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse an adapter whose tuned weight is not W0 + scale·BA, and say why."""
    kind = peft_type(config)
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
    def from_config(cls, path: Path, config: Mapping[str, Any]) -> Scaling:
        """Take it from `adapter_config.json`."""
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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

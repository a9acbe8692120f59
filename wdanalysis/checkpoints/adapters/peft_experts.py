"""LoRA on parameters that are no module's weight (`target_parameters`): stacks of experts, in three dimensions.

PEFT keeps the factors of all E experts in two matrices: A (E·r × in), expert after expert, and B (out × r·E), where the
expert changes fastest. Unsloth writes the same keys and shapes, but B expert after expert. Of several parameters of one
module each is wrapped around the one before, so that the *last* has the module's own name and those before it have
``base_layer`` in theirs; which parameter a key means is told by the order, and by the shapes of the base.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import numpy as np

from wdanalysis.checkpoints.adapters.formats import AdapterSource, Weight, computed, wide
from wdanalysis.checkpoints.adapters.peft_config import Scaling
from wdanalysis.checkpoints.adapters.peft_keys import Factors, Parts
from wdanalysis.checkpoints.tensors import FormulaUpdate, LowRankUpdate, StoredTensor
from wdanalysis.errors import CheckpointError

ORDER = ("gate_up_proj", "gate_proj", "w1", "up_proj", "w3", "down_proj", "w2")
"""The order in which experts' parameters are declared in transformers, as far as they go together."""

IN_BY_OUT_TYPES = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")
"""`model_type`s of which transformers says that the experts are stored as in × out (`is_transposed`)."""

SEPARATE = {"gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")), "down_proj": (("down_proj", "w2"),)}
"""A fused parameter's shares along its outputs, under the names that they have where each expert is stored apart."""


@dataclass
class Experts:
    """What an adapter does to parameters.

    Attributes
    ----------
    updates
        Of parameters that are a matrix, and of experts that the base stores one by one.
    formulas
        Of stacks.
    notes
        Sentences.
    """

    updates: list[LowRankUpdate] = field(default_factory=list)
    formulas: list[FormulaUpdate] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def taken_from(parts: Parts, source: AdapterSource, scaling: Scaling) -> Experts:
    """Take the factors of targeted parameters out of `parts`, and say what they do.

    Raises
    ------
    CheckpointError
        It cannot be told which parameter a pair of factors means, or they do not fit it.
    """
    experts = Experts()
    targets = (source.config or {}).get("target_parameters") or ()
    by_expert = bool(((source.config or {}).get("auto_mapping") or {}).get("unsloth_fixed"))
    for root, wrapped in _wrapped(parts, targets).items():
        names = _parameters(root, [target for target in targets if _means(target, root)])
        pairs = [_pair(source, root, parts.modules.pop(module)) for module in wrapped]
        for name, (A, B) in zip(_assigned(source, root, names, pairs), pairs, strict=True):
            stack = _Stack(source, root, name, A, B, scaling, by_expert=by_expert)
            experts.updates.extend(stack.updates())
            experts.formulas.extend(stack.formulas())
    if by_expert and (experts.updates or experts.formulas):
        experts.notes.append(
            f"{source.path} was written by Unsloth: its lora_B of experts was read expert after expert, as Unsloth "
            "trains it (PEFT would merge it otherwise)."
        )
    return experts


def _means(target: str, root: str) -> bool:
    """Whether a target is a parameter of the module `root`."""
    return f".{root}".endswith(f".{target.rpartition('.')[0]}")


def _wrapped(parts: Parts, targets: Any) -> dict[str, list[str]]:
    """By module, the keys' modules of the parameters that are adapted, from the innermost to the outermost."""
    found: dict[str, list[str]] = {}
    for module in parts.modules:
        root = re.sub(r"(?:\.base_layer)+$", "", module)
        if any(_means(target, root) for target in targets):
            found.setdefault(root, []).append(module)
    return {root: sorted(modules, key=len, reverse=True) for root, modules in found.items()}


def _parameters(root: str, targets: list[str]) -> list[str]:
    """The names of the parameters of a module, in the order in which they are declared."""
    names = sorted({target.rpartition(".")[2] for target in targets})
    return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


def _pair(source: AdapterSource, root: str, factors: Factors) -> tuple[StoredTensor, StoredTensor]:
    has = factors.tensors
    if has.keys() != {"A", "B"} or len(has["A"].shape) != 2 or len(has["B"].shape) != 2:
        raise CheckpointError(
            f"{source.path} does not hold one lora_A and one lora_B, of two dimensions, for a parameter of {root}; "
            "save the adapter again."
        )
    if has["A"].rows != has["B"].row_length:
        raise CheckpointError(
            f"lora_A {has['A'].shape} and lora_B {has['B'].shape} of a parameter of {root} in {source.path} do not "
            "share a rank; save the adapter again."
        )
    return has["A"], has["B"]


def _assigned(
    source: AdapterSource, root: str, names: list[str], pairs: list[tuple[StoredTensor, StoredTensor]]
) -> tuple[str, ...]:
    """Say which parameter each pair of factors is of: the first assignment, in their order, that fits the base."""
    possible = [chosen for chosen in permutations(names, len(pairs))] if len(names) <= 6 else []
    fitting = [
        chosen
        for chosen in possible
        if all(
            _fits(source.base_tensor(f"{root}.{name}"), *pair)
            for name, pair in zip(chosen, pairs, strict=True)
        )
    ]
    if not fitting:
        raise CheckpointError(
            f"{source.path} adapts {len(pairs)} parameters of {root} with factors that do not fit its "
            f"{' and '.join(names)}: is it the model that the adapter was trained on?"
        )
    return fitting[0]


def _fits(stored: StoredTensor | None, A: StoredTensor, B: StoredTensor) -> bool:
    return stored is None or sorted(stored.shape[-2:]) == sorted((A.row_length, B.rows))


@dataclass(frozen=True)
class _Stack:
    """The factors of one parameter."""

    source: AdapterSource
    root: str
    name: str
    A: StoredTensor
    B: StoredTensor
    scaling: Scaling
    by_expert: bool

    @property
    def module(self) -> str:
        return f"{self.root}.{self.name}"

    def updates(self) -> Iterator[LowRankUpdate]:
        """Those of a parameter that is a matrix, and of experts that are stored one by one."""
        stored = self.source.base_tensor(self.module)
        if stored is not None and len(stored.shape) == 2:
            module = self.root if self.name == "weight" else self.module
            yield LowRankUpdate(module, self.A, self.B, self.scaling.scale(self.root, self.A.rows))
        elif stored is None:
            yield from self._of_separate_experts()

    def formulas(self) -> Iterator[FormulaUpdate]:
        """That of a stack."""
        stored = self.source.base_tensor(self.module)
        is_apart = stored is None and any(True for _ in self._of_separate_experts())
        if not is_apart and (stored is None or len(stored.shape) == 3):
            yield FormulaUpdate(self.module, "LoRA", (self.A, self.B), self._tuned)

    def _tuned(self, weight: Weight) -> Weight:
        if weight.ndim != 3:
            raise ValueError("the factors are of a stack of experts")
        experts = len(weight)
        if self.A.rows % experts:
            raise ValueError(f"the ranks of all experts are {self.A.rows}")
        scale = self.scaling.scale(self.root, self.A.rows // experts)
        A, B = self._of_experts(experts)
        transposed = self._is_transposed(weight.shape[1:])
        tuned = weight.copy()
        for expert in range(experts):
            update = scale * B[expert] @ A[expert]
            tuned[expert] += update.T if transposed else update
        return tuned

    def _of_experts(self, experts: int) -> tuple[Weight, Weight]:
        """A (expert, rank, in) and B (expert, out, rank)."""
        A = wide(self.A).reshape(experts, -1, self.A.row_length)
        B = wide(self.B)
        if self.by_expert:
            return A, B.reshape(len(B), experts, -1).transpose(1, 0, 2)
        return A, B.reshape(len(B), -1, experts).transpose(2, 0, 1)

    def _is_transposed(self, shape: tuple[int, ...]) -> bool:
        """Whether the experts are stored as (BA)ᵀ."""
        sides = self.B.rows, self.A.row_length
        if shape not in (sides, sides[::-1]):
            raise ValueError(f"the factors make {sides} of each expert")
        if sides[0] != sides[1]:
            return shape != sides
        return _before_0_19(self.source.config or {}) or self._model_type() in IN_BY_OUT_TYPES

    def _model_type(self) -> str | None:
        config = (self.source.base.config if self.source.base else None) or {}
        text = config.get("text_config")
        return str((text if isinstance(text, Mapping) else config).get("model_type"))

    def _of_separate_experts(self) -> Iterator[LowRankUpdate]:
        """Updates of the experts of a stack that the base stores one by one, gate and up apart."""
        layer = re.match(r"(?:.*\.)?layers\.\d+\.", self.root)
        found = self._separate(layer[0]) if layer and self.source.base else {}
        experts = 1 + max((expert for expert, _ in found), default=-1)
        shares = SEPARATE.get(self.name, ())
        if not experts or any((expert, share) not in found for expert in range(experts) for share in shares):
            return
        rank, out = self.A.rows // experts, self.B.rows // len(shares)
        scale = self.scaling.scale(self.root, rank)
        for (expert, share), module in found.items():
            at = shares.index(share)
            A = computed(self.A, (rank, self.A.row_length), _part(self, experts, 0, expert, slice(None)))
            B = computed(
                self.B, (out, rank), _part(self, experts, 1, expert, slice(at * out, (at + 1) * out))
            )
            yield LowRankUpdate(module, A, B, scale)

    def _separate(self, layer: str) -> dict[tuple[int, tuple[str, ...]], str]:
        """The base's modules of this layer's experts, by expert and share."""
        found: dict[tuple[int, tuple[str, ...]], str] = {}
        tail = layer.rpartition("layers.")[2]
        for name in self.source.base.tensors if self.source.base else ():
            match = re.search(rf"layers\.{re.escape(tail)}(?:[^.]+\.)*experts\.(\d+)\.([^.]+)\.weight$", name)
            for share in SEPARATE.get(self.name, ()):
                if match and match[2] in share:
                    found[int(match[1]), share] = name.removesuffix(".weight")
        return found


def _part(stack: _Stack, experts: int, factor: int, expert: int, rows: slice) -> Any:
    return lambda: np.ascontiguousarray(stack._of_experts(experts)[factor][expert][rows])


def _before_0_19(config: Mapping[str, Any]) -> bool:
    """Whether the adapter is of a PEFT that took a stack's first side for its inputs, however it lies."""
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    return version is None or (int(version[1]), int(version[2])) < (0, 19)

"""Tensors that hold a matrix for each expert of a layer: which they are, and how their matrices lie.

A stem is a canonical name without ``.weight`` (`names.canonical`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from wdanalysis.checkpoints.architectures import EXPERT_STACKS, FLAT_EXPERTS, FLAT_IN_BY_OUT


@lru_cache(maxsize=65536)
def expert_role(stem: str) -> str | None:
    """The role of the matrices in a stack of experts; None where the name is not that of a stack."""
    return next((role for role, pattern in _STACKS if pattern.search(stem)), None)


@lru_cache(maxsize=65536)
def is_flat_stack(stem: str) -> bool:
    """Whether the rows of the experts follow one another in two dimensions."""
    return bool(re.search(FLAT_EXPERTS, stem))


_STACKS = tuple((role, re.compile(rf"(?:^|\.)(?:{pattern})$")) for role, pattern in EXPERT_STACKS)


@dataclass(frozen=True)
class ExpertStacks:
    """What the shapes of a model's stacks of experts tell.

    Attributes
    ----------
    count
        The number of experts by the router's shape, for stacks of two dimensions; None where there is no router.
    stored_in_by_out
        Modules with experts whose matrices are stored as in × out.
    """

    count: int | None = None
    stored_in_by_out: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> ExpertStacks:
        """Learn it from the shapes of all tensors by stem."""
        stacks: dict[str, dict[str, tuple[int, ...]]] = {}
        for stem, shape in shapes.items():
            if len(shape) == 3 and (role := expert_role(stem)):
                stacks.setdefault(_module(stem), {})[role] = shape[1:]
        in_by_out = {module for module, by_role in stacks.items() if _is_in_by_out(by_role)}
        routers = (shape[0] for stem, shape in shapes.items() if stem.endswith("ffn.router.layer"))
        return cls(next(routers, None), frozenset(in_by_out))

    def in_by_out(self, stem: str) -> bool:
        """Whether the experts' matrices of a stack are stored as in × out."""
        if is_flat_stack(stem):
            return bool(re.search(FLAT_IN_BY_OUT, stem))
        return _module(stem) in self.stored_in_by_out


def _is_in_by_out(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Gate and up are twice as wide as what goes down again, so that their shapes tell how both lie."""
    (rows, columns), (inner, outer) = shapes.get("gate_up", (0, 0)), shapes.get("down", (0, 0))
    return columns > 0 and columns == 2 * inner and rows == outer


def _module(stem: str) -> str:
    return stem.rpartition(".")[0]

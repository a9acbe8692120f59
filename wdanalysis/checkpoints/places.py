"""Where in a model a matrix lies: its layer, its stack of layers, its branch inside the layer; read from its name.

A name is its canonical one without ``.weight`` throughout (`names.canonical`). No two matrices share a place and a role
by accident: where the tables of `architectures` do not tell them apart, what differs in their names does.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from wdanalysis.checkpoints.architectures import BRANCHES, NESTED_LISTS, STACKS


@dataclass(frozen=True)
class Place:
    """A name, taken apart at its layer's number.

    Attributes
    ----------
    lists
        What leads to the layer, without numbers: ``encoder.layers``, ``down_blocks.attentions``.
    numbers
        The layer's number in each of the lists inside one another; empty outside the layers.
    rest
        What follows; the whole name outside the layers.
    """

    lists: str
    numbers: tuple[int, ...]
    rest: str


@lru_cache(maxsize=65536)
def place(name: str) -> Place:
    """Take a name apart.

    >>> place("h.3.attn.q")
    Place(lists='h', numbers=(3,), rest='attn.q')
    >>> place("down_blocks.0.attentions.1.proj_in")
    Place(lists='down_blocks.attentions', numbers=(0, 1), rest='proj_in')
    """
    components = name.split(".")
    at = next((i for i, component in enumerate(components) if component.isdecimal()), None)
    if at is None:
        return Place("", (), name)
    lists, numbers = components[:at], [int(components[at])]
    while len(components) > at + 3 and components[at + 1] in NESTED_LISTS and components[at + 2].isdecimal():
        lists.append(components[at + 1])
        numbers.append(int(components[at + 2]))
        at += 2
    rest = ".".join(components[at + 1 :] or lists) or name
    return Place(".".join(lists), tuple(numbers), rest)


def stack_of(name: str) -> str:
    """The stack of layers that a name tells; empty where it tells none."""
    components = set(name.split("."))
    return next((stack for component, stack in STACKS.items() if component in components), "")


def branch_of(name: str) -> str:
    """The branch inside a layer that a name tells: ``cross``, ``shared`` …; empty where it tells none."""
    return next((branch for branch, pattern in _BRANCHES if pattern.search(name)), "")


_BRANCHES = tuple((branch, re.compile(rf"(?:^|\.)(?:{pattern})(?:\.|$)")) for branch, pattern in BRANCHES)


@dataclass(frozen=True)
class Layers:
    """How a model counts its layers, and what tells those apart that have the same number.

    Attributes
    ----------
    counted
        The layer of each place in lists inside one another, counted through.
    apart
        By a name without numbers, what goes before its module.
    """

    counted: Mapping[tuple[str, tuple[int, ...]], int] = field(default_factory=dict)
    apart: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, modules: Mapping[str, str]) -> Layers:
        """Learn them from all names of a model, each with its module."""
        nested: defaultdict[str, set[tuple[int, ...]]] = defaultdict(set)
        for name in modules:
            if len((found := place(name)).numbers) > 1:
                nested[found.lists].add(found.numbers)
        counted = {
            (lists, numbers): layer
            for lists, all_numbers in nested.items()
            for layer, numbers in enumerate(sorted(all_numbers))
        }
        layers = cls(counted)
        sharing: defaultdict[tuple[str, int | None], set[str]] = defaultdict(set)
        for name, module in modules.items():
            sharing[module, layers.of_name(name)].add(_without_numbers(name))
        groups: defaultdict[str, set[str]] = defaultdict(set)
        for (module, layer), names in sharing.items():
            if layer is not None and len(names) > 1:
                groups[module] |= names
        apart = {name: words for names in groups.values() for name, words in _differences(names).items()}
        return cls(counted, apart)

    def of_name(self, name: str) -> int | None:
        """The layer that a name is in; None outside the layers."""
        found = place(name)
        if not found.numbers:
            return None
        return self.counted.get((found.lists, found.numbers), found.numbers[0])

    def set_apart(self, name: str) -> str:
        """What goes before the module of a name that another one would share; empty where none does."""
        return self.apart.get(_without_numbers(name), "")


def _differences(names: Iterable[str]) -> dict[str, str]:
    """The components of each name that are not in all of them, the role aside."""
    components = {name: name.split(".")[:-1] for name in names}
    common = set.intersection(*map(set, components.values())) | {"#"}
    return {
        name: "_".join(STACKS.get(c, c) for c in parts if c not in common)
        for name, parts in components.items()
    }


def _without_numbers(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", name)

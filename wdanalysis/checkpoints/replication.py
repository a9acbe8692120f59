"""A base of which an adapter repeats layers (`layer_replication`): the same tensors under the layers' new numbers.

``[[0, 4], [2, 5]]`` makes layers 0 1 2 3 2 3 4 of the base's, and the adapter's names count those.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from wdanalysis.checkpoints.tensors import Checkpoint, StoredTensor
from wdanalysis.errors import CheckpointError

LAYER = re.compile(r"(?P<before>(?:.*?\.)?(?:layers|layer|h)\.)(?P<number>\d+)(?P<after>\..+)")
"""A name in the lists of layers that PEFT repeats, whose first number is the layer's."""

MOST_LAYERS = 4096
"""Above which a list of ranges is taken for damage."""


def replicated(base: Checkpoint, tuned: Iterable[Checkpoint]) -> Checkpoint:
    """Return the base with the layers that the adapters among `tuned` repeat; the base itself where none does.

    Raises
    ------
    CheckpointError
        Not all of `tuned` repeat the same layers, or the base does not have them.
    """
    asked = {checkpoint.path: _ranges(checkpoint) for checkpoint in tuned}
    distinct = set(asked.values())
    if distinct <= {()}:
        return base
    if len(distinct) > 1:
        first, *others = ((path, ranges) for path, ranges in asked.items())
        other = next(path for path, ranges in others if ranges != first[1])
        raise CheckpointError(
            f"{first[0]} and {other} do not repeat the same layers of the base (layer_replication); compare each with "
            "it on its own."
        )
    (path, ranges), *_ = asked.items()
    order = [number for start, stop in ranges for number in range(start, stop)]
    tensors: dict[str, StoredTensor] = {}
    layers: dict[int, list[tuple[re.Match[str], StoredTensor]]] = {}
    for name, tensor in base.tensors.items():
        if match := LAYER.fullmatch(name):
            layers.setdefault(int(match["number"]), []).append((match, tensor))
        else:
            tensors[name] = tensor
    if missing := [number for number in order if number not in layers]:
        raise CheckpointError(
            f"{path} repeats layer {missing[0]}, which is not in {base.path}: is it the model that the adapter was "
            "trained on?"
        )
    for number, original in enumerate(order):
        for match, tensor in layers[original]:
            name = f"{match['before']}{number}{match['after']}"
            tensors[name] = replace(tensor, name=name)
    config = None if base.config is None else {**base.config, "num_hidden_layers": len(order)}
    return replace(base, tensors=tensors, config=config)


def _ranges(checkpoint: Checkpoint) -> tuple[tuple[int, int], ...]:
    """The ranges of layers that an adapter's configuration names."""
    given = (checkpoint.config or {}).get("layer_replication") if checkpoint.is_adapter else None
    if not given:
        return ()
    ranges = [tuple(pair) if isinstance(pair, list | tuple) else () for pair in _items(given)]
    if any(
        len(pair) != 2 or not all(isinstance(end, int) for end in pair) or not 0 <= pair[0] < pair[1]
        for pair in ranges
    ) or (sum(stop - start for start, stop in ranges) > MOST_LAYERS):
        raise CheckpointError(
            f"adapter_config.json of {checkpoint.path} has a layer_replication that is no list of ranges of layers; "
            "save the adapter again."
        )
    return tuple((start, stop) for start, stop in ranges)


def _items(given: object) -> list[object]:
    return given if isinstance(given, list) else [given]

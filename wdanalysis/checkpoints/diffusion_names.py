"""An adapter's modules, found in a diffusion model whose names are spelled otherwise.

kohya's dots are underscores, which no rule undoes: ``lora_unet_mid_block_attentions_0_proj_in``. So the base's own
names are flattened and looked up, in the spelling of their authors and in that of diffusers
(`wdanalysis.checkpoints.blocks`).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from wdanalysis.checkpoints.blocks import FOLDERS, component, in_diffusers
from wdanalysis.checkpoints.tensors import Checkpoint, StoredTensor
from wdanalysis.errors import CheckpointError


@dataclass(frozen=True)
class Place:
    """Where a module, or a share of its outputs, is in the base.

    Attributes
    ----------
    module
        The base's name of it.
    tensor
        Its weight.
    rows
        Which of its rows are meant; None for all.
    """

    module: str
    tensor: StoredTensor
    rows: slice | None = None

    @property
    def outputs(self) -> int:
        """How many rows are meant."""
        return self.tensor.rows if self.rows is None else self.rows.stop - self.rows.start


class ModuleNames:
    """The modules of a base by their flat names.

    Parameters
    ----------
    base
        A single file, one component's folder, or a pipeline (`wdanalysis.checkpoints.pipelines`).
    """

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self._places: defaultdict[str, dict[str | None, Place]] = defaultdict(dict)
        folder = FOLDERS.get(base.path.name)
        for name, tensor in base.tensors.items():
            if len(tensor.shape) < 1 or name.endswith(".bias"):
                continue
            module = name.removesuffix(".weight")
            part, rest = component(module)
            part, flat = part or folder, rest.replace(".", "_")
            self._places[_key(flat)][part] = Place(module, tensor)
            self._add_shares(part, module, tensor, in_diffusers(flat))

    def _add_shares(
        self, part: str | None, module: str, tensor: StoredTensor, names: tuple[str, ...]
    ) -> None:
        """Note what diffusers calls a matrix: equal shares of as many outputs as inputs, and the last has the rest."""
        size, start = tensor.row_length, 0
        for index, name in enumerate(names):
            stop = tensor.rows if index == len(names) - 1 else start + size
            rows = None if len(names) == 1 else slice(start, stop)
            if rows is None or start < stop <= tensor.rows:
                self._places[_key(name)].setdefault(part, Place(module, tensor, rows))
            start = stop

    def find(self, module: str) -> tuple[Place, ...]:
        """Find an adapter's module: one place, or one for each matrix that shares its outputs; none if it is not there.

        Raises
        ------
        CheckpointError
            The module may be one of two components.
        """
        part, rest = component(module)
        flat = rest.replace(".", "_")
        if whole := self._one(flat, part, module):
            return (whole,)
        shares = [self._one(name, part, module) for name in in_diffusers(flat)]
        found = tuple(place for place in shares if place is not None)
        return found if len(found) == len(shares) else ()

    def _one(self, flat: str, part: str | None, module: str) -> Place | None:
        places = self._places.get(_key(flat), {})
        if part is not None:
            return places.get(part) or places.get(None)
        if len(places) > 1:
            first, second, *_ = (place.module for place in places.values())
            raise CheckpointError(
                f"{module} could be {first} or {second} of {self._base.path}; "
                "pass the folder of the component that the adapter was trained on."
            )
        return next(iter(places.values()), None)


def _key(flat: str) -> str:
    """A flat name as the table has it: CLIP's text model has its root or not."""
    return flat.removeprefix("text_model_")

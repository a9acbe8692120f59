"""What loaders make of an adapter with magnitudes: the weight that is applied, where that is not the intended one.

The intended weight is m·V/‖V‖ with V = W + ΔW, along the axis of m. Loaders differ in two ways: by which norm they
divide, and along which axis.

=======  =====================  ==============================================================================
loader   axis                   divides by
=======  =====================  ==============================================================================
peft     outputs                ‖V‖
lycoris  inputs                 ‖V‖: LyCORIS until 3.2 and the programs that took its rule, whoever trained m
comfyui  outputs, if m has as   ‖W‖ of the base along the outputs (Comfy-Org/ComfyUI#15458), ‖V‖ along the
         many rows; else        inputs; m of one dimension is spread over columns (#12938)
         inputs
=======  =====================  ==============================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, TypeAlias

import numpy as np

from wdanalysis.checkpoints.adapters.formats import Formula, Weight, wide
from wdanalysis.checkpoints.adapters.kohya import formula_of
from wdanalysis.checkpoints.adapters.lycoris_formulas import Decomposed, Joined, norms, scaled
from wdanalysis.checkpoints.model import Model, describe
from wdanalysis.checkpoints.tensors import Checkpoint, FormulaUpdate, LowRankUpdate, Series, StoredTensor
from wdanalysis.errors import ComparisonError

Loader = Literal["comfyui", "peft", "lycoris"]
Update: TypeAlias = LowRankUpdate | FormulaUpdate


def _peft(base: Weight, v: Weight, magnitude: Weight) -> Weight:
    return scaled(v, magnitude.ravel(), norms(v, "out"), "out")


def _lycoris(base: Weight, v: Weight, magnitude: Weight) -> Weight:
    return scaled(v, magnitude.ravel(), norms(v, "in"), "in")


def _comfyui(base: Weight, v: Weight, magnitude: Weight) -> Weight:
    along_outputs = magnitude.shape[0] == v.shape[0]
    norm = norms(base, "out") if along_outputs else norms(v, "in")
    shape = [1] * v.ndim
    shape[0 if along_outputs else 1] = -1
    norm = norm.reshape(shape)
    try:
        factor = np.zeros(np.broadcast_shapes(magnitude.shape, norm.shape))
        np.divide(magnitude, norm, out=factor, where=norm != 0)
        applied: Weight = v * factor
    except ValueError:
        return base  # it logs the error, and leaves the weight as it is
    return applied if applied.shape == v.shape else base


RULES: Mapping[str, Callable[[Weight, Weight, Weight], Weight]] = MappingProxyType(
    {"comfyui": _comfyui, "peft": _peft, "lycoris": _lycoris}
)
"""The applied weight by loader, of W, V and m as it is stored. ValueError where the loader would fail."""


@dataclass(frozen=True)
class Applied:
    """The weight that a loader makes of a module, out × in.

    Attributes
    ----------
    loader
        Of `RULES`.
    intended
        What it was trained to be.
    """

    loader: Loader
    intended: Decomposed

    def __call__(self, weight: Weight) -> Weight:
        """Return the applied weight; ValueError where the loader would fail."""
        magnitude = wide(self.intended.magnitude)
        if self.intended.rows is not None:
            magnitude = magnitude.reshape(-1, 1)[self.intended.rows]
        return RULES[self.loader](weight, self.intended.direction(weight), magnitude)


def of_loader(formula: Formula, loader: Loader) -> Formula | None:
    """Return an intended weight's formula as a loader has it; None where all loaders have the same."""
    if isinstance(formula, Decomposed):
        return Applied(loader, formula)
    if isinstance(formula, Joined):
        pieces = [(rows, piece, of_loader(piece, loader)) for rows, piece in formula.pieces]
        if any(applied for _, _, applied in pieces):
            return Joined(tuple((rows, applied or piece) for rows, piece, applied in pieces))
    return None


def as_applied(methods: Mapping[str, Series], loader: Loader) -> dict[str, Series]:
    """Return the methods that have magnitudes as a loader applies them, under names that say so.

    Raises
    ------
    ComparisonError
        None has any.
    """
    decomposed = {
        name: series
        for name, series in methods.items()
        if any(_pair(update, loader) for checkpoint in series.checkpoints for update in _updates(checkpoint))
    }
    if not decomposed:
        raise ComparisonError(
            f"none of {', '.join(methods)} is an adapter with magnitudes, which alone loaders apply differently",
            parameter="applied_as",
        )
    found = {}
    for name, series in decomposed.items():
        checkpoints = tuple(_applied(checkpoint, loader) for checkpoint in series.checkpoints)
        if not any(checkpoint.updates or checkpoint.formulas for checkpoint in checkpoints):
            raise ComparisonError(
                f"{loader} can apply the magnitudes of no module of {series.path}: they have not as many numbers as "
                "its vectors",
                parameter="applied_as",
            )
        found[f"{name} as {loader}"] = replace(series, name=f"{name} as {loader}", checkpoints=checkpoints)
    return found


def from_intended(
    base: Checkpoint, name: str, series: Series, loader: Loader
) -> list[tuple[Checkpoint, Series]]:
    """Return for every adapter of a method the intended weights, as a base, and the applied ones, as tuned from it.

    Only the modules with magnitudes are there: all others are applied as they are intended.
    """
    name, model, pairs = f"{name} as {loader}, from intended", describe(base), []
    for checkpoint in series.checkpoints:
        read = checkpoint.on(base)
        intended, actual = {}, {}
        for update in _updates(read):
            tensor = _tensor_of(model, update)
            pair = _pair(update, loader)
            if tensor is not None and pair is not None and _can_apply(update, loader):
                intended[tensor.name], actual[tensor.name] = (formula.of(tensor) for formula in pair)
        if intended:
            tuned = Checkpoint(read.path, read.format, actual, step=read.step, run=read.run, files=read.files)
            pairs.append((replace(base, tensors=intended), replace(series, name=name, checkpoints=(tuned,))))
    return pairs


def _tensor_of(model: Model, update: Update) -> StoredTensor | None:
    if isinstance(update, FormulaUpdate):
        name = model.target_of_formula(update)
        return None if name is None else model.checkpoint.tensors[name]
    target = model.target(update)
    return None if target is None else target.tensor


def _updates(checkpoint: Checkpoint) -> Iterator[Update]:
    yield from checkpoint.updates
    yield from checkpoint.formulas


def _pair(update: Update, loader: Loader) -> tuple[FormulaUpdate, FormulaUpdate] | None:
    """An update as it is intended and as it is applied; None where these are the same."""
    intended = formula_of(update)
    applied = of_loader(intended, loader)
    if applied is None:
        return None
    if isinstance(update, FormulaUpdate):
        return update, replace(update, method=f"{update.method} as {loader} applies it", tuned=applied)
    factors = (update.A, update.B, *([update.magnitude] if update.magnitude else []))
    first, second = (_turned(formula) if update.in_by_out else formula for formula in (intended, applied))
    return (
        FormulaUpdate(update.module, "DoRA", factors, first),
        FormulaUpdate(update.module, f"DoRA as {loader} applies it", factors, second),
    )


def _turned(formula: Formula) -> Formula:
    """The formula for a weight that is stored as in × out."""
    return lambda weight: formula(weight.T).T


def _can_apply(update: Update, loader: Loader) -> bool:
    """Whether the magnitude has as many numbers as the loader takes, as far as the factors tell."""
    if not isinstance(update, LowRankUpdate) or update.magnitude is None or loader == "comfyui":
        return True
    return update.magnitude.size == (update.shape[0] if loader == "peft" else update.A.shape[1])


def _applied(checkpoint: Checkpoint, loader: Loader) -> Checkpoint:
    """Change the updates that have a magnitude, now and where the adapter is read again beside its base."""
    beside = checkpoint.applied_to
    updates = list(_updates(checkpoint))
    applied = [
        (_pair(update, loader) or (update, update))[1] for update in updates if _can_apply(update, loader)
    ]
    left_out = [update.module for update in updates if not _can_apply(update, loader)]
    note = (
        f"{loader} cannot apply the magnitudes of {len(left_out)} modules of {checkpoint.path}, first "
        f"{', '.join(left_out[:1])}, which have not as many numbers as its vectors: left out."
    )
    return replace(
        checkpoint,
        updates=tuple(update for update in applied if isinstance(update, LowRankUpdate)),
        formulas=tuple(update for update in applied if isinstance(update, FormulaUpdate)),
        notes=(*checkpoint.notes, *([note] if left_out else [])),
        applied_to=None if beside is None else lambda base: _applied(beside(base), loader),
    )

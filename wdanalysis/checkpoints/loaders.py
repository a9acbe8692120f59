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
from wdanalysis.checkpoints.adapters.lycoris_formulas import Decomposed, norms, scaled
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
    """The weight that a loader makes of a module.

    Attributes
    ----------
    loader
        Of `RULES`.
    direction
        V, of the base's weight.
    magnitude
        As stored.
    in_by_out
        Whether the base stores the weight as in × out.
    """

    loader: str
    direction: Formula
    magnitude: StoredTensor
    in_by_out: bool = False

    def __call__(self, weight: Weight) -> Weight:
        """Return the applied weight; ValueError where the loader would fail."""
        w = weight.T if self.in_by_out else weight
        applied = RULES[self.loader](w, self.direction(w), wide(self.magnitude))
        if applied.shape != w.shape:
            raise ValueError(f"{self.loader} makes it {applied.shape}")
        return applied.T if self.in_by_out else applied


def as_applied(methods: Mapping[str, Series], loader: Loader) -> dict[str, Series]:
    """Return the methods that have magnitudes as a loader applies them, under names that say so.

    Raises
    ------
    ComparisonError
        None has any.
    """
    decomposed = {name: series for name, series in methods.items() if _has_magnitudes(series)}
    if not decomposed:
        raise ComparisonError(
            f"none of {', '.join(methods)} is an adapter with magnitudes, which alone loaders apply differently",
            parameter="applied_as",
        )
    names = {name: f"{name} as {loader}" for name in decomposed}
    return {
        new: replace(series, name=new, checkpoints=tuple(_applied(c, loader) for c in series.checkpoints))
        for (name, series), new in zip(decomposed.items(), names.values(), strict=True)
    }


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
            if tensor is not None and (both := _both(update, loader)):
                intended[tensor.name], actual[tensor.name] = (formula.of(tensor) for formula in both)
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


def _both(update: Update, loader: Loader) -> tuple[FormulaUpdate, FormulaUpdate] | None:
    """The update as it is intended, and as it is applied: along the outputs peft's rule, else LyCORIS' is intended."""
    if _magnitude(update) is None:
        return None
    tuned = update.tuned if isinstance(update, FormulaUpdate) else formula_of(update)
    assert isinstance(tuned, Decomposed)
    rule: Loader = "peft" if tuned.axis == "out" else "lycoris"
    return _applied_update(update, rule), _applied_update(update, loader)


def _has_magnitudes(series: Series) -> bool:
    return any(
        _magnitude(update) is not None for checkpoint in series.checkpoints for update in _updates(checkpoint)
    )


def _updates(checkpoint: Checkpoint) -> Iterator[Update]:
    yield from checkpoint.updates
    yield from checkpoint.formulas


def _magnitude(update: Update) -> StoredTensor | None:
    if isinstance(update, LowRankUpdate):
        return update.magnitude
    return update.tuned.magnitude if isinstance(update.tuned, Decomposed) else None


def _applied(checkpoint: Checkpoint, loader: Loader) -> Checkpoint:
    """Change the updates that have a magnitude, now and where the adapter is read again beside its base."""
    beside = checkpoint.applied_to
    as_loaded = [
        update if _magnitude(update) is None else _applied_update(update, loader)
        for update in _updates(checkpoint)
    ]
    return replace(
        checkpoint,
        updates=tuple(update for update in as_loaded if isinstance(update, LowRankUpdate)),
        formulas=tuple(update for update in as_loaded if isinstance(update, FormulaUpdate)),
        applied_to=None if beside is None else lambda base: _applied(beside(base), loader),
    )


def _applied_update(update: Update, loader: Loader) -> FormulaUpdate:
    """An update with a magnitude, as a loader applies it."""
    magnitude = _magnitude(update)
    assert magnitude is not None
    if isinstance(update, FormulaUpdate):
        assert isinstance(update.tuned, Decomposed)
        return replace(update, tuned=Applied(loader, update.tuned.direction, magnitude))
    direction = formula_of(replace(update, magnitude=None))
    tuned = Applied(loader, direction, magnitude, in_by_out=update.in_by_out)
    return FormulaUpdate(
        update.module, f"DoRA as {loader} applies it", (update.A, update.B, magnitude), tuned
    )

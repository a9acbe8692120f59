"""Putting adapters into a model, and counting what is then trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import nn

from wdanalysis.checkpoints.names import ModuleSelection, recognise
from wdanalysis.decomposition import Axis
from wdanalysis.errors import TrainingError
from wdanalysis.training.fast import accelerate
from wdanalysis.training.layers import (
    Adapted,
    AdaptedEmbedding,
    Decomposed,
    DecomposedEmbedding,
    LoRAUpdate,
    VeRAProjection,
    VeRAUpdate,
    adapted_modules,
    features,
)
from wdanalysis.training.methods import ADAPTER_METHODS


@dataclass(frozen=True)
class AdapterConfig:
    """Which adapters, and where.

    Attributes
    ----------
    method
        ``lora``, ``dora``, ``vera`` or ``dvora``.
    rank
        r.
    alpha
        α; None for 2·r. VeRA has none.
    dropout
        Probability with which a number of an adapter's input is dropped in training.
    targets
        Where the direction is updated: roles (``q``, ``up``), ``all`` for every matrix in the layers, or regular
        expressions searched in module names. A layer in which several projections are fused is adapted as a whole.
    magnitude_targets
        Where m is trained (§5.6): `targets`, as None means, and others on which only m is.
    axis
        Along which m is: ``"out"``, as in the authors' code, or ``"in"``.
    full_gradient
        Whether gradients pass through ‖V′‖ (Eq. 6) or take it as a constant (Eq. 11).
    seed
        Of the random factors.
    """

    method: str
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | Sequence[str] = ("q", "v")
    magnitude_targets: str | Sequence[str] | None = None
    axis: Axis = "out"
    full_gradient: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in ADAPTER_METHODS:
            raise TrainingError(
                f"'{self.method}' is no method; use one of {', '.join(ADAPTER_METHODS)}.", parameter="method"
            )
        if self.rank < 1:
            raise TrainingError(f"Rank {self.rank} is too small; use 1 or more.", parameter="rank")
        if not 0 <= self.dropout < 1:
            raise TrainingError(f"Dropout {self.dropout:g} is no probability under 1.", parameter="dropout")
        if self.axis not in get_args(Axis):
            raise TrainingError(f"axis is 'out' or 'in', not '{self.axis}'.", parameter="axis")
        if not self.trains_magnitude and (self.magnitude_targets is not None or self.full_gradient):
            raise TrainingError(
                f"'{self.method}' trains no magnitude; leave out magnitude_targets and full_gradient."
            )

    @property
    def trains_magnitude(self) -> bool:
        """Whether the method has an m."""
        return ADAPTER_METHODS[self.method].magnitude

    @property
    def lora_alpha(self) -> float:
        """α, or 2·r where it is not given."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


def inject(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Adapt modules of `model` in place and freeze everything else.

    The model gives the same outputs as before. It may lie on the meta device.

    Parameters
    ----------
    model
        Any; a `transformers` model's configuration helps to tell roles.
    config
        Which adapters, and where.

    Returns
    -------
    list of str
        Names of the adapted modules, in the order of the model.

    Raises
    ------
    TrainingError
        Nothing matches the targets, the rank exceeds a matrix, m is not trained where the direction is, a target
        cannot be adapted, or the model has adapters already.
    """
    if adapted_modules(model):
        raise TrainingError("The model has adapters already; load it anew, or merge them first.")
    layers = adaptable_layers(model)
    directions = _select(model, layers, config.targets)
    magnitudes = _magnitude_targets(model, layers, directions, config)
    make_update = _update_maker([layers[name] for name in directions], config)
    adapted: dict[str, Adapted] = {}
    for name, layer in layers.items():
        if name in directions or name in magnitudes:
            try:
                update = make_update(layer) if name in directions else None
            except TrainingError as error:
                raise TrainingError(
                    f"'{name}' cannot be adapted. {error}", parameter=error.parameter
                ) from None
            adapted[name] = adapt(
                layer, update, name in magnitudes, axis=config.axis, full_gradient=config.full_gradient
            )
    put_in(model, adapted)
    return list(adapted)


def put_in(model: nn.Module, adapted: Mapping[str, Adapted]) -> None:
    """Put adapted modules in the places of their bases, all of them where one is shared; freeze everything else."""
    by_base = {id(module.base): module for module in adapted.values()}
    places = [
        (name, by_base[id(layer)])
        for name, layer in model.named_modules(remove_duplicate=False)
        if id(layer) in by_base
    ]
    model.requires_grad_(False)
    for name, module in places:
        model.set_submodule(name, module)
    accelerate(model)


def adapt(
    layer: nn.Module,
    update: LoRAUpdate | VeRAUpdate | None,
    train_magnitude: bool,
    *,
    axis: Axis = "out",
    full_gradient: bool = False,
) -> Adapted:
    """Wrap one layer in the module that adapts it; see `Adapted` and `Decomposed`."""
    is_embedding = isinstance(layer, nn.Embedding)
    if train_magnitude:
        return (DecomposedEmbedding if is_embedding else Decomposed)(layer, update, axis, full_gradient)
    return (AdaptedEmbedding if is_embedding else Adapted)(layer, update)


def make_lora(
    layer: nn.Module,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> LoRAUpdate:
    """Return a new update for `layer`.

    Raises
    ------
    TrainingError
        The rank is not between 1 and the smaller side of the layer's weight.
    """
    out_features, in_features = features(layer)
    if not 1 <= rank <= min(out_features, in_features):
        raise TrainingError(
            f"Rank {rank} does not fit a weight of {out_features} × {in_features}; "
            f"use one from 1 to {min(out_features, in_features)}.",
            parameter="rank",
        )
    return LoRAUpdate(layer, rank, alpha, dropout, generator)


def make_vera(layer: nn.Module, projection: VeRAProjection, dropout: float = 0.0) -> VeRAUpdate:
    """Return a new update for `layer`.

    Raises
    ------
    TrainingError
        The layer is an embedding, for which VeRA is not defined.
    """
    if isinstance(layer, nn.Embedding):
        raise TrainingError("VeRA adapts no embeddings; leave them out of the targets.", parameter="targets")
    return VeRAUpdate(layer, projection, dropout)


def draw_projection(layers: Sequence[nn.Module], rank: int, seed: int) -> VeRAProjection:
    """Draw the A and B that the updates of `layers` share, as wide as the widest."""
    sizes = [features(layer) for layer in layers]
    widest_out, widest_in = (max(size) for size in zip(*sizes, strict=True))
    weight: Any = layers[0].weight
    return VeRAProjection.draw(widest_in, widest_out, rank, seed, weight.device)


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that can be adapted, by name, each once."""
    never_called = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    return {
        name: layer
        for name, layer in model.named_modules()
        if name
        and (isinstance(layer, nn.Linear | nn.Embedding) or is_conv1d(layer))
        and id(layer) not in never_called
    }


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is `transformers`' Conv1D, GPT-2's linear layer, which stores its weight as in × out."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has.

    Attributes
    ----------
    trainable
        Those that are trained.
    total
        All, adapters with them; VeRA's shared projections, which are no parameters, are not in it.
    """

    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """The trainable in percent of all."""
        return 100 * self.trainable / self.total if self.total else 0.0


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters of a model, shared ones once, quantised ones as what they stand for."""
    sizes = [(_size(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return ParameterCount(
        trainable=sum(size for size, trained in sizes if trained), total=sum(size for size, _ in sizes)
    )


def _size(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()


def _select(model: nn.Module, layers: Mapping[str, nn.Module], targets: str | Sequence[str]) -> list[str]:
    """Return the names of the layers that the targets choose."""
    selection = ModuleSelection.parse(targets)
    named = ModuleSelection(selection.modules, tuple(p for p in selection.patterns if p.pattern))
    all_in_layers = len(named.patterns) < len(selection.patterns)
    config: Any = getattr(model, "config", None)
    shapes = {f"{name}.weight": _stored_shape(layer) for name, layer in layers.items()}
    architecture = recognise(shapes, config.to_dict() if hasattr(config, "to_dict") else None)
    chosen, roles = [], set()
    for name, shape in zip(layers, shapes.values(), strict=True):
        matrix = architecture.matrix(f"{name}.weight", shape)
        modules = [part.module for part in matrix.parts] if matrix else []
        roles.update(modules if matrix and matrix.recognised else [])
        in_layer = matrix is not None and matrix.layer is not None
        if any(named.matches(m, name) for m in (*modules, "")) or (all_in_layers and in_layer):
            chosen.append(name)
    if not chosen:
        wanted = targets if isinstance(targets, str) else ",".join(targets)
        has = f"roles {', '.join(sorted(roles))}" if roles else f"modules such as '{next(iter(layers), '')}'"
        raise TrainingError(
            f"No module matches the targets '{wanted}'; the model has {has}.", parameter="targets"
        )
    return chosen


def _magnitude_targets(
    model: nn.Module, layers: Mapping[str, nn.Module], directions: Sequence[str], config: AdapterConfig
) -> Sequence[str]:
    """Return the names of the layers whose magnitude is trained."""
    if not config.trains_magnitude:
        return ()
    if config.magnitude_targets is None:
        return directions
    magnitudes = _select(model, layers, config.magnitude_targets)
    if missing := [name for name in directions if name not in magnitudes]:
        raise TrainingError(
            f"'{missing[0]}' is in the targets but not in the magnitude targets; "
            f"{config.method} trains the magnitude wherever it trains the direction."
        )
    return magnitudes


def _update_maker(
    layers: Sequence[nn.Module], config: AdapterConfig
) -> Callable[[nn.Module], LoRAUpdate | VeRAUpdate]:
    if ADAPTER_METHODS[config.method].update == "vera":
        projection = draw_projection(layers, config.rank, config.seed)
        return partial(make_vera, projection=projection, dropout=config.dropout)
    generator = torch.Generator().manual_seed(config.seed)
    return partial(
        make_lora, rank=config.rank, alpha=config.lora_alpha, dropout=config.dropout, generator=generator
    )


def _stored_shape(layer: nn.Module) -> tuple[int, int]:
    out_features, in_features = features(layer)
    return (out_features, in_features) if isinstance(layer, nn.Linear) else (in_features, out_features)

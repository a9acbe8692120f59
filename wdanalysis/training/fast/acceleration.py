"""Adapted layers whose forward pass takes fewer operations: their classes are exchanged, and nothing else of them.

A `Decomposed` layer, and one `Adapted` by LoRA's factors beside a W0 of floats, runs as one operation on W0's own bits,
with factors and norms that `Preparation` keeps ready. Others have nothing to gain and stay as they are. Inside
`torch.compile`, which puts plain operations together by itself, all run as they are written.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from wdanalysis.training.fast.functional import (
    Arguments,
    Prepared,
    factored_norm,
    low_rank_linear,
    rescale,
    squared_norms,
    with_gradient,
)
from wdanalysis.training.fast.numerics import root
from wdanalysis.training.fast.preparation import Preparation, Ready, is_ready
from wdanalysis.training.layers import (
    Adapted,
    Decomposed,
    DecomposedEmbedding,
    LoRAUpdate,
    adapted_modules,
)


def accelerate(model: nn.Module) -> None:
    """Let the adapted layers of `model`, or `model` itself where it is one, run in fewer operations.

    The numbers stay the same to rounding, and `restore` undoes it.
    """
    layers = [_exchange(layer) for layer in adapted_modules(model).values() if _gains(layer)]
    if prepared := [layer for layer in layers if isinstance(layer, AcceleratedLinear)]:
        preparation = Preparation(prepared)
        preparation.attach_to(model)
        for layer in prepared:
            layer.preparation = preparation


def restore(model: nn.Module) -> None:
    """Let the adapted layers of `model` run as they are written again."""
    for layer in adapted_modules(model).values():
        if isinstance(layer, _Accelerated):
            if isinstance(layer, AcceleratedLinear):
                layer.preparation.detach()
            layer.__class__ = layer.written  # type: ignore[assignment]
            for name in ("ready", "preparation", "trained_shapes", "_base_squares", "_alike"):
                layer.__dict__.pop(name, None)


def _gains(layer: Adapted) -> bool:
    return type(layer) in ACCELERATED and (
        layer.magnitude is not None
        or (isinstance(layer.update, LoRAUpdate) and layer.weight.is_floating_point())
    )


def _exchange(layer: Adapted) -> Adapted:
    layer.__class__ = ACCELERATED[type(layer)]
    assert isinstance(layer, _Accelerated)
    layer.trained_shapes = [p.shape for p in layer.trained()]
    layer.forget()
    return layer


class _Accelerated(Adapted):
    """A layer that knows ‖w0‖² of each vector, and with it ‖V‖ without V."""

    written: ClassVar[type[Adapted]]
    trained_shapes: list[torch.Size]
    _base_squares: tuple[int, Tensor] | None

    def forget(self, *_: Any) -> None:
        """Make everything anew that was made from the weights."""
        self._base_squares = None

    def base_squared_norms(self) -> Tensor:
        """‖w0‖² of each vector, computed once."""
        weight, squares = self.weight, self._base_squares
        version = 0 if weight.is_inference() else weight._version
        if squares is None or squares[0] != version:
            with torch.no_grad():
                squares = version, squared_norms(self._along_axis(self.base_weight()))
            self._base_squares = squares
        return squares[1]

    def vectors(self, dtype: torch.dtype) -> Tensor:
        """W0 as vectors × length in `dtype`."""
        return self._along_axis(self.base_weight().to(dtype))

    def sides(self) -> tuple[Tensor, Tensor]:
        """G (vectors × r) and F (length × r) with ΔV = G Fᵀ along the axis."""
        assert self.update is not None
        A, B = self.update.factors()
        return (B, A.mT) if self.axis == "out" else (A.mT, B)

    def _along_axis(self, weight: Tensor) -> Tensor:
        return weight if self.axis == "out" else weight.mT

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> _Accelerated:
        self.forget()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)


class AcceleratedEmbedding(_Accelerated, DecomposedEmbedding):
    """A `DecomposedEmbedding` that never makes V."""

    written = DecomposedEmbedding

    def norm(self) -> Tensor:
        """As in `Decomposed`, from the factors."""
        if torch.compiler.is_compiling():
            return super().norm()
        squares = self.base_squared_norms()
        if self.update is None:
            return root(squares)
        return factored_norm(self.vectors(self.base_weight().dtype), squares, *self.sides())


class AcceleratedLinear(_Accelerated):
    """An `Adapted` layer that runs as one operation on what is ready for it.

    Attributes
    ----------
    preparation
        Makes the layers of a model ready together.
    ready
        What the layer runs on, until something shows a change.
    trained_shapes
        Of the parameters, where they are whole.
    """

    written = Adapted
    preparation: Preparation
    ready: Ready | None
    _alike: Hashable

    def forward(self, x: Tensor) -> Tensor:
        """W′x + b, (…, in) → (…, out)."""
        if torch.compiler.is_compiling():
            return super().forward(x)
        if not torch.is_autocast_enabled(x.device.type):
            ready = self.ready
            if ready is not None and ready.arguments and ready.dtype == x.dtype and ready.holds():
                return low_rank_linear(x, *ready.arguments)
        elif self.is_fused:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        dropped = self.dropped(x)
        if self.magnitude is None and dropped is not x:
            y: Tensor = self.base(x) + self.delta(dropped)
            return y
        y = self._tuned(dropped)
        return y if dropped is x else y + self._without_bias(x - dropped)

    @property
    def is_fused(self) -> bool:
        """Whether it runs as one operation on W0's own bits."""
        return isinstance(self.update, LoRAUpdate) and self.weight.is_floating_point()

    @property
    def alike(self) -> Hashable:
        """Equal for layers that can be prepared as one stack."""
        if self._alike is None:
            stacks = self.update is None or self.is_fused
            scale = None if self.update is None else self.update.scale
            kind = (self.stores_in_by_out, tuple(self.trained_shapes), scale, self.axis, self.weight.device)
            self._alike = (type(self), *kind) if stacks else id(self)
        return self._alike

    def plain_arguments(
        self, prepared: Prepared, dtype: torch.dtype, trained: Sequence[nn.Parameter]
    ) -> Arguments | None:
        """What `low_rank_linear` takes after x, where it alone is the forward pass, as things stand."""
        update, weight = self.update, self.weight
        plain = (
            isinstance(update, LoRAUpdate)
            and weight.dtype == dtype
            and not weight.requires_grad
            and (self.axis == "out" or len(trained) == len(update.parts))
            and not self._norm_has_gradient()
            and not (self.training and update.dropout.p > 0)
        )
        if not plain:
            return None
        A, B, *magnitude = trained
        weight = weight.mT if self.stores_in_by_out else weight
        return weight, self.bias, A, B, magnitude[0] if magnitude else None, None, prepared

    def forget(self, *_: Any) -> None:
        """As in `_Accelerated`."""
        super().forget()
        self.ready = self._alike = None

    def train(self, mode: bool = True) -> AcceleratedLinear:
        """Switch the mode; what is ready is made anew."""
        self.ready = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"ready": None}

    def _norm_has_gradient(self) -> bool:
        return isinstance(self, Decomposed) and self.full_gradient and self.update is not None

    def _prepared(self, dtype: torch.dtype) -> tuple[Prepared, Tensor | None]:
        """What is ready for inputs of `dtype`, and ‖V‖ where it belongs to the graph."""
        if not is_ready(self, dtype):
            self.preparation.prepare(self, dtype)
        assert self.ready is not None
        prepared, norm = self.ready.prepared, None
        if self._norm_has_gradient() and prepared.norm is not None:
            norm = with_gradient(prepared.norm, self.vectors(dtype), *self.sides())
        return prepared, norm

    def _tuned(self, x: Tensor) -> Tensor:
        """W′x + b without dropout."""
        ready, norm = self._prepared(x.dtype)
        m, bias, update = self.magnitude, self.bias, self.update
        if m is not None and self.axis == "in":
            x = rescale(x, m, norm, ready)
            ready, m, norm = ready._replace(scale=None), None, None
        if isinstance(update, LoRAUpdate) and self.is_fused and not self.weight.requires_grad:
            bias = None if bias is None else bias.to(x.dtype)
            weight = self.base_weight().to(x.dtype)
            return low_rank_linear(x, weight, bias, update.A, update.B, m, norm, ready)
        y: Tensor = self.base(x)
        if update is not None:
            y = y + update(x)
        return y if m is None else rescale(y, m, norm, ready, bias)

    def _without_bias(self, x: Tensor) -> Tensor:
        """W0 x."""
        if self.weight.is_floating_point():
            return linear(x, self.base_weight())
        y: Tensor = self.base(x)
        return y if self.bias is None else y - self.bias.to(y.dtype)


class AcceleratedDecomposed(AcceleratedLinear, Decomposed):
    """A `Decomposed` layer in the same way."""

    written = Decomposed


ACCELERATED: Mapping[type[Adapted], type[_Accelerated]] = {
    Adapted: AcceleratedLinear,
    Decomposed: AcceleratedDecomposed,
    DecomposedEmbedding: AcceleratedEmbedding,
}
"""What each class of layers is exchanged for; an `AdaptedEmbedding` has nothing to gain."""

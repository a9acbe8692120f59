"""LoRA, DoRA, VeRA and DVoRA as the paper writes them: a frozen layer, a low-rank update and a magnitude.

    LoRA    W' = W0 + s·BA                                  (Eq. 1)
    DoRA    W' = m (W0 + s·BA) / ‖W0 + s·BA‖                (Eq. 5)
    VeRA    ΔW = Λ_b B Λ_d A, with A and B random, frozen and shared (§5.4)
    DVoRA   DoRA with VeRA's update
    a magnitude alone, with no update of the direction (§5.6, Table 6)

What is trained is `update.A` and `update.B` (VeRA: `update.lambda_d`, `update.lambda_b`) and `magnitude`.
With dropout, x̃ = dropout(x), DoRA is the authors' W0 x + (c − 1) W0 x̃ + c·s·BA x̃, here W0 (x − x̃) + c (W0 + s·BA) x̃.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from wdanalysis.decomposition import Axis
from wdanalysis.errors import TrainingError
from wdanalysis.training.fast.functional import (
    Prepared,
    accurate_dtype,
    factored_norm,
    low_rank_linear,
    rescale,
    scale_by_magnitude,
    squared_norms,
    with_gradient,
)
from wdanalysis.training.fast.preparation import Preparation, Ready, is_ready

Arguments = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None, Prepared]

VERA_INITIAL_D = 0.1
"""λ_d at the start (VeRA, arXiv 2310.11454, Table 6c)."""


# --- updates of the direction -------------------------------------------------------------------------------


class LoRAUpdate(nn.Module):
    """ΔW = s·BA with s = α/r (Eq. 1); A is Kaiming-uniform, B zero, so that the update starts at zero.

    Parameters
    ----------
    in_features, out_features
        Of the layer.
    rank
        r.
    alpha
        α.
    dropout
        Probability with which a number of the input is dropped in training.
    generator
        Of the random numbers of A, on the CPU.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.rank, self.scale = rank, alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.A = nn.Parameter(_kaiming_uniform((rank, in_features), math.sqrt(5), device, dtype, generator))
        self.B = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        """s·A (r × in) and B (out × r), whose product is ΔW."""
        return self.scale * self.A, self.B

    def forward(self, x: Tensor) -> Tensor:
        """s·B(A x), (…, in) → (…, out), in the dtype of `x`."""
        A, B = self.factors()
        return linear(linear(x, A.to(x.dtype)), B.to(x.dtype))

    def extra_repr(self) -> str:
        """Rank and scale."""
        return f"rank={self.rank}, scale={self.scale:g}"


class VeRAProjection(nn.Module):
    """The random A (r × widest in) and B (widest out × r) that all of a model's `VeRAUpdate`s share.

    Drawn as PEFT draws them from `projection_prng_key`: Kaiming-uniform from one generator, A before B.
    """

    A: Tensor
    B: Tensor

    def __init__(
        self, in_features: int, out_features: int, rank: int, seed: int, *, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
            matrix = _kaiming_uniform(shape, 0, device, torch.float32, generator)
            self.register_buffer(name, matrix, persistent=False)


class VeRAUpdate(nn.Module):
    """ΔW = Λ_b B Λ_d A (§5.4): only the two vectors are trained; λ_b starts at zero, and so does the update.

    Parameters
    ----------
    in_features, out_features
        Of the layer, which uses so many columns of A and rows of B.
    projection
        A and B, shared.
    dropout
        As in `LoRAUpdate`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        projection: VeRAProjection,
        dropout: float = 0.0,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.rank = projection.A.shape[0]
        self.projection = projection
        self.dropout = nn.Dropout(dropout)
        self.lambda_d = nn.Parameter(torch.full((self.rank,), VERA_INITIAL_D, device=device, dtype=dtype))
        self.lambda_b = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))

    @property
    def scale(self) -> float:
        """1: VeRA has none."""
        return 1.0

    def projections(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The layer's part of the shared A and B."""
        A, B = self.projection.A[:, : self.in_features], self.projection.B[: self.out_features]
        device = self.lambda_d.device
        return A.to(device, dtype), B.to(device, dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Λ_d A (r × in) and Λ_b B (out × r), whose product is ΔW."""
        A, B = self.projections(self.lambda_d.dtype)
        return self.lambda_d[:, None] * A, self.lambda_b[:, None] * B

    def forward(self, x: Tensor) -> Tensor:
        """λ_b ⊙ (B (λ_d ⊙ (A x))), (…, in) → (…, out), in the dtype of `x`."""
        A, B = self.projections(x.dtype)
        return self.lambda_b.to(x.dtype) * linear(self.lambda_d.to(x.dtype) * linear(x, A), B)

    def extra_repr(self) -> str:
        """Rank."""
        return f"rank={self.rank}"


# --- adapted layers -----------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A frozen layer with an update of its direction, a trained magnitude, or both.

    Parameters
    ----------
    base
        The layer; it is frozen.
    update
        ΔW, or ΔV where there is a magnitude; None to train the magnitude alone.
    train_magnitude
        Whether there is an m, which then starts as ‖W0‖.
    axis
        Along which m is: ``"out"``, one number for each output feature, or ``"in"``.
    full_gradient
        Whether gradients pass through ‖V′‖ (Eq. 6) or take it as a constant (Eq. 11).

    Attributes
    ----------
    magnitude
        m, (out,) or (in,), or None.
    """

    stores_in_by_out: ClassVar[bool] = False

    def __init__(
        self,
        base: nn.Module,
        update: LoRAUpdate | VeRAUpdate | None,
        *,
        train_magnitude: bool = False,
        axis: Axis = "out",
        full_gradient: bool = False,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.update = update
        self.axis: Axis = axis
        self.full_gradient = full_gradient and train_magnitude and update is not None
        self.preparation = Preparation([self])
        self.ready: Ready | None = None
        self._base_squares: tuple[int, Tensor] | None = None
        self.magnitude: nn.Parameter | None = None
        if train_magnitude:
            self.magnitude = nn.Parameter(self.base_squared_norms().sqrt())
        self.train(base.training)
        self.trained_shapes = [p.shape for p in self.trained()]
        self._alike: Hashable = None

    # What it is made of.

    @property
    def weight(self) -> Tensor:
        """W0 as stored, for models that look at a layer's weight; see `effective_weight`."""
        return self._modules["base"].weight  # type: ignore[union-attr, return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return getattr(self._modules["base"], "bias", None)

    @property
    def features(self) -> tuple[int, int]:
        """(out, in) of the layer."""
        return features(self.base)

    @property
    def is_fused(self) -> bool:
        """Whether it runs as one operation on W0's own bits."""
        return isinstance(self.update, LoRAUpdate) and self.weight.is_floating_point()

    @property
    def alike(self) -> Hashable:
        """Equal for modules that can be prepared as one stack."""
        if self._alike is None:
            stacks = self.update is None or self.is_fused
            scale = None if self.update is None else self.update.scale
            kind = (type(self), tuple(self.trained_shapes), scale, self.axis, self.weight.device)
            self._alike = kind if stacks else id(self)
        return self._alike

    def plain_arguments(self, prepared: Prepared, dtype: torch.dtype) -> Arguments | None:
        """What `low_rank_linear` takes after x, where it alone is the forward pass, as things stand."""
        return None

    def trained(self) -> tuple[nn.Parameter, ...]:
        """The parameters that are trained; without those that FSDP has taken out."""
        update, magnitude = self._modules.get("update"), self._parameters.get("magnitude")
        of_update = () if update is None else update._parameters.values()
        return (*of_update, *(() if magnitude is None else (magnitude,)))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r × in) and B (out × r) with ΔV = BA."""
        assert self.update is not None
        return self.update.factors()

    def base_weight(self) -> Tensor:
        """W0 as it is stored, but out × in."""
        return self.weight.mT if self.stores_in_by_out else self.weight

    def dequantised_weight(self) -> Tensor:
        """W0 out × in as floats, made anew where the base is quantised."""
        dequantise = DEQUANTISE.get(type(self.base).__name__)
        weight = self.base_weight()
        return weight if dequantise is None or weight.is_floating_point() else dequantise(self.base)

    def vectors(self, dtype: torch.dtype) -> Tensor:
        """W0 as vectors × length in `dtype`."""
        weight = self.dequantised_weight().to(dtype)
        return weight if self.axis == "out" else weight.mT

    def base_squared_norms(self) -> Tensor:
        """‖w0‖² of each vector, computed once."""
        squares, weight = self._base_squares, self.weight
        if torch.compiler.is_compiling():  # which knows no versions
            return self._squared_norms() if squares is None else squares[1]
        version = 0 if weight.is_inference() else weight._version
        if squares is None or squares[0] != version:
            self._base_squares = squares = (version, self._squared_norms())
        return squares[1]

    @torch.no_grad()
    def _squared_norms(self) -> Tensor:
        weight = self.dequantised_weight()
        return squared_norms(weight if self.axis == "out" else weight.mT)

    def effective_weight(self) -> Tensor:
        """W′ of Eq. 1 or 5 in float32 (float64 of a float64 base), in the base's stored orientation."""
        with torch.no_grad():
            weight = self.dequantised_weight()
            weight = weight.to(accurate_dtype(weight.dtype))
            if self.update is not None:
                A, B = (factor.to(weight.dtype) for factor in self.update.factors())
                weight = weight + B @ A
            if self.magnitude is not None:
                dim = 1 if self.axis == "out" else 0
                scale, *_ = scale_by_magnitude(self.magnitude.to(weight.dtype), weight.norm(dim=dim))
                weight = weight * scale.unsqueeze(dim)
        return (weight.mT if self.stores_in_by_out else weight).contiguous()

    def norm(self) -> Tensor:
        """‖V′‖ of each vector; part of the graph with `full_gradient`, else the constant of Eq. 11."""
        if self.update is None:
            return self.base_squared_norms().sqrt()
        vectors = self.vectors(self.dequantised_weight().dtype)
        norm = factored_norm(vectors, self.base_squared_norms(), *self._sides())
        return norm if self.full_gradient else norm.detach()

    def _sides(self) -> tuple[Tensor, Tensor]:
        """G (vectors × r) and F (length × r) with ΔV = G Fᵀ along the axis."""
        A, B = self.factors()
        return (B, A.mT) if self.axis == "out" else (A.mT, B)

    # When what is ready is so no more.

    def train(self, mode: bool = True) -> Adapted:
        """Switch the mode; what is ready is made anew."""
        self.ready = None
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Adapted:
        self.ready = self._base_squares = self._alike = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.ready = self._base_squares = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"ready": None}

    # What all kinds of layer do.

    def _prepared(self, dtype: torch.dtype) -> tuple[Prepared, Tensor | None]:
        """What is ready for inputs of `dtype`, and ‖V′‖ where it belongs to the graph."""
        if not is_ready(self, dtype):
            self.preparation.prepare(self, dtype)
        assert self.ready is not None
        prepared, norm = self.ready.prepared, None
        if self.full_gradient and prepared.norm is not None:
            norm = with_gradient(prepared.norm, self.vectors(dtype), *self._sides())
        return prepared, norm

    def _dropped(self, x: Tensor) -> Tensor:
        """x̃: `x` itself where nothing is dropped."""
        if self.update is None or not self.training or self.update.dropout.p == 0:
            return x
        dropped: Tensor = self.update.dropout(x)
        return dropped

    def extra_repr(self) -> str:
        """Axis of the magnitude, and which gradient."""
        if self.magnitude is None:
            return ""
        return (
            f"magnitude=({self.magnitude.numel()},), axis={self.axis!r}, full_gradient={self.full_gradient}"
        )


class AdaptedLinear(Adapted):
    """An adapted `nn.Linear`, also one of bitsandbytes' 4-bit or 8-bit ones, which are called as they are."""

    def forward(self, x: Tensor) -> Tensor:
        """W′x + b, (…, in) → (…, out)."""
        if not torch.compiler.is_compiling() and not torch.is_autocast_enabled(x.device.type):
            ready = self.ready
            if ready is not None and ready.arguments and ready.dtype == x.dtype and ready.holds():
                return low_rank_linear(x, *ready.arguments)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if self.is_fused and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        dropped = self._dropped(x)
        if self.magnitude is None and self.update is not None and dropped is not x:
            y: Tensor = self.base(x) + self.update(dropped)
            return y
        y = self._written_out(dropped) if torch.compiler.is_compiling() else self._tuned(dropped)
        return y if dropped is x else y + self._without_bias(x - dropped)

    def plain_arguments(self, prepared: Prepared, dtype: torch.dtype) -> Arguments | None:
        """As in `Adapted`."""
        weight, update = self.base_weight(), self.update
        plain = (
            isinstance(update, LoRAUpdate)
            and weight.dtype == dtype
            and not weight.requires_grad
            and not self.full_gradient
            and (self.axis == "out" or self.magnitude is None)
            and not (self.training and update.dropout.p > 0)
        )
        if not plain:
            return None
        A, B, *magnitude = self.trained()
        return weight, self.bias, A, B, magnitude[0] if magnitude else None, None, prepared

    def _tuned(self, x: Tensor) -> Tensor:
        """W′x + b without dropout."""
        ready, norm = self._prepared(x.dtype)
        m, bias = self.magnitude, self.bias
        if m is not None and self.axis == "in":
            x = rescale(x, m, norm, ready)
            ready, m, norm = ready._replace(scale=None), None, None
        weight, update = self.base_weight(), self.update
        if isinstance(update, LoRAUpdate) and self.is_fused and not weight.requires_grad:
            bias = None if bias is None else bias.to(x.dtype)
            return low_rank_linear(x, weight.to(x.dtype), bias, update.A, update.B, m, norm, ready)
        y: Tensor = self.base(x)
        if update is not None:
            y = y + update(x)
        return y if m is None else rescale(y, m, norm, ready, bias)

    def _written_out(self, x: Tensor) -> Tensor:
        """The same as plain operations, for `torch.compile` to put together."""
        y_scale = x_scale = None
        if self.magnitude is not None:
            scale = scale_by_magnitude(self.magnitude, self.norm())[0].to(x.dtype)
            x_scale, y_scale = (scale, None) if self.axis == "in" else (None, scale)
        x = x if x_scale is None else x_scale * x
        y = self._without_bias(x) if self.update is None else self._without_bias(x) + self.update(x)
        y = y if y_scale is None else y_scale * y
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _without_bias(self, x: Tensor) -> Tensor:
        """W0 x."""
        weight = self.base_weight()
        if weight.is_floating_point():
            return linear(x, weight)
        y: Tensor = self.base(x)
        return y if self.bias is None else y - self.bias.to(y.dtype)


class AdaptedConv1D(AdaptedLinear):
    """An adapted `transformers` Conv1D, GPT-2's linear layer, whose weight is stored as in × out."""

    stores_in_by_out = True


class AdaptedEmbedding(Adapted):
    """An adapted `nn.Embedding`: the linear layer of one-hot inputs; an output feature is a dimension, as in PEFT.

    As in loralib and PEFT it is A that starts at zero here, and B that is normal.
    """

    stores_in_by_out = True

    def forward(self, tokens: Tensor) -> Tensor:
        """W′ of each token, (…) → (…, dimension)."""
        y: Tensor = self.base(tokens)
        if self.update is not None:
            y = y + self._update(tokens).to(y.dtype)
        if self.magnitude is None:
            return y
        ready, norm = self._prepared(self.dequantised_weight().dtype)
        if self.axis == "out":
            return rescale(y, self.magnitude, norm, ready)
        scale, *_ = scale_by_magnitude(self.magnitude, self.norm())
        return y * scale[tokens].unsqueeze(-1).to(y.dtype)

    def _update(self, tokens: Tensor) -> Tensor:
        """ΔW of each token, times the factor of embeddings that scale themselves (Gemma)."""
        assert isinstance(self.update, LoRAUpdate)
        A, B = self.update.factors()
        padding = getattr(self.base, "padding_idx", None)
        return linear(embedding(tokens, A.mT, padding), B) * getattr(self.base, "embed_scale", 1.0)


# --- layers of other packages -------------------------------------------------------------------------------


def _dequantise_4bit(layer: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight


def _dequantise_8bit(layer: Any) -> Tensor:
    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    weight: Tensor = layer.weight.data.float() * (scales.float() / 127)[:, None]
    return weight


DEQUANTISE: Mapping[str, Callable[[Any], Tensor]] = {
    "Linear4bit": _dequantise_4bit,
    "Linear8bitLt": _dequantise_8bit,
}
"""How to get W0 (out × in) from bitsandbytes' layers, by the name of their class."""


def adapted_class(layer: nn.Module) -> type[Adapted] | None:
    """Return the class that adapts `layer`; None where there is none."""
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):
        return AdaptedConv1D
    if isinstance(layer, nn.Embedding):
        return AdaptedEmbedding
    if isinstance(layer, NonDynamicallyQuantizableLinear):  # nn.MultiheadAttention does not call it
        return None
    return AdaptedLinear if isinstance(layer, nn.Linear) else None


def features(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a layer that can be adapted."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    in_features, out_features = layer.weight.shape  # type: ignore[misc]
    return out_features, in_features


def make_lora(
    layer: nn.Module,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> LoRAUpdate:
    """Return a new update for `layer`, on its device, in float32 (float64 where the layer is).

    Raises
    ------
    TrainingError
        The rank is not between 1 and the smaller side of the layer's weight.
    """
    out_features, in_features = features(layer)
    if not 1 <= rank <= min(out_features, in_features):
        raise TrainingError(
            f"Rank {rank} does not fit a weight of {out_features} × {in_features}; "
            f"use one from 1 to {min(out_features, in_features)}."
        )
    device, dtype = _place(layer)
    update = LoRAUpdate(
        in_features, out_features, rank, alpha, dropout, device=device, dtype=dtype, generator=generator
    )
    if isinstance(layer, nn.Embedding):
        with torch.no_grad():
            update.A.zero_()
            update.B.copy_(torch.empty(update.B.shape).normal_(generator=generator))
    return update


def make_vera(layer: nn.Module, projection: VeRAProjection, dropout: float = 0.0) -> VeRAUpdate:
    """Return a new update for `layer`, on its device.

    Raises
    ------
    TrainingError
        The layer is an embedding, for which VeRA is not defined.
    """
    if isinstance(layer, nn.Embedding):
        raise TrainingError("VeRA adapts no embeddings; leave them out of the targets.")
    out_features, in_features = features(layer)
    device, dtype = _place(layer)
    return VeRAUpdate(in_features, out_features, projection, dropout, device=device, dtype=dtype)


def _place(layer: nn.Module) -> tuple[torch.device, torch.dtype]:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.device, accurate_dtype(weight.dtype)


def _kaiming_uniform(
    shape: tuple[int, int],
    a: float,
    device: torch.device | None,
    dtype: torch.dtype,
    generator: torch.Generator | None,
) -> Tensor:
    """Drawn on the CPU in float32, so that a seed gives the same numbers on every device."""
    if device is not None and device.type == "meta":
        return torch.empty(shape, device=device, dtype=dtype)
    matrix = torch.empty(shape, dtype=torch.float32, device="cpu")
    nn.init.kaiming_uniform_(matrix, a=a, generator=generator)
    return matrix.to(device=device, dtype=dtype)

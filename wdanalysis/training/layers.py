"""LoRA, DoRA, VeRA and DVoRA as the paper writes them, in plain PyTorch.

    LoRA    W′ = W0 + s·BA                          (Eq. 1)   `Adapted` by a `LoRAUpdate`
    DoRA    W′ = m (W0 + s·BA) / ‖W0 + s·BA‖        (Eq. 5)   `Decomposed`, its direction updated by a `LoRAUpdate`
    VeRA    W′ = W0 + Λ_b B Λ_d A                   (§5.4)    `Adapted` by a `VeRAUpdate`
    DVoRA   DoRA with VeRA's update                 (§5.4)    `Decomposed`, with a `VeRAUpdate`
    m alone, the direction as it was                (§5.6)    `Decomposed`, without an update

W0 is out × in everywhere, also where a layer stores it as in × out (GPT-2's Conv1D, an embedding). What is trained is
`update.A` and `update.B` (VeRA: `update.lambda_d`, `update.lambda_b`) and `magnitude`. `wdanalysis.training.fast` runs
these layers in fewer operations; without it they train the same, only slower.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from wdanalysis.decomposition import Axis

VERA_INITIAL_D = 0.1
"""λ_d at the start (VeRA, arXiv 2310.11454, Table 6c)."""


class LoRAUpdate(nn.Module):
    """ΔW = s·BA with s = α/r (Eq. 1); A is Kaiming-uniform and B zero, so that the update starts at zero.

    In an embedding it is A that starts at zero, and B that is normal, as in loralib and PEFT.

    Parameters
    ----------
    layer
        What is adapted: the factors get its sizes and device, and float32, or float64 where it is.
    rank, alpha
        r and α.
    dropout
        Probability with which a number of the input is dropped in training.
    generator
        Of the random numbers, on the CPU.
    """

    parts = ("A", "B")

    def __init__(
        self,
        layer: nn.Module,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        out_features, in_features = features(layer)
        device, dtype = trained_in(layer)
        self.rank, self.scale = rank, alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.A = nn.Parameter(kaiming_uniform((rank, in_features), math.sqrt(5), generator, device, dtype))
        self.B = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))
        if isinstance(layer, nn.Embedding):
            with torch.no_grad():
                self.A.zero_()
                self.B.copy_(torch.empty(self.B.shape).normal_(generator=generator))

    def factors(self) -> tuple[Tensor, Tensor]:
        """s·A (r × in) and B (out × r), whose product is ΔW."""
        return self.scale * self.A, self.B

    def forward(self, x: Tensor) -> Tensor:
        """s·B(A x), (…, in) → (…, out), in the dtype of `x`."""
        A, B = self.factors()
        return linear(linear(x, A.to(x.dtype)), B.to(x.dtype))


class VeRAProjection(nn.Module):
    """The random A (r × widest in) and B (widest out × r) that all of a model's `VeRAUpdate`s share."""

    A: Tensor
    B: Tensor

    def __init__(self, A: Tensor, B: Tensor, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)

    @classmethod
    def draw(
        cls, in_features: int, out_features: int, rank: int, seed: int, device: torch.device | None = None
    ) -> VeRAProjection:
        """Draw both as PEFT does from `projection_prng_key`: Kaiming-uniform from one generator, A before B."""
        generator = torch.Generator().manual_seed(seed)
        A = kaiming_uniform((rank, in_features), 0, generator, device)
        return cls(A, kaiming_uniform((out_features, rank), 0, generator, device), seed)


class VeRAUpdate(nn.Module):
    """ΔW = Λ_b B Λ_d A (§5.4): only the two vectors are trained; λ_b starts at zero, and so does the update.

    A layer uses so many columns of the shared A and rows of B as it has features. Parameters as in `LoRAUpdate`.
    """

    parts = ("lambda_d", "lambda_b")
    scale = 1.0

    def __init__(self, layer: nn.Module, projection: VeRAProjection, dropout: float = 0.0) -> None:
        super().__init__()
        self.out_features, self.in_features = features(layer)
        self.rank = projection.A.shape[0]
        self.projection = projection
        self.dropout = nn.Dropout(dropout)
        device, dtype = trained_in(layer)
        self.lambda_d = nn.Parameter(torch.full((self.rank,), VERA_INITIAL_D, device=device, dtype=dtype))
        self.lambda_b = nn.Parameter(torch.zeros(self.out_features, device=device, dtype=dtype))

    def projections(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The layer's part of the shared A and B."""
        A, B = self.projection.A[:, : self.in_features], self.projection.B[: self.out_features]
        return A.to(self.lambda_d.device, dtype), B.to(self.lambda_d.device, dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Λ_d A (r × in) and Λ_b B (out × r), whose product is ΔW."""
        A, B = self.projections(self.lambda_d.dtype)
        return self.lambda_d[:, None] * A, self.lambda_b[:, None] * B

    def forward(self, x: Tensor) -> Tensor:
        """λ_b ⊙ (B (λ_d ⊙ (A x))), (…, in) → (…, out), in the dtype of `x`."""
        A, B = self.projections(x.dtype)
        return self.lambda_b.to(x.dtype) * linear(self.lambda_d.to(x.dtype) * linear(x, A), B)


class Adapted(nn.Module):
    """W′ = W0 + ΔW (Eq. 1): a frozen linear layer and its update.

    Parameters
    ----------
    base
        An `nn.Linear`, `transformers`' Conv1D, or a 4-bit or 8-bit layer of bitsandbytes; it is frozen, and called as
        it is.
    update
        ΔW.
    """

    base: Any
    magnitude: nn.Parameter | None
    axis: Axis = "out"

    def __init__(self, base: nn.Module, update: LoRAUpdate | VeRAUpdate | None) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.update = update
        self.register_parameter("magnitude", None)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """(W0 x + b) + ΔW x̃, (…, in) → (…, out), where x̃ is x with dropout."""
        dropped = self.dropped(x)
        y: Tensor = self.base(x)
        return y + self.delta(dropped).to(y.dtype)

    def delta(self, x: Tensor) -> Tensor:
        """ΔW x; 0 where the direction is not updated."""
        return x.new_zeros(()) if self.update is None else self.update(x)

    def dropped(self, x: Tensor) -> Tensor:
        """x̃: `x` itself where nothing is dropped."""
        if self.update is None or not self.training or self.update.dropout.p == 0:
            return x
        return self.update.dropout(x)  # type: ignore[no-any-return]

    def base_weight(self) -> Tensor:
        """W0, out × in, as floats; made anew where the base is quantised."""
        weight = dequantised(self.base)
        return weight.mT if self.stores_in_by_out else weight

    def trained(self) -> tuple[nn.Parameter, ...]:
        """The parameters that are trained; without those that FSDP has taken out."""
        update = self.update
        of_update = () if update is None else [getattr(update, part) for part in update.parts]
        return tuple(p for p in (*of_update, self.magnitude) if isinstance(p, nn.Parameter))

    @property
    def stores_in_by_out(self) -> bool:
        """Whether the base stores W0 as in × out."""
        return not isinstance(self.base, nn.Linear)

    @property
    def weight(self) -> Tensor:
        """W0 as stored, for models that look at a layer's weight."""
        return self.base.weight  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:
        """The base's b."""
        return getattr(self.base, "bias", None)


class Decomposed(Adapted):
    """W′ = m V / ‖V‖ with V = W0 + ΔV (Eq. 5): a frozen linear layer, its update and a magnitude for each vector.

    Parameters
    ----------
    base
        As in `Adapted`.
    update
        ΔV; None to train the magnitude alone (§5.6).
    axis
        Along which m is: ``"out"``, one number for each output feature, or ``"in"``.
    full_gradient
        Whether gradients pass through ‖V‖ (Eq. 6) or take it as a constant (§4.3, Eq. 11).

    Attributes
    ----------
    magnitude
        m, (out,) or (in,); it starts as ‖W0‖.
    """

    magnitude: nn.Parameter

    def __init__(
        self,
        base: nn.Module,
        update: LoRAUpdate | VeRAUpdate | None,
        axis: Axis = "out",
        full_gradient: bool = False,
    ) -> None:
        super().__init__(base, update)
        self.axis, self.full_gradient = axis, full_gradient
        self.magnitude = nn.Parameter(lengths(self.base_weight(), axis))

    def forward(self, x: Tensor) -> Tensor:
        """(W0 x + b) + (c − 1) W0 x̃ + c ΔV x̃, as the authors have it, where c = m/‖V‖ and x̃ is x with dropout.

        Without dropout this is c (W0 + ΔV) x + b. Along the input axis c multiplies x̃ and not what comes of it.
        """
        c, dropped = self.scale(), self.dropped(x)
        if self.axis == "in":
            y: Tensor = self.base((x + (c - 1) * dropped).to(x.dtype))
            return y + self.delta((c * dropped).to(x.dtype)).to(y.dtype)
        y = self.base(x)
        W0x: Tensor = y if dropped is x else self.base(dropped)
        if self.bias is not None:
            W0x = W0x - self.bias
        return (y + (c - 1) * W0x + c * self.delta(dropped)).to(y.dtype)

    def scale(self) -> Tensor:
        """C = m/‖V‖, a number for each vector; 0 where the vector is zero."""
        norm = self.norm() if self.full_gradient else self.norm().detach()
        return self.magnitude / norm.where(norm > 0, torch.inf)

    def norm(self) -> Tensor:
        """‖V‖ of each vector of V = W0 + ΔV, in float32 or more, whatever autocast asks for."""
        with torch.autocast(self.weight.device.type, enabled=False):
            V = self.base_weight().to(self.magnitude.dtype)
            if self.update is not None:
                A, B = self.update.factors()
                V = V + B @ A
            return lengths(V, self.axis)

    def extra_repr(self) -> str:
        """Axis of the magnitude, and which gradient."""
        return (
            f"magnitude=({self.magnitude.numel()},), axis={self.axis!r}, full_gradient={self.full_gradient}"
        )


class AdaptedEmbedding(Adapted):
    """An adapted `nn.Embedding`: the linear layer of one-hot inputs; an output feature is a dimension, as in PEFT."""

    def delta(self, tokens: Tensor) -> Tensor:
        """ΔW of each token, times the factor of embeddings that scale themselves (Gemma)."""
        if self.update is None:
            return self.weight.new_zeros(())
        A, B = self.update.factors()
        return linear(embedding(tokens, A.mT, self.base.padding_idx), B) * getattr(
            self.base, "embed_scale", 1.0
        )

    def dropped(self, tokens: Tensor) -> Tensor:
        """The tokens, of which none is dropped."""
        return tokens


class DecomposedEmbedding(AdaptedEmbedding, Decomposed):
    """A decomposed `nn.Embedding`; along the input axis each token has its magnitude."""

    def forward(self, tokens: Tensor) -> Tensor:
        """C (W0 + ΔV) of each token, (…) → (…, dimension)."""
        c = self.scale() if self.axis == "out" else self.scale()[tokens].unsqueeze(-1)
        y: Tensor = self.base(tokens)
        return (c * (y + self.delta(tokens).to(y.dtype))).to(y.dtype)


def adapted_modules(model: nn.Module) -> dict[str, Adapted]:
    """The adapted modules of a model by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def features(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a layer that can be adapted."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    in_features, out_features = layer.weight.shape  # type: ignore[misc]
    return out_features, in_features


def accurate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, magnitudes and factors beside weights of `dtype`: float32, or float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lengths(matrix: Tensor, axis: Axis) -> Tensor:
    """‖w‖ of each vector of an out × in matrix."""
    dim, dtype = 1 if axis == "out" else 0, accurate_dtype(matrix.dtype)
    return torch.linalg.vector_norm(matrix, dim=dim, dtype=dtype)  # type: ignore[no-any-return]


def dequantised(layer: Any) -> Tensor:
    """A layer's weight as stored, but as floats where bitsandbytes has it in 4 or 8 bits."""
    weight: Tensor = layer.weight
    if weight.is_floating_point():
        return weight
    if type(layer).__name__ == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, layer.weight.quant_state)
    scales: Tensor = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    return weight.data.float() * (scales.float() / 127)[:, None]


def trained_in(layer: Any) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of what is trained beside `layer`."""
    return layer.weight.device, accurate_dtype(layer.weight.dtype)


def kaiming_uniform(
    shape: tuple[int, int],
    a: float,
    generator: torch.Generator | None,
    device: torch.device | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Drawn on the CPU in float32, so that a seed gives the same numbers on every device."""
    if device is not None and device.type == "meta":
        return torch.empty(shape, device=device, dtype=dtype)
    matrix = torch.empty(shape, dtype=torch.float32, device="cpu")
    return nn.init.kaiming_uniform_(matrix, a=a, generator=generator).to(device=device, dtype=dtype)

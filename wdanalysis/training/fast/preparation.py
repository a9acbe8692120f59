"""Factors and norms of all of a model's adapters, made ready together and only when something changed.

A step of a language model is a few hundred products, each so short that launching it costs as much as running it. What
depends on the parameters alone is therefore taken out of the modules' forward passes: modules of one shape are stacked,
so that a whole model takes about one operation a module and a few for each shape.

What is ready stays so as long as nothing shows a change: the parameters' version counters, their identity, a step of
any `torch.optim` optimizer (the fused ones do not count versions), a change of mode, device or dtype, a loaded state.
Beyond that everything is made anew at each forward pass of the model in training, save while gradients are being
accumulated, so that a framework that writes to parameters behind autograd's back (DeepSpeed) gets right norms.
Sharded parameters (FSDP) are whole only while their module runs; such a module is prepared there, alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from wdanalysis.training.fast.functional import (
    Prepared,
    full_precision,
    fused_kernels,
    matmul_float32,
    norms_of_sum,
    scale_by_magnitude,
)

if TYPE_CHECKING:
    from wdanalysis.training.adapters import Adapted

GROUP_BYTES = 256 * 2**20
"""Modules are stacked as long as their products W0 Aᵀ fit in this."""

_optimizer_steps = 0


def _count_optimizer_step(*_: Any) -> None:
    global _optimizer_steps  # noqa: PLW0603
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


class Preparation:
    """Keeps the adapted modules of one model prepared.

    Parameters
    ----------
    modules
        Every `Adapted` of the model, or a single one that stands alone.

    Attributes
    ----------
    round
        Counts up when everything is to be made anew.
    """

    def __init__(self, modules: Iterable[Adapted]) -> None:
        self.modules = list(modules)
        self.round = 0

    def before_forward(self, model: nn.Module, _: Any) -> None:
        """Have everything made anew at the start of a training step; a forward pre-hook of the model."""
        if model.training and not self._is_accumulating():
            self.round += 1

    def prepare(self, wanted: Adapted, dtype: torch.dtype) -> None:
        """Make `wanted` ready for inputs of `dtype`, and with it all others like it that are whole and not ready."""
        groups: defaultdict[Hashable, list[Adapted]] = defaultdict(list)
        stored = wanted.weight.dtype
        for module in self.modules:
            if module is wanted or not (
                module.weight.dtype != stored or is_ready(module, dtype) or is_sharded(module)
            ):
                groups[module.alike].append(module)
        for modules in groups.values():
            size = _group_size(modules[0])
            for start in range(0, len(modules), size):
                self._prepare_alike(modules[start : start + size], dtype)

    @torch.no_grad()
    def _prepare_alike(self, modules: Sequence[Adapted], dtype: torch.dtype) -> None:
        """Prepare modules whose `Adapted.alike` is one."""
        first = modules[0]
        A = B = scales = magnitudes = norms = None
        with full_precision(first.weight.device):
            if first.update is not None:
                A, B = _stacked_factors(modules, dtype)
            if first.magnitude is not None:
                norms = _norms(modules, A, B)
                m = torch.stack([module.magnitude for module in modules if module.magnitude is not None])
                scales, magnitudes, norms = scale_by_magnitude(m.to(norms.dtype), norms)
        if not first.is_fused:
            A = B = None
        s = 1.0 if first.update is None else first.update.scale
        nothing = [None] * len(modules)
        parts = (nothing if stack is None else stack.unbind() for stack in (A, B, scales, magnitudes, norms))
        for module, a, b, *of_magnitude in zip(modules, *parts, strict=True):
            module.__dict__["ready"] = Ready(Prepared(a, b, s, *of_magnitude), module, dtype, self)

    def _is_accumulating(self) -> bool:
        trained = self.modules[0].trained()
        return len(trained) > 0 and all(p.grad is not None for p in trained if p.requires_grad)


class Ready:
    """A module's `Prepared`, and what it was made from.

    Attributes
    ----------
    prepared
        For the functions of `functional`.
    dtype
        Of the products.
    arguments
        All that `low_rank_linear` takes after x, where that alone is the module's forward pass.
    """

    __slots__ = ("_optimizer_steps", "_preparation", "_round", "_sources", "arguments", "dtype", "prepared")

    def __init__(
        self, prepared: Prepared, module: Adapted, dtype: torch.dtype, preparation: Preparation
    ) -> None:
        self.prepared, self.dtype = prepared, dtype
        self.arguments = module.plain_arguments(prepared, dtype)
        self._sources = [(p, p._version) for p in module.trained() if not p.is_inference()]
        self._preparation, self._round = preparation, preparation.round
        self._optimizer_steps = _optimizer_steps

    def holds(self) -> bool:
        """Whether nothing that it was made from is known to have changed."""
        if self._round != self._preparation.round or self._optimizer_steps != _optimizer_steps:
            return False
        for parameter, version in self._sources:  # noqa: SIM110  (twice as fast as all())
            if parameter._version != version:
                return False
        return True


def is_ready(module: Adapted, dtype: torch.dtype) -> bool:
    """Whether `module` can run on what it has."""
    return module.ready is not None and module.ready.dtype == dtype and module.ready.holds()


def is_sharded(module: Adapted) -> bool:
    """Whether a module's parameters are not here as they were made: shards of FSDP's, or views that it empties."""
    here = [p.shape for p in module.trained() if type(p) is nn.Parameter]
    return here != module.trained_shapes


def _stacked_factors(modules: Sequence[Adapted], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """s·A (n, r, in) and B (n, out, r) in the dtype of the products."""
    if not modules[0].is_fused:
        A, B = modules[0].factors()
        return A[None].to(dtype), B[None].to(dtype)
    updates: list[Any] = [module.update for module in modules]
    A = torch.stack([update.A for update in updates]).mul_(updates[0].scale)
    return A.to(dtype), torch.stack([update.B for update in updates]).to(dtype)


def _norms(modules: Sequence[Adapted], A: Tensor | None, B: Tensor | None) -> Tensor:
    """‖V′‖ of each module, (n, vectors)."""
    squares = torch.stack([module.base_squared_norms() for module in modules])
    if A is None or B is None:
        return squares.sqrt()
    G, F = (B, A.mT) if modules[0].axis == "out" else (A.mT, B)
    fused = fused_kernels(F)
    if fused is not None and F.element_size() == 2 and modules[0].weight.dtype == F.dtype:
        matrices = [module.vectors(F.dtype) for module in modules]
        if all(matrix.is_contiguous() for matrix in matrices):
            norms: Tensor = fused.norms_of_sum(matrices, squares, G, F)
            return norms
    product = torch.stack(
        [matmul_float32(module.vectors(F.dtype), f) for module, f in zip(modules, F, strict=True)]
    )
    return norms_of_sum(squares, product, G, F)


def _group_size(module: Adapted) -> int:
    if module.update is None:
        return GROUP_BYTES
    rank, features = module.update.rank, max(module.features)
    return max(1, GROUP_BYTES // (4 * rank * features))

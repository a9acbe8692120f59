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
from collections.abc import Hashable, Sequence
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from wdanalysis.decomposition import Axis
from wdanalysis.training.fast.functional import (
    Arguments,
    Prepared,
    fused_kernels,
    norms_of_sum,
    scale_by_magnitude,
)
from wdanalysis.training.fast.numerics import full_precision, matmul_float32, root
from wdanalysis.training.layers import LoRAUpdate, VeRAUpdate, features

GROUP_BYTES = 256 * 2**20
"""Modules are stacked as long as their products W0 Aᵀ fit in this."""


class Preparable(Protocol):
    """A module that can be prepared: what `Preparation` asks of it.

    Attributes
    ----------
    ready
        What it was given.
    trained_shapes
        Of `trained()`, where those are whole.
    """

    ready: Ready | None
    trained_shapes: list[torch.Size]
    axis: Axis
    base: Any

    @property
    def weight(self) -> Tensor:
        """W0 as stored."""
        ...

    @property
    def update(self) -> LoRAUpdate | VeRAUpdate | None:
        """Of the direction."""
        ...

    @property
    def magnitude(self) -> nn.Parameter | None:
        """M."""
        ...

    @property
    def is_fused(self) -> bool:
        """Whether it needs its factors in the dtype of the products."""
        ...

    @property
    def alike(self) -> Hashable:
        """Equal for modules that can be prepared as one stack."""
        ...

    def trained(self) -> tuple[nn.Parameter, ...]:
        """The parameters that are trained."""
        ...

    def base_squared_norms(self) -> Tensor:
        """‖w0‖² of each vector."""
        ...

    def vectors(self, dtype: torch.dtype) -> Tensor:
        """W0 as vectors × length."""
        ...

    def plain_arguments(
        self, prepared: Prepared, dtype: torch.dtype, trained: Sequence[nn.Parameter]
    ) -> Arguments | None:
        """What `low_rank_linear` takes after x, where it alone is the forward pass."""
        ...


class Preparation:
    """Keeps the adapted modules of one model prepared.

    Parameters
    ----------
    modules
        All of the model.

    Attributes
    ----------
    round
        Counts up when everything is to be made anew.
    """

    def __init__(self, modules: Sequence[Preparable]) -> None:
        self.modules = list(modules)
        self.round = 0
        self._handle: RemovableHandle | None = None

    def attach_to(self, model: nn.Module) -> None:
        """Prepare from now on the modules of `model`."""
        self._handle = model.register_forward_pre_hook(self.before_forward)

    def detach(self) -> None:
        """Let go of the model."""
        if self._handle is not None:
            self._handle.remove()
        optimizer_steps.stop(self)

    def before_forward(self, model: nn.Module, _: Any) -> None:
        """Have everything made anew at the start of a training step; a forward pre-hook of the model."""
        if model.training and not self._is_accumulating():
            self.round += 1

    def prepare(self, wanted: Preparable, dtype: torch.dtype) -> None:
        """Make `wanted` ready for inputs of `dtype`, and with it all others like it that are whole and not ready."""
        optimizer_steps.count_for(self)
        groups: defaultdict[Hashable, list[Preparable]] = defaultdict(list)
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
    def _prepare_alike(self, modules: Sequence[Preparable], dtype: torch.dtype) -> None:
        """Prepare modules whose `Preparable.alike` is one."""
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
            module.ready = Ready(Prepared(a, b, s, *of_magnitude), module, dtype, self)

    def _is_accumulating(self) -> bool:
        trained = self.modules[0].trained()
        return len(trained) > 0 and all(p.grad is not None for p in trained if p.requires_grad)


class OptimizerSteps:
    """Counts the steps of all optimizers, as long as there is a model that wants to know.

    Attributes
    ----------
    count
        Their number.
    """

    def __init__(self) -> None:
        self.count = 0
        self._for: WeakSet[Preparation] = WeakSet()
        self._handle: RemovableHandle | None = None

    def count_for(self, preparation: Preparation) -> None:
        """Count, for one that prepares."""
        self._for.add(preparation)
        if self._handle is None:
            self._handle = register_optimizer_step_post_hook(self._one_more)

    def stop(self, preparation: Preparation) -> None:
        """Stop counting, where it was the last that wants to know."""
        self._for.discard(preparation)
        if self._handle is not None and not self._for:
            self._handle.remove()
            self._handle = None

    def _one_more(self, *_: Any) -> None:
        self.count += 1


optimizer_steps = OptimizerSteps()
"""Of this process; it counts nothing until a model runs accelerated."""


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
        self, prepared: Prepared, module: Preparable, dtype: torch.dtype, preparation: Preparation
    ) -> None:
        self.prepared, self.dtype = prepared, dtype
        trained = module.trained()
        self.arguments = module.plain_arguments(prepared, dtype, trained)
        self._sources = [(p, p._version) for p in trained if not p.is_inference()]
        self._preparation, self._round = preparation, preparation.round
        self._optimizer_steps = optimizer_steps.count

    def holds(self) -> bool:
        """Whether nothing that it was made from is known to have changed."""
        if self._round != self._preparation.round or self._optimizer_steps != optimizer_steps.count:
            return False
        for parameter, version in self._sources:  # noqa: SIM110  (twice as fast as all())
            if parameter._version != version:
                return False
        return True


def is_ready(module: Preparable, dtype: torch.dtype) -> bool:
    """Whether `module` can run on what it has."""
    return module.ready is not None and module.ready.dtype == dtype and module.ready.holds()


def is_sharded(module: Preparable) -> bool:
    """Whether a module's parameters are not here as they were made: shards of FSDP's, or views that it empties."""
    here = [p.shape for p in module.trained() if type(p) is nn.Parameter]
    return here != module.trained_shapes


def _stacked_factors(modules: Sequence[Preparable], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """s·A (n, r, in) and B (n, out, r) in the dtype of the products."""
    first = modules[0].update
    assert first is not None
    if not modules[0].is_fused:
        A, B = first.factors()
        return A[None].to(dtype), B[None].to(dtype)
    updates: list[Any] = [module.update for module in modules]
    A = torch.stack([update.A for update in updates]).mul_(first.scale)
    return A.to(dtype), torch.stack([update.B for update in updates]).to(dtype)


def _norms(modules: Sequence[Preparable], A: Tensor | None, B: Tensor | None) -> Tensor:
    """‖V′‖ of each module, (n, vectors)."""
    squares = torch.stack([module.base_squared_norms() for module in modules])
    if A is None or B is None:
        return root(squares)
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


def _group_size(module: Preparable) -> int:
    if module.update is None:
        return GROUP_BYTES
    widest = max(features(module.base))
    return max(1, GROUP_BYTES // (4 * module.update.rank * widest))

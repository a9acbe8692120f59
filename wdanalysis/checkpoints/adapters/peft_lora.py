"""LoRA and DoRA as PEFT saves them.

Most are W0 + s·BA on the base that is given. Where the initialisation took a part of W0 out of the base that was
trained (PiSSA, OLoRA, KaSA), what the adapter does to W0 is a formula of it: that part is computed again from W0.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TypeAlias

import numpy as np

from wdanalysis.checkpoints.adapters import peft_experts
from wdanalysis.checkpoints.adapters.formats import (
    Adapter,
    AdapterFormat,
    AdapterSource,
    Weight,
    computed,
    on_matrix,
    wide,
)
from wdanalysis.checkpoints.adapters.peft_config import MAGNITUDE_AXES, Scaling, peft_type
from wdanalysis.checkpoints.adapters.peft_keys import FACTOR, Factors, complete, sort_parts, trained_tokens
from wdanalysis.checkpoints.tensors import FormulaUpdate, LowRankUpdate, StoredTensor
from wdanalysis.errors import CheckpointError

Start: TypeAlias = Callable[[Weight, int, float], Weight]
"""From W0 (out × in), the rank and the scale to the base that was trained on, which is not W0."""


def recognises(names: Collection[str]) -> bool:
    """Whether any is a factor of LoRA."""
    return any(FACTOR.fullmatch(name) for name in names)


def read(source: AdapterSource) -> Adapter:
    """Read the updates with the scale of their configuration, or with the α that the user gives."""
    return read_low_rank(source, Scaling.of(source.path, source.config, source.alpha))


def read_low_rank(source: AdapterSource, scaling: Scaling, *, shares_inputs: bool = False) -> Adapter:
    """Read the updates of tensors with LoRA's keys.

    Parameters
    ----------
    source
        The tensors and their configuration.
    scaling
        By module.
    shares_inputs
        Whether A is one matrix for modules of different widths (VeRA).
    """
    path, config = source.path, source.config or {}
    axis = MAGNITUDE_AXES.get(peft_type(config), "out")
    parts = sort_parts(source)
    experts = peft_experts.taken_from(parts, source, scaling)
    for module, factors in parts.modules.items():
        _spread(source, module, factors)
    notes = [*parts.notes, *experts.notes]
    if source.config is not None and source.alpha is not None:
        notes.append(
            f"alpha = {source.alpha:g} was not used, because {path} has its own adapter_config.json."
        )
    transposes = bool(config.get("fan_in_fan_out", False))
    start = STARTS.get(str(config.get("init_lora_weights")).lower())
    updates: list[LowRankUpdate] = [*experts.updates]
    formulas: list[FormulaUpdate] = [*experts.formulas, *trained_tokens(source, parts)]
    for module, factors in complete(
        path, parts, uses_dora=config.get("use_dora"), axis=axis, shares_inputs=shares_inputs
    ):
        has = factors.tensors
        if "A" not in has:
            formulas.append(_magnitude_alone(source, module, has["magnitude"]))
            continue
        update = LowRankUpdate(
            module=module,
            A=has["A"],
            B=has["B"],
            scale=scaling.scale(module, has["A"].shape[0]),
            magnitude=has.get("magnitude"),
            in_by_out=factors.embedding or (transposes and len(has["A"].shape) == 2),
            shared_factor=shares_inputs,
            magnitude_axis=axis,
        )
        if "diag" in has:
            formulas.append(_restarted(source, _scaled_by(update, has["diag"]), without_least))
        elif start is not None and len(update.A.shape) == 2 and not factors.embedding:
            formulas.append(_restarted(source, update, start))
        else:
            updates.append(update)
        formulas.extend(_bias(source, update, has.get("bias")))
    if not updates and not formulas and not parts.replaced:
        raise CheckpointError(
            f"{path} holds no lora_A and lora_B; save the adapter again with `save_pretrained`."
        )
    if start is not None:
        notes.append(
            f"{path} was initialised by {config.get('init_lora_weights')}: what that took out of the base was computed "
            "again, exactly, from the weights of BASE."
        )
    return Adapter(
        tuple(updates),
        parts.replaced,
        tuple([*notes, *scaling.notes(updates)]),
        directions="DoRA" if any(formula.method == "DoRA" for formula in formulas) else "LoRA",
        formulas=tuple(formulas),
    )


def without_greatest(weight: Weight, rank: int, scale: float) -> Weight:
    """PiSSA: W0 without its `rank` greatest singular components, which A and B started as."""
    U, s, Vt = np.linalg.svd(weight, full_matrices=False)
    rest: Weight = weight - (U[:, :rank] * s[:rank]) @ Vt[:rank]
    return rest


def without_first_rows(weight: Weight, rank: int, scale: float) -> Weight:
    """OLoRA: W0 = QR without s times the first `rank` columns of Q and rows of R, which B and A started as."""
    Q, R = np.linalg.qr(weight)
    rest: Weight = weight - scale * Q[:, :rank] @ R[:rank]
    return rest


def without_least(weight: Weight, rank: int, scale: float) -> Weight:
    """KaSA: W0 without its `rank` least singular components."""
    U, s, Vt = np.linalg.svd(weight, full_matrices=False)
    kept = len(s) - rank
    if kept <= 0:
        raise ValueError(f"the rank is {rank}")
    rest: Weight = (U[:, :kept] * s[:kept]) @ Vt[:kept]
    return rest


STARTS: Mapping[str, Start] = MappingProxyType({"pissa": without_greatest, "olora": without_first_rows})
"""What a deterministic value of `init_lora_weights` leaves of W0."""


def _restarted(source: AdapterSource, update: LowRankUpdate, start: Start) -> FormulaUpdate:
    """Return start(W0) + s·BA, with its magnitude where there is one."""

    def tuned(weight: Weight) -> Weight:
        if weight.shape != update.shape:
            raise ValueError(f"the factors make {update.shape}, out × in")
        V = start(weight, update.rank, update.scale) + update.scale * wide(update.B) @ wide(update.A)
        return V if update.magnitude is None else rescaled(V, wide(update.magnitude))

    factors = tuple(tensor for tensor in (update.A, update.B, update.magnitude) if tensor is not None)
    in_by_out = source.in_by_out(update.module, update.shape)
    method = "LoRA" if update.magnitude is None else "DoRA"
    return FormulaUpdate(update.module, method, factors, on_matrix(tuned, in_by_out=in_by_out))


def _magnitude_alone(source: AdapterSource, module: str, magnitude: StoredTensor) -> FormulaUpdate:
    """Return m·W0/‖W0‖: a module of which the magnitudes alone were trained."""
    in_by_out = source.in_by_out(module)
    tuned = on_matrix(lambda weight: rescaled(weight, wide(magnitude)), in_by_out=in_by_out)
    return FormulaUpdate(module, "DoRA", (magnitude,), tuned)


def rescaled(V: Weight, magnitude: Weight) -> Weight:
    """Return m·V/‖V‖ of the rows (Eq. 5); a row of zeros stays one."""
    m, norm = magnitude.reshape(-1), np.sqrt(np.square(V).sum(axis=1))
    if m.shape != norm.shape:
        raise ValueError(f"there are {m.size} magnitudes")
    scaled: Weight = V * np.divide(m, norm, out=np.zeros_like(norm), where=norm != 0)[:, None]
    return scaled


def _bias(source: AdapterSource, update: LowRankUpdate, bias: StoredTensor | None) -> Iterator[FormulaUpdate]:
    """Yield what a bias of lora_B adds to the module's own (`lora_bias`)."""
    module = f"{update.module}.bias"
    if bias is not None and source.base is not None:
        yield FormulaUpdate(module, "LoRA", (bias,), lambda stored: stored + update.scale * wide(bias))


def _scaled_by(update: LowRankUpdate, diagonal: StoredTensor) -> LowRankUpdate:
    """KaSA: B diag(σ) A."""
    if diagonal.shape != (update.rank,):
        raise CheckpointError(
            f"{diagonal.name!r} in {diagonal.path} has the shape {diagonal.shape} for the rank {update.rank}; save the "
            "adapter again."
        )
    A = update.A
    return replace(update, A=computed(A, A.shape, lambda: wide(diagonal)[:, None] * wide(A)))


def _spread(source: AdapterSource, module: str, factors: Factors) -> None:
    """Give a module's factors their full width where less is stored: BD-LoRA's blocks, QALoRA's pooled inputs."""
    config, has = source.config or {}, factors.tensors
    if isinstance(blocks := config.get("use_bdlora"), Mapping):
        for part in ("A", "B"):
            if part in has and any(
                name in module.rpartition(".")[2]
                for name in blocks.get(f"target_modules_bd_{part.lower()}") or ()
            ):
                has[part] = _block_diagonal(has[part], int(blocks.get("nblocks", 1)))
    if config.get("use_qalora") and "A" in has and len(has["A"].shape) == 2:
        A, group = has["A"], int(config.get("qalora_group_size", 16))
        base = source.base_tensor(module)
        if base is None or A.row_length not in (base.rows, base.row_length):
            # x is averaged in groups and multiplied by how many there are
            share = A.row_length / group
            shape = (A.rows, A.row_length * group)
            has["A"] = computed(A, shape, lambda: np.repeat(wide(A), group, axis=1) * share)


def _block_diagonal(stored: StoredTensor, blocks: int) -> StoredTensor:
    if len(stored.shape) != 2 or blocks < 1 or stored.rows % blocks:
        raise CheckpointError(
            f"{stored.name!r} in {stored.path} of shape {stored.shape} is not made of {blocks} blocks, as its "
            "adapter_config.json says; save the adapter again."
        )
    height, width = stored.rows // blocks, stored.row_length

    def numbers() -> Weight:
        full = np.zeros((blocks, height, blocks, width))
        for block, rows in enumerate(wide(stored).reshape(blocks, height, width)):
            full[block, :, block] = rows
        return full

    return computed(stored, (stored.rows, width * blocks), numbers)


FORMAT = AdapterFormat("PEFT", recognises, read, types=("LORA", "DORA", "DORA_IN"))

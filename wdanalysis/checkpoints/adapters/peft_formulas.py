"""PEFT's common methods beside LoRA, each by its own formula: AdaLoRA, LoHa, LoKr, IA³, OFT, trained norms and tokens.

AdaLoRA is low-rank and stays so. Of the others the tuned weight is calculated whole, in float64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TypeAlias

import numpy as np

from wdanalysis.checkpoints.adapters.formats import (
    Adapter,
    AdapterFormat,
    AdapterSource,
    Formula,
    Weight,
    computed,
    on_matrix,
    wide,
)
from wdanalysis.checkpoints.adapters.peft_config import MERGE, Scaling
from wdanalysis.checkpoints.adapters.peft_keys import Parts, factor_pattern, sort_parts, trained_tokens
from wdanalysis.checkpoints.tensors import FormulaUpdate, LowRankUpdate, StoredTensor
from wdanalysis.errors import CheckpointError

Factors: TypeAlias = Mapping[str, StoredTensor]
Updates: TypeAlias = Callable[[AdapterSource, str, Factors], Iterator[LowRankUpdate | FormulaUpdate]]
"""From a module and its factors to what they do to it."""


def _format(method: str, kind: str, prefix: str, parts: str, updates: Updates) -> AdapterFormat:
    """Describe a method of PEFT by the keys of its factors and what they do."""
    pattern = factor_pattern(prefix, parts)

    def recognises(names: Collection[str]) -> bool:
        # The keys of AdaLoRA are LoRA's but for one; those of the others are LyCORIS' but for the prefix.
        own = prefix != "lora_"
        return own and any(name.startswith("base_model.") and pattern.fullmatch(name) for name in names)

    def read(source: AdapterSource) -> Adapter:
        if source.config is None:
            raise CheckpointError(
                f"{source.path} is an adapter of PEFT's {method} without adapter_config.json, which has the numbers "
                "that its factors are to be read with; put it beside them."
            )
        parts = sort_parts(source, pattern)
        if other := next((name for name in parts.replaced if f".{prefix}" in name), None):
            raise CheckpointError(
                f"{source.path} holds {other!r}, which is no part of PEFT's {method} as it is known here (older "
                f"versions saved it otherwise); {MERGE}."
            )
        try:
            return _adapter(source, method, parts, updates)
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"adapter_config.json of {source.path} has a setting of {method} that is no number ({error}); save the "
                "adapter again with `save_pretrained`."
            ) from error

    return AdapterFormat("PEFT", recognises, read, types=(kind,))


def _adapter(source: AdapterSource, method: str, parts: Parts, updates: Updates) -> Adapter:
    found = [
        update
        for module, factors in parts.modules.items()
        for update in updates(source, module, factors.tensors)
    ]
    low_rank = tuple(update for update in found if isinstance(update, LowRankUpdate))
    formulas = [update for update in found if isinstance(update, FormulaUpdate)]
    formulas.extend(trained_tokens(source, parts))
    if not low_rank and not formulas and not parts.replaced:
        raise CheckpointError(f"{source.path} holds no factor of {method}; save the adapter again.")
    return Adapter(low_rank, parts.replaced, tuple(parts.notes), method, formulas=tuple(formulas))


# --- AdaLoRA: W0 + B (A ∘ E)·α/(r + 1e-5) with the rank r that training began with ---------------------------


def _adalora(source: AdapterSource, module: str, has: Factors) -> Iterator[LowRankUpdate]:
    A, B, E = (_needed(source, module, has, f"lora_{part}", part) for part in "ABE")
    rank = A.shape[0]
    if len(A.shape) < 2 or len(B.shape) < 2 or B.shape[1] != rank or E.size != rank:
        raise _unfitting(source, module, A, B, E)
    if rank == 0:  # its whole budget went to other modules
        return
    alpha, initial = _number(source, "lora_alpha"), _number(source, "init_r")
    scale = (alpha if alpha > 0 else initial) / (initial + 1e-5)
    scaled = computed(A, A.shape, lambda: wide(A) * wide(E).reshape(-1, *[1] * (len(A.shape) - 1)))
    shape = (B.shape[0], A.row_length)
    yield LowRankUpdate(module, scaled, B, scale, in_by_out=source.in_by_out(module, shape))


# --- LoHa: W0 + (α/r)·(w1a w1b) ∘ (w2a w2b) --------------------------------------------------------------------


def _loha(source: AdapterSource, module: str, has: Factors) -> Iterator[FormulaUpdate]:
    w1a, w1b, w2a, w2b = (
        _needed(source, module, has, f"hada_{part}", part) for part in ("w1_a", "w1_b", "w2_a", "w2_b")
    )
    scale = _scale(source, module)

    def update() -> Weight:
        return scale * _product(has.get("t1"), w1a, w1b) * _product(has.get("t2"), w2a, w2b)

    yield FormulaUpdate(module, "LoHa", tuple(has.values()), _added(update))


def _product(core: StoredTensor | None, a: StoredTensor, b: StoredTensor) -> Weight:
    """Return a·b, or with a core (Tucker's form, of a convolution) Σ core_ijkl a_ip b_jr."""
    if core is None:
        return wide(a) @ wide(b)
    product: Weight = np.einsum("ijkl,ip,jr->prkl", wide(core), wide(a), wide(b), optimize=True)
    return product


# --- LoKr: W0 + (α/r)·w1 ⊗ w2, either of which may be a product --------------------------------------------------


def _lokr(source: AdapterSource, module: str, has: Factors) -> Iterator[FormulaUpdate]:
    for side in ("w1", "w2"):
        if side not in has:
            for part in (f"{side}_a", f"{side}_b"):
                _needed(source, module, has, f"lokr_{part}", part)
    scale = _scale(source, module)

    def update() -> Weight:
        w1 = wide(has["w1"]) if "w1" in has else _product(None, has["w1_a"], has["w1_b"])
        w2 = wide(has["w2"]) if "w2" in has else _product(has.get("t2"), has["w2_a"], has["w2_b"])
        if w1.ndim != 2 or w2.ndim < 2:
            raise ValueError(f"the factors are {w1.shape} and {w2.shape}")
        # Of a kernel of one dimension PEFT takes w1 ⊗ w2 over the last two, and so do we.
        return np.asarray(scale * np.kron(w1[:, :, None, None] if w2.ndim == 4 else w1, w2), dtype=np.float64)

    yield FormulaUpdate(module, "LoKr", tuple(has.values()), _added(update))


def _added(update: Callable[[], Weight]) -> Formula:
    """Return W0 + update, of as many elements and laid out as W0 is."""

    def tuned(weight: Weight) -> Weight:
        added = update()
        if added.size != weight.size or (added.ndim == 2 and len(added) != len(weight)):
            raise ValueError(f"the update is {added.shape}")
        return weight + added.reshape(weight.shape)

    return tuned


# --- IA³: rows, or in feedforward modules columns, of W0 times l --------------------------------------------------


def _ia3(source: AdapterSource, module: str, has: Factors) -> Iterator[FormulaUpdate]:
    vector = _needed(source, module, has, "ia3_l", "l")
    scales_inputs = _is_feedforward(source, module)

    def tuned(weight: Weight) -> Weight:
        scale = wide(vector).reshape(-1)
        if weight.ndim < 2:
            raise ValueError("it is no matrix")
        places = weight.ndim > 2  # a convolution scales its input channels, whatever its kernel is
        matrix = weight.reshape(*weight.shape[:2], -1) if places else weight[:, :, None]
        if scale.size != matrix.shape[1 if scales_inputs else 0]:
            raise ValueError(f"there are {scale.size} numbers for {'inputs' if scales_inputs else 'outputs'}")
        return (matrix * (scale[None, :, None] if scales_inputs else scale[:, None, None])).reshape(
            weight.shape
        )

    tensor = source.base_tensor(module)
    in_by_out = (tensor is None or len(tensor.shape) == 2) and source.in_by_out(module)
    turned: Formula = (lambda weight: tuned(weight.T).T) if in_by_out else tuned
    yield FormulaUpdate(module, "IA³", (vector,), turned)
    if not scales_inputs and source.base_tensor(f"{module}.bias") is not None:
        scaled = _times(vector)
        yield FormulaUpdate(f"{module}.bias", "IA³", (vector,), scaled)


def _times(vector: StoredTensor) -> Formula:
    def tuned(bias: Weight) -> Weight:
        scale = wide(vector).reshape(-1)
        if scale.shape != bias.shape:
            raise ValueError(f"there are {scale.size} numbers")
        return bias * scale

    return tuned


def _is_feedforward(source: AdapterSource, module: str) -> bool:
    names = (source.config or {}).get("feedforward_modules") or ()
    if isinstance(names, str):
        try:
            return re.fullmatch(names, module) is not None
        except re.error as error:
            raise CheckpointError(
                f"adapter_config.json of {source.path} has feedforward_modules that are no regular expression "
                f"({error}); correct them."
            ) from error
    return any(module.endswith(str(name)) for name in names)


# --- OFT: W0 Rᵀ with R block-diagonal, each block the Cayley transform of a skew-symmetric matrix -----------------


def _oft(source: AdapterSource, module: str, has: Factors) -> Iterator[FormulaUpdate]:
    part = "embedding_R" if "embedding_R" in has else "R"
    angles = _needed(source, module, has, f"oft_{part}", part)
    settings = source.config or {}
    terms = (
        int(settings.get("num_cayley_neumann_terms", 5)) if settings.get("use_cayley_neumann", True) else None
    )
    epsilon = float(settings.get("eps", 6e-5)) if settings.get("coft") else None
    shares_block = bool(settings.get("block_share"))

    def turned(weight: Weight, rule: str) -> Weight:
        blocks = _rotations(wide(angles), terms, epsilon)
        if shares_block:
            blocks = np.broadcast_to(blocks[:1], (weight.shape[1] // blocks.shape[1], *blocks.shape[1:]))
        count, size = blocks.shape[:2]
        if count * size != weight.shape[1]:
            raise ValueError(f"the blocks turn {count * size} features")
        product: Weight = np.einsum(rule, weight.reshape(-1, count, size), blocks, optimize=True)
        return product.reshape(weight.shape)

    # The inputs of a matrix are turned, W0 Rᵀ; of an embedding the vectors that it gives, its rows: E R.
    rule = "oki,kij->okj" if part == "embedding_R" else "oki,kji->okj"
    yield FormulaUpdate(
        module, "OFT", (angles,), on_matrix(lambda weight: turned(weight, rule), in_by_out=False)
    )


def _rotations(angles: Weight, terms: int | None, epsilon: float | None) -> Weight:
    """Return a rotation (blocks × size × size) for each row of angles, the upper triangle of a skew-symmetric Q.

    R = (I − Q)(I + Q)⁻¹ for `terms` None; otherwise what PEFT trains with by default, the first terms of its Neumann
    series, I + 2Q + 2Q² + … + Qⁿ, which have the other sign. `epsilon` bounds ‖Q‖ (COFT).
    """
    size = round((1 + math.sqrt(1 + 8 * angles.shape[1])) / 2) if angles.ndim == 2 else 0
    if size * (size - 1) // 2 != (angles.shape[1] if angles.ndim == 2 else -1):
        raise ValueError(f"the angles are {angles.shape}")
    Q = np.zeros((len(angles), size, size))
    rows, columns = np.triu_indices(size, 1)
    Q[:, rows, columns] = angles
    Q -= Q.transpose(0, 2, 1)
    if epsilon is not None:
        bound, norm = epsilon / math.sqrt(len(Q)), np.sqrt(np.square(Q).sum(axis=(1, 2)))
        Q *= np.divide(bound, norm, out=np.ones_like(norm), where=norm > bound)[:, None, None]
    identity = np.broadcast_to(np.eye(size), Q.shape)
    if terms is None:
        transposed = np.linalg.solve(identity - Q, identity + Q)  # Qᵀ is −Q
        return np.asarray(transposed.transpose(0, 2, 1), dtype=np.float64)
    R, power = identity.copy(), identity
    last = max(terms - 1, 3) if terms > 2 else terms - 1  # PEFT's series of three terms is that of four
    for exponent in range(1, last + 1):
        power = power @ Q
        R += power if exponent == last > 1 else 2 * power
    return R


# --- What replaces the base's own tensors ------------------------------------------------------------------------


def _norms(source: AdapterSource) -> Adapter:
    """Layer norms trained whole (LN tuning)."""
    parts = sort_parts(source, _NORM)
    for module, factors in parts.modules.items():
        for part, tensor in factors.tensors.items():
            parts.replaced[f"{module}.{'bias' if part == 'bias' else 'weight'}"] = tensor
    parts.modules.clear()
    return _adapter(source, "LN tuning", parts, _nothing)


def _tokens(source: AdapterSource) -> Adapter:
    """Single rows of an embedding."""
    return _adapter(source, "trained tokens", sort_parts(source, _NEVER), _nothing)


def _nothing(source: AdapterSource, module: str, has: Factors) -> Iterator[FormulaUpdate]:
    yield from ()


_NORM, _NEVER = factor_pattern("ln_tuning_", "layers"), re.compile(r"(?!)")


# --- Checks ------------------------------------------------------------------------------------------------------


def _needed(source: AdapterSource, module: str, has: Factors, name: str, part: str) -> StoredTensor:
    if part not in has:
        raise CheckpointError(f"{source.path} has no {name} for {module}; save the adapter again.")
    if 0 in has[part].shape and not name.startswith("lora_"):
        raise _unfitting(source, module, has[part])
    return has[part]


def _unfitting(source: AdapterSource, module: str, *factors: StoredTensor) -> CheckpointError:
    shapes = ", ".join(f"{factor.name.rpartition(module + '.')[2]} {factor.shape}" for factor in factors)
    return CheckpointError(
        f"{shapes} of {module} in {source.path} do not make an update of one weight; save the adapter again."
    )


def _number(source: AdapterSource, key: str) -> float:
    value = (source.config or {}).get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(
            f"adapter_config.json of {source.path} does not give {key} as a number; save the adapter again with "
            "`save_pretrained`."
        )
    return value


def _scale(source: AdapterSource, module: str) -> float:
    """α/r by the configuration, whose rank may be less than that of the factors' products."""
    scaling = Scaling.from_config(source.path, source.config or {}, key="alpha")
    rank = scaling.rank(module)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise CheckpointError(
            f"adapter_config.json of {source.path} does not give r as a number; save the adapter again with "
            "`save_pretrained`."
        )
    return scaling.scale(module, rank)


FORMATS = (
    _format("AdaLoRA", "ADALORA", "lora_", "[ABE]", _adalora),
    _format("LoHa", "LOHA", "hada_", "w[12]_[ab]|t[12]", _loha),
    _format("LoKr", "LOKR", "lokr_", "w[12](?:_[ab])?|t2", _lokr),
    _format("IA³", "IA3", "ia3_", "l", _ia3),
    _format("OFT", "OFT", "oft_", "(?:embedding_)?R", _oft),
    AdapterFormat("PEFT", lambda names: False, _norms, types=("LN_TUNING",)),
    AdapterFormat("PEFT", lambda names: False, _tokens, types=("TRAINABLE_TOKENS",)),
)

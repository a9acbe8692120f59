"""Adapters of diffusion models: kohya's sd-scripts, LyCORIS, diffusers in its three spellings, ai-toolkit, OneTrainer.

A key is a module and a part. `PARTS` has the spellings of the parts; where the module is in the base,
`wdanalysis.checkpoints.diffusion_names` finds. LoRA stays factored, all else is a formula
(`wdanalysis.checkpoints.adapters.lycoris_formulas`).
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from wdanalysis.checkpoints.adapters.formats import (
    WITH_MAGNITUDE,
    Adapter,
    AdapterFormat,
    AdapterSource,
    Formula,
    Weight,
    computed,
    wide,
)
from wdanalysis.checkpoints.adapters.lycoris_formulas import (
    ALGORITHMS,
    Added,
    Algorithm,
    Decomposed,
    Joined,
    matrix,
    of_rows,
    tucker,
)
from wdanalysis.checkpoints.adapters.peft_config import Scaling
from wdanalysis.checkpoints.diffusion_names import ModuleNames, Place
from wdanalysis.checkpoints.dtypes import STORED_TYPES, widen
from wdanalysis.checkpoints.tensors import FormulaUpdate, LowRankUpdate, StoredTensor
from wdanalysis.decomposition import Axis
from wdanalysis.errors import CheckpointError

SHAPED, WRITERS = "dora_scale", "magnitude"
"""A magnitude whose shape tells its axis (LyCORIS, OneTrainer, kohya), and one of a writer whose axis is ``out``."""

_UP, _DOWN = (
    r"(?:lora_up|lora_B|lora\.up|lora_linear_layer\.up)",
    r"(?:lora_down|lora_A|lora\.down|lora_linear_layer\.down)",
)
_END = r"(?:\.default)?(?:\.weight)?"

PARTS: tuple[tuple[str, str], ...] = (
    (rf"\.{_UP}{_END}", "up"),
    (rf"\.{_DOWN}{_END}", "down"),
    (r"\.lora_mid\.weight", "mid"),
    (r"\.alpha", "alpha"),
    (r"\.dora_scale", SHAPED),
    (
        rf"\.(?:lora_magnitude_vector|magnitude|weight_m_wdecomp|lora_magnitude|weight_magnitude){_END}",
        WRITERS,
    ),
    (r"\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t[12]))", r"\1"),
    (r"\.(oft_blocks|rescale|diff|diff_b|w_norm|b_norm|on_input|(?:a1|a2|b1|b2|bm)\.weight|weight)", r"\1"),
)
"""How keys end, and the part that this means."""

OLD = re.compile(
    r"(?P<module>.+?)(?P<processor>\.processor)?\.to_(?P<role>q|k|v|out)_lora\.(?P<side>up|down)\.weight"
)
"""diffusers until 0.20: the factors of an attention block beside its matrices and not below them."""

MINE = re.compile(
    r".+\.(?:lora_(?:up|down|mid)\.weight|lora\.(?:up|down)\.weight|lora_linear_layer\.(?:up|down)\.weight|dora_scale"
    r"|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?|oft_blocks|on_input|to_(?:q|k|v|out)_lora\.(?:up|down)\.weight)"
    r"|(?:lycoris|lora_unet|lora_te\d?|lora_transformer)_.+\.(?:diff|diff_b|w_norm|b_norm|a1\.weight)"
)
"""Keys that no other format has."""

DIFFUSERS = re.compile(
    r"(?:(?:unet|text_encoder(?:_\d)?|diffusion_model|transformer_2)\."
    r"|(?:.+\.)?(?:(?:single_)?transformer_blocks|(?:down|up|double|single|joint)_blocks)\.\d"
    r"|transformer\.blocks\.\d+\.(?:attn[12]|ffn|self_attn|cross_attn)\.).*\.lora_[AB]\b.*"
)
"""Keys of LoRA in PEFT's spelling with the names of diffusion models."""

METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers keeps the adapter's configuration in safetensors' metadata."""


def recognises(names: Collection[str]) -> bool:
    """Whether an adapter's keys are those of a diffusion model's, and not as PEFT itself saves them."""
    if any("base_model.model." in name for name in names):
        return False
    return any(MINE.fullmatch(name) or DIFFUSERS.fullmatch(name) for name in names)


def read(source: AdapterSource) -> Adapter:
    """Read the updates, under the base's own names where the base is known."""
    modules, scales, notes = _modules(source), _Scales.of(source), []
    names = None if source.base is None else ModuleNames(source.base)
    read_modules = [one for module in modules.values() for one in _tuned(source, module, scales, names)]
    if not read_modules:
        raise CheckpointError(f"{source.path} holds no module that is whole; save the adapter again.")
    if scales.assumed:
        notes.append(
            f"{source.path} tells no alpha for {scales.assumed} modules: their scale is 1 (alpha = rank), as all "
            "loaders take it."
        )
    placed = read_modules if names is None else _placed(source, read_modules, names)
    return Adapter(
        updates=tuple(one.update for one in placed if isinstance(one.update, LowRankUpdate)),
        tensors={},
        notes=tuple(notes),
        directions=_method(read_modules),
        format=_format(modules),
        formulas=tuple(one.update for one in placed if isinstance(one.update, FormulaUpdate)),
    )


# --- keys ---------------------------------------------------------------------------------------------------


@dataclass
class _Module:
    """The tensors of one module by their parts."""

    name: str
    parts: dict[str, StoredTensor] = field(default_factory=dict)


def split_key(key: str) -> tuple[str, str] | None:
    """Split a key into module and part; None where it is no part of an adapter.

    >>> split_key("lora_unet_mid_block_attentions_0_proj_in.lora_up.weight")
    ('lora_unet_mid_block_attentions_0_proj_in', 'up')
    >>> split_key("unet.mid_block.attn1.processor.to_out_lora.down.weight")
    ('unet.mid_block.attn1.to_out.0', 'down')
    """
    if old := OLD.fullmatch(key):
        role = old["role"]
        if old["processor"]:
            return f"{old['module']}.to_{role}{'.0' if role == 'out' else ''}", old["side"]
        return f"{old['module']}.{role}_proj", old["side"]
    for ending, part in PARTS:
        if match := re.fullmatch(rf"(?P<module>.+?){ending}", key):
            return match["module"], part.replace(r"\1", match[2] if r"\1" in part else "")
    return None


def _modules(source: AdapterSource) -> dict[str, _Module]:
    modules: dict[str, _Module] = {}
    unknown = []
    for key, tensor in source.tensors.items():
        if (split := split_key(key)) is None:
            unknown.append(key)
            continue
        name, part = split
        module = modules.setdefault(name, _Module(name))
        if part in module.parts:
            raise CheckpointError(
                f"{source.path} holds the part {part!r} of {name} twice; save the adapter again."
            )
        if part not in ("alpha", "on_input"):
            _check(source.path, tensor)
        module.parts[part] = tensor
    if unknown:
        raise CheckpointError(
            f"{source.path} holds {unknown[0]!r} ({len(unknown)} such), which is no part of LoRA, LoHa, LoKr, GLoRA, "
            "OFT, IA³ or a difference; merge the adapter into its base with the program that trained it."
        )
    return modules


def _check(path: Path, tensor: StoredTensor) -> None:
    if not tensor.is_float:
        raise CheckpointError(
            f"{tensor.name!r} in {path} is stored as {tensor.dtype}; save the adapter in a float dtype of 16 bits or "
            "more."
        )
    if 0 in tensor.shape:
        raise CheckpointError(
            f"{tensor.name!r} in {path} has the shape {tensor.shape}; save the adapter again."
        )


def _number(path: Path, tensor: StoredTensor) -> float:
    """Read a tensor of one number, of any dtype."""
    numpy_name = STORED_TYPES[tensor.dtype].torch if tensor.dtype in STORED_TYPES else None
    if tensor.size != 1 or not (tensor.is_float or numpy_name):
        raise CheckpointError(
            f"{tensor.name!r} in {path} is {tensor.dtype} of shape {tensor.shape}, and no number; save the "
            "adapter again."
        )
    value = widen(tensor.read()) if tensor.is_float else tensor.read_bytes().view(np.dtype(numpy_name))
    number = float(value.ravel()[0])
    if not np.isfinite(number):
        raise CheckpointError(f"{tensor.name!r} in {path} is {number}; save the adapter again.")
    return number


# --- scales -------------------------------------------------------------------------------------------------


@dataclass
class _Scales:
    """α by module: in the file, in diffusers' metadata, from the user, or else the rank."""

    source: AdapterSource
    configs: Mapping[str, Scaling]
    assumed: int = 0

    @classmethod
    def of(cls, source: AdapterSource) -> _Scales:
        try:
            written = json.loads(source.metadata.get(METADATA_KEY) or "{}")
        except ValueError as error:
            raise CheckpointError(
                f"{METADATA_KEY} in the metadata of {source.path} is not JSON; save the adapter again."
            ) from error
        settings: dict[str, dict[str, Any]] = defaultdict(dict)
        for key, value in written.items() if isinstance(written, dict) else ():
            begin, _, setting = key.rpartition(".")
            settings[begin][setting] = value
        if source.config is not None:
            settings[""] = dict(source.config)
        return cls(
            source,
            {
                f"{begin}." if begin else "": Scaling.from_config(source.path, config)
                for begin, config in settings.items()
                if "lora_alpha" in config
            },
        )

    def alpha(self, module: _Module) -> float | None:
        """Return a module's α, where the file has it."""
        return _number(self.source.path, module.parts["alpha"]) if "alpha" in module.parts else None

    def scale(self, module: _Module, rank: int) -> float:
        """Return α/r; LyCORIS' α of 0 means the rank."""
        if (alpha := self.alpha(module)) is not None:
            return (alpha or rank) / rank
        for begin, scaling in self.configs.items():
            if module.name.startswith(begin):
                return scaling.scale(module.name.removeprefix(begin), rank)
        if self.source.alpha is not None:
            return self.source.alpha / rank
        self.assumed += 1
        return 1.0


# --- modules ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tuned:
    """What the adapter does to one tensor, and by which algorithm; `formula` is the same as `update`."""

    update: LowRankUpdate | FormulaUpdate
    algorithm: str
    decomposed: bool = False
    suffix: str = ""
    """Of the base's name, where it is no module's weight."""

    @property
    def formula(self) -> Formula:
        return formula_of(self.update)


def formula_of(update: LowRankUpdate | FormulaUpdate) -> Formula:
    """Return an update as a formula of the base's weight, which lies out × in."""
    if isinstance(update, FormulaUpdate):
        return update.tuned
    added = Added(lambda: update.scale * (matrix(wide(update.B)) @ matrix(wide(update.A))))
    return added if update.magnitude is None else Decomposed(added, update.magnitude, update.magnitude_axis)


def _tuned(
    source: AdapterSource, module: _Module, scales: _Scales, names: ModuleNames | None
) -> Iterator[_Tuned]:
    """Yield what a module's parts do to its weight and to its bias."""
    parts = module.parts
    for part, suffix in (("diff_b", ".bias"), ("b_norm", ".bias"), ("w_norm", "")):
        if part in parts:
            added = Added(lambda tensor=parts[part]: wide(tensor))  # type: ignore[misc]
            yield _Tuned(
                FormulaUpdate(f"{module.name}{suffix}", "full", (parts[part],), added), "", suffix=suffix
            )
    of_weight = parts.keys() - {"diff_b", "b_norm", "w_norm", "alpha"}
    magnitudes = of_weight & {SHAPED, WRITERS}
    if not of_weight:
        return
    algorithm = next((known for known in ALGORITHMS if known.fits(parts)), None)
    if algorithm is None and of_weight != magnitudes:
        raise CheckpointError(
            f"{module.name} in {source.path} has only {', '.join(sorted(of_weight))}, which is no whole update; save "
            "the adapter again."
        )
    if algorithm is not None and algorithm.name == "LoRA":
        yield _lora(source, module, scales, names)
        return
    factors = tuple(parts[part] for part in sorted(of_weight))
    formula: Formula = _unchanged
    if algorithm is None:
        name = "magnitude"
    else:
        name, formula = _name(algorithm, parts), algorithm.formula(parts, _scale(algorithm, module, scales))
    if magnitudes:
        magnitude = parts[magnitudes.pop()]
        axis = _axis(source, module, magnitude, None, names)
        formula = Decomposed(formula, magnitude, axis)
    yield _Tuned(
        FormulaUpdate(module.name, name, factors, formula), name, decomposed=isinstance(formula, Decomposed)
    )


def _unchanged(weight: Weight) -> Weight:
    return weight


def _name(algorithm: Algorithm, parts: Mapping[str, StoredTensor]) -> str:
    is_butterfly = algorithm.name == "OFT" and len(parts["oft_blocks"].shape) == 4
    return "BOFT" if is_butterfly else algorithm.name


def _scale(algorithm: Algorithm, module: _Module, scales: _Scales) -> float:
    if algorithm.name == "OFT":
        return scales.alpha(module) or 0.0
    rank = next((module.parts[part].shape[0] for part in algorithm.rank_of if part in module.parts), None)
    return 1.0 if rank is None else scales.scale(module, rank)


def _lora(source: AdapterSource, module: _Module, scales: _Scales, names: ModuleNames | None) -> _Tuned:
    """Keep LoRA factored: with a core, A is core · down; along the inputs of a convolution, DoRA is a formula."""
    up, down, mid = (module.parts.get(part) for part in ("up", "down", "mid"))
    assert up is not None
    assert down is not None
    if (
        len(up.shape) < 2
        or len(down.shape) < 2
        or up.row_length != down.rows
        or (mid is not None and (len(mid.shape) < 3 or mid.shape[:2] != (down.rows, down.rows)))
    ):
        raise CheckpointError(
            f"the factors of {module.name} in {source.path} have the shapes {up.shape} and {down.shape}, which share "
            "no rank; save the adapter again."
        )
    scale = scales.scale(module, down.rows)
    A = down if mid is None else _with_core(down, mid)
    update = LowRankUpdate(module.name, A, up, scale)
    part = next((part for part in (SHAPED, WRITERS) if part in module.parts), None)
    if part is None:
        return _Tuned(update, "LoRA")
    magnitude = module.parts[part]
    axis = _axis(source, module, magnitude, (up.rows, A.shape[1]), names)
    if axis == "in" and len(A.shape) > 2 and A.row_length != A.shape[1]:
        tuned = Decomposed(formula_of(update), magnitude, axis)
        factors = (down, up, magnitude)
        return _Tuned(FormulaUpdate(module.name, "DoRA", factors, tuned), "LoRA", decomposed=True)
    update = replace(update, magnitude=magnitude, magnitude_axis=axis)
    if magnitude.size != update.vectors:
        raise CheckpointError(
            f"The magnitude of {module.name} in {source.path} has {magnitude.size} numbers for {update.vectors} "
            f"{axis}put features; save the adapter again."
        )
    return _Tuned(update, "LoRA", decomposed=True)


def _with_core(down: StoredTensor, mid: StoredTensor) -> StoredTensor:
    """A of a convolution with a core: Σ core[i,j,…]·down[j,q], rank × in × kernel."""
    shape = (mid.shape[0], down.row_length, *mid.shape[2:])
    return computed(down, shape, lambda: tucker(wide(mid), np.eye(mid.shape[0]), matrix(wide(down))))


def _axis(
    source: AdapterSource,
    module: _Module,
    magnitude: StoredTensor,
    shape: tuple[int, int] | None,
    names: ModuleNames | None,
) -> Axis:
    """Say what a magnitude's vectors are, from its writer, its shape, the module's shape, or the user.

    LyCORIS has one number for each output as (out, 1, …) and one for each input as (1, in, …).
    """
    if WRITERS in module.parts:
        return "out"
    sizes = magnitude.shape
    if len(sizes) > 1 and magnitude.size > 1:
        if sizes[0] == magnitude.size:
            return "out"
        if sizes[1] == magnitude.size:
            return "in"
    if shape is None and names is not None:
        shape = _shape_in_base(names.find(module.name))
    if shape is None:
        return source.dora_axis or "out"  # asked again beside the base, which tells the shape
    fits_out, fits_in = (magnitude.size == count for count in shape)
    if fits_out != fits_in:
        return "out" if fits_out else "in"
    if not fits_out:
        raise CheckpointError(
            f"{magnitude.name!r} in {source.path} has the shape {magnitude.shape}, which fits neither the {shape[0]} "
            f"outputs nor the {shape[1]} inputs of {module.name}; save the adapter again."
        )
    if source.dora_axis is not None:
        return source.dora_axis
    raise CheckpointError(
        f"{magnitude.name!r} in {source.path} has the shape {magnitude.shape}, which may be one number for each output "
        f"or for each input of {module.name}; say which, as the program that trained it has it.",
        parameter="dora_axis",
    )


def _shape_in_base(places: tuple[Place, ...]) -> tuple[int, int] | None:
    """Outputs and inputs of the module; None where the base does not have it."""
    if not places or len(places[0].tensor.shape) < 2:
        return None
    return sum(place.outputs for place in places), places[0].tensor.shape[1]


# --- the base's own names -----------------------------------------------------------------------------------


def _placed(source: AdapterSource, tuned: list[_Tuned], names: ModuleNames) -> list[_Tuned]:
    """Give every update the name of the base's tensor that it changes; what has no place keeps its own."""
    whole: list[_Tuned] = []
    shares: defaultdict[str, list[tuple[Place, _Tuned]]] = defaultdict(list)
    for one in tuned:
        places = names.find(one.update.module.removesuffix(one.suffix or "\0"))
        if not places:
            whole.append(one)
            continue
        for place, share in _shared(source, one, places):
            if place.rows is None:
                module = f"{place.module}{one.suffix}"
                whole.append(replace(share, update=replace(share.update, module=module)))
            else:
                shares[f"{place.module}{one.suffix}"].append((place, share))
    _refuse_twice(source, whole)
    return whole + [_joined(module, pieces) for module, pieces in shares.items()]


def _refuse_twice(source: AdapterSource, tuned: list[_Tuned]) -> None:
    counts = Counter(one.update.module for one in tuned)
    if twice := [module for module, count in counts.items() if count > 1]:
        raise CheckpointError(
            f"{source.path} adapts {twice[0]} of {source.base and source.base.path} twice; pass the base that has all "
            "of its models, or the folder of the one that the adapter was trained on."
        )


def _shared(source: AdapterSource, one: _Tuned, places: tuple[Place, ...]) -> Iterator[tuple[Place, _Tuned]]:
    """Divide an update of a fused matrix among the matrices that have its outputs."""
    if len(places) == 1:
        yield places[0], one
        return
    start = 0
    for place in places:
        rows = slice(start, start + place.outputs)
        start = rows.stop
        yield place, replace(one, update=_of_rows(source, one.update, rows))


def _of_rows(
    source: AdapterSource, update: LowRankUpdate | FormulaUpdate, rows: slice
) -> LowRankUpdate | FormulaUpdate:
    if isinstance(update, LowRankUpdate) and (update.magnitude is None or update.magnitude_axis == "out"):
        if rows.stop > update.B.rows:
            raise CheckpointError(
                f"{update.module} in {source.path} has {update.B.rows} outputs, and the matrices of "
                f"{source.base and source.base.path} that share them at least {rows.stop}: is it the model that the "
                "adapter was trained on?"
            )
        magnitude = None if update.magnitude is None else _rows_of(update.magnitude, rows)
        return replace(update, B=_rows_of(update.B, rows), magnitude=magnitude)
    formula = formula_of(update)
    factors = update.factors if isinstance(update, FormulaUpdate) else (update.A, update.B)
    method = update.method if isinstance(update, FormulaUpdate) else "DoRA"
    try:
        return FormulaUpdate(update.module, method, factors, of_rows(formula, rows))
    except ValueError as error:
        raise CheckpointError(
            f"{update.module} in {source.path} is fused, and {source.base and source.base.path} keeps its matrices "
            f"apart ({error}); pass the single-file checkpoint that it was trained on."
        ) from error


def _rows_of(tensor: StoredTensor, rows: slice) -> StoredTensor:
    """Some of the outputs of a factor, or of a magnitude, which may have its numbers in one row."""
    shape = (rows.stop - rows.start, *(() if tensor.rows == 1 else tensor.shape[1:]))
    return computed(tensor, shape, lambda: wide(tensor).reshape(-1, *shape[1:])[rows])


def _joined(module: str, pieces: list[tuple[Place, _Tuned]]) -> _Tuned:
    """Make one update of those of a fused matrix's shares: of LoRA's, one of the sum of their ranks."""
    updates = [one.update for _, one in pieces]
    low_rank = [
        update for update in updates if isinstance(update, LowRankUpdate) and update.magnitude is None
    ]
    algorithm = pieces[0][1].algorithm
    if len(low_rank) == len(updates):
        placed = [(place.rows, update) for (place, _), update in zip(pieces, low_rank, strict=True)]
        first, rank = low_rank[0], sum(update.rank for update in low_rank)
        outputs = pieces[0][0].tensor.rows

        def stacked() -> Weight:
            return np.vstack([matrix(wide(update.A)) for update in low_rank])

        def side_by_side() -> Weight:
            B, at = np.zeros((outputs, rank)), 0
            for rows, update in placed:
                B[rows, at : at + update.rank] = update.scale * matrix(wide(update.B))
                at += update.rank
            return B

        A = computed(first.A, (rank, first.A.row_length), stacked)
        return _Tuned(
            LowRankUpdate(module, A, computed(first.B, (outputs, rank), side_by_side), 1.0), algorithm
        )
    formula = Joined(tuple((place.rows, one.formula) for place, one in pieces if place.rows is not None))
    factors = tuple(
        tensor
        for update in updates
        for tensor in (update.factors if isinstance(update, FormulaUpdate) else (update.A, update.B))
    )
    return _Tuned(
        FormulaUpdate(module, algorithm, factors, formula), algorithm, decomposed=pieces[0][1].decomposed
    )


# --- what it is called --------------------------------------------------------------------------------------


def _method(tuned: list[_Tuned]) -> str:
    """``LoRA``, ``DoRA``, ``LoKr``, ``LoKr with magnitudes``, ``LoRA and LoHa`` …."""
    names = list(dict.fromkeys(one.algorithm for one in tuned if one.algorithm)) or ["full"]
    decomposed = any(one.decomposed for one in tuned)
    if len(names) == 1 and decomposed:
        only = names[0]
        return WITH_MAGNITUDE.get(only, only if only == "magnitude" else f"{only} with magnitudes")
    return " and ".join(names) + (" with magnitudes" if decomposed else "")


def _format(modules: Mapping[str, _Module]) -> str:
    if any(
        part not in ("up", "down", "alpha", SHAPED, WRITERS) for m in modules.values() for part in m.parts
    ):
        return "LyCORIS"
    return "diffusers" if any("." in name for name in modules) else "kohya"


FORMAT = AdapterFormat("kohya", recognises, read)

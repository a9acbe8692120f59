"""From a stored name to what it means: canonical names, matching, layers, roles, fused parts, selection.

What is particular to an architecture lies in the tables of `architectures`; here is only how they are read.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher, get_close_matches
from functools import cache, lru_cache
from typing import Any, TypeAlias

from wdanalysis.checkpoints.architectures import (
    ATTENTION_MODULE,
    ATTENTION_ROLES,
    BRANCHES,
    CONTIGUOUS,
    CONTIGUOUS_QKV,
    CONV1D_EVIDENCE,
    CONVOLUTION,
    EMBEDDINGS,
    EXPERT,
    EXPERT_COUNTS,
    FAMILIES,
    FUSED,
    GEGLU,
    GPT2,
    HEADS,
    KV_HEADS,
    LAYER_ROLES,
    MODEL_ROLES,
    NOT_MATRICES,
    ROOTS,
    SECTIONS,
    SPELLINGS,
    STACKS,
    STAND_INS,
    TEXT_MODELS,
    UNKNOWN,
    WRAPPERS,
    Family,
    Fused,
)
from wdanalysis.checkpoints.experts import ExpertStacks, expert_role, is_flat_stack
from wdanalysis.checkpoints.places import Layers, branch_of, place, stack_of
from wdanalysis.decomposition import Axis
from wdanalysis.errors import CheckpointError, WdAnalysisError

__all__ = [
    "ATTENTION_ROLES",
    "Architecture",
    "Matching",
    "Matrix",
    "ModuleSelection",
    "NameIndex",
    "Part",
    "canonical",
    "closest",
    "is_in_attention",
    "match",
    "model_types",
    "recognise",
]

# --- canonical names ----------------------------------------------------------------------------------------


@lru_cache(maxsize=65536)
def canonical(name: str) -> str:
    """Return `name` without wrappers and root prefixes, in the spelling that all its spellings share.

    >>> canonical("module._orig_mod.model.layers.0.self_attn.q_proj.weight")
    'layers.0.self_attn.q_proj.weight'
    """
    components = [c for c in name.split(".") if c not in WRAPPERS]
    if "modules_to_save" in components[:-2]:
        at = components.index("modules_to_save")
        del components[at : at + 2]
    name = ".".join(components)
    while root := next((r for r in ROOTS if name.startswith(f"{r}.") and "." in name[len(r) + 1 :]), None):
        name = name[len(root) + 1 :]
    for pattern, spelling in SPELLINGS:
        name = re.sub(pattern, spelling, name)
    return name


def text_canonical(name: str) -> str:
    """Return the canonical name that a text model has by itself, of one that may lie in a multimodal model.

    >>> text_canonical("model.language_model.layers.0.mlp.up_proj.weight")
    'layers.0.mlp.up_proj.weight'
    """
    return canonical(re.sub(TEXT_MODELS, "", canonical(name)))


def _stem(name: str) -> str:
    return canonical(name).removesuffix(".weight").removesuffix(".weight_v")


# --- matching -----------------------------------------------------------------------------------------------


class NameIndex:
    """Stored names, found again under other spellings of them.

    Parameters
    ----------
    names
        The names in a checkpoint.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._by_canonical: defaultdict[str, list[str]] = defaultdict(list)
        self._by_text: defaultdict[str, list[str]] = defaultdict(list)
        self._names = frozenset(names)
        for name in sorted(self._names):
            self._by_canonical[canonical(name)].append(name)
            self._by_text[text_canonical(name)].append(name)

    def spellings(self, name: str) -> tuple[str, ...]:
        """Return every stored name that is `name` but for wrappers, root prefix and spelling, sorted.

        Where there is none, those that are so but for a text model's place in a multimodal one.
        """
        found = self._by_canonical.get(canonical(name)) or self._by_text.get(text_canonical(name))
        return tuple(found or ())

    def find(self, name: str) -> str | None:
        """Return `name` where it is stored, otherwise its one stored spelling; None where there is none.

        Raises
        ------
        CheckpointError
            `name` is not stored, and two spellings of it are.
        """
        if name in self._names:
            return name
        found = self.spellings(name)
        if len(found) > 1:
            raise _ambiguous(found[0], found[1], name)
        return found[0] if found else None

    def find_tied(self, name: str) -> str | None:
        """Return the stored name under which `name` is kept where it is tied to another tensor, or None."""
        stand_ins = STAND_INS.get(canonical(name), ())
        return next((found[0] for other in stand_ins if len(found := self.spellings(other)) == 1), None)

    def tensor_of(self, module: str) -> str | None:
        """Return the stored name of a module's weight: ``layers.0.mlp.fc1`` → ``layers.0.mlp.fc1.weight``.

        A weight that is not stored because it is tied is found under the name that was kept.

        Raises
        ------
        CheckpointError
            Two stored names could be it.
        """
        weight = f"{module}.weight"
        return self.find(weight) or self.find(module) or self.find_tied(weight)


def _ambiguous(first: str, second: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"'{first}' and '{second}' could both be what the other checkpoint calls '{name}', because they "
        "differ only in their prefix; save both checkpoints with the same prefixes."
    )


@dataclass(frozen=True)
class Matching:
    """Which tensor of a tuned checkpoint belongs to which of the base.

    Attributes
    ----------
    pairs
        Base name → tuned name. Several base names may lead to one tuned name where tensors are tied.
    only_base, only_tuned
        Names that belong to nothing, in the order in which they were given.
    tied
        Those of `pairs` in which the tuned name is that under which a tied tensor was kept.
    """

    pairs: dict[str, str]
    only_base: tuple[str, ...]
    only_tuned: tuple[str, ...]
    tied: dict[str, str]


def match(
    base: Iterable[str],
    tuned: Iterable[str],
    *,
    metadata: Mapping[str, str] | None = None,
    tie_word_embeddings: bool | None = None,
) -> Matching:
    """Match the names of two checkpoints: first equal ones, then equal canonical ones, then tied ones.

    Parameters
    ----------
    base, tuned
        Stored names.
    metadata
        `__metadata__` of the tuned checkpoint, where safetensors' `save_model` notes {dropped: kept}.
    tie_word_embeddings
        What the tuned configuration says. Where it is False, an output embedding that is not stored is
        missing, and not looked for under the name of the input embedding.

    Raises
    ------
    CheckpointError
        Two names could both be the counterpart of one.
    """
    base, tuned = tuple(base), tuple(tuned)
    equal = set(base) & set(tuned)
    pairs = {name: name for name in base if name in equal}

    rest_of_base, rest_of_tuned = (NameIndex(n for n in names if n not in equal) for names in (base, tuned))
    for name in base:
        if name not in equal and (found := rest_of_tuned.find(name)):
            if len(rivals := rest_of_base.spellings(name)) > 1:
                raise _ambiguous(rivals[0], rivals[1], found)
            pairs[name] = found

    kept_under = NameIndex(tuned)
    noted = {canonical(dropped): kept for dropped, kept in (metadata or {}).items() if kept in set(tuned)}
    tied = {}
    for name in base:
        if name not in pairs:
            kept = noted.get(canonical(name))
            if kept is None and tie_word_embeddings is not False:
                kept = kept_under.find_tied(name)
            if kept is not None:
                tied[name] = kept
    pairs |= tied

    used = set(pairs.values())
    return Matching(
        pairs=pairs,
        only_base=tuple(name for name in base if name not in pairs),
        only_tuned=tuple(name for name in tuned if name not in used),
        tied=tied,
    )


def closest(theirs: Iterable[str], ours: Iterable[str], most: int = 3) -> list[tuple[str, str]]:
    """Return the pairs of most alike names, the best first; the first stands for all that differ in numbers alone.

    >>> closest(["h.0.attn.q", "h.1.attn.q"], ["layers.0.attn.q", "norm"])
    [('h.0.attn.q', 'layers.0.attn.q')]
    """
    there, here = (_examples(names) for names in (theirs, ours))
    pairs = []
    for pattern, name in there.items():
        for found in get_close_matches(pattern, here, n=1, cutoff=0.5):
            pairs.append((SequenceMatcher(None, pattern, found).ratio(), name, here[found]))
    return [(name, found) for _, name, found in sorted(pairs, key=lambda pair: -pair[0])[:most]]


def _examples(names: Iterable[str], most: int = 80) -> dict[str, str]:
    """The first names by what they are without numbers."""
    examples: dict[str, str] = {}
    for name in names:
        if len(examples) >= most:
            break
        examples.setdefault(re.sub(r"\d+", "#", name), name)
    return examples


# --- architectures ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One role's share of a stored matrix.

    Attributes
    ----------
    module
        The role, after the stack where the model has several: ``q``, ``decoder.q``, ``cross.q``,
        ``vision.up``; for a matrix that is not recognised, its name without layer.
    runs
        Half-open ranges along the output dimension, in order; those of all parts cover it once.
    stride
        Of a run every so manieth output is the part's, from its first on.
    """

    module: str
    runs: tuple[tuple[int, int], ...]
    stride: int = 1

    @property
    def role(self) -> str:
        """The module without its stack."""
        return self.module.rpartition(".")[2]

    @property
    def size(self) -> int:
        """How many outputs it has."""
        return sum(len(range(start, stop, self.stride)) for start, stop in self.runs)


_Share: TypeAlias = tuple[tuple[tuple[int, int], ...], int]
"""Runs and stride of a part."""


@dataclass(frozen=True)
class Matrix:
    """How to read one tensor as a weight matrix.

    Attributes
    ----------
    name
        What it is called.
    shape
        As stored; a convolution (out × in × …) reads as out × the rest.
    layer
        Index of the layer within its stack; None outside the layers.
    stack
        ``encoder``, ``decoder``, ``cross``, ``vision`` … where the name tells it, otherwise empty.
    expert
        Index of the expert among its layer's; None outside of experts.
    of_stack
        The number of experts whose matrices the tensor holds, one after the other; None where it holds this alone.
    in_by_out
        Whether it is stored as in × out: GPT-2's Conv1D, and embeddings (number × dimension).
    parts
        One with the whole output dimension, or one for each of several fused projections.
    recognised
        Whether the role is known; otherwise a part's module is what remains of the name.
    note
        A sentence on what could not be told or must be borne in mind.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None
    stack: str
    expert: int | None
    in_by_out: bool
    parts: tuple[Part, ...]
    recognised: bool
    note: str | None = None
    of_stack: int | None = None

    @property
    def rows(self) -> int:
        """How many it is stored in."""
        return self.shape[0]

    @property
    def row_length(self) -> int:
        """Of a stored row."""
        return math.prod(self.shape[1:])

    @property
    def outputs(self) -> int:
        """Output features."""
        return self.row_length if self.in_by_out else self.rows

    @property
    def inputs(self) -> int:
        """Input features; of a convolution, times the size of its kernel."""
        return self.rows if self.in_by_out else self.row_length

    def shape_of(self, part: Part) -> tuple[int, int]:
        """(out, in) of a part."""
        return part.size, self.inputs

    def vectors_are_rows(self, axis: Axis) -> bool:
        """Whether a vector is a row as stored (otherwise a column)."""
        return (axis == "out") != self.in_by_out


@dataclass(frozen=True)
class Architecture:
    """What a model's names mean; made by `recognise`.

    Attributes
    ----------
    family
        `model_type` of the configuration, or what the names tell; ``unknown`` where nothing does.
    several_stacks
        Whether the model has attention in more than one stack, so that modules are named with their stack.
    """

    family: str
    several_stacks: bool = False
    _family: Family = field(default=UNKNOWN, repr=False, compare=False)
    _config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    _layers: Layers = field(default_factory=Layers, repr=False, compare=False)
    _experts: ExpertStacks = field(default_factory=ExpertStacks, repr=False, compare=False)
    _geglu: frozenset[str] = field(default_factory=frozenset, repr=False, compare=False)

    def matrix(self, name: str, shape: tuple[int, ...]) -> Matrix | None:
        """Say how to read a stored tensor as a weight matrix.

        Parameters
        ----------
        name
            As stored.
        shape
            As stored; a convolution (out × in × …) reads as out × the rest.

        Returns
        -------
        Matrix or None
            None where it is no matrix: a bias, norm, scalar or buffer, or a stack of experts (see `matrices`).
        """
        if not _is_matrix(name, shape):
            return None
        stem = _stem(name)
        role = _role(stem)
        expert = EXPERT.search(name)
        matrix = self._matrix(name, shape, role, int(expert[1]) if expert else None)
        if role is None:
            return matrix

        role = "up_gate" if stem in self._geglu else self._family.renamed.get(role, role)
        in_by_out = role in EMBEDDINGS or bool(self._family.conv1d and re.search(self._family.conv1d, stem))
        matrix = replace(matrix, in_by_out=in_by_out and len(shape) == 2)
        return self._split(matrix, role, self._shares(role, stem, stack_of(name), matrix))

    def matrices(self, name: str, shape: tuple[int, ...]) -> tuple[Matrix, ...]:
        """Say which weight matrices a stored tensor holds: one, none, or one for each expert of a stack.

        Parameters
        ----------
        name, shape
            As in `matrix`.
        """
        if (role := expert_role(_stem(name))) is None or len(shape) != (
            2 if is_flat_stack(_stem(name)) else 3
        ):
            matrix = self.matrix(name, shape)
            return () if matrix is None else (matrix,)
        count = shape[0] if len(shape) == 3 else self._setting(EXPERT_COUNTS, "") or self._experts.count
        if not count or not math.prod(shape) or math.prod(shape[:-1]) % count:
            return ()
        of_one = (math.prod(shape[:-1]) // count, shape[-1])
        in_by_out = self._experts.in_by_out(_stem(name))
        matrix = self._matrix(name, of_one, role, expert=None)
        matrix = replace(matrix, in_by_out=in_by_out, of_stack=count)
        layout = self._family.gate_up or (None if in_by_out else FUSED["gate_up"])
        shares = (
            _runs(layout, matrix.outputs, {"gate": 1, "up": 1}, 1) if role == "gate_up" and layout else None
        )
        matrix = self._split(matrix, role, shares)
        return tuple(replace(matrix, name=f"{name}[{expert}]", expert=expert) for expert in range(count))

    def is_unread_stack(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor looks like weights in three dimensions (or experts in two) that `matrices` does not know."""
        is_stack = len(shape) == 3 or is_flat_stack(_stem(name))
        return (
            is_stack
            and min(shape[-2:]) > 1
            and not re.search(NOT_MATRICES, name)
            and not self.matrices(name, shape)
        )

    def _matrix(self, name: str, shape: tuple[int, ...], role: str | None, expert: int | None) -> Matrix:
        """A matrix out × in, of one part."""
        stem = _stem(name)
        return Matrix(
            name=name,
            shape=shape,
            layer=self._layers.of_name(stem),
            stack=branch_of(name) or stack_of(name),
            expert=expert,
            in_by_out=False,
            parts=(Part(self._module(name, role), ((0, shape[0]),)),),
            recognised=role is not None,
            note=_weight_norm_note(name),
        )

    def _split(self, matrix: Matrix, role: str, shares: Mapping[str, _Share] | None) -> Matrix:
        """Divide a matrix among the projections that are fused in it, where it is known how."""
        if role in FUSED and shares is None:
            cannot_tell = (
                f"the projections fused in '{matrix.name}' cannot be told apart without a model type that is known and "
                "the number of heads in config.json"
            )
            matrix = replace(matrix, note=cannot_tell)
        shares = shares or {role: (((0, matrix.outputs),), 1)}
        parts = [Part(self._module(matrix.name, part), *share) for part, share in shares.items()]
        return replace(matrix, parts=tuple(parts))

    def _module(self, name: str, role: str | None) -> str:
        """What the table calls a role of a matrix: the role after branch or stack, or what remains of the name."""
        stem = _stem(name)
        apart = self._layers.set_apart(stem)
        if role is None:
            return ".".join(filter(None, (apart, place(stem).rest))) or name
        stack = branch_of(name) or (stack_of(name) if self.several_stacks else "")
        before = "_".join(filter(None, (stack, apart)))
        return ".".join(filter(None, (before, role)))

    def _shares(self, role: str, stem: str, stack: str, matrix: Matrix) -> Mapping[str, _Share] | None:
        """Return the runs of each projection fused in `role`; None where that is one, or cannot be split."""
        fused = FUSED.get(role)
        if role == "qkv":
            fused = CONTIGUOUS if re.search(CONTIGUOUS_QKV, stem) else self._family.qkv
        if fused is None or branch_of(stem) == "linear":
            return None
        size = matrix.outputs
        if "q" not in fused.order:
            return _runs(fused, size, dict.fromkeys(fused.order, 1), groups=1)
        heads = self._setting(HEADS, stack)
        if heads is None:
            if not isinstance(fused.groups, int) or self._family.kv_heads or size != 3 * matrix.inputs:
                return None
            heads = kv_heads = fused.groups  # equal thirds that are not interleaved by head
        elif fused.groups == "heads":
            kv_heads = heads
        else:
            kv_heads = self._family.kv_heads or self._setting(KV_HEADS, stack) or heads
        groups = (
            fused.groups
            if isinstance(fused.groups, int)
            else {"heads": heads, "kv_heads": kv_heads}[fused.groups]
        )
        return _runs(fused, size, {"q": heads, "k": kv_heads, "v": kv_heads}, groups)

    def _setting(self, keys: Sequence[str], stack: str) -> int | None:
        for section in _sections(self._config, stack):
            for key in keys:
                if isinstance(number := section.get(key), int) and number > 0:
                    return number
        return None


def recognise(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any] | None = None) -> Architecture:
    """Recognise a model from its stored names and shapes, and its `config.json` where there is one.

    Parameters
    ----------
    shapes
        Shape of every stored tensor by name.
    config
        The model's configuration. Without it, fused projections are split only where names and shapes leave
        no doubt.
    """
    config = config or {}
    family = _family_of_config(config) or _family_of_names(shapes, model_types(config))
    roles = {
        name: expert_role(_stem(name)) or _role(_stem(name))
        for name, shape in shapes.items()
        if _is_matrix(name, shape) or expert_role(_stem(name))
    }
    stacks = {
        stack_of(name)
        for name, role in roles.items()
        if role in ATTENTION_ROLES and branch_of(name) != "cross"
    }
    known = family is not UNKNOWN
    of_stems = {_stem(name): shape for name, shape in shapes.items()}
    architecture = Architecture(
        family=str(config.get("model_type") or family.name) if known else UNKNOWN.name,
        several_stacks=len(stacks) > 1,
        _family=family,
        _config=config,
        _experts=ExpertStacks.of(of_stems),
        _geglu=frozenset(stem for stem in of_stems if _is_geglu(stem, of_stems)),
    )
    modules = {
        _stem(name): architecture._module(name, role)
        for name, role in roles.items()
        if not EXPERT.search(name)
    }
    return replace(architecture, _layers=Layers.of(modules))


def model_types(config: Mapping[str, Any]) -> set[str]:
    """Every `model_type` that a configuration names: the model's and its text model's."""
    return {str(section["model_type"]) for section in _sections(config, "") if section.get("model_type")}


def _family_of_config(config: Mapping[str, Any]) -> Family | None:
    for section in _sections(config, ""):
        for family in FAMILIES:
            if str(section.get("model_type")) in family.types:
                key, value = family.when or ("model_type", section["model_type"])
                if section.get(key) == value:
                    return family
    return None


def _family_of_names(shapes: Mapping[str, tuple[int, ...]], types: set[str]) -> Family:
    """The first family that names and shapes tell, but none of other model types than the configuration's."""
    for pattern, longer in CONV1D_EVIDENCE:
        for name, shape in shapes.items():
            if len(shape) == 2 and re.search(pattern, name) and shape[longer] > shape[1 - longer]:
                return GPT2
    possible = (f for f in FAMILIES if f.mark and not (types and f.types and types.isdisjoint(f.types)))
    return next((f for f in possible if any(re.search(str(f.mark), name) for name in shapes)), UNKNOWN)


def _sections(config: Mapping[str, Any], stack: str) -> Iterator[Mapping[str, Any]]:
    for key in SECTIONS.get(stack, SECTIONS[""]):
        section = config if key == "" else config.get(key)
        if isinstance(section, Mapping):
            yield section
            if isinstance(section.get("attn_config"), Mapping):
                yield section["attn_config"]


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    last = name.rsplit(".", 1)[-1]
    is_parameter = last.endswith(("weight", "weight_v", "original1"))
    return (
        len(shape) >= 2
        and math.prod(shape) > 0
        and not re.search(NOT_MATRICES, name)
        and not (len(shape) == 3 and ("experts" in name.split(".") or not re.search(CONVOLUTION, name)))
        and not is_flat_stack(_stem(name))
        and (is_parameter or shape[0] > 1)  # class tokens, position tables of ViT and masks are 1 × …
    )


def _role(stem: str) -> str | None:
    in_layer = bool(re.search(r"(?:^|\.)\d+\.", stem))
    rows = (*LAYER_ROLES, *MODEL_ROLES) if in_layer else MODEL_ROLES
    return next((role for role, pattern in rows if _compiled(pattern).search(stem)), None)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|\.)(?:{pattern})$")


def is_in_attention(name: str) -> bool:
    """Whether a tensor that is neither a norm nor a table of positions lies in an attention block, by its name."""
    *above, _ = place(_stem(name)).rest.split(".")
    return any(ATTENTION_MODULE.search(component) for component in above) and not re.search(
        r"(?i)norm|relative|rel_pos|position|rotary", _stem(name)
    )


def _is_geglu(stem: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    pattern, following = GEGLU
    inner = shapes.get(pattern.sub(following, stem), ())
    return bool(pattern.search(stem)) and len(inner) == 2 and shapes[stem][0] == 2 * inner[1]


def _weight_norm_note(name: str) -> str | None:
    if canonical(name).endswith(".weight_v"):
        return f"'{name}' is the direction of a weight-normalised matrix, whose magnitude is stored apart"
    return None


def _runs(fused: Fused, size: int, heads: Mapping[str, int], groups: int) -> Mapping[str, _Share] | None:
    """Divide `size` outputs into `groups` groups of heads in `fused.order`; None where some remain."""
    unit, remainder = divmod(size, sum(heads[role] for role in fused.order))
    if remainder or any(heads[role] % groups for role in fused.order):
        return None
    if fused.alternating:
        return {role: (((turn, size),), len(fused.order)) for turn, role in enumerate(fused.order)}
    runs: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    start = 0
    for _ in range(groups):
        for role in fused.order:
            stop = start + heads[role] // groups * unit
            runs[role].append((start, stop))
            start = stop
    return {role: (tuple(runs[role]), 1) for role in fused.order}


# --- selection ----------------------------------------------------------------------------------------------

_ROLES = frozenset(role for role, _ in (*LAYER_ROLES, *MODEL_ROLES)) | {
    role for fused in FUSED.values() if fused for role in fused.order
}
_STACK_WORDS = {word for stack in STACKS.values() for word in stack.split("_")} | {
    branch for branch, _ in BRANCHES
}


def split_module(module: str) -> tuple[str, str] | None:
    """Split ``decoder.q`` into stack and role; None where it is not the name of a role."""
    stack, _, role = module.rpartition(".")
    is_stack = not stack or _STACK_WORDS.issuperset(stack.split("_"))
    return (stack, role) if role in _ROLES and is_stack else None


@dataclass(frozen=True)
class ModuleSelection:
    """Which matrices `modules` chooses.

    Attributes
    ----------
    modules
        Roles (``q``: in any stack) and modules (``decoder.q``: in that one).
    patterns
        Regular expressions, searched in the stored name.
    """

    modules: frozenset[str] = frozenset()
    patterns: tuple[re.Pattern[str], ...] = ()

    @classmethod
    def parse(cls, text: str | Sequence[str]) -> ModuleSelection:
        r"""Read ``all``, roles (``q,v``), or a regular expression; a sequence may mix them.

        A text is taken apart at its commas only where one of the pieces is a role, so that ``h\.\d{1,2}\.``
        stays whole.

        Raises
        ------
        WdAnalysisError
            There is nothing to select by, or a regular expression is not valid.
        """
        items = [text] if isinstance(text, str) else list(text)
        words: list[str] = []
        for item in items:
            pieces = [piece.strip() for piece in item.split(",")]
            words += pieces if any(p == "all" or split_module(p) for p in pieces) else [item.strip(" ,")]
        words = [word for word in words if word]
        if not words:
            raise WdAnalysisError(
                "No modules are selected; give roles such as 'q,v', a regular expression, or 'all'."
            )
        patterns = []
        for word in words:
            if not split_module(word):
                try:
                    patterns.append(re.compile("" if word == "all" else word))
                except re.error as error:
                    raise WdAnalysisError(
                        f"'{word}' is neither a role such as 'q' nor a valid regular expression ({error})."
                    ) from None
        return cls(frozenset(word for word in words if split_module(word)), tuple(patterns))

    def words(self) -> list[tuple[str, ModuleSelection]]:
        """Every role and pattern, and the selection that it alone would be."""
        roles = [(module, ModuleSelection(modules=frozenset([module]))) for module in sorted(self.modules)]
        return roles + [(pattern.pattern, ModuleSelection(patterns=(pattern,))) for pattern in self.patterns]

    def matches(self, module: str, name: str) -> bool:
        """Whether a part's `module`, of the tensor stored as `name`, is selected."""
        stack, _, role = module.rpartition(".")
        by_role = "." not in stack and not self.modules.isdisjoint({module, role})
        return by_role or any(pattern.search(name) or pattern.pattern == module for pattern in self.patterns)

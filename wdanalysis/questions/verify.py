"""Whether an adapter is in a merged model: all of it, once, at its scale, on its axis, within the dtype's rounding.

Of each adapted weight the merged one, W, is held against what the adapter makes of the base, rounded as W is stored. If
that is not it, it is held against what merges that went wrong make of it (`hypotheses`), and the nearest is named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from wdanalysis.checkpoints.base_identity import base_mismatch
from wdanalysis.checkpoints.dtypes import STORED_TYPES
from wdanalysis.checkpoints.folders import open_checkpoint
from wdanalysis.checkpoints.model import Model, describe
from wdanalysis.checkpoints.names import NameIndex
from wdanalysis.checkpoints.storage import Progress
from wdanalysis.checkpoints.tensors import Checkpoint, FormulaUpdate, LowRankUpdate, StoredTensor
from wdanalysis.decomposition import Axis
from wdanalysis.errors import CheckpointError, ComparisonError
from wdanalysis.kernels.cores import available_cores
from wdanalysis.kernels.lowrank import Array
from wdanalysis.questions.hypotheses import ByFormula, Expected, LowRank, Weight, blocks, inner, rounded, ulp

WITHIN = 6.0
"""W is what was expected where the two are apart by less than so many times what one rounding makes: a merge in the
dtype itself rounds the factors, the norm and the product as well."""

WHOLE = 0.1
"""… and where its update is the expected one to this share of it."""

SURE = 5.0
"""… or to so many standard errors, where rounding hides most of it."""

KEPT = 0.9
"""Where rounding keeps less of the updates than this share, in the median, that is said."""

MERGED, MISSING, ERASED, OTHER = "merged", "missing", "erased by rounding", "something else"
NOT_REPLACED = "not replaced by the adapter's own"
NOT_FINITE = "not finite (NaN or infinite)"


@dataclass(frozen=True)
class ModuleCheck:
    """What became of one adapted module.

    Attributes
    ----------
    module, layer, role
        Its name as in the adapter, and where it is known to be.
    status
        ``merged``; ``missing`` (W is still W0); ``erased by rounding`` (it is, as the update is smaller than W's dtype
        can hold); ``0.5 times``, ``twice``, ``subtracted …``; ``transposed``; for DoRA ``merged twice``, ``magnitudes
        left out``, ``BA left out``, ``divided by ‖W0‖``, ``other axis``, ``magnitudes on the other axis``, ``norm of
        the other axis``; ``something else``; or why it could not be checked.
    share
        How much of the expected update is in W: ⟨W − W0, W* − W0⟩ / ‖W* − W0‖², all as stored; 1 where it is merged.
    scale
        The adapter's own s.
    found_scale
        s of the update that fits W best; None where it was not looked for.
    error
        ‖W − W*‖ / ‖W* − W0‖.
    rounding
        ‖W − W*‖ over what one rounding to `dtype` makes.
    kept
        How much of the update is left once W* is rounded: ⟨W* − W0, ΔW⟩ / ‖ΔW‖², the first two as stored.
    dtype
        The coarsest dtype that holds all of W.

    Examples
    --------
    >>> base, adapter = "sample_checkpoints/base", "sample_checkpoints/lora/checkpoint-240"
    >>> wd.verify(base, adapter, base).modules[["module", "status", "share"]].head(1)
                                module   status  share
    0  model.layers.0.mlp.down_proj  missing    0.0
    """

    module: str
    layer: int | None = None
    role: str = ""
    status: str = MERGED
    share: float | None = None
    scale: float | None = None
    found_scale: float | None = None
    error: float | None = None
    rounding: float | None = None
    kept: float | None = None
    dtype: str = ""


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes
    ----------
    base, adapter, merged
        What was given.
    method
        The adapter's.
    modules
        A row for each adapted module (`ModuleCheck`).
    others
        A row for every other tensor that is not as it should be: `name`, `status`.
    notes
        Sentences that are worth a warning.

    Examples
    --------
    >>> base, adapter = "sample_checkpoints/base", "sample_checkpoints/lora/checkpoint-240"
    >>> wd.verify(base, adapter, base).sentences()[0]
    'LoRA is in 0 of 50 modules as it should be.'
    """

    base: Path
    adapter: Path
    merged: Path
    method: str
    modules: pd.DataFrame
    others: pd.DataFrame
    notes: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether all of the adapter is in MERGED as it should be, and nothing else was changed."""
        return bool((self.modules["status"] == MERGED).all()) and self.others.empty

    def sentences(self) -> list[str]:
        """The answer: first whether it holds, then how many modules are what, with their names."""
        count = len(self.modules)
        found = self.modules.groupby("status", sort=False)["module"].apply(list)
        right = len(found.get(MERGED, []))
        if self.holds:
            dtypes = ", ".join(dict.fromkeys(self.modules["dtype"]))
            said = [
                f"{self.method} is in all {count} modules, once and whole, within the rounding of {dtypes}."
            ]
            kept = self.modules["kept"].median()
            return said + [f"Of the updates that rounding keeps {100 * kept:.0f} % (median)."] * bool(
                kept < KEPT
            )
        said = [f"{self.method} is in {right} of {count} modules as it should be."]
        for status, names in found.items():
            if status != MERGED:
                said.append(f"{status}: {_named(names)}.")
        for status, names in self.others.groupby("status", sort=False)["name"].apply(list).items():
            said.append(f"{status}: {_named(names, 'tensor')}.")
        return said

    def as_json(self) -> dict[str, Any]:
        """Everything as plain numbers, None where there is none."""
        rows = self.modules.astype(object).where(self.modules.notna(), None).to_dict("records")
        return {
            "base": str(self.base),
            "adapter": str(self.adapter),
            "merged": str(self.merged),
            "method": self.method,
            "holds": self.holds,
            "sentences": self.sentences(),
            "modules": rows,
            "others": self.others.to_dict("records"),
            "notes": list(self.notes),
        }


def verify(
    base: str | Path,
    adapter: str | Path,
    merged: str | Path,
    *,
    alpha: float | None = None,
    dora_axis: Axis | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check that an adapter is merged into a model: all modules, once, at its scale, on its axis, magnitudes included.

    Parameters
    ----------
    base
        The model that the adapter was trained on.
    adapter
        The adapter.
    merged
        The model that it is said to be merged into.
    alpha
        LoRA's α for an adapter file without its `adapter_config.json`.
    dora_axis
        The axis of its magnitudes, where neither their shape nor their writer tells it.
    progress
        Told after every tensor.

    Raises
    ------
    CheckpointError
        One of them cannot be read, or `adapter` is no adapter.
    ComparisonError
        They do not belong together: another shape, or no name in common.

    Examples
    --------
    >>> adapter = "sample_checkpoints/lora/checkpoint-240"
    >>> from wdanalysis.merging.merge import merge
    >>> merged = merge("sample_checkpoints/base", adapter, tmp / "merged").folder
    >>> wd.verify("sample_checkpoints/base", adapter, merged).sentences()
    ['LoRA is in all 50 modules, once and whole, within the rounding of F16.']
    >>> wd.verify("sample_checkpoints/base", adapter, "sample_checkpoints/base").holds
    False
    """
    model, result = open_checkpoint(base), open_checkpoint(merged)
    tuned = open_checkpoint(adapter, alpha=alpha, dora_axis=dora_axis).on(model)
    check = _Check(model, tuned, result)
    checks, others = check.run(progress)
    modules = pd.DataFrame(checks, columns=[field.name for field in fields(ModuleCheck)])
    modules["layer"] = modules["layer"].astype("Int64")
    for column in ("share", "scale", "found_scale", "error", "rounding", "kept"):
        modules[column] = modules[column].astype(float)
    return Verification(
        Path(base),
        Path(adapter),
        Path(merged),
        tuned.method or "LoRA",
        modules,
        pd.DataFrame(others, columns=["name", "status"]),
        tuple(dict.fromkeys(check.notes)),
    )


Update: TypeAlias = LowRankUpdate | FormulaUpdate


class _Check:
    """Three checkpoints, and the tensors of MERGED by those of BASE."""

    def __init__(self, base: Checkpoint, adapter: Checkpoint, merged: Checkpoint) -> None:
        if base.is_adapter:
            raise CheckpointError(
                f"{base.path} is an adapter; BASE must be the model that it was trained on."
            )
        if not adapter.is_adapter:
            raise CheckpointError(
                f"{adapter.path} is no adapter; there is nothing to look for in {merged.path}."
            )
        if merged.is_adapter:
            raise CheckpointError(f"{merged.path} is an adapter itself; MERGED must be a whole model.")
        self._base, self._adapter, self._merged = base, adapter, merged
        self._model: Model = describe(base, merged.config)
        self._matching = self._model.match(merged)
        if not self._matching.pairs:
            raise ComparisonError(f"no tensor of {merged.path} has the name of one in {base.path}.")
        self._base_index, self._index = NameIndex(base.tensors), NameIndex(merged.tensors)
        mismatch = base_mismatch(base, adapter)
        self.notes = [*adapter.notes, *([f"{mismatch}."] if mismatch else [])]

    def run(self, progress: Progress | None) -> tuple[list[ModuleCheck], list[dict[str, str]]]:
        """Check every adapted module, then every other tensor."""
        updates: list[Update] = [*self._adapter.updates, *self._adapter.formulas]
        targets = {update.module: self._target(update) for update in updates}
        adapted = {tensor.name for tensor in targets.values() if tensor is not None}
        rest = [name for name in self._base.tensors if name not in adapted]
        total = len(updates) + len(rest)
        tell = progress or (lambda done, total: None)
        checks = []
        with ThreadPoolExecutor(available_cores(), thread_name_prefix="wd-analyze") as pool:
            checked = pool.map(lambda update: self._module(update, targets[update.module]), updates)
            for done, check in enumerate(checked):
                tell(done, total)
                checks.append(check)
        others = []
        for done, (name, status) in enumerate(self._rest(rest), len(updates)):
            tell(done, total)
            if status:
                others.append({"name": name, "status": status})
        tell(total, total)
        return checks, others

    def _target(self, update: Update) -> StoredTensor | None:
        name = self._base_index.tensor_of(update.module)
        return None if name is None else self._base.tensors[name]

    def _module(self, update: Update, base: StoredTensor | None) -> ModuleCheck:
        scale = update.scale if isinstance(update, LowRankUpdate) else None
        if base is None:
            return ModuleCheck(update.module, status="not in BASE", scale=scale)
        matrix = self._model.matrices.get(base.name)
        layer, role = (matrix.layer, "+".join(part.module for part in matrix.parts)) if matrix else (None, "")
        place = (update.module, layer, role)
        name = self._index.tensor_of(update.module) or self._matching.pairs.get(base.name)
        if name is None:
            return ModuleCheck(*place, status="not in MERGED", scale=scale)
        found = self._merged.tensors[name]
        if not (found.is_float and base.is_float):
            return ModuleCheck(*place, status=f"not stored as floats ({found.precision})", scale=scale)
        if found.shape != base.shape:
            return ModuleCheck(*place, status="of another shape in MERGED", scale=scale)
        return _checked(place, self._expected(update, base), base, found, scale)

    def _expected(self, update: Update, base: StoredTensor) -> Expected:
        if isinstance(update, FormulaUpdate):
            return ByFormula(base, update)
        target = self._model.target(update)
        assert target is not None
        matrix, fitted = target.fitted()
        return LowRank(matrix, fitted)

    def _rest(self, names: list[str]) -> Iterator[tuple[str, str]]:
        """Say of every tensor without an update whether it is what it was, or what the adapter replaces it with."""
        own = self._model.match(self._adapter)
        replaced = own.pairs
        for name in names:
            base, at = self._base.tensors[name], self._matching.pairs.get(name)
            wanted = self._adapter.tensors[replaced[name]] if name in replaced else base
            if at is None:
                yield name, "not in MERGED"
            elif _is_the_same(wanted, self._merged.tensors[at]):
                yield name, ""
            else:
                yield name, NOT_REPLACED if name in replaced else "changed beside the adapter"
        added = [self._index.find(name) for name in own.only_tuned]
        for name, at in zip(own.only_tuned, added, strict=True):
            if at is None:
                yield name, "not in MERGED"
            elif not _is_the_same(self._adapter.tensors[name], self._merged.tensors[at]):
                yield name, NOT_REPLACED
        if more := [name for name in self._matching.only_tuned if name not in added]:
            self.notes.append(f"{self._merged.path} also has {_named(more, 'tensor')}, which BASE has not.")


def _checked(
    place: tuple[str, int | None, str],
    expected: Expected,
    base: StoredTensor,
    found: StoredTensor,
    scale: float | None,
) -> ModuleCheck:
    dtype = coarsest_dtype(found)
    fit = _fitted({MERGED: expected.merged}, base, found, dtype)
    status, factor = MERGED, None
    if not math.isfinite(fit.residual[MERGED]):
        status = NOT_FINITE
    elif fit.is_untouched and fit.is_an_update:
        status = MISSING
        if not fit.moves or (base.dtype != dtype and _is_erased_by_cast(expected, base, found, dtype)):
            status = ERASED
    elif fit.moves and not fit.is_whole(MERGED):
        factor = expected.factor(found)
        status = _nearest(expected, base, found, dtype, fit)
    elif not fit.moves and not fit.is_untouched:
        status = OTHER
    return ModuleCheck(
        *place,
        status=status,
        share=fit.share,
        scale=scale,
        found_scale=None if factor is None or scale is None else factor * scale,
        error=fit.error,
        rounding=fit.rounding(MERGED),
        kept=fit.kept,
        dtype=dtype,
    )


def _nearest(expected: Expected, base: StoredTensor, found: StoredTensor, dtype: str, as_merged: _Fit) -> str:
    """The fault that is nearest to what was found, if it is that within rounding."""
    faults = {**expected.others(found), MERGED: _after_cast(expected, dtype)}
    fit = _fitted(faults, base, found, dtype)
    name = min(faults, key=fit.residual.__getitem__)
    if as_merged.residual[MERGED] <= fit.residual[name]:
        return MERGED if as_merged.rounding(MERGED) <= WITHIN else OTHER
    return name if fit.rounding(name) <= WITHIN else OTHER


def _after_cast(expected: Expected, dtype: str) -> Weight:
    """The weight that is merged into a base that was cast to W's dtype before."""
    return lambda place, w0: expected.merged(place, rounded(w0, dtype))


def _is_erased_by_cast(expected: Expected, base: StoredTensor, found: StoredTensor, dtype: str) -> bool:
    return _fitted({MERGED: _after_cast(expected, dtype)}, base, found, dtype).residual[MERGED] == 0


@dataclass
class _Fit:
    """How far each possibility is from what was found; sums of squares over the matrix."""

    residual: dict[str, float]
    rounding2: float = 0.0
    untouched: float = 0.0
    along: float = 0.0
    expected2: float = 0.0
    update2: float = 0.0
    left: float = 0.0
    size: int = 0

    @property
    def is_untouched(self) -> bool:
        """Whether W is W0, as its dtype holds it."""
        return self.untouched == 0

    @property
    def moves(self) -> bool:
        """Whether the expected W is another than W0, as the dtype holds them."""
        return self.expected2 > 0

    @property
    def is_an_update(self) -> bool:
        """Whether the expected W is another than W0 before it is rounded."""
        return self.update2 > 0

    @property
    def share(self) -> float | None:
        """How much of the expected change is in W."""
        return self.along / self.expected2 if self.expected2 else None

    @property
    def kept(self) -> float | None:
        """How much of the update the dtype holds."""
        return self.left / self.update2 if self.update2 else None

    @property
    def error(self) -> float | None:
        """The residual beside the expected change."""
        return math.sqrt(self.residual[MERGED] / self.expected2) if self.expected2 else None

    def rounding(self, name: str) -> float:
        """The residual in units of what one rounding makes."""
        if not self.residual[name]:
            return 0.0
        return math.sqrt(self.residual[name] / self.rounding2) if self.rounding2 else math.inf

    def is_whole(self, name: str) -> bool:
        """Whether this is what was found, within rounding."""
        if self.share is None or self.rounding(name) > WITHIN:
            return False
        standard_error = math.sqrt(self.residual[name] / self.expected2 / self.size)
        return abs(self.share - 1) <= WHOLE + SURE * standard_error


def _fitted(candidates: Mapping[str, Weight], base: StoredTensor, found: StoredTensor, dtype: str) -> _Fit:
    fit = _Fit(dict.fromkeys(candidates, 0.0))
    for place, (w0, w) in blocks(base, found):
        stored0 = rounded(w0, dtype)
        steps = ulp(w, dtype)
        fit.rounding2 += inner(steps, steps) / 12
        fit.untouched += _square(w - stored0)
        fit.size += w.size
        for name, weight in candidates.items():
            exact = weight(place, w0)
            stored = rounded(exact, dtype)
            fit.residual[name] += _square(w - stored)
            if name == MERGED:
                fit.along += inner(w - stored0, stored - stored0)
                fit.expected2 += _square(stored - stored0)
                fit.update2 += _square(exact - w0)
                fit.left += inner(stored - stored0, exact - w0)
    return fit


def _square(numbers: Array) -> float:
    return inner(numbers, numbers)


def coarsest_dtype(tensor: StoredTensor) -> str:
    """Return the coarsest of a tensor's dtype, BF16 and F16 that holds all of its numbers.

    A model that was merged in bfloat16 may be stored in float32.
    """
    narrower = [
        dtype for dtype in ("BF16", "F16") if STORED_TYPES[dtype].bits < STORED_TYPES[tensor.dtype].bits
    ]
    for _, (numbers,) in blocks(tensor):
        narrower = [dtype for dtype in narrower if np.array_equal(rounded(numbers, dtype), numbers)]
        if not narrower:
            break
    return narrower[0] if narrower else tensor.dtype


def _is_the_same(wanted: StoredTensor, found: StoredTensor) -> bool:
    """Whether a tensor is another, as the coarsest dtype that it was ever in holds it."""
    if wanted.shape != found.shape:
        return False
    if not (wanted.is_float and found.is_float):
        return wanted.dtype == found.dtype and np.array_equal(wanted.read_bytes(), found.read_bytes())
    return is_rounded_from(wanted, found, found.dtype) or is_rounded_from(
        wanted, found, coarsest_dtype(found)
    )


def is_rounded_from(wanted: StoredTensor, found: StoredTensor, dtype: str) -> bool:
    """Whether the numbers of a tensor are those of another, rounded to a dtype."""
    return all(np.array_equal(rounded(w0, dtype), w, equal_nan=True) for _, (w0, w) in blocks(wanted, found))


def _named(names: list[str], noun: str = "module") -> str:
    """How many there are, and the first of them."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'} ({shown})"

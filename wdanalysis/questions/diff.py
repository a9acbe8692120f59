"""How two checkpoints differ: what both have, what only one has, and what the one is to the other.

The verdict follows from every tensor that both have; each sentence of evidence has its numbers. Matrices of floats are
measured as `compare` measures them, all else is held against its counterpart number by number.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import pandas as pd

from wdanalysis.checkpoints.base_identity import base_mismatch
from wdanalysis.checkpoints.dtypes import STORED_TYPES
from wdanalysis.checkpoints.folders import open_checkpoint
from wdanalysis.checkpoints.model import describe
from wdanalysis.checkpoints.storage import Progress
from wdanalysis.checkpoints.tensors import Checkpoint, LowRankUpdate, Series, StoredTensor
from wdanalysis.decomposition import Axis
from wdanalysis.errors import CheckpointError, ComparisonError
from wdanalysis.measure.plan import plan
from wdanalysis.measure.stream import load_update, stream
from wdanalysis.questions.hypotheses import blocks, rounded, ulp
from wdanalysis.questions.weights import singular_values

Verdict = Literal["identical", "incomplete", "cast", "quantised", "tuned", "continued", "unrelated"]
"""What B is to A: ``incomplete`` where all that both have is the same, but one lacks some."""

State: TypeAlias = Literal["identical", "cast", "rounded", "changed", "quantised", "other shape"]
"""Of a tensor: ``cast`` to another dtype that holds the same numbers, ``rounded`` to one that does not."""

STATES: tuple[State, ...] = get_args(State)

UNRELATED = 0.9
"""A median ΔD above this: the vectors of independent matrices have 1 − cos near 1."""

FAR = 0.5
"""A median ‖ΔW‖/‖W0‖ above this is more than tuning does: B was trained on from A."""

PACKED = (
    "qweight",
    "qzeros",
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
    "SCB",
    "absmax",
    "quant_map",
)
"""Ends of the names of what quantised matrices are stored in."""

GRIDS = ("F32", "BF16", "F16")
"""Dtypes to which the numbers of one checkpoint may have been rounded from those of the other."""

TENSOR_COLUMNS = ("name", "name_b", "layer", "module", "state", "shape", "shape_b", "dtype", "dtype_b", "rounded_to",
                  "vectors", "unchanged_fraction", "rel_update_norm", "delta_m", "delta_d")  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """What `diff` found.

    Attributes
    ----------
    a, b
        What was given.
    verdict
        See `Verdict`.
    evidence
        Sentences with the numbers that the verdict follows from.
    tensors
        A row for every tensor that both have (for each part of a fused one): names in A and B, layer, module, `State`,
        shapes and dtypes in both, the dtype that it was rounded to; and for floats of one shape the share of unchanged
        elements, ‖ΔW‖/‖W0‖, and of matrices ΔM and ΔD along `axis`. Empty where there is no value.
    only_a, only_b
        Names of the tensors (or adapted modules) that the other has not.
    axis
        What a vector of ΔM and ΔD is.
    notes
        Sentences that are worth a warning.

    Examples
    --------
    >>> found = wd.diff("sample_checkpoints/base", "sample_checkpoints/dora/checkpoint-240")
    >>> found.evidence
    ('Of 50 modules that B adapts, 50 changed.',
     'Where they changed, the update is 0.328 of the norm and ΔD is 0.0554 (median).')
    >>> found.by_module()[["module", "changed", "delta_d"]].head(2)
      module  changed  delta_d
    0   down       10   0.0514
    1     up       10   0.0836
    """

    a: Path
    b: Path
    verdict: Verdict
    evidence: tuple[str, ...]
    tensors: pd.DataFrame
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    axis: Axis
    notes: tuple[str, ...]

    def by_module(self) -> pd.DataFrame:
        """Sum up by module: how many tensors are what, and the means of the numbers."""
        table = self.tensors.assign(
            module=self.tensors["module"].mask(self.tensors["module"] == "", "other tensors")
        )
        counts = pd.crosstab(table["module"], table["state"]).reindex(columns=list(STATES), fill_value=0)
        numbers = table.groupby("module", sort=False)[["delta_m", "delta_d", "rel_update_norm"]].mean()
        sizes = table.groupby("module", sort=False).size().rename("tensors")
        return pd.concat([sizes, counts.reindex(sizes.index), numbers], axis=1).reset_index()

    def as_json(self) -> dict[str, Any]:
        """Everything as plain numbers, None where there is none."""
        return {
            "a": str(self.a),
            "b": str(self.b),
            "verdict": self.verdict,
            "evidence": list(self.evidence),
            "axis": self.axis,
            "tensors": self.tensors.astype(object).where(self.tensors.notna(), None).to_dict("records"),
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "notes": list(self.notes),
        }


def diff(
    a: str | Path,
    b: str | Path,
    *,
    axis: Axis = "out",
    alpha: float | None = None,
    progress: Progress | None = None,
) -> Difference:
    """Say what one checkpoint is to another: identical, cast, quantised, tuned, continued or unrelated, and why.

    Parameters
    ----------
    a, b
        Two models, a model and an adapter, or two adapters.
    axis
        What a vector of ΔM and ΔD is.
    alpha
        LoRA's α for adapter files without an `adapter_config.json`.
    progress
        Told after every matrix.

    Raises
    ------
    CheckpointError
        One of them cannot be read, or A is an adapter and B is none.

    Examples
    --------
    >>> found = wd.diff("sample_checkpoints/base", "sample_checkpoints/ft/checkpoint-240")
    >>> found.verdict
    'tuned'
    >>> wd.diff("sample_checkpoints/base", "sample_checkpoints/base").verdict
    'identical'
    """
    first, second = open_checkpoint(a, alpha=alpha), open_checkpoint(b, alpha=alpha)
    notes = [*first.notes, *second.notes]
    if first.is_adapter and not second.is_adapter:
        raise CheckpointError(f"{first.path} is an adapter and {second.path} is none; give the model first.")
    if first.is_adapter:
        rows, only_a, only_b = _of_adapters(first, second)
    else:
        mismatch = base_mismatch(first, second) if second.is_adapter else None
        notes += [f"{mismatch}."] if mismatch else []
        rows, only_a, only_b = _of_models(first, second, axis, progress)
    table = _table(rows)
    verdict, evidence = _verdict(table, first, second, only_a, only_b)
    return Difference(
        Path(a), Path(b), verdict, tuple(evidence), table, only_a, only_b, axis, tuple(dict.fromkeys(notes))
    )


# --- models -------------------------------------------------------------------------------------------------

Rows: TypeAlias = list[dict[str, Any]]


def _of_models(
    a: Checkpoint, b: Checkpoint, axis: Axis, progress: Progress | None
) -> tuple[Rows, tuple[str, ...], tuple[str, ...]]:
    model = describe(a, None if b.is_adapter else b.config)
    matching = model.match(b)
    pairs = {name: b.tensors[of_b] for name, of_b in matching.pairs.items()}
    comparable = {name: tensor for name, tensor in pairs.items() if _is_comparable(a.tensors[name], tensor)}
    measured = _measured(a, b, comparable, axis, progress)
    rows: Rows = []
    for name, tensor in pairs.items():
        base = a.tensors[name]
        matrix = model.matrices.get(name)
        shared = {
            "name": name,
            "name_b": tensor.name,
            "layer": matrix.layer if matrix else None,
            "module": "+".join(part.module for part in matrix.parts) if matrix else "",
            "shape": base.shape,
            "shape_b": tensor.shape,
            "dtype": base.precision,
            "dtype_b": tensor.precision,
        }
        of_parts = measured.get(name) or [{}]
        unchanged = [part.get("unchanged_fraction") for part in of_parts]
        state, further = _state(base, tensor, unchanged)
        rows += [shared | {"state": state} | further | part for part in of_parts]
    adapted = {name: parts for name, parts in measured.items() if name not in pairs}
    rows += [
        {"name": name, "name_b": name, "state": "changed", "dtype": a.tensors[name].precision,
         "shape": a.tensors[name].shape, "dtype_b": part["tuned_dtype"], "layer": part["layer"], **part}
        for name, parts in adapted.items() for part in parts
    ]  # fmt: skip
    only_a = () if b.is_adapter else matching.only_base
    absent = [update.module for update in b.updates if model.target(update) is None]
    absent += [update.module for update in b.formulas if model.target_of_formula(update) is None]
    return rows, only_a, (*matching.only_tuned, *absent)


def _is_comparable(a: StoredTensor, b: StoredTensor) -> bool:
    return a.is_float and b.is_float and a.shape == b.shape


def _measured(
    a: Checkpoint,
    b: Checkpoint,
    comparable: Mapping[str, StoredTensor],
    axis: Axis,
    progress: Progress | None,
) -> dict[str, Rows]:
    """ΔM and ΔD of every matrix that can be compared, by its name in A."""
    names = {tensor.name for tensor in comparable.values()}
    tuned = replace(b, tensors={name: tensor for name, tensor in b.tensors.items() if name in names})
    if not tuned.tensors and not tuned.is_adapter:
        return {}
    base = a if b.is_adapter else replace(a, tensors={name: a.tensors[name] for name in comparable})
    try:
        planned = plan(base, {"B": Series(b.path, "B", (tuned,))}, modules="all")
    except ComparisonError:  # vectors alone, or an adapter of another model
        return {}
    found: dict[str, Rows] = {}
    columns = (
        "module",
        "layer",
        "vectors",
        "unchanged_fraction",
        "rel_update_norm",
        "delta_m",
        "delta_d",
        "tuned_dtype",
    )
    for changes in stream(planned, axis, diagnostics=False, progress=progress):
        for change in changes:
            found.setdefault(change.name, []).append({column: getattr(change, column) for column in columns})
    return found


def _state(a: StoredTensor, b: StoredTensor, unchanged: list[float | None]) -> tuple[State, dict[str, Any]]:
    """What became of a tensor, and of one that is no matrix how much of it is unchanged."""
    if a.is_float != b.is_float or bool(a.stored_as) != bool(b.stored_as):
        return "quantised", {}
    if a.shape != b.shape:
        return "other shape", {}
    if not a.is_float:
        same = a.dtype == b.dtype and np.array_equal(a.read_bytes(), b.read_bytes())
        return ("identical" if same else "changed"), {}
    further: dict[str, Any] = {}
    if any(share is None for share in unchanged):
        further = _of_elements(a, b)
        unchanged = [further["unchanged_fraction"]]
    if all(share == 1 for share in unchanged):
        return ("identical" if a.precision == b.precision else "cast"), further
    dtype = _rounded_to(a, b)
    if dtype is None and {a.dtype, b.dtype} == {"F16", "BF16"} and _are_casts_of_one(a, b):
        dtype = "F16 and BF16"
    return ("changed", further) if dtype is None else ("rounded", {**further, "rounded_to": dtype})


def _of_elements(a: StoredTensor, b: StoredTensor) -> dict[str, float]:
    """The share of unchanged elements, and ‖ΔW‖/‖W0‖, of a tensor that is no matrix."""
    same, change2, norm2 = 0, 0.0, 0.0
    for _, (x, y) in blocks(a, b):
        same += int(np.sum((x == y) | (np.isnan(x) & np.isnan(y))))
        change2, norm2 = change2 + float(np.sum((y - x) ** 2)), norm2 + float(np.sum(x**2))
    return {
        "unchanged_fraction": same / max(a.size, 1),
        "rel_update_norm": math.sqrt(change2 / norm2) if norm2 else math.nan,
    }


def _rounded_to(a: StoredTensor, b: StoredTensor) -> str | None:
    """The dtype to which rounding the numbers of one gives those of the other; None where there is none."""
    ways = [(way, dtype) for dtype in GRIDS for way in (0, 1) if _is_narrower(dtype, (a, b)[way].dtype)]
    for _, numbers in blocks(a, b):
        ways = [
            (way, dtype)
            for way, dtype in ways
            if np.array_equal(rounded(numbers[way], dtype), numbers[1 - way], equal_nan=True)
        ]
        if not ways:
            return None
    return ways[0][1] if ways else None


def _are_casts_of_one(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors of different dtypes may be the same numbers before each was rounded."""
    return all(
        bool(np.all(np.abs(x - y) <= (ulp(x, a.dtype) + ulp(y, b.dtype)) / 2)) for _, (x, y) in blocks(a, b)
    )


def _is_narrower(dtype: str, than: str) -> bool:
    """Whether there are numbers of the second dtype that the first does not hold."""
    return dtype != than and STORED_TYPES[dtype].bits <= STORED_TYPES[than].bits


# --- adapters -----------------------------------------------------------------------------------------------


def _of_adapters(a: Checkpoint, b: Checkpoint) -> tuple[Rows, tuple[str, ...], tuple[str, ...]]:
    """Compare the updates s·BA of two adapters, and their whole tensors."""
    if a.formulas or b.formulas:
        raise CheckpointError(
            f"{a.path} and {b.path} adapt by more than s·BA; give the base first and each adapter by itself."
        )
    updates_a, updates_b = ({update.module: update for update in one.updates} for one in (a, b))
    rows: Rows = []
    for name in [name for name in updates_a if name in updates_b]:
        x, y = updates_a[name], updates_b[name]
        rows.append(
            {"name": name, "name_b": name, "module": name.rpartition(".")[2], "shape": x.shape, "shape_b": y.shape,
             "dtype": x.A.dtype, "dtype_b": y.A.dtype, **_of_updates(x, y)}
        )  # fmt: skip
    tensors = {name: b.tensors[name] for name in a.tensors if name in b.tensors}
    for name, tensor in tensors.items():
        state, further = _state(a.tensors[name], tensor, [None])
        rows.append(
            {"name": name, "name_b": name, "module": "", "shape": a.tensors[name].shape, "shape_b": tensor.shape,
             "dtype": a.tensors[name].dtype, "dtype_b": tensor.dtype, "state": state, **further}
        )  # fmt: skip
    names_a, names_b = (
        {**dict.fromkeys(u), **t} for u, t in ((updates_a, a.tensors), (updates_b, b.tensors))
    )
    only_a, only_b = (
        tuple(n for n in names_a if n not in names_b),
        tuple(n for n in names_b if n not in names_a),
    )
    return rows, only_a, only_b


def _of_updates(a: LowRankUpdate, b: LowRankUpdate) -> dict[str, Any]:
    """‖s'B'A' − sBA‖/‖sBA‖ and 1 − cos between the two, from r × r; magnitudes are compared as they are."""
    if a.shape != b.shape:
        return {"state": "other shape"}
    x, y = load_update(a), load_update(b)
    magnitudes = [m for m in (x.magnitude, y.magnitude) if m is not None]
    same_m = len(magnitudes) == 0 or (len(magnitudes) == 2 and np.array_equal(magnitudes[0], magnitudes[1]))
    factors = [(f.read_bytes(), g.read_bytes()) for f, g in ((a.A, b.A), (a.B, b.B))]
    is_same = same_m and a.scale == b.scale and all(np.array_equal(f, g) for f, g in factors)
    if is_same:
        return {"state": "identical", "rel_update_norm": 0.0, "delta_d": 0.0}
    norms = [float(np.sqrt(np.sum(singular_values(f.B, f.A, f.scale) ** 2))) for f in (x, y)]
    B, A = np.hstack([y.scale * y.B, -x.scale * x.B]), np.vstack([y.A, x.A])
    change2 = float(np.sum(singular_values(B, A) ** 2))
    if not all(norms):
        return {"state": "changed"}
    cos = (norms[0] ** 2 + norms[1] ** 2 - change2) / (2 * norms[0] * norms[1])
    return {"state": "changed", "rel_update_norm": math.sqrt(change2) / norms[0], "delta_d": 1 - cos}


# --- verdict ------------------------------------------------------------------------------------------------


def _table(rows: Rows) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=list(TENSOR_COLUMNS))
    for column in ("unchanged_fraction", "rel_update_norm", "delta_m", "delta_d"):
        table[column] = table[column].astype(float)
    for column in ("layer", "vectors"):
        table[column] = table[column].astype("Int64")
    return table


def _verdict(
    table: pd.DataFrame, a: Checkpoint, b: Checkpoint, only_a: tuple[str, ...], only_b: tuple[str, ...]
) -> tuple[Verdict, list[str]]:
    evidence = list(_evidence(table, only_a, only_b, is_adapted=b.is_adapter and not a.is_adapter))
    states = Counter(table["state"])
    if packed := [name for name in (*only_a, *only_b) if name.endswith(PACKED)]:
        return "quantised", [
            *evidence,
            f"{len(packed)} tensors are parts of quantised matrices, such as {packed[0]}.",
        ]
    if not len(table):
        return "unrelated", [f"No tensor of {b.path} has the name of one in {a.path}.", *evidence]
    if states["other shape"] > len(table) / 2:
        return "unrelated", evidence
    if states["quantised"]:
        return "quantised", evidence
    if not states["changed"] and not states["other shape"]:
        if states["cast"] or states["rounded"]:
            return "cast", evidence
        return ("incomplete" if only_a or only_b else "identical"), evidence
    turn, moved = table["delta_d"].median(), table["rel_update_norm"].median()
    if turn > UNRELATED:
        return "unrelated", [
            *evidence,
            f"A median ΔD above {UNRELATED:g} is that of weights with nothing in common.",
        ]
    if a.is_adapter:
        return "continued", evidence
    if _same_run(a, b):
        return "continued", [
            *evidence,
            f"They lie in one folder, A is its step {a.step} and B its step {b.step}.",
        ]
    if moved > FAR:
        return "continued", [
            *evidence,
            f"A median update above {FAR:g} of the norm is more than tuning does.",
        ]
    return "tuned", evidence


def _same_run(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether they are steps in one folder."""
    are_steps = a.step is not None and b.step is not None and a.step != b.step
    return are_steps and a.path.resolve().parent == b.path.resolve().parent


def _evidence(
    table: pd.DataFrame, only_a: tuple[str, ...], only_b: tuple[str, ...], *, is_adapted: bool
) -> Iterator[str]:
    table = table.drop_duplicates("name")
    count, of = len(table), "modules that B adapts" if is_adapted else "tensors in both"
    words = {
        "identical": "are identical",
        "cast": "are the same numbers in another dtype",
        "rounded": "are the same but for rounding",
        "changed": "changed",
        "quantised": "are quantised in one of the two",
        "other shape": "have another shape",
    }
    for state, number in Counter(table["state"]).most_common():
        of_state = table[table["state"] == state]
        detail = ""
        if state in ("cast", "rounded", "quantised"):
            ways = Counter(f"{x} → {y}" for x, y in zip(of_state["dtype"], of_state["dtype_b"], strict=True))
            detail = f" ({', '.join(ways)})"
            if state == "rounded":
                detail += f", rounded to {', '.join(dict.fromkeys(of_state['rounded_to']))}"
        elif state == "other shape":
            first = of_state.iloc[0]
            detail = f" ({first['name']}: {_times(first['shape'])} and {_times(first['shape_b'])})"
        yield f"Of {count} {of}, {number} {words[state]}{detail}."
    changed = table[(table["state"] == "changed") & table["rel_update_norm"].notna()]
    if len(changed):
        move, turn = changed["rel_update_norm"].median(), changed["delta_d"].median()
        yield (
            f"Where they changed, the update is {move:.3g} of the norm"
            + ("" if math.isnan(turn) else f" and ΔD is {turn:.3g}")
            + " (median)."
        )
    for names, where in ((only_a, "A"), (only_b, "B")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            yield f"Only {where} has {', '.join(names[:3])}{more}."


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))

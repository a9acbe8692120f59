"""The metrics table: from measured matrices to tidy rows, and what of them is worth keeping."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pandas as pd

from wdanalysis.checkpoints.names import split_module
from wdanalysis.checkpoints.steps import natural_order
from wdanalysis.measure.plan import Plan
from wdanalysis.measure.rows import MatrixChange
from wdanalysis.writing import encodable

_COLUMN_TYPES = {
    "step": "Int64",
    "layer": "Int64",
    "vectors": "Int64",
    "length": "Int64",
    "zero_vectors": "Int64",
    "rank": "Int64",
}
_TEXT = ("method", "module", "name", "axis", "base_dtype", "tuned_dtype", "update", "run", "grid")
_ROLE_ORDER = ("q", "k", "v", "o", "gate", "up", "down")
COLUMNS = tuple(field.name for field in dataclasses.fields(MatrixChange))
"""The columns of the metrics table, in order; docs/columns.md defines each."""
STACK_COLUMNS = ("stack", "unit")
"""The columns that `merged_stacks` adds."""


def metrics_table(rows: Sequence[MatrixChange], methods: Sequence[str]) -> pd.DataFrame:
    """The rows as a tidy table in the order of methods, runs, steps, layers, roles; otherwise as the base's files."""
    table = pd.DataFrame([vars(row) for row in rows], columns=list(COLUMNS))
    floats = {column: "float64" for column in COLUMNS if column not in _COLUMN_TYPES and column not in _TEXT}
    table = table.astype({**_COLUMN_TYPES, **floats})
    table = table.assign(**{column: table[column].map(encodable) for column in ("module", "name", "run")})
    split = [module.rpartition(".") for module in table["module"]]
    role = {role: place for place, role in enumerate(_ROLE_ORDER)}
    runs = sorted(set(table["run"]), key=natural_order)
    keys: dict[str, Any] = {
        "_method": table["method"].map({method: place for place, method in enumerate(methods)}),
        "_run": table["run"].map({run: place for place, run in enumerate(runs)}),
        "_stack": [stack for stack, _, _ in split],
        "_role": [role.get(name, len(role)) for _, _, name in split],
    }
    order = ["_method", "_run", "step", "_stack", "layer", "_role"]
    by = table.assign(**keys).sort_values(order, kind="stable")
    return by.drop(columns=list(keys)).reset_index(drop=True)


def merged_stacks(metrics: pd.DataFrame) -> pd.DataFrame:
    """Take the stacks of a model together: `encoder.q`, `decoder.q` and `cross.q` become the module `q`.

    Parameters
    ----------
    metrics
        The metrics table.

    Returns
    -------
    DataFrame
        The same rows in the same order, with `STACK_COLUMNS` at the end: `stack` (``encoder``; empty where
        the module has none) and `unit`, a number for each stack and layer, empty outside the layers. `layer` stays the
        layer's number in its stack; `unit` is what statistics take as the layer, so that layers of one number stay
        apart. A table that is merged already is returned as it is.

    Examples
    --------
    >>> table = run.metrics.query("step == 240 and layer == 0 and method == 'ft'")
    >>> apart = table.assign(module=["encoder.q", "cross.q"])
    >>> merged_stacks(apart)[["module", "stack", "layer", "unit"]]
      module    stack  layer  unit
    0      q  encoder      0     0
    1      q    cross      0     1
    """
    if "unit" in metrics:
        return metrics
    split = [split_module(module) or ("", module) for module in metrics["module"]]
    stack, role = ([pair[place] for pair in split] for place in (0, 1))
    table = metrics.assign(module=role, stack=stack)
    places = table.loc[table["layer"].notna(), ["stack", "layer"]].drop_duplicates()
    unit = places.assign(unit=pd.array(range(len(places)), dtype="Int64"))
    return table.merge(unit, on=["stack", "layer"], how="left")


def apart(metrics: pd.DataFrame) -> pd.DataFrame:
    """Undo `merged_stacks`, for what shows a place by its layer's number; another table is returned as it is."""
    if "unit" not in metrics:
        return metrics
    pairs = zip(metrics["stack"].tolist(), metrics["module"].tolist(), strict=True)
    named = [module if pd.isna(stack) or not stack else f"{stack}.{module}" for stack, module in pairs]
    return metrics.assign(module=named).drop(columns=list(STACK_COLUMNS))


def labels(rows: pd.DataFrame, column: str) -> pd.Series[str]:
    """Return a column of text, "" where a cell is empty; of a table that lacks it, "" everywhere.

    A table read from CSV has its empty cells as NaN, and one of an earlier version lacks `run` or `stack`.
    """
    if column not in rows:
        return pd.Series("", index=rows.index, dtype=object)
    values = rows[column].astype(object)
    return values.where(values.notna(), "").astype(str)


def units(rows: pd.DataFrame) -> pd.Series:
    """Return for each row the number of what statistics take as its layer: `unit`, where stacks are merged."""
    layer = rows["layer"].astype("Float64").astype("Int64")
    return rows["unit"].astype("Float64").astype("Int64").fillna(layer) if "unit" in rows else rows["layer"]


def keep_changed(table: pd.DataFrame, planned: Plan) -> tuple[pd.DataFrame, list[str]]:
    """Keep what was changed, unless the user chose the modules; and say what the numbers do not."""
    warnings = []
    for row in table[table["delta_m"].isna()].to_dict("records"):
        at = "" if pd.isna(row["step"]) else f" at step {row['step']}"
        run = f", {row['run']}" if row["run"] else ""
        where = f"{row['name']} of {row['method']}{run}{at}"
        warnings.append(f"{where} or of BASE holds NaN or Inf: its metrics are left empty")
    if zero := int(table["zero_vectors"].gt(0).sum()):
        warnings.append(
            f"{zero} {'row holds' if zero == 1 else 'rows hold'} all-zero vectors, which have no direction: "
            "such a vector counts 0 in ΔD where both are zero and 1 where one is"
        )
    if planned.modules_chosen == "given":
        return table, warnings
    changed = table["update_norm"].ne(0)  # an empty metric counts as changed
    if not changed.any():
        return table, [*warnings, "every compared matrix is identical to BASE"]
    unit = "module" if planned.modules_chosen == "attention" else "name"
    kept = table[unit].isin(table.loc[changed, unit])
    if planned.modules_chosen == "all":
        warnings.append(
            "no attention projection is recognised by its name: every changed matrix is compared "
            "(modules takes a regular expression)"
        )
    if left_out := table.loc[~kept, unit].unique().tolist():
        warnings.append(
            f"unchanged in every method and left out: {_shortened(left_out)} (modules = all keeps all)"
        )
    return table[kept].reset_index(drop=True), warnings


def _shortened(names: Sequence[str], most: int = 6) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest

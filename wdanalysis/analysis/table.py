"""The metrics table: from measured matrices to tidy rows, and what of them is worth keeping."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pandas as pd

from wdanalysis.measure.plan import Plan
from wdanalysis.measure.rows import MatrixChange
from wdanalysis.writing import encodable

_COLUMN_TYPES = {
    "step": "Int64",
    "layer": "Int64",
    "vectors": "Int64",
    "length": "Int64",
    "zero_vectors": "Int64",
}
_TEXT = ("method", "module", "name", "axis", "base_dtype", "tuned_dtype", "grid")
_ROLE_ORDER = ("q", "k", "v", "o", "gate", "up", "down")
COLUMNS = tuple(field.name for field in dataclasses.fields(MatrixChange))
"""The columns of the metrics table, in order; docs/columns.md defines each."""


def metrics_table(rows: Sequence[MatrixChange], methods: Sequence[str]) -> pd.DataFrame:
    """The rows as a tidy table in the order of methods, steps, layers and roles; otherwise as the base's files."""
    table = pd.DataFrame([vars(row) for row in rows], columns=list(COLUMNS))
    floats = {column: "float64" for column in COLUMNS if column not in _COLUMN_TYPES and column not in _TEXT}
    table = table.astype({**_COLUMN_TYPES, **floats})
    table = table.assign(**{column: table[column].map(encodable) for column in ("module", "name")})
    split = [module.rpartition(".") for module in table["module"]]
    role = {role: place for place, role in enumerate(_ROLE_ORDER)}
    keys: dict[str, Any] = {
        "_method": table["method"].map({method: place for place, method in enumerate(methods)}),
        "_stack": [stack for stack, _, _ in split],
        "_role": [role.get(name, len(role)) for _, _, name in split],
    }
    by = table.assign(**keys).sort_values(["_method", "step", "_stack", "layer", "_role"], kind="stable")
    return by.drop(columns=list(keys)).reset_index(drop=True)


def keep_changed(table: pd.DataFrame, planned: Plan) -> tuple[pd.DataFrame, list[str]]:
    """Keep what was changed, unless the user chose the modules; and say what the numbers do not."""
    warnings = []
    for row in table[table["delta_m"].isna()].to_dict("records"):
        at = "" if pd.isna(row["step"]) else f" at step {row['step']}"
        where = f"{row['name']} of {row['method']}{at}"
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

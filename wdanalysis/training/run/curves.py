"""Loss by step, as a table, a file and a figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd

from wdanalysis.errors import TrainingError
from wdanalysis.writing import write_whole

LOSSES_CSV = "losses.csv"
LOSSES_PNG = "losses.png"

LOGGED: Mapping[str, str] = MappingProxyType(
    {
        "loss": "loss",
        "eval_loss": "held_out_loss",
        "learning_rate": "learning_rate",
        "num_input_tokens_seen": "tokens",
    }
)
"""What the Trainer calls each column."""

COLUMNS = ("step", *LOGGED.values())


def losses(log_history: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Make a table of a Trainer's log: a row a step, from step 0, at which only the held-out loss is known.

    Parameters
    ----------
    log_history
        `trainer.state.log_history`.

    Returns
    -------
    DataFrame
        `step`; `loss`, nats a token, the mean since the row before; `held_out_loss`, nats a token; `learning_rate`;
        `tokens` read so far.
    """
    rows: dict[int, dict[str, Any]] = {}
    for entry in log_history:
        found = {column: entry[key] for key, column in LOGGED.items() if key in entry}
        if "loss" in found or "held_out_loss" in found:
            rows.setdefault(entry["step"], {}).update(found)
    table = pd.DataFrame([{"step": step, **row} for step, row in sorted(rows.items())], columns=list(COLUMNS))
    return table.astype({"step": "int64", "tokens": "Int64"} | dict.fromkeys(COLUMNS[1:4], "float64"))


def write_losses(table: pd.DataFrame, folder: Path) -> Path:
    """Write ``losses.csv`` into a method's folder, whole or not at all.

    Raises
    ------
    OutputError
        The folder cannot be written.
    """
    return write_whole(folder / LOSSES_CSV, lambda file: table.to_csv(file, index=False))


def read_losses(folder: Path) -> pd.DataFrame:
    """Read a method's ``losses.csv`` back.

    Raises
    ------
    TrainingError
        It is missing or cannot be read.
    """
    try:
        return pd.read_csv(folder / LOSSES_CSV).astype({"tokens": "Int64"})[list(COLUMNS)]
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError(f"{folder / LOSSES_CSV} cannot be read as a table of losses.") from error


def draw_losses(directory: Path, methods: Sequence[str]) -> Path | None:
    """Draw ``losses.png`` of the methods that have a table in their folder; None where none has.

    Raises
    ------
    TrainingError
        A table cannot be read.
    OutputError
        The folder cannot be written.
    """
    there = [method for method in methods if (directory / method / LOSSES_CSV).is_file()]
    if not there:
        return None
    from wdanalysis.figures.losses_figure import losses_png

    table = pd.concat([read_losses(directory / method).assign(method=method) for method in there])
    return write_whole(directory / LOSSES_PNG, lambda file: file.write(losses_png(table)))

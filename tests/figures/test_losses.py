"""Losses by step: what each panel shows."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from wdanalysis.errors import ComparisonError
from wdanalysis.figures.losses_figure import losses, losses_png


@pytest.fixture
def table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "method": ["ft"] * 3 + ["dora"] * 3,
            "step": [0, 5, 10] * 2,
            "loss": [math.nan, 3.0, 2.0, math.nan, 3.5, 2.5],
            "held_out_loss": [4.0, math.nan, 2.2, 4.0, math.nan, 2.7],
        }
    )


def test_each_panel_has_a_line_a_method_of_the_values_that_are_known(table: pd.DataFrame) -> None:
    training, held_out = losses(table).axes
    assert [line.get_xydata().tolist() for line in training.lines] == [
        [[5, 3.0], [10, 2.0]],
        [[5, 3.5], [10, 2.5]],
    ]
    assert [line.get_xydata().tolist() for line in held_out.lines] == [
        [[0, 4.0], [10, 2.2]],
        [[0, 4.0], [10, 2.7]],
    ]


def test_without_held_out_data_the_panel_says_so(table: pd.DataFrame) -> None:
    _, held_out = losses(table.assign(held_out_loss=math.nan)).axes
    assert [text.get_text() for text in held_out.texts] == ["no held-out loss was measured"]


def test_the_same_table_gives_the_same_bytes(table: pd.DataFrame) -> None:
    assert losses_png(table) == losses_png(table)


def test_an_empty_table_is_an_error(table: pd.DataFrame) -> None:
    with pytest.raises(ComparisonError, match="no rows"):
        losses(table.iloc[:0])

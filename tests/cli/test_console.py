"""What the commands print."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from wdanalysis.analysis.badges import BADGES
from wdanalysis.analysis.regression import SUMMARY_COLUMNS
from wdanalysis.cli import console


def test_the_summary_is_at_most_ten_columns_of_a_hundred_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [
        ("dora-decay", "gate", 12000, 1.23e-5, 9.88e-5, -0.123, -0.999, 0.999, -1.23e-5, name)
        for name in BADGES
    ]
    nothing = ("ft", "embed", 240, 0.01, 0.02, 1.0, np.nan, np.nan, 1.2, "too few layers")
    console.summary_table(pd.DataFrame([*rows, nothing], columns=list(SUMMARY_COLUMNS)))
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= 100
    assert len(printed[1].split()) <= 10
    assert printed[2].endswith("rises")
    assert "−1.00 … +1.00" in printed[2]
    assert printed[-1].split()[5:7] == ["+1.00", "–"]

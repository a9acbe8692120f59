"""Which rows rounding decides, and when the reading says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from checkpoint_files import write

import wdanalysis as wd
from wdanalysis.analysis import readings
from wdanalysis.analysis.floors import erased, near_floor
from wdanalysis.analysis.panel import Panel, panels
from wdanalysis.analysis.readings import MUCH_ERASED

NAME = "model.layers.{}.self_attn.q_proj.weight"


def test_a_row_is_decided_by_rounding_where_it_made_or_erased_a_third() -> None:
    rows = pd.DataFrame(
        {
            "delta_d": 1.0,
            "floor_ratio": [2.9, 3.1, np.nan, np.nan, np.nan, np.nan, 2.0],
            "grid": ["off", "off", "on", "on", "on", None, None],
            "delta_d_bias": [1.53, 1.48, 0.66, 0.68, np.nan, np.nan, np.nan],
        }
    )
    assert near_floor(rows).tolist() == [True, False, True, False, False, False, True]
    assert erased(rows).dropna().tolist() == pytest.approx([0.34, 0.32])
    assert not near_floor(rows[["delta_d"]]).any()
    known_to_be_less = rows.head(1).assign(delta_d_bias=1.3)  # a floor of errors that turn nothing
    assert not near_floor(known_to_be_less).any()


def panel(metrics: pd.DataFrame) -> Panel:
    ((_, only),) = panels(metrics)
    return only


def panel_of(folder: Path, size: float, seed: int) -> tuple[wd.Comparison, float]:
    """Seven layers of bfloat16, tuned by N(0, size · 0.02) and rounded; and what was erased, by hand."""
    generator = torch.Generator().manual_seed(seed)
    base, tuned, shares = {}, {}, []
    for layer in range(7):
        W0, noise = (0.02 * torch.randn(48, 96, generator=generator, dtype=torch.float64) for _ in range(2))
        W0 = W0.bfloat16()
        W = W0.double() + size * noise
        base[NAME.format(layer)], tuned[NAME.format(layer)] = W0, W.bfloat16()
        shares.append(1 - wd.delta_d(W0, W.bfloat16()) / wd.delta_d(W0, W))
    compared = wd.compare(
        *(write(folder / f"{name}.safetensors", of) for name, of in (("base", base), ("ft", tuned)))
    )
    return compared, float(np.median(shares))


@pytest.mark.parametrize(("size", "is_said"), [(1e-1, 0), (1e-2, 0), (2e-3, 0), (1e-3, 1), (1e-4, 1)])
def test_it_is_said_that_rounding_erased_where_it_did(tmp_path: Path, size: float, is_said: int) -> None:
    """Across the threshold: small panels, twelve draws each."""
    for seed in range(12):
        compared, share = panel_of(tmp_path / str(seed), size, seed)
        assert is_said == (share >= MUCH_ERASED)  # the case is what it claims to be
        text = readings.rounding(panel(compared.metrics))
        assert (text is not None) == is_said
        if text:
            assert text.startswith("Rounding to BF16 erases about ")
            assert abs(float(text.split()[5]) / 100 - share) < 0.03


def test_the_reading_has_both_cases() -> None:
    columns = {"method": "FT", "module": "q", "axis": "out", "step": 1, "tuned_dtype": "BF16"}
    values = {"delta_m": [1.0, 2, 3], "delta_d": [1.0, 2, 3], "delta_d_bias": [0.4, 0.73, 1.0]}
    on = pd.DataFrame({"layer": range(3), **values, "grid": "on"}).assign(**columns)
    assert readings.rounding(panel(on)) == (
        "Rounding to BF16 erases about 27 % of the ΔD of random updates of this size: "
        "a change of under half a step between its numbers is stored as none."
    )
    off = on.assign(grid="off", floor_ratio=[1.0, 2, 30], delta_d_bias=[np.nan, 2, 1.03])
    said = readings.rounding(panel(off))
    assert said == "2 of 3 points may be rounding: ΔD is under 3 × what rounding to BF16 makes by itself."
    assert readings.rounding(panel(on.assign(delta_d_bias=0.95))) is None

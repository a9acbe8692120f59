from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

Table = Callable[..., pd.DataFrame]


@pytest.fixture
def table() -> Table:
    """A maker of metrics tables: random values for every method, step, module and layer."""

    def make(
        methods: Sequence[str] = ("FT", "LoRA", "DoRA"),
        steps: Sequence[int | None] = (500, 1000, 2000),
        layers: Sequence[int | None] = tuple(range(6)),
        modules: Sequence[str] = ("q", "v"),
        scale: float = 1e-5,
    ) -> pd.DataFrame:
        index = pd.MultiIndex.from_product([methods, steps, modules, layers])
        columns = dict(zip(("method", "step", "module", "layer"), zip(*index, strict=True), strict=True))
        generator = np.random.default_rng(0)
        values: dict[str, Any] = {
            "axis": "out",
            "delta_m": scale * generator.uniform(1, 2, len(index)),
            "delta_d": scale * generator.uniform(1, 2, len(index)),
        }
        return pd.DataFrame(columns | values).astype({"step": "Int64", "layer": "Int64"})

    return make

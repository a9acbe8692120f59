"""What `compare` finds of an adapter, against the weights that its own library computes with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import wdanalysis as wd
from wdanalysis.checkpoints import open_checkpoint
from wdanalysis.checkpoints.dtypes import widen


def assert_measured(
    base: Path, adapter: Path, oracle: dict[str, torch.Tensor], modules: str = "all", **options: Any
) -> Any:
    """What `compare` finds of an adapter is Eq. 3 and 4 of the oracle's weights, on both axes."""
    weights = {name: widen(t.read()).reshape(t.shape) for name, t in open_checkpoint(base).tensors.items()}
    for axis in ("out", "in"):
        found = wd.compare(base, {"x": adapter}, axis=axis, modules=modules, **options).metrics.set_index(
            "name"
        )
        assert set(found.index) == set(oracle)
        for name, tuned in oracle.items():
            first, second = (
                torch.as_tensor(w).reshape(w.shape[0], -1).double() for w in (weights[name], tuned)
            )
            rows = found.loc[
                [name]
            ]  # several where a fused matrix is split into equal parts, one above another
            parts = zip(first.chunk(len(rows)), second.chunk(len(rows)), strict=True)
            for row, pair in zip(rows.to_dict("records"), parts, strict=True):
                delta_m, delta_d = (float(of(*pair, axis=axis)) for of in (wd.delta_m, wd.delta_d))
                assert row["delta_m"] == pytest.approx(delta_m, rel=1e-5, abs=2e-7), name
                assert row["delta_d"] == pytest.approx(delta_d, rel=1e-5, abs=2e-7), name
    return found

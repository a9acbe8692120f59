"""What `inspect` says of quantised weights."""

from __future__ import annotations

from pathlib import Path

import torch
from quantised_files import WEIGHT, gaussian, write_quantised

from wdanalysis.checkpoints.inspection import inspect


def test_quantised_weights_are_called_so_and_counted_as_what_they_stand_for(tmp_path: Path) -> None:
    codes = {
        WEIGHT: torch.zeros(8, 32, dtype=torch.uint8),
        f"{WEIGHT}_scale": torch.ones(8, 2, dtype=torch.uint8),
    }
    folder = write_quantised(tmp_path, codes | {"model.embed_tokens.weight": gaussian(10, 64)})
    (found,) = inspect(folder).checkpoints
    assert found.format == "safetensors, quantised (MXFP4)"
    assert found.dtypes == {"MXFP4": 1, "F32": 1}
    assert (found.tensors, found.parameters) == (2, 8 * 64 + 10 * 64)
    modules = {module.module: module.shapes for module in found.modules}
    assert modules == {"q": ((8, 64),), "embed": ((64, 10),)}

"""Eq. 2 to 4 of the DoRA paper written as plainly as can be: whole models, float64, adapters merged by PEFT.

The tables that `wd-analyze` makes are checked against this. It takes nothing from `wdanalysis`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

DIM = {"out": 1, "in": 0}
"""The dimension of `nn.Linear.weight` (out × in) that a vector of the axis runs along."""


def step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModel.from_pretrained(folder, dtype=torch.float64)
    return model


def tuned_weights(base: Path, checkpoint: Path) -> dict[str, Tensor]:
    is_adapter = (checkpoint / "adapter_config.json").exists()
    model = (
        PeftModel.from_pretrained(load(base), checkpoint).merge_and_unload()
        if is_adapter
        else load(checkpoint)
    )
    return dict(model.state_dict())


def delta_m(W0: Tensor, W: Tensor, axis: str) -> float:
    m0, m = W0.norm(dim=DIM[axis]), W.norm(dim=DIM[axis])
    return float((m - m0).abs().mean())


def delta_d(W0: Tensor, W: Tensor, axis: str) -> float:
    cosine = (W0 * W).sum(DIM[axis]) / (W0.norm(dim=DIM[axis]) * W.norm(dim=DIM[axis]))
    return float((1 - cosine).mean())


def metrics(
    base: Path, methods: Mapping[str, Path], names: str = r".*\.(query|value)\.weight"
) -> pd.DataFrame:
    """ΔM and ΔD, a row per method, step, matrix whose name matches `names`, and axis."""
    base_weights = load(base).state_dict()
    rows = []
    for method, folder in methods.items():
        for checkpoint in sorted(folder.glob("checkpoint-*"), key=step):
            weights = tuned_weights(base, checkpoint)
            for name, W0 in base_weights.items():
                if re.fullmatch(names, name):
                    for axis in DIM:
                        changes = delta_m(W0, weights[name], axis), delta_d(W0, weights[name], axis)
                        rows.append((method, step(checkpoint), name, axis, *changes))
    return pd.DataFrame(rows, columns=["method", "step", "name", "axis", "delta_m", "delta_d"])

"""ΔM and ΔD the usual way: both models in memory, float32, cosine similarity. What `compare` is measured against.

python benchmarks/float32_script.py BASE TUNED OUT.csv out|in
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity


def load_model(folder: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def delta(w0: torch.Tensor, w: torch.Tensor, dim: int) -> tuple[float, float]:
    delta_m = (w.norm(dim=dim) - w0.norm(dim=dim)).abs().mean()
    delta_d = (1 - cosine_similarity(w, w0, dim=dim)).mean()
    return delta_m.item(), delta_d.item()


def main(base_folder: str, tuned_folder: str, out: str, axis: str) -> None:
    base, tuned = load_model(base_folder), load_model(tuned_folder)
    dim = 1 if axis == "out" else 0
    with open(out, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["name", "delta_m", "delta_d"])
        for name, w0 in base.items():
            if w0.ndim == 2:
                table.writerow([name, *delta(w0.float(), tuned[name].float(), dim)])


if __name__ == "__main__":
    main(*sys.argv[1:])

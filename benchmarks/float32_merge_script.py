"""ΔM and ΔD of LoRA adapters the usual way: merge each into the base in float32, then cosine similarity.

python benchmarks/float32_merge_script.py BASE ADAPTERS OUT.csv out|in
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from safetensors.torch import load_file

from benchmarks.float32_script import delta, load_model

PREFIX, A_SUFFIX = "base_model.model.", ".lora_A.weight"


def main(base_folder: str, adapters_folder: str, out: str, axis: str) -> None:
    base = load_model(base_folder)
    dim = 1 if axis == "out" else 0
    with open(out, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["step", "name", "delta_m", "delta_d"])
        for folder in Path(adapters_folder).iterdir():
            step = folder.name.removeprefix("checkpoint-")
            config = json.loads((folder / "adapter_config.json").read_text())
            scale = config["lora_alpha"] / config["r"]
            adapter = load_file(folder / "adapter_model.safetensors")
            for key in adapter:
                if key.endswith(A_SUFFIX):
                    module = key.removeprefix(PREFIX).removesuffix(A_SUFFIX)
                    w0 = base[f"{module}.weight"].float()
                    w = w0 + scale * adapter[f"{PREFIX}{module}.lora_B.weight"] @ adapter[key]
                    table.writerow([step, f"{module}.weight", *delta(w0, w, dim)])


if __name__ == "__main__":
    main(*sys.argv[1:])

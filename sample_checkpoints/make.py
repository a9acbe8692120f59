"""Make this folder's checkpoints anew: `python -m sample_checkpoints.make` in the root of the repository.

The runs are those of `tests/real_run.py`, only longer. Of full tuning, only what is compared is kept, so that
the folder stays under 5 MB: the query and value matrices of `LAYERS`, in float16. Adapters stay as PEFT wrote
them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from tests.real_run import METHODS, Recipe, base_folder, held_out_loss, tune

FOLDER = Path(__file__).parent
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
LAYERS = (0, 5)
ROLES = ("query", "value")
MATRICES = [f"encoder.layer.{layer}.attention.self.{role}.weight" for layer in LAYERS for role in ROLES]
RECIPE = Recipe(steps=120, save_steps=40, rank=2, layers=LAYERS)


def keep_matrices(source: Path, target: Path) -> None:
    """Write the `MATRICES` of one safetensors file to another, in float16."""
    tensors = load_file(source)
    kept = {name: tensors[name].to(torch.float16) for name in MATRICES}
    save_file(kept, target, {"format": "pt"})


def keep_adapter(source: Path, target: Path) -> None:
    """Copy a PEFT adapter; its configuration names the model where everyone finds it."""
    shutil.copyfile(source / "adapter_model.safetensors", target / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = MODEL
    config["target_modules"].sort()  # a set in PEFT: written in another order every time
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Tune by every method and replace what the folder holds."""
    keep_matrices(base_folder() / "model.safetensors", FOLDER / "base.safetensors")
    untuned = AutoModel.from_pretrained(base_folder())
    print(f"held-out loss of the base: {held_out_loss(untuned, RECIPE.seed):.3f}")
    for method in METHODS:
        shutil.rmtree(FOLDER / method, ignore_errors=True)
        with TemporaryDirectory() as run:
            tuned = tune(method, Path(run), RECIPE)
            for source in Path(run).glob("checkpoint-*"):
                target = FOLDER / method / source.name
                target.mkdir(parents=True)
                if method == "ft":
                    keep_matrices(source / "model.safetensors", target / "model.safetensors")
                else:
                    keep_adapter(source, target)
        print(f"held-out loss of {method}: {held_out_loss(tuned, RECIPE.seed):.3f}")


if __name__ == "__main__":
    main()

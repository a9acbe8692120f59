"""Make this folder's checkpoints anew: `python -m sample_checkpoints.make` in the root of the repository.

The bundled base model is tuned on the English documentation in Python's library by every method of `RUNS`, as
`wd-analyze train` does it. With `--pretrain` the base itself is made anew first.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

from sample_checkpoints import pretrain
from wdanalysis.training.bundled import bundled_model_folder
from wdanalysis.training.run.loop import MethodRun, train
from wdanalysis.training.run.plan import TrainingPlan

FOLDER = Path(__file__).parent

SHARED = TrainingPlan(steps=240, batch_size=8, max_length=256, seed=0)
FT = replace(SHARED, methods=("ft",), learning_rate=1e-3)
ADAPTER = replace(SHARED, rank=8, alpha=16, targets=("q", "k", "v", "up", "down"), learning_rate=4e-3)
RUNS: Mapping[str, TrainingPlan] = {
    "ft": FT,
    "ft-decay": replace(FT, weight_decay=0.1),
    "lora": replace(ADAPTER, methods=("lora",)),
    "dora": replace(ADAPTER, methods=("dora",)),
}


def keep(run: MethodRun, folder: Path) -> None:
    """Copy to `folder` what is compared and what describes the run; the weights of full tuning in float16."""
    shutil.rmtree(folder, ignore_errors=True)
    for checkpoint in run.checkpoints:
        target = folder / checkpoint.name
        target.mkdir(parents=True)
        if run.method == "ft":
            weights = load_file(checkpoint / "model.safetensors")
            halves = {name: tensor.to(torch.float16) for name, tensor in weights.items()}
            save_file(halves, target / "model.safetensors", {"format": "pt"})
            shutil.copyfile(bundled_model_folder() / "config.json", target / "config.json")
        else:
            for name in ("adapter_model.safetensors", "adapter_config.json"):
                shutil.copyfile(checkpoint / name, target / name)
    for name in ("losses.csv", "training.json"):
        shutil.copyfile(run.folder / name, folder / name)


def main() -> None:
    """Make every run, replace what the folder holds, and print the held-out losses."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrain", action="store_true", help="make the bundled base anew first")
    if parser.parse_args().pretrain:
        pretrain.main(bundled_model_folder())
    (FOLDER / "base").mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(bundled_model_folder() / name, FOLDER / "base" / name)
    for name, plan in RUNS.items():
        with TemporaryDirectory() as out:
            (run,) = train(plan, out, say=print)
            keep(run, FOLDER / name)
        losses = run.losses["held_out_loss"].dropna()
        print(
            f"held-out loss of {name}: {losses.iloc[0]:.3f} before, {losses.iloc[-1]:.3f} after", flush=True
        )


if __name__ == "__main__":
    main()

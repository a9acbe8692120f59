"""Cut what `wd-analyze demo` compares out of this folder: `python -m sample_checkpoints.make_demo` in the root.

These are the query and value matrices of the base and of three runs, as they are stored, and the files that say how
the runs were trained. The package carries them, so that nobody needs this folder to see what the tool does. README's
picture is drawn by `wd-analyze demo` from them; `--picture` makes only that anew.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import safe_open
from safetensors.torch import save_file

from wdanalysis.demo import BASE, METHODS, carried_folder

SAMPLES = Path(__file__).parent
PROJECTIONS = ("self_attn.q_proj.", "self_attn.v_proj.")
BESIDE = ("config.json", "adapter_config.json", "training.json", "losses.csv")
FIGURE = "figures/scatter_v.png"
PICTURE = SAMPLES.parent / "docs" / "images" / "demo_scatter_v.png"
"""README's."""


def keep_projections(source: Path, target: Path) -> None:
    """Write those tensors of a safetensors file that are of `PROJECTIONS`."""
    with safe_open(source, framework="pt") as stored:
        names = [name for name in stored.keys() if any(part in name for part in PROJECTIONS)]  # noqa: SIM118
        save_file({name: stored.get_tensor(name) for name in names}, target, stored.metadata())


def cut() -> None:
    """Replace what the package carries."""
    shutil.rmtree(carried_folder(), ignore_errors=True)
    for name in (BASE, *METHODS):
        folder = SAMPLES / name.lower()
        for source in sorted(path for path in folder.rglob("*") if path.is_file()):
            target = carried_folder() / name / source.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix == ".safetensors":
                keep_projections(source, target)
            elif source.name in BESIDE:
                shutil.copyfile(source, target)


def draw() -> None:
    """Replace README's picture."""
    with TemporaryDirectory() as out:
        subprocess.run([sys.executable, "-m", "wdanalysis.cli", "demo", out, "--quiet"], check=True)
        shutil.copyfile(Path(out) / FIGURE, PICTURE)


def main() -> None:
    """Cut, and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--picture", action="store_true", help="only draw README's picture")
    if not parser.parse_args().picture:
        cut()
    draw()


if __name__ == "__main__":
    main()

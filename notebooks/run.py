"""Runs the notebooks anew from clean kernels and keeps what they show: `python notebooks/run.py`."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def run(path: Path) -> None:
    """Run a notebook in its folder and keep its outputs, without what libraries write on standard error."""
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(HERE)}}
    NotebookClient(notebook, timeout=240, record_timing=False, resources=folder).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for path in sorted(HERE.glob("*.ipynb")):
        run(path)

"""Runs the notebooks anew from clean kernels and keeps what they show: `python notebooks/run.py [NAME…]`."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent

LARGEST = 500_000
"""Characters of HTML that are kept of one output: charts to explore, with the library that draws them, are more."""


def run(path: Path) -> None:
    """Run a notebook in its folder and keep its outputs, without what libraries write on standard error."""
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(HERE)}}
    NotebookClient(notebook, timeout=240, record_timing=False, resources=folder).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if len(output.get("data", {}).get("text/html", "")) > LARGEST:
                    del output.data["text/html"]  # its line of text stays
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for path in sorted(HERE.glob("*.ipynb")):
        if len(sys.argv) == 1 or path.stem in sys.argv[1:] or path.name in sys.argv[1:]:
            run(path)

"""Shows the repository's notebooks as pages, with the outputs that are kept in them, when mkdocs builds the pages."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
FOLDER = "notebooks"

Page = tuple[str, dict[str, bytes]]
"""Markdown, and the pictures beside it by their names."""


def on_files(files: Any, *, config: Any) -> Any:
    """Add a page for each notebook, with its pictures (a hook of mkdocs)."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        markdown, pictures = page(path)
        files.append(File.generated(config, f"{FOLDER}/{path.stem}.md", content=markdown))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"{FOLDER}/{name}", content=picture))
    return files


def page(path: Path) -> Page:
    """Write a notebook as Markdown: its cells, and below each what it showed."""
    pictures: dict[str, bytes] = {}
    parts: list[str] = []
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source.replace("](../docs/", "](../"))
            continue
        parts.append(f"```python\n{source}\n```")
        parts.extend(_shown(cell["outputs"], f"{path.stem}-{number}", pictures))
    title, *rest = parts
    return "\n\n".join([title, _ORIGIN.format(name=path.name), *rest]) + "\n", pictures


_ORIGIN = "*The notebook `notebooks/{name}` of the repository, as it ran.*"


def _shown(outputs: list[dict[str, Any]], stem: str, pictures: dict[str, bytes]) -> Iterator[str]:
    """Each output in the richest form that a page can show."""
    for number, output in enumerate(outputs):
        data: Mapping[str, Any] = output.get("data", {})
        if "image/png" in data:
            name = f"{stem}-{number}.png"
            pictures[name] = base64.b64decode("".join(data["image/png"]))
            yield f"![{_said(data)}]({name})"
        elif "text/html" in data:
            yield f'<div class="notebook-output">{_one_block("".join(data["text/html"]))}</div>'
        else:
            text = "".join(output.get("text") or data.get("text/plain", ""))
            yield f"```text\n{text.rstrip()}\n```"


def _said(data: Mapping[str, Any]) -> str:
    """What stands for a picture where it cannot be seen."""
    return re.sub(r"[\[\]<>]", "", "".join(data.get("text/plain", "output")))


def _one_block(text: str) -> str:
    """HTML without empty lines, at which Markdown would begin anew."""
    return re.sub(r"\n\s*\n", "\n", text)

"""README as the package's page shows it: a page of an index knows no file beside it, so links become absolute."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(?P<picture>!?)\[(?P<text>(?:!\[[^\]]*\]\([^)]*\)|[^\]\[])*)\]\((?P<target>[^)\s]+)\)")
"""A link or a picture; a link's text may be a picture."""


def with_absolute_links(text: str, repository: str | None) -> str:
    """Point relative links and pictures into the repository; without one, leave a link's words and no picture.

    Parameters
    ----------
    text
        Markdown.
    repository
        Its address, as ``https://github.com/owner/name``.
    """

    def absolute(link: re.Match[str]) -> str:
        words = with_absolute_links(link["text"], repository)
        if re.match(r"https?:|#", link["target"]):
            return f"{link['picture']}[{words}]({link['target']})"
        if repository is None:
            return "" if link["picture"] else words
        kind = "raw" if link["picture"] else "blob"
        return f"{link['picture']}[{words}]({repository.rstrip('/')}/{kind}/main/{link['target']})"

    return LINK.sub(absolute, text)


class ReadmeHook(MetadataHookInterface):
    """Gives the package its readme."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set `readme`, from README.md and the address in `project.urls`."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        repository = metadata.get("urls", {}).get("Repository")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": with_absolute_links(text, repository),
        }

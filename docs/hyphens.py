"""Keeps options and the command's name whole at the ends of lines, when mkdocs builds the pages."""

from __future__ import annotations

import re
from typing import Any

CODE = re.compile(r"<code>.*?</code>", re.DOTALL)
NAME = re.compile(r"(?<![\w-])(?:--[a-z][\w-]*|wd-analyze)(?![\w/])")


def on_page_content(content: str, **_: Any) -> str:
    """Mark what is not to be broken at its hyphens (a hook of mkdocs)."""
    return CODE.sub(lambda code: NAME.sub(r'<span class="whole">\g<0></span>', code[0]), content)

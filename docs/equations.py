"""Writes equations as MathML when mkdocs builds the pages: browsers draw it by themselves, without a script."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

EQUATION = re.compile(r'<div class="arithmatex">\s*\\\[(?P<latex>.*?)\\\]\s*</div>', re.DOTALL)
"""What the extension arithmatex makes of ``$$ … $$``."""


def on_page_content(content: str, **_: Any) -> str:
    """Put MathML where a page has LaTeX (a hook of mkdocs)."""
    return EQUATION.sub(lambda found: mathml(html.unescape(found["latex"])), content)


def mathml(latex: str) -> str:
    r"""Write one equation as a block that can be scrolled where it is wider than the page.

    >>> "<msup>" in mathml(r"\Delta M = m^2")
    True
    """
    return f'<div class="equation" tabindex="0">{convert(latex.strip(), display="block")}</div>'

"""Writes equations as MathML when mkdocs builds the pages: browsers draw it by themselves, without a script.

Many systems have no font for mathematics, so the pages bring one: what they need of STIX Two Math (SIL Open Font
License), which the package ziamath has.
"""

from __future__ import annotations

import html
import re
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont
from latex2mathml.converter import convert
from mkdocs.structure.files import File

EQUATION = re.compile(r'<div class="arithmatex">\s*\\\[(?P<latex>.*?)\\\]\s*</div>', re.DOTALL)
"""What the extension arithmatex makes of ``$$ … $$``."""

MEANT = {
    "<mo>&#x02016;</mo>": '<mo stretchy="false">&#x02016;</mo>',  # the ‖ of a norm
    "<mi>&#x0007E;</mi>": "<mo>&#x0223C;</mo>",  # \sim, a relation
}
"""What latex2mathml writes, and what is meant."""

CHARACTERS = (
    range(0x20, 0x180),  # Latin
    range(0x2C6, 0x3D7),  # accents, Greek
    range(0x2000, 0x2070),  # punctuation
    range(0x2190, 0x2300),  # arrows, operators
    range(0x27E6, 0x27F0),  # brackets
    range(0x1D434, 0x1D468),  # letters in italics, to which browsers turn those of one-letter names
    range(0x1D6E2, 0x1D71C),  # and Greek ones
)


def on_page_content(content: str, **_: Any) -> str:
    """Put MathML where a page has LaTeX (a hook of mkdocs)."""
    return EQUATION.sub(lambda found: mathml(html.unescape(found["latex"])), content)


def mathml(latex: str) -> str:
    r"""Write a line of equations, which ``\qquad`` keeps apart and a narrow page puts below each other."""
    parts = (f'<span tabindex="0">{_written(part)}</span>' for part in latex.split(r"\qquad"))
    return f'<div class="equations">{"".join(parts)}</div>'


def _written(latex: str) -> str:
    """One equation as MathML."""
    written = convert(latex.strip(), display="block")
    for taken, meant in MEANT.items():
        written = written.replace(taken, meant)
    return written


def on_files(files: Any, *, config: Any) -> Any:
    """Add the font (a hook of mkdocs)."""
    files.append(File.generated(config, "css/mathematics.woff", content=font()))
    return files


@cache
def font() -> bytes:
    """Return the part of STIX Two Math with these characters, and what roots, sums and brackets grow by."""
    package = find_spec("ziamath")
    assert package is not None
    assert package.origin is not None
    whole = TTFont(Path(package.origin).parent / "fonts" / "STIXTwoMath-Regular.ttf")
    part = Subsetter(Options(layout_features=["ssty", "ccmp"], notdef_outline=True))
    part.populate(unicodes=[number for numbers in CHARACTERS for number in numbers])
    part.subset(whole)
    whole.flavor = "woff"
    file = BytesIO()
    whole.save(file)
    return file.getvalue()

"""The kinds of figures and of files that there are, without importing what draws them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

KINDS: Mapping[str, str] = MappingProxyType(
    {"scatter": "module", "layers": "module", "trajectory": "module", "heatmap": "method"}
)
"""Each kind of figure, a function of `wdanalysis.figures`, and the column of which every value gets a figure."""

FORMATS = ("png", "pdf", "svg")

"""The whole set of figures as files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import pandas as pd
from matplotlib.figure import Figure

from wdanalysis.errors import ComparisonError
from wdanalysis.figures import selection, style
from wdanalysis.figures.heatmap import heatmap
from wdanalysis.figures.layers import layers
from wdanalysis.figures.scatter import scatter
from wdanalysis.figures.trajectory import trajectory

KINDS: Mapping[str, tuple[str, Callable[[pd.DataFrame, str], Figure]]] = MappingProxyType(
    {
        "scatter": ("module", scatter),
        "layers": ("module", layers),
        "trajectory": ("module", trajectory),
        "heatmap": ("method", heatmap),
    }
)
"""Each kind of figure: the column of which every value gets a figure, and the function that draws it."""

LONGEST_NAME = 80
"""Characters of a module's or method's name that go into a file's name."""


def save_figures(
    metrics: pd.DataFrame,
    directory: str | Path,
    *,
    kinds: Iterable[str] = tuple(KINDS),
    format: str = "png",
    dpi: float = style.DPI,
) -> list[Path]:
    """Write `scatter_<module>`, `layers_<module>`, `trajectory_<module>`, `heatmap_<method>` into a folder.

    The same table gives the same bytes. In PDF and SVG, text stays text.

    Parameters
    ----------
    metrics
        The metrics table.
    directory
        Where to write; made where it is missing. A file of the same name is written over.
    kinds
        Which of `KINDS`.
    format
        ``png``, ``pdf`` or ``svg``.
    dpi
        Pixels per inch of a PNG.

    Returns
    -------
    list of Path
        The files, in the order of `kinds` and of the table.

    Raises
    ------
    ComparisonError
        There is no such kind or format, or the table mixes the two axes.
    """
    kinds = list(kinds)
    for choice, choices in [(format, style.METADATA), *((kind, KINDS) for kind in kinds)]:
        if choice not in choices:
            raise ComparisonError(f"there is no figure {choice!r}; choose of {', '.join(choices)}.")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    for kind in kinds:
        column, draw = KINDS[kind]
        for name in selection.unique(metrics, column):
            path = directory / _free_name(f"{kind}_{_file_safe(name)}", format, paths)
            paths[path.name.casefold()] = path
            style.write(draw(metrics, name), path, format, dpi)
    return list(paths.values())


def _file_safe(name: str) -> str:
    """Return the name with "-" for all that a file system or a shell may take amiss."""
    return "".join(c if c.isalnum() or c in "._-+" else "-" for c in name)[:LONGEST_NAME]


def _free_name(stem: str, format: str, taken: Mapping[str, Path]) -> str:
    """Return stem.format, or stem-2.format … where that is taken, be it in other letter case."""
    name, count = f"{stem}.{format}", 1
    while name.casefold() in taken:
        count += 1
        name = f"{stem}-{count}.{format}"
    return name

"""The paper's figures from the metrics table; using one imports matplotlib.

Every function takes the table and returns a `matplotlib.figure.Figure` that is not tied to pyplot and draws
without a display, so that a user can go on drawing on it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from wdanalysis.figures import style
    from wdanalysis.figures.batch import save_figures
    from wdanalysis.figures.heatmap import heatmap
    from wdanalysis.figures.layers import layers
    from wdanalysis.figures.scatter import scatter
    from wdanalysis.figures.trajectory import trajectory

__all__ = ["Figure", "heatmap", "layers", "save_figures", "scatter", "style", "trajectory"]

_ELSEWHERE = {"Figure": "matplotlib.figure", "save_figures": f"{__name__}.batch"}
"""Homes of names that have no module of their own here."""


class _Room(ModuleType):
    """A package in which a function is not hidden by the module of its name that holds it."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, getattr(value, name, value) if isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Room


def __getattr__(name: str) -> Any:
    """Import a figure when it is first used: what only plans figures, or has others draw them, needs no matplotlib."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_ELSEWHERE.get(name, f"{__name__}.{name}"))
    return getattr(module, name, module)

"""The paper's figures from the metrics table, and those of tables beside it; using one imports matplotlib.

Every function takes a table and returns a `matplotlib.figure.Figure` that is not tied to pyplot and draws
without a display, so that a user can go on drawing on it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from wdanalysis.figures.batch import save_figures
    from wdanalysis.figures.density_figure import density
    from wdanalysis.figures.heatmap_figure import heatmap
    from wdanalysis.figures.kinds import Look
    from wdanalysis.figures.layers_figure import figure8, layers
    from wdanalysis.figures.prediction_figure import prediction
    from wdanalysis.figures.scatter_figure import figure2, scatter
    from wdanalysis.figures.steps_figure import steps
    from wdanalysis.figures.trajectory_figure import trajectory
    from wdanalysis.figures.weights_figure import weights

__all__ = [
    "Figure",
    "Look",
    "density",
    "figure2",
    "figure8",
    "heatmap",
    "layers",
    "prediction",
    "save_figures",
    "scatter",
    "steps",
    "trajectory",
    "weights",
]

_HOME = {
    "Figure": "matplotlib.figure",
    "Look": "wdanalysis.figures.kinds",
    "density": "wdanalysis.figures.density_figure",
    "figure2": "wdanalysis.figures.scatter_figure",
    "figure8": "wdanalysis.figures.layers_figure",
    "heatmap": "wdanalysis.figures.heatmap_figure",
    "layers": "wdanalysis.figures.layers_figure",
    "prediction": "wdanalysis.figures.prediction_figure",
    "save_figures": "wdanalysis.figures.batch",
    "scatter": "wdanalysis.figures.scatter_figure",
    "steps": "wdanalysis.figures.steps_figure",
    "trajectory": "wdanalysis.figures.trajectory_figure",
    "weights": "wdanalysis.figures.weights_figure",
}


def __getattr__(name: str) -> Any:
    """Import a figure when it is first used: what only plans figures, or has others draw them, needs no matplotlib."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)

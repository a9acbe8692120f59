"""The paper's figures from the metrics table; importing this room imports matplotlib.

Every function takes the table and returns a `matplotlib.figure.Figure` that is not tied to pyplot and draws
without a display, so that a user can go on drawing on it.
"""

from matplotlib.figure import Figure

from wdanalysis.figures import style
from wdanalysis.figures.batch import save_figures
from wdanalysis.figures.heatmap import heatmap
from wdanalysis.figures.layers import layers
from wdanalysis.figures.scatter import scatter
from wdanalysis.figures.trajectory import trajectory

__all__ = ["Figure", "heatmap", "layers", "save_figures", "scatter", "style", "trajectory"]

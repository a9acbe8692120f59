"""Weight-decomposition analysis of fine-tuned networks (DoRA, ICML 2024): what tuning did to magnitude and direction.

>>> import wdanalysis as wd
>>> samples = {"FT": "sample_checkpoints/ft", "DoRA": "sample_checkpoints/dora"}
>>> comparison = wd.compare("sample_checkpoints/base", samples, modules=["q", "v"])
>>> comparison.metrics[["method", "step", "layer", "module", "delta_m", "delta_d"]].head(2)
  method  step  layer module  delta_m  delta_d
0     FT    60      0      q   0.0157   0.0050
1     FT    60      0      v   0.0053   0.0473
>>> figure = comparison.scatter("q")  # ΔM over ΔD, a point for each layer and step

What is heavy (torch, pandas, matplotlib) is imported when a name that needs it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wdanalysis._version import __version__

if TYPE_CHECKING:
    from wdanalysis.analysis.regression import correlations
    from wdanalysis.checkpoints.inspection import inspect
    from wdanalysis.checkpoints.schedules import Schedule
    from wdanalysis.comparison import Comparison, compare
    from wdanalysis.decomposition import Decomposition, decompose, delta_d, delta_m
    from wdanalysis.errors import WdAnalysisError
    from wdanalysis.questions.diff import diff
    from wdanalysis.questions.verify import verify
    from wdanalysis.questions.weights import adapter_weights

_HOME = {
    "Comparison": "wdanalysis.comparison",
    "Decomposition": "wdanalysis.decomposition",
    "Schedule": "wdanalysis.checkpoints.schedules",
    "WdAnalysisError": "wdanalysis.errors",
    "adapter_weights": "wdanalysis.questions.weights",
    "compare": "wdanalysis.comparison",
    "correlations": "wdanalysis.analysis.regression",
    "decompose": "wdanalysis.decomposition",
    "delta_d": "wdanalysis.decomposition",
    "delta_m": "wdanalysis.decomposition",
    "diff": "wdanalysis.questions.diff",
    "inspect": "wdanalysis.checkpoints.inspection",
    "verify": "wdanalysis.questions.verify",
}

__all__ = [
    "Comparison",
    "Decomposition",
    "Schedule",
    "WdAnalysisError",
    "__version__",
    "adapter_weights",
    "compare",
    "correlations",
    "decompose",
    "delta_d",
    "delta_m",
    "diff",
    "inspect",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name's module when it is first used, so that `import wdanalysis` stays light."""
    if name not in _HOME:
        raise AttributeError(f"module 'wdanalysis' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__

"""From paths to tensors: one module for each family of formats behind one small interface."""

from wdanalysis.checkpoints.folders import open_checkpoint
from wdanalysis.checkpoints.series import open_series
from wdanalysis.checkpoints.tensors import Checkpoint, LowRankUpdate, Series, StoredTensor

__all__ = ["Checkpoint", "LowRankUpdate", "Series", "StoredTensor", "open_checkpoint", "open_series"]

"""The error that a user may read: one sentence that names the file, the tensor and the mend."""

from __future__ import annotations


class WdAnalysisError(Exception):
    """Something that the user can mend; `str(error)` is one sentence, and the command exits with 1."""


class CheckpointError(WdAnalysisError):
    """A file or folder cannot be read as a checkpoint."""


class ComparisonError(WdAnalysisError):
    """Checkpoints were read, but there is nothing in them to compare."""


class TrainingError(WdAnalysisError):
    """A model cannot be tuned as asked."""


class OutputError(WdAnalysisError):
    """Results cannot be written, or would overwrite others."""

"""The errors that a user may read: one sentence that names the file, the tensor and the mend.

All are `WdAnalysisError`, so that one `except` is enough; the kinds say at which stage a run stopped.

>>> try:
...     wd.inspect("llama/")
... except wd.WdAnalysisError as error:
...     print(error)
llama does not exist; pass a file or folder on this machine.
"""

from __future__ import annotations


class WdAnalysisError(Exception):
    """Something that the user can mend; `str(error)` is one sentence, and the command exits with 1.

    Parameters
    ----------
    message
        One sentence that says what is wrong and how to mend it. It may name a parameter of the Python functions, never
        an option of the command.
    parameter
        The parameter of the Python function that mends it, where there is one. The command adds to the sentence how its
        own option is called.

    Examples
    --------
    >>> error = wd.WdAnalysisError("adapter.bin comes without its configuration: give alpha.", parameter="alpha")
    >>> str(error)
    'adapter.bin comes without its configuration: give alpha.'
    >>> error.parameter  # the command's sentence ends with (--alpha)
    'alpha'
    """

    def __init__(self, message: str, *, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class CheckpointError(WdAnalysisError):
    """A file or folder cannot be read as a checkpoint."""


class ComparisonError(WdAnalysisError):
    """Checkpoints were read, but there is nothing in them to compare."""


class TrainingError(WdAnalysisError):
    """A model cannot be tuned as asked."""


class OutputError(WdAnalysisError):
    """Results cannot be written, or would overwrite others."""

"""Where numbers come from: a `Run`, and the JSON that it is on the disk."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from wdanalysis._version import __version__
from wdanalysis.checkpoints.storage import header_hash
from wdanalysis.checkpoints.tensors import Checkpoint
from wdanalysis.measure.plan import Skipped
from wdanalysis.writing import encodable

Part = TypeVar("Part")


@dataclass(frozen=True)
class InputFile:
    """A file that was read: where it lies, its size, and a hash of its header."""

    path: str
    bytes: int
    header_sha256: str


@dataclass(frozen=True)
class Input:
    """A checkpoint that was read, its files, and which of its method's runs it is of where there are several."""

    path: str
    format: str
    step: int | None
    files: tuple[InputFile, ...] = ()
    run: str = ""


@dataclass(frozen=True)
class Options:
    """What was asked for; as the parameters of `wdanalysis.compare`. None where it was left open."""

    axis: str | None = None
    modules: str | list[str] | None = None
    layers: list[int] | None = None
    steps: list[int] | None = None
    alpha: float | None = None
    diagnostics: bool | None = None
    spectra: bool | None = None
    geometry: dict[str, Any] | None = None
    merge_stacks: bool | None = None
    vectors: bool | None = None


@dataclass(frozen=True)
class Matrices:
    """How many matrices were measured, and how many rows the table has."""

    measured: int
    in_table: int


@dataclass(frozen=True)
class Seconds:
    """How long each part of a comparison took; None for a part that was not reached or not asked for."""

    open: float
    measure: float | None = None
    spectra: float | None = None


@dataclass(frozen=True)
class Live:
    """How a model was watched in training: steps between measurements, and the memory of the copy of its base."""

    every: int
    base_copy_bytes: int


@dataclass(frozen=True)
class Unfinished:
    """What a folder of results still lacks; it is noted before anything else is written, and gone once all is.

    Attributes
    ----------
    how
        How it is finished, in a person's words.
    tables
        Whether the tables, too, are not whole yet.
    figures
        Kinds of figures that are to be drawn.
    look
        How: fields of `wdanalysis.figures.Look`.
    report
        Whether the page is to be written.
    measured
        Whether the rows are all there, so that the results are complete once they are finished.
    replaced
        Files of earlier results that go in the end.
    """

    how: str = ""
    tables: bool = True
    figures: Sequence[str] = ()
    look: Mapping[str, Any] = field(default_factory=dict)
    report: bool = False
    measured: bool = True
    replaced: Sequence[str] = ()


@dataclass(frozen=True)
class Run:
    """How the numbers of a metrics table came about.

    Attributes
    ----------
    versions
        Of this package, of Python, and of what the numbers and figures are made with.
    command
        The command line; None where Python called.
    options
        What was asked for.
    complete
        False where Ctrl-C cut it short, and in a folder that is not finished.
    unfinished
        What the folder that it was read from still lacks; None where that is whole.
    matrices
        How many were measured and are in the table.
    inputs
        What was read, for BASE and each method.
    skipped
        What a checkpoint holds and the table does not.
    warnings
        Sentences that a reader of the numbers should know.
    seconds, bytes_read
        What it took; None where nobody measured.
    live
        How the model was watched, where the numbers are of a training.
    outputs
        The files of the folder that it was saved to; empty for a run that was not.

    Examples
    --------
    >>> run.run.options.axis, run.run.complete
    ('out', True)
    >>> [checkpoint.step for checkpoint in run.run.inputs["ft"]]
    [60, 120, 180, 240]
    """

    versions: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] | None = None
    options: Options = Options()
    complete: bool = True
    matrices: Matrices | None = None
    inputs: dict[str, tuple[Input, ...]] = field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: Seconds | None = None
    bytes_read: int | None = None
    live: Live | None = None
    outputs: tuple[str, ...] = ()
    unfinished: Unfinished | None = None

    def finished(self) -> Run:
        """The run of a folder that lacks nothing: complete where all of it was measured."""
        if self.unfinished is None:
            return self
        return dataclasses.replace(self, complete=self.unfinished.measured, unfinished=None)

    def to_json(self) -> dict[str, Any]:
        """The run as `run.json` holds it: plain values, all of which UTF-8 can hold."""
        plain: dict[str, Any] = encodable(dataclasses.asdict(self, dict_factory=_without_unknown))
        return plain

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Run:
        """Read what `to_json` gave, or what an earlier version wrote: what that lacks is left at its default.

        Raises
        ------
        TypeError, AttributeError
            A part is not of the kind that it has to be.
        """
        parts: dict[str, Any] = {
            **{
                name: _known(part, saved[name])
                for name, part in _PARTS.items()
                if saved.get(name) is not None
            },
            **{
                name: tuple(saved[name])
                for name in ("command", "warnings", "outputs")
                if saved.get(name) is not None
            },
            "skipped": tuple(_known(Skipped, skip) for skip in saved.get("skipped", ())),
            "inputs": {
                method: tuple(_input(checkpoint) for checkpoint in checkpoints)
                for method, checkpoints in saved.get("inputs", {}).items()
            },
        }
        return _known(cls, {**saved, **parts})


_PARTS: Mapping[str, type[Any]] = {
    "options": Options,
    "matrices": Matrices,
    "seconds": Seconds,
    "live": Live,
    "unfinished": Unfinished,
}
_LEFT_OUT_IF_UNKNOWN = frozenset(
    {
        "matrices",
        "seconds",
        "bytes_read",
        "live",
        "diagnostics",
        "spectra",
        "geometry",
        "measure",
        "run",
        "merge_stacks",
        "unfinished",
    }
)
"""Entries that the JSON lacks where there is nothing to say; all others are then null."""


def _without_unknown(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    return {
        name: value for name, value in entries if name not in _LEFT_OUT_IF_UNKNOWN or value not in (None, "")
    }


def _known(part: type[Part], saved: Mapping[str, Any]) -> Part:
    """Make a dataclass of those entries that it has a field for."""
    names = {field.name for field in dataclasses.fields(part)}  # type: ignore[arg-type]
    return part(**{name: value for name, value in saved.items() if name in names})


def _input(saved: Mapping[str, Any]) -> Input:
    return _known(
        Input, {**saved, "files": tuple(_known(InputFile, file) for file in saved.get("files", ()))}
    )


def inputs_of(checkpoints: Iterable[Checkpoint]) -> tuple[Input, ...]:
    """Describe checkpoints and every file of theirs."""
    return tuple(
        Input(
            str(checkpoint.path),
            checkpoint.format,
            checkpoint.step,
            tuple(InputFile(str(file), file.stat().st_size, header_hash(file)) for file in checkpoint.files),
            checkpoint.run,
        )
        for checkpoint in checkpoints
    )


def versions() -> dict[str, str]:
    """The versions of this package, of Python, and of what the numbers and figures are made with."""
    from importlib.metadata import version

    packages = ("numpy", "numba", "pandas", "scipy", "torch", "safetensors", "matplotlib")
    return {
        "wdanalysis": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }

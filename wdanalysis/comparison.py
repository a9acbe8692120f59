"""The run: open, plan, stream, and gather the rows into a table that can be saved, loaded, read and drawn."""

from __future__ import annotations

import dataclasses
import html
import itertools
import os
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, get_args

from wdanalysis.checkpoints import open_checkpoint, open_series
from wdanalysis.checkpoints.model import base_mismatch
from wdanalysis.checkpoints.storage import Progress
from wdanalysis.checkpoints.tensors import Checkpoint, Series
from wdanalysis.decomposition import Axis
from wdanalysis.errors import ComparisonError
from wdanalysis.measure.plan import plan
from wdanalysis.measure.rows import MatrixChange
from wdanalysis.measure.stream import stream
from wdanalysis.results.provenance import encodable, input_files, versions

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from wdanalysis.measure.spectra import Spectra


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a comparison; `comparison` holds what was measured until then."""

    def __init__(self, comparison: Comparison) -> None:
        super().__init__()
        self.comparison = comparison


@dataclass(frozen=True)
class Comparison:
    """ΔM and ΔD of every compared matrix, and how they came about.

    Attributes
    ----------
    metrics
        A row for every method, step and matrix, with the columns that `wdanalysis.analysis.table.COLUMNS` lists.
    run
        Provenance: versions, options, input files, what was skipped and why, warnings, timings. JSON-ready.
    spectra
        Singular values of every base, tuned matrix and update, where they were asked for.
    """

    metrics: pd.DataFrame
    run: Mapping[str, Any] = field(default_factory=dict)
    spectra: Spectra | None = None

    @property
    def axis(self) -> str:
        """What a vector is: ``"out"``, an output feature, or ``"in"``, an input feature."""
        return str(self.run["options"]["axis"])

    @property
    def methods(self) -> list[str]:
        """The methods, in the order in which they were given."""
        return list(self.metrics["method"].unique())

    @property
    def modules(self) -> list[str]:
        """The module roles, in the order of the table."""
        return list(self.metrics["module"].unique())

    @property
    def skipped(self) -> pd.DataFrame:
        """What a checkpoint holds and the table does not: method, step, name, reason."""
        import pandas as pd

        return pd.DataFrame(self.run.get("skipped", []), columns=["method", "step", "name", "reason"])

    @property
    def warnings(self) -> list[str]:
        """Sentences that a reader of the numbers should know."""
        return list(self.run.get("warnings", []))

    def correlations(self) -> pd.DataFrame:
        """Pearson, Spearman and the regression of ΔM on ΔD, for each method, module and scope.

        See `wdanalysis.analysis.regression.correlations` for scopes and columns.
        """
        return self._correlations.copy()

    @cached_property
    def _correlations(self) -> pd.DataFrame:
        from wdanalysis.analysis.regression import correlations

        return correlations(self.metrics)

    def summary(self) -> pd.DataFrame:
        """A row for each method and module: matrices, steps, mean ΔM and ΔD at the last step, pooled r and slope."""
        from wdanalysis.analysis.regression import summary

        return summary(self.metrics)

    def diagnostics(self) -> pd.DataFrame:
        """The shrink that is common to all matrices of a checkpoint, and how much of their change it explains.

        See `wdanalysis.analysis.shrink.common_shrink` for the columns.
        """
        from wdanalysis.analysis.shrink import common_shrink

        return common_shrink(self.metrics)

    def readings(self) -> pd.DataFrame:
        """What the numbers of each method and module say, in sentences; see `wdanalysis.analysis.readings`."""
        return self._readings.copy()

    @cached_property
    def _readings(self) -> pd.DataFrame:
        from wdanalysis.analysis.readings import readings

        return readings(self.metrics)

    def scatter(self, module: str, **options: Any) -> Figure:
        """ΔM over ΔD, a panel a method (Figures 2 and 7). Options as in `wdanalysis.figures.scatter`."""
        from wdanalysis import figures

        return figures.scatter(self.metrics, module, **options)

    def layers(self, module: str, **options: Any) -> Figure:
        """ΔM and ΔD by layer (Figures 3 and 8). Options as in `wdanalysis.figures.layers`."""
        from wdanalysis import figures

        return figures.layers(self.metrics, module, **options)

    def trajectory(self, module: str, **options: Any) -> Figure:
        """ΔM and ΔD by training step. Options as in `wdanalysis.figures.trajectory`."""
        from wdanalysis import figures

        return figures.trajectory(self.metrics, module, **options)

    def heatmap(self, method: str, **options: Any) -> Figure:
        """ΔM and ΔD by layer and module. Options as in `wdanalysis.figures.heatmap`."""
        from wdanalysis import figures

        return figures.heatmap(self.metrics, method, **options)

    def report(self, path: str | Path) -> Path:
        """Write one HTML file that holds everything: readings, charts to explore, tables, and provenance.

        It needs nothing but a browser and fetches nothing.

        Parameters
        ----------
        path
            The file; one that is there is replaced. Its folder is made where it is missing.

        Returns
        -------
        Path
            The file.

        Raises
        ------
        OutputError
            The file cannot be written, or the extra `report` (Bokeh) is not installed.
        """
        from wdanalysis.results.folder import write_report

        return write_report(self, Path(path))

    def save(
        self,
        directory: str | Path,
        *,
        figures: Iterable[str] | None = None,
        format: str = "png",
        force: bool = False,
        report: bool = True,
    ) -> list[Path]:
        """Write tables, provenance, figures and the HTML report into a folder; each file appears whole or not at all.

        Parameters
        ----------
        directory
            Made where it is missing.
        figures
            Which kinds (``scatter``, ``layers``, ``trajectory``, ``heatmap``); None writes all, an empty list none.
        format
            ``png``, ``pdf`` or ``svg``.
        force
            Replace the results that are in the folder; other files in it stay.
        report
            Whether to write ``report.html``, where the extra `report` is installed.

        Returns
        -------
        list of Path
            What was written.

        Raises
        ------
        OutputError
            The folder holds results and `force` is False, or it cannot be written.
        """
        from wdanalysis.results.folder import save

        return save(self, Path(directory), figures=figures, format=format, force=force, report=report)

    @classmethod
    def load(cls, directory: str | Path) -> Comparison:
        """Read back what `save` wrote.

        Raises
        ------
        OutputError
            The folder has no results, or they cannot be read.
        """
        from wdanalysis.results.folder import load

        return load(Path(directory))

    def _repr_html_(self) -> str:
        """What Jupyter shows: the summary, what was skipped, and the warnings."""
        skipped = len(self.run.get("skipped", []))
        lines = [
            f"{len(self.metrics)} rows, one vector per {'output' if self.axis == 'out' else 'input'} feature "
            f"(axis = {self.axis})",
            *([f"{skipped} left out; see <code>.skipped</code>"] if skipped else []),
            *(html.escape(warning) for warning in self.warnings),
        ]
        table = self.summary().to_html(index=False, na_rep="", float_format="{:.3g}".format)
        return table + "".join(f"<p>{line}</p>" for line in lines)


def compare(
    base: str | Path,
    tuned: Mapping[str, str | Path | Sequence[str | Path]] | Sequence[str | Path] | str | Path,
    *,
    axis: Axis = "out",
    modules: Sequence[str] | str | None = None,
    layers: Iterable[int] | None = None,
    steps: Collection[int] | None = None,
    alpha: float | None = None,
    diagnostics: bool = True,
    spectra: bool = False,
    progress: Progress | None = None,
    spectra_progress: Progress | None = None,
) -> Comparison:
    """Measure ΔM (Eq. 3) and ΔD (Eq. 4) of every tuned checkpoint against the base.

    Parameters
    ----------
    base
        The pre-trained model: a safetensors or torch file, or a Hugging Face folder.
    tuned
        Methods by name, each a path or several of them; or paths alone, which name their methods themselves.
        A path is a checkpoint file or folder, a PEFT adapter, or a folder of steps (``checkpoint-500/`` …).
    axis
        ``"out"``: one vector per output feature, as the paper's code and PEFT do; ``"in"``: per input feature.
    modules
        Roles (``["q", "v"]``), ``"all"``, or a regular expression on tensor names. None: the attention projections that
        at least one method changed; every changed matrix where no projection is recognised.
    layers
        Layer indices to keep.
    steps
        Training steps to keep.
    alpha
        LoRA's α for adapter files without their `adapter_config.json`.
    diagnostics
        Whether to fill the columns of `wdanalysis.measure.rows.MatrixDiagnostics`: shrink, floors, quantiles.
    spectra
        Whether to take singular values too (`Comparison.spectra`): minutes for a large model.
    progress
        Called with the bytes read and the bytes to read.
    spectra_progress
        Called with the matrices whose singular values are taken and the number of all.

    Returns
    -------
    Comparison

    Raises
    ------
    WdAnalysisError
        A path cannot be read, or there is nothing to compare; the message is one sentence that says what to do.
    ValueError
        `axis` is neither ``"out"`` nor ``"in"``.
    Interrupted
        On Ctrl-C: a KeyboardInterrupt that carries the rows that were measured.
    """
    return compare_paths(
        base,
        _named_paths(tuned),
        axis=axis,
        modules=modules,
        layers=layers,
        steps=steps,
        alpha=alpha,
        diagnostics=diagnostics,
        spectra=spectra,
        progress=progress,
        spectra_progress=spectra_progress,
    )


def compare_paths(
    base: str | Path,
    tuned: Sequence[tuple[str | None, str | Path]],
    *,
    axis: Axis,
    modules: Sequence[str] | str | None,
    layers: Iterable[int] | None,
    steps: Collection[int] | None,
    alpha: float | None,
    diagnostics: bool,
    spectra: bool,
    progress: Progress | None,
    spectra_progress: Progress | None,
) -> Comparison:
    """`compare` for paths of which each may have a name (the command line's --label)."""
    if axis not in get_args(Axis):
        raise ValueError(
            f"axis is 'out' (a vector per output feature) or 'in' (per input feature), not {axis!r}"
        )
    started = time.time()
    layers = None if layers is None else sorted(set(layers))
    base_checkpoint = open_checkpoint(base)
    methods = _open_methods(tuned, alpha=alpha, steps=steps)
    planned = plan(base_checkpoint, methods, modules=modules, layers=layers)
    inputs = {
        "BASE": input_files([base_checkpoint]),
        **{m: input_files(s.checkpoints) for m, s in methods.items()},
    }
    opened = time.time()
    seconds = {"open": round(opened - started, 3)}
    rows: list[MatrixChange] = []
    singular: Spectra | None = None
    interrupted = False
    try:
        for measured in stream(planned, axis, diagnostics=diagnostics, progress=progress):
            if not rows:
                _import_beside("wdanalysis.analysis.table", "wdanalysis.analysis.readings")
            rows.extend(measured)
        seconds["measure"] = round(time.time() - opened, 3)
        if spectra:
            from wdanalysis.measure.spectra import SpectraInterrupted, measure_spectra

            try:
                singular = measure_spectra(planned, progress=spectra_progress)
            except SpectraInterrupted as partial:
                singular, interrupted = partial.spectra, True
            seconds["spectra"] = round(time.time() - opened - seconds["measure"], 3)
    except KeyboardInterrupt:
        interrupted = True
        seconds.setdefault("measure", round(time.time() - opened, 3))
    from wdanalysis.analysis.table import keep_changed, metrics_table

    metrics, warnings = keep_changed(metrics_table(rows, list(methods)), planned)
    warnings = [*_notes(base_checkpoint, methods), *planned.notes, *warnings]
    options = {
        "axis": axis,
        "modules": modules if modules is None or isinstance(modules, str) else list(modules),
        "layers": layers,
        "steps": None if steps is None else sorted(steps),
        "alpha": alpha,
        "diagnostics": diagnostics,
        "spectra": spectra,
    }
    run = {
        "versions": versions(),
        "command": sys.argv if Path(sys.argv[0]).stem in {"wd-analyze", "cli"} else None,
        "options": options,
        "complete": not interrupted,
        "matrices": {"measured": len(rows), "in_table": len(metrics)},
        "inputs": inputs,
        "skipped": [dataclasses.asdict(skip) for skip in planned.skipped],
        "warnings": list(dict.fromkeys(warnings)),
        "seconds": seconds,
        "bytes_read": planned.nbytes,
    }
    comparison = Comparison(metrics, encodable(run), singular)
    if interrupted:
        raise Interrupted(comparison)
    return comparison


def _import_beside(*modules: str) -> None:
    """Import in a thread what is needed last and takes long (pandas, scipy): kernels leave the interpreter free."""
    Thread(target=lambda: [import_module(module) for module in modules], daemon=True).start()


def _open_methods(
    named: Sequence[tuple[str | None, str | Path]], *, alpha: float | None, steps: Collection[int] | None
) -> dict[str, Series]:
    """Open every method's checkpoints; paths that name the same method are steps of one series.

    Raises
    ------
    ComparisonError
        No path is given, or two checkpoints of a method have the same step.
    """
    if not named:
        raise ComparisonError("nothing to compare BASE with: give at least one tuned checkpoint")
    several = len(named) > 1
    found: dict[str, list[Series]] = {}
    homes: dict[str, tuple[str, str | Path]] = {}
    for label, path in named:
        # A path may hold only some of the steps that are asked for, as long as another holds the rest.
        series = open_series(path, alpha=alpha, steps=None if several else steps)
        name = str(encodable(label or series.name))
        # One name from two places is two methods, unless the user says that it is one.
        home = f"label {label}" if label else os.path.dirname(os.path.realpath(path))
        known = homes.setdefault(name, (home, path))
        if known[0] != home:
            raise ComparisonError(
                f"{known[1]} and {path} would both be called {name!r}: name one of them with --label NAME={path}"
            )
        found.setdefault(name, []).append(series)
    methods = {name: _joined(name, parts) for name, parts in found.items()}
    return _keep_steps(methods, steps) if several and steps is not None else methods


def _named_paths(
    tuned: Mapping[str, str | Path | Sequence[str | Path]] | Sequence[str | Path] | str | Path,
) -> list[tuple[str | None, str | Path]]:
    if isinstance(tuned, str | Path):
        return [(None, tuned)]
    if isinstance(tuned, Mapping):
        return [
            (name, path)
            for name, paths in tuned.items()
            for path in ([paths] if isinstance(paths, str | Path) else paths)
        ]
    return [(None, path) for path in tuned]


def _joined(name: str, parts: Sequence[Series]) -> Series:
    """One series of all that is called `name`."""
    if len(parts) == 1:
        return parts[0]
    checkpoints = sorted(
        (checkpoint for part in parts for checkpoint in part.checkpoints),
        key=lambda c: (c.step is None, c.step),
    )
    for one, other in itertools.pairwise(checkpoints):
        if one.step == other.step:
            at = "no known step" if one.step is None else f"step {one.step}"
            if os.path.realpath(one.path) == os.path.realpath(other.path):
                raise ComparisonError(f"{one.path} is given twice for {name!r}; leave one out")
            raise ComparisonError(
                f"{one.path} and {other.path} are both called {name!r} and have {at}: "
                f"name one of them with --label NAME={other.path}"
            )
    notes = tuple(note for part in parts for note in part.notes)
    return Series(parts[0].path, name, tuple(checkpoints), notes)


def _keep_steps(methods: Mapping[str, Series], steps: Collection[int]) -> dict[str, Series]:
    wanted = set(steps)
    known = {checkpoint.step for series in methods.values() for checkpoint in series.checkpoints}
    if missing := sorted(wanted - known):
        there = ", ".join(str(step) for step in sorted(step for step in known if step is not None)) or "none"
        raise ComparisonError(f"no checkpoint has step {missing[0]}: the known steps are {there}")
    kept = {}
    for name, series in methods.items():
        checkpoints = tuple(c for c in series.checkpoints if c.step in wanted)
        if not checkpoints:
            raise ComparisonError(
                f"{series.path} has none of the steps {', '.join(map(str, sorted(wanted)))}"
            )
        kept[name] = dataclasses.replace(series, checkpoints=checkpoints)
    return kept


def _notes(base: Checkpoint, methods: Mapping[str, Series]) -> list[str]:
    notes = list(base.notes)
    for series in methods.values():
        notes.extend(series.notes)
        for checkpoint in series.checkpoints:
            notes.extend(checkpoint.notes)
        mismatches = (base_mismatch(base, checkpoint) for checkpoint in series.checkpoints)
        notes.extend([sentence for sentence in mismatches if sentence][:1])
    return notes

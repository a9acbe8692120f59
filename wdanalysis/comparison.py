"""The facade: compare checkpoints, and read, draw, save and load what was found."""

from __future__ import annotations

import dataclasses
import html
import itertools
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

from wdanalysis.checkpoints import open_checkpoint, open_series
from wdanalysis.checkpoints.model import base_mismatch
from wdanalysis.checkpoints.storage import Progress
from wdanalysis.checkpoints.tensors import Checkpoint, Series
from wdanalysis.decomposition import Axis
from wdanalysis.errors import ComparisonError, OutputError
from wdanalysis.measure.plan import Plan, plan
from wdanalysis.measure.rows import MatrixChange
from wdanalysis.measure.stream import stream
from wdanalysis.results import folder
from wdanalysis.results.provenance import Matrices, Options, Run, Seconds, inputs_of, versions
from wdanalysis.results.vectors import Vectors, VectorsFile
from wdanalysis.writing import encodable

if TYPE_CHECKING:
    import pandas as pd

    from wdanalysis.analysis.findings import Findings
    from wdanalysis.figures import Figure
    from wdanalysis.measure.spectra import Spectra

PathLike: TypeAlias = str | Path
Named: TypeAlias = tuple[str | None, PathLike]
"""A method's name and a path of it; None: the path's own name."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a comparison; `comparison` holds what was measured until then."""

    def __init__(self, comparison: Comparison) -> None:
        super().__init__()
        self.comparison = comparison


@dataclass(frozen=True, eq=False)
class Comparison:
    """ΔM and ΔD of every compared matrix, and how they came about.

    Two comparisons are equal only where they are one and the same; compare their tables.

    Attributes
    ----------
    metrics
        A row for every method, step and matrix, with the columns that `wdanalysis.analysis.table.COLUMNS` lists.
    run
        Provenance: versions, options, input files, what was skipped and why, warnings, timings.
    spectra
        Singular values of every base, tuned matrix and update, where they were asked for.
    vectors
        What tuning did to every single vector, where it was asked for: `vectors.read(module="q")` reads it.

    Examples
    --------
    >>> run.methods, run.modules, run.axis
    (['ft', 'dora'], ['q', 'v'], 'out')
    >>> run.summary()[["method", "module", "matrices", "step"]].head(2)
      method module  matrices  step
    0     ft      q        10   240
    1     ft      v        10   240
    """

    metrics: pd.DataFrame
    run: Run = field(default_factory=Run)
    spectra: Spectra | None = None
    vectors: Vectors | None = None

    @property
    def axis(self) -> str:
        """What a vector is: ``"out"``, an output feature, or ``"in"``, an input feature.

        Both, with "and" between them, for a table that mixes them; "" for one without rows.
        """
        return self._findings.axis

    @property
    def methods(self) -> list[str]:
        """The methods, in the order in which they were given."""
        return self._findings.methods

    @property
    def modules(self) -> list[str]:
        """The module roles, in the order of the table."""
        return self._findings.modules

    @property
    def skipped(self) -> pd.DataFrame:
        """What a checkpoint holds and the table does not: method, step, name, reason."""
        import pandas as pd

        return pd.DataFrame(self.run.skipped, columns=["method", "step", "name", "reason"])

    @property
    def warnings(self) -> list[str]:
        """Sentences that a reader of the numbers should know."""
        return list(self.run.warnings)

    @cached_property
    def _findings(self) -> Findings:
        from wdanalysis.analysis.findings import Findings

        return Findings(self.metrics)

    def correlations(self) -> pd.DataFrame:
        """Pearson, Spearman and the regression of ΔM on ΔD, for each method, module and scope.

        See `wdanalysis.analysis.regression.correlations` for scopes and columns.

        Examples
        --------
        >>> table = run.correlations().query("scope == 'pooled'")
        >>> table[["method", "module", "n", "pearson_r"]].round(2)
           method module   n  pearson_r
        0      ft      q  40      -0.01
        17     ft      v  40      -0.35
        34   dora      q  40       0.46
        51   dora      v  40       0.59
        """
        return self._findings.correlations.copy()

    def summary(self) -> pd.DataFrame:
        """A row for each method and module: matrices, steps, mean ΔM and ΔD at the last step, pooled r and slope.

        Examples
        --------
        >>> run.summary()[["method", "module", "matrices", "step", "delta_m", "delta_d"]].round(3)
          method module  matrices  step  delta_m  delta_d
        0     ft      q        10   240    0.016    0.021
        1     ft      v        10   240    0.011    0.036
        2   dora      q        10   240    0.034    0.063
        3   dora      v        10   240    0.032    0.064
        """
        return self._findings.summary.copy()

    def diagnostics(self) -> pd.DataFrame:
        """The shrink that is common to all matrices of a checkpoint, and how much of their change it explains.

        See `wdanalysis.analysis.shrink.common_shrink` for the columns.

        Examples
        --------
        >>> run.diagnostics().query("step == 240")[["method", "common_shrink", "explains"]].round(3)
          method  common_shrink  explains
        3     ft         -0.026     False
        7   dora          0.006     False
        """
        return self._findings.diagnostics.copy()

    def readings(self) -> pd.DataFrame:
        """What the numbers of each method and module say, in sentences; see `wdanalysis.analysis.readings`.

        Examples
        --------
        >>> run.readings()["sentence"].iloc[2]
        'ΔM rises with ΔD within every layer; across layers ΔM falls as ΔD rises (r = −0.68, n = 10).'
        """
        return self._findings.readings.copy()

    def scatter(self, module: str, **options: Any) -> Figure:
        """ΔM over ΔD, a panel a method (Figures 2 and 7). Options as in `wdanalysis.figures.scatter`.

        Examples
        --------
        >>> figure = run.scatter("q")
        >>> figure.savefig(tmp / "scatter.png")
        """
        from wdanalysis import figures

        return figures.scatter(self.metrics, module, **options)

    def layers(self, module: str, **options: Any) -> Figure:
        """ΔM and ΔD by layer (Figures 3 and 8). Options as in `wdanalysis.figures.layers`.

        Examples
        --------
        >>> figure = run.layers("q")
        >>> figure.savefig(tmp / "layers.png")
        """
        from wdanalysis import figures

        return figures.layers(self.metrics, module, **options)

    def trajectory(self, module: str, **options: Any) -> Figure:
        """ΔM and ΔD by training step. Options as in `wdanalysis.figures.trajectory`.

        Examples
        --------
        >>> figure = run.trajectory("q")
        >>> figure.savefig(tmp / "trajectory.png")
        """
        from wdanalysis import figures

        return figures.trajectory(self.metrics, module, **options)

    def heatmap(self, method: str, **options: Any) -> Figure:
        """ΔM and ΔD by layer and module. Options as in `wdanalysis.figures.heatmap`.

        Examples
        --------
        >>> figure = run.heatmap("dora")
        >>> figure.savefig(tmp / "heatmap.png")
        """
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

        Examples
        --------
        >>> run.report(tmp / "report.html").name
        'report.html'
        """
        from wdanalysis import report

        return report.write(Path(path), self._findings, self.run, self.spectra)

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

        Examples
        --------
        >>> written = run.save(tmp / "results", figures=["layers"], report=False)
        >>> [path.name for path in written if path.suffix == ".png"]
        ['layers_q.png', 'layers_v.png']
        """
        from wdanalysis import report as page
        from wdanalysis.figures import batch
        from wdanalysis.figures.kinds import KINDS

        directory = Path(directory)
        kinds = KINDS if figures is None else figures
        planned = batch.planned_figures(self.metrics, kinds, format)
        folder.check_free(directory, force=force)
        with batch.drawing(self.metrics, planned, directory / folder.FIGURES, format=format) as finish:

            def others() -> list[Path]:
                with _tables_are_whole(directory):
                    pages = (
                        [self.report(directory / folder.REPORT_HTML)]
                        if report and page.is_available()
                        else []
                    )
                    return [*finish(), *pages]

            return folder.save(directory, self._findings, self.run, self.spectra, self.vectors, others=others)

    @classmethod
    def load(cls, directory: str | Path) -> Comparison:
        """Read back what `save` wrote.

        Raises
        ------
        OutputError
            The folder has no results, or they cannot be read.

        Examples
        --------
        >>> _ = run.save(tmp / "results", figures=[], report=False)
        >>> wd.Comparison.load(tmp / "results").methods
        ['ft', 'dora']
        """
        saved = folder.load(Path(directory))
        return cls(saved.metrics, saved.run, saved.spectra, saved.vectors)

    def _repr_html_(self) -> str:
        """What Jupyter shows: the summary, what was skipped, and the warnings."""
        features = {"out": "one vector per output feature", "in": "one vector per input feature"}
        lines = [
            f"{len(self.metrics)} rows, {features.get(self.axis, 'vectors')} (axis = {self.axis})",
            *([f"{len(self.run.skipped)} left out; see <code>.skipped</code>"] if self.run.skipped else []),
            *(html.escape(warning) for warning in self.warnings),
        ]
        table = self.summary().to_html(index=False, na_rep="", float_format="{:.3g}".format)
        return table + "".join(f"<p>{line}</p>" for line in lines)


def redraw(directory: Path, *, figures: Iterable[str], format: str = "png") -> list[Path]:
    """Draw the figures of saved results again, replacing those of the same name.

    Raises
    ------
    OutputError
        There are no results, or the folder cannot be written.
    """
    from wdanalysis.figures.batch import save_figures

    comparison = Comparison.load(directory)
    with _tables_are_whole(directory):
        drawn = save_figures(comparison.metrics, directory / folder.FIGURES, kinds=figures, format=format)
    folder.add(directory, comparison.run, drawn)
    return drawn


def rewrite_report(directory: Path) -> Path:
    """Write the page of saved results, replacing the one that is there.

    Raises
    ------
    OutputError
        There are no results, the folder cannot be written, or the extra `report` is not installed.
    """
    comparison = Comparison.load(directory)
    written = comparison.report(directory / folder.REPORT_HTML)
    folder.add(directory, comparison.run, [written])
    return written


@contextmanager
def _tables_are_whole(directory: Path) -> Iterator[None]:
    """Say of what hinders drawing that the tables are there."""
    try:
        yield
    except OutputError as error:
        raise OutputError(
            f"{error} The tables there are whole; `wd-analyze plot {directory}` draws the figures from them."
        ) from error


def compare(
    base: PathLike,
    tuned: Mapping[str, PathLike | Sequence[PathLike]] | Sequence[PathLike | Named] | PathLike,
    *,
    axis: Axis = "out",
    modules: Sequence[str] | str | None = None,
    layers: Iterable[int] | None = None,
    steps: Collection[int] | None = None,
    alpha: float | None = None,
    diagnostics: bool = True,
    spectra: bool = False,
    vectors: bool = False,
    progress: Progress | None = None,
    spectra_progress: Progress | None = None,
) -> Comparison:
    """Measure ΔM (Eq. 3) and ΔD (Eq. 4) of every tuned checkpoint against the base.

    Parameters
    ----------
    base
        The pre-trained model: a safetensors or torch file, or a Hugging Face folder.
    tuned
        Methods by name, each a path or several of them; or paths alone, which name their methods themselves; or pairs
        of a name (None: the path's own) and a path.
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
    vectors
        Whether to keep what each vector did (`Comparison.vectors`): about 10 bytes a vector, in a temporary file until
        it is saved.
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

    Examples
    --------
    >>> samples = "sample_checkpoints/"
    >>> compared = wd.compare(samples + "base", {"DoRA": samples + "dora"}, modules=["q"], layers=range(2))
    >>> compared.metrics[["method", "step", "layer", "delta_m", "delta_d"]].round(4).head(2)
      method  step  layer  delta_m  delta_d
    0   DoRA    60      0   0.0273   0.0260
    1   DoRA    60      1   0.0251   0.0227
    """
    if axis not in get_args(Axis):
        raise ValueError(
            f"axis is 'out' (a vector per output feature) or 'in' (per input feature), not {axis!r}"
        )
    started = time.time()
    layers = None if layers is None else sorted(set(layers))
    base_checkpoint = open_checkpoint(base)
    methods = _open_methods(_named_paths(tuned), alpha=alpha, steps=steps)
    planned = plan(base_checkpoint, methods, modules=modules, layers=layers)
    inputs = {
        "BASE": inputs_of([base_checkpoint]),
        **{method: inputs_of(series.checkpoints) for method, series in methods.items()},
    }
    opened = time.time()
    rows: list[MatrixChange] = []
    complete = True
    with VectorsFile() if vectors else nullcontext() as file:
        keep = None if file is None else file.add
        try:
            for measured in stream(
                planned, axis, diagnostics=diagnostics, keep_vectors=keep, progress=progress
            ):
                rows.extend(measured)
        except KeyboardInterrupt:
            complete = False
    measured_at = time.time()
    singular, complete = (
        _singular_values(planned, spectra_progress) if spectra and complete else (None, complete)
    )
    seconds = Seconds(
        open=round(opened - started, 3),
        measure=round(measured_at - opened, 3),
        spectra=None if singular is None else round(time.time() - measured_at, 3),
    )
    from wdanalysis.analysis.table import keep_changed, metrics_table

    metrics, warnings = keep_changed(metrics_table(rows, list(methods)), planned)
    run = Run(
        versions=versions(),
        options=Options(
            axis=axis,
            modules=modules if modules is None or isinstance(modules, str) else list(modules),
            layers=layers,
            steps=None if steps is None else sorted(steps),
            alpha=alpha,
            diagnostics=diagnostics,
            spectra=spectra,
            vectors=vectors,
        ),
        complete=complete,
        matrices=Matrices(measured=len(rows), in_table=len(metrics)),
        inputs=inputs,
        skipped=planned.skipped,
        warnings=tuple(dict.fromkeys([*_notes(base_checkpoint, methods), *planned.notes, *warnings])),
        seconds=seconds,
        bytes_read=planned.nbytes,
    )
    comparison = Comparison(metrics, encodable(run), singular, None if file is None else file.vectors)
    if not complete:
        raise Interrupted(comparison)
    return comparison


def _singular_values(planned: Plan, progress: Progress | None) -> tuple[Spectra, bool]:
    """The singular values of a plan's matrices, and whether they are of all of them."""
    from wdanalysis.measure.spectra import SpectraInterrupted, measure_spectra

    try:
        return measure_spectra(planned, progress=progress), True
    except SpectraInterrupted as partial:
        return partial.spectra, False


def _open_methods(
    named: Sequence[Named], *, alpha: float | None, steps: Collection[int] | None
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
                f"{known[1]} and {path} would both be called {name!r}; give one of them a name of its own",
                parameter="label",
            )
        found.setdefault(name, []).append(series)
    methods = {name: _joined(name, parts) for name, parts in found.items()}
    return _keep_steps(methods, steps) if several and steps is not None else methods


def _named_paths(
    tuned: Mapping[str, PathLike | Sequence[PathLike]] | Sequence[PathLike | Named] | PathLike,
) -> list[Named]:
    if isinstance(tuned, str | Path):
        return [(None, tuned)]
    if isinstance(tuned, Mapping):
        return [
            (name, path)
            for name, paths in tuned.items()
            for path in ([paths] if isinstance(paths, str | Path) else paths)
        ]
    return [(None, entry) if isinstance(entry, str | Path) else entry for entry in tuned]


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
                f"{one.path} and {other.path} are both called {name!r} and have {at}; "
                "give one of them a name of its own",
                parameter="label",
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

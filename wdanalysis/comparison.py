"""The facade: compare checkpoints, and read, draw, save and load what was found."""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, get_args

from wdanalysis.checkpoints import open_checkpoint, open_series
from wdanalysis.checkpoints.base_identity import base_mismatch
from wdanalysis.checkpoints.schedules import Schedule, find_schedule
from wdanalysis.checkpoints.series import by_run, joined, of_steps, with_common_steps
from wdanalysis.checkpoints.storage import Progress
from wdanalysis.checkpoints.tensors import Checkpoint, Series
from wdanalysis.decomposition import Axis
from wdanalysis.errors import ComparisonError, OutputError
from wdanalysis.measure.plan import Plan, plan
from wdanalysis.measure.rows import MatrixChange
from wdanalysis.measure.stream import stream
from wdanalysis.results import folder
from wdanalysis.results.provenance import Matrices, Options, Run, Seconds, Unfinished, inputs_of, versions
from wdanalysis.results.vectors import Vectors, VectorsFile
from wdanalysis.writing import encodable

if TYPE_CHECKING:
    import pandas as pd

    from wdanalysis.analysis.findings import Findings
    from wdanalysis.figures import Figure
    from wdanalysis.figures.kinds import Look, Title
    from wdanalysis.figures.selection import Names
    from wdanalysis.figures.style import AxLike, Cmap, FigSize
    from wdanalysis.measure.geometry import GeometryOptions
    from wdanalysis.measure.spectra import Spectra
    from wdanalysis.report import Explorer

PathLike: TypeAlias = str | Path
Named: TypeAlias = tuple[str | None, PathLike]
"""A method's name and a path of it; None: the path's own name."""


Phases: TypeAlias = Callable[[str, int, int], None]
"""Called with what is being done (`PHASES`), how much of it is done, and how much there is to do."""

ONE_STACK = "merge_stacks changes nothing: the model has one stack"

PHASES = ("reading", "singular values", "writing tables", "drawing", "writing report")
"""What takes time: bytes are read, matrices decomposed, figures drawn."""

READING, SINGULAR_VALUES, TABLES, DRAWING, REPORT = PHASES


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a comparison; `comparison` holds what was measured until then."""

    def __init__(self, comparison: Comparison) -> None:
        super().__init__()
        self.comparison = comparison


@dataclass(frozen=True, eq=False, repr=False)
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
    schedules
        What the runs' learning rates and weight decay sum up to at each step, with the columns of
        `wdanalysis.analysis.prediction.SCHEDULE_COLUMNS`; None where no schedule was found or given.
    geometry
        How every update lies to its base, where it was asked for; columns as
        `wdanalysis.measure.geometry.GEOMETRY_COLUMNS`.
    vectors
        What tuning did to every single vector, where it was asked for: `vectors.read(module="q")` reads it.

    Examples
    --------
    >>> run.methods, run.modules, run.axis
    (['ft', 'dora'], ['q', 'v'], 'out')
    >>> run.summary()[["method", "module", "step", "badge"]].head(2)
      method module  step               badge
    0     ft      q   240  rests on one layer
    1     ft      v   240                none
    """

    metrics: pd.DataFrame
    run: Run = field(default_factory=Run)
    spectra: Spectra | None = None
    schedules: pd.DataFrame | None = None
    geometry: pd.DataFrame | None = None
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
        """What a checkpoint holds and the table does not: method, step, name, reason, run."""
        import pandas as pd

        return pd.DataFrame(self.run.skipped, columns=["method", "step", "name", "reason", "run"])

    @property
    def warnings(self) -> list[str]:
        """Sentences that a reader of the numbers should know."""
        return list(self.run.warnings)

    @cached_property
    def _findings(self) -> Findings:
        from wdanalysis.analysis.findings import Findings

        return Findings(self.metrics, self.schedules)

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
        """A row for each method and module: the last step with its mean ΔM and ΔD, the pooled r and slope, a badge.

        Examples
        --------
        >>> run.summary()[["method", "module", "step", "delta_m", "delta_d", "badge"]].round(3)
          method module  step  delta_m  delta_d               badge
        0     ft      q   240    0.016    0.021  rests on one layer
        1     ft      v   240    0.011    0.036                none
        2   dora      q   240    0.034    0.063                none
        3   dora      v   240    0.032    0.064                none
        """
        return self._findings.summary.copy()

    def diagnostics(self) -> pd.DataFrame:
        """The shrink that is common to all matrices of a checkpoint, and how much of their change it explains.

        See `wdanalysis.analysis.shrink.common_shrink` for the columns.

        Examples
        --------
        >>> run.diagnostics().query("step == 240")[["method", "common_shrink", "explains"]].round(3)
          method  common_shrink  explains
        3     ft         -0.008     False
        7   dora          0.006     False
        """
        return self._findings.diagnostics.copy()

    def across_runs(self) -> pd.DataFrame:
        """Every run's r and slope, and their means with intervals; without rows where no method has several runs.

        See `wdanalysis.analysis.runs.across_runs` for the columns.

        Examples
        --------
        >>> run.across_runs().empty
        True
        """
        return self._findings.across_runs.copy()

    def readings(self) -> pd.DataFrame:
        """What the numbers of each method and module say, in sentences; see `wdanalysis.analysis.readings`.

        Examples
        --------
        >>> run.readings().query("rule == 'trend'")["sentence"].iloc[0]
        'No clear trend across layers at the same step: r = −0.64 [−0.93, +0.15], 10 layers; q = 0.563 over 4 panels.'
        """
        return self._findings.readings.copy()

    def predictions(self) -> pd.DataFrame:
        """What the runs' schedules predict of ΔM and ΔD, beside what was measured.

        See `wdanalysis.analysis.prediction.predictions` for the columns.

        Examples
        --------
        >>> run.predictions().columns[:4].to_list()
        ['method', 'module', 'axis', 'step']
        >>> run.schedules.query("method == 'dora'")[["step", "s1", "s2", "diffusion", "kept"]].round(5)
           step       s1       s2  diffusion  kept
        4    60  0.21050  0.00074    0.00094   1.0
        5   120  0.36100  0.00113    0.00135   1.0
        6   180  0.45150  0.00127    0.00151   1.0
        7   240  0.48200  0.00129    0.00153   1.0
        """
        return self._findings.predictions.copy()

    def scatter(
        self,
        modules: Names = None,
        *,
        methods: Names = None,
        x: str = "delta_d",
        y: str = "delta_m",
        step: int | None = None,
        share_axes: bool | None = None,
        log: bool | None = None,
        cmap: Cmap | None = None,
        title: Title = "short",
        ax: AxLike | None = None,
        figsize: FigSize | None = None,
    ) -> Figure:
        """ΔM over ΔD, a panel a method (Figures 2 and 7); see `wdanalysis.figures.scatter`.

        Examples
        --------
        >>> figure = run.scatter("q")
        >>> figure.savefig(tmp / "scatter.png")
        """
        from wdanalysis import figures

        return figures.scatter(
            self.metrics,
            modules,
            methods=methods,
            x=x,
            y=y,
            step=step,
            share_axes=share_axes,
            log=log,
            cmap=cmap,
            title=title,
            ax=ax,
            figsize=figsize,
            correlations=self._findings.correlations,
            readings=self._findings.readings,
        )

    def figure2(
        self,
        modules: Names = None,
        *,
        methods: Names = None,
        step: int | None = None,
        share_axes: bool | None = None,
        log: bool | None = None,
        cmap: Cmap | None = None,
        title: Title = "short",
        ax: AxLike | None = None,
        figsize: FigSize | None = None,
    ) -> Figure:
        """The paper's Figures 2 and 7 on one page, stacks together; see `wdanalysis.figures.figure2`.

        Examples
        --------
        >>> figure = run.figure2()
        >>> figure.savefig(tmp / "figure2.png")
        """
        from wdanalysis import figures

        return figures.figure2(
            self.metrics,
            modules,
            methods=methods,
            step=step,
            share_axes=share_axes,
            log=log,
            cmap=cmap,
            title=title,
            ax=ax,
            figsize=figsize,
            correlations=self._findings.correlations,
            readings=self._findings.readings,
        )

    def layers(
        self,
        modules: Names = None,
        *,
        methods: Names = None,
        step: int | None = None,
        log: bool | None = None,
        cmap: Cmap | None = None,
        title: Title = "short",
        ax: AxLike | None = None,
        figsize: FigSize | None = None,
    ) -> Figure:
        """ΔM and ΔD by layer (Figures 3 and 8); see `wdanalysis.figures.layers`.

        Examples
        --------
        >>> figure = run.layers("q")
        >>> figure.savefig(tmp / "layers.png")
        """
        from wdanalysis import figures

        return figures.layers(
            self.metrics,
            modules,
            methods=methods,
            step=step,
            log=log,
            cmap=cmap,
            title=title,
            ax=ax,
            figsize=figsize,
        )

    def figure8(
        self,
        modules: Names = None,
        *,
        methods: Names = None,
        step: int | None = None,
        log: bool | None = None,
        cmap: Cmap | None = None,
        title: Title = "short",
        ax: AxLike | None = None,
        figsize: FigSize | None = None,
    ) -> Figure:
        """The paper's Figures 3 and 8 on one page, stacks together; see `wdanalysis.figures.figure8`.

        Examples
        --------
        >>> figure = run.figure8()
        >>> figure.savefig(tmp / "figure8.png")
        """
        from wdanalysis import figures

        return figures.figure8(
            self.metrics,
            modules,
            methods=methods,
            step=step,
            log=log,
            cmap=cmap,
            title=title,
            ax=ax,
            figsize=figsize,
        )

    def trajectory(
        self,
        modules: Names = None,
        *,
        methods: Names = None,
        log: bool | None = None,
        cmap: Cmap | None = None,
        title: Title = "short",
        ax: AxLike | None = None,
        figsize: FigSize | None = None,
    ) -> Figure:
        """ΔM and ΔD by training step; see `wdanalysis.figures.trajectory`.

        Examples
        --------
        >>> figure = run.trajectory("q")
        >>> figure.savefig(tmp / "trajectory.png")
        """
        from wdanalysis import figures

        return figures.trajectory(
            self.metrics,
            modules,
            methods=methods,
            log=log,
            cmap=cmap,
            title=title,
            ax=ax,
            figsize=figsize,
        )

    def heatmap(
        self,
        modules: Names = None,
        *,
        methods: Names = None,
        step: int | None = None,
        log: bool | None = None,
        cmap: Cmap | None = None,
        title: Title = "short",
        ax: AxLike | None = None,
        figsize: FigSize | None = None,
    ) -> Figure:
        """ΔM and ΔD by layer and module, a row a method; see `wdanalysis.figures.heatmap`.

        Examples
        --------
        >>> figure = run.heatmap(methods="dora")
        >>> figure.savefig(tmp / "heatmap.png")
        """
        from wdanalysis import figures

        return figures.heatmap(
            self.metrics,
            modules,
            methods=methods,
            step=step,
            log=log,
            cmap=cmap,
            title=title,
            ax=ax,
            figsize=figsize,
        )

    def prediction(
        self,
        modules: Names = None,
        *,
        methods: Names = None,
        cmap: Cmap | None = None,
        title: Title = "short",
        ax: AxLike | None = None,
        figsize: FigSize | None = None,
    ) -> Figure:
        """What the runs' schedules predict against what was observed; see `wdanalysis.figures.prediction`."""
        from wdanalysis import figures

        return figures.prediction(
            self._findings.predictions,
            modules,
            methods=methods,
            cmap=cmap,
            title=title,
            ax=ax,
            figsize=figsize,
        )

    def steps(
        self,
        modules: Names = None,
        *,
        methods: Names = None,
        cmap: Cmap | None = None,
        title: Title = "short",
        ax: AxLike | None = None,
        figsize: FigSize | None = None,
    ) -> Figure:
        """Over all choices of four steps, the pooled r; see `wdanalysis.figures.steps`."""
        from wdanalysis import figures

        return figures.steps(
            self._findings.step_choices,
            modules,
            methods=methods,
            cmap=cmap,
            title=title,
            ax=ax,
            figsize=figsize,
            correlations=self._findings.correlations,
        )

    def density(
        self,
        modules: Names = None,
        *,
        methods: Names = None,
        step: int | None = None,
        cmap: Cmap | None = None,
        title: Title = "short",
        ax: AxLike | None = None,
        figsize: FigSize | None = None,
    ) -> Figure:
        """The vectors behind ΔM and ΔD, where they were kept; see `wdanalysis.figures.density`."""
        from wdanalysis import figures

        return figures.density(
            self._kept_vectors(modules),
            modules,
            methods=methods,
            step=step,
            cmap=cmap,
            title=title,
            ax=ax,
            figsize=figsize,
            metrics=self.metrics,
        )

    def _kept_vectors(self, modules: Names) -> pd.DataFrame:
        """The vectors of one module or of all; without rows where they were not kept."""
        import pandas as pd

        if self.vectors is None:
            return pd.DataFrame()
        return self.vectors.read(module=modules if isinstance(modules, str) else None)

    def _tables(self) -> dict[str, pd.DataFrame]:
        """Every table that figures are drawn from, by name; those that this comparison lacks are left out."""
        found = self._findings
        tables = {
            "metrics": found.metrics,
            "correlations": found.correlations,
            "readings": found.readings,
            "predictions": found.predictions,
            "step_choices": found.step_choices,
        }
        vectors = self._last_vectors()
        return tables if vectors is None else {**tables, "vectors": vectors}

    def _last_vectors(self) -> pd.DataFrame | None:
        """The vectors at the last step that all runs of a method have, where they were kept."""
        import pandas as pd

        kept, metrics = self.vectors, self._findings.averaged
        if kept is None or metrics.empty:
            return None
        last = metrics.groupby("method", sort=False)["step"].max()
        parts: list[pd.DataFrame] = [
            kept.read(str(method), step=None if pd.isna(step) else int(step)) for method, step in last.items()
        ]
        return pd.concat(parts, ignore_index=True)

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

        return report.write(Path(path), self._findings, self.run.finished(), self.spectra, self.geometry)

    def save(
        self,
        directory: str | Path,
        *,
        figures: Iterable[str] | None = None,
        look: Look | None = None,
        force: bool = False,
        report: bool = True,
        progress: Phases | None = None,
    ) -> list[Path]:
        """Write tables, provenance, figures and the HTML report into a folder; each file appears whole or not at all.

        Parameters
        ----------
        directory
            Made where it is missing.
        figures
            Which of `wdanalysis.figures.kinds.KINDS` (``scatter``, ``layers`` …); None writes all, an empty list none.
            A kind that nothing is there to draw for writes none.
        look
            How figures are drawn: format, style, size, title and more (`wdanalysis.figures.Look`).
        force
            Replace the results that are in the folder; other files in it stay.
        report
            Whether to write ``report.html``, where the extra `report` is installed.
        progress
            Called with ``"drawing"`` …, what is done of it, and how much there is.

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
        from wdanalysis.figures.kinds import KINDS, Look

        directory, look = Path(directory), look or Look()
        kinds = list(KINDS if figures is None else figures)
        folder.check_free(directory, force=force)
        tell = _telling(progress)
        tell(TABLES, 0, 1)
        tables = self._tables()
        planned = batch.planned_figures(tables, kinds, look)
        _warn_of_missing(kinds, {figure.kind for figure in planned}, tables)
        to_do = Unfinished(figures=kinds, look=dataclasses.asdict(look), report=report)
        drawn_of = partial(tell, DRAWING)
        with batch.drawing(tables, planned, directory / folder.FIGURES, look, drawn_of) as finish:

            def others() -> list[Path]:
                tell(TABLES, 1, 1)
                with _tables_are_whole(directory):
                    pages = self._pages(directory, tell) if report and page.is_available() else []
                    return [*finish(), *pages]

            found = (self._findings, self.run, self.spectra, self.geometry, self.vectors)
            return folder.save(directory, *found, others=others, to_do=to_do)

    def _pages(self, directory: Path, tell: Phases) -> list[Path]:
        tell(REPORT, 0, 1)
        written = [self.report(directory / folder.REPORT_HTML)]
        tell(REPORT, 1, 1)
        return written

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
        return cls(saved.metrics, saved.run, saved.spectra, saved.schedules, saved.geometry, saved.vectors)

    def explore(self, height: int = 800) -> Explorer:
        """Return the linked charts of the report, for a notebook to show: drag over points in one, see them in all.

        Parameters
        ----------
        height
            Of the charts' frame, in pixels.

        Raises
        ------
        OutputError
            Bokeh is not installed.

        Examples
        --------
        >>> run.explore()
        <Linked charts of ft, dora: q, v; 10 layers; steps 60–240; axis out; 160 rows; a notebook shows them, and \
report(path) writes them for a browser>
        """
        from wdanalysis import report

        page = report.render(self._findings, self.run, self.spectra, self.geometry)
        return report.Explorer(page, report.in_words(self._findings), height)

    def __repr__(self) -> str:
        from wdanalysis import report

        return f"<Comparison of {report.in_words(self._findings)}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: summary, a scatter, readings and warnings."""
        from wdanalysis import report

        return report.cell(self._findings, self.run)


def redraw(
    directory: Path,
    *,
    figures: Iterable[str] | None = None,
    look: Look | None = None,
    merge_stacks: bool = False,
    progress: Phases | None = None,
) -> list[Path]:
    """Draw the figures of saved results again, replacing those of the same name, and finish results that are not whole.

    Parameters
    ----------
    directory
        Where the results are.
    figures, look
        As for `Comparison.save`. None: of results that are not finished what they were to have, else all as usual.
    merge_stacks
        Draws encoder, decoder and cross-attention on one panel, also where the tables have them apart.
    progress
        As for `Comparison.save`.

    Returns
    -------
    list of Path
        The figures and their captions; and the report, where it was still to be written.

    Raises
    ------
    OutputError
        There are no results, or the folder cannot be written.
    """
    from wdanalysis import report as page
    from wdanalysis.analysis.table import merged_stacks
    from wdanalysis.figures.batch import drawing, planned_figures
    from wdanalysis.figures.kinds import KINDS, Look

    saved, tell = Comparison.load(directory), _telling(progress)
    to_do = saved.run.unfinished or Unfinished(figures=tuple(KINDS))
    kinds = list(to_do.figures if figures is None else figures)
    look = look or Look(**to_do.look)
    shown = dataclasses.replace(saved, metrics=merged_stacks(saved.metrics)) if merge_stacks else saved
    if merge_stacks and shown.metrics["stack"].nunique() < 2:
        warnings.warn(ONE_STACK, stacklevel=2)
    tables = shown._tables()
    planned = planned_figures(tables, kinds, look)
    _warn_of_missing(kinds, {figure.kind for figure in planned}, tables)
    with drawing(tables, planned, directory / folder.FIGURES, look, partial(tell, DRAWING)) as finish:
        pages = saved._pages(directory, tell) if to_do.report and page.is_available() else []
        written = [*finish(), *pages]
    folder.add(directory, saved.run, written, finishes=True)
    return written


def rewrite_report(directory: Path) -> Path:
    """Write the page of saved results, replacing the one that is there; warn of results that lack more than it.

    Raises
    ------
    OutputError
        There are no results, the folder cannot be written, or the extra `report` is not installed.
    """
    comparison = Comparison.load(directory)
    written = comparison.report(directory / folder.REPORT_HTML)
    if lacking := comparison.run.unfinished:
        warnings.warn(f"the results in {directory} are not finished: {lacking.how}", stacklevel=2)
    folder.add(directory, comparison.run, [written])
    return written


def _telling(progress: Phases | None) -> Phases:
    return progress or (lambda phase, done, total: None)


def _warn_of_missing(
    kinds: Collection[str], planned: Collection[str], tables: Mapping[str, pd.DataFrame]
) -> None:
    """Warn of kinds of figures that were asked for by name and have nothing to show."""
    from wdanalysis.figures.kinds import KINDS

    for kind in kinds:
        if kind not in planned and len(kinds) < len(KINDS):
            table = KINDS[kind].table
            empty = table not in tables or tables[table].empty
            lack = (
                f"this comparison has no {table.replace('_', ' ')}"
                if empty
                else "it needs several layers, steps or modules"
            )
            warnings.warn(f"no {kind} is drawn: {lack}", stacklevel=3)


@contextmanager
def _tables_are_whole(directory: Path) -> Iterator[None]:
    """Say of what hinders drawing that the tables are there."""
    try:
        yield
    except (OutputError, ComparisonError) as error:
        raise OutputError(
            f"{str(error).rstrip('.')}. The tables there are whole; `{folder.finishing(directory)}` draws the figures "
            "from them.",
            parameter=error.parameter,
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
    schedule: Schedule | Mapping[str, Schedule] | None = None,
    weight_decay: float | None = None,
    diagnostics: bool = True,
    spectra: bool = False,
    geometry: bool | GeometryOptions = False,
    merge_stacks: bool = False,
    vectors: bool = False,
    progress: Phases | None = None,
) -> Comparison:
    """Measure ΔM (Eq. 3) and ΔD (Eq. 4) of every tuned checkpoint against the base.

    Parameters
    ----------
    base
        The pre-trained model: a safetensors or torch file, or a Hugging Face folder.
    tuned
        Methods by name, each a path or several of them; or paths alone, which name their methods themselves; or pairs
        of a name (None: the path's own) and a path.
        A path is a checkpoint file or folder, a PEFT adapter, a folder of steps (``checkpoint-500/`` …), or a folder of
        runs of one method (``seed-0/`` …). Several paths of one name are one series where their steps differ; where
        they hold the same steps they are runs of the method.
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
    schedule
        The runs' learning rates and weight decay, for `Comparison.predictions`: one for all methods, or one by the name
        of a method. None, and for a method without one: what the files beside each run's checkpoints tell
        (`training.json` with `losses.csv`, or `trainer_state.json`).
    weight_decay
        Of runs whose files tell learning rates and no weight decay (`trainer_state.json`); None takes 0.
    diagnostics
        Whether to fill the columns of `wdanalysis.measure.rows.MatrixDiagnostics`: shrink, floors, quantiles.
    spectra
        Whether to take singular values too (`Comparison.spectra`): minutes for a large model.
    geometry
        Whether to take sparsity, spectral shift, principal angles, overlaps and tails too (`Comparison.geometry`):
        slower still. A `wdanalysis.measure.geometry.GeometryOptions` chooses how many directions and elements.
    merge_stacks
        Whether to take encoder, decoder and cross-attention together
        (`wdanalysis.analysis.table.merged_stacks`).
    vectors
        Whether to keep what each vector did (`Comparison.vectors`): about 10 bytes a vector, in a temporary file until
        it is saved.
    progress
        Called with ``"reading"``, the bytes read and the bytes to read; then with ``"singular values"``, the matrices
        whose singular values or geometry are taken, and the number of all.

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
    started, tell = time.time(), _telling(progress)
    layers = None if layers is None else sorted(set(layers))
    base_checkpoint = open_checkpoint(base)
    methods = _open_methods(_named_paths(tuned), alpha=alpha, steps=steps)
    if alpha is not None and not _any_adapter(methods):
        raise ComparisonError(
            "alpha is that of adapters, and none is compared: leave it out", parameter="alpha"
        )
    known, on_schedules = _schedules(methods, schedule, weight_decay)
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
                planned, axis, diagnostics=diagnostics, keep_vectors=keep, progress=partial(tell, READING)
            ):
                rows.extend(measured)
        except KeyboardInterrupt:
            complete = False
    measured_at = time.time()
    whole = _WholeMatrices(spectra=spectra, geometry=geometry)
    if complete and whole.takers:
        complete = whole.observe(planned, partial(tell, SINGULAR_VALUES))
    seconds = Seconds(
        open=round(opened - started, 3),
        measure=round(measured_at - opened, 3),
        spectra=round(time.time() - measured_at, 3) if whole.observed else None,
    )
    from wdanalysis.analysis.prediction import schedule_table
    from wdanalysis.analysis.table import keep_changed, merged_stacks, metrics_table

    metrics, on_metrics = keep_changed(metrics_table(rows, list(methods)), planned)
    metrics = merged_stacks(metrics) if merge_stacks else metrics
    if merge_stacks and metrics["stack"].nunique() < 2:
        on_metrics = [*on_metrics, ONE_STACK]
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
            geometry=dataclasses.asdict(whole.options) if whole.options else None,
            merge_stacks=merge_stacks or None,
            vectors=vectors,
        ),
        complete=complete,
        matrices=Matrices(measured=len(rows), in_table=len(metrics)),
        inputs=inputs,
        skipped=planned.skipped,
        warnings=tuple(
            dict.fromkeys([*_notes(base_checkpoint, methods), *planned.notes, *on_schedules, *on_metrics])
        ),
        seconds=seconds,
        bytes_read=planned.nbytes,
    )
    steps = metrics["step"].astype(object).where(metrics["step"].notna(), None)
    schedules = schedule_table(known, zip(metrics["method"], metrics["run"], steps, strict=True))
    singular, geometry_table = whole.tables()
    comparison = Comparison(
        metrics,
        encodable(run),
        singular,
        schedules if len(schedules) else None,
        geometry_table,
        None if file is None else file.vectors,
    )
    if not complete:
        raise Interrupted(comparison)
    return comparison


def _any_adapter(methods: Mapping[str, Series]) -> bool:
    return any(checkpoint.is_adapter for series in methods.values() for checkpoint in series.checkpoints)


def _schedules(
    methods: Mapping[str, Series],
    given: Schedule | Mapping[str, Schedule] | None,
    weight_decay: float | None,
) -> tuple[dict[tuple[str, str], Schedule], list[str]]:
    """The schedule of each method's run that has one, and sentences on what they lack.

    Raises
    ------
    ComparisonError
        One is given for a method that is not compared; or a weight decay, and nothing lacks it.
    """
    by_method = dict.fromkeys(methods, given) if isinstance(given, Schedule) else given or {}
    if unknown := sorted(by_method.keys() - methods.keys()):
        raise ComparisonError(
            f"a schedule is given for {unknown[0]}, which is not compared: the methods are {', '.join(methods)}",
            parameter="schedule",
        )
    known: dict[tuple[str, str], Schedule] = {}
    notes, all_tell = [], True
    for method, series in methods.items():
        for run, of_run in by_run(series).items():
            schedule = by_method.get(method) or find_schedule(of_run)
            if schedule is None:
                continue
            name = f"{method}, {run}" if run else method
            tells = schedule.weight_decay is not None
            all_tell = all_tell and tells
            if not tells and weight_decay is None:
                notes.append(
                    f"{schedule.source} does not tell the weight decay of {name}: predictions from it take 0"
                )
            if tells and weight_decay is not None:
                notes.append(f"{schedule.source} tells the weight decay of {name}: the one given is not used")
            steps = [checkpoint.step for checkpoint in of_run.checkpoints]
            if given and not any(step is not None for step in steps):
                notes.append(f"nothing is predicted of {name}: no step of its checkpoints is known")
            last = len(schedule.learning_rates)
            if any((step or 0) > last for step in steps):
                notes.append(f"the schedule of {name} ends at step {last}: nothing is predicted beyond")
            known[method, str(encodable(run))] = schedule.with_decay(weight_decay)
    if weight_decay is not None and all_tell:
        raise ComparisonError(
            "a weight decay is given, and "
            + ("every schedule tells its own" if known else "no schedule is known")
            + ": leave it out",
            parameter="weight_decay",
        )
    return known, notes


class _WholeMatrices:
    """What is taken of whole matrices, in one walk: spectra and geometry."""

    def __init__(self, *, spectra: bool, geometry: bool | GeometryOptions) -> None:
        from wdanalysis.measure.geometry import GeometryOptions, GeometryTaker
        from wdanalysis.measure.spectra import SpectraTaker

        self.options = GeometryOptions() if geometry is True else geometry or None
        self._geometry = GeometryTaker(self.options) if self.options else None
        self._spectra = SpectraTaker() if spectra else None
        self.takers = [taker for taker in (self._geometry, self._spectra) if taker]
        self.observed = False

    def observe(self, planned: Plan, progress: Progress) -> bool:
        """Take it of a plan's matrices; False where Ctrl-C cut that short."""
        from wdanalysis.measure.spectra import observe

        self.observed = True
        directions = self.options.directions if self.options else 0
        try:
            observe(planned, self.takers, directions=directions, progress=progress)
        except KeyboardInterrupt:
            return False
        return True

    def tables(self) -> tuple[Spectra | None, pd.DataFrame | None]:
        """What was taken; None for what was not begun."""
        return (
            self._spectra.spectra() if self._spectra and self.observed else None,
            self._geometry.table() if self._geometry and self.observed else None,
        )


def _open_methods(
    named: Sequence[Named], *, alpha: float | None, steps: Collection[int] | None
) -> dict[str, Series]:
    """Open every method's checkpoints; paths that name the same method are steps of one series, or its runs.

    Raises
    ------
    ComparisonError
        No path is given, a path is given twice, or one name comes from two places without a label.
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
    methods = {name: joined(name, parts) for name, parts in found.items()}
    methods = _keep_steps(methods, steps) if several and steps is not None else methods
    return {name: with_common_steps(series) for name, series in methods.items()}


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


def _keep_steps(methods: Mapping[str, Series], steps: Collection[int]) -> dict[str, Series]:
    wanted = set(steps)
    known = {checkpoint.step for series in methods.values() for checkpoint in series.checkpoints}
    if missing := sorted(wanted - known):
        there = ", ".join(str(step) for step in sorted(step for step in known if step is not None)) or "none"
        raise ComparisonError(f"no checkpoint has step {missing[0]}: the known steps are {there}")
    kept = {}
    for name, series in methods.items():
        kept[name] = of_steps(series, wanted)
        if not kept[name].checkpoints:
            raise ComparisonError(
                f"{series.path} has none of the steps {', '.join(map(str, sorted(wanted)))}"
            )
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

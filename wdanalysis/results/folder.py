"""A comparison as a folder: tables, provenance, and what others draw beside them, each file whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import shlex
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wdanalysis.errors import OutputError
from wdanalysis.results.provenance import Run, Unfinished
from wdanalysis.results.vectors import VECTORS_PARQUET, Vectors
from wdanalysis.writing import first_line, plain_errors, write_whole

if TYPE_CHECKING:
    import pandas as pd

    from wdanalysis.analysis.findings import Findings
    from wdanalysis.measure.spectra import Spectra

METRICS_CSV = "metrics.csv"
METRICS_PARQUET = "metrics.parquet"
CORRELATIONS_CSV = "correlations.csv"
DIAGNOSTICS_CSV = "diagnostics.csv"
RUNS_CSV = "runs.csv"
READINGS_CSV = "readings.csv"
SCHEDULES_CSV = "schedules.csv"
PREDICTIONS_CSV = "predictions.csv"
SPECTRA_CSV = "spectra.csv"
SPECTRA_PARQUET = "spectra.parquet"
SIMILARITY_CSV = "similarity.csv"
GEOMETRY_CSV = "geometry.csv"
GEOMETRY_PARQUET = "geometry.parquet"
RUN_JSON = "run.json"
REPORT_HTML = "report.html"
FIGURES = "figures"


@dataclass(frozen=True, eq=False)
class Saved:
    """What `load` finds in a folder."""

    metrics: pd.DataFrame
    run: Run
    spectra: Spectra | None
    schedules: pd.DataFrame | None
    geometry: pd.DataFrame | None
    vectors: Vectors | None


def save(
    directory: Path,
    findings: Findings,
    run: Run,
    spectra: Spectra | None = None,
    geometry: pd.DataFrame | None = None,
    vectors: Vectors | None = None,
    *,
    others: Callable[[], Iterable[Path]] = list,
    to_do: Unfinished | None = None,
) -> list[Path]:
    """Write the tables and the provenance of a comparison into a folder, over what is there (see `check_free`).

    The provenance comes first, and says of the folder what it lacks until all is written.

    Parameters
    ----------
    directory
        Made where it is missing.
    findings, run, spectra, geometry, vectors
        What to write.
    others
        Writes what else belongs into the folder, and returns those files. It is called once the tables and provenance
        are whole, so that what a full disk or Ctrl-C cuts short can be made again from them.
    to_do
        What `others` is to write, for whoever has to finish it.

    Returns
    -------
    list of Path
        What was written. What an earlier run wrote and this one did not is removed last.

    Raises
    ------
    OutputError
        The folder cannot be written.
    """
    from wdanalysis.analysis.table import apart

    old, run = _outputs(directory), run.finished()
    lacking = dataclasses.replace(
        to_do or Unfinished(),
        how=f"finish with `{finishing(directory)}`",
        measured=run.complete,
        replaced=_names(directory, old),
    )
    _write_run(directory, _lacking(run, lacking), ())
    tables = [_write_table(directory / name, table) for name, table in _tables(findings, spectra, geometry)]
    tables += [] if vectors is None else [vectors.save(directory, apart(findings.metrics))]
    _write_run(directory, _lacking(run, dataclasses.replace(lacking, tables=False)), tables)
    written = [*tables, *others()]
    return [*written, _finish(directory, run, written, old)]


def _lacking(run: Run, unfinished: Unfinished) -> Run:
    return dataclasses.replace(run, complete=False, unfinished=unfinished)


def _finish(directory: Path, run: Run, written: Sequence[Path], old: Iterable[Path]) -> Path:
    """Note that all is written, and remove what earlier results had and these have not."""
    run_json = _write_run(directory, run, written)
    for stale in {*old} - {*written, run_json}:
        stale.unlink(missing_ok=True)
    return run_json


def finishing(directory: Path) -> str:
    """The command that writes what an unfinished folder lacks."""
    return f"wd-analyze plot {shlex.quote(str(directory))}"


def add(directory: Path, run: Run, written: Iterable[Path], *, finishes: bool = False) -> None:
    """Note in the provenance of saved results what was written beside them since; it may be what they lacked."""
    outputs = sorted(_inside(directory, run.outputs) | set(written))
    if finishes and run.unfinished:
        _finish(directory, run.finished(), outputs, _inside(directory, run.unfinished.replaced))
    else:
        _write_run(directory, run, outputs)


def state(directory: Path) -> str:
    """Say in a sentence what a folder holds whose writing was cut short, and how to go on."""
    run = _run_or_none(directory)
    if run is None or (run.unfinished and run.unfinished.tables):
        return f"{directory} holds no results yet"
    if run.unfinished:
        return f"the tables in {directory} are whole: {run.unfinished.how}"
    return f"{directory} is whole"


def load(directory: Path) -> Saved:
    """Read back what `save` wrote.

    Raises
    ------
    OutputError
        The folder has no results, or they cannot be read.
    """
    import pandas as pd

    from wdanalysis.analysis.table import COLUMNS

    if not directory.is_dir():
        raise OutputError(f"{directory} is no folder; give one that `wd-analyze compare` wrote.")
    noted = _run_or_none(directory)
    if noted and noted.unfinished and noted.unfinished.tables:
        raise OutputError(
            f"the tables in {directory} are not whole, because writing them was cut short: run the comparison again."
        )
    for needed in (METRICS_PARQUET, RUN_JSON):
        if not (directory / needed).is_file():
            raise OutputError(f"{directory} holds no results of `wd-analyze compare`: {needed} is missing.")
    try:
        run = _read_run(directory)
        metrics = pd.read_parquet(directory / METRICS_PARQUET)
    except (OSError, ValueError) as error:
        raise OutputError(f"the results in {directory} cannot be read ({first_line(error)}).") from error
    if missing := [column for column in COLUMNS if column not in metrics]:
        raise OutputError(
            f"{directory / METRICS_PARQUET} lacks the column {missing[0]}; run the comparison again."
        )
    return Saved(
        metrics,
        run,
        _load_spectra(directory) if SPECTRA_PARQUET in run.outputs else None,
        _load_schedules(directory) if SCHEDULES_CSV in run.outputs else None,
        _load_geometry(directory) if GEOMETRY_PARQUET in run.outputs else None,
        Vectors(directory / VECTORS_PARQUET) if VECTORS_PARQUET in run.outputs else None,
    )


def _tables(
    findings: Findings, spectra: Spectra | None, geometry: pd.DataFrame | None
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every table of a comparison by its file's name."""
    yield METRICS_CSV, findings.metrics
    yield METRICS_PARQUET, findings.metrics
    yield CORRELATIONS_CSV, findings.correlations
    if not findings.across_runs.empty:
        yield RUNS_CSV, findings.across_runs
    yield DIAGNOSTICS_CSV, findings.diagnostics
    yield READINGS_CSV, findings.readings
    if findings.schedules is not None:
        yield SCHEDULES_CSV, findings.schedules
    if len(findings.predictions):
        yield PREDICTIONS_CSV, findings.predictions
    if spectra is not None:
        yield SPECTRA_CSV, spectra.matrices
        yield SPECTRA_PARQUET, spectra.matrices
        yield SIMILARITY_CSV, spectra.similarity
    if geometry is not None:
        yield GEOMETRY_CSV, geometry
        yield GEOMETRY_PARQUET, geometry


def _write_table(path: Path, table: pd.DataFrame) -> Path:
    if path.suffix == ".csv":
        return write_whole(path, lambda file: table.to_csv(file, index=False))
    return write_whole(path, lambda file: table.to_parquet(file, index=False))


def _write_run(directory: Path, run: Run, outputs: Iterable[Path]) -> Path:
    names = [*(str(path.relative_to(directory)) for path in outputs), RUN_JSON]
    noted = dataclasses.replace(run, outputs=tuple(dict.fromkeys(names)))
    text = json.dumps(noted.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return write_whole(directory / RUN_JSON, lambda file: file.write(text.encode()))


def _read_run(directory: Path) -> Run:
    """Read the provenance in a folder; OSError or ValueError where that cannot be done."""
    saved: Any = json.loads((directory / RUN_JSON).read_text(encoding="utf-8"))
    try:
        return Run.from_json(saved)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{RUN_JSON} is none of `wd-analyze compare`") from error


def _run_or_none(directory: Path) -> Run | None:
    try:
        return _read_run(directory)
    except (OSError, ValueError):
        return None


def _outputs(directory: Path) -> set[Path]:
    """The files that an earlier run says that it wrote into the folder, or was still to remove."""
    if (run := _run_or_none(directory)) is None:
        return set()
    return _inside(directory, [*run.outputs, *(run.unfinished.replaced if run.unfinished else ())])


def _inside(directory: Path, names: Iterable[str]) -> set[Path]:
    """Those of the named files that are there, and in the folder."""
    inside = directory.resolve()
    paths = (directory / name for name in names)
    return {path for path in paths if path.resolve().is_relative_to(inside) and path.is_file()}


def _names(directory: Path, paths: Iterable[Path]) -> tuple[str, ...]:
    return tuple(sorted(str(path.relative_to(directory)) for path in paths))


def _load_spectra(directory: Path) -> Spectra:
    import pandas as pd

    from wdanalysis.measure.spectra import Spectra

    try:
        return Spectra(
            pd.read_parquet(directory / SPECTRA_PARQUET),
            _similarity(directory / SIMILARITY_CSV),
        )
    except (OSError, ValueError) as error:
        raise OutputError(f"the spectra in {directory} cannot be read ({first_line(error)}).") from error


def _similarity(path: Path) -> pd.DataFrame:
    import pandas as pd

    types: dict[str, Any] = dict.fromkeys(("step_a", "step_b", "layer"), "Int64")
    types |= dict.fromkeys(("run_a", "run_b"), str)
    table = pd.read_csv(path, dtype=types, keep_default_na=False, na_values=[""])
    return table.fillna({"run_a": "", "run_b": ""})


def _load_schedules(directory: Path) -> pd.DataFrame:
    import pandas as pd

    from wdanalysis.analysis.prediction import SCHEDULE_COLUMNS

    types: dict[str, Any] = {"method": str, "step": "Int64", "source": str, "run": str}
    try:
        table: pd.DataFrame = pd.read_csv(
            directory / SCHEDULES_CSV,
            dtype=types,
            keep_default_na=False,
            na_values=[""],
        )
        return table[list(SCHEDULE_COLUMNS)].assign(run=table["run"].fillna(""))
    except (OSError, ValueError, KeyError) as error:
        raise OutputError(
            f"the schedules in {directory} cannot be read ({first_line(error)}); run the comparison again."
        ) from error


def _load_geometry(directory: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        return pd.read_parquet(directory / GEOMETRY_PARQUET)
    except (OSError, ValueError) as error:
        raise OutputError(f"the geometry in {directory} cannot be read ({first_line(error)}).") from error


def check_free(directory: Path, *, force: bool) -> None:
    """Refuse a folder that holds results, or that cannot be written, before any work is done.

    Raises
    ------
    OutputError
        There are results and `force` is False; `directory` is a file, or may not be written.
    """
    with plain_errors(directory):
        if directory.exists() and not directory.is_dir():
            raise OutputError(f"{directory} is a file; give a folder for the results", parameter="directory")
        run = _run_or_none(directory)
        lacking = run.unfinished if run else None
        if lacking and not lacking.tables and not force:
            raise OutputError(
                f"{directory} already holds results that are not finished: {lacking.how}, or replace them",
                parameter="force",
            )
        marks = (METRICS_CSV, METRICS_PARQUET) if lacking else (RUN_JSON, METRICS_CSV, METRICS_PARQUET)
        present = [name for name in marks if (directory / name).exists()]
        if present and not force:
            raise OutputError(
                f"{directory} already holds results ({present[0]}); choose another folder or replace them",
                parameter="force",
            )
        missing = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        try:
            tempfile.TemporaryFile(dir=directory).close()
        finally:
            for path in missing:
                path.rmdir()

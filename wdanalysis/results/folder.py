"""A comparison as a folder: tables, provenance and figures, each file there whole or not at all."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from wdanalysis.comparison import Comparison
from wdanalysis.errors import OutputError
from wdanalysis.figures.batch import KINDS, Helpers, PlannedFigure, drawing, planned_figures
from wdanalysis.report import is_available as report_is_available
from wdanalysis.writing import first_line, plain_errors, write_whole

if TYPE_CHECKING:
    import pandas as pd

    from wdanalysis.measure.spectra import Spectra

METRICS_CSV = "metrics.csv"
METRICS_PARQUET = "metrics.parquet"
CORRELATIONS_CSV = "correlations.csv"
DIAGNOSTICS_CSV = "diagnostics.csv"
READINGS_CSV = "readings.csv"
SPECTRA_CSV = "spectra.csv"
SPECTRA_PARQUET = "spectra.parquet"
SIMILARITY_CSV = "similarity.csv"
RUN_JSON = "run.json"
REPORT_HTML = "report.html"
FIGURES = "figures"


def save(
    comparison: Comparison,
    directory: Path,
    *,
    figures: Iterable[str] | None = None,
    format: str = "png",
    force: bool = False,
    report: bool = True,
) -> list[Path]:
    """Write a comparison into a folder; see `Comparison.save`.

    Tables and provenance come first, so that figures which a full disk or Ctrl-C cut short can be drawn again from
    them; what an earlier run wrote and this one does not is removed last.
    """
    planned = _planned_figures(comparison, KINDS if figures is None else figures, format)
    check_free(directory, force=force)
    old = _outputs(directory)
    with Helpers(len(planned)) as helpers:
        tables = [_write_table(directory / name, table) for name, table in _tables(comparison)]
        run_json = _write_run(comparison, directory, tables)
        with _drawing(comparison, planned, directory, helpers, format) as finish:
            pages = []
            if report and report_is_available():
                pages.append(write_report(comparison, directory / REPORT_HTML))
            drawn = [*finish(), *pages]
    _write_run(comparison, directory, [*tables, *drawn])
    for stale in old - {*tables, *drawn, run_json}:
        stale.unlink(missing_ok=True)
    return [*tables, *drawn, run_json]


def _tables(comparison: Comparison) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every table of a comparison by its file's name."""
    yield METRICS_CSV, comparison.metrics
    yield METRICS_PARQUET, comparison.metrics
    yield CORRELATIONS_CSV, comparison.correlations()
    yield DIAGNOSTICS_CSV, comparison.diagnostics()
    yield READINGS_CSV, comparison.readings()
    if comparison.spectra is not None:
        yield SPECTRA_CSV, comparison.spectra.matrices
        yield SPECTRA_PARQUET, comparison.spectra.matrices
        yield SIMILARITY_CSV, comparison.spectra.similarity


def _write_table(path: Path, table: pd.DataFrame) -> Path:
    if path.suffix == ".csv":
        return write_whole(path, lambda file: table.to_csv(file, index=False))
    return write_whole(path, lambda file: table.to_parquet(file, index=False))


def redraw(directory: Path, *, figures: Iterable[str], format: str = "png") -> list[Path]:
    """Draw the figures of saved results again, replacing those of the same name.

    Raises
    ------
    OutputError
        There are no results, or the folder cannot be written.
    """
    comparison = load(directory)
    planned = _planned_figures(comparison, figures, format)
    with (
        Helpers(len(planned)) as helpers,
        _drawing(comparison, planned, directory, helpers, format) as finish,
    ):
        drawn = finish()
    _write_run(comparison, directory, sorted(_outputs(directory) | set(drawn)))
    return drawn


def write_report(comparison: Comparison, path: Path) -> Path:
    """Write a comparison's page; see `Comparison.report`."""
    from wdanalysis.report import render

    page = render(comparison).encode("utf-8", "backslashreplace")
    return write_whole(path, lambda file: file.write(page))


def rewrite_report(directory: Path) -> Path:
    """Write the page of saved results, replacing the one that is there.

    Raises
    ------
    OutputError
        There are no results, the folder cannot be written, or the extra `report` is not installed.
    """
    comparison = load(directory)
    written = write_report(comparison, directory / REPORT_HTML)
    _write_run(comparison, directory, sorted(_outputs(directory) | {written}))
    return written


def _planned_figures(comparison: Comparison, kinds: Iterable[str], format: str) -> list[PlannedFigure]:
    """The figures to draw; none where nothing has a value."""
    planned = planned_figures(comparison.metrics, kinds, format)
    return planned if comparison.metrics["delta_m"].notna().any() else []


@contextmanager
def _drawing(
    comparison: Comparison,
    planned: Sequence[PlannedFigure],
    directory: Path,
    helpers: Helpers,
    format: str,
) -> Iterator[Callable[[], list[Path]]]:
    """Draw into a folder of results, whose tables are there by then."""
    target = directory / FIGURES
    try:
        with (
            plain_errors(directory),
            drawing(comparison.metrics, planned, target, helpers, format=format) as finish,
        ):
            yield finish
    except OutputError as error:
        raise OutputError(
            f"{error} The tables there are whole; `wd-analyze plot {directory}` draws the figures from them."
        ) from error


def _write_run(comparison: Comparison, directory: Path, outputs: Iterable[Path]) -> Path:
    names = [*(str(path.relative_to(directory)) for path in outputs), RUN_JSON]
    run = {**comparison.run, "outputs": list(dict.fromkeys(names))}
    text = json.dumps(run, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return write_whole(
        directory / RUN_JSON, lambda file: file.write(text.encode("utf-8", "backslashreplace"))
    )


def _outputs(directory: Path) -> set[Path]:
    """The files that an earlier run says that it wrote into the folder."""
    try:
        outputs = _names(json.loads((directory / RUN_JSON).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return set()
    inside = directory.resolve()
    paths = (directory / output for output in outputs)
    return {path for path in paths if path.resolve().is_relative_to(inside) and path.is_file()}


def load(directory: Path) -> Comparison:
    """Read a comparison back from its folder; see `Comparison.load`."""
    import pandas as pd

    from wdanalysis.analysis.table import COLUMNS

    if not directory.is_dir():
        raise OutputError(f"{directory} is no folder; give one that `wd-analyze compare` wrote.")
    for needed in (METRICS_PARQUET, RUN_JSON):
        if not (directory / needed).is_file():
            raise OutputError(f"{directory} holds no results of `wd-analyze compare`: {needed} is missing.")
    try:
        run = json.loads((directory / RUN_JSON).read_text(encoding="utf-8"))
        metrics = pd.read_parquet(directory / METRICS_PARQUET)
    except (OSError, ValueError) as error:
        raise OutputError(f"the results in {directory} cannot be read ({first_line(error)}).") from error
    if missing := [column for column in COLUMNS if column not in metrics]:
        raise OutputError(
            f"{directory / METRICS_PARQUET} lacks the column {missing[0]}; run the comparison again."
        )
    return Comparison(metrics, run, _load_spectra(directory) if SPECTRA_PARQUET in _names(run) else None)


def _names(run: object) -> list[str]:
    """The files that a run says that it wrote."""
    outputs = run.get("outputs") if isinstance(run, dict) else None
    return [str(output) for output in outputs] if isinstance(outputs, list) else []


def _load_spectra(directory: Path) -> Spectra:
    import pandas as pd

    from wdanalysis.measure.spectra import Spectra

    integers = {"step_a": "Int64", "step_b": "Int64", "layer": "Int64"}
    try:
        return Spectra(
            pd.read_parquet(directory / SPECTRA_PARQUET),
            pd.read_csv(directory / SIMILARITY_CSV, dtype=integers, keep_default_na=False, na_values=[""]),
        )
    except (OSError, ValueError) as error:
        raise OutputError(f"the spectra in {directory} cannot be read ({first_line(error)}).") from error


def check_free(directory: Path, *, force: bool) -> None:
    """Refuse a folder that holds results, or that cannot be written, before any work is done.

    Raises
    ------
    OutputError
        There are results and `force` is False; `directory` is a file, or may not be written.
    """
    with plain_errors(directory):
        if directory.exists() and not directory.is_dir():
            raise OutputError(f"{directory} is a file; give a folder for the results with --out.")
        present = [name for name in (RUN_JSON, METRICS_CSV, METRICS_PARQUET) if (directory / name).exists()]
        if present and not force:
            raise OutputError(
                f"{directory} already holds results ({present[0]}); replace them with --force or choose --out."
            )
        missing = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        try:
            tempfile.TemporaryFile(dir=directory).close()
        finally:
            for path in missing:
                path.rmdir()

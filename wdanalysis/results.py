"""A comparison as a folder: tables, provenance and figures, each file there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from wdanalysis.comparison import COLUMNS, Comparison
from wdanalysis.errors import OutputError

if TYPE_CHECKING:
    from io import BufferedWriter

METRICS_CSV = "metrics.csv"
METRICS_PARQUET = "metrics.parquet"
CORRELATIONS_CSV = "correlations.csv"
RUN_JSON = "run.json"
FIGURES = "figures"
FIGURE_KINDS = ("scatter", "layers", "trajectory", "heatmap")


def save(
    comparison: Comparison,
    directory: Path,
    *,
    figures: Iterable[str] | None = None,
    format: str = "png",
    force: bool = False,
) -> list[Path]:
    """Write a comparison into a folder; see `Comparison.save`."""
    check_free(directory, force=force)
    if force:
        _remove_old(directory)
    metrics, correlations = comparison.metrics, comparison.correlations()
    written = [
        _write(directory / METRICS_CSV, lambda file: metrics.to_csv(file, index=False)),
        _write(directory / METRICS_PARQUET, lambda file: metrics.to_parquet(file, index=False)),
        _write(directory / CORRELATIONS_CSV, lambda file: correlations.to_csv(file, index=False)),
    ]
    kinds = FIGURE_KINDS if figures is None else tuple(figures)
    written_figures = draw(comparison, directory, kinds=kinds, format=format)
    outputs = [str(path.relative_to(directory)) for path in [*written, *written_figures]]
    run = {**comparison.run, "outputs": [*outputs, RUN_JSON]}
    text = json.dumps(run, indent=2, ensure_ascii=False) + "\n"
    return [*written, *written_figures, _write(directory / RUN_JSON, lambda file: file.write(text.encode()))]


def draw(comparison: Comparison, directory: Path, *, kinds: Iterable[str], format: str = "png") -> list[Path]:
    """Write the figures of a comparison into `directory/figures`, replacing those of the same name.

    Raises
    ------
    OutputError
        The folder cannot be written.
    """
    kinds = list(kinds)
    if not kinds or not comparison.metrics["delta_m"].notna().any():
        return []
    from wdanalysis.figures import save_figures

    with _plain_errors(directory):
        target = directory / FIGURES
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".drawing-") as beside:
            drawn = save_figures(comparison.metrics, beside, kinds=kinds, format=format)
            return [path.replace(target / path.name) for path in drawn]


def load(directory: Path) -> Comparison:
    """Read a comparison back from its folder; see `Comparison.load`."""
    for needed in (METRICS_PARQUET, RUN_JSON):
        if not (directory / needed).is_file():
            raise OutputError(f"{directory} holds no results of `wd-analyze compare`: {needed} is missing.")
    try:
        run = json.loads((directory / RUN_JSON).read_text(encoding="utf-8"))
        metrics = pd.read_parquet(directory / METRICS_PARQUET)
    except (OSError, ValueError) as error:
        raise OutputError(f"the results in {directory} cannot be read ({_first_line(error)}).") from error
    if missing := [column for column in COLUMNS if column not in metrics]:
        raise OutputError(
            f"{directory / METRICS_PARQUET} lacks the column {missing[0]}; run the comparison again."
        )
    return Comparison(metrics, run)


def check_free(directory: Path, *, force: bool) -> None:
    """Refuse a folder that already holds results, and a path that is no folder, before any work is done.

    Raises
    ------
    OutputError
        There are results and `force` is False, or `directory` is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise OutputError(f"{directory} is a file; give a folder for the results with --out.")
    present = [name for name in (RUN_JSON, METRICS_CSV, METRICS_PARQUET) if (directory / name).exists()]
    if present and not force:
        raise OutputError(
            f"{directory} already holds results ({present[0]}); replace them with --force or choose --out."
        )


def _remove_old(directory: Path) -> None:
    """Remove what an earlier run says that it wrote, so that no figure of it stays among the new ones."""
    try:
        outputs = json.loads((directory / RUN_JSON).read_text(encoding="utf-8")).get("outputs", [])
    except (OSError, ValueError, AttributeError):
        return
    inside = directory.resolve()
    for output in outputs:
        path = directory / str(output)
        if path.resolve().is_relative_to(inside) and path.is_file():
            path.unlink()


def _write(path: Path, fill: Callable[[BufferedWriter], Any]) -> Path:
    """Write beside, then rename: a file is whole or not there."""
    with _plain_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(beside, 0o666 & ~_umask())
            return Path(beside).replace(path)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise


@contextmanager
def _plain_errors(directory: Path) -> Iterator[None]:
    """Turn what the file system refuses into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(_existing(directory)).free
            reason = f"the disk is full ({free / 1e6:.1f} MB free)"
        else:
            reason = error.strerror or _first_line(error)
        raise OutputError(f"results cannot be written to {directory}: {reason}.") from error


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

"""The command `wd-analyze`: one module a command; nothing heavy is imported until a command runs."""

from __future__ import annotations

import functools
import gc
import io
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from wdanalysis._version import __version__
from wdanalysis.cli.compare import compare
from wdanalysis.cli.demo import demo
from wdanalysis.cli.inspect import inspect
from wdanalysis.cli.merge import merge
from wdanalysis.cli.options import option_name
from wdanalysis.cli.plot import plot
from wdanalysis.cli.report import report
from wdanalysis.cli.train import train
from wdanalysis.errors import WdAnalysisError


def _interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """Let Ctrl-C end a command in one sentence."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except KeyboardInterrupt:
            raise WdAnalysisError("interrupted; what was written until then is whole.") from None

    return run


app = typer.Typer(
    name="wd-analyze",
    help="What fine-tuning did to the weights: magnitude (ΔM) and direction (ΔD), after the DoRA paper.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, compare, plot, report, inspect, train, merge):
    app.command()(_interruptible(command))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"wd-analyze {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """Run the command line; an error that the user can mend is one sentence and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # a terminal that has no Δ shows its number, and no traceback
            stream.reconfigure(errors="backslashreplace")
    # Importing pandas and numba makes few things to collect: look less often.
    gc.set_threshold(100_000, 20, 20)
    try:
        app()
    except WdAnalysisError as error:
        option = f" ({option_name(error.parameter)})" if error.parameter else ""
        sys.stderr.write(f"wd-analyze: {error}{option}\n")
        sys.exit(1)
    except OSError as error:
        if error.filename is not None:
            sys.stderr.write(f"wd-analyze: {error.filename} cannot be read or written: {error.strerror}.\n")
            sys.exit(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        sys.stderr.write(f"wd-analyze: standard output cannot be written: {error.strerror}.\n")
        sys.exit(1)
    finally:
        gc.freeze()  # what is left goes with the process: taking pandas and numba apart first would be a wait

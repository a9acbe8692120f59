"""The command `wd-analyze`: one module a command; nothing heavy is imported until a command runs."""

from __future__ import annotations

import gc
import io
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from wdanalysis._version import __version__
from wdanalysis.cli.compare import compare
from wdanalysis.cli.inspect import inspect
from wdanalysis.cli.merge import merge
from wdanalysis.cli.plot import plot
from wdanalysis.cli.report import report
from wdanalysis.cli.train import train
from wdanalysis.errors import WdAnalysisError

OPTION_NAMES = {"directory": "out", "learning_rate": "lr", "methods": "method"}
"""Options that are not called as the parameter that they set."""


class _Commands(TyperGroup):
    """The commands, of which any may be interrupted."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise WdAnalysisError("interrupted; what was written until then is whole.") from None


app = typer.Typer(
    name="wd-analyze",
    cls=_Commands,
    help="What fine-tuning did to the weights: magnitude (ΔM) and direction (ΔD), after the DoRA paper.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(compare)
app.command()(plot)
app.command()(report)
app.command()(inspect)
app.command()(train)
app.command()(merge)


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


def _option(parameter: str | None) -> str:
    """Name the option that sets a parameter of the Python functions."""
    return "" if parameter is None else f" (--{OPTION_NAMES.get(parameter, parameter.replace('_', '-'))})"


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
        sys.stderr.write(f"wd-analyze: {error}{_option(error.parameter)}\n")
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

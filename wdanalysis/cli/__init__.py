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
from typer.core import TyperCommand

from wdanalysis._version import __version__
from wdanalysis.cli import console
from wdanalysis.cli.compare import compare
from wdanalysis.cli.demo import demo
from wdanalysis.cli.diff import diff
from wdanalysis.cli.inspect import inspect
from wdanalysis.cli.merge import merge
from wdanalysis.cli.options import option_name
from wdanalysis.cli.plot import plot
from wdanalysis.cli.report import report
from wdanalysis.cli.train import train
from wdanalysis.cli.verify import verify
from wdanalysis.errors import WdAnalysisError


def _in_words(command: Callable[..., None]) -> Callable[..., None]:
    """Let Ctrl-C end a command in one sentence, and print warnings as lines."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            with console.plain_warnings(quiet=options.get("quiet", False)):
                command(*arguments, **options)
        except KeyboardInterrupt:
            raise console.CutShortError("interrupted; what was written until then is whole.") from None

    return run


class _Command(TyperCommand):
    """A command that lists `--help` under its last heading, not under one of its own."""

    def get_help_option(self, ctx: Any) -> Any:
        option: Any = super().get_help_option(ctx)
        if option is not None and self.params:
            option.rich_help_panel = getattr(self.params[-1], "rich_help_panel", None)
        return option


app = typer.Typer(
    name="wd-analyze",
    help="What fine-tuning did to the weights: magnitude (ΔM) and direction (ΔD), after the DoRA paper.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, compare, plot, report, inspect, diff, verify, train, merge):
    app.command(cls=_Command)(_in_words(command))


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
    # numba would have colorama write to the terminal when the process ends.
    os.environ.setdefault("NUMBA_DISABLE_ERROR_MESSAGE_HIGHLIGHTING", "1")
    # Importing pandas and numba makes few things to collect: look less often.
    gc.set_threshold(100_000, 20, 20)
    try:
        app()
    except WdAnalysisError as error:
        option = f" ({option_name(error.parameter)})" if error.parameter else ""
        console.fail(f"{error}{option}")
        sys.exit(error.exit_code if isinstance(error, console.CutShortError) else 1)
    except OSError as error:
        if error.filename is not None:
            console.fail(f"{error.filename} cannot be read or written: {error.strerror}.")
            sys.exit(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        console.fail(f"standard output cannot be written: {error.strerror}.")
        sys.exit(1)
    finally:
        gc.freeze()  # what is left goes with the process: taking pandas and numba apart first would be a wait

"""The command line: parse, call the pipeline, print."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from autoseg import __version__
from autoseg.cli import jobs, planning, prediction, results, training
from autoseg.cli.options import parse_duration
from autoseg.core.errors import AutosegError

__all__ = ["app", "main", "parse_duration"]

app = typer.Typer(
    name="autoseg",
    help="Plans, trains and runs the best segmentation network for a folder of medical scans.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (planning, training, prediction, results, jobs):
    app.add_typer(module.commands)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _configure(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only warnings and results.")] = False,
) -> None:
    del version
    logging.basicConfig(
        level=logging.WARNING if quiet else logging.INFO,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    # What nibabel mends silently in a header, autoseg refuses in words of its own.
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)


def main() -> None:
    """Runs the command line. Errors that a user can mend are printed without a traceback; the exit code is theirs."""
    try:
        app()
    except AutosegError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        # The disk is full, a folder cannot be written, a share is gone: the system's own words say it best.
        typer.echo(f"Error: {error.filename or ''}: {error.strerror or error}. Nothing more was done.", err=True)
        sys.exit(AutosegError.exit_code)

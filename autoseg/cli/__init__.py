"""The command line: parse, call the pipeline, print."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from autoseg import __version__
from autoseg.cli import jobs, planning, prediction, results, training
from autoseg.cli.options import parse_duration, say
from autoseg.core.errors import AutosegError, first_line
from autoseg.core.faults import describe_fault
from autoseg.core.text import PrintableFormatter, spell_out

__all__ = ["app", "main", "parse_duration"]

SEND_AGAIN_S = 0.05


class _Stopped(BaseException):
    """A signal that ends the command has come."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Commands(TyperGroup):
    """All commands. Ctrl-C is told by `main`, not by typer, whose versions make different exit codes of it."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Stopped(signal.SIGINT) from error


app = typer.Typer(
    name="autoseg",
    cls=_Commands,
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
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, handlers=[handler])
    # What nibabel mends silently in a header, autoseg refuses in words of its own.
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)


def main() -> None:
    """Runs the command line. Errors that a user can mend are printed without a traceback; the exit code is theirs."""
    try:
        with _ending_on_sigterm():
            app()
    except AutosegError as error:
        say(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except _Stopped as stopped:
        name = signal.Signals(stopped.number).name
        again = "the same command goes on from there ('autoseg predict' with --continue)"
        say(f"stopped by {name}; what is done is kept, and {again}", err=True)
        sys.exit(128 + stopped.number)
    except Exception as error:
        told = describe_fault(error)
        if told is not None:
            say(f"Error: {told}", err=True)
            sys.exit(AutosegError.exit_code)
        say(traceback.format_exc().rstrip(), err=True)
        # The last line of a log is what is shown of a job that has failed, so it has to say what happened.
        what = spell_out(f"{type(error).__name__}: {first_line(error)}")
        say(f"Error: {what}; this is a bug in autoseg {__version__}: please report it with the lines above", err=True)
        sys.exit(1)


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """While the block runs, SIGTERM ends it as Ctrl-C does, so that no half files stay; a second one ends it at once.

    What the block ignores or handles itself stays as it is.
    """

    def stop(number: int, frame: object) -> None:
        del frame
        signal.signal(number, signal.SIG_DFL)
        raise _Stopped(number)

    def send_again(unraisable: sys.UnraisableHookArgs) -> None:
        # It came while Python cleaned up after an object, where nothing can be raised.
        if isinstance(unraisable.exc_value, (_Stopped, KeyboardInterrupt)):
            number = signal.SIGINT
            if isinstance(unraisable.exc_value, _Stopped):
                number = signal.SIGTERM
                signal.signal(number, stop)
            threading.Timer(SEND_AGAIN_S, os.kill, (os.getpid(), number)).start()
        else:
            tell_unraisable(unraisable)

    before, tell_unraisable = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    takes_over = before is signal.SIG_DFL and threading.current_thread() is threading.main_thread()
    if takes_over:
        sys.unraisablehook = send_again
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if takes_over:
            signal.signal(signal.SIGTERM, before)
            sys.unraisablehook = tell_unraisable

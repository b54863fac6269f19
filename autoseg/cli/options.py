"""What the commands share: options, times, signals."""

from __future__ import annotations

import logging
import math
import re
import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoseg.core.errors import AutosegError, TrainingInterrupted
from autoseg.core.text import printable, printable_json

if TYPE_CHECKING:
    from autoseg.cluster.slurm import SlurmOptions

logger = logging.getLogger(__name__)

Work = Annotated[Path, typer.Option("-w", "--work", help="The work folder.")]
Configuration = Annotated[
    str | None,
    typer.Option(
        "-c",
        "--configuration",
        help="2d, 3d_fullres, cascade, ...; default: what 'autoseg select' chose, else the recommended one, or the "
        "only one that is trained.",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
# That of `autoseg.pipeline.workspace`, whose import would slow down --help.
DEFAULT_WORK = Path("autoseg-work")
Folds = Annotated[
    str | None,
    typer.Option(help="A range (0..4), a list (0,2) or one (3); default: all that are trained to their end."),
]
Executor = Annotated[
    str, typer.Option(help="local, or slurm: as jobs of a Slurm cluster, for which the options below are.")
]
Partition = Annotated[str | None, typer.Option(help="Partition of the cluster; default: its default one.")]
Time = Annotated[
    str | None,
    typer.Option(
        help="Limit of each job, such as 12h or 1-00:00:00, a bare number being minutes; what is not done by then is "
        "requeued and goes on. Default: the partition's, 24 h at most."
    ),
]
GpusPerNode = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="GPUs of each job; default: what it needs, where there are some.")
]
CpusPerTask = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Processors of each job; default: 8 per GPU, or what a node has.")
]
Memory = Annotated[float | None, typer.Option(metavar="GIB", help="Memory of each job; default: the cluster's.")]
Account = Annotated[str | None, typer.Option(help="Account to charge; default: yours.")]
Sbatch = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="Any other option of sbatch: --sbatch constraint=a100.")
]
# Of a model, whose folds are known only when it is loaded.
MAX_FOLDS = 1000


def say(message: str, *, err: bool = False, nl: bool = True) -> None:
    """Prints a message of ours; what names from outside would do to a terminal is spelled out."""
    typer.echo(printable(message), err=err, nl=nl)


def say_json(value: Any) -> None:
    """Prints a dataclass or plain value as JSON."""
    from autoseg.core.serialize import dump_json

    typer.echo(printable_json(dump_json(value)))


def parse_duration(text: str) -> float:
    """Seconds from "15m", "1h30m", "90s" or "90".

    Raises:
        AutosegError: not of that form, or zero.
    """
    match = re.fullmatch(
        r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?:in)?)?(?:(\d+(?:\.\d+)?)s?)?", text.strip().lower()
    )
    seconds = (
        sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0
    )
    if not seconds:
        raise AutosegError(f"found the time '{text}', expected for instance 15m, 1h30m or 90s")
    return seconds


@contextmanager
def stopping_on_signals() -> Iterator[Callable[[], bool]]:
    """While the block runs, SIGINT, SIGTERM and SIGUSR1 only ask it to stop; a second one ends it at once.

    Clusters send SIGUSR1 some time before they end a job. Where the block has stopped, the exit code is that of the
    signal.

    Yields:
        Whether to stop.
    """
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        del frame
        received.append(number)
        logger.info("stopping after this step; once more ends at once")
        signal.signal(number, before[number])

    # Windows has no SIGUSR1.
    signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    before: dict[int, Any] = {int(number): signal.signal(number, note) for number in signals}
    try:
        yield lambda: bool(received)
    except TrainingInterrupted as error:
        say(str(error), err=True)
        # Where several processes train together, another one may have been asked.
        raise typer.Exit(128 + (received[0] if received else signal.SIGTERM)) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def parse_model_folds(text: str | None) -> tuple[int, ...] | None:
    """The folds of a model that a user names; None for its own choice."""
    from autoseg.data.splits import parse_folds

    return None if text is None or text.strip() == "all" else parse_folds(text, n_folds=MAX_FOLDS)


def work_option(work: Path) -> str:
    return "" if work == DEFAULT_WORK else f" -w {shlex.quote(str(work))}"


def slurm_options(
    executor: str,
    *,
    partition: str | None,
    time: str | None,
    gpus_per_node: int | None,
    cpus_per_task: int | None,
    memory: float | None,
    account: str | None,
    sbatch: list[str] | None,
    **others: object,
) -> SlurmOptions | None:
    """What is asked of Slurm; None where it is this machine that works.

    Args:
        executor: "local" or "slurm".
        partition, time, gpus_per_node, cpus_per_task, memory, account, sbatch: as on the command line.
        others: options of the command that are for Slurm alone, too, None where they are not given.

    Raises:
        AutosegError: another executor; options of Slurm for this machine; or the time or an option of sbatch is not of
            the expected form.
    """
    from autoseg.cluster.slurm import SlurmOptions, parse_time

    more = {}
    for text in sbatch or ():
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise AutosegError(f"found --sbatch {text}, expected KEY=VALUE, for instance constraint=a100")
        more[key.lstrip("-")] = value
    time_min = None
    if time is not None:
        time_min = parse_time(time) or math.ceil(parse_duration(time) / 60)
    options = SlurmOptions(
        partition=partition,
        account=account,
        time_min=time_min,
        gpus_per_node=gpus_per_node,
        cpus_per_task=cpus_per_task,
        memory_gib=memory,
        sbatch=more,
    )
    if executor == "slurm":
        return options
    if executor != "local":
        raise AutosegError(f"found --executor {executor}, expected local or slurm")
    if options != SlurmOptions() or any(value is not None for value in others.values()):
        last = f" and --{list(others)[-1].replace('_', '-')}" if others else ""
        raise AutosegError(
            "--partition, --time, --gpus-per-node, --cpus-per-task, --memory, --account, --sbatch"
            f"{last} belong to --executor slurm"
        )
    return None

"""`autoseg status`, `autoseg logs`, `autoseg cancel`, and what they are about."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoseg.cli.options import DEFAULT_WORK, Work, say, say_json, stopping_on_signals, work_option

if TYPE_CHECKING:
    from autoseg.pipeline.jobs.status import JobStatus

commands = typer.Typer()

FOLLOW_INTERVAL_S = 0.5
STATUS_INTERVAL_S = 10.0
"""Slurm is not to be asked more often, by anybody who follows a log."""
MAX_ERROR_SHOWN = 160
MAX_DETAIL_SHOWN = 40


@commands.command()
def status(
    work: Work = DEFAULT_WORK,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON, and nothing else.")] = False,
) -> None:
    """Show the jobs of a work folder: what waits, runs, is done or has failed, how far each fold is, and why.

    It is told from files in the work folder and from Slurm's queue, so it is right on any machine that sees both.
    """
    from autoseg.pipeline.jobs.status import status as ask

    jobs = ask(work)
    if as_json:
        say_json(jobs)
    elif jobs:
        say(describe_status(jobs))
    else:
        say(f"Nothing has been trained in {work} yet.\nNext: autoseg train{work_option(work)}")


@commands.command()
def cancel(work: Work = DEFAULT_WORK) -> None:
    """End all jobs that wait or run; those that train save first, and the same command goes on from there."""
    from autoseg.pipeline.jobs.cancel import cancel as end_all

    ended = end_all(work)
    say(f"cancelled: {', '.join(ended)}" if ended else "no job waits or runs")


@commands.command()
def logs(
    job: Annotated[str, typer.Argument(metavar="FOLD", help="A fold, or the name of a job as 'status' shows it.")],
    configuration: Annotated[
        str | None, typer.Option("-c", "--configuration", help="Needed where several configurations train this fold.")
    ] = None,
    work: Work = DEFAULT_WORK,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Go on as long as the job waits or runs; Ctrl-C ends it.")
    ] = True,
) -> None:
    """Print what a job has written, and what it writes."""
    from autoseg.cluster.processes import LogFollower
    from autoseg.pipeline.jobs.status import find_job

    found = find_job(work, job, configuration=configuration)
    assert found.log is not None, "jobs of a batch have one"
    log = LogFollower(found.log)
    if not found.log.exists():
        say(f"{found.name} has not begun ({found.status}).", err=True)
    asked_at = time.monotonic()
    try:
        while follow and found.is_on_its_way:
            say(log.read_new(), nl=False)
            time.sleep(FOLLOW_INTERVAL_S)
            if time.monotonic() - asked_at > STATUS_INTERVAL_S:
                found, asked_at = find_job(work, found.name), time.monotonic()
    except KeyboardInterrupt:
        return
    say(log.read_new(), nl=False)


@commands.command(hidden=True)
def run_job(
    folder: Annotated[Path, typer.Argument(help="Of a batch.")],
    name: Annotated[str, typer.Argument(help="Of a job in it.")],
    device: Annotated[str, typer.Option()],
    attempt: Annotated[int, typer.Option()] = 1,
    cpus: Annotated[int | None, typer.Option()] = None,
    rank: Annotated[int, typer.Option()] = 0,
    rendezvous: Annotated[Path | None, typer.Option()] = None,
    parent: Annotated[int | None, typer.Option()] = None,
) -> None:
    """Do a job of a batch; started by what looks after it."""
    from autoseg.core.runtime import never
    from autoseg.pipeline.jobs.batch import BatchFolder
    from autoseg.pipeline.jobs.tasks import HEED_SIGNALS, Place
    from autoseg.pipeline.jobs.tasks import run_job as run

    task = BatchFolder(root=folder).read().job(name).task
    with stopping_on_signals() if task in HEED_SIGNALS else nullcontext(never) as stop:
        place = Place(device=device, rank=rank, rendezvous=rendezvous, attempt=attempt, stop=stop)
        run(folder, name, place, n_cpus=cpus, parent=parent)


def describe_status(jobs: list[JobStatus]) -> str:
    """A table, and what is wrong beneath it."""
    from autoseg.core.runtime import format_duration
    from autoseg.core.text import shorten
    from autoseg.pipeline.jobs.batch import DONE
    from autoseg.reporting.text import format_table

    rows = []
    for job in jobs:
        progress = job.progress
        unfinished = job.status != DONE
        rows.append(
            (
                job.name,
                " ".join(part for part in (job.status, shorten(job.detail, MAX_DETAIL_SHOWN)) if part),
                "" if progress is None else f"{progress.fraction:.0%}, step {progress.step:,}",
                "" if progress is None else f"{progress.dice:.3f}",
                format_duration(progress.left_s) if progress is not None and unfinished else "",
                job.host,
                job.slurm_id,
                str(job.n_attempts or ""),
            )
        )
    header = ("job", "status", "progress", "Dice", "left", "machine", "Slurm", "begun")
    used = [column for column in range(len(header)) if column < 2 or any(row[column] for row in rows)]
    table = format_table(
        [header[column] for column in used], [[row[column] for column in used] for row in rows], n_left=2
    )
    errors = [f"{job.name}: {job.error[:MAX_ERROR_SHOWN]}" for job in jobs if job.error]
    return "\n".join([table, *(["", "Last errors", *errors] if errors else [])])

"""Ending the jobs of a work folder."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

from autoseg.cluster import slurm
from autoseg.core.machine import is_running
from autoseg.pipeline.jobs.batch import RUNNING, SLURM, BatchFolder, JobState
from autoseg.pipeline.jobs.status import tell_batches
from autoseg.pipeline.workspace import DEFAULT_WORK, Workspace


def cancel(work: Path | str = DEFAULT_WORK) -> list[str]:
    """Ends all jobs that wait or run. Those that train save first, and the same command goes on from there.

    Jobs of another machine end as soon as that sees it, if it still runs; a container that has gone does not.

    Args:
        work: the work folder.

    Returns:
        The names of the jobs that were cancelled.

    Raises:
        AutosegError: Slurm does not answer.
    """
    workspace, cancelled = Workspace(root=Path(work)), []
    for folder, told in tell_batches(workspace, BatchFolder.all_in(workspace.root)):
        unfinished = [job for job in told if job.is_on_its_way]
        if not unfinished:
            continue
        batch, ids = folder.read(), folder.read_slurm_ids()
        folder.cancelled_file.touch()
        if batch.executor == SLURM:
            slurm.cancel([ids[job.name] for job in unfinished if job.name in ids])
        elif batch.host == socket.gethostname() and not batch.is_looked_after:
            # Whoever looks after them, here or elsewhere, sees the file and asks them himself: to be asked twice ends
            # them at once.
            for job in unfinished:
                _end_processes(folder.read_state(job.name))
        cancelled += [job.name for job in unfinished]
    return cancelled


def _end_processes(state: JobState | None) -> None:
    """Lets processes on this machine save and end."""
    if state is None or state.status != RUNNING:
        return
    for pid in state.pids:
        # A number that another program has now is left alone.
        if is_running(pid, word="run-job"):
            os.kill(pid, signal.SIGTERM)

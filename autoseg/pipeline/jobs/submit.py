"""Jobs on a Slurm cluster: what waits for what is said to Slurm, and each looks after itself."""

from __future__ import annotations

import logging
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from autoseg.cluster import slurm
from autoseg.cluster.processes import POLL_INTERVAL_S, Ending
from autoseg.core.errors import AutosegError
from autoseg.core.serialize import write_json
from autoseg.pipeline.jobs.batch import DONE, Batch, BatchFolder
from autoseg.pipeline.jobs.results import count_results
from autoseg.pipeline.jobs.schedule import groups_of
from autoseg.pipeline.jobs.supervise import Supervisor

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
ON_PROCESSORS = frozenset({"preprocess"})
"""Tasks that need no GPU."""


def computes_on_gpu(device: str, options: slurm.SlurmOptions, partition: slurm.Partition) -> bool:
    """Whether jobs do, for a device as the user names it."""
    return device != "cpu" and slurm.uses_gpus(options, partition)


def submit(
    batch: Batch, *, device: str, options: slurm.SlurmOptions, make_way: Callable[[], None] | None = None
) -> dict[str, str]:
    """Submits the jobs of a batch.

    Args:
        batch: what is to be done.
        device: as the user names it; "cpu" asks for no GPU.
        options: what is asked of Slurm.
        make_way: called when Slurm has accepted all jobs, before the first of them may begin.

    Returns:
        The number that Slurm has given to each job.

    Raises:
        AutosegError: there is no Slurm here, or it refuses a job; then nothing is left of the batch. Or it does not
            release them; then they begin by themselves.
    """
    partition = slurm.look_at_partition(options.partition)
    folder = BatchFolder.create(batch)
    on_gpu = computes_on_gpu(device, options, partition)
    ids: dict[str, str] = {}
    if make_way is not None:
        # Should this process die before, they do nothing when they begin.
        folder.cancelled_file.touch()
    try:
        for group in groups_of(batch.jobs):
            first = group[0]
            uses_gpu = on_gpu and first.task not in ON_PROCESSORS
            # A node whose GPU does not work must not train on its processors instead.
            where = "cuda" if uses_gpu else device
            numbers = slurm.submit_array(
                [NodeCall(folder=str(folder.root), job=job.name, device=where) for job in group],
                folder=folder.submitit,
                name=f"autoseg-{'-'.join((first.task, *first.configurations))}",
                n_processes=first.n_processes,
                uses_gpu=uses_gpu,
                options=options,
                partition=partition,
                after=[ids[name] for name in first.after],
                is_held=make_way is not None and not first.after,
            )
            ids |= {job.name: number for job, number in zip(group, numbers, strict=True)}
            write_json(folder.slurm_ids_file, ids)
            logger.info("submitted %s as %s", ", ".join(job.name for job in group), ", ".join(numbers))
        if make_way is not None:
            make_way()
            folder.cancelled_file.unlink()
    except BaseException:
        # Ctrl-C too: half of a batch is of no use.
        slurm.cancel(list(ids.values()))
        shutil.rmtree(folder.root)
        raise
    if make_way is not None:
        slurm.release([ids[job.name] for job in batch.jobs if not job.after], options)
    return ids


@dataclass(frozen=True, kw_only=True)
class NodeCall:
    """A job on a node, for submitit to carry there.

    Attributes:
        folder: of the batch.
        job: its name.
        device: "auto", "cpu" or "cuda".
    """

    folder: str
    job: str
    device: str

    def __call__(self) -> None:
        """Does the job; where its time is up before, it is put back into the queue.

        Raises:
            AutosegError: it has failed, and is not tried again.
        """
        time_is_up: list[int] = []
        # In place of submitit's own handler: the job is not its process but one that this process looks after.
        signal.signal(_warning_signal(), lambda number, frame: time_is_up.append(number))
        folder, number = BatchFolder(root=Path(self.folder)), slurm.own_number()
        if folder.cancelled_file.exists():
            return
        batch = folder.read()
        job = batch.job(self.job)
        devices = _devices(self.device, job.n_processes)
        supervisor = Supervisor(folder, job, devices=devices, max_failures=MAX_FAILURES)
        if not supervisor.begin(kills=_new_kills(folder.kills_file(number), supervisor)):
            if supervisor.state.status == DONE:
                return
            raise AutosegError(f"{self.job} is given up: {supervisor.state.failures[-1].reason}")
        while True:
            ending = _wait(supervisor, time_is_up)
            if ending.exit_code == 0:
                return
            if not ending.is_stopped and not time_is_up:
                raise AutosegError(f"{self.job}: {ending.reason}")
            if folder.cancelled_file.exists():
                break
            if time_is_up:
                self._put_back(supervisor, has_grown=supervisor.note_results(count_results(batch, job)), number=number)
                break
            queued = slurm.ask_squeue([number]).get(number)
            if queued is None or queued.state != "RUNNING":
                break
            # Neither Slurm nor the user has ended it: somebody has sent a signal to its process.
            supervisor.begin()
        sys.exit(128 + signal.SIGTERM)

    def _put_back(self, supervisor: Supervisor, *, has_grown: bool, number: str) -> None:
        """Puts the job back into the queue, unless it gets nowhere.

        Raises:
            AutosegError: it does not.
        """
        if not has_grown:
            supervisor.note_failure("the time limit came before there was any result; give a longer --time")
            if supervisor.has_failed_too_often():
                supervisor.give_up()
                raise AutosegError(f"{self.job} is given up: {supervisor.state.failures[-1].reason}")
        slurm.requeue(number)


def _wait(supervisor: Supervisor, time_is_up: list[int]) -> Ending:
    """Until the job has ended; where its time is up, it is asked to."""
    while (ending := supervisor.poll()) is None:
        if time_is_up:
            supervisor.ask_to_stop()
        time.sleep(POLL_INTERVAL_S)
    return ending


def _new_kills(kills: Path, supervisor: Supervisor) -> list[str]:
    """How the job was killed, since that was written down last."""
    told = "the job on the node was killed"
    n_noted = sum(failure.reason.startswith(told) for failure in supervisor.state.failures)
    codes = kills.read_text().split()[n_noted:] if kills.exists() else []
    return [f"{told} (exit code {code})" for code in codes]


def _devices(device: str, n_processes: int) -> list[str]:
    """One for each process, of those that Slurm has granted, which count from 0 for the job."""
    if n_processes == 1 or device == "cpu":
        return [device] * n_processes
    import torch

    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if n_gpus < n_processes:
        raise AutosegError(
            f"the job has {n_gpus} GPUs, expected {n_processes}; give --gpus-per-node {n_processes}, or another "
            "--partition"
        )
    return [f"cuda:{number}" for number in range(n_processes)]


def _warning_signal() -> signal.Signals:
    """That Slurm sends some time before it ends a job, as submitit asks for."""
    from submitit.core.job_environment import JobEnvironment

    return signal.Signals[f"SIG{JobEnvironment.USR_SIG}"]

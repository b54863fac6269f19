"""Jobs on a Slurm cluster: what waits for what is said to Slurm, and each looks after itself."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from autoseg.cluster import slurm
from autoseg.cluster.processes import POLL_INTERVAL_S
from autoseg.core.errors import AutosegError
from autoseg.core.serialize import write_json
from autoseg.pipeline.jobs.batch import Batch, BatchFolder
from autoseg.pipeline.jobs.schedule import groups_of
from autoseg.pipeline.jobs.supervise import Supervisor

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
ON_PROCESSORS = frozenset({"preprocess"})
"""Tasks that need no GPU."""


def submit(folder: BatchFolder, batch: Batch, *, device: str, options: slurm.SlurmOptions) -> dict[str, str]:
    """Submits the jobs of a batch.

    Args:
        folder: of the batch.
        batch: in it.
        device: as the user names it; "cpu" asks for no GPU.
        options: what is asked of Slurm.

    Returns:
        The number that Slurm has given to each job.

    Raises:
        AutosegError: there is no Slurm here, or it refuses a job; then nothing is left of the batch.
    """
    ids: dict[str, str] = {}
    try:
        partition = slurm.look_at_partition(options.partition)
        folder.write(batch)
        for group in groups_of(batch.jobs):
            first = group[0]
            numbers = slurm.submit_array(
                [NodeCall(folder=str(folder.root), job=job.name, device=device) for job in group],
                folder=folder.submitit,
                name=f"autoseg-{'-'.join((first.task, *first.configurations))}",
                n_processes=first.n_processes,
                uses_gpu=device != "cpu" and first.task not in ON_PROCESSORS,
                options=options,
                partition=partition,
                after=[ids[name] for name in first.after],
                kills=str(folder.kills_file("$SLURM_JOB_ID")),
            )
            ids |= {job.name: number for job, number in zip(group, numbers, strict=True)}
            logger.info("submitted %s as %s", ", ".join(job.name for job in group), ", ".join(numbers))
    except AutosegError:
        slurm.cancel(list(ids.values()))
        shutil.rmtree(folder.root)
        raise
    write_json(folder.slurm_ids_file, ids)
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
        folder, slurm_id = BatchFolder(root=Path(self.folder)), os.environ.get("SLURM_JOB_ID", "")
        job = folder.read().job(self.job)
        devices = _devices(self.device, job.n_processes)
        supervisor = Supervisor(folder, job, devices=devices, max_failures=MAX_FAILURES)
        time_is_up: list[int] = []
        # In place of submitit's own handler: the job is not its process but one that this process looks after.
        signal.signal(_warning_signal(), lambda number, frame: time_is_up.append(number))
        kills = folder.kills_file(slurm_id)
        n_noted = sum(failure.reason.startswith("the job on the node") for failure in supervisor.state.failures)
        codes = kills.read_text().split()[n_noted:] if kills.exists() else []
        told = [f"the job on the node was killed (exit code {code})" for code in codes]
        if not supervisor.begin(kills=told):
            raise AutosegError(f"{self.job} is given up: {supervisor.state.failures[-1].reason}")
        while (ending := supervisor.poll()) is None:
            if time_is_up:
                supervisor.ask_to_stop()
            time.sleep(POLL_INTERVAL_S)
        if ending.exit_code == 0:
            return
        if time_is_up and not folder.cancelled_file.exists():
            slurm.requeue(slurm_id)
        if ending.is_stopped:
            sys.exit(128 + signal.SIGTERM)
        raise AutosegError(f"{self.job}: {ending.reason}")


def _devices(device: str, n_processes: int) -> list[str]:
    """One for each process, of those that Slurm has granted, which count from 0 for the job."""
    if device == "cpu":
        return ["cpu"] * n_processes
    import torch

    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if n_processes == 1:
        return ["cuda" if device == "cuda" else "auto"]
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

"""Jobs side by side on this machine, as many as it has devices for."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence

from autoseg.cluster.processes import POLL_INTERVAL_S, Ending, LogFollower
from autoseg.core.errors import AutosegError
from autoseg.core.runtime import n_cpus, resolve_device
from autoseg.pipeline.jobs.batch import Batch, BatchFolder, Job
from autoseg.pipeline.jobs.supervise import Supervisor

logger = logging.getLogger(__name__)

WHOLE_MACHINE = frozenset({"preprocess", "first_stage", "select"})
"""Tasks that run alone, and so with all processors."""


def choose_devices(device: str, gpus: str | None, *, n_jobs: int, gpus_per_fold: int = 1) -> list[str]:
    """The devices to work on side by side.

    Args:
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        gpus: "auto" for all of this machine, "0,2" for these, "4" for so many; with the device "cpu" a number of
            processes, which share the processors. None for all that the jobs can use.
        n_jobs: that there are.
        gpus_per_fold: that each of them uses.

    Raises:
        AutosegError: there are no such GPUs, or the two contradict each other.
    """
    where = resolve_device(device)
    n_useful = n_jobs * gpus_per_fold
    if gpus is None:
        if where.type == "cpu":
            return ["cpu"] * gpus_per_fold
        if where.type != "cuda" or where.index is not None:
            return [str(where)]
        gpus = "auto"
    text = gpus.strip()
    if text != "auto" and not all(part.strip().isdecimal() for part in text.split(",")):
        raise AutosegError(f"found --gpus {gpus}, expected auto, numbers such as 0,2, or how many, such as 4")
    if where.type != "cuda":
        if device == "cpu" and text.isdecimal() and int(text) > 0:
            return ["cpu"] * int(text)
        raise AutosegError(
            f"--gpus {gpus}: this machine has no CUDA device; leave it out, or give --device cpu and a number of "
            "processes"
        )
    if where.index is not None:
        raise AutosegError(f"--gpus and --device {device} both say where to train; leave one of them out")
    import torch

    n_gpus = torch.cuda.device_count()
    if text == "auto":
        chosen = list(range(min(n_gpus, n_useful)))
    else:
        chosen = [int(part) for part in text.split(",")] if "," in text else list(range(int(text)))
    if not chosen or max(chosen) >= n_gpus or len(set(chosen)) < len(chosen):
        raise AutosegError(
            f"found --gpus {gpus}; this machine has {n_gpus} GPUs, numbered from 0. One number says how many to use "
            "(--gpus 2), a list says which (--gpus 0,2); for a single one give --device cuda:0"
        )
    return [f"cuda:{number}" for number in chosen]


def run_here(folder: BatchFolder, batch: Batch, *, devices: Sequence[str], stop: Callable[[], bool]) -> list[str]:
    """Does the jobs of a batch, each as soon as those before it are done and enough devices are free.

    What the jobs write is in their logs, and is written to standard error as it comes. A job that fails does not stop
    the others, but for those that wait for it.

    Args:
        folder: of the batch.
        batch: in it.
        devices: that jobs are given; each job has as many as it has processes.
        stop: asked again and again; True lets the running jobs save and end, and begins no other.

    Returns:
        The names of the jobs that are not done, in order.
    """
    run = _Run(folder, batch, devices)
    while run.goes_on():
        if stop():
            run.stop()
        run.look()
        time.sleep(POLL_INTERVAL_S)
    return [job.name for job in batch.jobs if job.name not in run.done]


class _Run:
    """Which jobs of a batch wait, run and are done."""

    def __init__(self, folder: BatchFolder, batch: Batch, devices: Sequence[str]) -> None:
        self._folder, self._devices = folder, list(devices)
        self._waiting, self._free = list(batch.jobs), list(devices)
        self._running: list[tuple[Supervisor, list[str], LogFollower]] = []
        self.done: set[str] = set()
        self._failed: set[str] = set()
        self._is_stopping = False

    def goes_on(self) -> bool:
        """Whether there is still something to wait for."""
        return bool(self._running or self._waiting)

    def stop(self) -> None:
        """Lets the running jobs save and end, and forgets those that wait."""
        if not self._is_stopping:
            self._is_stopping = True
            self._waiting = []
            for supervisor, _, _ in self._running:
                supervisor.ask_to_stop()

    def look(self) -> None:
        """Notes which jobs have ended, and begins those that can begin."""
        for known in list(self._running):
            supervisor, devices, log = known
            ending = supervisor.poll()
            sys.stderr.write(log.read_new())
            if ending is not None:
                self._running.remove(known)
                self._free += devices
                self._note(supervisor.job, ending)
        if not self._is_stopping and self._folder.cancelled_file.exists():
            self.stop()
        for job in list(self._waiting):
            if any(name in self._failed for name in job.after):
                self._waiting.remove(job)
                self._failed.add(job.name)
                logger.warning("%s: not begun, because %s is not done", job.name, ", ".join(self._missing(job)))
            elif not self._missing(job) and self._has_room(job):
                self._waiting.remove(job)
                self._begin(job)

    def _missing(self, job: Job) -> list[str]:
        return [name for name in job.after if name not in self.done]

    def _has_room(self, job: Job) -> bool:
        if job.task in WHOLE_MACHINE:
            return not self._running
        busy_alone = any(supervisor.job.task in WHOLE_MACHINE for supervisor, _, _ in self._running)
        return len(self._free) >= job.n_processes and not busy_alone

    def _begin(self, job: Job) -> None:
        devices = [self._free.pop(0) for _ in range(job.n_processes)]
        share = None if job.task in WHOLE_MACHINE else max(1, n_cpus() * job.n_processes // len(self._devices))
        supervisor = Supervisor(self._folder, job, devices=devices, n_cpus=share)
        log = LogFollower(self._folder.log(job.name), from_end=True)
        logger.info("%s begins on %s", job.name, ", ".join(devices))
        supervisor.begin()
        self._running.append((supervisor, devices, log))

    def _note(self, job: Job, ending: Ending) -> None:
        if ending.exit_code == 0:
            self.done.add(job.name)
            return
        self._failed.add(job.name)
        if not ending.is_stopped:
            logger.warning("%s: failed: %s", job.name, ending.reason)

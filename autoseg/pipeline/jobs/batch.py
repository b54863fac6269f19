"""What a user has asked other processes to do, and what became of it: the files of `jobs/` in a work folder."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from autoseg import __version__
from autoseg.core.errors import AutosegError
from autoseg.core.machine import is_running
from autoseg.core.serialize import read_json, write_json
from autoseg.training.config import CHECKPOINT_INTERVAL_S, TrainConfig

LOCAL, SLURM = "local", "slurm"
RUNNING, DONE, FAILED, STOPPED = "running", "done", "failed", "stopped"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One piece of work for a process, or for several that train one fold together.

    Attributes:
        name: unique in its batch, and the name of its folder.
        task: a name in `autoseg.pipeline.jobs.tasks.TASKS`.
        after: names of jobs that have to be done before.
        configurations: that it works on; one for most tasks.
        fold: to train.
        part: (2, 8) is the second of eight parts of the cases.
        n_processes: that share the work, each with a device of its own.
    """

    name: str
    task: str
    after: tuple[str, ...] = ()
    configurations: tuple[str, ...] = ()
    fold: int | None = None
    part: tuple[int, int] = (1, 1)
    n_processes: int = 1


def fold_job_name(configuration: str, fold: int) -> str:
    """That of the job that trains a fold."""
    return f"{configuration}-fold-{fold}"


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """How folds are trained, from where they are; see `autoseg.pipeline.train`."""

    config: TrainConfig
    device: str = "auto"
    validate: bool = True
    checkpoint_interval_s: float = CHECKPOINT_INTERVAL_S
    track_with: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PredictRequest:
    """What is segmented with what; see `autoseg.pipeline.predict`."""

    images: tuple[Path, ...]
    output: Path
    model: Path | None = None
    configuration: str | None = None
    folds: tuple[int, ...] | None = None
    device: str = "auto"
    speed: str = "best"
    mirroring: bool | None = None
    step_fraction: float | None = None
    overwrite: bool = True
    save_probabilities: bool = False
    save_uncertainty: bool = False
    max_ram_gib: float | None = None
    max_vram_gib: float | None = None
    compile: bool = False
    postprocess: bool = True
    fix: bool = False


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one command has asked for, cut into jobs.

    Attributes:
        work: the work folder, absolute.
        executor: `LOCAL` or `SLURM`.
        jobs: in an order in which they can be done.
        training: where folds are trained.
        prediction: where images are segmented.
        host, pid: of the process that looks after the jobs, where they are done on one machine.
        submitted: date and time, UTC.
        autoseg: version.
    """

    work: Path
    executor: str
    jobs: tuple[Job, ...]
    training: TrainRequest | None = None
    prediction: PredictRequest | None = None
    host: str = ""
    pid: int = 0
    submitted: str = ""
    autoseg: str = __version__

    @property
    def is_looked_after(self) -> bool:
        """Whether another process, which looks after the jobs of this machine, still runs; of others, none is known.

        In a container that was started again, this process may have the number that the other one had.
        """
        is_here = self.host == socket.gethostname() and self.pid != os.getpid()
        return is_here and is_running(self.pid, word="autoseg")

    def job(self, name: str) -> Job:
        """The job of that name.

        Raises:
            AutosegError: there is none.
        """
        for job in self.jobs:
            if job.name == name:
                return job
        raise AutosegError(f"found no job '{name}', expected one of {', '.join(job.name for job in self.jobs)}")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A time that a job has failed.

    Attributes:
        at: date and time, UTC.
        host: where.
        reason: the last line that it has written, or which signal killed it.
    """

    at: str
    host: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What became of a job so far, for `state.json` in its folder. Only the process that looks after it writes it.

    Attributes:
        status: `RUNNING`, `DONE`, `FAILED` or `STOPPED`.
        host: that it ran on last.
        pids: of its processes there.
        began: when it began last, UTC.
        changed: when the status changed last, UTC.
        n_attempts: how often it has begun.
        failures: all of them.
        results: what there was of results when it was last stopped, see `count_results`; a job that is stopped again
            with the same makes no progress.
    """

    status: str
    host: str
    pids: tuple[int, ...] = ()
    began: str = ""
    changed: str = ""
    n_attempts: int = 0
    failures: tuple[Failure, ...] = ()
    results: str = ""


@dataclass(frozen=True, kw_only=True)
class BatchFolder:
    """The folder of a batch: `jobs/<number>/` in the work folder. Nothing else knows these names."""

    root: Path

    @classmethod
    def create(cls, batch: Batch) -> BatchFolder:
        """A new one in the work folder, which no other process has, with the batch in it."""
        work = batch.work
        number = 1 + max((int(path.name) for path in (work / "jobs").glob("*") if path.name.isdecimal()), default=0)
        while True:
            folder = cls(root=work / "jobs" / f"{number:03d}")
            try:
                folder.root.mkdir(parents=True)
            except FileExistsError:
                number += 1
            else:
                write_json(folder.file, batch)
                return folder

    @classmethod
    def all_in(cls, work: Path) -> Sequence[BatchFolder]:
        """Those of a work folder, the oldest first."""
        folders = (cls(root=file.parent) for file in (work / "jobs").glob("*/batch.json"))
        return sorted((folder for folder in folders if folder.root.name.isdecimal()), key=lambda folder: folder.number)

    @property
    def number(self) -> int:
        """Counted from 1."""
        return int(self.root.name)

    @property
    def file(self) -> Path:
        """The `Batch`."""
        return self.root / "batch.json"

    @property
    def slurm_ids_file(self) -> Path:
        """Numbers that Slurm has given to the jobs, by their names."""
        return self.root / "slurm.json"

    @property
    def cancelled_file(self) -> Path:
        """There from when a user wants no job of the batch to go on."""
        return self.root / "cancelled"

    @property
    def submitit(self) -> Path:
        """submitit's own files, and the output of its processes."""
        return self.root / "submitit"

    def kills_file(self, slurm_id: str) -> Path:
        """A line for each time that a job of Slurm has ended by a signal that nobody could note but its script."""
        return self.submitit / f"killed-{slurm_id}"

    def log(self, job: str) -> Path:
        """What a job has written."""
        return self.root / job / "log.txt"

    def state_file(self, job: str) -> Path:
        """Its `JobState`."""
        return self.root / job / "state.json"

    def read(self) -> Batch:
        """The batch.

        Raises:
            FormatError: its file is missing or damaged.
        """
        batch: Batch = read_json(self.file, Batch)
        return batch

    def read_state(self, job: str) -> JobState | None:
        """What became of a job; None where it has not begun."""
        file = self.state_file(job)
        if not file.exists():
            return None
        state: JobState = read_json(file, JobState)
        return state

    def write_state(self, job: str, state: JobState) -> None:
        """Writes what became of a job."""
        write_json(self.state_file(job), state)

    def read_slurm_ids(self) -> dict[str, str]:
        """See `slurm_ids_file`; none where nothing has been submitted."""
        if not self.slurm_ids_file.exists():
            return {}
        ids: dict[str, str] = read_json(self.slurm_ids_file, dict[str, str])
        return ids


def now() -> str:
    """Date and time, UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")

"""What became of everything that other processes were asked to do, told from files and from Slurm's queue."""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoseg.cluster import slurm
from autoseg.cluster.processes import last_line
from autoseg.core.errors import AutosegError
from autoseg.core.machine import is_running
from autoseg.core.serialize import read_json
from autoseg.pipeline.configurations import default_configuration
from autoseg.pipeline.jobs.batch import (
    DONE,
    FAILED,
    LOCAL,
    RUNNING,
    SLURM,
    STOPPED,
    Batch,
    BatchFolder,
    Job,
    JobState,
    fold_job_name,
)
from autoseg.pipeline.workspace import DEFAULT_WORK, Workspace
from autoseg.training.folds import trained_folds
from autoseg.training.record import FoldFiles, TrainingRecord, read_log

WAITING, REQUEUED, NOT_BEGUN, CANCELLED, LOST = "waiting", "requeued", "not begun", "cancelled", "lost"
BEGUN = "begun"
ENDING = "ending"
ON_THEIR_WAY = frozenset({WAITING, REQUEUED, RUNNING, ENDING})


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a fold has come.

    Attributes:
        step: steps done, at the last epoch that is written down.
        fraction: of the budget.
        dice: of the last epoch, on patches.
        left_s: seconds left of the training.
    """

    step: int
    fraction: float
    dice: float
    left_s: float


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """One line of the table.

    Attributes:
        name: of the job.
        status: `RUNNING`, `DONE`, `FAILED`, `STOPPED`, `WAITING`, `REQUEUED`, `NOT_BEGUN`, `CANCELLED`, `ENDING` while
            Slurm takes it from its node, `LOST` where it has ended without a word, or `BEGUN` for a fold that no batch
            trains.
        batch: number of the batch; None for a fold that no batch has trained.
        configuration: empty where it is not about one.
        fold: None where it is not about one.
        slurm_id: number that Slurm has given; empty on this machine.
        host: that it runs or ran on.
        detail: what it waits for.
        n_attempts: how often it has begun.
        progress: of a fold.
        error: the last one; empty where there was none, or it is done.
        log: for what it writes; None for a fold that no batch trains.
    """

    name: str
    status: str
    batch: int | None = None
    configuration: str = ""
    fold: int | None = None
    slurm_id: str = ""
    host: str = ""
    detail: str = ""
    n_attempts: int = 0
    progress: Progress | None = None
    error: str = ""
    log: Path | None = None

    @property
    def is_on_its_way(self) -> bool:
        """Whether it goes on, or will."""
        return self.status in ON_THEIR_WAY


def status(work: Path | str = DEFAULT_WORK) -> list[JobStatus]:
    """Jobs of a work folder, and folds that were trained without.

    A job that several batches have is told of as in the last one; what else an older batch has done is left out.

    Args:
        work: the work folder.

    Raises:
        WorkspaceError: it is not planned, and no jobs were begun from it.
        AutosegError: Slurm does not answer.
    """
    workspace = Workspace(root=Path(work))
    found: dict[str, JobStatus] = {}
    folders = BatchFolder.all_in(workspace.root)
    for folder, batch in tell_batches(workspace, folders):
        is_last = folder == folders[-1]
        for job in batch:
            found.pop(job.name, None)
            if is_last or job.fold is not None or job.status != DONE:
                found[job.name] = job
    if workspace.plan_file.exists() or not folders:
        for job in _trained_here(workspace):
            found.setdefault(job.name, job)
    return list(found.values())


def find_job(work: Path | str, wanted: str, *, configuration: str | None = None) -> JobStatus:
    """The job of a batch whose log a user wants to see.

    Args:
        work: the work folder.
        wanted: number of a fold, or the name of a job.
        configuration: of the fold, or "cascade" for the second stage; None where there is one only.

    Raises:
        AutosegError: there is no such job, or there are several.
    """
    jobs = [job for job in status(work) if job.batch is not None]
    names = [job.name for job in jobs]
    matching = [job for job in jobs if job.name == wanted]
    if configuration is not None:
        configuration = default_configuration(Workspace(root=Path(work)).read_plan(), configuration).name
    if wanted.isdecimal():
        matching = [job for job in jobs if job.fold == int(wanted) and configuration in (None, job.configuration)]
    if not matching:
        raise AutosegError(f"found no job '{wanted}', expected a fold or one of {', '.join(names) or 'no job at all'}")
    if len(matching) > 1:
        raise AutosegError(f"several jobs train fold {wanted}: {', '.join(one.name for one in matching)}; name one")
    return matching[0]


def tell_batches(workspace: Workspace, folders: Sequence[BatchFolder]) -> Iterator[tuple[BatchFolder, list[JobStatus]]]:
    """Each batch with its jobs. Slurm is asked once for all of them."""
    batches = [(folder, folder.read(), folder.read_slurm_ids()) for folder in folders]
    states = [{job.name: folder.read_state(job.name) for job in batch.jobs} for folder, batch, _ in batches]
    numbers = [
        number
        for (_, _, ids), of_batch in zip(batches, states, strict=True)
        for name, number in ids.items()
        if not _is_over(of_batch[name])
    ]
    queue = slurm.ask_squeue(numbers)
    for (folder, batch, ids), of_batch in zip(batches, states, strict=True):
        yield folder, list(_tell_batch(workspace, folder, batch, ids, states=of_batch, queue=queue))


def _tell_batch(
    workspace: Workspace,
    folder: BatchFolder,
    batch: Batch,
    ids: Mapping[str, str],
    *,
    states: Mapping[str, JobState | None],
    queue: Mapping[str, slurm.SlurmJob],
) -> Iterator[JobStatus]:
    told: dict[str, JobStatus] = {}
    for job in batch.jobs:
        # What ended between the two questions has written it down since.
        state = states[job.name] if _is_over(states[job.name]) else folder.read_state(job.name)
        slurm_id = ids.get(job.name, "")
        job_status = _tell_job(folder, batch, job, state, slurm_id=slurm_id, queued=queue.get(slurm_id))
        waits_for = [name for name in job.after if told[name].status != DONE]
        lost = [name for name in waits_for if not told[name].is_on_its_way]
        if job_status.status in (WAITING, LOST, NOT_BEGUN) and lost:
            job_status = dataclasses.replace(job_status, status=NOT_BEGUN, detail=f"{', '.join(lost)} not done")
        elif job_status.status == WAITING and waits_for:
            job_status = dataclasses.replace(job_status, detail=f"for {', '.join(waits_for)}")
        if job.fold is not None:
            progress = read_progress(workspace, job.configurations[0], job.fold, runs=job_status.status == RUNNING)
            job_status = dataclasses.replace(job_status, progress=progress)
        told[job.name] = job_status
        yield job_status


def _is_over(state: JobState | None) -> bool:
    return state is not None and state.status in (DONE, FAILED)


def _tell_job(
    folder: BatchFolder,
    batch: Batch,
    job: Job,
    state: JobState | None,
    *,
    slurm_id: str,
    queued: slurm.SlurmJob | None,
) -> JobStatus:
    status, detail = _status_of(folder, batch, state, queued)
    error = state.failures[-1].reason if state is not None and state.failures and state.status != DONE else ""
    if status == LOST and not error:
        error = _last_words(folder, slurm_id)
    return JobStatus(
        name=job.name,
        status=status,
        detail=detail,
        batch=folder.number,
        configuration=job.configurations[0] if job.fold is not None else "",
        fold=job.fold,
        slurm_id=slurm_id,
        host=state.host if state is not None else "",
        n_attempts=state.n_attempts if state is not None else 0,
        error=error,
        log=folder.log(job.name),
    )


def _status_of(
    folder: BatchFolder, batch: Batch, state: JobState | None, queued: slurm.SlurmJob | None
) -> tuple[str, str]:
    """The status of a job, and what it waits for."""
    if state is not None and _is_over(state):
        return state.status, ""
    if queued is not None:
        if queued.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"):
            return (WAITING if state is None else REQUEUED), _plain_reason(queued.reason)
        if queued.state == "COMPLETING":
            return ENDING, ""
        if queued.state in ("RUNNING", "CONFIGURING", "SUSPENDED"):
            return RUNNING, "" if state is not None and state.status == RUNNING else "starting"
    if folder.cancelled_file.exists() and not (batch.executor == LOCAL and batch.is_looked_after):
        return CANCELLED, ""
    if batch.executor == SLURM:
        return (STOPPED if state is not None and state.status == STOPPED else LOST), ""
    if state is None:
        return (WAITING, "") if batch.is_looked_after or batch.host != socket.gethostname() else (NOT_BEGUN, "")
    is_here = state.host == socket.gethostname()
    if state.status == RUNNING and is_here and not any(is_running(pid, word="run-job") for pid in state.pids):
        return (RUNNING if batch.is_looked_after else LOST), ""
    return state.status, ""


def _plain_reason(reason: str) -> str:
    meanings = {
        "Dependency": "",
        "None": "",
        "Resources": "for free nodes",
        "Priority": "for jobs of higher priority",
        "BeginTime": "for its time to begin",
    }
    return meanings.get(reason, reason)


def _last_words(folder: BatchFolder, slurm_id: str) -> str:
    """Of the script of a job that has ended without a word of its own."""
    log = folder.submitit / f"{slurm_id}_0_log.out"
    words = last_line(log)
    return f"ended without a word{f'; its last line: {words}' if words else ''} ({log})"


def _trained_here(workspace: Workspace) -> Iterator[JobStatus]:
    """Folds that are there, whoever has trained them."""
    plan, splits = workspace.read_plan(), workspace.read_splits()
    for configuration in plan.configurations:
        model = workspace.model(configuration)
        finished = set(trained_folds(model))
        for fold in range(len(splits.folds)):
            if not FoldFiles.of(model, fold).training.exists():
                continue
            yield JobStatus(
                name=fold_job_name(configuration, fold),
                status=DONE if fold in finished else BEGUN,
                configuration=configuration,
                fold=fold,
                progress=read_progress(workspace, configuration, fold, runs=False),
            )


def read_progress(workspace: Workspace, configuration: str, fold: int, *, runs: bool) -> Progress | None:
    """How far a fold has come; None where no epoch is written down yet."""
    files = FoldFiles.of(workspace.model(configuration), fold)
    epochs = read_log(files.log)
    if not epochs or not files.training.exists():
        return None
    record: TrainingRecord = read_json(files.training, TrainingRecord)
    if record.choices is None:
        return None
    last = epochs[-1]
    fraction = record.choices.budget.fraction_done(last.iteration, last.time_s)
    # The log is as old as the last epoch.
    since_s = max(0.0, time.time() - files.log.stat().st_mtime) if runs else 0.0
    left_s = last.time_s * (1 - fraction) / fraction if fraction else 0.0
    return Progress(
        step=last.iteration, fraction=fraction, dice=last.validation_dice, left_s=max(0.0, left_s - since_s)
    )

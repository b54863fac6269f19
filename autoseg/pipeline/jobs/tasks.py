"""What a job does, in a process of its own."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.core.runtime import limit_cpus, never, resolve_device
from autoseg.core.serialize import digest
from autoseg.pipeline.cascade import prepare_second_stage
from autoseg.pipeline.choose import select
from autoseg.pipeline.complete import find_complete
from autoseg.pipeline.fit import train
from autoseg.pipeline.jobs.batch import Batch, BatchFolder, Job, PredictRequest, TrainRequest
from autoseg.pipeline.pages import report
from autoseg.pipeline.preprocess import preprocess_cases
from autoseg.pipeline.segment import predict
from autoseg.pipeline.workspace import Workspace

if TYPE_CHECKING:
    from autoseg.training.ranks import Ranks

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
HEED_SIGNALS = frozenset({"train", "first_stage", "select"})
"""Tasks that save and end when they are asked to; the others can be ended at any moment, and go on where they were."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and as what a process works.

    Attributes:
        device: such as "cuda:1".
        rank: number of this process among those of the job, from 0.
        rendezvous: the file by which they find each other; None where there is one only.
        attempt: which beginning of the job this is, from 1.
        stop: asked again and again; True saves and ends.
    """

    device: str
    rank: int = 0
    rendezvous: Path | None = None
    attempt: int = 1
    stop: Callable[[], bool] = never


def run_job(folder: Path, name: str, place: Place, *, n_cpus: int | None = None, parent: int | None = None) -> None:
    """Does a job of a batch, or the part of it that is for this process.

    Args:
        folder: of the batch.
        name: of the job.
        place: where.
        n_cpus: that this process may use; None for all that it was granted.
        parent: the process that looks after this one, with which it ends; None for whichever is its parent now.

    Raises:
        AutosegError: whatever the task raises.
    """
    batch = BatchFolder(root=folder).read()
    job = batch.job(name)
    if n_cpus is not None:
        limit_cpus(n_cpus)
    _end_with_parent(parent)
    if place.attempt > 1:
        logger.info("%s begins again, for the %d. time", name, place.attempt)
    TASKS[job.task](batch, job, place)


def _end_with_parent(parent: int | None) -> None:
    """Whoever looks after this process may be killed; then it saves and ends, too, where the system is Linux."""
    if hasattr(signal, "SIGUSR2"):
        # Clusters tell every process of a job that its time is up; the one that looks after this one decides.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if parent is not None and os.getppid() != parent:
        # It ended before the system was asked to tell of that.
        signal.raise_signal(signal.SIGTERM)


def _preprocess(batch: Batch, job: Job, place: Place) -> None:
    del place
    workspace = Workspace(root=batch.work)
    for grid in job.configurations:
        preprocess_cases(workspace, workspace.read_dataset(), workspace.read_plan(), grid, part=job.part)


def _first_stage(batch: Batch, job: Job, place: Place) -> None:
    workspace = Workspace(root=batch.work)
    plan = workspace.read_plan()
    (name,) = job.configurations
    prepare_second_stage(workspace, plan, plan.configuration(name), device=place.device, stop=place.stop)


def _train(batch: Batch, job: Job, place: Place) -> None:
    from autoseg.training.ranks import joined

    request = batch.training
    assert request is not None
    assert job.fold is not None
    (name,) = job.configurations
    device = resolve_device(place.device)
    with joined(place.rank, job.n_processes, rendezvous=place.rendezvous, device=device) as ranks:
        here = replace(request, device=place.device)
        train_as_asked(here, batch.work, name, job.fold, and_select=False, stop=place.stop, ranks=ranks)


def _select(batch: Batch, job: Job, place: Place) -> None:
    del job
    workspace = Workspace(root=batch.work)
    with workspace.selecting():
        complete, missing = find_complete(workspace, workspace.read_plan())
        if complete:
            select(batch.work, device=place.device, stop=place.stop)
        else:
            text = "; ".join(f"{name}: {why}" for name, why in missing.items())
            logger.info("nothing to select from yet: %s", text)
        report(batch.work)


def _predict(batch: Batch, job: Job, place: Place) -> None:
    request = batch.prediction
    assert request is not None
    # What was made for this batch already is not made again when it goes on.
    call = digest(batch) if request.overwrite else ""
    here = replace(request, device=place.device, overwrite=False)
    predict_as_asked(here, batch.work, part=job.part, call=call)


def train_as_asked(
    request: TrainRequest,
    work: Path,
    configuration: str,
    fold: int,
    *,
    and_select: bool = True,
    stop: Callable[[], bool],
    ranks: Ranks | None = None,
) -> None:
    """Trains a fold as a request says, in this process; see `autoseg.pipeline.train`."""
    train(
        work,
        folds=[fold],
        configuration=configuration,
        config=request.config,
        device=request.device,
        validate=request.validate,
        and_select=and_select,
        checkpoint_interval_s=request.checkpoint_interval_s,
        track_with=request.track_with,
        stop=stop,
        ranks=ranks,
    )


def predict_as_asked(request: PredictRequest, work: Path, *, part: tuple[int, int], call: str = "") -> list[Path]:
    """Segments what a request names, in this process; see `autoseg.pipeline.predict`, whose `request` is `call`."""
    options = {known.name: getattr(request, known.name) for known in fields(request)}
    return predict(options.pop("images"), options.pop("output"), work, **options, part=part, request=call)


TASKS: dict[str, Callable[[Batch, Job, Place], None]] = {
    "preprocess": _preprocess,
    "train": _train,
    "first_stage": _first_stage,
    "select": _select,
    "predict": _predict,
}
"""By the names that jobs have for them."""

"""Training what a command asks for, one fold after the other or by other processes, and segmenting on a cluster."""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from autoseg.cluster.slurm import SlurmOptions, look_at_partition
from autoseg.core.errors import AutosegError, Problem, TrainingError, TrainingInterrupted, describe_problems
from autoseg.core.faults import DeviceError, describe_fault
from autoseg.pipeline.configurations import choose_configurations
from autoseg.pipeline.jobs.batch import LOCAL, SLURM, Batch, BatchFolder, Job, PredictRequest, TrainRequest, now
from autoseg.pipeline.jobs.local import run_here
from autoseg.pipeline.jobs.schedule import prediction_jobs, training_jobs
from autoseg.pipeline.jobs.status import status, tell_batches
from autoseg.pipeline.jobs.submit import computes_on_gpu, submit
from autoseg.pipeline.jobs.tasks import train_as_asked
from autoseg.pipeline.quick import configuration_for_time
from autoseg.pipeline.settle import discard_folds, refuse_other_training
from autoseg.pipeline.workspace import Workspace

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FoldsToTrain:
    """Which folds a command trains.

    Attributes:
        configurations: names, of the plan.
        folds: of each.
        resume: they go on from checkpoints where there are some; otherwise what they have is deleted, see `make_way`.
        n_processes: that train a fold together, each on a device.
    """

    configurations: tuple[str, ...]
    folds: tuple[int, ...]
    resume: bool
    n_processes: int

    @property
    def pairs(self) -> list[tuple[str, int]]:
        """Configuration and fold, in the order in which they are trained."""
        return [(name, fold) for name in self.configurations for fold in self.folds]

    def make_way(self, workspace: Workspace) -> None:
        """Deletes what they have, where they do not go on from there.

        Raises:
            TrainingError: another process trains one of them; all are as they were.
        """
        if not self.resume:
            discard_folds([workspace.model(name) for name in self.configurations], self.folds)


def configurations_to_train(
    workspace: Workspace,
    named: str | None,
    request: TrainRequest,
    folds: Sequence[int],
    *,
    options: SlurmOptions | None,
    resume: bool,
    n_processes: int,
) -> list[str]:
    """Those that the user names; else what suits the time and the machine that will train.

    Args:
        workspace: planned.
        named: see `choose_configurations`.
        request: how they are trained.
        folds: of each.
        options: of the cluster that trains them; None for this machine.
        resume: whether the folds go on; otherwise they count as not begun.
        n_processes: that train a fold together.

    Raises:
        PlanError: there is none of that name.
        AutosegError: there is no such cluster.
    """
    if named is not None:
        # A configuration that is named is trained on whatever there is.
        on_gpu = True
    elif options is not None:
        on_gpu = computes_on_gpu(request.device, options, look_at_partition(options.partition))
    else:
        chosen = configuration_for_time(
            workspace, request.config, device=request.device, folds=folds, resume=resume, n_processes=n_processes
        )
        return [chosen.name]
    return choose_configurations(
        workspace.read_plan(),
        named,
        request.config.budget,
        on_cpu=not on_gpu,
        fingerprint=workspace.read_fingerprint,
    )


def train_one_by_one(work: Path, request: TrainRequest, wanted: FoldsToTrain, *, stop: Callable[[], bool]) -> None:
    """Trains folds in this process; one that fails does not stop the others.

    Args:
        work: the work folder, planned.
        request: how they are trained.
        wanted: which.
        stop: asked again and again; True saves and raises.

    Raises:
        TrainingInterrupted: `stop` said so.
        TrainingError: some have failed.
    """
    # All before the first begins: what others have left would count as trained otherwise.
    wanted.make_way(Workspace(root=work))
    problems = []
    for name, fold in wanted.pairs:
        try:
            train_as_asked(request, work, name, fold, stop=stop)
        except (TrainingInterrupted, DeviceError):
            raise
        except (AutosegError, OSError) as error:
            if len(wanted.pairs) == 1:
                raise
            told = describe_fault(error) or str(error)
            logger.warning("%s, fold %d: failed: %s", name, fold, told)
            problems.append(Problem(kind="fold failed", case=f"{name}, fold {fold}", text=told))
    if problems:
        raise TrainingError(
            describe_problems(f"{len(problems)} of {len(wanted.pairs)} folds failed; the others are done.", problems)
        )


def train_side_by_side(
    work: Path, request: TrainRequest, wanted: FoldsToTrain, *, devices: Sequence[str], stop: Callable[[], bool]
) -> list[str]:
    """Trains folds in processes of their own, as many at once as there are devices; the others queue.

    Args:
        work: the work folder, planned.
        request: how they are trained.
        wanted: which.
        devices: such as "cuda:0" and "cuda:1"; "cpu" twice for two processes that share the processors.
        stop: asked again and again; True lets them save and end.

    Returns:
        The names of the jobs that are not done.

    Raises:
        AutosegError: there are fewer devices than a fold needs, or the folds are being trained already.
    """
    if wanted.n_processes > len(devices):
        raise TrainingError(
            f"a fold wants {wanted.n_processes} GPUs, and there are {len(devices)}; give a smaller --gpus-per-fold, or "
            "more --gpus"
        )
    workspace = Workspace(root=work)
    batch = _make_training(workspace, LOCAL, request, wanted, n_preprocessing=1)
    wanted.make_way(workspace)
    return run_here(BatchFolder.create(batch), batch, devices=devices, stop=stop)


def submit_training(
    work: Path,
    request: TrainRequest,
    wanted: FoldsToTrain,
    *,
    options: SlurmOptions,
    n_preprocessing: int | None = None,
) -> dict[str, str]:
    """Submits folds to Slurm, with what has to be done before and after them.

    Args:
        work: the work folder, planned, on a file system that the nodes share.
        request: how they are trained.
        wanted: which; what Slurm refuses deletes nothing.
        options: what is asked of Slurm.
        n_preprocessing: jobs that share the preprocessing; None for as many as the number of cases calls for.

    Returns:
        The number that Slurm has given to each job.

    Raises:
        AutosegError: there is no Slurm here, it refuses a job, or the folds are being trained already.
    """
    workspace = Workspace(root=work)
    batch = _make_training(workspace, SLURM, request, wanted, n_preprocessing=n_preprocessing)
    make_way = None if wanted.resume else partial(wanted.make_way, workspace)
    return submit(batch, device=request.device, options=options, make_way=make_way)


def submit_prediction(work: Path, request: PredictRequest, *, n_jobs: int, options: SlurmOptions) -> dict[str, str]:
    """Submits the segmentation of a folder to Slurm, in parts.

    Args:
        work: the folder for the jobs; also the work folder with the model, unless the request names one.
        request: what is segmented with what.
        n_jobs: that share the images.
        options: what is asked of Slurm.

    Returns:
        The number that Slurm has given to each job.

    Raises:
        AutosegError: there is no Slurm here, it refuses a job, such jobs wait or run already, or there are no such
            images.
    """
    missing = [str(path) for path in request.images if not path.exists()]
    if missing:
        raise AutosegError(f"{', '.join(missing)}: no such file or folder")
    request = dataclasses.replace(
        request,
        images=tuple(path.absolute() for path in request.images),
        output=request.output.absolute(),
        model=None if request.model is None else request.model.absolute(),
    )
    for folder, jobs in tell_batches(Workspace(root=work), BatchFolder.all_in(work)):
        earlier = folder.read().prediction
        if earlier is not None and earlier.output == request.output:
            _refuse({known.name for known in jobs if known.is_on_its_way})
    batch = _make_batch(work, SLURM, prediction_jobs(n_jobs), prediction=request)
    return submit(batch, device=request.device, options=options)


def _make_training(
    workspace: Workspace, executor: str, request: TrainRequest, wanted: FoldsToTrain, *, n_preprocessing: int | None
) -> Batch:
    """The batch of a training.

    Raises:
        AutosegError: somebody trains these folds already, or others of the model were trained otherwise.
    """
    _check_free(workspace.root, wanted.pairs)
    jobs = training_jobs(
        workspace,
        configurations=wanted.configurations,
        folds=wanted.folds,
        validate=request.validate,
        n_processes=wanted.n_processes,
        n_preprocessing=n_preprocessing,
    )
    plan = workspace.read_plan()
    for name in wanted.configurations:
        # Before a job makes cases for another plan than that of folds which stay.
        model, configuration = workspace.model(name), plan.configuration(name)
        refuse_other_training(model, plan, configuration, request.config, folds=wanted.folds, resume=wanted.resume)
    return _make_batch(workspace.root, executor, jobs, training=request)


def _check_free(work: Path, wanted: Collection[tuple[str, int]]) -> None:
    """Nobody trains these folds already.

    Raises:
        AutosegError: somebody does.
    """
    known = status(work) if BatchFolder.all_in(work) else ()
    _refuse({one.name for one in known if one.is_on_its_way and (one.configuration, one.fold) in wanted})


def _refuse(busy: Collection[str]) -> None:
    if busy:
        names = ", ".join(sorted(busy))
        raise AutosegError(f"these jobs are on their way already: {names}; wait for them, or 'autoseg cancel' first")


def _make_batch(
    work: Path,
    executor: str,
    jobs: tuple[Job, ...],
    *,
    training: TrainRequest | None = None,
    prediction: PredictRequest | None = None,
) -> Batch:
    return Batch(
        work=work.absolute(),
        executor=executor,
        jobs=jobs,
        training=training,
        prediction=prediction,
        host=socket.gethostname(),
        pid=os.getpid(),
        submitted=now(),
    )

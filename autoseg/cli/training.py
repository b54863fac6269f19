"""`autoseg train` and `autoseg select`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoseg.cli.options import (
    DEFAULT_WORK,
    Account,
    CpusPerTask,
    Device,
    Executor,
    GpusPerNode,
    Memory,
    Partition,
    Sbatch,
    Time,
    Work,
    parse_duration,
    say,
    slurm_options,
    stopping_on_signals,
    work_option,
)
from autoseg.core.errors import AutosegError, TrainingError, TrainingInterrupted

if TYPE_CHECKING:
    from autoseg.pipeline.workspace import Workspace

commands = typer.Typer()


@commands.command()
def train(
    fold: Annotated[str, typer.Option("--fold", help="A range (0..4), a list (0,2), one (3) or all.")] = "all",
    configuration: Annotated[
        str | None,
        typer.Option(
            "-c",
            "--configuration",
            help="2d, 3d_fullres, cascade, several as in 2d,3d_fullres, or all. Default: the recommended one; of a "
            "cascade only the first stage on a CPU, or where --max-time is less than an hour; of large scans a coarser "
            "grid (3d_quick) where time is short.",
        ),
    ] = None,
    work: Work = DEFAULT_WORK,
    epochs: Annotated[int | None, typer.Option(min=1, help="Budget: epochs of 250 steps.")] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Budget: training steps.")] = None,
    max_time: Annotated[
        str | None,
        typer.Option(
            help="Budget: training time of each fold, such as 15m, 1h30m or 90s, a bare number being seconds; the "
            "validation comes on top. Without a budget: an hour on a CPU, a full training on a GPU."
        ),
    ] = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Random seed of weights, patches and augmentation.")] = 0,
    resume: Annotated[
        bool,
        typer.Option(
            help="Go on from a checkpoint where there is one; --no-resume first deletes what the folds of --fold have, "
            "finished ones too; without --fold that is every fold."
        ),
    ] = True,
    recipe: Annotated[str, typer.Option(help="fast, or published (the schedule of the nnU-Net paper).")] = "fast",
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Patches per step; default: the plan's, on a CPU at most 2 (of slices 32)."),
    ] = None,
    validate: Annotated[bool, typer.Option(help="Score each fold on whole volumes; after the last, select.")] = True,
    network: Annotated[
        str, typer.Option(help="auto: a short --max-time takes smaller patches and a narrower network; or planned.")
    ] = "auto",
    sampling: Annotated[
        str | None,
        typer.Option(
            help="published, or balanced: patches centred on each class of the dataset equally often; default: of the "
            "recipe."
        ),
    ] = None,
    augment: Annotated[
        str, typer.Option(help="torch; batchgenerators (the classic pipeline on the CPU, for comparison); or none.")
    ] = "torch",
    mirror: Annotated[
        bool | None,
        typer.Option(
            "--mirror/--no-mirror",
            help="Mirror patches; default: in trainings that are long enough. Prediction then averages such copies.",
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="auto (the fastest that the device trains well in), float32, bfloat16 or float16.")
    ] = "auto",
    compile_network: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile", help="torch.compile; default: on a GPU where more than 15 minutes are left."
        ),
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Only operations that repeat bit for bit; slower on a GPU.")
    ] = False,
    track: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="tensorboard: curves and sample slices for it, in the fold's folder."),
    ] = None,
    checkpoint_interval: Annotated[
        str,
        typer.Option(
            help="Save the state at the end of each epoch, and after this time at the latest; a bare number is seconds."
        ),
    ] = "10m",
    force: Annotated[
        bool, typer.Option("--force", help="With -c cascade: make one where the plan has found none necessary.")
    ] = False,
    gpus: Annotated[
        str | None,
        typer.Option(
            metavar="auto|0,2|4",
            help="GPUs that train folds side by side: all, these, or so many; folds queue where there are more. "
            "Default: all. With --device cpu, so many processes.",
        ),
    ] = None,
    gpus_per_fold: Annotated[
        int, typer.Option(min=1, metavar="N", help="GPUs that train one fold together (DistributedDataParallel).")
    ] = 1,
    executor: Executor = "local",
    partition: Partition = None,
    time: Time = None,
    gpus_per_node: GpusPerNode = None,
    cpus_per_task: CpusPerTask = None,
    memory: Memory = None,
    account: Account = None,
    sbatch: Sbatch = None,
    preprocess_jobs: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Jobs of the cluster that share the preprocessing; default: by cases."),
    ] = None,
) -> None:
    """Train folds of the cross-validation and score each on its validation cases.

    Ctrl-C (SIGINT), SIGTERM and SIGUSR1 save and stop with the exit codes 130, 143 and 138; the same command goes on
    from there. Whatever else ends the training loses what came after the last checkpoint.

    -c cascade trains all folds of the first stage before, where they are missing, each within the same budget.
    """
    from autoseg import pipeline
    from autoseg.data.splits import parse_folds
    from autoseg.pipeline.jobs import local, start
    from autoseg.pipeline.jobs.batch import TrainRequest
    from autoseg.training.config import Budget, TrainConfig

    options = slurm_options(
        executor,
        partition=partition,
        time=time,
        gpus_per_node=gpus_per_node,
        cpus_per_task=cpus_per_task,
        memory=memory,
        account=account,
        sbatch=sbatch,
        preprocess_jobs=preprocess_jobs,
    )
    if options is not None and gpus is not None:
        raise AutosegError("--gpus is for this machine; on a cluster, --gpus-per-fold says how many train a fold")
    workspace = pipeline.Workspace(root=work)
    folds = parse_folds(fold, n_folds=len(workspace.read_splits().folds))
    if force:
        pipeline.force_cascade(work, configuration)
    request = TrainRequest(
        config=TrainConfig(
            budget=Budget.make(
                epochs=epochs,
                iterations=iterations,
                max_time_s=parse_duration(max_time) if max_time is not None else None,
            ),
            recipe=recipe,
            batch_size=batch_size,
            seed=seed,
            network=network,
            sampling=sampling,
            augment=augment,
            mirror=mirror,
            precision=precision,
            compile=compile_network,
            deterministic=deterministic,
        ),
        device=device,
        validate=validate,
        checkpoint_interval_s=parse_duration(checkpoint_interval),
        track_with=tuple(track or ()),
    )
    names = start.configurations_to_train(
        workspace, configuration, request, folds, options=options, resume=resume, n_processes=gpus_per_fold
    )
    wanted = start.FoldsToTrain(
        configurations=tuple(names), folds=tuple(folds), resume=resume, n_processes=gpus_per_fold
    )
    if options is not None:
        ids = start.submit_training(work, request, wanted, options=options, n_preprocessing=preprocess_jobs)
        say(f"{len(ids)} jobs submitted\nNext: autoseg status{work_option(work)}")
        return
    devices = local.choose_devices(device, gpus, n_jobs=len(wanted.pairs), gpus_per_fold=gpus_per_fold)
    with stopping_on_signals() as stop:
        if len(devices) == gpus_per_fold == 1:
            start.train_one_by_one(work, request, wanted, stop=stop)
        else:
            not_done = start.train_side_by_side(work, request, wanted, devices=devices, stop=stop)
            if stop():
                raise TrainingInterrupted("stopped; the same command goes on from there")
            _tell_jobs(work, not_done)
    if validate:
        for name in names:
            _tell_scores(workspace, name, folds)
    say(f"\nNext: autoseg predict IN OUT{_configuration_option(workspace, names)}{work_option(work)}")


def _configuration_option(workspace: Workspace, trained: Sequence[str]) -> str:
    """What `predict` has to be told to take what has just been trained: nothing where it does so by itself."""
    from autoseg.pipeline.choose import selected_models
    from autoseg.pipeline.inputs import configuration_to_predict

    try:
        selected = selected_models(workspace)
    except AutosegError:
        # Whoever predicts is told; the training that has just ended is well.
        selected = None
    predicting = selected[0].candidate.configurations if selected else (configuration_to_predict(workspace),)
    return "" if len(trained) > 1 or trained[0] in predicting else f" -c {trained[0]}"


def _tell_jobs(work: Path, not_done: list[str]) -> None:
    """What became of folds that were trained side by side.

    Raises:
        TrainingError: not all are done.
    """
    from autoseg.cli.jobs import describe_status
    from autoseg.pipeline.jobs.status import status

    jobs = status(work)
    say(describe_status(jobs))
    if not_done:
        logs = "\n".join(
            f"  {job.log}" for job in jobs if job.name in not_done and job.log is not None and job.log.exists()
        )
        raise TrainingError(
            f"not done: {', '.join(not_done)}; the others are. Mend what the logs tell, and the same command goes on "
            f"from there:\n{logs}"
        )


def _tell_scores(workspace: Workspace, configuration: str, folds: Sequence[int]) -> None:
    from autoseg import pipeline
    from autoseg.reporting.text import describe_label_dice

    for fold in folds:
        evaluation = pipeline.read_scores(workspace, configuration, fold)
        if evaluation is not None:
            say(f"\n{configuration}, fold {fold}, {len(evaluation.cases)} validation cases")
            say(describe_label_dice(evaluation))


@commands.command()
def select(
    work: Work = DEFAULT_WORK,
    device: Device = "auto",
    ensembles: Annotated[
        bool, typer.Option("--ensembles/--no-ensembles", help="Also compare ensembles of two configurations.")
    ] = True,
) -> None:
    """Compare all trained configurations, decide post-processing, and choose what 'predict' uses."""
    from autoseg import pipeline
    from autoseg.reporting.text import describe_selection

    with stopping_on_signals() as stop:
        selection = pipeline.select(work, device=device, ensembles=ensembles, stop=stop)
    say(describe_selection(selection))
    say(f"\nNext: autoseg report{work_option(work)}")

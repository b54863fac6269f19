"""Which jobs a request is cut into, and which wait for which."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from autoseg.pipeline.jobs.batch import Job, fold_job_name
from autoseg.pipeline.preprocess import cases_to_preprocess
from autoseg.pipeline.workspace import Workspace
from autoseg.training.folds import trained_folds

CASES_PER_PREPROCESSING_JOB = 250
MAX_PREPROCESSING_JOBS = 32


def training_jobs(
    workspace: Workspace,
    *,
    configurations: Sequence[str],
    folds: Sequence[int],
    validate: bool,
    n_processes: int = 1,
    n_preprocessing: int | None = None,
) -> tuple[Job, ...]:
    """Preprocessing where it is needed, then folds, then the selection when all of them are done.

    The first stage of a cascade is trained on all folds before the second one begins, where it is not there yet.

    Args:
        workspace: planned.
        configurations: names, of the plan.
        folds: of each.
        validate: ends with the selection and the report.
        n_processes: that train one fold together.
        n_preprocessing: jobs that share the preprocessing; None for as many as the number of cases calls for.
    """
    plan, dataset, splits = workspace.read_plan(), workspace.read_dataset(), workspace.read_splits()
    jobs: list[Job] = []
    first_stages = dict.fromkeys(
        first for name in configurations if (first := plan.configuration(name).previous) is not None
    )
    stages = [name for name in configurations if name not in first_stages]
    grids = list(dict.fromkeys(plan.grid(name) for name in (*first_stages, *configurations)))
    n_todo = max(len(cases_to_preprocess(workspace, dataset, plan, grid)) for grid in grids)
    if n_todo:
        wanted = n_preprocessing or math.ceil(n_todo / CASES_PER_PREPROCESSING_JOB)
        n_parts = min(wanted, n_todo, MAX_PREPROCESSING_JOBS)
        jobs += [
            Job(
                name=f"preprocess-{part}" if n_parts > 1 else "preprocess",
                task="preprocess",
                configurations=tuple(grids),
                part=(part, n_parts),
            )
            for part in range(1, n_parts + 1)
        ]
    preprocessed = tuple(job.name for job in jobs)

    def train(name: str, which: Sequence[int], after: tuple[str, ...]) -> tuple[str, ...]:
        made_jobs = [
            Job(
                name=fold_job_name(name, fold),
                task="train",
                configurations=(name,),
                fold=fold,
                after=after,
                n_processes=n_processes,
            )
            for fold in which
        ]
        jobs.extend(made_jobs)
        return tuple(job.name for job in made_jobs)

    ready = {}
    for first in first_stages:
        asked = folds if first in configurations else ()
        missing = sorted({*asked, *_untrained(workspace, first, len(splits.folds))})
        ready[first] = train(first, missing, preprocessed) or preprocessed
    for name in stages:
        first = plan.configuration(name).previous
        after = preprocessed
        if first is not None:
            stage = Job(name=f"{name}-first-stage", task="first_stage", configurations=(name,), after=ready[first])
            jobs.append(stage)
            after = (stage.name,)
        train(name, folds, after)
    if validate:
        jobs.append(Job(name="select", task="select", after=tuple(job.name for job in jobs if job.task == "train")))
    return tuple(jobs)


def _untrained(workspace: Workspace, configuration: str, n_folds: int) -> list[int]:
    return sorted(set(range(n_folds)) - set(trained_folds(workspace.model(configuration))))


def prediction_jobs(n_jobs: int) -> tuple[Job, ...]:
    """Parts of a folder of images."""
    return tuple(Job(name=f"predict-{part}", task="predict", part=(part, n_jobs)) for part in range(1, n_jobs + 1))


def groups_of(jobs: Collection[Job]) -> list[tuple[Job, ...]]:
    """Jobs that are alike but for the fold or the part, and wait for the same ones, in order."""
    groups: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.task, job.configurations, job.after, job.n_processes), []).append(job)
    return [tuple(group) for group in groups.values()]

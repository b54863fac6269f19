"""The cascade: a first stage at low resolution, whose predictions a second one refines at full resolution."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from autoseg.core.errors import PlanError, TrainingError
from autoseg.core.geometry import join_numbers
from autoseg.core.locks import locked
from autoseg.core.runtime import map_threads, n_cpus
from autoseg.core.serialize import digest, write_json
from autoseg.data.io import read_label
from autoseg.pipeline.complete import why_incomplete
from autoseg.pipeline.configurations import CASCADE
from autoseg.pipeline.fold_validation import validate_fold, validation_label_map
from autoseg.pipeline.preprocess import preprocess_cases
from autoseg.pipeline.workspace import DEFAULT_WORK, Workspace
from autoseg.planning.plan import ConfigurationPlan, Plan
from autoseg.training.folds import trained_folds

logger = logging.getLogger(__name__)


def force_cascade(work: Path | str = DEFAULT_WORK, configuration: str | None = CASCADE) -> Plan:
    """Gives a plan a cascade where the planner has found none necessary; one that is there stays.

    Args:
        work: the work folder, planned.
        configuration: what is to be trained, several with commas; the cascade has to be among them.

    Raises:
        PlanError: something else is asked for, or there is no 3D configuration to make one for.
    """
    from autoseg.planning import configurations

    workspace = Workspace(root=Path(work))
    plan = workspace.read_plan()
    if plan.cascade is not None:
        return plan
    if not {CASCADE, "3d_cascade_fullres"} & {name.strip() for name in (configuration or "").split(",")}:
        raise PlanError("--force makes a cascade; say so with -c cascade, or leave it out")
    with workspace.planning():
        plan = workspace.read_plan()
        if plan.cascade is not None:  # Another process has made one meanwhile.
            return plan
        added, reasons = configurations.force_cascade(plan, n_cases=len(workspace.read_fingerprint().cases))
        with_cascade = plan.extended(added, reasons)
        write_json(workspace.plan_file, with_cascade)
    for known in added.values():
        logger.info("the plan now has %s, at %s mm", known.name, join_numbers(known.spacing_mm))
    return with_cascade


def prepare_second_stage(
    workspace: Workspace,
    plan: Plan,
    configuration: ConfigurationPlan,
    *,
    train_folds: Callable[..., object] | None = None,
    device: str,
    stop: Callable[[], bool],
) -> list[int]:
    """Puts out-of-fold predictions of the first stage on the grid of the second, where they are not there yet.

    Processes that do this at the same time wait for each other.

    Args:
        workspace: the work folder; cases are preprocessed for the second stage.
        plan: the plan.
        configuration: the second stage.
        train_folds: trains those that the first stage lacks, with `configuration` and `folds` as in `train`; None to
            refuse.
        device: as in `train`.
        stop: asked after every case that is predicted; True raises.

    Returns:
        The folds of the first stage that were missing.

    Raises:
        TrainingError: the first stage is not complete, or a case validates in no fold, so that no prediction of it is
            out-of-fold.
        TrainingInterrupted: `stop` said so.
    """
    from autoseg.inference.model import read_model

    first = configuration.previous
    assert first is not None
    dataset, splits = workspace.read_dataset(), workspace.read_splits()
    fold_of = {case: fold for fold, split in enumerate(splits.folds) for case in split.validation}
    needed = {case for split in splits.folds for case in split.training}
    if lacking := sorted(needed - fold_of.keys()):
        raise TrainingError(
            f"the second stage of a cascade learns from predictions of networks that have not seen the case, and "
            f"{len(lacking)} cases validate in no fold, such as {lacking[0]}; plan with a cross-validation (--folds 5)"
        )
    model, folds = workspace.model(first), range(len(splits.folds))
    with locked(model / ".first-stage.lock", waiting_for=f"completes {model.name}"):
        missing = sorted(set(folds) - set(trained_folds(model)))
        if missing and train_folds is not None:
            logger.info(
                "%s needs all folds of %s; training %s", configuration.name, first, ", ".join(map(str, missing))
            )
            train_folds(configuration=first, folds=missing)
        if (why := why_incomplete(workspace, first)) is not None:
            raise TrainingError(f"{first}, the first stage of {configuration.name}, cannot be built on: {why}")
        preprocess_cases(workspace, dataset, plan, first)
        for fold in folds:
            validate_fold(workspace, first, fold, device=device, stop=stop)
        digests = {fold: read_model(model).digest([fold]) for fold in folds}
        map_threads(
            lambda case: _put_on_grid(
                workspace,
                plan,
                configuration.name,
                case,
                label_map=validation_label_map(workspace, first, fold_of[case], case),
                model=digests[fold_of[case]],
            ),
            sorted(fold_of),
            n_threads=n_cpus(),
            description=f"predictions of {first} for {configuration.name}",
        )
    return missing


def _put_on_grid(
    workspace: Workspace, plan: Plan, configuration: str, case: str, *, label_map: Path, model: str
) -> None:
    """An out-of-fold prediction on the grid of the second stage, unless it is there already."""
    from autoseg.preprocessing.preprocess import preprocess_label
    from autoseg.preprocessing.store import (
        PreprocessedCase,
        find_previous_damage,
        is_previous_current,
        write_previous,
    )

    stored = PreprocessedCase(workspace.preprocessed(plan.grid(configuration), case))
    folder = workspace.first_stage(configuration, case)
    key = digest((model, stored.stored.key))
    if (damaged := find_previous_damage(folder, key)) is not None:
        logger.warning("%s: is damaged; it is made again from %s", damaged, label_map)
    elif is_previous_current(folder, key):
        return
    label, _ = read_label(label_map)
    classes = preprocess_label(plan.labels.values_to_classes(label), stored.record)
    write_previous(folder, classes.numpy(), key=key)

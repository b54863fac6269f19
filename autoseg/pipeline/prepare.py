"""From a dataset to a plan."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from autoseg.core.errors import (
    WARNING,
    AutosegError,
    PlanError,
    describe_problems,
)
from autoseg.core.labels import LabelSpec
from autoseg.core.runtime import format_duration, resolve_device
from autoseg.core.serialize import holds_json, write_json
from autoseg.data.dataset import Dataset
from autoseg.data.layouts import open_dataset
from autoseg.data.splits import DEFAULT_N_FOLDS, SplitChoices, Splits, split_dataset
from autoseg.pipeline.configurations import configuration_to_train, default_configuration
from autoseg.pipeline.examine import look_at, refuse_foreign_folder
from autoseg.pipeline.explain import measure_plan, write_report
from autoseg.pipeline.preprocess import announce_disk, cases_to_preprocess, preprocess_cases
from autoseg.pipeline.quick import may_be_coarser
from autoseg.pipeline.workspace import DEFAULT_WORK, Workspace
from autoseg.planning.choices import Choices
from autoseg.planning.configurations import QUICK_NAMES
from autoseg.planning.estimates import estimate
from autoseg.planning.fingerprint import Fingerprint
from autoseg.planning.plan import Plan, Reason

logger = logging.getLogger(__name__)


def plan(
    dataset: Path | str,
    work: Path | str = DEFAULT_WORK,
    *,
    choices: Choices | None = None,
    like: Path | str | None = None,
    n_folds: int | None = None,
    splits: SplitChoices | None = None,
    fix: bool = False,
    allow_outside: bool = False,
    preprocess: Literal["chosen", "all", "none"] = "chosen",
    measure_on: str | None = None,
) -> Plan:
    """Checks and fingerprints a dataset, plans how to segment it, explains the plan, and preprocesses the cases.

    Example:
        >>> import autoseg
        >>> plan = autoseg.plan("dataset", "work")
        >>> plan.recommended
        '3d_fullres'

    Args:
        dataset: a folder or manifest in one of the known layouts; only read. Where its files have not changed since the
            last time, they are not read again.
        work: the work folder.
        choices: what the user decides instead of the planner.
        like: a ready-made plan or the plan of another dataset, whose grids, patches and networks to take.
        n_folds: of the cross-validation; None for five, or for those of a file.
        splits: what the user says about the folds.
        fix: mend what is safe to mend, in memory: channels on another grid than the first are resampled onto it, label
            values near whole numbers rounded, masks of 0 and 255 read as 1 where the list of labels says so, or
            as black and white where their borders are grey, and voxels that are NaN or infinite given the lowest value
            of the others. All of them are errors otherwise.
        allow_outside: a manifest may name files outside of its folder.
        preprocess: "chosen" for the configurations that `choices` names, or else the one that this machine trains by
            default, where that is certain; "all" for every one; "none" for none. What is missing is preprocessed when
            it is trained.
        measure_on: the GPU to measure these configurations on, see `measure`; None for none.

    Returns:
        The plan, which is also in `work/plan.json`, and explained in `work/report/plan.html`.

    Raises:
        DatasetError: the layout is not known, or cases cannot be used; all are listed, also in `work/check.json`.
        PlanError: a choice is not valid.
    """
    started = time.monotonic()
    workspace = Workspace(root=Path(work))
    source = _read_source(like, choices)
    index = dataclasses.replace(open_dataset(Path(dataset), allow_outside=allow_outside), fix=fix)
    refuse_foreign_folder(workspace, index.name)
    # Before any image is read, so that what is wrong with the folds is told at once.
    cases, made_splits = split_dataset(index.cases, splits, n_folds=n_folds, folder=_folder_of(Path(dataset)))
    index, fingerprint, check = look_at(dataclasses.replace(index, cases=cases), workspace, _folder_of(Path(dataset)))
    assert index.labels is not None
    if len({case.group for case in cases}) == 1:
        logger.warning(
            "there is one patient only, to train on and to validate on: its scores say nothing about other patients"
        )
    with workspace.planning():
        plan = _decide(fingerprint, index.labels, index.name, len(made_splits.folds), choices, source)
        plan = _with_optional_channels(plan, index)
        plan = _with_fold_reason(plan, made_splits)
        plan = _with_known_measurements(workspace, _with_quick_grid(workspace, plan))
        _set_aside_replaced_plan(workspace, plan)
        write_json(workspace.splits_file, made_splits)
        write_json(workspace.plan_file, plan)
        logger.info("planned in %s", format_duration(time.monotonic() - started))

        named = tuple(plan.configurations) if preprocess == "all" else (choices and choices.configurations) or ()
        if measure_on is not None:
            measured = named or (default_configuration(plan).name,)
            alone = [name for name in measured if plan.configuration(name).previous is None]
            plan = measure_plan(workspace, plan, alone, device=measure_on)
        estimates = estimate(fingerprint, plan)
        found = (problem for problem in check.problems if problem.severity == WARNING)
        estimates = dataclasses.replace(estimates, warnings=tuple(dict.fromkeys((*found, *estimates.warnings))))
        if estimates.warnings:
            logger.warning("%s", describe_problems("Some cases deserve a look.", estimates.warnings))
        write_report(workspace, index, plan, fingerprint, estimates)
        if preprocess != "none":
            grids = dict.fromkeys(plan.grid(stage) for stage in _stages_to_preprocess(plan, named, fingerprint))
            missing = {grid: len(cases_to_preprocess(workspace, index, plan, grid)) for grid in grids}
            announce_disk(workspace, plan, {grid: n / len(index.cases) for grid, n in missing.items()})
            for grid in grids:
                preprocess_cases(workspace, index, plan, grid)
        return plan


def _stages_to_preprocess(plan: Plan, named: Sequence[str], fingerprint: Fingerprint) -> list[str]:
    """Named configurations with their first stages; where none are, what this machine trains by default.

    The rest is preprocessed when it is trained. Full resolution can take a hundred gigabytes, and a CPU, which
    has an hour for each fold, often trains a coarser grid.
    """
    on_cpu = resolve_device("auto").type == "cpu"
    if not named:
        chosen = configuration_to_train(plan, None, None, on_cpu=on_cpu, fingerprint=lambda: fingerprint)
        if on_cpu and may_be_coarser(plan, chosen):
            text = (
                "cases are preprocessed when they are trained: on a CPU, --max-time decides on which grid "
                "(--configurations %s preprocesses them now)"
            )
            logger.info(text, chosen.name)
            return []
        named = (chosen.name,)
    return [stage for name in named for stage in (plan.configuration(name).previous, name) if stage]


def plan_from_fingerprint(
    fingerprint_file: Path,
    dataset_file: Path,
    *,
    choices: Choices | None = None,
    like: Path | str | None = None,
    n_folds: int = DEFAULT_N_FOLDS,
) -> tuple[Plan, Fingerprint]:
    """Plans without any image, and writes nothing.

    Args:
        fingerprint_file: `fingerprint.json` of a work folder, or nnU-Net's `dataset_fingerprint.json`.
        dataset_file: `dataset.json` of a work folder, of nnU-Net or of the Medical Segmentation Decathlon.
        choices: what the user decides instead of the planner.
        like: see `plan`.
        n_folds: of the cross-validation.

    Returns:
        The plan, and the fingerprint that it was made from.
    """
    from autoseg.planning.exchange import read_fingerprint

    source = _read_source(like, choices)
    fingerprint, labels, name = read_fingerprint(fingerprint_file, dataset_file)
    return _decide(fingerprint, labels, name, n_folds, choices, source), fingerprint


def _read_source(like: Path | str | None, choices: Choices | None) -> tuple[str, Plan] | None:
    """Name and content of the plan to take everything from."""
    from autoseg.planning.ready import read_source_plan

    if like is None:
        return None
    if choices not in (None, Choices()):
        raise PlanError("--like takes everything from another plan; leave out the options that choose for yourself")
    return Path(like).name, read_source_plan(Path(like))


def _decide(
    fingerprint: Fingerprint,
    labels: LabelSpec,
    dataset: str,
    n_folds: int,
    choices: Choices | None,
    source: tuple[str, Plan] | None,
) -> Plan:
    """The plan that the fingerprint calls for, or that of another dataset."""
    from autoseg.planning.planner import make_plan
    from autoseg.planning.transfer import transfer_plan

    if source is None:
        return make_plan(fingerprint, labels, dataset=dataset, n_folds=n_folds, choices=choices)
    name, plan = source
    return transfer_plan(plan, fingerprint, labels, dataset=dataset, n_folds=n_folds, name=name)


def _folder_of(dataset: Path) -> Path:
    return dataset if dataset.is_dir() else dataset.parent


def _with_fold_reason(plan: Plan, splits: Splits) -> Plan:
    """The plan with the reason of its folds, where somebody has said how to split."""
    if not splits.is_chosen:
        return plan
    return dataclasses.replace(plan, reasons=(*plan.reasons, Reason(subject="n_folds", text=splits.reason)))


def _with_optional_channels(plan: Plan, index: Dataset) -> Plan:
    """The plan with the channels that some cases lack."""
    n_lacking = {
        name: sum(case.images[channel] is None for case in index.cases if len(case.images) > 1)
        for channel, name in enumerate(index.channels)
    }
    lacking = {name: n for name, n in n_lacking.items() if n}
    if not lacking:
        return plan
    told = ", ".join(f"{name} by {n}" for name, n in lacking.items())
    text = f"of {len(index.cases)} cases lacked: {told}; training leaves them out at random, prediction may lack them"
    return dataclasses.replace(
        plan,
        optional_channels=tuple(lacking),
        reasons=(*plan.reasons, Reason(subject="optional_channels", text=text)),
    )


def _with_quick_grid(workspace: Workspace, plan: Plan) -> Plan:
    """The plan with the grid that a short training has given the plan before, where all other grids stay."""
    before = _read_plan_before(workspace)
    if before is None or before.is_edited or (before.axis_order, before.labels) != (plan.axis_order, plan.labels):
        return plan
    quick = {name: before.configurations[name] for name in QUICK_NAMES.values() if name in before.configurations}
    configurations = {**plan.configurations, **quick}
    if configurations != before.configurations:
        return plan
    subjects = tuple(f"configurations.{name}." for name in quick)
    reasons = (reason for reason in before.reasons if reason.subject.startswith(subjects))
    return dataclasses.replace(plan, configurations=configurations, reasons=(*plan.reasons, *reasons)).signed()


def _with_known_measurements(workspace: Workspace, plan: Plan) -> Plan:
    """The plan with those measurements of the plan before that are still true."""
    before = _read_plan_before(workspace)
    if before is None:
        return plan
    keys = {plan.measurement_key(name) for name in plan.configurations}
    return dataclasses.replace(plan, measurements=tuple(known for known in before.measurements if known.key in keys))


def _read_plan_before(workspace: Workspace) -> Plan | None:
    """The plan that a new one replaces; None where there is none that can be read."""
    try:
        return workspace.read_plan()
    except AutosegError:
        return None


def _set_aside_replaced_plan(workspace: Workspace, plan: Plan) -> None:
    """A plan that differs from the new one may have been edited by hand: it is kept beside it."""
    file = workspace.plan_file
    if not file.exists() or holds_json(file, plan):
        return
    number = 1
    while (kept := file.with_name(f"plan.previous-{number}.json")).exists():
        number += 1
    file.replace(kept)
    logger.warning("the plan has changed; the one before is kept as %s", kept)

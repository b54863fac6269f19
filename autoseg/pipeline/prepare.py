"""From a dataset to a plan and preprocessed cases."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path

from autoseg import __version__
from autoseg.core.errors import AutosegError, DatasetError, PlanError, WorkspaceError, describe_problems
from autoseg.core.labels import LabelSpec
from autoseg.core.runtime import format_duration, map_threads, n_cpus
from autoseg.core.serialize import digest, dump_json, read_json, write_json
from autoseg.data.check import CheckResult, LoadedCase, discover_labels, load_case, scan_dataset
from autoseg.data.dataset import Case, Dataset, open_dataset
from autoseg.data.splits import DEFAULT_N_FOLDS, make_splits
from autoseg.pipeline.explain import write_report
from autoseg.pipeline.workspace import DEFAULT_WORK, Workspace, default_configuration
from autoseg.planning.choices import Choices
from autoseg.planning.estimates import estimate
from autoseg.planning.fingerprint import Fingerprint, intensities_per_case, measure_case, summarise
from autoseg.planning.plan import Plan

logger = logging.getLogger(__name__)


def plan(
    dataset: Path | str,
    work: Path | str = DEFAULT_WORK,
    *,
    choices: Choices | None = None,
    like: Path | str | None = None,
    n_folds: int = DEFAULT_N_FOLDS,
    preprocess: bool | str = True,
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
        n_folds: of the cross-validation.
        preprocess: True for the configurations that `choices` names, or else the one that is trained by default; "all"
            for every one; False for none. What is missing is preprocessed when it is trained.

    Returns:
        The plan, which is also in `work/plan.json`, and explained in `work/report/plan.html`.

    Raises:
        DatasetError: the layout is not known, or cases cannot be used; all of them are listed, nothing is written.
        PlanError: a choice is not valid.
    """
    started = time.monotonic()
    workspace = Workspace(root=Path(work))
    index, fingerprint, check = _look_at(open_dataset(Path(dataset)), workspace)
    assert index.labels is not None
    splits = make_splits(index.cases, n_folds=n_folds)
    if len(splits.folds) == 1:
        logger.warning(
            "there is one patient only, to train on and to validate on: its scores say nothing about other patients"
        )
    made = decide(fingerprint, index.labels, dataset=index.name, n_folds=len(splits.folds), choices=choices, like=like)
    made = _keep_measurements(workspace, made)

    _keep_replaced_plan(workspace, made)
    write_json(workspace.dataset_file, index)
    write_json(workspace.check_file, check)
    write_json(workspace.fingerprint_file, fingerprint)
    write_json(workspace.splits_file, splits)
    write_json(workspace.plan_file, made)
    logger.info("planned in %s", format_duration(time.monotonic() - started))
    estimates = estimate(fingerprint, made)
    if estimates.warnings:
        logger.warning("%s", describe_problems("Some cases deserve a look.", estimates.warnings))
    write_report(workspace, index, made, fingerprint, estimates)
    if preprocess:
        if preprocess == "all":
            names = tuple(made.configurations)
        else:
            names = (choices and choices.configurations) or (default_configuration(made).name,)
        for grid in dict.fromkeys(made.grid(name) for name in names):
            preprocess_cases(workspace, index, made, grid)
    return made


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

    fingerprint, labels, name = read_fingerprint(fingerprint_file, dataset_file)
    return decide(fingerprint, labels, dataset=name, n_folds=n_folds, choices=choices, like=like), fingerprint


def decide(
    fingerprint: Fingerprint,
    labels: LabelSpec,
    *,
    dataset: str,
    n_folds: int,
    choices: Choices | None = None,
    like: Path | str | None = None,
) -> Plan:
    """The plan that the fingerprint calls for, or that of another dataset.

    Raises:
        PlanError: a choice is not valid, or there are choices beside `like`.
    """
    from autoseg.planning.planner import make_plan, transfer_plan

    if like is None:
        return make_plan(fingerprint, labels, dataset=dataset, n_folds=n_folds, choices=choices)
    if choices not in (None, Choices()):
        raise PlanError("--like takes everything from another plan; leave out the options that choose for yourself")
    from autoseg.planning.ready import read_source_plan

    source = read_source_plan(Path(like))
    return transfer_plan(source, fingerprint, labels, dataset=dataset, n_folds=n_folds, name=Path(like).name)


def _look_at(index: Dataset, workspace: Workspace) -> tuple[Dataset, Fingerprint, CheckResult]:
    """Checks and fingerprints the cases; or what an earlier look has found, where no file has changed since."""
    logger.info("%s: layout %s, number of cases %d", index.name, index.layout, len(index.cases))
    files = [_file_identity(file) for case in index.cases for file in (*case.images, case.label)]
    key = digest((__version__, index, files))
    try:
        known: CheckResult = read_json(workspace.check_file, CheckResult)
        if known.key == key:
            seen = workspace.read_dataset(), workspace.read_fingerprint(), known
            logger.info("no file has changed since the last time: the fingerprint is still right")
            return seen
    except AutosegError:
        pass  # There was no earlier look, or it was that of another version.
    labels = index.labels or discover_labels(index, n_threads=n_cpus())
    index = dataclasses.replace(index, labels=labels)
    n_intensities = intensities_per_case(len(index.cases))
    measurements = scan_dataset(
        index, labels, lambda case: measure_case(case, labels, n_intensities=n_intensities), n_threads=n_cpus()
    )
    check = CheckResult(n_cases=len(index.cases), problems=(), key=key)
    return index, summarise(measurements, index.channels), check


def _keep_measurements(workspace: Workspace, made: Plan) -> Plan:
    """The plan with those measurements of the plan before that are still true."""
    try:
        before = workspace.read_plan()
    except AutosegError:
        return made
    if (before.labels, before.channels) != (made.labels, made.channels):
        return made
    kept = tuple(
        known
        for known in before.measurements
        if before.configuration(known.configuration) == made.configurations.get(known.configuration)
    )
    return dataclasses.replace(made, measurements=kept)


def _keep_replaced_plan(workspace: Workspace, made: Plan) -> None:
    """A plan that differs from the new one may have been edited by hand: it is kept beside it."""
    if (
        workspace.dataset_file.exists()
        and workspace.read_dataset().name != made.dataset
        and workspace.plan_file.exists()
    ):
        raise WorkspaceError(
            f"{workspace.root}: holds the dataset '{workspace.read_dataset().name}', not '{made.dataset}'; "
            "name another work folder with -w"
        )
    file = workspace.plan_file
    if file.exists() and file.read_text(encoding="utf-8") != dump_json(made) + "\n":
        kept = file.with_name("plan.previous.json")
        file.replace(kept)
        logger.warning("the plan has changed; the one before is kept as %s", kept)


def preprocess_cases(workspace: Workspace, dataset: Dataset, made: Plan, configuration: str) -> str:
    """Brings every case onto the grid of a configuration; cases that are there already stay.

    Args:
        workspace: where to.
        dataset: the cases.
        made: the plan.
        configuration: its name.

    Returns:
        The name of the grid, see `Plan.grid`.

    Raises:
        WorkspaceError: the files have changed since they were checked.
    """
    from autoseg.preprocessing.store import is_current

    started = time.monotonic()
    grid = made.grid(configuration)
    shared = (made.axis_order, made.configuration(grid).spacing_mm, made.normalization, made.labels)
    todo = []
    for case in dataset.cases:
        key = digest((shared, [_file_identity(file) for file in (*case.images, case.label)]))
        if not is_current(workspace.preprocessed(grid, case.id), key):
            todo.append((case, key))
    if todo:
        map_threads(
            lambda item: _preprocess_case(workspace, made, grid, *item),
            todo,
            n_threads=n_cpus(),
            description=f"preprocessing {grid}",
        )
    logger.info(
        "preprocessed %d cases for %s in %s, %d were there already",
        len(todo),
        grid,
        format_duration(time.monotonic() - started),
        len(dataset.cases) - len(todo),
    )
    return grid


def _file_identity(file: Path) -> tuple[str, int, int]:
    try:
        stat = file.stat()
    except OSError as error:
        raise WorkspaceError(f"{file}: the file has gone since 'autoseg plan'; restore it, or plan again") from error
    return str(file), stat.st_size, stat.st_mtime_ns


def _preprocess_case(workspace: Workspace, made: Plan, grid: str, case: Case, key: str) -> None:
    from autoseg.preprocessing.preprocess import preprocess_image, preprocess_label, record_case
    from autoseg.preprocessing.store import write_case

    # Checked once more: files may have been edited since the plan was made.
    loaded = load_case(case, n_channels=len(made.channels), labels=made.labels)
    if not isinstance(loaded, LoadedCase):
        raise DatasetError(describe_problems("a case cannot be used", loaded))
    record = record_case(loaded.image, loaded.geometry, made, grid)
    write_case(
        workspace.preprocessed(grid, case.id),
        preprocess_image(loaded.image, record, made).numpy(),
        preprocess_label(made.labels.values_to_classes(loaded.label), record).numpy(),
        key=key,
        record=record,
        n_classes=made.labels.n_classes,
    )

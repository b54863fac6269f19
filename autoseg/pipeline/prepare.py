"""From a dataset to a plan and preprocessed cases."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from autoseg.core.errors import WorkspaceError
from autoseg.core.runtime import format_duration, map_threads, n_cpus
from autoseg.core.serialize import digest, dump_json, write_json
from autoseg.data.check import CheckResult, discover_labels, load_image, scan_dataset
from autoseg.data.dataset import Case, Dataset, open_dataset
from autoseg.data.io import read_label
from autoseg.data.splits import DEFAULT_N_FOLDS, make_splits
from autoseg.pipeline.workspace import DEFAULT_WORK, Workspace
from autoseg.planning.plan import Plan

logger = logging.getLogger(__name__)


def plan(
    dataset: Path | str,
    work: Path | str = DEFAULT_WORK,
    *,
    configurations: Sequence[str] | None = None,
    n_folds: int = DEFAULT_N_FOLDS,
    preprocess: bool = True,
) -> Plan:
    """Checks and fingerprints a dataset, plans how to segment it, and preprocesses its cases.

    Example:
        >>> import autoseg
        >>> plan = autoseg.plan("dataset", "work")
        >>> plan.recommended
        '3d_fullres'

    Args:
        dataset: a folder or manifest in one of the known layouts; only read.
        work: the work folder.
        configurations: which to preprocess for, or ["all"]; None for the recommended one. Others are preprocessed when
            they are trained.
        n_folds: of the cross-validation.
        preprocess: whether to preprocess now.

    Returns:
        The plan, which is also in `work/plan.json`.

    Raises:
        DatasetError: the layout is not known, or cases cannot be used; all of them are listed, nothing is written.
    """
    from autoseg.planning.fingerprint import intensities_per_case, measure_case, summarise
    from autoseg.planning.planner import make_plan

    started = time.monotonic()
    workspace = Workspace(root=Path(work))
    index = open_dataset(Path(dataset))
    logger.info("%s: %d cases, layout %s", index.name, len(index.cases), index.layout)
    labels = index.labels or discover_labels(index, n_threads=n_cpus())
    index = dataclasses.replace(index, labels=labels)
    n_intensities = intensities_per_case(len(index.cases))
    measurements = scan_dataset(
        index, labels, lambda case: measure_case(case, labels, n_intensities=n_intensities), n_threads=n_cpus()
    )
    fingerprint = summarise(measurements, index.channels)
    splits = make_splits(index.cases, n_folds=n_folds)
    made = make_plan(fingerprint, labels, dataset=index.name, n_folds=len(splits.folds))
    chosen = tuple(made.configurations) if configurations == ["all"] else tuple(configurations or [made.recommended])
    for name in chosen:
        made.configuration(name)

    _keep_replaced_plan(workspace, made)
    write_json(workspace.dataset_file, index)
    write_json(workspace.check_file, CheckResult(n_cases=len(index.cases), problems=()))
    write_json(workspace.fingerprint_file, fingerprint)
    write_json(workspace.splits_file, splits)
    write_json(workspace.plan_file, made)
    logger.info("planned in %s", format_duration(time.monotonic() - started))
    if preprocess:
        for name in chosen:
            preprocess_cases(workspace, index, made, name)
    return made


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


def preprocess_cases(workspace: Workspace, dataset: Dataset, made: Plan, configuration: str) -> None:
    """Brings every case onto the grid of a configuration; cases that are there already stay.

    Args:
        workspace: where to.
        dataset: the cases.
        made: the plan.
        configuration: its name.

    Raises:
        WorkspaceError: the files have changed since they were checked.
    """
    from autoseg.preprocessing.store import is_current

    started = time.monotonic()
    grid = made.configuration(configuration)
    shared = (made.axis_order, grid.spacing_mm, made.normalization, made.labels)
    todo = []
    for case in dataset.cases:
        key = digest((shared, [_file_identity(file) for file in (*case.images, case.label)]))
        if not is_current(workspace.preprocessed(configuration, case.id), key):
            todo.append((case, key))
    if todo:
        map_threads(
            lambda item: _preprocess_case(workspace, made, configuration, *item),
            todo,
            n_threads=n_cpus(),
            description=f"preprocessing {configuration}",
        )
    logger.info(
        "preprocessed %d cases for %s in %s, %d were there already",
        len(todo),
        configuration,
        format_duration(time.monotonic() - started),
        len(dataset.cases) - len(todo),
    )


def _file_identity(file: Path) -> tuple[str, int, int]:
    try:
        stat = file.stat()
    except OSError as error:
        raise WorkspaceError(f"{file}: the file has gone since 'autoseg plan'; restore it, or plan again") from error
    return str(file), stat.st_size, stat.st_mtime_ns


def _preprocess_case(workspace: Workspace, made: Plan, configuration: str, case: Case, key: str) -> None:
    from autoseg.preprocessing.preprocess import preprocess_image, preprocess_label, record_case
    from autoseg.preprocessing.store import write_case

    image, geometry = load_image(case.images, n_channels=len(made.channels))
    label, _ = read_label(case.label)
    record = record_case(image, geometry, made, configuration)
    write_case(
        workspace.preprocessed(configuration, case.id),
        preprocess_image(image, record, made).numpy(),
        preprocess_label(made.labels.values_to_classes(label), record).numpy(),
        key=key,
        record=record,
        n_classes=made.labels.n_classes,
    )

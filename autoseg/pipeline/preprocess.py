"""Bringing cases onto the grids of a plan."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from autoseg.core.errors import AutosegError, DatasetError, FormatError, WorkspaceError, list_some
from autoseg.core.geometry import join_numbers
from autoseg.core.labels import LabelSpec
from autoseg.core.runtime import format_duration, format_memory, machine_memory_gib, map_threads, n_cpus
from autoseg.core.serialize import digest
from autoseg.data.dataset import Case, Dataset
from autoseg.data.io import read_geometry
from autoseg.data.load import LoadedCase, load_case, loading_gib
from autoseg.pipeline.examine import file_identity
from autoseg.pipeline.workspace import Workspace
from autoseg.planning.estimates import GIB, estimate
from autoseg.planning.plan import Plan

logger = logging.getLogger(__name__)


def preprocess_cases(
    workspace: Workspace,
    dataset: Dataset,
    plan: Plan,
    configuration: str,
    *,
    part: tuple[int, int] = (1, 1),
    announce: bool = False,
) -> str:
    """Brings every case onto the grid of a configuration; cases that are there already stay, if they are whole.

    Processes that do this at the same time wait for each other, but for those that share the cases.

    Args:
        workspace: where to.
        dataset: the cases.
        plan: the plan.
        configuration: its name.
        part: (2, 8) takes the second of eight parts of the cases, so that eight processes can share them.
        announce: say how much disk they will take.

    Returns:
        The name of the grid, see `Plan.grid`.

    Raises:
        WorkspaceError: the files have changed since they were checked, or have gone.
    """
    started = time.monotonic()
    grid = plan.grid(configuration)
    cases = dataset.cases[part[0] - 1 :: part[1]]
    dataset = dataclasses.replace(dataset, cases=cases)
    todo = cases_to_preprocess(workspace, dataset, plan, configuration, thoroughly=True)
    if announce:
        announce_disk(workspace, plan, {grid: len(todo) / len(cases)})
    n_made = 0
    if todo:
        with workspace.preprocessing(grid, part):
            n_made = sum(
                map_threads(
                    lambda item: _preprocess_case(workspace, plan, grid, *item, fix=dataset.fix),
                    todo,
                    n_threads=n_cpus(),
                    description=f"preprocessing {grid}",
                    needed_gib=lambda item: loading_gib(item[0]) + _resampling_gib(item[0], plan, grid),
                )
            )
    logger.info(
        "preprocessed %d cases for %s in %s, %d were there already",
        n_made,
        grid,
        format_duration(time.monotonic() - started),
        len(cases) - n_made,
    )
    return grid


def cases_to_preprocess(
    workspace: Workspace, dataset: Dataset, plan: Plan, configuration: str, *, thoroughly: bool = False
) -> list[tuple[Case, str]]:
    """Cases that are not on the grid of a configuration, or not as they are now, each with the key of its store.

    Args:
        workspace: where they are.
        dataset: the cases.
        plan: the plan.
        configuration: its name.
        thoroughly: also those whose stored files are damaged, for which all of them are read; a warning names these.

    Raises:
        WorkspaceError: a file of a case has gone.
    """
    from autoseg.preprocessing.store import find_damage, is_current

    grid = plan.grid(configuration)
    scaling = [channel.decisive for channel in plan.normalization]
    of_grid = plan.configuration(grid)
    shared: tuple[object, ...] = (plan.axis_order, of_grid.spacing_mm, scaling, plan.labels)
    if of_grid.smoothed:
        shared = (*shared, "smoothed")
    keys = {}
    for case in dataset.cases:
        try:
            files = [file_identity(file) for file in case.files]
        except WorkspaceError as error:
            damaged = find_damage(workspace.preprocessed(grid, case.id))
            if damaged is None:
                raise
            raise WorkspaceError(f"{damaged}: is damaged, and cannot be made again. {error}") from error
        # The same files may stand for other channels or structures.
        roles = [file is not None for file in case.images], list(case.masks)
        keys[case.id] = digest((shared, _known_outputs(case, plan.labels), files, roles))
    damage: dict[str, Path] = {}
    stored = [case.id for case in dataset.cases if workspace.preprocessed(grid, case.id).is_dir()] if thoroughly else []
    if stored:
        found = map_threads(
            lambda case: find_damage(workspace.preprocessed(grid, case), keys[case]),
            stored,
            n_threads=n_cpus(),
            description=f"checking what is preprocessed for {grid}",
        )
        damage = {case: file for case, file in zip(stored, found, strict=True) if file is not None}
    if damage:
        files_told = list_some([str(file) for file in damage.values()])
        logger.warning("%d preprocessed cases are damaged, and made again from the scans: %s", len(damage), files_told)
    return [
        (case, keys[case.id])
        for case in dataset.cases
        if case.id in damage or not is_current(workspace.preprocessed(grid, case.id), keys[case.id])
    ]


def announce_disk(workspace: Workspace, plan: Plan, missing: Mapping[str, float]) -> None:
    """Says how much disk will be taken by the part of all cases that each grid lacks, and warns where there is less."""
    if not any(missing.values()):
        return
    try:
        estimates = estimate(workspace.read_fingerprint(), plan).configurations
    except AutosegError as error:
        logger.warning("how much disk the preprocessed cases will take cannot be told: %s", error)
        return
    needed_gib = sum(taken.disk_gib * missing.get(taken.configuration, 0.0) for taken in estimates)
    free_gib = shutil.disk_usage(workspace.root).free / GIB
    logger.info(
        "preprocessed cases take about %s of disk, %s are free", format_memory(needed_gib), format_memory(free_gib)
    )
    if needed_gib > free_gib:
        logger.warning("the disk may get full; give a work folder on a larger one with -w, or plan a coarser --spacing")


def _known_outputs(case: Case, labels: LabelSpec) -> tuple[bool, ...] | None:
    """Which of the network's outputs were annotated in a case; None for all."""
    known = [case.knows(name) for name in labels.structures]
    if all(known):
        return None
    return tuple(known) if labels.regions else (True, *known)


def _resampling_gib(case: Case, plan: Plan, grid: str) -> float:
    """At most, from the header of a case; 0 where it cannot be read."""
    from autoseg.preprocessing.preprocess import grid_of, resampling_gib

    try:
        geometry = read_geometry(case.image_files[0])
    except FormatError:
        return 0.0  # Whoever loads it tells.
    return resampling_gib(grid_of(geometry.shape, geometry, plan, grid)[0], plan)


def _preprocess_case(workspace: Workspace, plan: Plan, grid: str, case: Case, key: str, *, fix: bool) -> bool:
    """Whether it was made; not where another process has done so since it was looked for."""
    from autoseg.preprocessing.occupied import crop_occupied, find_occupied
    from autoseg.preprocessing.preprocess import preprocess_image, preprocess_label, record_case, resampling_gib
    from autoseg.preprocessing.store import find_damage, is_current, write_case

    folder = workspace.preprocessed(grid, case.id)
    if is_current(folder, key) and find_damage(folder, key) is None:
        return False
    # Checked once more: files may have been edited since the plan was made.
    loaded = load_case(case, n_channels=len(plan.channels), labels=plan.labels, fix=fix)
    if not isinstance(loaded, LoadedCase):
        raise DatasetError.listing("a case cannot be used", loaded)
    occupied = find_occupied(loaded.image)
    record = record_case(occupied, loaded.geometry, plan, grid)
    needed_gib = resampling_gib(record.shape, plan)
    if needed_gib > machine_memory_gib():
        raise WorkspaceError(
            f"{case.id}: becomes {join_numbers(record.shape)} voxels at {join_numbers(record.spacing_mm)} mm, which "
            f"takes about {format_memory(needed_gib)} of memory, more than may be used here; plan with a coarser "
            "--spacing"
        )
    write_case(
        folder,
        preprocess_image(loaded.image, record, plan).numpy(),
        preprocess_label(plan.labels.values_to_classes(loaded.label), record).numpy(),
        key=key,
        record=record,
        n_classes=plan.labels.n_classes,
        occupied=crop_occupied(occupied, record),
        known=_known_outputs(case, plan.labels),
    )
    return True

"""What to train where a user names no configuration: a coarser grid where there is time for small patches only."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.core.errors import FormatError
from autoseg.core.geometry import join_numbers
from autoseg.core.locks import is_free
from autoseg.core.runtime import resolve_device
from autoseg.core.serialize import read_json, write_json
from autoseg.pipeline.configurations import configuration_to_train
from autoseg.pipeline.settle import read_settled, staying_folds
from autoseg.pipeline.workspace import Workspace
from autoseg.planning.configurations import QUICK_BELOW_COVERAGE, QUICK_NAMES, plan_quick, shown_part
from autoseg.planning.plan import ConfigurationPlan, Plan
from autoseg.training.adapt import adapts, choose_network, with_requests
from autoseg.training.ladder import SMALLEST_PATCH_SCALE, resize
from autoseg.training.record import FoldFiles, TrainingRecord

if TYPE_CHECKING:
    from autoseg.training.config import TrainConfig

logger = logging.getLogger(__name__)


def configuration_for_time(
    workspace: Workspace,
    config: TrainConfig,
    *,
    device: str = "auto",
    folds: Sequence[int] = (),
    resume: bool = True,
    n_processes: int = 1,
) -> ConfigurationPlan:
    """The configuration that is trained where a user names none.

    It is that of `configuration_to_train`, unless a patch for which there is time shows less than 5 % of the median
    case: then one on a coarser grid, see `plan_quick`, which the plan has from then on. What has begun with the same
    budget goes on as it is, and a spacing or a patch size that the user has set is kept.

    Args:
        workspace: planned.
        config: what the user asks for.
        device: as in `train`.
        folds: that are to be trained.
        resume: whether they go on; otherwise they count as not begun.
        n_processes: that train a fold together.
    """
    plan, where = workspace.read_plan(), resolve_device(device)
    on_cpu = where.type == "cpu"
    chosen = configuration_to_train(plan, None, config.budget, on_cpu=on_cpu, fingerprint=workspace.read_fingerprint)
    if chosen.previous is not None or not adapts(plan, config, on_cpu=on_cpu) or not may_be_coarser(plan, chosen):
        return chosen
    n_cases = len(workspace.read_splits().folds[0].training)
    quick_name = QUICK_NAMES[chosen.n_axes]
    begun = {
        name: staying_folds(workspace.model(name), folds, resume=resume)
        for name in (quick_name, chosen.name)
        if name in plan.configurations
    }
    for name, staying in begun.items():
        if staying and _goes_on(workspace.model(name), staying, config, n_cases=n_cases, on_cpu=on_cpu):
            return plan.configuration(name)
    network, _ = choose_network(plan, chosen, config, n_cases=n_cases, device=where, n_processes=n_processes)
    if _shows_enough(chosen, network.patch_size):
        if begun.get(quick_name):
            text = "there is time for larger patches: %s is trained anew; -c %s goes on with what is there"
            logger.info(text, chosen.name, quick_name)
        return chosen
    is_used = bool(begun.get(quick_name)) or _is_being_trained(workspace.model(quick_name), folds)
    return _add_quick(workspace, chosen.name, network.patch_size, is_kept=resume or is_used)


def may_be_coarser(plan: Plan, configuration: ConfigurationPlan) -> bool:
    """Whether a short training may take a coarser grid than that of a configuration, which the user has not set."""
    smallest = resize(configuration, "half", SMALLEST_PATCH_SCALE)
    return not _is_set_by_user(plan, configuration.name) and not _shows_enough(configuration, smallest.patch_size)


def _goes_on(model: Path, folds: Sequence[int], config: TrainConfig, *, n_cases: int, on_cpu: bool) -> bool:
    """Whether folds of a model have been trained with the budget that is asked for now."""
    settled = read_settled(model)
    if settled is None:
        return False
    budgets = [settled.choices.budget]
    for fold in folds:
        # What cannot be read is told when it is trained.
        with suppress(FormatError, OSError):
            record = read_json(FoldFiles.of(model, fold).training, TrainingRecord)
            budgets += [record.choices.budget] if record.choices else []
    return with_requests(settled.choices, config, n_cases=n_cases, on_cpu=on_cpu).budget in budgets


def _is_being_trained(model: Path, folds: Sequence[int]) -> bool:
    return any(not is_free(FoldFiles.of(model, fold).lock) for fold in folds)


def _is_set_by_user(plan: Plan, name: str) -> bool:
    """Whether the user has said which grid, also where a coarser one follows from it, or which patches."""
    return plan.is_set_by_user(name, "patch_size") or any(
        plan.is_set_by_user(known, "spacing_mm") for known in ("2d", "3d_fullres")
    )


def _shows_enough(configuration: ConfigurationPlan, patch_size: Sequence[int]) -> bool:
    return shown_part(patch_size, configuration.median_shape) >= QUICK_BELOW_COVERAGE


def _add_quick(workspace: Workspace, name: str, patch_size: Sequence[int], *, is_kept: bool) -> ConfigurationPlan:
    """Gives the plan a configuration on a coarser grid; the named one where there is none worth it.

    One that the plan has already is kept, where that is wanted: others may be preprocessing their cases for it.
    """
    with workspace.planning():
        plan: Plan = workspace.read_plan()
        known = plan.configurations.get(QUICK_NAMES[plan.configuration(name).n_axes])
        if known is not None and is_kept:
            return known
        planned = plan_quick(
            plan, plan.configuration(name), patch_size=patch_size, fingerprint=workspace.read_fingerprint()
        )
        if planned is None:
            return plan.configuration(name)
        quick, reasons = planned
        write_json(workspace.plan_file, plan.extended({quick.name: quick}, reasons))
    logger.info(
        "there is time for patches of %s, %.1f%% of a %s in %s: %s is trained, at %s mm; -c %s trains that",
        join_numbers(patch_size),
        100 * prod(patch_size) / prod(plan.configuration(name).median_shape),
        "slice" if quick.n_axes == 2 else "case",
        name,
        quick.name,
        join_numbers(round(edge_mm, 3) for edge_mm in quick.spacing_mm),
        name,
    )
    return quick

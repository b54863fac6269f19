"""What to train where a user names no configuration: a coarser grid where there is time for small patches only."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from autoseg.core.geometry import join_numbers
from autoseg.core.runtime import resolve_device
from autoseg.core.serialize import write_json
from autoseg.pipeline.workspace import Workspace, configuration_to_train
from autoseg.planning.configurations import QUICK_BELOW_COVERAGE, plan_quick
from autoseg.planning.plan import ConfigurationPlan, Plan

if TYPE_CHECKING:
    from autoseg.training.config import TrainConfig

logger = logging.getLogger(__name__)


def configuration_for_time(workspace: Workspace, config: TrainConfig, *, device: str = "auto") -> ConfigurationPlan:
    """The configuration that is trained where a user names none.

    It is the recommended one, unless a patch for which there is time has less than 5 % of the median case: then one on
    a coarser grid, see `plan_quick`, which the plan has from then on. What has begun with the same budget goes on as it
    is, and a spacing or a patch size that the user has set is kept.

    Args:
        workspace: planned.
        config: what the user asks for.
        device: as in `train`.
    """
    from autoseg.pipeline.settle import read_settled
    from autoseg.training.adapt import SMALLEST_PATCH_SCALE, adapts, choose_training, is_set_by_user, resize
    from autoseg.training.folds import usable_folds

    made, where = workspace.read_plan(), resolve_device(device)
    chosen = configuration_to_train(made, None, config.budget, on_cpu=where.type == "cpu")
    if chosen.previous is not None or not adapts(made, config, on_cpu=where.type == "cpu"):
        return chosen
    if any(is_set_by_user(made, chosen, decision) for decision in ("spacing_mm", "patch_size")):
        return chosen
    smallest = resize(chosen, "half", SMALLEST_PATCH_SCALE)
    if _shows_enough(chosen, smallest.patch_size):
        return chosen
    quick_name = f"{'3d' if chosen.n_axes == 3 else '2d'}_quick"
    begun = [name for name in (chosen.name, quick_name) if usable_folds(workspace.model(name))]
    for name in begun:
        settled = read_settled(workspace.model(name))
        if name in made.configurations and settled and config.budget in (None, settled.choices.budget):
            return made.configuration(name)
    n_cases = len(workspace.read_splits().folds[0].training)
    choices, _ = choose_training(made, chosen, config, n_cases=n_cases, device=where)
    patch_size = choices.configuration.patch_size
    if _shows_enough(chosen, patch_size):
        return chosen
    if quick_name in begun and quick_name in made.configurations:
        return made.configuration(quick_name)
    return _add_quick(workspace, chosen.name, patch_size)


def _shows_enough(configuration: ConfigurationPlan, patch_size: Sequence[int]) -> bool:
    return prod(patch_size) / prod(configuration.median_shape) >= QUICK_BELOW_COVERAGE


def _add_quick(workspace: Workspace, name: str, patch_size: Sequence[int]) -> ConfigurationPlan:
    """Gives the plan a configuration on a coarser grid; the named one where there is none worth it."""
    with workspace.planning():
        made: Plan = workspace.read_plan()
        planned = plan_quick(
            made, made.configuration(name), patch_size=patch_size, fingerprint=workspace.read_fingerprint()
        )
        if planned is None:
            return made.configuration(name)
        quick, reasons = planned
        subjects = {reason.subject for reason in reasons}
        kept = (reason for reason in made.reasons if reason.subject not in subjects)
        plan = replace(
            made, configurations={**made.configurations, quick.name: quick}, reasons=(*kept, *reasons)
        ).signed()
        write_json(workspace.plan_file, plan)
    logger.info(
        "there is time for patches of %s, %.1f%% of a case in %s: %s is trained, at %s mm; -c %s trains that",
        join_numbers(patch_size),
        100 * prod(patch_size) / prod(made.configuration(name).median_shape),
        name,
        quick.name,
        join_numbers(round(edge_mm, 3) for edge_mm in quick.spacing_mm),
        name,
    )
    return quick

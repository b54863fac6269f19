"""Which configuration of a plan a command is about."""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import prod

from autoseg.core.errors import PlanError
from autoseg.core.runtime import format_duration
from autoseg.planning.configurations import largest_voxel_ml
from autoseg.planning.fingerprint import Fingerprint
from autoseg.planning.plan import ConfigurationPlan, Plan
from autoseg.training.config import Budget

logger = logging.getLogger(__name__)

ALL = "all"
CASCADE = "cascade"
"""What a user may call the second stage of a cascade, however it is called in the plan."""

MIN_CASCADE_TIME_S = 3600.0
"""For a fold. With less, a recommended cascade is not trained: its second stage waits for the first stages of all
folds, and then has too little time to add to them."""


def default_configuration(plan: Plan, name: str | None = None) -> ConfigurationPlan:
    """The configuration to train and to predict with, where a user names one or none.

    Args:
        plan: the plan.
        name: of a configuration, "cascade" for the second stage of the cascade, or None for the recommended one.

    Raises:
        PlanError: there is none of that name.
    """
    if name == CASCADE and name not in plan.configurations:
        if plan.cascade is None:
            raise why_no_cascade(plan)
        return plan.cascade
    return plan.configuration(plan.recommended if name is None else name)


def configuration_to_train(
    plan: Plan, name: str | None, budget: Budget | None, *, on_cpu: bool, fingerprint: Callable[[], Fingerprint]
) -> ConfigurationPlan:
    """`default_configuration`, but for a recommended cascade for which there is little time.

    Of that it is the first stage, or 3d_fullres where the smallest structures have too few voxels in the first stage.

    Args:
        plan: the plan.
        name: as in `default_configuration`.
        budget: of each fold; None for a full training.
        on_cpu: whether it is trained there.
        fingerprint: reads that of the dataset.
    """
    chosen = default_configuration(plan, name)
    if name is not None or chosen.previous is None:
        return chosen
    time_s = None if budget is None else budget.max_time_s
    if not on_cpu and (time_s is None or time_s >= MIN_CASCADE_TIME_S):
        return chosen
    first = plan.configuration(chosen.previous)
    text = (
        "a cascade takes at least %s for each fold, on a GPU: its first stage, %s, is trained alone; -c cascade trains "
        "both"
    )
    if "3d_fullres" in plan.configurations and prod(first.spacing_mm) / 1000 > largest_voxel_ml(fingerprint()):
        first = plan.configuration("3d_fullres")
        text = (
            "a cascade takes at least %s for each fold, on a GPU, and the voxels of its first stage are too large for "
            "the smallest structures: %s is trained; -c cascade trains the cascade"
        )
    logger.info(text, format_duration(MIN_CASCADE_TIME_S), first.name)
    return first


def choose_configurations(
    plan: Plan, names: str | None, budget: Budget | None, *, on_cpu: bool, fingerprint: Callable[[], Fingerprint]
) -> list[str]:
    """The configurations to train that a user names, in the plan's order.

    Args:
        plan: the plan.
        names: "2d,3d_fullres", "all", "cascade", or None, see `configuration_to_train`.
        budget: of each fold.
        on_cpu: whether they are trained there.
        fingerprint: reads that of the dataset.

    Raises:
        PlanError: there is none of that name.
    """
    if names == ALL:
        return list(plan.configurations)
    parts: list[str | None] = [part.strip() for part in (names or "").split(",") if part.strip()]
    chosen = {
        configuration_to_train(plan, part, budget, on_cpu=on_cpu, fingerprint=fingerprint).name
        for part in parts or [None]
    }
    return [name for name in plan.configurations if name in chosen]


def why_no_cascade(plan: Plan) -> PlanError:
    """Says why a plan has no cascade, and how to get one."""
    subjects = ("configurations.3d_lowres", "configurations")
    why = next((reason.text for subject in subjects for reason in plan.reasons if reason.subject == subject), "")
    advice = "'autoseg train -c cascade --force' makes one all the same"
    if "3d_fullres" not in plan.configurations:
        advice = "there is no 3d_fullres either, which it would refine"
    return PlanError(f"the plan has no cascade{': ' if why else ''}{why}; {advice}")

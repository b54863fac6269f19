"""Whether the decisions of a plan go together: what the planner guarantees, and a person who edits a plan must keep."""

from __future__ import annotations

from autoseg.core.errors import PlanError
from autoseg.planning.memory import count_feature_map_values
from autoseg.planning.patch import limit_patch
from autoseg.planning.plan import ConfigurationPlan, Plan
from autoseg.planning.presets import Preset, find_preset


def check_plan(plan: Plan) -> None:
    """Checks every configuration against the memory of the plan and the sizes of the cases.

    That names, numbers of axes and divisibility are right is checked when a plan is made from its parts.

    Args:
        plan: to check. Patches that were taken over from another dataset may be larger than the cases of this one.

    Raises:
        PlanError: a decision is not valid; with the nearest value that is.
    """
    preset = find_preset(plan.preset, plan.gpu_memory_gib)
    for configuration in plan.configurations.values():
        if "like" not in plan.provenance:
            _check_size(configuration)
        _check_memory(configuration, plan.labels.n_outputs, preset)


def _check_size(configuration: ConfigurationPlan) -> None:
    limit = limit_patch(configuration.spacing_mm, configuration.largest_shape, configuration.network.divisor)
    if any(size > most for size, most in zip(configuration.patch_size, limit, strict=True)):
        steps = zip(configuration.patch_size, limit, configuration.network.divisor, strict=True)
        nearest = [min(size, max(most // step, 1) * step) for size, most, step in steps]
        raise PlanError(
            f"{configuration.name}: patch_size {list(configuration.patch_size)} is larger than the largest case, "
            f"{list(configuration.largest_shape)}, padded to the network's strides; the nearest valid one is {nearest}"
        )


def _check_memory(configuration: ConfigurationPlan, n_outputs: int, preset: Preset) -> None:
    budget = preset.budgets[configuration.n_axes]
    values = count_feature_map_values(configuration.network, configuration.patch_size, n_outputs)
    largest = budget.largest_batch_size(values)
    if configuration.batch_size <= largest:
        return
    needed_gib = preset.needed_memory_gib(values, batch_size=configuration.batch_size, n_axes=configuration.n_axes)
    if largest:
        advice = f"the nearest valid batch_size is {largest}"
    elif smaller := _shrink(configuration, n_outputs, preset):
        advice = f"not even one patch fits; the nearest valid patch_size is {smaller}"
    else:
        advice = "not even the smallest patch of this network fits; use fewer features, or a larger gpu_memory_gib"
    raise PlanError(
        f"{configuration.name}: patch_size {list(configuration.patch_size)} at batch_size {configuration.batch_size} "
        f"needs about {needed_gib:.3g} GiB, the plan is for gpu_memory_gib {preset.memory_gib:g}; {advice}"
    )


def _shrink(configuration: ConfigurationPlan, n_outputs: int, preset: Preset) -> list[int] | None:
    """The patch, shortened where it is longest against the cases until the batch fits; None where none does."""
    patch, network = list(configuration.patch_size), configuration.network
    budget = preset.budgets[configuration.n_axes]
    while True:
        largest = budget.largest_batch_size(count_feature_map_values(network, tuple(patch), n_outputs))
        if largest >= configuration.batch_size:
            return patch
        axes = [axis for axis, size in enumerate(patch) if size > network.divisor[axis]]
        # More than one voxel must remain in the lowest stage.
        if sum(size // step - 1 for size, step in zip(patch, network.divisor, strict=True)) <= 1:
            return None
        longest = max(axes, key=lambda axis: patch[axis] / configuration.median_shape[axis])
        patch[longest] -= network.divisor[longest]

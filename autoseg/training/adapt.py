"""What a recipe makes of a plan for the budget, the machine and the data at hand: each choice with its reason.

All folds of a configuration share one set of choices, so they can be averaged.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

from autoseg.core.errors import TrainingError
from autoseg.core.faults import is_out_of_memory
from autoseg.core.geometry import join_numbers
from autoseg.core.runtime import MAX_MEMORY_FRACTION, format_duration, format_memory, machine_memory_gib
from autoseg.planning.memory import count_feature_map_values
from autoseg.planning.plan import SET_BY_USER, ConfigurationPlan, Plan, Reason
from autoseg.training.config import ITERATIONS_PER_EPOCH, Budget, TrainConfig
from autoseg.training.ladder import FEW_CASES, candidates, has_large_patches
from autoseg.training.recipe import RECIPES, Recipe, choose_batch_size
from autoseg.training.record import TrainingChoices

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

CPU_BYTES_PER_VALUE = 14
"""Memory that a training takes for each value of the feature maps: 14 to 16 in float32, 7 to 11 in bfloat16."""
MIN_USEFUL_STEPS = 200
MAX_TIMING_FRACTION = 0.05
"""Of the budget; whatever has not been timed by then is not."""

SAMPLING_REASONS = {
    "published": "a case is drawn, then one of its classes",
    "balanced": "a class is drawn, then a case that has it, so rare classes are centred on as often as common ones",
}


class StepTimer(Protocol):
    """Tells the seconds of a step of a configuration."""

    def __call__(self, configuration: ConfigurationPlan, /, *, batch_size: int) -> float: ...


def choose_training(
    plan: Plan,
    configuration: ConfigurationPlan,
    config: TrainConfig,
    *,
    n_cases: int,
    device: torch.device,
    n_processes: int = 1,
    timer: StepTimer | None = None,
) -> tuple[TrainingChoices, float]:
    """Chooses what the user has left open, and says why.

    With a time limit, steps of networks from small to large are timed on the device.

    Args:
        plan: the plan.
        configuration: of the plan.
        config: what the user asks for.
        n_cases: to train on.
        device: to train on.
        n_processes: that take a part of each batch; the time they need to talk is not counted.
        timer: tells the seconds of a step with a configuration and a batch size; None to try it.

    Returns:
        The choices, and the seconds it took to make them.

    Raises:
        TrainingError: the device has no memory for a step of the smallest network.
    """
    started = time.monotonic()
    recipe = RECIPES[config.recipe]
    reasons: dict[str, str] = {}
    on_cpu = device.type == "cpu"
    budget, batch_size = _find_request(configuration, config, n_cases=n_cases, on_cpu=on_cpu)
    if batch_size != configuration.batch_size:
        reasons["batch_size"] = f"{batch_size} of {configuration.batch_size}: on a CPU more steps gain more"
    network, n_steps = configuration, budget.iterations or 0
    adapting = adapts(plan, config, on_cpu=on_cpu)
    may_mirror = config.mirror is None and config.augment != "none" and recipe.steps_per_label_to_mirror > 0
    if budget.max_time_s is not None and (adapting or may_mirror):
        network, step_s = choose_network(
            plan, configuration, config, n_cases=n_cases, device=device, n_processes=n_processes, timer=timer
        )
        n_steps = round(budget.expected_iterations(step_s))
        if adapting:
            reasons["network"] = _tell_network(network, configuration, step_s=step_s, n_steps=n_steps, n_cases=n_cases)
        if n_steps < min(MIN_USEFUL_STEPS, budget.iterations or MIN_USEFUL_STEPS):
            logger.warning(
                "%s: in %s there is time for about %d steps, too few to learn from; give a longer --max-time",
                configuration.name,
                budget.describe(),
                n_steps,
            )
    reasons["sampling"] = SAMPLING_REASONS[recipe.sampling]
    covered = (min(1.0, edge / size) for edge, size in zip(network.patch_size, network.median_shape, strict=True))
    reasons["foreground_fraction"] = f"of the recipe; a patch covers {prod(covered):.0%} of the median case"
    mirror = config.mirror if config.augment != "none" else False
    if mirror is None:
        mirror, reasons["mirror"] = _choose_mirroring(
            recipe, n_steps=n_steps, n_labels=len(plan.labels.structures), n_cases=n_cases, batch_size=batch_size
        )
    choices = TrainingChoices(
        recipe=config.recipe,
        configuration=network,
        planned_patch_size=configuration.patch_size,
        budget=budget,
        batch_size=batch_size,
        foreground_fraction=recipe.foreground_fraction,
        sampling=recipe.sampling,
        mirror=mirror,
        reasons=tuple(Reason(subject=f"training.{name}", text=text) for name, text in reasons.items()),
    )
    return with_requests(choices, config, n_cases=n_cases, on_cpu=on_cpu), time.monotonic() - started


def _choose_mirroring(
    recipe: Recipe, *, n_steps: int, n_labels: int, n_cases: int, batch_size: int
) -> tuple[bool, str]:
    """Whether patches are mirrored, and why."""
    needed = steps_to_mirror(recipe, n_labels=n_labels, n_cases=n_cases, batch_size=batch_size)
    if not needed:
        return True, "of the recipe"
    mirror = n_steps >= needed
    text = (
        f"there will be about {n_steps:,} steps; to gain by it takes {needed:,}: at least "
        f"{recipe.min_steps_to_mirror:,}, for each label {recipe.steps_per_label_to_mirror} and "
        f"{recipe.patches_per_case_to_mirror} patches of each of {n_cases} cases, at most "
        f"{recipe.max_steps_to_mirror:,}"
    )
    return mirror, f"{text}; the rate is multiplied by {recipe.mirrored_rate:g}" if mirror else text


def _find_request(
    configuration: ConfigurationPlan, config: TrainConfig, *, n_cases: int, on_cpu: bool
) -> tuple[Budget, int]:
    """Budget and batch size: what the user asks for, or what the recipe makes of the plan.

    Args:
        configuration: as planned.
        config: what the user asks for.
        n_cases: to train on.
        on_cpu: whether training runs there.
    """
    recipe, batch_size = RECIPES[config.recipe], config.batch_size
    if batch_size is None:
        batch_size = choose_batch_size(recipe, configuration.batch_size, n_axes=configuration.n_axes, on_cpu=on_cpu)
    budget = config.budget or full_training(recipe, n_cases=n_cases, batch_size=batch_size, on_cpu=on_cpu)[0]
    return budget, batch_size


def choose_network(
    plan: Plan,
    configuration: ConfigurationPlan,
    config: TrainConfig,
    *,
    n_cases: int,
    device: torch.device,
    n_processes: int = 1,
    timer: StepTimer | None = None,
) -> tuple[ConfigurationPlan, float]:
    """The largest network and patch that make enough steps within a limit of time, and the seconds of such a step.

    Arguments and errors are those of `choose_training`. Where nothing adapts, the planned network is timed.
    """
    on_cpu = device.type == "cpu"
    budget, batch_size = _find_request(configuration, config, n_cases=n_cases, on_cpu=on_cpu)
    sizes: Iterable[tuple[ConfigurationPlan, int]] = [(configuration, 0)]
    if adapts(plan, config, on_cpu=on_cpu):
        keep_patch = plan.is_set_by_user(configuration.name, "patch_size")
        sizes = candidates(configuration, n_cases=n_cases, keep_patch=keep_patch)
        if on_cpu:
            sizes = _that_fit(sizes, batch_size=batch_size, n_outputs=plan.labels.n_outputs)
    time_own_part = functools.partial(
        timer or _timer_on(device, plan, config), batch_size=math.ceil(batch_size / n_processes)
    )
    found = _find_largest(sizes, time_own_part, budget)
    if device.type == "cuda":
        import torch

        # It may be another process that trains on this GPU.
        torch.cuda.empty_cache()
    return found


def _that_fit(
    sizes: Iterable[tuple[ConfigurationPlan, int]], *, batch_size: int, n_outputs: int
) -> Iterator[tuple[ConfigurationPlan, int]]:
    """Those before the first that this machine has no memory for; the smallest in any case.

    Such a network is not even tried: a system that is short of memory may end the process without a word.
    """
    limit_gib = MAX_MEMORY_FRACTION * machine_memory_gib()
    for number, (candidate, min_steps) in enumerate(sizes):
        n_values = batch_size * count_feature_map_values(candidate.network, candidate.patch_size, n_outputs)
        needed_gib = n_values * CPU_BYTES_PER_VALUE / 2**30
        if number and needed_gib > limit_gib:
            logger.info(
                "patches of %s with %s features need about %s of memory, of %s that this machine may give; "
                "smaller ones are trained",
                join_numbers(candidate.patch_size),
                "-".join(map(str, candidate.network.features)),
                format_memory(needed_gib),
                format_memory(limit_gib),
            )
            return
        yield candidate, min_steps


def _timer_on(device: torch.device, plan: Plan, config: TrainConfig) -> StepTimer:
    """Tries each step on a device."""
    from autoseg.training.step_time import time_step

    return functools.partial(time_step, plan, config, device=device)


def steps_to_mirror(recipe: Recipe, *, n_labels: int, n_cases: int, batch_size: int) -> int:
    """From how many steps on patches are mirrored; 0 for always."""
    of_cases = math.ceil(recipe.patches_per_case_to_mirror * n_labels * n_cases / batch_size)
    of_labels = recipe.steps_per_label_to_mirror * n_labels
    return min(max(recipe.min_steps_to_mirror, of_labels, of_cases), recipe.max_steps_to_mirror)


def adapts(plan: Plan, config: TrainConfig, *, on_cpu: bool) -> bool:
    """Whether network and patches are made to suit the time there is.

    Args:
        plan: one that a person has edited is trained as it is.
        config: what the user asks for.
        on_cpu: whether training runs there, where a full training has a limit of time.
    """
    recipe, budget = RECIPES[config.recipe], config.budget
    is_timed = budget.max_time_s is not None if budget else on_cpu and recipe.full_cpu_time_s is not None
    return is_timed and recipe.adapts and config.network == "auto" and not plan.is_edited


def with_requests(choices: TrainingChoices, config: TrainConfig, *, n_cases: int, on_cpu: bool) -> TrainingChoices:
    """Choices with what is asked for explicitly, and the budget, on top; the network stays.

    Args:
        choices: made by `choose_training`, now or for another fold.
        config: what the user asks for.
        n_cases: to train on.
        on_cpu: whether training runs there.
    """
    asked: dict[str, Any] = {
        name: getattr(config, name)
        for name in ("batch_size", "foreground_fraction", "sampling", "mirror")
        if getattr(config, name) is not None
    }
    reasons = {f"training.{name}": SET_BY_USER for name in asked}
    budget, before = config.budget, {reason.subject: reason.text for reason in choices.reasons}
    batch_size = asked.get("batch_size", choices.batch_size)
    is_kept = choices.budget.iterations is not None and batch_size == choices.batch_size
    if budget is None and "training.budget" in before and is_kept:
        # What was begun on a GPU is not at its end after the hour of a CPU.
        budget, reasons["training.budget"] = choices.budget, before["training.budget"]
    elif budget is None:
        budget, reasons["training.budget"] = full_training(
            RECIPES[choices.recipe], n_cases=n_cases, batch_size=batch_size, on_cpu=on_cpu
        )
    before.pop("training.budget", None)
    told = tuple(Reason(subject=subject, text=text) for subject, text in (before | reasons).items())
    return dataclasses.replace(choices, **asked, budget=budget, reasons=told)


def full_training(recipe: Recipe, *, n_cases: int, batch_size: int, on_cpu: bool) -> tuple[Budget, str]:
    """The budget where the user gives none, and its reason.

    Args:
        recipe: says how often each case is to be seen, and the limits.
        n_cases: to train on.
        batch_size: patches per step.
        on_cpu: whether training runs there.
    """
    if on_cpu and recipe.full_cpu_time_s is not None:
        text = (
            f"{format_duration(recipe.full_cpu_time_s)} for each fold: on a CPU a full training would take days; "
            "--max-time trains for a time of your own"
        )
        return Budget(max_time_s=recipe.full_cpu_time_s), text
    if recipe.patches_per_case is None:
        epochs, text = recipe.max_epochs, f"{recipe.max_epochs} epochs of {ITERATIONS_PER_EPOCH} steps: of the recipe"
    else:
        wanted = recipe.patches_per_case * n_cases / batch_size / ITERATIONS_PER_EPOCH
        epochs = math.ceil(min(max(wanted, recipe.min_epochs), recipe.max_epochs))
        text = (
            f"{epochs} epochs of {ITERATIONS_PER_EPOCH} steps: {recipe.patches_per_case} patches of each of {n_cases} "
            f"cases, within {recipe.min_epochs} to {recipe.max_epochs} epochs; --max-time trains for a time of your own"
        )
    budget = Budget.make(epochs=epochs)
    assert budget is not None
    return budget, text


def _find_largest(
    sizes: Iterable[tuple[ConfigurationPlan, int]], timer: Callable[[ConfigurationPlan], float], budget: Budget
) -> tuple[ConfigurationPlan, float]:
    """The largest network and patch that make enough steps, and the seconds of such a step."""
    assert budget.max_time_s is not None
    started: float | None = None
    chosen: tuple[ConfigurationPlan, float] | None = None
    for candidate, min_steps in sizes:
        if started is not None and time.monotonic() - started > MAX_TIMING_FRACTION * budget.max_time_s:
            break
        try:
            step_s = timer(candidate)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if chosen is None:
                raise TrainingError(
                    f"not even patches of {join_numbers(candidate.patch_size)} fit the memory of the device; give a "
                    "smaller --batch-size"
                ) from error
            break
        # The first one starts up the device, which says nothing about the others.
        started = started or time.monotonic()
        # Fewer steps than the user allows are not made with any network.
        wanted = min(min_steps, budget.iterations or min_steps)
        if chosen is not None and budget.expected_iterations(step_s) < wanted:
            break
        chosen = candidate, step_s
    assert chosen is not None
    return chosen


def _tell_network(
    network: ConfigurationPlan, planned: ConfigurationPlan, *, step_s: float, n_steps: int, n_cases: int
) -> str:
    """Why a network of this size."""
    told = ""
    if n_cases < FEW_CASES:
        told = f"; of {n_cases} cases, small patches are learned from for longer"
    elif has_large_patches(planned):
        told = "; of large patches, parts are learned from for longer"
    features, all_features = ("-".join(map(str, one.network.features)) for one in (network, planned))
    return (
        f"patch {join_numbers(network.patch_size)} of {join_numbers(planned.patch_size)}, features {features} of "
        f"{all_features}: a step takes {step_s:.2g} s here, so there is time for about "
        f"{n_steps:,} of them{told}; --network planned keeps the plan's"
    )

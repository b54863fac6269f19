"""What a recipe makes of a plan for the budget, the machine and the data at hand: each choice with its reason.

A network of the planned size on planned patches is made for a day on a GPU. Where there is less time, it would see a
few dozen batches; narrower stages at full resolution and smaller patches then make more steps of the same time, and
steps are what a short training lacks. All folds of a configuration share one set of choices, so they can be averaged.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from autoseg.core.errors import TrainingError
from autoseg.core.faults import is_out_of_memory
from autoseg.core.geometry import join_numbers
from autoseg.core.runtime import computing, format_duration
from autoseg.core.serialize import digest
from autoseg.networks.build import build_trainable
from autoseg.networks.outputs import Outputs
from autoseg.planning.plan import SET_BY_USER, ConfigurationPlan, NetworkPlan, Plan, Reason
from autoseg.training.config import ITERATIONS_PER_EPOCH, Budget, TrainConfig
from autoseg.training.learner import Learner
from autoseg.training.recipe import RECIPES, Recipe, choose_batch_size
from autoseg.training.record import TrainingChoices

logger = logging.getLogger(__name__)

WIDTHS: dict[str, tuple[float, ...]] = {"half": (0.5,), "slim": (0.5, 0.75, 1.0), "planned": (1.0,)}
"""Features as parts of the planned ones, stage by stage from full resolution; the last part counts for all below."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A size of network and patch that a training may take.

    Attributes:
        width: a name in `WIDTHS`.
        patch_scale: edges of the patch as a part of the planned ones.
        min_steps: that a training must make to gain by it, where there are many cases and planned patches are small.
        min_steps_of_large: the same where planned patches are large, see `has_large_patches`.
        min_steps_of_few: the same of fewer than `FEW_CASES`.
    """

    width: str
    patch_scale: float
    min_steps: int
    min_steps_of_large: int
    min_steps_of_few: int


FEW_CASES = 50
MAX_SMALL_PATCH = 2**17
"""Voxels of a planned patch, all of which even the shortest training needs to see where things are."""

LADDER = (
    Rung(width="half", patch_scale=0.4, min_steps=0, min_steps_of_large=0, min_steps_of_few=0),
    Rung(width="half", patch_scale=0.5, min_steps=600, min_steps_of_large=600, min_steps_of_few=600),
    Rung(width="half", patch_scale=0.6, min_steps=650, min_steps_of_large=2000, min_steps_of_few=2000),
    Rung(width="half", patch_scale=0.7, min_steps=650, min_steps_of_large=2000, min_steps_of_few=2000),
    Rung(width="half", patch_scale=0.8, min_steps=1000, min_steps_of_large=3000, min_steps_of_few=3000),
    Rung(width="half", patch_scale=1.0, min_steps=1000, min_steps_of_large=3000, min_steps_of_few=3000),
    Rung(width="slim", patch_scale=1.0, min_steps=6000, min_steps_of_large=6000, min_steps_of_few=12_000),
    Rung(width="planned", patch_scale=1.0, min_steps=15_000, min_steps_of_large=15_000, min_steps_of_few=30_000),
)
"""From the fastest to the planned one. The steps are judgements from measurements, see docs/recipe.md."""

SMALLEST_PATCH_SCALE = LADDER[0].patch_scale

MAX_ENLARGEMENT = 1.5
"""Voxels of a patch that the strides of its network ask for, as a multiple of those that are wanted."""

MIN_USEFUL_STEPS = 200
N_TIMED_STEPS = 2
MAX_TIMING_FRACTION = 0.05
"""Of the budget; whatever has not been timed by then is not."""

SAMPLING_REASONS = {
    "published": "a case is drawn, then one of its classes",
    "balanced": "a class is drawn, then a case that has it, so rare classes are centred on as often as common ones",
}


Timer = Callable[[ConfigurationPlan], float]


def choose_training(
    plan: Plan,
    configuration: ConfigurationPlan,
    config: TrainConfig,
    *,
    n_cases: int,
    device: torch.device,
    n_processes: int = 1,
    timer: Callable[..., float] | None = None,
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
        needed = steps_to_mirror(recipe, n_labels=len(plan.labels.structures), n_cases=n_cases, batch_size=batch_size)
        mirror = n_steps >= needed
        reasons["mirror"] = (
            f"there will be about {n_steps:,} steps; to gain by it takes {needed:,}: at least "
            f"{recipe.min_steps_to_mirror:,}, for each label {recipe.steps_per_label_to_mirror} and "
            f"{recipe.patches_per_case_to_mirror} patches of each of {n_cases} cases, at most "
            f"{recipe.max_steps_to_mirror:,}"
            + (f"; the rate is multiplied by {recipe.mirrored_rate:g}" if mirror else "")
            if needed
            else "of the recipe"
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
    timer: Callable[..., float] | None = None,
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
    timer = timer or functools.partial(_time_step, plan, config, device=device)
    found = _find_largest(sizes, functools.partial(timer, batch_size=math.ceil(batch_size / n_processes)), budget)
    if device.type == "cuda":
        # It may be another process that trains on this GPU.
        torch.cuda.empty_cache()
    return found


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
    sizes: Iterable[tuple[ConfigurationPlan, int]], timer: Timer, budget: Budget
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


def candidates(
    configuration: ConfigurationPlan, *, n_cases: int, keep_patch: bool
) -> Iterator[tuple[ConfigurationPlan, int]]:
    """Networks from the fastest to the planned one, each with the steps that a training with it has to make.

    Args:
        configuration: as planned.
        n_cases: to train on.
        keep_patch: only the features change.
    """
    before = None
    for rung in LADDER:
        candidate = resize(configuration, rung.width, 1.0 if keep_patch else rung.patch_scale)
        # Small patches are rounded to the same size, where the network has large strides.
        if candidate != before:
            yield candidate, _min_steps(rung, configuration, n_cases)
        before = candidate


def _min_steps(rung: Rung, configuration: ConfigurationPlan, n_cases: int) -> int:
    if n_cases < FEW_CASES:
        return rung.min_steps_of_few
    return rung.min_steps_of_large if has_large_patches(configuration) else rung.min_steps


def has_large_patches(configuration: ConfigurationPlan) -> bool:
    """Whether parts of planned patches still show where in the body they are; they teach more, as they make more steps.

    Of small cases, planned patches are small, and parts of them are too small for that. Where cases are few, large
    patches are soon known by heart, so small ones, from many places, teach for longer there too.
    """
    return prod(configuration.patch_size) > MAX_SMALL_PATCH


def resize(configuration: ConfigurationPlan, width: str, patch_scale: float) -> ConfigurationPlan:
    """A configuration with another width, a name in `WIDTHS`, and patches that still fit the network's strides.

    Their edges are about this part of the planned ones; at least two voxels along each axis are left in the lowest
    stage, where the plan leaves as many. Where the patch would be much larger for that, the lowest stages are left out.
    """
    wanted = tuple(edge * patch_scale for edge in configuration.patch_size)
    network, parts = configuration.network, WIDTHS[width]
    while len(network.strides) > 2 and patch_scale < 1 and _is_too_deep(network, wanted):
        network = _without_lowest_stage(network)
    features = tuple(
        max(1, round(full * parts[min(stage, len(parts) - 1)])) for stage, full in enumerate(network.features)
    )
    patch = tuple(
        min(edge, max(2 * step, round(part / step) * step))
        for edge, part, step in zip(configuration.patch_size, wanted, network.divisor, strict=True)
    )
    network = dataclasses.replace(network, features=features)
    return dataclasses.replace(configuration, network=network, patch_size=patch)


def _is_too_deep(network: NetworkPlan, patch_size: Sequence[float]) -> bool:
    """Whether two voxels along each axis that the lowest stage halves would make the patch much larger."""
    axes = zip(network.strides[-1], network.divisor, patch_size, strict=True)
    return prod(max(1.0, 2 * step / edge) for stride, step, edge in axes if stride > 1) > MAX_ENLARGEMENT


def _without_lowest_stage(network: NetworkPlan) -> NetworkPlan:
    return dataclasses.replace(
        network,
        features=network.features[:-1],
        strides=network.strides[:-1],
        kernel_sizes=network.kernel_sizes[:-1],
        encoder_blocks=network.encoder_blocks[:-1],
        decoder_blocks=network.decoder_blocks[:-1],
    )


_STEP_TIMES_S: dict[str, float] = {}
"""Of this process, by what they depend on: who asks twice gets the same answer, and two decisions agree."""


def _time_step(
    plan: Plan, config: TrainConfig, configuration: ConfigurationPlan, *, batch_size: int, device: torch.device
) -> float:
    """Seconds of a training step on noise, without reading and augmentation."""
    how = config.recipe, config.precision, config.deterministic, batch_size, str(device)
    key = digest((configuration, plan.labels, len(plan.channels), *how))
    if key not in _STEP_TIMES_S:
        _STEP_TIMES_S[key] = _measure_step(plan, config, configuration, batch_size=batch_size, device=device)
    return _STEP_TIMES_S[key]


def _measure_step(
    plan: Plan, config: TrainConfig, configuration: ConfigurationPlan, *, batch_size: int, device: torch.device
) -> float:
    """Seconds of the fastest of a few steps, with a learning rate of zero."""
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(forked), computing(device, deterministic=config.deterministic):
        # To try every kernel for every size would take longer than the steps.
        torch.backends.cudnn.benchmark = False
        network = build_trainable(plan, configuration)
        recipe = RECIPES[config.recipe]
        learner = Learner(
            network,
            configuration,
            recipe=recipe,
            device=device,
            precision=config.precision,
            outputs=Outputs.of(plan.labels),
        )
        patch = configuration.patch_size
        images = torch.randn(batch_size, len(plan.channels), *patch, device=device)
        if plan.n_previous(configuration.name):
            images = torch.cat([images, torch.zeros_like(images[:, :1])], dim=1)
        classes = torch.randint(plan.labels.n_classes, (batch_size, *patch), device=device)
        seconds = []
        # The first one warms up.
        for _ in range(1 + N_TIMED_STEPS):
            started = time.monotonic()
            learner.step(lambda: learner.loss(images, classes), learning_rate=0.0)
            seconds.append(time.monotonic() - started)
    return min(seconds)

"""What training takes on a device, from steps that are really done: memory, time, and the largest batch."""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from autoseg.core.errors import TrainingError
from autoseg.core.faults import is_out_of_memory
from autoseg.core.runtime import computing, derive_seed
from autoseg.networks.build import build_trainable
from autoseg.networks.outputs import Outputs
from autoseg.planning.plan import ConfigurationPlan, Measurement, Plan, suggest
from autoseg.training.augment import AugmentConfig, AugmentParameters, apply_parameters, draw_parameters, read_size
from autoseg.training.learner import Learner
from autoseg.training.recipe import RECIPES, Recipe

logger = logging.getLogger(__name__)

GIB = 2**30
# The first step has no state of the optimizer yet while its gradients are taken, so the second is the first whole one.
N_WARM_UP_STEPS = 2
N_TIMED_STEPS = 5
MAX_BATCH_FACTOR = 64
MAX_VALUES = 2**31 - 1
"""In one tensor: some kernels count with 32 bits, and what goes wrong beyond may end the process."""

MAX_SEARCH_S = 120.0
MIN_FREE_GIB = 0.5
"""With less, the GPU is busy with something else."""


def measure_configuration(
    plan: Plan,
    configuration: ConfigurationPlan,
    *,
    device: torch.device,
    recipe: str = "fast",
    max_search_s: float = MAX_SEARCH_S,
) -> Measurement:
    """Trains a configuration for some steps on random patches, then with larger and larger batches.

    The peak is all that torch had reserved at once, so what the device must have free, but for about half a GiB of the
    driver's own. It is taken over steps with every augmentation at once and over ordinary ones. The time is the median
    of the ordinary ones; making the patches and augmenting them belongs to it, reading them does not.

    The largest batch is looked for up to `largest_to_try`. It is the largest that was seen to fit into what other
    processes leave free, so where the time is up before the search is over, larger ones may fit too.

    Args:
        plan: the plan.
        configuration: of the plan.
        device: a CUDA device.
        recipe: a name in `RECIPES`; optimizers differ in what they keep per weight.
        max_search_s: no larger batch is tried after so many seconds of looking for the largest.

    Returns:
        The measurement. All memory is given back.

    Raises:
        TrainingError: the device is no GPU, the recipe is unknown, or the plan's batch does not fit the device.
    """
    if device.type != "cuda":
        raise TrainingError(
            f"measuring needs a GPU, found {device.type}; run it on a machine with an NVIDIA GPU, or plan without "
            "--measure, which needs none"
        )
    if recipe not in RECIPES:
        raise TrainingError(f"recipe '{recipe}' is unknown; {suggest(recipe, RECIPES)}")
    network = build_trainable(plan, configuration)
    try:
        # With the kernels that a training would take, and their memory.
        with computing(device, deterministic=False):
            return _measure(
                network, plan, configuration, recipe=RECIPES[recipe], device=device, max_search_s=max_search_s
            )
    finally:
        # Moved, not only forgotten: an error on its way up holds the frames that know the network.
        network.to("cpu")
        _free(device)


def _measure(
    network: nn.Module,
    plan: Plan,
    configuration: ConfigurationPlan,
    *,
    recipe: Recipe,
    device: torch.device,
    max_search_s: float,
) -> Measurement:
    name, planned = configuration.name, configuration.batch_size
    _free(device)
    free_gib = torch.cuda.mem_get_info(device)[0] / GIB
    torch.cuda.reset_peak_memory_stats(device)
    seconds: list[float] = []
    try:
        seconds = _train(network, plan, configuration, batch_size=planned, recipe=recipe, device=device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Not in the block above: until it ends, the exception holds the frames of the failed step with all their tensors.
    peak_gib = torch.cuda.max_memory_reserved(device) / GIB
    network.zero_grad(set_to_none=True)
    _free(device)

    def fits(batch_size: int) -> bool:
        return can_train(network, plan, configuration, batch_size=batch_size, recipe=recipe, device=device)

    if not seconds:
        largest = find_largest(fits, start=max(planned // 2, 1), limit=planned - 1)
        raise TrainingError(_explain_misfit(plan, configuration, largest, device=device, free_gib=free_gib))
    logger.info("%s: batch %d takes %.2f GiB and %.3f s", name, planned, peak_gib, statistics.median(seconds))
    deadline = time.monotonic() + max_search_s
    largest = find_largest(
        lambda batch_size: batch_size <= planned or (time.monotonic() < deadline and fits(batch_size)),
        start=planned,
        limit=largest_to_try(plan, configuration),
    )
    in_time = time.monotonic() < deadline
    logger.info("%s: the largest batch is %d%s", name, largest, "" if in_time else ", as far as there was time to try")
    return Measurement(
        configuration=name,
        key=plan.measurement_key(name),
        device=torch.cuda.get_device_name(device),
        peak_memory_gib=peak_gib,
        step_time_s=statistics.median(seconds),
        largest_batch_size=largest,
    )


def largest_to_try(plan: Plan, configuration: ConfigurationPlan) -> int:
    """The batch up to which a larger one is looked for.

    It is `MAX_BATCH_FACTOR` times the plan's, but no tensor may have more than `MAX_VALUES` values. The largest tensors
    are at full resolution: the two inputs of the last decoder stage side by side, or the logits.
    """
    n_features = max(2 * configuration.network.features[0], plan.labels.n_outputs)
    by_values = MAX_VALUES // (n_features * math.prod(configuration.patch_size))
    return max(configuration.batch_size, min(MAX_BATCH_FACTOR * configuration.batch_size, by_values))


def find_largest(fits: Callable[[int], bool], *, start: int, limit: int) -> int:
    """The largest size that fits: doubles until one does not, then halves the gap.

    Args:
        fits: whether a size does; all smaller ones do then too. Asked at most once per size.
        start: the first size to try, at least 1.
        limit: no larger one is tried.

    Returns:
        From 1 to `limit`, or 0 where not even 1 fits.
    """
    if start < 1:
        raise ValueError(f"start is {start}, expected at least 1")
    largest, too_large, size = 0, limit + 1, min(start, limit)
    while too_large - largest > 1:
        if fits(size):
            largest = size
        else:
            too_large = size
        nothing_failed = too_large > limit
        size = min(2 * largest, limit) if nothing_failed else (largest + too_large) // 2
    return largest


def can_train(
    network: nn.Module,
    plan: Plan,
    configuration: ConfigurationPlan,
    *,
    batch_size: int,
    recipe: Recipe,
    device: torch.device,
) -> bool:
    """Whether a few steps with a batch of that size succeed; afterwards only the network's weights are left of them.

    Args:
        network: of the configuration; is moved to the device, its weights stay as they are.
        plan: the plan.
        configuration: of the plan.
        batch_size: patches per step.
        recipe: how the weights would be optimised.
        device: to train on.
    """
    works = True
    try:
        _train(network, plan, configuration, batch_size=batch_size, recipe=recipe, device=device, n_timed=0)
    except (RuntimeError, TrainingError) as error:
        # Memory ends in many ways: torch's own error, those of cuDNN and cuBLAS, kernels that count with 32 bits.
        logger.info("%s: batch %d fails: %s", configuration.name, batch_size, str(error).partition("\n")[0])
        works = False
    # Not in the block above: until it ends, the exception holds the frames of the failed step with all their tensors.
    network.zero_grad(set_to_none=True)
    _free(device)
    return works


def run_steps(
    learner: Learner,
    plan: Plan,
    configuration: ConfigurationPlan,
    *,
    batch_size: int,
    augmentation: AugmentConfig,
    n_steps: int,
) -> list[float]:
    """Does training steps on random patches: reading aside, all that a step of a training run does.

    The learning rate is zero, so that the weights stay as they are.

    Args:
        learner: with the network of the configuration.
        plan: the plan.
        configuration: of the plan.
        batch_size: patches per step.
        augmentation: from which each step's own is drawn.
        n_steps: how many.

    Returns:
        Seconds of each step.

    Raises:
        TrainingError: a loss or a gradient is not finite, so that the step was not done to its end.
    """
    n_channels = len(plan.channels)
    seed = derive_seed("measure", configuration.name, batch_size)
    generator = torch.Generator().manual_seed(seed)
    values = torch.Generator(learner.device).manual_seed(seed)
    seconds = []
    for _ in range(n_steps):
        parameters = draw_parameters(
            n_samples=batch_size,
            n_channels=n_channels,
            n_axes=configuration.n_axes,
            config=augmentation,
            generator=generator,
        )
        _synchronize(learner.device)
        started = time.monotonic()
        _take_step(learner, plan, configuration, parameters=parameters, generator=values)
        _synchronize(learner.device)
        seconds.append(time.monotonic() - started)
    return seconds


def strongest_augmentation(patch_size: tuple[int, ...]) -> AugmentConfig:
    """Every transform for every sample, and the scale that reads most: about the most memory that augmentation takes.

    Args:
        patch_size: in voxels, (Y, X) or (Z, Y, X).
    """
    table = AugmentConfig.for_patch(patch_size)
    largest_scale = table.scaling_range[1]
    certain = {field.name: 1.0 for field in dataclasses.fields(table) if field.name.endswith("_probability")}
    return dataclasses.replace(table, scaling_range=(largest_scale, largest_scale), **certain)  # type: ignore[arg-type]


def _train(
    network: nn.Module,
    plan: Plan,
    configuration: ConfigurationPlan,
    *,
    batch_size: int,
    recipe: Recipe,
    device: torch.device,
    n_timed: int = N_TIMED_STEPS,
) -> list[float]:
    """Steps that take the most memory, then ordinary ones; seconds of the latter.

    Each call has an optimizer of its own: one whose step broke off could not go on.
    """
    learner = Learner(network, configuration, recipe=recipe, device=device, outputs=Outputs.of(plan.labels))
    strongest = strongest_augmentation(configuration.patch_size)
    run_steps(learner, plan, configuration, batch_size=batch_size, augmentation=strongest, n_steps=N_WARM_UP_STEPS)
    ordinary = AugmentConfig.for_patch(configuration.patch_size)
    return run_steps(learner, plan, configuration, batch_size=batch_size, augmentation=ordinary, n_steps=n_timed)


def _take_step(
    learner: Learner,
    plan: Plan,
    configuration: ConfigurationPlan,
    *,
    parameters: AugmentParameters,
    generator: torch.Generator,
) -> None:
    def compute_loss() -> Tensor:
        patch_size = configuration.patch_size
        images, classes = _draw_patches(plan, patch_size, parameters=parameters, generator=generator)
        if configuration.previous is not None:
            images = torch.cat([images, torch.zeros_like(images[:, :1])], dim=1)
        return learner.loss(images, classes)

    value = learner.step(compute_loss, learning_rate=0.0)
    if not math.isfinite(value):
        raise TrainingError(
            f"the loss or its gradient is {value} on random patches with fresh weights; the network of the plan cannot "
            "be trained in the precision of this device"
        )


def _draw_patches(
    plan: Plan, patch_size: tuple[int, ...], *, parameters: AugmentParameters, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Augmented patches of noise, on the device of the generator.

    What was read for them, which can be several times as large, is gone when they are returned; a training run too has
    forgotten it before the network runs.
    """
    read = read_size(patch_size, parameters)
    n_samples, n_channels = parameters.noise_std.shape
    images = torch.randn((n_samples, n_channels, *read), generator=generator, device=generator.device)
    classes = torch.randint(plan.labels.n_classes, (n_samples, *read), generator=generator, device=generator.device)
    return apply_parameters(images, classes, patch_size=patch_size, parameters=parameters)


def _free(device: torch.device) -> None:
    """Gives the memory of what nobody refers to any more back to the device."""
    gc.collect()
    if device.type == "cuda":
        # Raises where an earlier kernel has broken the process's access to the GPU: no later step would mean anything.
        torch.cuda.synchronize(device)
        with torch.cuda.device(device):
            torch.cuda.empty_cache()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _explain_misfit(
    plan: Plan, configuration: ConfigurationPlan, largest: int, *, device: torch.device, free_gib: float
) -> str:
    name = configuration.name
    total_gib = torch.cuda.get_device_properties(device).total_memory / GIB
    planned_gib = plan.gpu_memory_gib
    # Three quarters where there seems to be room: the estimate was too low by an unknown part.
    smaller_gib = math.floor(7.5 * planned_gib if free_gib >= planned_gib else 10 * free_gib) / 10
    patches = f"a batch of {configuration.batch_size} patches of {'x'.join(map(str, configuration.patch_size))} voxels"
    found = f"{torch.cuda.get_device_name(device)} with {total_gib:.1f} GiB, of which {free_gib:.1f} GiB were free"
    advice = f"plan again with --gpu-memory {smaller_gib:g}"
    if largest:
        seen, advice = f"a batch of {largest} fits", f"{advice}, or with --batch-size {name}={largest}"
    else:
        seen = "not even one patch fits"
    if smaller_gib < MIN_FREE_GIB:
        advice = "end what else runs on the GPU, then measure again"
    return f"{name}: {patches} does not fit {found}; the plan is for {planned_gib:g} GiB; {seen}: {advice}"

"""Sizes of network and patch that a training may take, from the fastest to the planned one, and what each needs.

A network of the planned size on planned patches is made for a day on a GPU. Where there is less time, it would see a
few dozen batches; narrower stages at full resolution and smaller patches then make more steps of the same time, and
steps are what a short training lacks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from autoseg.planning.plan import ConfigurationPlan, NetworkPlan

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

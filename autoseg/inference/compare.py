"""How an image differs from those that a model was trained on, in words."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoseg.core.geometry import Geometry, join_numbers, permute3
from autoseg.planning.plan import ChannelNormalization, ConfigurationPlan, Plan

MAX_SPACING_RATIO = 3.0
# Part of the range that the foreground had in training which the values of an image must reach into.
MIN_OVERLAP = 0.1
# The other way round, that range as a part of the range of the image: little means another unit.
MIN_SHARE = 0.005
# So many voxels, evenly spread, tell the range of an image.
MAX_VOXELS_LOOKED_AT = 2**20


def find_differences(
    image: NDArray[np.float32], geometry: Geometry, plan: Plan, configuration: ConfigurationPlan
) -> list[str]:
    """What makes it doubtful that a model can segment an image: half a sentence each; none where it looks familiar.

    Args:
        image: (C, Z, Y, X) canonical.
        geometry: of the image.
        plan: of the model.
        configuration: of the model.
    """
    found = _compare_grid(image.shape[1:], geometry, plan, configuration)
    for channel, voxels in zip(plan.normalization, image, strict=True):
        if channel.channel in plan.optional_channels and not voxels.any():
            continue
        found += _compare_intensities(voxels, channel)
    return found


def _compare_grid(
    image_shape: tuple[int, ...], geometry: Geometry, plan: Plan, configuration: ConfigurationPlan
) -> list[str]:
    shape, found_mm = (
        permute3(values, plan.axis_order)[-configuration.n_axes :] for values in (image_shape, geometry.spacing_mm)
    )
    if 1 in shape and 1 not in configuration.median_shape:
        kind = "slices" if configuration.n_axes == 2 else "volumes"
        return [f"it has {join_numbers(shape)} voxels, and the model was trained on {kind}"]
    if plan.spacing_range_mm is None:
        # Of plans that do not know it. The grid of the network may be much coarser than the scans were.
        smallest_mm = largest_mm = configuration.spacing_mm
        learned = f"works at {join_numbers(smallest_mm)} mm"
    else:
        smallest_mm, largest_mm = (
            permute3(values, plan.axis_order)[-configuration.n_axes :] for values in plan.spacing_range_mm
        )
        learned = f"was trained on {join_numbers(smallest_mm)}"
        learned += f" to {join_numbers(largest_mm)} mm" if largest_mm != smallest_mm else " mm"
    ranges = zip(found_mm, smallest_mm, largest_mm, strict=True)
    if all(least / MAX_SPACING_RATIO <= found <= most * MAX_SPACING_RATIO for found, least, most in ranges):
        return []
    return [f"its voxels are {join_numbers(found_mm)} mm, and the model {learned}; is its header right?"]


def _compare_intensities(voxels: NDArray[np.float32], channel: ChannelNormalization) -> list[str]:
    if voxels.min() == voxels.max():
        return [f"all voxels of {channel.channel} are {float(voxels.flat[0]):g}"]
    if channel.scheme != "ct":
        return []
    sample = voxels.reshape(-1)[:: max(1, voxels.size // MAX_VOXELS_LOOKED_AT)]
    low, high = np.percentile(sample, (0.5, 99.5))
    trained_low, trained_high = channel.percentile_00_5, channel.percentile_99_5
    overlap = min(high, trained_high) - max(low, trained_low)
    if overlap >= max(MIN_OVERLAP * (trained_high - trained_low), MIN_SHARE * (high - low)):
        return []
    return [
        f"{channel.channel} goes from {low:.4g} to {high:.4g}, and in training the foreground from {trained_low:.4g} "
        f"to {trained_high:.4g}; is it in Hounsfield units?"
    ]

"""Intensity normalization, one entry of `NORMALIZERS` for each of `autoseg.planning.plan.SCHEMES`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from autoseg.planning.plan import ChannelNormalization

Channel = NDArray[np.float32]
MIN_STD = 1e-8


def normalize(image: NDArray[np.float32], channels: Sequence[ChannelNormalization]) -> NDArray[np.float32]:
    """Normalizes each channel by its scheme.

    Args:
        image: (C, Z, Y, X), already cropped to its non-zero box; not changed.
        channels: C schemes.

    Returns:
        (C, Z, Y, X) float32. A channel that is zero throughout, because the case lacks it, stays zero.
    """
    mask = nonzero_mask(image) if any(channel.use_mask for channel in channels) else None
    result = np.empty_like(image)
    for index, channel in enumerate(channels):
        if image[index].any():
            result[index] = NORMALIZERS[channel.scheme](image[index], channel, mask if channel.use_mask else None)
        else:
            result[index] = 0
    return result


def nonzero_mask(image: NDArray[np.float32]) -> NDArray[np.bool_]:
    """(Z, Y, X): voxels that are non-zero in any channel of (C, Z, Y, X), holes filled."""
    from scipy import ndimage

    return np.asarray(ndimage.binary_fill_holes((image != 0).any(axis=0)), bool)


def _normalize_ct(values: Channel, channel: ChannelNormalization, mask: NDArray[np.bool_] | None) -> Channel:
    """Clips to the foreground's percentiles, scales by its mean and std: Hounsfield units mean the same everywhere."""
    del mask
    clipped = np.clip(values, channel.percentile_00_5, channel.percentile_99_5)
    return (clipped - np.float32(channel.mean)) / np.float32(max(channel.std, MIN_STD))


def lowest_of_ct(channel: ChannelNormalization) -> float:
    """What all that is at or below the 0.5th percentile of the foreground of CT becomes."""
    return float(_normalize_ct(np.array([channel.percentile_00_5], np.float32), channel, None)[0])


def _normalize_zscore(values: Channel, channel: ChannelNormalization, mask: NDArray[np.bool_] | None) -> Channel:
    """Zero mean and unit std of this image; within the mask where there is one, zero outside it."""
    del channel
    inside = values if mask is None else values[mask]
    if not inside.size:
        return np.zeros_like(values)
    mean, std = inside.mean(dtype=np.float64), inside.std(dtype=np.float64)
    scaled = (values - np.float32(mean)) / np.float32(max(std, MIN_STD))
    return scaled if mask is None else np.where(mask, scaled, np.float32(0))


def _normalize_rgb(values: Channel, channel: ChannelNormalization, mask: NDArray[np.bool_] | None) -> Channel:
    """From 0..255 to 0..1."""
    del channel, mask
    return values / np.float32(255)


def _rescale(values: Channel, channel: ChannelNormalization, mask: NDArray[np.bool_] | None) -> Channel:
    """From this image's own range to 0..1."""
    del channel, mask
    low, high = values.min(), values.max()
    return (values - low) / np.float32(max(high - low, MIN_STD))


def _keep(values: Channel, channel: ChannelNormalization, mask: NDArray[np.bool_] | None) -> Channel:
    """As it is."""
    del channel, mask
    return values


NORMALIZERS: dict[str, Callable[[Channel, ChannelNormalization, NDArray[np.bool_] | None], Channel]] = {
    "ct": _normalize_ct,
    "zscore": _normalize_zscore,
    "rgb_to_0_1": _normalize_rgb,
    "rescale_to_0_1": _rescale,
    "none": _keep,
}

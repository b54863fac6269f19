"""Putting a channel onto the grid of another one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoseg.core.geometry import Geometry


def resample_onto(image: NDArray[np.float32], source: Geometry, target: Geometry) -> NDArray[np.float32]:
    """Values of an image at the centres of the voxels of another grid, interpolated linearly in world space.

    Nothing is averaged: of an image with much smaller voxels, the values between are lost.

    Args:
        image: (C, Z, Y, X) canonical.
        source: of the image.
        target: of the result.

    Returns:
        (C, *target.shape) float32; zero outside the voxels of the image.
    """
    from scipy import ndimage

    # From voxels of the target (x, y, z) to those of the source, then both in the order of the arrays.
    to_source = np.linalg.inv(source.canonical_affine) @ target.canonical_affine
    matrix, offset = to_source[:3, :3][::-1, ::-1], to_source[:3, 3][::-1]
    result = np.empty((len(image), *target.shape), np.float32)
    rows, columns = np.indices(target.shape[1:])
    limits = np.array(image.shape[1:]).reshape(3, 1, 1) - 0.5
    # Slice by slice: the places take many times the memory of the values.
    for index in range(target.shape[0]):
        indices = np.stack([np.full_like(rows, index), rows, columns])
        places = np.tensordot(matrix, indices, 1) + offset.reshape(3, 1, 1)
        # A little more than the outer border, for what rounding makes of voxels that lie on it.
        inside = ((places >= -0.5 - 1e-6) & (places <= limits + 1e-6)).all(axis=0)
        for channel, values in zip(result, image, strict=True):
            found = ndimage.map_coordinates(values, places, order=1, mode="nearest")
            channel[index] = np.where(inside, found, 0)
    return result

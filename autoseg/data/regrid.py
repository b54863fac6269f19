"""Putting a channel onto the grid of another one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoseg.core.geometry import Geometry


def resample_onto(image: NDArray[np.float32], source: Geometry, target: Geometry) -> NDArray[np.float32]:
    """Values of an image at the voxels of another grid, interpolated linearly in world space.

    Args:
        image: (C, Z, Y, X) canonical.
        source: of the image.
        target: of the result.

    Returns:
        (C, *target.shape) float32; zero outside the image.
    """
    from scipy import ndimage

    # From voxels of the target (x, y, z) to those of the source, then both in the order of the arrays.
    to_source = np.linalg.inv(source.canonical_affine) @ target.canonical_affine
    matrix, offset = to_source[:3, :3][::-1, ::-1], to_source[:3, 3][::-1]
    result = np.empty((len(image), *target.shape), np.float32)
    for channel, values in zip(result, image, strict=True):
        ndimage.affine_transform(values, matrix, offset, output_shape=target.shape, output=channel, order=1)
    return result

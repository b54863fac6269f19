"""Arrays as callers have them, and as prediction works on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoseg.core.errors import FormatError, PredictionError
from autoseg.core.geometry import Geometry, from_canonical, make_geometry, to_canonical


def canonical_image(
    image: NDArray, channels: Sequence[str], *, spacing_mm: Sequence[float], affine: NDArray | None
) -> tuple[NDArray[np.float32], Geometry]:
    """An image in canonical orientation, checked.

    Args:
        image: (C, Z, Y, X) or, with one channel, (Z, Y, X); any real type; finite.
        channels: that it must have.
        spacing_mm: (Z, Y, X).
        affine: 4x4 from the indices (x, y, z) of the array to RAS+ millimetres; None where its axes are canonical.

    Returns:
        (C, Z, Y, X) canonical, and where it lies.

    Raises:
        PredictionError: wrong number of axes or channels, NaN or infinity, or a spacing that is not positive.
    """
    array = np.asarray(image)
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4 or array.shape[0] != len(channels) or 0 in array.shape:
        expected = f"({len(channels)}, Z, Y, X) with the channels {', '.join(channels)}"
        raise PredictionError(f"found an image of shape {np.shape(image)}, expected {expected}")
    spacing = tuple(float(value) for value in spacing_mm)
    if len(spacing) != 3 or not all(np.isfinite(spacing)) or min(spacing) <= 0:
        raise PredictionError(f"found the spacing {spacing} mm, expected three positive numbers (z, y, x)")
    if array.dtype.kind not in "biuf":
        raise PredictionError(f"found voxels of type {array.dtype}, expected real numbers")
    array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise PredictionError("found voxels that are NaN or infinite, expected finite numbers")
    matrix = np.diag([*spacing[::-1], 1.0]) if affine is None else np.asarray(affine, np.float64)
    try:
        geometry = make_geometry(array.shape[:0:-1], matrix, header_spacing_mm=spacing[::-1])
    except FormatError as error:
        raise PredictionError(str(error)) from error
    lengths = np.linalg.norm(matrix[:3, :3], axis=0)[::-1]
    if not np.allclose(lengths, spacing, rtol=1e-3):
        raise PredictionError(
            f"found the spacing {spacing} mm, expected {tuple(lengths.tolist())} mm as the affine has it"
        )
    # The array is (Z, Y, X), a file would be (X, Y, Z).
    return np.ascontiguousarray(to_canonical(array.transpose(0, 3, 2, 1), geometry.file_axcodes)), geometry


def to_input_axes(label: NDArray, geometry: Geometry) -> NDArray:
    """A canonical label map in the axes of the array that was given to `canonical_image`."""
    return np.ascontiguousarray(from_canonical(label, geometry.file_axcodes).transpose(2, 1, 0))

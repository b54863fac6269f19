"""Where a scan has content: what is zero in all channels is cropped away, and inside the crop it is background."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoseg.preprocessing.preprocess import CaseRecord

HOLE_CELL = 8
"""Voxels along each axis, of the cells in which zeros are looked at that other voxels enclose."""


def find_occupied(image: NDArray) -> NDArray[np.bool_]:
    """Which voxels (Z, Y, X) are not zero in some channel of a scan (C, Z, Y, X)."""
    return (image != 0).any(axis=0)


def crop_occupied(occupied: NDArray[np.bool_], record: CaseRecord) -> NDArray[np.bool_]:
    """The part of a scan that was kept, without large holes.

    Args:
        occupied: (Z, Y, X), see `find_occupied`.
        record: of the case.

    Returns:
        `record.cropped_shape`, in the network's axes; a cyst that is 0 counts as content.
    """
    return _without_holes(np.array(occupied[record.crop.slices].transpose(record.axis_order), order="C"))


def _without_holes(occupied: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Fills what is enclosed, in place; what is smaller than a cell or two is left."""
    from scipy import ndimage

    cells = occupied
    for axis, size in enumerate(occupied.shape):
        cells = np.logical_or.reduceat(cells, np.arange(0, size, HOLE_CELL), axis=axis)
    if cells.size == 1:
        return occupied
    # A slice by itself is an image: in a volume of one slice nothing would be enclosed.
    holes = ndimage.binary_fill_holes(cells.squeeze()).reshape(cells.shape) & ~cells
    for z, y, x in np.argwhere(holes) * HOLE_CELL:
        occupied[z : z + HOLE_CELL, y : y + HOLE_CELL, x : x + HOLE_CELL] = True
    return occupied

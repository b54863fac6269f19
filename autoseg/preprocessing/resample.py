"""Resampling by separable matrices: one small matrix per axis, three matrix products per volume.

Spline interpolation is linear in the voxels and separable, so the operator of one axis is found by interpolating an
identity matrix, and the same code runs on every device. Coordinates align the edges of voxels, borders repeat.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from autoseg.core.geometry import find_lowres_axis, is_anisotropic

NEAREST, LINEAR, CUBIC = 0, 1, 3
SLAB_BYTES = 256 * 2**20


def choose_nearest_axis(spacing_mm: Sequence[float], target_mm: Sequence[float]) -> int | None:
    """The one axis that is too coarse to interpolate along, or None: judged by the source, else by the target."""
    return find_lowres_axis(spacing_mm if is_anisotropic(spacing_mm) else target_mm)


@lru_cache(maxsize=128)
def axis_matrix(n_in: int, n_out: int, order: int, *, smoothed: bool = False) -> Tensor:
    """The operator that resamples one axis.

    Args:
        n_in: voxels before.
        n_out: voxels after.
        order: of the spline: 0 nearest neighbour, 1 linear, 3 cubic.
        smoothed: where voxels become larger, first by a Gaussian whose standard deviation is half of what they grow by.

    Returns:
        (n_out, n_in) float32 on the CPU; do not change it.
    """
    from scipy import ndimage

    if order == NEAREST:
        matrix = np.zeros((n_out, n_in))
        matrix[np.arange(n_out), _nearest_indices(n_in, n_out)] = 1
    else:
        before = np.eye(n_in)
        if smoothed and n_out < n_in:
            before = ndimage.gaussian_filter1d(before, (n_in / n_out - 1) / 2, axis=0, mode="nearest")
        matrix = ndimage.zoom(before, (n_out / n_in, 1), order=order, mode="nearest", grid_mode=True)
    return torch.from_numpy(matrix.astype(np.float32))


def _nearest_indices(n_in: int, n_out: int) -> np.ndarray:
    return np.minimum(((np.arange(n_out) + 0.5) * (n_in / n_out)).astype(np.int64), n_in - 1)


def _apply(volume: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Multiplies one of the last three axes (0, 1 or 2) of (..., Z, Y, X) by a matrix."""
    matrix = matrix.to(volume.device)
    if axis == 2:
        return volume @ matrix.T
    if axis == 1:
        return matrix @ volume
    lead, (z, y, x) = volume.shape[:-3], volume.shape[-3:]
    return (matrix @ volume.reshape(*lead, z, y * x)).reshape(*lead, matrix.shape[0], y, x)


def _resample(
    volume: Tensor, shape: Sequence[int], *, order: int, nearest_axis: int | None, smoothed: bool = False
) -> Tensor:
    """(..., Z, Y, X) to (..., *shape). Axes that shrink most come first, so that the later products are smaller."""
    axes = sorted(range(3), key=lambda axis: shape[axis] / volume.shape[axis - 3])
    for axis in axes:
        n_in, n_out = volume.shape[axis - 3], shape[axis]
        if n_in == n_out:
            continue
        if axis == nearest_axis:
            volume = volume.index_select(axis - 3, torch.from_numpy(_nearest_indices(n_in, n_out)).to(volume.device))
        else:
            volume = _apply(volume, axis_matrix(n_in, n_out, order, smoothed=smoothed), axis)
    return volume


def resample_image(image: Tensor, shape: Sequence[int], *, nearest_axis: int | None, smoothed: bool = False) -> Tensor:
    """Resamples an image with cubic splines, within the range of its values.

    Args:
        image: (C, Z, Y, X) float32.
        shape: (Z, Y, X) of the result.
        nearest_axis: an axis that takes the nearest voxel instead, see `choose_nearest_axis`.
        smoothed: along the other axes, as in `axis_matrix`.

    Returns:
        (C, *shape) float32.
    """
    if tuple(image.shape[1:]) == tuple(shape):
        return image
    result = torch.empty((image.shape[0], *shape), dtype=image.dtype, device=image.device)
    for channel, volume in enumerate(image):
        low, high = volume.aminmax()
        resampled = _resample(volume, shape, order=CUBIC, nearest_axis=nearest_axis, smoothed=smoothed)
        result[channel] = resampled.clamp_(low, high)
    return result


def resample_label(classes: Tensor, shape: Sequence[int], *, nearest_axis: int | None) -> Tensor:
    """Resamples a label map: each class' mask linearly, then the class with the most at each voxel.

    Args:
        classes: (Z, Y, X), unsigned integers, 0 is background.
        shape: of the result.
        nearest_axis: as for images.

    Returns:
        `shape`, same dtype. At a tie the lowest class wins.
    """
    if tuple(classes.shape) == tuple(shape):
        return classes
    from scipy import ndimage

    array = classes.numpy()
    # In numpy, since torch cannot write to a part of a uint16 tensor.
    result = np.zeros(tuple(shape), array.dtype)
    largest = torch.zeros(tuple(shape))
    background = torch.ones(tuple(shape))
    matrices = [
        axis_matrix(n_in, n_out, NEAREST if axis == nearest_axis else LINEAR)
        for axis, (n_in, n_out) in enumerate(zip(array.shape, shape, strict=True))
    ]
    for index, box in enumerate(ndimage.find_objects(array.astype(np.int32))):
        if box is None:
            continue
        # Outside the rows that a class' bounding box reaches, its interpolated mask is zero.
        mask = torch.from_numpy((array[box] == index + 1).astype(np.float32))
        rows = []
        for axis, (matrix, columns) in enumerate(zip(matrices, box, strict=True)):
            reached = torch.nonzero(matrix[:, columns].any(dim=1))
            rows.append(slice(int(reached.min()), int(reached.max()) + 1) if len(reached) else slice(0, 0))
            mask = _apply(mask, matrix[rows[-1], columns], axis)
        window = (rows[0], rows[1], rows[2])
        background[window] -= mask
        wins = mask > largest[window]
        largest[window] = torch.where(wins, mask, largest[window])
        result[window][wins.numpy()] = index + 1
    result[(background >= largest).numpy()] = 0
    return torch.from_numpy(result)


def resample_logits(
    logits: Tensor,
    shape: Sequence[int],
    *,
    nearest_axis: int | None,
    rows: slice | None = None,
    first_row: int = 0,
    n_rows: int | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Resamples logits linearly, slab by slab, so that all classes never exist at full size.

    Args:
        logits: (K, Z, Y, X), any floating type; of all rows (slices along the first axis), or of some.
        shape: (Z, Y, X) of the whole result.
        nearest_axis: as for images.
        rows: of the result that are wanted; None for all.
        first_row: the first of the rows in `logits`.
        n_rows: how many there are in all; None for as many as `logits` has.

    Yields:
        Rows of the result, a slice, and the logits there, (K, slab, Y, X) float32.
    """
    rows = slice(0, shape[0]) if rows is None else rows
    matrix = axis_matrix(n_rows or logits.shape[1], shape[0], NEAREST if nearest_axis == 0 else LINEAR)
    slab = max(1, SLAB_BYTES // (4 * logits.shape[0] * max(1, shape[1] * shape[2])))
    for start in range(rows.start, rows.stop, slab):
        part = slice(start, min(start + slab, rows.stop))
        reached = torch.nonzero(matrix[part].any(dim=0)).flatten()
        columns = slice(int(reached[0]), int(reached[-1]) + 1)
        source = logits[:, columns.start - first_row : columns.stop - first_row].float()
        yield (
            part,
            _resample(
                _apply(source, matrix[part, columns], 0),
                (part.stop - part.start, shape[1], shape[2]),
                order=LINEAR,
                nearest_axis=nearest_axis,
            ),
        )

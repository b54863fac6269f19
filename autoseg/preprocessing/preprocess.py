"""From a scan to the network's grid and back; `autoseg.inference.restore` does the way back of logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.core.geometry import Box, Geometry, bounding_box, inverse_order, permute3, resampled_shape
from autoseg.core.serialize import later
from autoseg.planning.plan import Plan
from autoseg.preprocessing.normalize import normalize
from autoseg.preprocessing.resample import choose_nearest_axis, resample_image, resample_label

FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class CaseRecord:
    """Everything needed to go from the network's grid back to the scan.

    Attributes:
        geometry: of the scan.
        crop: box of the scan that was kept, canonical (Z, Y, X).
        axis_order: the network's axes as indices into (Z, Y, X).
        shape: on the network's grid, in the network's axes, as are the next two.
        spacing_mm: of the network's grid.
        nearest_axis: the axis that is resampled by nearest neighbour, or None.
        smoothed: as in `ConfigurationPlan`.
    """

    geometry: Geometry
    crop: Box
    axis_order: tuple[int, int, int]
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    nearest_axis: int | None
    smoothed: bool = later(False)

    @property
    def cropped_shape(self) -> tuple[int, int, int]:
        """Size of the kept box in the network's axes, before resampling."""
        z, y, x = permute3(self.crop.shape, self.axis_order)
        return (z, y, x)


def record_case(occupied: NDArray[np.bool_], geometry: Geometry, plan: Plan, configuration: str) -> CaseRecord:
    """Decides how a scan goes to the grid of a configuration.

    Args:
        occupied: (Z, Y, X) canonical, where the scan has content, see `autoseg.preprocessing.occupied.find_occupied`.
        geometry: of the scan.
        plan: the plan.
        configuration: its name.
    """
    crop = bounding_box(occupied)
    shape, spacing_mm = grid_of(crop.shape, geometry, plan, configuration)
    return CaseRecord(
        geometry=geometry,
        crop=crop,
        axis_order=plan.axis_order,
        shape=(shape[0], shape[1], shape[2]),
        spacing_mm=(spacing_mm[0], spacing_mm[1], spacing_mm[2]),
        nearest_axis=choose_nearest_axis(permute3(geometry.spacing_mm, plan.axis_order), spacing_mm),
        smoothed=plan.configuration(configuration).smoothed,
    )


def grid_of(
    shape: Sequence[int], geometry: Geometry, plan: Plan, configuration: str
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Shape and spacing of a part of a scan, of `shape` (Z, Y, X), on a configuration's grid, in the network's axes."""
    source_mm = permute3(geometry.spacing_mm, plan.axis_order)
    target_mm = plan.configuration(configuration).spacing_mm
    # The slices of a 2D configuration keep their distance.
    spacing_mm = (source_mm[0], *target_mm)[-3:] if len(target_mm) == 2 else target_mm
    return resampled_shape(permute3(shape, plan.axis_order), source_mm, spacing_mm), spacing_mm


def resampling_gib(shape: Sequence[int], plan: Plan) -> float:
    """Memory that a case takes while it is resampled to this shape: channels before and after an axis, and labels."""
    return FLOAT_BYTES * prod(shape) * (2 * len(plan.channels) + 1) / 2**30


def preprocess_image(image: NDArray[np.float32], record: CaseRecord, plan: Plan) -> Tensor:
    """Crops, normalizes and resamples a scan.

    Args:
        image: (C, Z, Y, X) canonical; not changed.
        record: from `record_case`.
        plan: the plan.

    Returns:
        (C, *record.shape) float32, in the network's axes.
    """
    normalized = normalize(image[(..., *record.crop.slices)], plan.normalization)
    ordered = normalized.transpose(0, *(axis + 1 for axis in record.axis_order))
    volume = torch.from_numpy(np.ascontiguousarray(ordered))
    return resample_image(volume, record.shape, nearest_axis=record.nearest_axis, smoothed=record.smoothed)


def preprocess_label(classes: NDArray, record: CaseRecord) -> Tensor:
    """Crops and resamples a label map.

    Args:
        classes: (Z, Y, X) canonical, uint8 or uint16.
        record: of the scan it belongs to.

    Returns:
        `record.shape`, same dtype, in the network's axes.
    """
    ordered = np.ascontiguousarray(classes[record.crop.slices].transpose(record.axis_order))
    volume = torch.from_numpy(ordered)
    return resample_label(volume, record.shape, nearest_axis=record.nearest_axis)


def restore_label(classes: Tensor, record: CaseRecord) -> NDArray:
    """A label map on the network's grid at every voxel of the scan; the way back of `preprocess_label`.

    Args:
        classes: `record.shape`, uint8 or uint16, in the network's axes.
        record: of the scan.

    Returns:
        (Z, Y, X) canonical, same dtype; background outside the crop.
    """
    restored = resample_label(classes, record.cropped_shape, nearest_axis=record.nearest_axis).numpy()
    return place_in_scan(restored, record)


def place_in_scan(cropped: NDArray, record: CaseRecord) -> NDArray:
    """Undoes the order of the axes and the crop.

    Args:
        cropped: `record.cropped_shape`, in the network's axes.
        record: of the scan.

    Returns:
        (Z, Y, X) canonical, same dtype; zero outside the crop.
    """
    whole = np.zeros(record.geometry.shape, cropped.dtype)
    whole[record.crop.slices] = cropped.transpose(inverse_order(record.axis_order))
    return whole

"""What is done to label maps after the network: keeping the largest component, removing small ones, filling holes.

Which steps help is decided on the out-of-fold label maps of the training cases, see `autoseg.evaluation.postprocess`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from autoseg.core.geometry import joint_box, label_components
from autoseg.core.labels import mask_of
from autoseg.core.steps import HOLES, LARGEST, Step


def apply_steps(label: NDArray, steps: Sequence[Step], *, voxel_ml: float) -> NDArray:
    """Does the steps, one after the other.

    Args:
        label: (Z, Y, X) label values, unsigned; not changed.
        steps: may be none.
        voxel_ml: volume of a voxel.

    Returns:
        The same shape and type.
    """
    if not steps:
        return label
    whole = label.copy()
    # A slice by itself is an image: in a volume of one slice no hole would be closed.
    result = whole.squeeze() if max(whole.shape) > 1 else whole
    boxes = ndimage.find_objects(result)
    for step in steps:
        found = [boxes[value - 1] for value in step.values if value <= len(boxes) and boxes[value - 1] is not None]
        if found:
            # Removing makes boxes too large and filling stays within, so those of the beginning hold to the end.
            _apply(result[joint_box(found)], step, voxel_ml)
    return whole


def _apply(label: NDArray, step: Step, voxel_ml: float) -> None:
    mask = mask_of(label, step.values)
    if step.kind == HOLES:
        label[ndimage.binary_fill_holes(mask) & (label == 0)] = step.values[0]
        return
    components, n_components = label_components(mask)
    if not n_components:
        return
    sizes = np.bincount(components.ravel(), minlength=n_components + 1)[1:]
    kept = components_to_keep(sizes, step, voxel_ml=voxel_ml)
    if not kept.all():
        label[mask & ~np.concatenate([[False], kept])[components]] = 0


def components_to_keep(sizes: NDArray[np.int64], step: Step, *, voxel_ml: float) -> NDArray[np.bool_]:
    """Which components a step leaves that removes some.

    Of several that are equally large all are the largest: which of them comes first depends on the orientation.

    Args:
        sizes: (n,) voxels.
        step: not one that fills holes.
        voxel_ml: volume of a voxel.

    Returns:
        (n,).
    """
    if step.kind == LARGEST:
        return np.asarray(sizes == sizes.max(initial=0), bool)
    return np.asarray(sizes * voxel_ml >= (step.min_ml or 0), bool)

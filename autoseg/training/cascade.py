"""What a first stage may get wrong: perturbations of its predictions, for the training of the second.

The first stage has been trained on four fifths of the cases, and its predictions for the last fifth are what the second
learns from; new images may fare worse. Isensee et al., Nature Methods 2021: with a chance of 0.4, each structure grows,
shrinks, or is opened or closed with a ball of 1 to 8 voxels; with 0.2 it loses one of its smaller components.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

MORPHOLOGY_PROBABILITY = 0.4
MAX_RADIUS = 8
REMOVAL_PROBABILITY = 0.2
MAX_REMOVED_FRACTION = 0.15
"""Of the patch: larger components stay."""

GROW, SHRINK, OPEN, CLOSE = range(4)


def perturb(classes: NDArray, rng: np.random.Generator) -> NDArray:
    """Changes the prediction of a first stage.

    Args:
        classes: (Z, Y, X), 0 is background; not changed.
        rng: of the draws.

    Returns:
        The same shape and type.
    """
    has_morphology, has_removal = rng.random() < MORPHOLOGY_PROBABILITY, rng.random() < REMOVAL_PROBABILITY
    if not (has_morphology or has_removal):
        return classes
    result = classes.copy()
    present = np.unique(classes[classes > 0])
    for class_index in rng.permutation(present):
        if has_morphology:
            _change_size(result, class_index, kind=int(rng.integers(4)), radius=int(rng.integers(1, MAX_RADIUS + 1)))
        if has_removal:
            _remove_component(result, class_index, rng)
    return result


def _change_size(classes: NDArray, class_index: int, *, kind: int, radius: int) -> None:
    mask = classes == class_index
    inside = ndimage.find_objects(mask, max_label=1)
    if inside[0] is None:
        return
    # Nothing changes farther away than the ball reaches, twice for closing.
    reach = 2 * radius
    box = tuple(
        slice(max(0, part.start - reach), min(size, part.stop + reach))
        for part, size in zip(inside[0], mask.shape, strict=True)
    )
    cut = mask[box]
    if kind in (GROW, CLOSE):
        changed = _within(cut, radius)
        changed = _eroded(changed, radius) if kind == CLOSE else changed
    else:
        changed = _eroded(cut, radius)
        changed = _within(changed, radius) if kind == OPEN else changed
    part_of_result = classes[box]
    part_of_result[cut & ~changed] = 0
    part_of_result[changed] = class_index


def _within(mask: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    """Voxels no farther than `radius` from the mask: dilation by a ball."""
    if not mask.any():
        return mask
    return np.asarray(ndimage.distance_transform_edt(~mask) <= radius)


def _eroded(mask: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    """Voxels farther than `radius` from all that is outside the mask; outside the array nothing is."""
    if mask.all():
        return mask
    return np.asarray(ndimage.distance_transform_edt(mask) > radius)


def _remove_component(classes: NDArray, class_index: int, rng: np.random.Generator) -> None:
    """One of the components that are small against the patch."""
    components, n_components = ndimage.label(classes == class_index)
    sizes = np.bincount(components.ravel(), minlength=n_components + 1)[1:]
    small = np.flatnonzero(sizes < MAX_REMOVED_FRACTION * classes.size) + 1
    if small.size:
        classes[components == rng.choice(small)] = 0

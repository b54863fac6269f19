"""Voxels that patches are centred on in training: drawn once for each case, when it is preprocessed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from autoseg.core.geometry import label_components

MAX_FOREGROUND_PER_CLASS = 4096
"""Enough voxels that a class' shape is represented, few enough that the index of a CT is a few hundred kilobytes."""


def sample_foreground(label: NDArray, *, n_classes: int, seed: int) -> tuple[tuple[int, ...], NDArray[np.int32]]:
    """Voxels of each foreground class: all of them or an even draw, at most `MAX_FOREGROUND_PER_CLASS`.

    Where a class has several components, half of what is kept of it is drawn by component, see `_draw_of_components`.

    Args:
        label: (Z, Y, X) classes.
        n_classes: with the background.
        seed: of the draw.

    Returns:
        How many of each class 1..K-1, and their (z, y, x), class after class, int32. What is drawn by component may
        come more than once.
    """
    from scipy.ndimage import find_objects

    rng = np.random.default_rng(seed)
    foreground = np.flatnonzero((label != 0) & (label < n_classes))
    classes = label.ravel()[foreground]
    counts, parts = [], []
    order = np.argsort(classes, kind="stable")
    ends = np.searchsorted(classes[order], np.arange(1, n_classes + 1))
    boxes = find_objects(label, n_classes - 1) if foreground.size else [None] * (n_classes - 1)
    for index, ((start, end), box) in enumerate(zip(pairwise(ends), boxes, strict=True), 1):
        members = foreground[order[start:end]]
        if box is not None:
            members = _draw_of_class(members, label[box] == index, rng)
        counts.append(int(members.size))
        parts.append(members)
    flat = np.concatenate(parts) if parts else np.empty(0, np.int64)
    return tuple(counts), _positions(flat, label.shape)


def _draw_of_class(voxels: NDArray[np.intp], mask: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.intp]:
    """The voxels that are kept of a class.

    Args:
        voxels: (n,), all of them, ascending.
        mask: (Z, Y, X), the box around them.
        rng: draws.
    """
    components, n_components = label_components(mask)
    if n_components == 1:
        return _draw_some(voxels, rng)
    evenly = _draw_some(voxels, rng, limit=MAX_FOREGROUND_PER_CLASS // 2)
    # An axis along which the class is one voxel thick has no part in a diameter, as in slices.
    n_axes = sum(size > 1 for size in mask.shape)
    components = components[mask]
    return np.concatenate([evenly, _draw_of_components(voxels, components, rng, n=evenly.size, n_axes=n_axes)])


def _draw_of_components(
    voxels: NDArray[np.intp], components: NDArray[np.int32], rng: np.random.Generator, *, n: int, n_axes: int
) -> NDArray[np.intp]:
    """So many times a component, by a chance proportional to its diameter, then one of its voxels.

    Of a tumour of 60 mm and five metastases of 6 mm, an even draw is of a metastasis once in two hundred times. With
    equal chances for all components, the single voxels that many a label map has by mistake would take all draws.
    """
    sizes = np.bincount(components)
    sizes[0] = 1
    chances = (sizes ** (1 / n_axes - 1))[components]
    np.cumsum(chances, out=chances)
    # Above 0 and up to the sum.
    return voxels[np.searchsorted(chances, (1 - rng.random(n)) * chances[-1])]


def sample_voxels(mask: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.int32]:
    """(z, y, x) of the voxels in a mask, all of them or an even draw of `MAX_FOREGROUND_PER_CLASS`, int32."""
    return _positions(_draw_some(np.flatnonzero(mask), rng), mask.shape)


def _draw_some(
    voxels: NDArray[np.intp], rng: np.random.Generator, *, limit: int = MAX_FOREGROUND_PER_CLASS
) -> NDArray[np.intp]:
    """All of them where they are few."""
    if voxels.size <= limit:
        return voxels
    return np.sort(rng.choice(voxels, limit, replace=False))


def _positions(voxels: NDArray[np.intp], shape: tuple[int, ...]) -> NDArray[np.int32]:
    """(n, 3) from indices into the flattened array."""
    return np.stack(np.unravel_index(voxels, shape), axis=1).astype(np.int32)

"""What is annotated in a case: from one label map, or from one file per structure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from autoseg.core.errors import FormatError
from autoseg.core.geometry import Geometry, grid_difference
from autoseg.core.labels import LabelSpec
from autoseg.data.dataset import Case, LabelMend
from autoseg.data.io import adopt_place, read_label

T = TypeVar("T")

ROUNDED, HALVED = LabelMend(rounded=True), LabelMend(halved=True)
"""How a label map may be read that cannot be read as it is."""


def read_reference(case: Case, labels: LabelSpec) -> tuple[NDArray, Geometry]:
    """The label map of a case.

    Args:
        case: of the dataset.
        labels: its classes.

    Returns:
        (Z, Y, X) integers in canonical orientation, with the values of the files, or where the case has one file per
        structure with those of `labels`; and the geometry.

    Raises:
        FormatError: a file is unreadable, or the files of one case do not go together.
    """
    if case.label is not None:
        label, geometry = _read_placed(case.label, case)
        for value, meant in (case.mend.values if case.mend else {}).items():
            label = np.where(label == value, meant, label)
        return label, geometry
    masks, geometry = read_masks(case)
    if labels.regions:
        return _combine(case, masks, labels).reshape(geometry.shape), geometry
    label = np.zeros(geometry.shape, labels.dtype)
    for name, value in zip(labels.names, labels.values, strict=True):
        if name in masks:
            twice = label[masks[name]] != 0
            if twice.any():
                other = labels.names[labels.values.index(int(label[masks[name]][twice][0]))]
                raise _unexpected(case, [other, name], int(np.count_nonzero(twice)))
            label[masks[name]] = value
    return label, geometry


def read_label_map(case: Case) -> NDArray:
    """The label map of a case that has one file for it, as `read_reference` does."""
    assert case.label is not None
    return _read_placed(case.label, case)[0]


def mend_to_read(case: Case, read: Callable[[Case], T], mends: Sequence[LabelMend]) -> tuple[T, Case]:
    """What is read of a case, and the case with how its label map had to be read.

    Args:
        case: of the dataset.
        read: raises FormatError where the label map of a case is not in order.
        mends: that may be tried then.

    Raises:
        FormatError: what the file is not, as it is.
    """
    try:
        return read(case), case
    except FormatError:
        for mend in mends if case.mend is None else ():
            mended = replace(case, mend=mend)
            with suppress(FormatError):
                return read(mended), mended
        raise


def read_shown_reference(case: Case, labels: LabelSpec) -> NDArray:
    """The label map of a case for a picture: what nobody has annotated looks like background."""
    label, _ = read_reference(case, labels)
    return label if labels.ignore is None else np.where(label == labels.ignore, 0, label)


def _read_placed(file: Path, case: Case) -> tuple[NDArray, Geometry]:
    mend = case.mend or LabelMend()
    label, geometry = read_label(file, rounded=mend.rounded, halved=mend.halved)
    return label, adopt_place(geometry, file, case.image_files[0]) if case.image_files else geometry


def _combine(case: Case, masks: dict[str, NDArray[np.bool_]], labels: LabelSpec) -> NDArray:
    """Values of voxels that may be of several structures."""
    combination = np.zeros(next(iter(masks.values())).shape, np.uint32)
    has_mask = np.array([region.name in masks for region in labels.regions])
    for position in np.flatnonzero(has_mask).tolist():
        combination |= masks[labels.regions[position].name].astype(np.uint32) << position
    # Of classes that differ in structures without a mask only, the first.
    bits = (labels.memberships() & has_mask[:, None]).T @ (1 << np.arange(len(has_mask)))
    table = dict(reversed(list(zip(bits.tolist(), (0, *labels.values), strict=True))))
    found, inverse = np.unique(combination, return_inverse=True)
    for known in found.tolist():
        if known not in table:
            names = [region.name for position, region in enumerate(labels.regions) if known >> position & 1]
            raise _unexpected(case, names, int(np.count_nonzero(combination == known)))
    return np.array([table[known] for known in found.tolist()], labels.dtype)[inverse]


def _unexpected(case: Case, names: list[str], n_voxels: int) -> FormatError:
    return FormatError(
        f"{case.id}: {n_voxels} voxels are of {' and '.join(names)} together; leave the list of labels out of the "
        "manifest and plan again, so that structures may overlap, or correct the masks"
    )


def read_masks(case: Case) -> tuple[dict[str, NDArray[np.bool_]], Geometry]:
    """The mask (Z, Y, X) of each structure that has a file, and their common geometry.

    Raises:
        FormatError: a file is unreadable, or lies on another grid than the first.
    """
    masks: dict[str, NDArray[np.bool_]] = {}
    geometry: Geometry | None = None
    for name, file in case.masks.items():
        mask, own = _read_placed(file, case)
        if geometry is None:
            geometry = own
        elif difference := grid_difference(geometry, own):
            raise FormatError(f"{file}: found {difference[0]}, expected {difference[1]} of the case's first structure")
        masks[name] = mask != 0
    assert geometry is not None
    return masks, geometry


def combinations_of(case: Case) -> set[frozenset[str]]:
    """Structures that share a voxel in a case with one file for each.

    Raises:
        FormatError: see `read_masks`.
    """
    masks, geometry = read_masks(case)
    names = list(masks)
    n_sharing = np.zeros(geometry.shape, np.uint8)
    for mask in masks.values():
        n_sharing += mask
    shared = n_sharing > 1
    if not shared.any():
        return set()
    patterns = np.unique(np.stack([mask[shared] for mask in masks.values()], axis=1), axis=0)
    return {frozenset(name for name, inside in zip(names, pattern, strict=True) if inside) for pattern in patterns}

"""One case in memory, in canonical orientation, and what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoseg.core.errors import ERROR, NOTE, WARNING, FormatError, Problem, list_some
from autoseg.core.geometry import (
    MAX_GRID_DISTANCE_VOXELS,
    Geometry,
    corner_distance_voxels,
    grid_difference,
    join_numbers,
)
from autoseg.core.labels import LabelSpec
from autoseg.data.dataset import Case, LabelMend
from autoseg.data.io import read_geometry, read_raw
from autoseg.data.raw import in_pieces
from autoseg.data.references import HALVED, ROUNDED, mend_to_read, read_reference
from autoseg.data.regrid import resample_onto
from autoseg.data.soft_masks import MIN_SHADES, WHITE, has_grey_borders

MASK_VALUES = frozenset({1, 255, 65535})
"""What programs write for the inside of a mask."""

LOADING_BYTES = 12
"""Of each voxel of each channel: the file's own type, float32, copies on the way and the label map."""

MAX_EXTENT_MM, MIN_SPACING_MM = 10_000.0, 1e-6
"""No scan is longer than ten metres, and no voxel smaller than a nanometre."""

MIN_TOLD_DISTANCE_VOXELS = 0.01
"""A header's rounding puts grids apart by less."""


@dataclass(frozen=True, kw_only=True)
class LoadedCase:
    """A case in memory, in canonical orientation.

    Attributes:
        case: what was read, with how its label map is read.
        image: (C, Z, Y, X) float32.
        label: (Z, Y, X), the values of the file.
        values: that occur in the label map.
        geometry: of the first channel.
        remarks: warnings and notes about it.
    """

    case: Case
    image: NDArray[np.float32]
    label: NDArray
    values: frozenset[int]
    geometry: Geometry
    remarks: tuple[Problem, ...] = ()


def load_image(
    images: Sequence[Path | None], *, n_channels: int, fix: bool = False
) -> tuple[NDArray[np.float32], Geometry, tuple[str, ...]]:
    """Reads all channels of one case, from one file or one file each; those without a file are zero.

    Args:
        images: in order.
        n_channels: that there should be in all.
        fix: resample channels that lie on another grid than the first, and give voxels that are NaN or infinite the
            lowest finite value of their file; otherwise both are refused.

    Returns:
        (C, Z, Y, X) float32 in canonical orientation, the geometry of the first file, and what was done to voxels that
        are NaN or infinite.

    Raises:
        FormatError: unreadable, channels on different grids, the wrong number of channels, or NaN or infinity.
    """
    # From the headers, before any voxel: a time series can be larger than the memory.
    files = [path for path in images if path is not None]
    n_missing = len(images) - len(files)
    raws = [read_raw(path) for path in files]
    n_found = sum(raw.n_channels for raw in raws)
    if n_found + n_missing != n_channels:
        hint = ""
        if len(images) == 1 and raws[0].is_picture and {n_found, n_channels} == {1, 3}:
            one, others = ("a colour", "grey") if n_found == 3 else ("a grey", "in colour")
            hint = f": {one} picture, and the others are {others}; save all in one way"
        elif len(images) == 1 and n_found > 1:
            hint = "; if these are time points, save each as a case of its own; if channels, list them in dataset.json"
        raise FormatError(f"{files[0]}: found {n_found + n_missing} channels, expected {n_channels}{hint}")
    geometry = raws[0].geometry
    parts = []
    for path, raw in zip(files, raws, strict=True):
        array, difference = raw.load_float(), grid_difference(geometry, raw.geometry)
        if difference and not fix:
            raise FormatError(
                f"{path}: found {difference[0]}, expected {difference[1]} of the first channel; --fix resamples it"
            )
        parts.append(resample_onto(array, raw.geometry, geometry) if difference else array)
    remarks = []
    for path, array in zip(files, parts, strict=True):
        if n_broken := _mend_voxels(path, array, fix=fix):
            remarks.append(
                f"{path.name}: {n_broken} voxels that are NaN or infinite have the lowest value of the others"
            )
    if len(images) == 1:
        return parts[0], geometry, tuple(remarks)
    read = iter(parts)
    absent = np.zeros((1, *geometry.shape), np.float32)
    image = np.concatenate([absent if path is None else next(read) for path in images])
    return image, geometry, tuple(remarks)


def _mend_voxels(path: Path, array: NDArray[np.float32], *, fix: bool) -> int:
    """Gives voxels that are not finite the lowest value of the others, in place; maps of ADC have such around the body.

    Returns:
        How many there were.

    Raises:
        FormatError: there are some, and they are not to be mended, or no others.
    """
    is_finite = np.isfinite(array)
    n_broken = int(array.size - np.count_nonzero(is_finite))
    if n_broken and (n_broken == array.size or not fix):
        advice = "" if n_broken == array.size else "; --fix gives them the lowest value of the others"
        raise FormatError(f"{path}: found {n_broken} voxels that are NaN or infinite, expected finite numbers{advice}")
    if n_broken:
        array[~is_finite] = array[is_finite].min()
    return n_broken


def loading_gib(case: Case) -> float:
    """About the memory that it takes to load a case and look at it, from its headers; 0 where one cannot be read."""
    try:
        raws = [read_raw(path) for path in case.image_files]
    except FormatError:
        return 0.0  # Whoever loads it tells.
    # Masks of structures are held all at once.
    n_bytes = LOADING_BYTES * sum(raw.n_channels * math.prod(raw.geometry.shape) for raw in raws)
    return (n_bytes + len(case.masks) * math.prod(raws[0].geometry.shape)) / 2**30


def load_case(case: Case, *, n_channels: int, labels: LabelSpec, fix: bool = False) -> LoadedCase | list[Problem]:
    """Reads and checks one case.

    Args:
        case: of the dataset.
        n_channels: of the dataset.
        labels: of the dataset.
        fix: mend what is safe to mend, see `Dataset.fix`.

    Returns:
        The case, or everything that is wrong with it.
    """
    problems: list[Problem] = []
    image, geometry, label, label_geometry, values = None, None, None, None, set[int]()
    try:
        image, geometry, mended = load_image(case.images, n_channels=n_channels, fix=fix)
    except FormatError as error:
        advice = "mend or replace the image, or remove the case"
        problems.append(Problem(kind="image cannot be used", case=case.id, text=str(error), advice=advice))
    else:
        problems += _check_size(case, geometry) + _check_contrast(case, image)
        problems += [_tell_voxels(case, text) for text in mended]
        for file in case.image_files[1:]:
            problems += _tell_channel(case, file, geometry, read_geometry(file))
    try:
        mends = (ROUNDED, HALVED) if _is_one_mask(case, labels) else (ROUNDED,)
        reference, case = mend_to_read(case, lambda known: read_reference(known, labels), mends if fix else ())
        label, label_geometry = reference
    except FormatError as error:
        advice = "mend or replace the label map, or remove the case"
        problems.append(Problem(kind="label map cannot be used", case=case.id, text=str(error), advice=advice))
    else:
        values = label_values(label)
        is_soft = _is_soft_mask(case, label, values, labels)
        if fix and is_soft:
            case = replace(case, mend=HALVED)
            label, label_geometry = read_reference(case, labels)
            values = label_values(label)
        meant = _meant_values(case, values, labels)
        if meant and fix:
            case = replace(case, mend=replace(case.mend or LabelMend(), values=meant))
            label, label_geometry = read_reference(case, labels)
            values = label_values(label)
        problems += _check_label_values(case, label, values, labels, is_mask=bool(meant) or is_soft)
        problems += _check_annotated(case, values, labels)
        problems += _tell_mend(case)
    if geometry is not None and label_geometry is not None:
        problems += _check_grid(case, geometry, label_geometry)
    if image is None or geometry is None or label is None or any(problem.severity == ERROR for problem in problems):
        return problems
    return LoadedCase(
        case=case,
        image=image,
        label=label,
        values=frozenset(values),
        geometry=geometry,
        remarks=tuple(problems),
    )


def _is_one_mask(case: Case, labels: LabelSpec) -> bool:
    """Whether a label map should have a single structure, with a value that masks have."""
    is_one = len(labels.values) == 1 and labels.values[0] in MASK_VALUES
    return is_one and case.label is not None and labels.ignore is None and not labels.regions


def _is_soft_mask(case: Case, label: NDArray, values: set[int], labels: LabelSpec) -> bool:
    """Whether a label map has more values than the one structure that it should have, because its borders are grey."""
    if case.mend is not None or not _is_one_mask(case, labels) or len(values - {0}) <= 1:
        return False
    # A structure of 1 that is there is none in black, whatever is white.
    is_black = labels.values[0] in values and labels.values[0] != WHITE
    return has_grey_borders(label, n_shades=MIN_SHADES if is_black else 0)


def _meant_values(case: Case, values: set[int], labels: LabelSpec) -> dict[int, int]:
    """What the values of a mask stand for, that says 255 where the list of labels says 1, or the other way round."""
    if case.label is None or len(labels.values) != 1 or labels.regions or labels.ignore is not None:
        return {}
    inside, known = values - {0}, labels.values[0]
    if len(inside) == 1 and inside <= MASK_VALUES and known in MASK_VALUES and inside != {known}:
        return {next(iter(inside)): known}
    return {}


def _check_size(case: Case, geometry: Geometry) -> list[Problem]:
    sizes = [size * edge_mm for size, edge_mm in zip(geometry.shape, geometry.spacing_mm, strict=True) if size > 1]
    # Pictures without a spacing have 1 mm by definition, however many pixels there are.
    is_picture = geometry.shape[0] == 1 and set(geometry.spacing_mm) == {1.0}
    if (max(sizes, default=0) <= MAX_EXTENT_MM or is_picture) and min(geometry.spacing_mm) >= MIN_SPACING_MM:
        return []
    return [
        Problem(
            kind="impossible spacing",
            case=case.id,
            file=str(case.image_files[0]),
            found=f"{join_numbers(geometry.shape)} voxels of {join_numbers(geometry.spacing_mm)} mm (z, y, x)",
            expected=f"voxels larger than {MIN_SPACING_MM:g} mm, and a scan shorter than {MAX_EXTENT_MM:g} mm",
            advice="correct the spacing in the header, or its units, or convert the image anew",
        )
    ]


def _check_contrast(case: Case, image: NDArray[np.float32]) -> list[Problem]:
    """Channels in which all voxels are equal; those that the case lacks are not meant."""
    one_file = len(case.images) == 1
    present = [one_file or case.images[channel] is not None for channel in range(len(image))]
    constant = [channel for channel in range(len(image)) if present[channel] and np.ptp(image[channel]) == 0]
    if not constant:
        return []
    all_of_them = len(constant) == sum(present)
    numbers = "" if len(image) == 1 else f"channel {', '.join(map(str, constant))}: "
    return [
        Problem(
            kind="constant image" if all_of_them else "constant channel",
            case=case.id,
            file=str(case.images[0 if one_file else constant[0]]),
            found=f"{numbers}{float(image[constant[0]].flat[0]):.6g} in every voxel",
            expected="an image with contrast",
            advice="convert or export the image again, or remove the case"
            if all_of_them
            else "export the channel again, or leave its file out so that the case is known to lack it",
            severity=ERROR if all_of_them else WARNING,
        )
    ]


def _check_grid(case: Case, image: Geometry, label: Geometry) -> list[Problem]:
    """Whether the label map lies where its image does."""
    kind, file = "image and label map differ in shape or affine", str(case.label_files[0])
    if difference := grid_difference(image, label):
        advice = "resample the label map onto the image's grid; if only its header is wrong, copy the image's header"
        if sorted(image.shape) == sorted(label.shape) and image.shape != label.shape:
            advice = f"the axes of the label map seem to be swapped; {advice}"
        found, expected = difference
        return [Problem(kind=kind, case=case.id, file=file, found=found, expected=expected, advice=advice)]
    return _tell_offset(case, case.label_files[0], image, label, of="label map")


def _tell_voxels(case: Case, text: str) -> Problem:
    return Problem(
        kind="voxels mended in memory",
        case=case.id,
        text=text,
        advice="nothing; the file stays as it is",
        severity=NOTE,
    )


def _tell_channel(case: Case, file: Path, first: Geometry, own: Geometry) -> list[Problem]:
    """A note about a channel that lies elsewhere than the first."""
    difference = grid_difference(first, own)
    if not difference:
        return _tell_offset(case, file, first, own, of="channel")
    return [
        Problem(
            kind="channel on another grid",
            case=case.id,
            file=str(file),
            found=difference[0],
            expected="the grid of the first channel",
            advice="nothing, if it shows the same patient in the same place: it is resampled linearly (--fix)",
            severity=NOTE,
        )
    ]


def _tell_offset(case: Case, file: Path, image: Geometry, other: Geometry, *, of: str) -> list[Problem]:
    """A note about a header that is off by more than rounding explains; grids that differ are told elsewhere."""
    if image.shape != other.shape:
        return []
    distance = corner_distance_voxels(image, other)
    if not MIN_TOLD_DISTANCE_VOXELS < distance <= MAX_GRID_DISTANCE_VOXELS:
        return []
    return [
        Problem(
            kind=f"header of the {of} a little off",
            case=case.id,
            file=str(file),
            found=f"an affine that puts a corner {distance:.3f} voxels from where the image has it",
            expected="the image's affine",
            advice=f"nothing: the {of} is taken to lie where the image does",
            severity=NOTE,
        )
    ]


def _tell_mend(case: Case) -> list[Problem]:
    if case.mend is None:
        return []
    told = [f"{value} is read as {meant}" for value, meant in case.mend.values.items()]
    told += ["values near whole numbers are rounded"] if case.mend.rounded else []
    told += ["what is brighter than half is the structure"] if case.mend.halved else []
    return [
        Problem(
            kind="label map mended in memory",
            case=case.id,
            file=str(case.label_files[0]),
            text="; ".join(told),
            advice="nothing; the file stays as it is",
            severity=NOTE,
        )
    ]


def _check_label_values(
    case: Case, label: NDArray, values: set[int], labels: LabelSpec, *, is_mask: bool
) -> list[Problem]:
    known = {0, *labels.all_values}
    unknown = sorted(values - known)
    if not unknown:
        return [] if values & set(labels.values) else [_tell_empty(case)]
    counts = ", ".join(f"{value} ({int(np.count_nonzero(label == value))} voxels)" for value in unknown[:5])
    return [
        Problem(
            kind="label value that is not in the list of labels",
            case=case.id,
            file=str(case.label_files[0]),
            found=counts + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""),
            expected=f"only {list_some([str(value) for value in sorted(known)], most=20)}",
            advice="--fix reads the mask as what it means; or correct the label maps"
            if is_mask
            else "add the value to the labels of the dataset, or correct the label maps",
        )
    ]


def _tell_empty(case: Case) -> Problem:
    return Problem(
        kind="label map without any structure",
        case=case.id,
        file=str(case.label_files[0]) if case.label_files else "",
        found="only background",
        expected="at least one structure in most cases",
        advice="see whether the case really has none; then nothing has to be done",
        severity=WARNING,
    )


def _check_annotated(case: Case, values: set[int], labels: LabelSpec) -> list[Problem]:
    """What a case is said to be annotated with must be known, and nothing else may be in its label map."""
    named = (*case.masks, *(case.annotated or ()))
    unknown = [name for name in named if name not in labels.structures]
    if unknown:
        advice = "name structures as the list of labels does"
        found, expected = ", ".join(unknown), f"some of {list_some(labels.structures)}"
        return [
            Problem(
                kind="structure that is not among the labels",
                case=case.id,
                found=found,
                expected=expected,
                advice=advice,
            )
        ]
    if case.annotated is None:
        return []
    value_of = labels.structure_values
    allowed = {0, labels.ignore, *(value for name in case.annotated for value in value_of[name])}
    present = values - allowed
    extra = [name for name, values in value_of.items() if not case.knows(name) and present & set(values)]
    if not extra:
        return []
    advice = "add it to what is annotated in this case, or remove it from the label map"
    found = ", ".join(extra)
    return [
        Problem(kind="label of a structure that is said not to be annotated", case=case.id, found=found, advice=advice)
    ]


def label_values(label: NDArray) -> set[int]:
    """The values that occur in a label map.

    In pieces: counting is far quicker than sorting, but makes a copy of eight bytes per voxel.
    """
    values: set[int] = set()
    for piece in in_pieces(label):
        countable = piece.min() >= 0 and piece.max() < 2**16
        values |= set((np.flatnonzero(np.bincount(piece)) if countable else np.unique(piece)).tolist())
    return values

"""What is wrong with a dataset, found while each of its files is read just once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from autoseg.core.errors import DatasetError, FormatError, Problem, describe_problems, list_some
from autoseg.core.geometry import Geometry, grid_difference
from autoseg.core.labels import LabelSpec
from autoseg.core.runtime import map_threads
from autoseg.data.dataset import Case, Dataset
from autoseg.data.io import read_label, read_raw
from autoseg.data.listings import structure_labels
from autoseg.data.references import combinations_of, read_reference
from autoseg.data.regrid import resample_onto

MAX_LABELS_FOUND = 1000
PIECE_VOXELS = 2**20

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LoadedCase:
    """A case in memory, in canonical orientation.

    Attributes:
        case: what was read.
        image: (C, Z, Y, X) float32.
        label: (Z, Y, X), the values of the file.
        geometry: of the first channel.
    """

    case: Case
    image: NDArray[np.float32]
    label: NDArray
    geometry: Geometry


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """Everything that was found wrong with a dataset, for `check.json`.

    Attributes:
        n_cases: how many cases were read.
        problems: what was found; empty for a dataset in order.
        key: digest of the dataset's index and of the state of its files.
    """

    n_cases: int
    problems: tuple[Problem, ...]
    key: str


def load_image(
    images: Sequence[Path | None], *, n_channels: int, fix: bool = False
) -> tuple[NDArray[np.float32], Geometry]:
    """Reads all channels of one case, from one file or one file each; those without a file are zero.

    Args:
        images: in order.
        n_channels: that there should be in all.
        fix: resample channels that lie on another grid than the first; otherwise they are refused.

    Returns:
        (C, Z, Y, X) float32 in canonical orientation, and the geometry of the first file.

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
        if len(images) == 1 and n_found > 1:
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
    for path, array in zip(files, parts, strict=True):
        n_broken = int(array.size - np.count_nonzero(np.isfinite(array)))
        if n_broken:
            raise FormatError(f"{path}: found {n_broken} voxels that are NaN or infinite, expected finite numbers")
    if len(images) == 1:
        return parts[0], geometry
    read = iter(parts)
    absent = np.zeros((1, *geometry.shape), np.float32)
    return np.concatenate([absent if path is None else next(read) for path in images]), geometry


def load_case(case: Case, *, n_channels: int, labels: LabelSpec, fix: bool = False) -> LoadedCase | list[Problem]:
    """Reads and checks one case.

    Args:
        case: of the dataset.
        n_channels: of the dataset.
        labels: of the dataset.
        fix: see `load_image`.

    Returns:
        The case, or everything that is wrong with it.
    """
    problems: list[Problem] = []
    image_part, label_part = None, None
    try:
        image_part = load_image(case.images, n_channels=n_channels, fix=fix)
    except FormatError as error:
        advice = "mend or replace the image, or remove the case"
        problems.append(Problem(kind="image cannot be used", case=case.id, text=str(error), advice=advice))
    try:
        label_part = read_reference(case, labels)
    except FormatError as error:
        advice = "mend or replace the label map, or remove the case"
        problems.append(Problem(kind="label map cannot be used", case=case.id, text=str(error), advice=advice))
    if label_part is not None:
        problems += _check_label_values(case, label_part[0], labels)
        problems += _check_annotated(case, label_part[0], labels)
    if image_part is not None and label_part is not None:
        difference = grid_difference(image_part[1], label_part[1])
        if difference:
            advice = (
                "resample the label map onto the image's grid; if only its header is wrong, copy the image's header"
            )
            problems.append(
                Problem(
                    kind="image and label map differ in shape or affine",
                    case=case.id,
                    file=str(case.label_files[0]),
                    found=difference[0],
                    expected=difference[1],
                    advice=advice,
                )
            )
    if problems or image_part is None or label_part is None:
        return problems
    return LoadedCase(case=case, image=image_part[0], label=label_part[0], geometry=image_part[1])


def _check_label_values(case: Case, label: NDArray, labels: LabelSpec) -> list[Problem]:
    known = {0, *labels.all_values}
    unknown = sorted(label_values(label) - known)
    if not unknown:
        return []
    counts = ", ".join(f"{value} ({int(np.count_nonzero(label == value))} voxels)" for value in unknown[:5])
    return [
        Problem(
            kind="label value that is not in the list of labels",
            case=case.id,
            file=str(case.label_files[0]),
            found=counts + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""),
            expected=f"only {', '.join(map(str, sorted(known)))}",
            advice="add the value to the labels of the dataset, or correct the label maps",
        )
    ]


def _check_annotated(case: Case, label: NDArray, labels: LabelSpec) -> list[Problem]:
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
    present = label_values(label) - allowed
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
    flat = label.ravel()
    values: set[int] = set()
    for start in range(0, flat.size, PIECE_VOXELS):
        piece = flat[start : start + PIECE_VOXELS]
        countable = piece.min() >= 0 and piece.max() < 2**16
        values |= set((np.flatnonzero(np.bincount(piece)) if countable else np.unique(piece)).tolist())
    return values


def discover_labels(dataset: Dataset, *, n_threads: int) -> LabelSpec:
    """The classes of a dataset whose layout does not list them: every value that occurs, named after itself.

    Raises:
        DatasetError: label maps that cannot be read, no foreground at all, or implausibly many values.
    """

    def values_of(case: Case) -> set[int] | set[frozenset[str]] | Problem:
        try:
            return combinations_of(case) if case.label is None else label_values(read_label(case.label)[0])
        except FormatError as error:
            advice = "mend or replace the label map, or remove the case"
            return Problem(kind="label map cannot be used", case=case.id, text=str(error), advice=advice)

    answers = map_threads(values_of, dataset.cases, n_threads=n_threads, description="looking for labels")
    problems = [answer for answer in answers if isinstance(answer, Problem)]
    if problems:
        raise DatasetError(describe_problems(f"{dataset.name}: some label maps cannot be used.", problems))
    found: set[Any] = set().union(*(answer for answer in answers if isinstance(answer, set)))
    structures = list(dict.fromkeys(name for case in dataset.cases for name in case.masks))
    if structures:
        return structure_labels(structures, sorted(found, key=sorted))
    values = sorted(found - {0})
    if not values:
        raise DatasetError(f"{dataset.name}: every voxel of every label map is 0, expected at least one structure")
    if len(values) > MAX_LABELS_FOUND:
        raise DatasetError(
            f"{dataset.name}: found {len(values)} different values in the label maps, expected a few labels; "
            "are these intensity images?"
        )
    return LabelSpec(names=tuple(f"label {value}" for value in values), values=tuple(values))


def scan_dataset(dataset: Dataset, labels: LabelSpec, measure: Callable[[LoadedCase], T], *, n_threads: int) -> list[T]:
    """Reads every case once, checks it, and measures it while it is in memory.

    Args:
        dataset: the index.
        labels: its classes.
        measure: called with each case that is in order, from several threads.
        n_threads: cases in memory at a time.

    Returns:
        What `measure` returned, in the order of the cases.

    Raises:
        DatasetError: one error that lists every problem of every case.
    """

    def scan(case: Case) -> T | list[Problem]:
        loaded = load_case(case, n_channels=len(dataset.channels), labels=labels, fix=dataset.fix)
        return measure(loaded) if isinstance(loaded, LoadedCase) else loaded

    answers = map_threads(scan, dataset.cases, n_threads=n_threads, description="checking the cases")
    measured: list[T] = []
    problems: list[Problem] = []
    for answer in answers:
        if isinstance(answer, list):
            problems += answer
        else:
            measured.append(answer)
    if problems:
        n_bad = len({problem.case for problem in problems})
        headline = f"{dataset.name}: {n_bad} of {len(dataset.cases)} cases cannot be used. Nothing was written."
        raise DatasetError(describe_problems(headline, problems))
    return measured

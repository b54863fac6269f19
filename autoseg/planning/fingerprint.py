"""The fingerprint: what the scans of a dataset are like, before any decision is taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from autoseg.core.errors import DatasetError, PlanError, Problem
from autoseg.core.geometry import bounding_box, label_components
from autoseg.core.labels import LabelSpec
from autoseg.core.runtime import derive_seed
from autoseg.core.serialize import later
from autoseg.data.load import LoadedCase

TOTAL_INTENSITIES = 2_000_000
MIN_INTENSITIES_PER_CASE = 2_000
MAX_SPECKS = 0.1
MAX_COMPONENT_VOXELS = 2**23
"""In larger boxes components are those of every second voxel along each axis, which takes an eighth of the memory."""


@dataclass(frozen=True, kw_only=True)
class CaseFingerprint:
    """Geometry of one case, in canonical (Z, Y, X) order.

    Attributes:
        case: its name.
        shape: in voxels.
        spacing_mm: of a voxel.
        cropped_shape: of the bounding box of the voxels that are non-zero in any channel.
        label_volumes_ml: volume of each foreground class, in the order of the labels.
        component_volumes_ml: likewise of one of its connected components, see `typical_component`; empty where that is
            not known.
    """

    case: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    cropped_shape: tuple[int, int, int]
    label_volumes_ml: tuple[float, ...]
    component_volumes_ml: tuple[float, ...] = later(())


@dataclass(frozen=True, kw_only=True)
class ChannelFingerprint:
    """Intensities of one channel over the foreground voxels of all cases, equally many drawn from each.

    Attributes:
        name: the channel's name, such as "CT" or "T1".
        mean, std, minimum, maximum, median, percentile_00_5, percentile_99_5: in the image's own unit.
        all_from, all_to: every whole image has voxels as low as the first and as high as the second; None where that
            is not known.
    """

    name: str
    mean: float
    std: float
    minimum: float
    maximum: float
    median: float
    percentile_00_5: float
    percentile_99_5: float
    all_from: float | None = later(None)
    all_to: float | None = later(None)


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What all scans of a dataset are like.

    Attributes:
        cases: geometry, case by case.
        channels: intensities, channel by channel.
        median_cropped_fraction: median over cases of cropped volume / volume.
    """

    cases: tuple[CaseFingerprint, ...]
    channels: tuple[ChannelFingerprint, ...]
    median_cropped_fraction: float

    @property
    def spacing_range_mm(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """The smallest and the largest spacing along Z, Y and X, each of any of the cases."""
        z_mm, y_mm, x_mm = zip(*(case.spacing_mm for case in self.cases), strict=True)
        return (min(z_mm), min(y_mm), min(x_mm)), (max(z_mm), max(y_mm), max(x_mm))


@dataclass(frozen=True, kw_only=True)
class CaseMeasurement:
    """What one case adds to the fingerprint.

    Attributes:
        fingerprint: its geometry.
        intensities: (C, n) float32, drawn from its foreground voxels; n is 0 for a case without foreground, NaN is a
            channel that it lacks.
        extremes: (C, 2) the lowest and the highest voxel of each whole channel; NaN for one that it lacks.
    """

    fingerprint: CaseFingerprint
    intensities: NDArray[np.float32]
    extremes: NDArray[np.float64]


def measure_case(loaded: LoadedCase, labels: LabelSpec, *, n_intensities: int) -> CaseMeasurement:
    """Measures one case.

    Args:
        loaded: the case in memory.
        labels: the classes of the dataset.
        n_intensities: voxels to draw from the foreground, with replacement; the draw depends on the case's name alone.
    """
    label, geometry = loaded.label, loaded.geometry
    crop = bounding_box((loaded.image != 0).any(axis=0))
    if labels.ignore is not None:
        label = np.where(label == labels.ignore, 0, label)
    counts = np.zeros(labels.n_stored, np.int64)
    for plane in labels.values_to_classes(label):
        counts += np.bincount(plane.ravel(), minlength=labels.n_stored)
    rng = np.random.default_rng(derive_seed("intensities", loaded.case.id))
    drawn = _draw_foreground(label, n_intensities, rng)
    voxel_ml = geometry.voxel_volume_ml
    intensities = loaded.image.reshape(loaded.image.shape[0], -1)[:, drawn]
    extremes = np.array([(channel.min(), channel.max()) for channel in loaded.image], np.float64)
    absent = [channel for channel, file in enumerate(loaded.case.images) if file is None]
    intensities[absent] = np.nan
    extremes[absent] = np.nan
    return CaseMeasurement(
        fingerprint=CaseFingerprint(
            case=loaded.case.id,
            shape=geometry.shape,
            spacing_mm=geometry.spacing_mm,
            cropped_shape=crop.shape,
            label_volumes_ml=tuple((counts[1 : labels.n_classes] * voxel_ml).tolist()),
            component_volumes_ml=_component_volumes_ml(label, labels, voxel_ml),
        ),
        intensities=intensities,
        extremes=extremes,
    )


def _component_volumes_ml(label: NDArray, labels: LabelSpec, voxel_ml: float) -> tuple[float, ...]:
    from scipy import ndimage

    boxes = ndimage.find_objects(label, max(labels.values))
    volumes = []
    for value in labels.values:
        box = boxes[value - 1]
        if box is None:
            volumes.append(0.0)
            continue
        part = label[box]
        step = 1 if part.size <= MAX_COMPONENT_VOXELS else 2
        kept = part[::step, ::step, ::step]
        volumes.append(typical_component(kept == value) * part.size / kept.size * voxel_ml)
    return tuple(volumes)


def typical_component(mask: NDArray[np.bool_]) -> float:
    """Voxels of the median connected component, but for the smallest ones that together are a tenth of the mask.

    Most label maps have a few stray voxels beside a structure, which say nothing of its size.

    Args:
        mask: any shape.
    """
    components, n = label_components(mask)
    if not n:
        return 0.0
    sizes = np.sort(np.bincount(components.ravel())[1:])
    return float(np.median(sizes[np.cumsum(sizes) > MAX_SPECKS * sizes.sum()]))


def _draw_foreground(label: NDArray, n: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Flat indices of `n` foreground voxels, drawn with replacement; none where there is no foreground.

    Slice by slice: a list of all foreground voxels would take eight bytes for each of them.
    """
    # How many foreground voxels lie in the slices before each one.
    before = np.concatenate([[0], np.cumsum([np.count_nonzero(plane) for plane in label])])
    if not before[-1]:
        return np.empty(0, np.intp)
    ranks = rng.integers(before[-1], size=n)
    drawn = np.empty(n, np.intp)
    for number, plane in enumerate(label):
        inside = (before[number] <= ranks) & (ranks < before[number + 1])
        if inside.any():
            drawn[inside] = number * plane.size + np.flatnonzero(plane)[ranks[inside] - before[number]]
    return drawn


def intensities_per_case(n_cases: int) -> int:
    """How many foreground voxels to draw from each case, so that memory is bounded and percentiles are steady."""
    return max(MIN_INTENSITIES_PER_CASE, TOTAL_INTENSITIES // n_cases)


def summarise(measurements: Sequence[CaseMeasurement], channels: Sequence[str]) -> Fingerprint:
    """Puts the measurements of all cases together.

    Args:
        measurements: of every case.
        channels: names of the channels.

    Raises:
        DatasetError: no case has any foreground.
    """
    pooled = np.concatenate([measurement.intensities for measurement in measurements], axis=1)
    empty = [name for name, values in zip(channels, pooled, strict=True) if pooled.size and np.isnan(values).all()]
    if empty:
        raise DatasetError(f"no case that has the channel {', '.join(empty)} has any foreground; leave the channel out")
    if not pooled.size:
        raise DatasetError("every voxel of every label map is background, expected at least one labelled structure")
    lowest, highest = np.moveaxis(np.array([measurement.extremes for measurement in measurements]), 2, 0)
    ranges = zip(np.nanmax(lowest, axis=0).tolist(), np.nanmin(highest, axis=0).tolist(), strict=True)
    fractions = [prod(m.fingerprint.cropped_shape) / prod(m.fingerprint.shape) for m in measurements]
    return Fingerprint(
        cases=tuple(measurement.fingerprint for measurement in measurements),
        channels=tuple(
            _measure_channel(name, values, all_from=all_from, all_to=all_to)
            for name, values, (all_from, all_to) in zip(channels, pooled, ranges, strict=True)
        ),
        median_cropped_fraction=float(np.median(fractions)),
    )


def _measure_channel(name: str, values: NDArray[np.float32], *, all_from: float, all_to: float) -> ChannelFingerprint:
    values = values[~np.isnan(values)]
    low, median, high = np.percentile(values, (0.5, 50, 99.5)).tolist()
    return ChannelFingerprint(
        name=name,
        mean=float(values.mean(dtype=np.float64)),
        std=float(values.std(dtype=np.float64)),
        minimum=float(values.min()),
        maximum=float(values.max()),
        median=median,
        percentile_00_5=low,
        percentile_99_5=high,
        all_from=all_from,
        all_to=all_to,
    )


def check_fingerprint(fingerprint: Fingerprint) -> None:
    """Refuses numbers that no scan can have.

    Raises:
        PlanError: with the cases that have them.
    """
    if not fingerprint.cases or not fingerprint.channels:
        raise PlanError(
            f"the fingerprint has {len(fingerprint.cases)} cases and {len(fingerprint.channels)} channels, "
            "expected at least one of each; run 'autoseg plan' again"
        )
    bad = [case for case in fingerprint.cases if not _is_possible(case)]
    if bad:
        problems = [
            Problem(
                kind="impossible geometry",
                case=case.case,
                found=f"cropped_shape {list(case.cropped_shape)}, spacing_mm {list(case.spacing_mm)}",
                expected="at least one voxel along each axis, and spacings that are positive and finite",
                advice="mend or remove these cases",
            )
            for case in bad
        ]
        raise PlanError.listing("no plan can be made from these cases", problems)


def _is_possible(case: CaseFingerprint) -> bool:
    return min(case.cropped_shape) >= 1 and all(0 < edge_mm < math.inf for edge_mm in case.spacing_mm)

"""What a plan will cost, and what looks odd about the cases, before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from autoseg.core.errors import WARNING, Problem
from autoseg.core.geometry import inverse_order, join_numbers, permute3
from autoseg.core.labels import class_dtype
from autoseg.planning.fingerprint import CaseFingerprint, Fingerprint
from autoseg.planning.grid import AXES, resampled_shapes
from autoseg.planning.memory import count_feature_map_values
from autoseg.planning.plan import ConfigurationPlan, Plan
from autoseg.planning.presets import find_preset
from autoseg.planning.topology import MAX_SPACING_RATIO

GIB = 2**30
MAX_GROWTH = 8.0
"""Resampling that multiplies the voxels of a case by more than this deserves a warning."""

OUTLIER_FACTOR = 2.0
OUTLIER_DEVIATIONS = 5.0
"""A spacing is an outlier where it differs from the median by more than this factor, and by more than so many median
absolute deviations of its logarithm: a dataset of mixed protocols has a wide spread but no outliers."""

# Of a voxel of an image on disk, see `autoseg.preprocessing.store`.
IMAGE_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class ConfigurationEstimate:
    """What one configuration will take.

    Attributes:
        configuration: its name.
        grid: the configuration whose preprocessed cases it uses, see `Plan.grid`.
        median_voxels: of a case on its grid.
        largest_voxels: likewise.
        largest_case: which that is.
        disk_gib: of all preprocessed cases.
        training_memory_gib: about what training takes at the plan's batch size.
    """

    configuration: str
    grid: str
    median_voxels: float
    largest_voxels: int
    largest_case: str
    disk_gib: float
    training_memory_gib: float


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """What a plan will take.

    Attributes:
        configurations: one entry per configuration of the plan, in its order.
        warnings: cases whose spacing is an outlier, and cases that resampling enlarges a lot.
    """

    configurations: tuple[ConfigurationEstimate, ...]
    warnings: tuple[Problem, ...]


def estimate(fingerprint: Fingerprint, plan: Plan) -> Estimates:
    """Estimates disk, memory and sizes from the fingerprint alone.

    Args:
        fingerprint: what the scans are like.
        plan: of the same dataset.
    """
    return Estimates(
        configurations=tuple(
            _estimate_configuration(fingerprint, plan, configuration) for configuration in plan.configurations.values()
        ),
        warnings=(
            *find_spacing_outliers(fingerprint.cases),
            *_find_other_slices(fingerprint.cases, plan.axis_order[0]),
            *_find_growth(fingerprint, plan),
        ),
    )


def shapes_on_grid(
    cases: Sequence[CaseFingerprint], plan: Plan, configuration: ConfigurationPlan
) -> NDArray[np.float64]:
    """Sizes of the cases as they are preprocessed.

    Returns:
        (cases, 3) whole numbers, in the plan's `axis_order`.
    """
    order = list(plan.axis_order)
    z_mm, y_mm, x_mm = permute3((1.0, *configuration.spacing_mm)[-3:], inverse_order(order))
    shapes = resampled_shapes(cases, (z_mm, y_mm, x_mm))[:, order]
    if configuration.n_axes == 2:
        shapes[:, 0] = [case.cropped_shape[order[0]] for case in cases]
    return shapes


def find_spacing_outliers(cases: Sequence[CaseFingerprint]) -> list[Problem]:
    """Cases whose spacing along an axis is far from that of the others."""
    if not cases:
        return []
    spacings_mm = np.array([case.spacing_mm for case in cases])
    logarithms = np.log(spacings_mm)
    distance = np.abs(logarithms - np.median(logarithms, axis=0))
    allowed = np.maximum(np.log(OUTLIER_FACTOR), OUTLIER_DEVIATIONS * np.median(distance, axis=0))
    usual = join_numbers(np.median(spacings_mm, axis=0))
    return [
        Problem(
            kind="unusual spacing",
            case=case.case,
            found=f"{join_numbers(case.spacing_mm)} mm (z, y, x)",
            expected=f"about the median of the dataset, {usual} mm",
            advice="see whether the header is right; a wrong spacing deforms the case",
            severity=WARNING,
        )
        for case, is_far in zip(cases, (distance > allowed).any(axis=1), strict=True)
        if is_far
    ]


def _find_other_slices(cases: Sequence[CaseFingerprint], through_plane: int) -> list[Problem]:
    """Cases with thick slices along another axis than the plan's."""
    problems = []
    for case in cases:
        coarsest = int(np.argmax(case.spacing_mm))
        others_mm = max(edge_mm for axis, edge_mm in enumerate(case.spacing_mm) if axis != coarsest)
        if coarsest != through_plane and case.spacing_mm[coarsest] >= MAX_SPACING_RATIO * others_mm:
            problems.append(
                Problem(
                    kind="thick slices along another axis",
                    case=case.case,
                    found=f"{join_numbers(case.spacing_mm)} mm (z, y, x), slices along {AXES[coarsest]}",
                    expected=f"slices along {AXES[through_plane]}",
                    advice="plan scans of different directions as datasets of their own, or train in 3D",
                    severity=WARNING,
                )
            )
    return problems


def _find_growth(fingerprint: Fingerprint, plan: Plan) -> list[Problem]:
    """Cases that have far more voxels on the grid of full resolution than in their file."""
    finest = plan.configurations.get("3d_fullres") or plan.configuration(plan.recommended)
    shapes = shapes_on_grid(fingerprint.cases, plan, finest)
    problems = []
    for case, shape in zip(fingerprint.cases, shapes, strict=True):
        growth = float(np.prod(shape)) / prod(case.cropped_shape)
        if growth > MAX_GROWTH:
            before = [case.cropped_shape[axis] for axis in plan.axis_order]
            problems.append(
                Problem(
                    kind=f"resampling multiplies the voxels by more than {MAX_GROWTH:g}",
                    case=case.case,
                    found=f"{join_numbers(before)} voxels that become {join_numbers(shape)}, {growth:.1f} times more",
                    advice="plan with a coarser --spacing, or leave out cases of such low resolution",
                    severity=WARNING,
                )
            )
    return problems


def _estimate_configuration(
    fingerprint: Fingerprint, plan: Plan, configuration: ConfigurationPlan
) -> ConfigurationEstimate:
    voxels = np.prod(shapes_on_grid(fingerprint.cases, plan, configuration), axis=1)
    largest = int(np.argmax(voxels))
    label_bytes = np.dtype(class_dtype(plan.labels.n_stored)).itemsize
    cropped = sum(prod(case.cropped_shape) for case in fingerprint.cases)
    preset = find_preset(plan.preset, plan.gpu_memory_gib)
    values = count_feature_map_values(configuration.network, configuration.patch_size, plan.labels.n_outputs)
    return ConfigurationEstimate(
        configuration=configuration.name,
        grid=plan.grid(configuration.name),
        median_voxels=float(np.median(voxels)),
        largest_voxels=int(voxels[largest]),
        largest_case=fingerprint.cases[largest].case,
        # Where a scan has content takes a bit for each voxel of it.
        disk_gib=(float(voxels.sum()) * (IMAGE_BYTES * len(plan.channels) + label_bytes) + cropped / 8) / GIB,
        training_memory_gib=preset.needed_memory_gib(
            values, batch_size=configuration.batch_size, n_axes=configuration.n_axes
        ),
    )

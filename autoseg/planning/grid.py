"""The network's grid: to which spacing the cases are resampled, and in which order their axes stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from autoseg.core.geometry import ANISOTROPY_THRESHOLD, inverse_order, join_numbers, permute3
from autoseg.planning.fingerprint import CaseFingerprint
from autoseg.planning.plan import SET_BY_USER

AXES = "zyx"
COARSE_AXIS_PERCENTILE = 10


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Grid that all cases are resampled to. Arrays are in `axis_order`.

    Attributes:
        axis_order: the grid's axes as indices into (Z, Y, X), through-plane axis first.
        spacing_mm: of a voxel.
        median_shape: median over cases of their size on this grid, in voxels; a half where two cases share the middle.
        largest_shape: likewise, the largest size along each axis.
        n_cases: number of cases.
        is_set_by_user: whether the spacing is.
        spacing_reason: why the spacing is as it is.
        axis_order_reason: why the axes stand in this order.
    """

    axis_order: tuple[int, int, int]
    spacing_mm: tuple[float, ...]
    median_shape: tuple[float, ...]
    largest_shape: tuple[float, ...]
    n_cases: int
    is_set_by_user: bool
    spacing_reason: str
    axis_order_reason: str

    @property
    def has_slices(self) -> bool:
        """Whether there is anything along the through-plane axis."""
        return self.median_shape[0] > 1

    @property
    def n_voxels(self) -> float:
        """About how many voxels the dataset has on this grid."""
        return prod(self.median_shape) * self.n_cases


def choose_grid(cases: Sequence[CaseFingerprint], *, spacing_mm: tuple[float, float, float] | None = None) -> Grid:
    """The spacing, the axis order and the median size of the cases.

    Args:
        cases: at least one.
        spacing_mm: target spacing (z, y, x) where the user has set one.

    Returns:
        The grid of the highest resolution that is planned.
    """
    shapes = np.array([case.cropped_shape for case in cases], np.float64)
    if spacing_mm is None:
        target_mm, reason = _choose_spacing(shapes, np.array([case.spacing_mm for case in cases], np.float64))
    else:
        target_mm, reason = np.array(spacing_mm), f"{SET_BY_USER}: {join_numbers(spacing_mm)} mm (z, y, x)"
    axis_order, axis_order_reason = _choose_axis_order(shapes, target_mm)
    z_mm, y_mm, x_mm = (float(edge_mm) for edge_mm in target_mm)
    return _measure_grid(
        cases,
        (z_mm, y_mm, x_mm),
        axis_order,
        reason=reason,
        axis_order_reason=axis_order_reason,
        is_set_by_user=spacing_mm is not None,
    )


def adopt_grid(
    cases: Sequence[CaseFingerprint],
    *,
    spacing_mm: tuple[float, float, float],
    axis_order: tuple[int, int, int],
    reason: str,
) -> Grid:
    """The grid of another plan, with the sizes that these cases have on it.

    Args:
        cases: at least one.
        spacing_mm: in the order of `axis_order`.
        axis_order: the grid's axes as indices into (Z, Y, X).
        reason: why this grid.
    """
    z_mm, y_mm, x_mm = permute3(spacing_mm, inverse_order(axis_order))
    return _measure_grid(cases, (z_mm, y_mm, x_mm), axis_order, reason=reason, axis_order_reason=reason)


def resampled_shapes(cases: Sequence[CaseFingerprint], spacing_mm: tuple[float, float, float]) -> NDArray[np.float64]:
    """Sizes of the cropped cases on a grid.

    Args:
        cases: at least one.
        spacing_mm: of the grid, (z, y, x).

    Returns:
        (cases, 3), whole numbers of at least 1, canonical (Z, Y, X).
    """
    shapes = np.array([case.cropped_shape for case in cases], np.float64)
    spacings_mm = np.array([case.spacing_mm for case in cases], np.float64)
    # A thin case of a finer spacing than the target must not vanish.
    resampled = np.maximum(np.round(spacings_mm / np.array(spacing_mm) * shapes), 1)
    resampled[:, (shapes == 1).all(axis=0)] = 1
    return resampled


def _measure_grid(
    cases: Sequence[CaseFingerprint],
    spacing_mm: tuple[float, float, float],
    axis_order: tuple[int, int, int],
    *,
    reason: str,
    axis_order_reason: str,
    is_set_by_user: bool = False,
) -> Grid:
    resampled = resampled_shapes(cases, spacing_mm)
    median, largest = np.median(resampled, axis=0), resampled.max(axis=0)
    return Grid(
        axis_order=axis_order,
        spacing_mm=tuple(spacing_mm[axis] for axis in axis_order),
        median_shape=tuple(float(median[axis]) for axis in axis_order),
        largest_shape=tuple(float(largest[axis]) for axis in axis_order),
        n_cases=len(cases),
        is_set_by_user=is_set_by_user,
        spacing_reason=reason,
        axis_order_reason=axis_order_reason,
    )


def _choose_spacing(shapes: NDArray[np.float64], spacings_mm: NDArray[np.float64]) -> tuple[NDArray[np.float64], str]:
    """Target spacing per axis: the median, but finer along a coarse axis.

    Args:
        shapes: (cases, 3), in voxels.
        spacings_mm: (cases, 3).

    Returns:
        Spacing in mm (3,), and the reason.
    """
    target = np.median(spacings_mm, axis=0)
    median_shape = np.median(shapes, axis=0)
    coarse = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != coarse]
    name, median_mm = AXES[coarse], float(target[coarse])
    others_mm, others_size = float(target[others].max()), float(median_shape[others].min())
    text = f"spacing is the median of each axis, {join_numbers(target)} mm (z, y, x)"
    is_coarse = median_mm > ANISOTROPY_THRESHOLD * others_mm
    is_thin = median_shape[coarse] * ANISOTROPY_THRESHOLD < others_size
    if is_coarse and is_thin:
        percentile_mm = float(np.percentile(spacings_mm[:, coarse], COARSE_AXIS_PERCENTILE))
        # Just above the others, so that this stays the coarsest axis and the axis order does not flip.
        target[coarse] = percentile_mm if percentile_mm >= others_mm else others_mm + 1e-5
        text = (
            f"spacing of {name} is the {COARSE_AXIS_PERCENTILE}th percentile, {percentile_mm:.4g} mm, because the "
            f"median {median_mm:.4g} mm is more than {ANISOTROPY_THRESHOLD:g} times {others_mm:.4g} mm and the median "
            f"of {median_shape[coarse]:g} slices times {ANISOTROPY_THRESHOLD:g} is less than {others_size:g} voxels: "
            "the median would blur the cases with thinner slices"
        )
        if percentile_mm < others_mm:
            text += f"; as that is finer than the other axes, it is set just above their {others_mm:.4g} mm"
        text += f"; the other axes have their median, {join_numbers(target[others])} mm"
    elif is_coarse:
        text += (
            f"; {name} keeps its median although that is more than {ANISOTROPY_THRESHOLD:g} times {others_mm:.4g} mm, "
            f"because {median_shape[coarse]:g} slices times {ANISOTROPY_THRESHOLD:g} are not less than "
            f"{others_size:g} voxels"
        )
    return target, text


def _choose_axis_order(
    shapes: NDArray[np.float64], spacing_mm: NDArray[np.float64]
) -> tuple[tuple[int, int, int], str]:
    """The through-plane axis first, the others in their order.

    Args:
        shapes: (cases, 3), in voxels.
        spacing_mm: target spacing, (3,).

    Returns:
        The order, and the reason.
    """
    flat = (shapes == 1).all(axis=0)
    if flat.any():
        # Slicing such data along any other axis would leave lines instead of pictures, whatever the header's spacing.
        first = int(np.argmax(np.where(flat, spacing_mm, -np.inf)))
        text = f"{AXES[first]} is the through-plane axis because every case has a single slice along it"
    else:
        first = int(np.argmax(spacing_mm))
        text = (
            f"{AXES[first]} is the through-plane axis because it has the largest target spacing of "
            f"{join_numbers(spacing_mm)} mm (z, y, x)"
        )
        if (spacing_mm == spacing_mm[first]).sum() > 1:
            text += "; of equal ones the first is taken"
    second, third = (axis for axis in range(3) if axis != first)
    return (first, second, third), text

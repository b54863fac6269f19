"""Where voxels are: shapes, spacings, orientation. Spatial order is (Z, Y, X) unless a name says otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoseg.core.errors import FormatError

Shape3 = tuple[int, int, int]
Spacing3 = tuple[float, float, float]
Affine = tuple[tuple[float, ...], ...]

SMALLEST_SPACING_MM = 1e-7
"""Spacings are rounded to as much."""

ANISOTROPY_THRESHOLD = 3.0
"""An axis is coarse where its spacing is more than this factor above the others'."""

# Grids that lie closer than this differ by rounding in the header (a quaternion is stored in single precision), not by
# a mistake, and a tenth of a voxel is less than anybody draws a border by.
MAX_GRID_DISTANCE_VOXELS = 0.1

# Canonical x, y, z point to Right, Anterior, Superior; the second letter is the opposite direction.
_CANONICAL_AXES = ("RL", "AP", "SI")


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Where the voxels of one volume are, and how its file stores them.

    Attributes:
        shape: canonical (Z, Y, X), voxels.
        spacing_mm: canonical (Z, Y, X).
        affine: 4x4, from the file's own voxel indices (i, j, k) to RAS+ millimetres, exactly as in the file.
        file_axcodes: where the file's i, j and k axes point to, for instance ("L", "P", "S").
    """

    shape: Shape3
    spacing_mm: Spacing3
    affine: Affine
    file_axcodes: tuple[str, str, str]

    @property
    def file_shape(self) -> Shape3:
        """Shape of the array (i, j, k) in the file."""
        shape_xyz = self.shape[::-1]
        axes = [_canonical_axis(code) for code in self.file_axcodes]
        return (shape_xyz[axes[0]], shape_xyz[axes[1]], shape_xyz[axes[2]])

    @property
    def canonical_affine(self) -> NDArray:
        """4x4 float64, from canonical (x, y, z) indices to RAS+ millimetres."""
        affine = np.asarray(self.affine, np.float64)
        canonical = np.eye(4)
        canonical[:, 3] = affine[:, 3]
        for file_axis, code in enumerate(self.file_axcodes):
            axis = _canonical_axis(code)
            column = affine[:, file_axis]
            if _is_reversed(code):
                canonical[:, 3] += column * (self.file_shape[file_axis] - 1)
                column = -column
            canonical[:, axis] = column
        return canonical

    @property
    def voxel_volume_ml(self) -> float:
        """Volume of one voxel; of a sheared grid, as a tilted gantry makes it, less than the product of its edges."""
        product = float(np.prod(self.spacing_mm))
        volume = abs(float(np.linalg.det(np.asarray(self.affine)[:3, :3])))
        # An affine is rounded more than a spacing.
        return (product if math.isclose(volume, product, rel_tol=1e-3) else volume) / 1000.0


def make_geometry(file_shape: Sequence[int], affine: NDArray, *, header_spacing_mm: Sequence[float]) -> Geometry:
    """Geometry of a file from its shape and affine.

    The spacing is the length of the affine's columns. Where the header's own figure agrees with it to rounding, that
    figure is taken: it carries no noise from an oblique rotation, so axes of equal spacing stay exactly equal.

    Args:
        file_shape: (i, j, k).
        affine: 4x4, from (i, j, k) to RAS+ millimetres.
        header_spacing_mm: (i, j, k).

    Raises:
        FormatError: the affine is singular or not finite.
    """
    affine = np.asarray(affine, np.float64)
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise FormatError(f"found the affine {affine.tolist()}, expected a finite, invertible 4x4 matrix")
    # Sizes whose squares no number holds become infinite, and are refused.
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
    # Relative to the voxel, so that microscopic voxels are not mistaken for a singular matrix.
    is_usable = np.isfinite(lengths).all() and lengths.all()
    if not is_usable or not abs(np.linalg.det(affine[:3, :3] / lengths)) > 1e-6:
        raise FormatError(f"found the affine {affine.tolist()}, expected a finite, invertible 4x4 matrix")
    if lengths.min() < SMALLEST_SPACING_MM:
        raise FormatError(f"found the affine {affine.tolist()}, expected voxels of {SMALLEST_SPACING_MM} mm and more")
    axcodes = _nearest_axcodes(affine)
    header = np.abs(np.asarray(header_spacing_mm, np.float64))
    agrees = np.abs(lengths - header) <= 1e-4 * lengths
    spacing_ijk = np.where(agrees, header, lengths)
    shape_xyz, spacing_xyz = [0, 0, 0], [0.0, 0.0, 0.0]
    for file_axis, code in enumerate(axcodes):
        shape_xyz[_canonical_axis(code)] = int(file_shape[file_axis])
        spacing_xyz[_canonical_axis(code)] = round(float(spacing_ijk[file_axis]), 7)
    return Geometry(
        shape=(shape_xyz[2], shape_xyz[1], shape_xyz[0]),
        spacing_mm=(spacing_xyz[2], spacing_xyz[1], spacing_xyz[0]),
        affine=tuple(tuple(row) for row in affine.tolist()),
        file_axcodes=axcodes,
    )


def _nearest_axcodes(affine: NDArray) -> tuple[str, str, str]:
    """Letters of the directions that the file's axes come closest to, each anatomical axis used once."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    # The nearest rotation settles oblique cases in which two file axes lean towards the same anatomical axis.
    left, _, right = np.linalg.svd(directions)
    rotation = left @ right
    codes = ["", "", ""]
    remaining = np.abs(rotation)
    for _ in range(3):
        world, file_axis = np.unravel_index(int(np.argmax(remaining)), remaining.shape)
        codes[file_axis] = _CANONICAL_AXES[world][0 if rotation[world, file_axis] > 0 else 1]
        remaining[world, :] = -1
        remaining[:, file_axis] = -1
    return (codes[0], codes[1], codes[2])


def _canonical_axis(code: str) -> int:
    return next(axis for axis, letters in enumerate(_CANONICAL_AXES) if code in letters)


def _is_reversed(code: str) -> bool:
    return code in "LPI"


def to_canonical(array: NDArray, file_axcodes: Sequence[str]) -> NDArray:
    """From the file's order (..., i, j, k) to canonical (..., Z, Y, X); a view."""
    lead = array.ndim - 3
    flips = tuple(slice(None, None, -1) if _is_reversed(code) else slice(None) for code in file_axcodes)
    file_axis_of = {_canonical_axis(code): axis for axis, code in enumerate(file_axcodes)}
    order = [lead + file_axis_of[axis] for axis in (2, 1, 0)]
    return array[(..., *flips)].transpose(*range(lead), *order)


def from_canonical(array: NDArray, file_axcodes: Sequence[str]) -> NDArray:
    """From canonical (..., Z, Y, X) to the file's order (..., i, j, k); a view. The inverse of `to_canonical`."""
    lead = array.ndim - 3
    order = [lead + 2 - _canonical_axis(code) for code in file_axcodes]
    flips = tuple(slice(None, None, -1) if _is_reversed(code) else slice(None) for code in file_axcodes)
    return array.transpose(*range(lead), *order)[(..., *flips)]


def corner_distance_voxels(first: Geometry, second: Geometry) -> float:
    """How far two grids of equal canonical shape lie apart: the largest distance of corresponding corners.

    Returns:
        In units of the first grid's smallest voxel edge.
    """
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in first.shape[::-1]], [1.0], indexing="ij")).reshape(4, -1)
    difference = (first.canonical_affine - second.canonical_affine) @ corners
    return float(np.linalg.norm(difference[:3], axis=0).max()) / min(first.spacing_mm)


@dataclass(frozen=True, kw_only=True)
class Box:
    """A box of voxels, (Z, Y, X): `start` is inside, `stop` is the first voxel outside."""

    start: Shape3
    stop: Shape3

    @property
    def shape(self) -> Shape3:
        """Size in voxels."""
        return (self.stop[0] - self.start[0], self.stop[1] - self.start[1], self.stop[2] - self.start[2])

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """For indexing the last three axes of an array, after an Ellipsis."""
        z, y, x = (slice(start, stop) for start, stop in zip(self.start, self.stop, strict=True))
        return (z, y, x)


def bounding_box(mask: NDArray[np.bool_]) -> Box:
    """The smallest box around the True voxels of a (Z, Y, X) mask; the whole volume if there is none."""
    bounds = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        inside = np.flatnonzero(mask.any(axis=others))
        bounds.append((int(inside[0]), int(inside[-1]) + 1) if inside.size else (0, mask.shape[axis]))
    (z0, z1), (y0, y1), (x0, x1) = bounds
    return Box(start=(z0, y0, x0), stop=(z1, y1, x1))


def resampled_shape(shape: Sequence[int], spacing_mm: Sequence[float], target_mm: Sequence[float]) -> tuple[int, ...]:
    """Voxels per axis after resampling, at least 1, all arguments in the same axis order."""
    ratios = zip(shape, spacing_mm, target_mm, strict=True)
    return tuple(max(1, round(size * source / target)) for size, source, target in ratios)


def permute3(values: Sequence, axis_order: Sequence[int]) -> tuple:
    """Per-axis values in the order of the network's axes."""
    return tuple(values[axis] for axis in axis_order)


def join_numbers(values: Iterable[float]) -> str:
    """A shape or a spacing for people: "40 x 0.8 x 0.8"."""
    return " x ".join(f"{value:.6g}" if float(value).is_integer() else f"{value:.4g}" for value in values)


def grid_difference(first: Geometry, second: Geometry) -> tuple[str, str] | None:
    """What is found in the second and expected from the first grid; None where they are equal up to rounding."""
    if first.shape != second.shape:
        return f"the shape {second.shape} (z, y, x)", f"{first.shape} as in the image"
    distance = corner_distance_voxels(first, second)
    if distance > MAX_GRID_DISTANCE_VOXELS:
        return f"an affine that puts a corner {distance:.2f} voxels from where the image has it", "the image's affine"
    return None


def inverse_order(axis_order: Sequence[int]) -> tuple[int, ...]:
    """The order that undoes `axis_order`."""
    return tuple(int(axis) for axis in np.argsort(axis_order))


def is_anisotropic(spacing_mm: Sequence[float]) -> bool:
    """Whether the coarsest axis has more than `ANISOTROPY_THRESHOLD` times the spacing of the finest."""
    return max(spacing_mm) / min(spacing_mm) > ANISOTROPY_THRESHOLD


def find_lowres_axis(spacing_mm: Sequence[float]) -> int | None:
    """The one coarsest axis of an anisotropic spacing; None where there is no such axis, or more than one."""
    coarsest = [axis for axis, value in enumerate(spacing_mm) if value == max(spacing_mm)]
    return coarsest[0] if is_anisotropic(spacing_mm) and len(coarsest) == 1 else None


def axis_first(axis: int) -> tuple[int, int, int]:
    """The order of three axes that puts one first and leaves the others as they follow one another."""
    first, second = (other for other in range(3) if other != axis)
    return axis, first, second


def joint_box(boxes: Iterable[tuple[slice, ...]]) -> tuple[slice, ...]:
    """The smallest box around all; of none it has no axes."""
    axes = zip(*boxes, strict=True)
    return tuple(slice(min(part.start for part in axis), max(part.stop for part in axis)) for axis in axes)


def label_components(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], int]:
    """Numbers the components whose voxels touch at a face, edge or corner.

    Args:
        mask: (Z, Y, X), or any other number of axes.

    Returns:
        The same shape, 0 outside the mask and 1 to n inside; and n.
    """
    from scipy import ndimage

    components, n_components = ndimage.label(mask, np.ones((3,) * mask.ndim))
    return components, int(n_components)

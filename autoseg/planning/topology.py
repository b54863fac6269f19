"""Where a U-Net halves its input, and with which kernels: a pure function of the spacing and the patch."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

MIN_BOTTLENECK_SIZE = 4
"""No axis is halved to fewer voxels than this."""

MIN_SIZE_TO_HALVE = 2 * MIN_BOTTLENECK_SIZE
MIN_SIZE_TO_HALVE_ALONE = 3 * MIN_BOTTLENECK_SIZE
"""A stage that halves one single axis must leave this axis more than the minimum, or it is not worth its memory."""

MAX_SPACING_RATIO = 2.0
"""Axes whose spacings differ by less than this factor count as equally fine."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Strides and kernels of a U-Net, stage by stage from the input to the bottleneck.

    Attributes:
        strides: down-sampling at the entrance of each stage; the first is all ones.
        kernel_sizes: convolution kernel of each stage.
        patch_size: in voxels, divisible by the product of the strides.
    """

    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    patch_size: tuple[int, ...]

    @property
    def n_stages(self) -> int:
        """Resolutions of the network, the bottleneck included."""
        return len(self.strides)

    @property
    def divisor(self) -> tuple[int, ...]:
        """What a patch must be divisible by, per axis."""
        return tuple(prod(stage[axis] for stage in self.strides) for axis in range(len(self.patch_size)))


def plan_topology(spacing_mm: tuple[float, ...], size: tuple[float, ...]) -> Topology:
    """Halves the axes in turn, finest first, until none can be halved, and pads the patch to fit.

    Coarse axes wait until the fine ones have caught up, so that features become about cubic in millimetres; until then
    a kernel is 1 along a coarse axis, because a neighbour there is too far away to be compared with those in-plane.

    A U-Net needs at least two stages. A patch that is too small to be halved at all is enlarged along its finest axes
    until it can be.

    Args:
        spacing_mm: of the network's grid, 2 or 3 axes.
        size: wanted patch in voxels, same axes, at least 1. May be fractional, where it is the median of an even number
            of cases.

    Returns:
        The topology, and the patch rounded up to what its strides need.
    """
    strides, kernel_sizes = _halve(spacing_mm, size)
    if len(strides) == 1:
        size = enlarge_to_halve_once(spacing_mm, size)
        strides, kernel_sizes = _halve(spacing_mm, size)
    divisor = [prod(stage[axis] for stage in strides) for axis in range(len(size))]
    patch = tuple(ceil(edge / d) * d for edge, d in zip(size, divisor, strict=True))
    return Topology(strides=strides, kernel_sizes=kernel_sizes, patch_size=patch)


def axes_to_halve(spacing_mm: tuple[float, ...], size: tuple[float, ...]) -> tuple[int, ...]:
    """The axes that the next stage halves.

    Args:
        spacing_mm: of the current stage.
        size: in voxels, of the current stage.

    Returns:
        Indices of the axes that are large enough and among those less than twice as coarse as the finest; none where
        the network ends.
    """
    large = [axis for axis, edge in enumerate(size) if edge >= MIN_SIZE_TO_HALVE]
    if not large:
        return ()
    finest = min(spacing_mm[axis] for axis in large)
    fine = tuple(axis for axis in large if spacing_mm[axis] / finest < MAX_SPACING_RATIO)
    if len(fine) == 1 and size[fine[0]] < MIN_SIZE_TO_HALVE_ALONE:
        return ()
    return fine


def enlarge_to_halve_once(spacing_mm: tuple[float, ...], size: tuple[float, ...]) -> tuple[float, ...]:
    """The smallest enlargement along the finest axes that lets them be halved once.

    Args:
        spacing_mm: of the network's grid.
        size: a patch of which no axis can be halved, in voxels.

    Returns:
        The enlarged patch.
    """
    finest = min(spacing_mm)
    fine = [axis for axis, edge_mm in enumerate(spacing_mm) if edge_mm / finest < MAX_SPACING_RATIO]
    needed = MIN_SIZE_TO_HALVE if len(fine) > 1 else MIN_SIZE_TO_HALVE_ALONE
    return tuple(max(edge, needed) if axis in fine else edge for axis, edge in enumerate(size))


def _halve(
    spacing_mm: tuple[float, ...], size: tuple[float, ...]
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Strides and kernel sizes of every stage."""
    n_axes = len(size)
    kernel = [1] * n_axes
    strides: list[tuple[int, ...]] = [(1,) * n_axes]
    kernel_sizes: list[tuple[int, ...]] = []
    while halved := axes_to_halve(spacing_mm, size):
        finest = min(spacing_mm)
        # Once 3, always 3: what was comparable at one resolution stays worth looking at below.
        kernel = [3 if k == 3 or s / finest < MAX_SPACING_RATIO else 1 for k, s in zip(kernel, spacing_mm, strict=True)]
        kernel_sizes.append(tuple(kernel))
        strides.append(tuple(2 if axis in halved else 1 for axis in range(n_axes)))
        spacing_mm = tuple(s * stride for s, stride in zip(spacing_mm, strides[-1], strict=True))
        size = tuple(ceil(edge / stride) for edge, stride in zip(size, strides[-1], strict=True))
    kernel_sizes.append((3,) * n_axes)
    return tuple(strides), tuple(kernel_sizes)

"""The patch and its network: the largest that trains within the memory, or the one that the user wants."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

from autoseg.core.errors import PlanError
from autoseg.core.geometry import join_numbers
from autoseg.planning.memory import count_feature_map_values
from autoseg.planning.plan import NetworkPlan
from autoseg.planning.presets import Preset
from autoseg.planning.topology import MIN_SIZE_TO_HALVE_ALONE, Topology, plan_topology

INITIAL_PATCH_VOXELS = {2: 2048**2, 3: 256**3}
"""By number of axes; more than the budgets allow, so that only the budget and the images limit the patch."""


@dataclass(frozen=True, kw_only=True)
class FittedPatch:
    """The largest patch whose training fits the memory, and its network.

    Attributes:
        patch_size: in voxels.
        network: the network.
        initial_patch_size: the patch that was wished for, padded for its network.
        n_shrinks: how many times an axis of it was shortened.
        values: feature-map values of one patch.
    """

    patch_size: tuple[int, ...]
    network: NetworkPlan
    initial_patch_size: tuple[int, ...]
    n_shrinks: int
    values: int


def fit_patch(
    spacing_mm: tuple[float, ...], median_shape: tuple[float, ...], n_outputs: int, preset: Preset
) -> FittedPatch:
    """The largest patch that trains within the preset's memory, in about the proportions of the median case.

    Starts from a patch that is a cube in millimetres, no larger than the median case, and shortens the axis that is
    longest against the median case until the preset's smallest batch fits.

    Args:
        spacing_mm: of the grid, 2 or 3 axes.
        median_shape: of the cases on the grid, in voxels.
        n_outputs: channels of the output: the classes with the background, or the regions.
        preset: the kind of network and its memory.

    Returns:
        The patch and its network.

    Raises:
        PlanError: not even the smallest patch fits.
    """
    wanted = tuple(
        min(float(edge), size) for edge, size in zip(initial_patch_size(spacing_mm), median_shape, strict=True)
    )
    budget = preset.budgets[len(spacing_mm)]
    topology = plan_topology(spacing_mm, wanted)
    initial, seen = topology.patch_size, {topology.patch_size}
    while True:
        network = preset.network(topology)
        values = count_feature_map_values(network, topology.patch_size, n_outputs)
        if values <= budget.max_values_per_patch:
            break
        smaller = _shorten(topology, spacing_mm, median_shape, seen)
        if smaller is None:
            needed_gib = preset.needed_memory_gib(values, batch_size=budget.min_batch_size, n_axes=len(spacing_mm))
            raise PlanError(
                f"even the smallest patch, {join_numbers(topology.patch_size)}, needs about {needed_gib:.2g} GiB at "
                f"batch size {budget.min_batch_size}, the plan is for {preset.memory_gib:g} GiB; use --gpu-memory "
                f"{_round_up(needed_gib):g} or more"
            )
        topology = smaller
        seen.add(topology.patch_size)
    return FittedPatch(
        patch_size=topology.patch_size,
        network=network,
        initial_patch_size=initial,
        n_shrinks=len(seen) - 1,
        values=values,
    )


def adopt_patch(
    name: str,
    patch_size: tuple[int, ...],
    spacing_mm: tuple[float, ...],
    largest_shape: tuple[float, ...],
    n_outputs: int,
    preset: Preset,
    *,
    batch_size: int,
) -> FittedPatch:
    """The patch that the user wants, with the network that suits it.

    Args:
        name: of the configuration, for messages.
        patch_size: in voxels, 2 or 3 axes.
        spacing_mm: of the grid.
        largest_shape: of the cases on the grid, in voxels.
        n_outputs: channels of the output: the classes with the background, or the regions.
        preset: the kind of network and its memory.
        batch_size: that must fit with it.

    Returns:
        The patch and its network.

    Raises:
        PlanError: larger than any case, not divisible by the network's strides, or too large for the memory; with the
            nearest patch that is valid.
    """
    topology = plan_topology(spacing_mm, patch_size)
    limit = limit_patch(spacing_mm, largest_shape)
    network = preset.network(topology)
    values = count_feature_map_values(network, topology.patch_size, n_outputs)
    needed_gib = preset.needed_memory_gib(values, batch_size=batch_size, n_axes=len(patch_size))
    if any(size > most for size, most in zip(patch_size, limit, strict=True)):
        trouble = (
            f"is larger than the largest case, {join_numbers(largest_shape)}, padded to the strides, "
            f"{join_numbers(limit)}"
        )
    elif topology.patch_size != patch_size:
        trouble = f"is not divisible by the network's strides, {join_numbers(topology.divisor)}"
    elif needed_gib > preset.memory_gib:
        trouble = (
            f"needs about {needed_gib:.3g} GiB at batch size {batch_size}, the plan is for {preset.memory_gib:g} GiB "
            f"(--gpu-memory {_round_up(needed_gib):g} would do)"
        )
    else:
        return FittedPatch(
            patch_size=patch_size, network=network, initial_patch_size=patch_size, n_shrinks=0, values=values
        )
    nearest = find_nearest_patch(patch_size, spacing_mm, limit, n_outputs, preset, batch_size=batch_size)
    advice = (
        f"the nearest valid one is {','.join(map(str, nearest))}" if nearest else "no patch fits with this batch size"
    )
    raise PlanError(f"{name}: patch_size {join_numbers(patch_size)} {trouble}; {advice}")


def limit_patch(
    spacing_mm: tuple[float, ...], largest_shape: tuple[float, ...], divisor: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """The largest patch that makes sense: beyond it there is nothing but padding, whatever the case.

    Args:
        spacing_mm: of the grid.
        largest_shape: of the cases on the grid, in voxels.
        divisor: what the patch must be divisible by, where its network is given.

    Returns:
        Voxels per axis.
    """
    padded = plan_topology(spacing_mm, largest_shape).patch_size
    own = (ceil(size / step) * step for size, step in zip(largest_shape, divisor or (1,) * len(padded), strict=True))
    return tuple(max(a, b, MIN_SIZE_TO_HALVE_ALONE) for a, b in zip(padded, own, strict=True))


def find_nearest_patch(
    wanted: tuple[int, ...],
    spacing_mm: tuple[float, ...],
    limit: tuple[int, ...],
    n_outputs: int,
    preset: Preset,
    *,
    batch_size: int,
) -> tuple[int, ...] | None:
    """The valid patch that is closest to a wanted one, see `adopt_patch`.

    Args:
        wanted: in voxels.
        spacing_mm: of the grid.
        limit: the largest patch that makes sense.
        n_outputs: channels of the output: the classes with the background, or the regions.
        preset: the kind of network and its memory.
        batch_size: that must fit with it.

    Returns:
        The patch; None where none fits.
    """
    size = tuple(min(edge, most) for edge, most in zip(wanted, limit, strict=True))
    divisor = plan_topology(spacing_mm, size).divisor
    rounded = tuple(max(round(edge / step), 1) * step for edge, step in zip(size, divisor, strict=True))
    topology = plan_topology(spacing_mm, rounded)
    if topology.patch_size != rounded:
        topology = plan_topology(spacing_mm, size)
    seen: set[tuple[int, ...]] = set()
    while True:
        patch = topology.patch_size
        seen.add(patch)
        # Padding can make an axis long enough to be halved once more, and then asks for more padding.
        settled = plan_topology(spacing_mm, patch).patch_size == patch
        values = count_feature_map_values(preset.network(topology), patch, n_outputs)
        needed_gib = preset.needed_memory_gib(values, batch_size=batch_size, n_axes=len(size))
        if settled and needed_gib <= preset.memory_gib and all(e <= m for e, m in zip(patch, limit, strict=True)):
            return patch
        smaller = _shorten(topology, spacing_mm, wanted, seen)
        if smaller is None:
            return None
        topology = smaller


def initial_patch_size(spacing_mm: tuple[float, ...]) -> tuple[int, ...]:
    """A cube (a square) in millimetres that has `INITIAL_PATCH_VOXELS` voxels.

    Args:
        spacing_mm: 2 or 3 axes.

    Returns:
        Its size in voxels.
    """
    n_axes = len(spacing_mm)
    edge_mm = (INITIAL_PATCH_VOXELS[n_axes] * prod(spacing_mm)) ** (1 / n_axes)
    return tuple(max(round(edge_mm / axis_mm), 1) for axis_mm in spacing_mm)


def _shorten(
    topology: Topology, spacing_mm: tuple[float, ...], median_shape: tuple[float, ...], seen: set[tuple[int, ...]]
) -> Topology | None:
    """The next smaller patch; None where no axis can be shortened without coming back to a patch in `seen`."""
    patch = topology.patch_size
    # Of equal axes the last one: any choice does, this one gives the patches that the field knows.
    by_coverage = sorted(range(len(patch)), key=lambda axis: (patch[axis] / median_shape[axis], axis), reverse=True)
    for axis in by_coverage:
        step = topology.divisor[axis]
        if patch[axis] <= step:
            continue
        shorter = plan_topology(spacing_mm, _subtract(patch, axis, step))
        # A shorter axis may be halved less often, and then need not be shortened by as much.
        if shorter.divisor[axis] != step:
            shorter = plan_topology(spacing_mm, _subtract(patch, axis, shorter.divisor[axis]))
        if shorter.patch_size not in seen:
            return shorter
    return None


def _subtract(patch: tuple[int, ...], axis: int, step: int) -> tuple[int, ...]:
    return (*patch[:axis], patch[axis] - step, *patch[axis + 1 :])


def _round_up(value: float) -> float:
    """To two digits, upwards: a value to type that is enough."""
    step = 10.0 ** (len(str(int(value))) - 2)
    return ceil(value / step) * step

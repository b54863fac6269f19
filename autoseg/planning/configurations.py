"""Configurations: patch, batch and network for a grid, within a memory budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from autoseg.core.geometry import find_lowres_axis
from autoseg.planning.grid import Grid
from autoseg.planning.memory import count_feature_map_values
from autoseg.planning.plan import ConfigurationPlan, NetworkPlan, Reason
from autoseg.planning.presets import Preset
from autoseg.planning.topology import MIN_BOTTLENECK_SIZE, Topology, plan_topology

INITIAL_PATCH_VOXELS = {2: 2048**2, 3: 256**3}
"""By number of axes; more than the budgets allow, so that only the budget and the images limit the patch."""

MIN_BATCH_SIZE = 2
LOWRES_COVERAGE = 0.25
"""Where a patch covers less of the median case than this, a configuration of lower resolution sees more context."""

LOWRES_SPACING_STEP = 1.03
LOWRES_MIN_REDUCTION = 2.0
"""A low resolution that has more than half the voxels of the full one is not worth its training."""


@dataclass(frozen=True, kw_only=True)
class FittedPatch:
    """The largest patch whose training fits the memory, and its network.

    Attributes:
        patch_size: in voxels.
        network: the network.
        initial_patch_size: the patch that was wished for, padded for its network.
        n_shrinks: how many times an axis of it was shortened.
        values: feature-map values of one patch.
        fits: False where even the smallest patch is over the budget.
    """

    patch_size: tuple[int, ...]
    network: NetworkPlan
    initial_patch_size: tuple[int, ...]
    n_shrinks: int
    values: int
    fits: bool


def plan_configurations(
    grid: Grid, n_classes: int, preset: Preset
) -> tuple[dict[str, ConfigurationPlan], tuple[Reason, ...]]:
    """Every configuration that makes sense on the grid: 2d, 3d_fullres, 3d_lowres and 3d_cascade_fullres.

    Args:
        grid: the grid of full resolution.
        n_classes: channels of the output, the background included.
        preset: the kind of network and its memory.

    Returns:
        The configurations by name, and the reasons for each of them.
    """
    slices = _plan_one("2d", grid.spacing_mm[1:], grid.median_shape[1:], n_classes, preset, grid.n_voxels)
    # In-plane it is always the median: only the through-plane axis can have another spacing.
    spacing_text = f"the median in-plane spacing, {_join(grid.spacing_mm[1:])} mm; slices keep their own distance"
    configurations = {"2d": slices[0]}
    reasons = [
        Reason(subject="configurations.2d.spacing_mm", text=spacing_text),
        *slices[1],
        Reason(subject="configurations.2d.batch_dice", text="on: a slice often lacks a class, a batch seldom does"),
    ]
    if not grid.has_slices:
        text = "there is no 3D configuration because the median case has a single slice along the through-plane axis"
        return configurations, (*reasons, Reason(subject="configurations", text=text))

    full, full_reasons = _plan_one("3d_fullres", grid.spacing_mm, grid.median_shape, n_classes, preset, grid.n_voxels)
    low, low_reasons = plan_low_resolution(full, grid.n_cases, n_classes, preset)
    full = replace(full, batch_dice=low is not None)
    why = (
        "on: patches are small against the cases (3d_lowres would exist), so many lack a class"
        if low
        else "off: patches are large against the cases, so Dice per patch is stable and weighs each patch equally"
    )
    configurations["3d_fullres"] = full
    reasons += [
        Reason(subject="configurations.3d_fullres.spacing_mm", text=grid.spacing_reason),
        *full_reasons,
        Reason(subject="configurations.3d_fullres.batch_dice", text=why),
    ]
    reasons += low_reasons
    if low:
        configurations["3d_lowres"] = low
        cascade = replace(full, name="3d_cascade_fullres", previous="3d_lowres")
        configurations["3d_cascade_fullres"] = cascade
        text = "refines the prediction of 3d_lowres at full resolution"
        reasons.append(Reason(subject="configurations.3d_cascade_fullres", text=text))
    return configurations, tuple(reasons)


def plan_low_resolution(
    full: ConfigurationPlan, n_cases: int, n_classes: int, preset: Preset
) -> tuple[ConfigurationPlan | None, tuple[Reason, ...]]:
    """The configuration whose grid is coarse enough for the patch to cover a quarter of the median case.

    Args:
        full: the configuration of full resolution.
        n_cases: number of cases.
        n_classes: channels of the output, the background included.
        preset: the kind of network and its memory.

    Returns:
        The configuration, or None where full resolution does without; and the reasons.
    """
    subject = "configurations.3d_lowres"
    coverage = prod(full.patch_size) / prod(full.median_shape)
    facts = f"a patch of 3d_fullres covers {coverage:.0%} of the median case"
    if coverage >= LOWRES_COVERAGE:
        text = f"none is needed: {facts}, which is at least {LOWRES_COVERAGE:.0%}"
        return None, (Reason(subject=subject, text=text),)
    spacing_mm, median_shape, patch = full.spacing_mm, full.median_shape, full.patch_size
    while prod(patch) / prod(median_shape) < LOWRES_COVERAGE:
        spacing_mm = coarsen(spacing_mm)
        median_shape = tuple(
            size * old / new for size, old, new in zip(full.median_shape, full.spacing_mm, spacing_mm, strict=True)
        )
        patch = fit_patch(spacing_mm, _round_shape(median_shape), n_classes, preset).patch_size
    reduction = prod(full.median_shape) / prod(median_shape)
    if reduction < LOWRES_MIN_REDUCTION:
        text = f"none is worth it: {facts}, but a grid with {reduction:.2f} times fewer voxels would do already"
        return None, (Reason(subject=subject, text=text),)
    low, reasons = _plan_one(
        "3d_lowres", spacing_mm, _round_shape(median_shape), n_classes, preset, prod(median_shape) * n_cases
    )
    text = (
        f"{facts}, so the spacing grew in steps of {LOWRES_SPACING_STEP - 1:.0%}, fine axes first, until a patch "
        f"covers {LOWRES_COVERAGE:.0%} at {reduction:.1f} times fewer voxels"
    )
    return low, (Reason(subject=f"{subject}.spacing_mm", text=text), *reasons)


def coarsen(spacing_mm: tuple[float, ...]) -> tuple[float, ...]:
    """The next coarser spacing: of the axes finer than half the coarsest one, or of all where there are none."""
    coarsest = max(spacing_mm)
    fine = [coarsest / edge_mm > 2 for edge_mm in spacing_mm]
    return tuple(
        edge_mm * LOWRES_SPACING_STEP if is_fine or not any(fine) else edge_mm
        for edge_mm, is_fine in zip(spacing_mm, fine, strict=True)
    )


def fit_patch(
    spacing_mm: tuple[float, ...], median_shape: tuple[float, ...], n_classes: int, preset: Preset
) -> FittedPatch:
    """The largest patch that trains within the preset's memory, in about the proportions of the median case.

    Starts from a patch that is a cube in millimetres, no larger than the median case, and shortens the axis that is
    longest against the median case until the preset's smallest batch fits.

    Args:
        spacing_mm: of the grid, 2 or 3 axes.
        median_shape: of the cases on the grid, in voxels.
        n_classes: channels of the output, the background included.
        preset: the kind of network and its memory.

    Returns:
        The patch and its network.
    """
    wanted = tuple(
        min(float(edge), size) for edge, size in zip(initial_patch_size(spacing_mm), median_shape, strict=True)
    )
    budget = preset.budgets[len(spacing_mm)]
    topology = plan_topology(spacing_mm, wanted)
    initial, seen = topology.patch_size, {topology.patch_size}
    while True:
        network = preset.network(topology)
        values = count_feature_map_values(network, topology.patch_size, n_classes)
        fits = values <= budget.max_values_per_patch
        smaller = None if fits else _shorten(topology, spacing_mm, median_shape, seen)
        if smaller is None:
            break
        topology = smaller
        seen.add(topology.patch_size)
    return FittedPatch(
        patch_size=topology.patch_size,
        network=network,
        initial_patch_size=initial,
        n_shrinks=len(seen) - 1,
        values=values,
        fits=fits,
    )


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


def _plan_one(
    name: str,
    spacing_mm: tuple[float, ...],
    median_shape: tuple[float, ...],
    n_classes: int,
    preset: Preset,
    n_voxels: float,
) -> tuple[ConfigurationPlan, tuple[Reason, ...]]:
    """Patch, batch and network of one configuration. `n_voxels` are those of the whole dataset on this grid."""
    fitted = fit_patch(spacing_mm, median_shape, n_classes, preset)
    batch_size, batch_text = _choose_batch_size(fitted, n_voxels, preset)
    configuration = ConfigurationPlan(
        name=name,
        spacing_mm=spacing_mm,
        median_shape=median_shape,
        patch_size=fitted.patch_size,
        batch_size=batch_size,
        # Slices are resampled in-plane only, so that in 2D there is no axis to treat apart.
        lowres_axis=find_lowres_axis(spacing_mm) if len(spacing_mm) == 3 else None,
        batch_dice=len(spacing_mm) == 2,
        previous=None,
        network=fitted.network,
    )
    subject = f"configurations.{name}"
    reasons = (
        Reason(subject=f"{subject}.patch_size", text=_explain_patch(fitted, median_shape, preset)),
        Reason(subject=f"{subject}.network", text=_explain_network(fitted.network, spacing_mm)),
        Reason(subject=f"{subject}.batch_size", text=batch_text),
    )
    return configuration, reasons


def _choose_batch_size(fitted: FittedPatch, n_voxels: float, preset: Preset) -> tuple[int, str]:
    """What fits the memory, at most a fraction of the dataset, at least two."""
    budget = preset.budgets[len(fitted.patch_size)]
    fitting = round(budget.values / fitted.values * budget.batch_size)
    text = (
        f"{fitting} patches of {_millions(fitted.values)} feature-map values fit {preset.memory_gib:g} GiB "
        f"(calibrated: {budget.batch_size} of {_millions(budget.values)})"
    )
    cap = round(n_voxels * preset.max_data_fraction / prod(fitted.patch_size))
    if cap < fitting:
        text += f", but {cap} would cover {preset.max_data_fraction:.0%} of all voxels already"
    if min(fitting, cap) < MIN_BATCH_SIZE:
        text += f"; {MIN_BATCH_SIZE} is the least that is trained with"
    return max(min(fitting, cap), MIN_BATCH_SIZE), text


def _explain_patch(fitted: FittedPatch, median_shape: Sequence[float], preset: Preset) -> str:
    budget = preset.budgets[len(median_shape)]
    cube = "cube" if len(median_shape) == 3 else "square"
    text = (
        f"a {cube} in millimetres, cut to the median case of {_join(median_shape)} and padded to the strides, "
        f"is {_join(fitted.initial_patch_size)}"
    )
    if fitted.n_shrinks:
        times = "once" if fitted.n_shrinks == 1 else f"{fitted.n_shrinks} times"
        text += f"; shortened {times}, along the axis that is longest against the median case"
    fate = "is within" if fitted.fits else "cannot be shortened further and exceeds"
    return (
        f"{text}; with {_millions(fitted.values)} feature-map values it {fate} the "
        f"{_millions(budget.max_values_per_patch)} that {preset.memory_gib:g} GiB hold at batch size "
        f"{budget.min_batch_size}"
    )


def _explain_network(network: NetworkPlan, spacing_mm: Sequence[float]) -> str:
    text = (
        f"{len(network.features)} stages shrink the patch by {_join(network.divisor)}, finest axes first, as long as "
        f"{MIN_BOTTLENECK_SIZE} voxels remain along each axis that is halved"
    )
    for axis, spacing in enumerate(spacing_mm):
        n_thin = sum(kernel[axis] == 1 for kernel in network.kernel_sizes)
        if n_thin:
            text += (
                f"; kernels are 1 along axis {axis} until stage {n_thin}, because its {spacing:.4g} mm are "
                f"{spacing / min(spacing_mm):.3g} times the finest spacing"
            )
    return text


def _round_shape(shape: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(max(round(size), 1)) for size in shape)


def _millions(values: float) -> str:
    return f"{values / 1e6:.4g} million"


def _join(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)

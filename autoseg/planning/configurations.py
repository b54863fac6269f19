"""Configurations: patch, batch and network for a grid, within a memory budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil, inf, prod
from statistics import median

from autoseg.core.errors import PlanError
from autoseg.core.geometry import find_lowres_axis, join_numbers
from autoseg.planning.choices import Choices
from autoseg.planning.fingerprint import Fingerprint
from autoseg.planning.grid import Grid
from autoseg.planning.memory import count_feature_map_values
from autoseg.planning.patch import FittedPatch, adopt_patch, fit_patch
from autoseg.planning.plan import SET_BY_USER, ConfigurationPlan, NetworkPlan, Plan, Reason
from autoseg.planning.presets import MIN_BATCH_SIZE, Preset, find_preset
from autoseg.planning.topology import MIN_BOTTLENECK_SIZE

LOWRES_COVERAGE = 0.25
"""Where a patch covers less of the median case than this, a configuration of lower resolution sees more context."""

LOWRES_SPACING_STEP = 1.03
LOWRES_MIN_REDUCTION = 2.0
"""A low resolution that has more than half the voxels of the full one is not worth its training."""

QUICK_BELOW_COVERAGE, QUICK_COVERAGE = 0.05, 0.1
"""Where a patch for which there is time shows less of the median case than the first, a grid on which it shows the
second is better; see `shown_part`."""

QUICK_NAMES = {2: "2d_quick", 3: "3d_quick"}
"""Of configurations for short trainings, by their number of axes."""

MIN_QUICK_VOXELS = 100
"""That the smallest label has in the median case, on the grid for short trainings."""

MIN_CASES_OF_LABEL = 5
"""Labels that fewer cases have, and fewer than a tenth of all, do not decide which grid the others are learned on."""

MIN_QUICK_COMPONENT_VOXELS = 25
"""Likewise, that a typical one of the connected components of each label has, such as a lesion of many."""


def plan_configurations(
    grid: Grid, n_outputs: int, preset: Preset, choices: Choices | None = None
) -> tuple[dict[str, ConfigurationPlan], tuple[Reason, ...]]:
    """Every configuration that makes sense on the grid: 2d, 3d_fullres, 3d_lowres and 3d_cascade_fullres.

    Args:
        grid: the grid of full resolution.
        n_outputs: channels of the output: the classes with the background, or the regions.
        preset: the kind of network and its memory.
        choices: patches and batches that the user has set.

    Returns:
        The configurations by name, and the reasons for each of them.

    Raises:
        PlanError: what the user has set is not valid, or nothing fits the memory.
    """
    planner = _Planner(n_outputs, preset, grid.n_cases, choices or Choices())
    # In-plane it is always the median: only the through-plane axis can have another spacing.
    spacing_text = (
        f"the median in-plane spacing, {join_numbers(grid.spacing_mm[1:])} mm; slices keep their own distance"
    )
    if grid.is_set_by_user:
        spacing_text = f"{SET_BY_USER}: {join_numbers(grid.spacing_mm[1:])} mm; slices keep their own distance"
    flat, reasons = planner.plan(
        "2d", grid.spacing_mm[1:], grid.median_shape[1:], grid.largest_shape[1:], n_voxels=grid.n_voxels
    )
    configurations = {"2d": flat}
    reasons = [
        Reason(subject="configurations.2d.spacing_mm", text=spacing_text),
        *reasons,
        Reason(subject="configurations.2d.batch_dice", text="on: a slice often lacks a class, a batch seldom does"),
    ]
    if planner.choices.configurations == ("2d",):
        return configurations, tuple(reasons)
    if not grid.has_slices:
        text = "there is no 3D configuration because the median case has a single slice along the through-plane axis"
        return configurations, (*reasons, Reason(subject="configurations", text=text))

    full, full_reasons = planner.plan(
        "3d_fullres", grid.spacing_mm, grid.median_shape, grid.largest_shape, n_voxels=grid.n_voxels
    )
    low, low_reasons = planner.plan_low_resolution(full)
    full = replace(full, batch_dice=low is not None)
    why = (
        "on: patches are small against the cases (there is a 3d_lowres), so many lack a class"
        if low
        else "off: patches are large against the cases, so Dice per patch is stable and weighs each patch equally"
    )
    configurations["3d_fullres"] = full
    reasons += [
        Reason(subject="configurations.3d_fullres.spacing_mm", text=grid.spacing_reason),
        *full_reasons,
        Reason(subject="configurations.3d_fullres.batch_dice", text=why),
        *low_reasons,
    ]
    if low:
        configurations["3d_lowres"] = low
        cascade, cascade_reasons = planner.plan_cascade(full, low)
        configurations[cascade.name] = cascade
        reasons += cascade_reasons
    return configurations, tuple(reasons)


def force_cascade(plan: Plan, *, n_cases: int) -> tuple[dict[str, ConfigurationPlan], tuple[Reason, ...]]:
    """Both stages of a cascade for a plan that has none.

    Args:
        plan: with a 3d_fullres.
        n_cases: of the dataset.

    Returns:
        The first and the second stage by name, and the reasons.

    Raises:
        PlanError: there is no 3d_fullres, or no batch of the patch fits the memory.
    """
    if "3d_fullres" not in plan.configurations:
        raise PlanError(f"the plan has {', '.join(plan.configurations)}; a cascade needs 3d_fullres, which it refines")
    full = plan.configuration("3d_fullres")
    planner = _Planner(plan.labels.n_outputs, find_preset(plan.preset, plan.gpu_memory_gib), n_cases, Choices())
    low, low_reasons = planner.plan_low_resolution(full, force=True)
    assert low is not None
    cascade, reasons = planner.plan_cascade(full, low)
    return {low.name: low, cascade.name: cascade}, (*low_reasons, *reasons)


def plan_quick(
    plan: Plan, configuration: ConfigurationPlan, *, patch_size: Sequence[int], fingerprint: Fingerprint
) -> tuple[ConfigurationPlan, tuple[Reason, ...]] | None:
    """A configuration on a coarser grid, where a patch for which there is time shows enough of a case.

    In a few minutes, many structures are found better from coarse voxels that show where in the body they are than from
    a hundredth of a case at full resolution.

    Args:
        plan: of the dataset.
        configuration: of the plan, without a first stage.
        patch_size: the largest on its grid that there is time for.
        fingerprint: of the dataset: its smallest structures keep some voxels, see `largest_voxel_ml`.

    Returns:
        It, named as in `QUICK_NAMES`, and the reasons; None where the grid can't be made much coarser.
    """
    name = QUICK_NAMES[configuration.n_axes]
    most_ml = largest_voxel_ml(fingerprint)
    spacing_mm, median_shape = configuration.spacing_mm, configuration.median_shape
    # Slices of a 2D configuration keep their distance.
    slice_mm = median(case.spacing_mm[plan.axis_order[0]] for case in fingerprint.cases)
    kept_mm = slice_mm if configuration.n_axes == 2 else 1.0
    finest_mm = min(spacing_mm)
    while shown_part(patch_size, median_shape) < QUICK_COVERAGE:
        finest_mm *= LOWRES_SPACING_STEP
        coarser_mm = tuple(max(edge_mm, finest_mm) for edge_mm in configuration.spacing_mm)
        if prod(coarser_mm) * kept_mm / 1000 > most_ml:
            break
        spacing_mm = coarser_mm
        median_shape = _rescale(configuration.median_shape, configuration.spacing_mm, spacing_mm)
    reduction = prod(configuration.median_shape) / prod(median_shape)
    if reduction < LOWRES_MIN_REDUCTION:
        return None
    n_cases = len(fingerprint.cases)
    n_slices = sum(case.cropped_shape[plan.axis_order[0]] for case in fingerprint.cases)
    planner = _Planner(plan.labels.n_outputs, find_preset(plan.preset, plan.gpu_memory_gib), n_cases, Choices())
    quick, reasons = planner.plan(
        name,
        spacing_mm,
        _round_shape(median_shape),
        _round_shape(_rescale(configuration.largest_shape, configuration.spacing_mm, spacing_mm)),
        n_voxels=prod(median_shape) * (n_slices if configuration.n_axes == 2 else n_cases),
    )
    quick = replace(quick, smoothed=True)
    text = (
        f"in {configuration.name} there is time for patches of {join_numbers(patch_size)}, "
        f"{prod(patch_size) / prod(configuration.median_shape):.1%} of the median case; so the spacing grew, fine axes "
        f"first, to {join_numbers(round(edge_mm, 3) for edge_mm in spacing_mm)} mm, where as many voxels are "
        f"{prod(patch_size) / prod(median_shape):.0%}; images are smoothed before, so that voxels are means"
    )
    told = {f"configurations.{name}.spacing_mm": text, **{reason.subject: reason.text for reason in reasons}}
    if plan.is_set_by_user(configuration.name, "batch_size") and configuration.batch_size < quick.batch_size:
        quick = replace(quick, batch_size=configuration.batch_size)
        told[f"configurations.{name}.batch_size"] = f"{SET_BY_USER} for {configuration.name}: {quick.batch_size}"
    return quick, tuple(Reason(subject=subject, text=text) for subject, text in told.items())


def shown_part(patch_size: Sequence[int], median_shape: Sequence[float]) -> float:
    """The part of the median case that a patch shows; what it has beyond a case shows nothing.

    In 2D it is as if a case had as many voxels in depth as along its other edges: a twentieth of a volume is a third of
    each edge, a twentieth of a slice less than a quarter.
    """
    part = prod(min(1.0, edge / size) for edge, size in zip(patch_size, median_shape, strict=True))
    return part ** (3 / len(patch_size))


def largest_voxel_ml(fingerprint: Fingerprint) -> float:
    """The largest voxel with which the smallest label, and the smallest lesions of one, keep enough of them.

    Returns:
        Its volume; infinite where nothing is known of what is labelled.
    """
    label_ml = _smallest_of_median_case([case.label_volumes_ml for case in fingerprint.cases])
    component_ml = _smallest_of_median_case([case.component_volumes_ml for case in fingerprint.cases])
    return min(label_ml / MIN_QUICK_VOXELS, component_ml / MIN_QUICK_COMPONENT_VOXELS)


def _smallest_of_median_case(volumes_ml: Sequence[tuple[float, ...]]) -> float:
    """Of the volumes of all labels but rare ones, case by case, the smallest, each in the median case that has it."""
    by_label = zip(*(volumes for volumes in volumes_ml if volumes), strict=True)
    present = [[volume for volume in volumes if volume > 0] for volumes in by_label]
    least = min(MIN_CASES_OF_LABEL, ceil(len(volumes_ml) / 10))
    common = [volumes for volumes in present if len(volumes) >= least] or [volumes for volumes in present if volumes]
    return min((median(volumes) for volumes in common), default=inf)


class _Planner:
    """Plans configurations of one dataset, one preset and one user."""

    def __init__(self, n_outputs: int, preset: Preset, n_cases: int, choices: Choices) -> None:
        self.n_outputs, self.preset, self.n_cases, self.choices = n_outputs, preset, n_cases, choices

    def plan(
        self,
        name: str,
        spacing_mm: tuple[float, ...],
        median_shape: tuple[float, ...],
        largest_shape: tuple[float, ...],
        *,
        n_voxels: float,
    ) -> tuple[ConfigurationPlan, list[Reason]]:
        """Patch, batch and network of one configuration. `n_voxels` are those of the whole dataset on this grid."""
        wanted_patch, wanted_batch = self.choices.patch_sizes.get(name), self._wanted_batch_size(name)
        if wanted_patch is None:
            fitted = fit_patch(spacing_mm, median_shape, self.n_outputs, self.preset)
            patch_text = _explain_patch(fitted, median_shape, self.preset)
        else:
            least = MIN_BATCH_SIZE if wanted_batch is None else min(wanted_batch, MIN_BATCH_SIZE)
            fitted = adopt_patch(
                name, wanted_patch, spacing_mm, largest_shape, self.n_outputs, self.preset, batch_size=least
            )
            patch_text = f"{SET_BY_USER}: {join_numbers(wanted_patch)}, {_millions(fitted.values)} feature-map values"
        batch_size, batch_text = self._choose_batch_size(name, fitted.patch_size, fitted.values, n_voxels, wanted_batch)
        configuration = ConfigurationPlan(
            name=name,
            spacing_mm=spacing_mm,
            median_shape=median_shape,
            largest_shape=largest_shape,
            patch_size=fitted.patch_size,
            batch_size=batch_size,
            # Slices are resampled in-plane only, so that in 2D there is no axis to treat apart.
            lowres_axis=find_lowres_axis(spacing_mm) if len(spacing_mm) == 3 else None,
            batch_dice=len(spacing_mm) == 2,
            previous=None,
            network=fitted.network,
        )
        subject = f"configurations.{name}"
        reasons = [
            Reason(subject=f"{subject}.patch_size", text=patch_text),
            Reason(subject=f"{subject}.network", text=_explain_network(fitted.network, spacing_mm)),
            Reason(subject=f"{subject}.batch_size", text=batch_text),
        ]
        return configuration, reasons

    def plan_low_resolution(
        self, full: ConfigurationPlan, *, force: bool = False
    ) -> tuple[ConfigurationPlan | None, list[Reason]]:
        """The configuration whose grid is coarse enough for the patch to cover a quarter of the median case.

        None where full resolution does without, unless it is forced; then it also has at most half of the voxels.
        """
        subject = "configurations.3d_lowres"
        coverage = prod(full.patch_size) / prod(full.median_shape)
        facts = f"a patch of 3d_fullres covers {coverage:.2g} of the median case's volume"
        if coverage >= LOWRES_COVERAGE and not force:
            text = f"none is needed: {facts}, which is at least {LOWRES_COVERAGE:g}"
            return None, [Reason(subject=subject, text=text)]
        spacing_mm, median_shape, patch = full.spacing_mm, full.median_shape, full.patch_size
        least = LOWRES_MIN_REDUCTION if force else 1.0
        while (
            prod(patch) / prod(median_shape) < LOWRES_COVERAGE or prod(full.median_shape) / prod(median_shape) < least
        ):
            spacing_mm = coarsen(spacing_mm)
            median_shape = _rescale(full.median_shape, full.spacing_mm, spacing_mm)
            patch = fit_patch(spacing_mm, _round_shape(median_shape), self.n_outputs, self.preset).patch_size
        reduction = prod(full.median_shape) / prod(median_shape)
        if reduction < LOWRES_MIN_REDUCTION:
            text = f"none is worth it: {facts}, but a grid with {reduction:.2f} times fewer voxels would do already"
            return None, [Reason(subject=subject, text=text)]
        low, reasons = self.plan(
            "3d_lowres",
            spacing_mm,
            _round_shape(median_shape),
            _round_shape(_rescale(full.largest_shape, full.spacing_mm, spacing_mm)),
            n_voxels=prod(median_shape) * self.n_cases,
        )
        text = (
            f"{facts}, less than {LOWRES_COVERAGE:g}, so the spacing grew in steps of {LOWRES_SPACING_STEP - 1:.0%}, "
            f"fine axes first, to {join_numbers(spacing_mm)} mm, where a patch covers that much; the median case has "
            f"{reduction:.1f} times fewer voxels there"
        )
        if coverage >= LOWRES_COVERAGE:
            text = (
                f"{SET_BY_USER}: {facts}, so that none is needed; at {join_numbers(spacing_mm)} mm the median case has "
                f"{reduction:.1f} times fewer voxels"
            )
        dice_text = "off: a patch covers a large part of a case, so Dice per patch is stable"
        return low, [
            Reason(subject=f"{subject}.spacing_mm", text=text),
            *reasons,
            Reason(subject=f"{subject}.batch_dice", text=dice_text),
        ]

    def plan_cascade(self, full: ConfigurationPlan, low: ConfigurationPlan) -> tuple[ConfigurationPlan, list[Reason]]:
        """The second stage: full resolution once more, with the prediction of the first as an extra input."""
        name = "3d_cascade_fullres"
        batch_size = self._wanted_batch_size(name) or full.batch_size
        if self.choices.patch_sizes.get(name, full.patch_size) != full.patch_size:
            raise PlanError(f"{name}: has the patch of 3d_fullres; set --patch-size 3d_fullres=... instead")
        if batch_size != full.batch_size:
            values = count_feature_map_values(full.network, full.patch_size, self.n_outputs)
            batch_size, _ = self._choose_batch_size(name, full.patch_size, values, 0, batch_size)
        cascade = replace(full, name=name, previous=low.name, batch_size=batch_size)
        refines = f"refines the prediction of {low.name}, which sees more of a case than a patch of 3d_fullres does"
        subject = f"configurations.{name}"
        reasons = [Reason(subject=subject, text=refines)]
        reasons += [
            Reason(subject=f"{subject}.{decision}", text="as in 3d_fullres")
            for decision in ("spacing_mm", "patch_size", "network", "batch_dice")
        ]
        batch_text = "as in 3d_fullres" if batch_size == full.batch_size else f"{SET_BY_USER}: {batch_size}"
        reasons.append(Reason(subject=f"{subject}.batch_size", text=batch_text))
        return cascade, reasons

    def _wanted_batch_size(self, name: str) -> int | None:
        """What the user has set; what is set for every configuration counts for those that are kept."""
        kept = self.choices.configurations
        return self.choices.batch_size_of(name) if kept is None or name in kept else self.choices.batch_sizes.get(name)

    def _choose_batch_size(
        self, name: str, patch_size: tuple[int, ...], values: int, n_voxels: float, wanted: int | None
    ) -> tuple[int, str]:
        """What fits the memory, at most a fraction of the dataset, at least two; or what the user wants."""
        budget = self.preset.budgets[len(patch_size)]
        fitting = budget.largest_batch_size(values)
        text = (
            f"{fitting} patches of {_millions(values)} feature-map values fit {self.preset.memory_gib:g} GiB "
            f"(calibrated: {budget.batch_size} of {_millions(budget.values)})"
        )
        if wanted is not None:
            if wanted > fitting:
                needed_gib = self.preset.needed_memory_gib(values, batch_size=wanted, n_axes=len(patch_size))
                raise PlanError(
                    f"{name}: batch_size {wanted} needs about {needed_gib:.3g} GiB, the plan is for "
                    f"{self.preset.memory_gib:g} GiB; the nearest valid value is {fitting}, --batch-size "
                    f"{name}={fitting}. For more, use a smaller --patch-size or more --gpu-memory"
                )
            return wanted, f"{SET_BY_USER}: {wanted}; {text}"
        cap = round(n_voxels * self.preset.max_data_fraction / prod(patch_size))
        if cap < fitting:
            covers = f"{cap} would cover" if cap else "one would cover more than"
            text += f", but {covers} {self.preset.max_data_fraction:.0%} of all voxels already"
        if min(fitting, cap) < MIN_BATCH_SIZE:
            text += f"; {MIN_BATCH_SIZE} is the least that is trained with"
        return max(min(fitting, cap), MIN_BATCH_SIZE), text


def coarsen(spacing_mm: tuple[float, ...]) -> tuple[float, ...]:
    """The next coarser spacing: of the axes finer than half the coarsest one, or of all where there are none."""
    coarsest = max(spacing_mm)
    fine = [coarsest / edge_mm > 2 for edge_mm in spacing_mm]
    return tuple(
        edge_mm * LOWRES_SPACING_STEP if is_fine or not any(fine) else edge_mm
        for edge_mm, is_fine in zip(spacing_mm, fine, strict=True)
    )


def _explain_patch(fitted: FittedPatch, median_shape: Sequence[float], preset: Preset) -> str:
    budget = preset.budgets[len(median_shape)]
    cube = "cube" if len(median_shape) == 3 else "square"
    text = (
        f"a {cube} in millimetres, cut to the median case of {join_numbers(median_shape)} and padded to the strides, "
        f"is {join_numbers(fitted.initial_patch_size)}"
    )
    if fitted.n_shrinks:
        times = "once" if fitted.n_shrinks == 1 else f"{fitted.n_shrinks} times"
        text += (
            f"; shortened {times}, along the axis that is longest against the median case, to "
            f"{join_numbers(fitted.patch_size)}"
        )
    return (
        f"{text}; with {_millions(fitted.values)} feature-map values it is within the "
        f"{_millions(budget.max_values_per_patch)} that {preset.memory_gib:g} GiB hold at batch size "
        f"{budget.min_batch_size}"
    )


def _explain_network(network: NetworkPlan, spacing_mm: Sequence[float]) -> str:
    text = (
        f"{len(network.features)} stages shrink the patch by {join_numbers(network.divisor)}, finest axes first, as "
        f"long as {MIN_BOTTLENECK_SIZE} voxels remain along each axis that is halved"
    )
    for axis, spacing in enumerate(spacing_mm):
        n_thin = sum(kernel[axis] == 1 for kernel in network.kernel_sizes)
        if n_thin:
            text += (
                f"; kernels are 1 along axis {axis} until stage {n_thin}, because its {spacing:.4g} mm are "
                f"{spacing / min(spacing_mm):.3g} times the finest spacing"
            )
    return text


def _rescale(shape: tuple[float, ...], old_mm: tuple[float, ...], new_mm: tuple[float, ...]) -> tuple[float, ...]:
    # The ratio first: where an axis keeps its spacing, it is exactly 1, and half a voxel stays half a voxel.
    return tuple(size * (old / new) for size, old, new in zip(shape, old_mm, new_mm, strict=True))


def _round_shape(shape: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(max(round(size), 1)) for size in shape)


def _millions(values: float) -> str:
    return f"{values / 1e6:.4g} million"

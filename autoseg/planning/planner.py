"""From the fingerprint of a dataset to its plan: what to train, and why."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from math import prod

from autoseg import __version__
from autoseg.core.errors import PlanError, Problem, describe_problems
from autoseg.core.labels import LabelSpec
from autoseg.core.serialize import digest
from autoseg.planning.checks import check_plan
from autoseg.planning.choices import Choices
from autoseg.planning.configurations import plan_configurations
from autoseg.planning.fingerprint import CaseFingerprint, ChannelFingerprint, Fingerprint
from autoseg.planning.grid import adopt_grid, choose_grid
from autoseg.planning.memory import count_feature_map_values
from autoseg.planning.plan import PLAN_VERSION, ChannelNormalization, ConfigurationPlan, Plan, Reason
from autoseg.planning.presets import find_preset
from autoseg.planning.topology import MIN_SIZE_TO_HALVE

SCHEME_BY_CHANNEL = {
    "ct": "ct",
    "rgb_to_0_1": "rgb_to_0_1",
    "rescale_to_0_1": "rescale_to_0_1",
    "nonorm": "none",
}
"""Normalization by the channel's name in lower case, as in the published method; all other channels are z-scored."""

MASK_BELOW_CROPPED_FRACTION = 0.75
"""Where cropping keeps less of the median case than this, z-scores are computed inside the non-zero mask."""

CASCADE_BELOW_COVERAGE = 0.05
"""Where a patch at full resolution covers less of the median case than this, the cascade is recommended."""


def make_plan(
    fingerprint: Fingerprint,
    labels: LabelSpec,
    *,
    dataset: str,
    n_folds: int,
    choices: Choices | None = None,
) -> Plan:
    """Decides everything about a dataset, each decision with its reason.

    Implements the rules of Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image
    segmentation", Nature Methods 2021, and "nnU-Net Revisited", MICCAI 2024.

    Args:
        fingerprint: what the scans are like.
        labels: the classes.
        dataset: the dataset's name.
        n_folds: folds of cross-validation.
        choices: what the user has decided; the rest is derived from it.

    Returns:
        The plan. Equal fingerprints give equal plans.

    Raises:
        PlanError: the fingerprint is empty or holds impossible numbers, or a choice is not valid.
    """
    _check(fingerprint)
    choices = choices or Choices()
    preset = find_preset(choices.preset, choices.gpu_memory_gib)
    grid = choose_grid(fingerprint.cases, spacing_mm=choices.spacing_mm)
    planned, reasons = plan_configurations(grid, labels.n_classes, preset, choices)
    kept = _keep(planned, reasons, choices)
    normalization, normalization_reasons = choose_normalization(
        fingerprint.channels, fingerprint.median_cropped_fraction
    )
    recommended, why = recommend(kept)
    dropped = planned.keys() - kept.keys()
    by_whom = "set by user" if choices.gpu_memory_gib is not None else f"what preset {preset.name} is made for"
    return Plan(
        version=PLAN_VERSION,
        dataset=dataset,
        labels=labels,
        preset=preset.name,
        gpu_memory_gib=preset.memory_gib,
        normalization=normalization,
        axis_order=grid.axis_order,
        n_folds=n_folds,
        configurations=kept,
        recommended=recommended,
        reasons=(
            Reason(subject="preset", text=_explain_preset(choices, preset.architecture)),
            Reason(subject="gpu_memory_gib", text=f"{preset.memory_gib:g} GiB, {by_whom}"),
            Reason(subject="axis_order", text=grid.axis_order_reason),
            *normalization_reasons,
            *(reason for reason in reasons if not _is_about(reason, dropped)),
            Reason(subject="recommended", text=why),
        ),
        provenance={"autoseg": __version__, "fingerprint": digest(fingerprint)},
    )


def transfer_plan(
    source: Plan, fingerprint: Fingerprint, labels: LabelSpec, *, dataset: str, n_folds: int, name: str
) -> Plan:
    """The plan of another dataset for this one: its grids, patches, batches and networks.

    Sizes of the cases and normalization are this dataset's own.

    Args:
        source: the other plan.
        fingerprint: what the scans of this dataset are like.
        labels: the classes of this dataset.
        dataset: this dataset's name.
        n_folds: folds of cross-validation.
        name: of the other plan, for the reasons.

    Returns:
        The plan.

    Raises:
        PlanError: the fingerprint holds impossible numbers, or not even one patch fits with so many classes.
    """
    _check(fingerprint)
    like = f"as in {name}"
    preset = find_preset(source.preset, source.gpu_memory_gib)
    configurations = {}
    reasons = [Reason(subject=subject, text=like) for subject in ("preset", "gpu_memory_gib", "axis_order")]
    normalization, normalization_reasons = choose_normalization(
        fingerprint.channels, fingerprint.median_cropped_fraction
    )
    reasons += normalization_reasons
    for key, configuration in source.configurations.items():
        # Where slices keep their distance, any spacing along the first axis leaves the in-plane sizes as they are.
        first, second, third = (*configuration.spacing_mm, *configuration.spacing_mm)[-3:]
        grid = adopt_grid(
            fingerprint.cases, spacing_mm=(first, second, third), axis_order=source.axis_order, reason=like
        )
        n_axes = configuration.n_axes
        values = count_feature_map_values(configuration.network, configuration.patch_size, labels.n_classes)
        fitting = preset.budgets[n_axes].largest_batch_size(values)
        batch_size = min(configuration.batch_size, max(fitting, 1))
        configurations[key] = replace(
            configuration,
            median_shape=grid.median_shape[-n_axes:],
            largest_shape=grid.largest_shape[-n_axes:],
            batch_size=batch_size,
        )
        reasons += [
            Reason(subject=f"configurations.{key}.{decision}", text=like)
            for decision in ("spacing_mm", "network", "batch_dice")
        ]
        largest = grid.largest_shape[-n_axes:]
        padded = any(size >= 2 * most for size, most in zip(configuration.patch_size, largest, strict=True))
        text = f"{like}; larger than any case here, so that much of it is padding" if padded else like
        reasons.append(Reason(subject=f"configurations.{key}.patch_size", text=text))
        fewer = f", but the {labels.n_classes} classes of this dataset leave room for {batch_size} only"
        text = like if batch_size == configuration.batch_size else like + fewer
        reasons.append(Reason(subject=f"configurations.{key}.batch_size", text=text))
    reasons.append(Reason(subject="recommended", text=like))
    made = replace(
        source,
        dataset=dataset,
        labels=labels,
        normalization=normalization,
        n_folds=n_folds,
        configurations=configurations,
        reasons=tuple(reasons),
        measurements=(),
        provenance={"autoseg": __version__, "fingerprint": digest(fingerprint), "like": name},
    )
    check_plan(made)
    return made


def _keep(
    planned: dict[str, ConfigurationPlan], reasons: Sequence[Reason], choices: Choices
) -> dict[str, ConfigurationPlan]:
    """Those of the planned configurations that the user wants, and what they build on.

    Raises:
        PlanError: a configuration that the user has named does not suit the dataset.
    """
    named = (*(choices.configurations or ()), *choices.patch_sizes)
    for name in named:
        if name not in planned:
            parts = (f"configurations.{name}", "configurations.3d_lowres", "configurations")
            why = next(reason.text for part in parts for reason in reasons if reason.subject == part)
            raise PlanError(f"{name} does not suit this dataset: {why}. It could have {', '.join(planned)}.")
    if choices.configurations is None:
        return planned
    wanted = set(choices.configurations)
    wanted |= {previous for name in wanted if (previous := planned[name].previous)}
    return {name: configuration for name, configuration in planned.items() if name in wanted}


def choose_normalization(
    channels: Sequence[ChannelFingerprint], median_cropped_fraction: float
) -> tuple[tuple[ChannelNormalization, ...], tuple[Reason, ...]]:
    """How to scale each channel, by its name.

    Args:
        channels: the channels, in order.
        median_cropped_fraction: median over cases of cropped volume / volume.

    Returns:
        One entry and one reason per channel, in order.
    """
    normalization, reasons = [], []
    for index, channel in enumerate(channels):
        scheme = SCHEME_BY_CHANNEL.get(channel.name.casefold(), "zscore")
        use_mask = scheme == "zscore" and median_cropped_fraction < MASK_BELOW_CROPPED_FRACTION
        normalization.append(
            ChannelNormalization(
                channel=channel.name,
                scheme=scheme,
                use_mask=use_mask,
                mean=channel.mean,
                std=channel.std,
                percentile_00_5=channel.percentile_00_5,
                percentile_99_5=channel.percentile_99_5,
            )
        )
        text = _explain_scheme(channel, scheme, use_mask, median_cropped_fraction)
        reasons.append(Reason(subject=f"normalization[{index}]", text=text))
    return tuple(normalization), tuple(reasons)


def recommend(configurations: dict[str, ConfigurationPlan]) -> tuple[str, str]:
    """The configuration to train where the user names none: 2D, 3D or the cascade.

    - 2D, where the median case has fewer slices than it takes to halve an axis once, or where slices lie so far apart
      that the network's kernels span them in the bottleneck only. Then 3D spends its memory on a stack whose slices it
      treats one by one, where 2D has larger patches and more of them in a batch.
    - The cascade, where a patch at full resolution covers less than a twentieth of the median case, about a third of
      each axis: then it cannot see where in the body it is, and a first look at the whole is worth a second training.
    - 3D at full resolution for all else.

    Args:
        configurations: those of the plan, at least one.

    Returns:
        Its name, and why.
    """
    if "3d_fullres" not in configurations:
        order = ("3d_cascade_fullres", "3d_lowres", "2d")
        return next(name for name in order if name in configurations), "the plan has no 3d_fullres"
    full = configurations["3d_fullres"]
    n_slices = full.median_shape[0]
    n_spanning = sum(kernel[0] > 1 for kernel in full.network.kernel_sizes)
    facts = (
        f"the median case has {n_slices:g} slices, and the kernels of {n_spanning} of {len(full.network.features)} "
        "stages of 3d_fullres span slices"
    )
    needed = f"which takes at least {MIN_SIZE_TO_HALVE} slices and 2 stages"
    if n_slices < MIN_SIZE_TO_HALVE or n_spanning < 2:
        if "2d" in configurations:
            return "2d", f"{facts}: too little context across slices for 3D, {needed}"
        return "3d_fullres", f"{facts}: little context across slices for 3D, but the plan has no 2d"
    facts += f": enough context across slices for 3D, {needed}"
    coverage = prod(full.patch_size) / prod(full.median_shape)
    covered = f"a patch covers {coverage:.2g} of the median case's volume"
    if coverage < CASCADE_BELOW_COVERAGE:
        small = f"{facts}; {covered}, less than {CASCADE_BELOW_COVERAGE:g}: too little to see where in the body it is"
        if "3d_cascade_fullres" in configurations:
            return "3d_cascade_fullres", f"{small}, so a first stage at low resolution shows the whole"
        return "3d_fullres", f"{small}, but the plan has no cascade"
    return "3d_fullres", f"{facts}; {covered}, at least {CASCADE_BELOW_COVERAGE:g}: no cascade is needed"


def _explain_preset(choices: Choices, architecture: str) -> str:
    if choices.preset != Choices().preset:
        return f"set by user: {choices.preset}, architecture {architecture}"
    return f"{choices.preset}, architecture {architecture}: the plain U-Net of the published method is the default"


def _explain_scheme(channel: ChannelFingerprint, scheme: str, use_mask: bool, cropped_fraction: float) -> str:
    if scheme == "ct":
        return (
            f"'{channel.name}' has an absolute scale: clipped to the 0.5th and 99.5th percentile of the foreground, "
            f"{channel.percentile_00_5:g} to {channel.percentile_99_5:g}, then shifted by its mean {channel.mean:g} "
            f"and divided by its standard deviation {channel.std:g}"
        )
    if scheme == "rgb_to_0_1":
        return f"'{channel.name}' is a colour of 8 bits: divided by 255"
    if scheme == "rescale_to_0_1":
        return f"'{channel.name}' asks for it by its name: each image is scaled to 0..1"
    if scheme == "none":
        return f"'{channel.name}' asks for it by its name: intensities stay as they are"
    area, relation = ("inside the non-zero mask", "less than") if use_mask else ("over the whole image", "at least")
    return (
        f"'{channel.name}' is not known to have an absolute scale: z-score per image, {area}, because cropping to the "
        f"non-zero part keeps {cropped_fraction:.1%} of the median case, {relation} {MASK_BELOW_CROPPED_FRACTION:.0%}"
    )


def _is_about(reason: Reason, names: Collection[str]) -> bool:
    parts = reason.subject.split(".")
    return len(parts) > 1 and parts[0] == "configurations" and parts[1] in names


def _check(fingerprint: Fingerprint) -> None:
    """Refuses numbers that no scan can have."""
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
        raise PlanError(describe_problems("no plan can be made from these cases", problems))


def _is_possible(case: CaseFingerprint) -> bool:
    return min(case.cropped_shape) >= 1 and all(0 < edge_mm < math.inf for edge_mm in case.spacing_mm)

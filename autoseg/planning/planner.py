"""From the fingerprint of a dataset to its plan: what to train, and why."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from autoseg import __version__
from autoseg.core.errors import PlanError, Problem, describe_problems
from autoseg.core.labels import LabelSpec
from autoseg.core.serialize import digest
from autoseg.planning.configurations import plan_configurations
from autoseg.planning.fingerprint import CaseFingerprint, ChannelFingerprint, Fingerprint
from autoseg.planning.grid import choose_grid
from autoseg.planning.plan import PLAN_VERSION, ChannelNormalization, ConfigurationPlan, Plan, Reason
from autoseg.planning.presets import TRAINABLE_CONFIGURATIONS, find_preset
from autoseg.planning.topology import MIN_SIZE_TO_HALVE

SCHEME_BY_CHANNEL = {"ct": "ct", "rgb_to_0_1": "rgb_to_0_1"}
"""Normalization by the channel's name in lower case; all other channels are z-scored."""

MASK_BELOW_CROPPED_FRACTION = 0.75
"""Where cropping keeps less of the median case than this, z-scores are computed inside the non-zero mask."""


def make_plan(
    fingerprint: Fingerprint,
    labels: LabelSpec,
    *,
    dataset: str,
    n_folds: int,
    preset: str = "unet",
    configurations: Collection[str] = TRAINABLE_CONFIGURATIONS,
) -> Plan:
    """Decides everything about a dataset, each decision with its reason.

    Implements the rules of Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image
    segmentation", Nature Methods 2021.

    Args:
        fingerprint: what the scans are like.
        labels: the classes.
        dataset: the dataset's name.
        n_folds: folds of cross-validation.
        preset: a name in `autoseg.planning.presets.PRESETS` whose architecture can be trained.
        configurations: which configurations to keep, where the dataset calls for them.

    Returns:
        The plan. Equal fingerprints give equal plans.

    Raises:
        PlanError: the fingerprint is empty or holds impossible numbers, or there is no such preset.
    """
    _check(fingerprint)
    chosen = find_preset(preset)
    grid = choose_grid(fingerprint.cases)
    planned, reasons = plan_configurations(grid, labels.n_classes, chosen)
    kept = {name: configuration for name, configuration in planned.items() if name in configurations}
    if not kept:
        raise PlanError(
            f"none of the configurations {', '.join(configurations)} suits this dataset; "
            f"it could have {', '.join(planned)}"
        )
    normalization, normalization_reasons = choose_normalization(
        fingerprint.channels, fingerprint.median_cropped_fraction
    )
    recommended, why = recommend(kept)
    dropped = planned.keys() - kept.keys()
    return Plan(
        version=PLAN_VERSION,
        dataset=dataset,
        labels=labels,
        normalization=normalization,
        axis_order=grid.axis_order,
        n_folds=n_folds,
        configurations=kept,
        recommended=recommended,
        reasons=(
            Reason(subject="axis_order", text=grid.axis_order_reason),
            *normalization_reasons,
            *(reason for reason in reasons if not _is_about(reason, dropped)),
            Reason(subject="recommended", text=why),
        ),
        provenance={"autoseg": __version__, "preset": preset, "fingerprint": digest(fingerprint)},
    )


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
    """The configuration to train where the user names none: 3D, unless it hardly looks across slices.

    That is so where the median case has fewer slices than it takes to halve an axis once, or where slices lie so far
    apart that the network's kernels span them in the bottleneck only. Then 3D spends its memory on a stack whose slices
    it treats one by one, where 2D has larger patches and more of them in a batch.

    Args:
        configurations: those of the plan, at least one.

    Returns:
        Its name, and why.
    """
    if "3d_fullres" not in configurations:
        name = "2d" if "2d" in configurations else next(iter(configurations))
        return name, "there is no 3d_fullres"
    full = configurations["3d_fullres"]
    n_slices = full.median_shape[0]
    n_spanning = sum(kernel[0] > 1 for kernel in full.network.kernel_sizes)
    facts = (
        f"the median case has {n_slices:g} slices, and the kernels of {n_spanning} of {len(full.network.features)} "
        "stages of 3d_fullres span slices"
    )
    needed = f"which takes at least {MIN_SIZE_TO_HALVE} slices and 2 stages"
    if "2d" in configurations and (n_slices < MIN_SIZE_TO_HALVE or n_spanning < 2):
        return "2d", f"{facts}: too little context across slices for 3D, {needed}"
    return "3d_fullres", f"{facts}: enough context across slices for 3D, {needed}"


def _explain_scheme(channel: ChannelFingerprint, scheme: str, use_mask: bool, cropped_fraction: float) -> str:
    if scheme == "ct":
        return (
            f"'{channel.name}' has an absolute scale: clipped to the 0.5th and 99.5th percentile of the foreground, "
            f"{channel.percentile_00_5:g} to {channel.percentile_99_5:g}, then shifted by its mean {channel.mean:g} "
            f"and divided by its standard deviation {channel.std:g}"
        )
    if scheme == "rgb_to_0_1":
        return f"'{channel.name}' is a colour of 8 bits: divided by 255"
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

"""From the fingerprint of a dataset to its plan: what to train, and why."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from math import prod

from autoseg import __version__
from autoseg.core.errors import PlanError
from autoseg.core.labels import LabelSpec
from autoseg.core.serialize import digest
from autoseg.planning.choices import Choices
from autoseg.planning.configurations import plan_configurations
from autoseg.planning.fingerprint import ChannelFingerprint, Fingerprint, check_fingerprint
from autoseg.planning.grid import choose_grid
from autoseg.planning.mirroring import explain_mirroring
from autoseg.planning.plan import (
    PLAN_VERSION,
    SET_BY_USER,
    ChannelNormalization,
    ConfigurationPlan,
    Plan,
    Reason,
)
from autoseg.planning.presets import find_preset
from autoseg.planning.topology import MIN_SIZE_TO_HALVE

SCHEME_BY_CHANNEL = {
    "ct": "ct",
    "rgb_to_0_1": "rgb_to_0_1",
    "rescale_to_0_1": "rescale_to_0_1",
    "nonorm": "none",
}
"""Normalization by the channel's name in lower case, as in the published method; all other channels are z-scored."""

NAMELESS_CHANNEL = re.compile(r"image([ _]?\d+)?|\d+")
"""Names of channels that say nothing of them, as datasets have that come without any."""

CT_FROM, CT_TO = -900.0, 150.0
"""Where every image has voxels as low as air and as high as contrast or bone, in Hounsfield units, it is CT."""

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
    check_fingerprint(fingerprint)
    choices = choices or Choices()
    preset = find_preset(choices.preset, choices.gpu_memory_gib)
    grid = choose_grid(fingerprint.cases, spacing_mm=choices.spacing_mm)
    planned, reasons = plan_configurations(grid, labels.n_outputs, preset, choices)
    kept = _keep(planned, reasons, choices)
    normalization, normalization_reasons = choose_normalization(
        fingerprint.channels, fingerprint.median_cropped_fraction
    )
    recommended, why = recommend(kept)
    dropped = planned.keys() - kept.keys()
    by_whom = SET_BY_USER if choices.gpu_memory_gib is not None else f"what preset {preset.name} is made for"
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
            Reason(subject="mirroring", text=explain_mirroring(labels)),
            *(reason for reason in reasons if not _is_about(reason, dropped)),
            Reason(subject="recommended", text=why),
        ),
        provenance={"autoseg": __version__, "fingerprint": digest(fingerprint)},
        spacing_range_mm=fingerprint.spacing_range_mm,
    ).signed()


def _keep(
    planned: dict[str, ConfigurationPlan], reasons: Sequence[Reason], choices: Choices
) -> dict[str, ConfigurationPlan]:
    """Those of the planned configurations that the user wants, and what they build on.

    Raises:
        PlanError: a configuration that the user has named does not suit the dataset.
    """
    for name in sorted(choices.named):
        if name not in planned:
            parts = (f"configurations.{name}", "configurations.3d_lowres", "configurations")
            why = next(reason.text for part in parts for reason in reasons if reason.subject == part)
            raise PlanError(f"{name} does not suit this dataset: {why}. It could have {', '.join(planned)}.")
    if choices.configurations is None:
        return planned
    wanted = set(choices.configurations)
    wanted |= {previous for name in wanted if (previous := planned[name].previous)}
    if contradicted := choices.named - wanted:
        raise PlanError(f"{', '.join(sorted(contradicted))} is set but not among the configurations that are chosen")
    return {name: configuration for name, configuration in planned.items() if name in wanted}


def choose_normalization(
    channels: Sequence[ChannelFingerprint], median_cropped_fraction: float
) -> tuple[tuple[ChannelNormalization, ...], tuple[Reason, ...]]:
    """How to scale each channel, by its name; one without, whose intensities are those of CT, as CT.

    Args:
        channels: the channels, in order.
        median_cropped_fraction: median over cases of cropped volume / volume.

    Returns:
        One entry and one reason per channel, in order.
    """
    normalization, reasons = [], []
    for index, channel in enumerate(channels):
        scheme = "ct" if _is_nameless_ct(channel) else SCHEME_BY_CHANNEL.get(channel.name.casefold(), "zscore")
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
                minimum=channel.minimum if scheme == "ct" else None,
            )
        )
        text = _explain_scheme(channel, scheme, use_mask, median_cropped_fraction)
        reasons.append(Reason(subject=f"normalization[{index}]", text=text))
    return tuple(normalization), tuple(reasons)


def recommend(configurations: dict[str, ConfigurationPlan]) -> tuple[str, str]:
    """The configuration to train where the user names none: 2D, 3D or the cascade.

    - 2D, where a 3D patch has fewer slices than it takes to halve an axis once, be it that the cases have no more or
      that the memory holds no more of their large slices, or where slices lie so far apart that the network's kernels
      span them in the bottleneck only. Then 3D spends its memory on a stack whose slices it treats one by one, where 2D
      has larger patches and more of them in a batch.
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
        known = [name for name in order if name in configurations]
        return (known or list(configurations))[0], "the plan has no 3d_fullres"
    full = configurations["3d_fullres"]
    n_slices = full.patch_size[0]
    n_spanning = sum(kernel[0] > 1 for kernel in full.network.kernel_sizes)
    facts = (
        f"a patch of 3d_fullres has {n_slices} of the median case's {full.median_shape[0]:g} slices, and the kernels "
        f"of {n_spanning} of {len(full.network.features)} stages span slices"
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
        return f"{SET_BY_USER}: {choices.preset}, architecture {architecture}"
    return f"{choices.preset}, architecture {architecture}: the plain U-Net of the published method is the default"


def _is_nameless_ct(channel: ChannelFingerprint) -> bool:
    if channel.all_from is None or channel.all_to is None or not NAMELESS_CHANNEL.fullmatch(channel.name.casefold()):
        return False
    return channel.all_from <= CT_FROM and channel.all_to >= CT_TO


def _explain_scheme(channel: ChannelFingerprint, scheme: str, use_mask: bool, cropped_fraction: float) -> str:
    if scheme == "ct":
        known = f"'{channel.name}' has an absolute scale"
        if _is_nameless_ct(channel):
            known = (
                f"'{channel.name}' says nothing of what it is, but every image reaches from {channel.all_from:g} or "
                f"less to {channel.all_to:g} or more, as CT in Hounsfield units does (any other name of the channel, "
                "such as MR, keeps it from being scaled so)"
            )
        return (
            f"{known}: clipped to the 0.5th and 99.5th percentile of the foreground, "
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

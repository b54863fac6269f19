"""The plan in tables: every decision with its reason, the network stage by stage, and what all of it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoseg.core.runtime import format_duration, format_memory
from autoseg.planning.cost import Stage, list_stages
from autoseg.planning.estimates import Estimates
from autoseg.planning.plan import (
    CONFIGURATIONS,
    ChannelNormalization,
    ConfigurationPlan,
    Measurement,
    NetworkPlan,
    Plan,
    Reason,
)
from autoseg.reporting.html import (
    NO_VALUE,
    Child,
    Column,
    Html,
    classed,
    element,
    exact,
    format_large,
    format_number,
    format_size,
    join,
    table,
)
from autoseg.training.config import ITERATIONS_PER_EPOCH

RECOMMENDED = "recommended"
WHOLE_DATASET = ""

PURPOSES = {
    "2d": "segments a scan slice by slice",
    "3d_fullres": "segments blocks of a scan at full resolution",
    "3d_lowres": "segments blocks of a scan at a coarser resolution, so that each of them shows more of the body",
    "3d_cascade_fullres": "refines at full resolution what 3d_lowres has found at a coarser one",
    "2d_quick": "segments a scan slice by slice at a coarser resolution, for short trainings",
    "3d_quick": "segments blocks of a scan at a coarser resolution, for short trainings",
}
OTHER_PURPOSE = "was added to the plan by hand"
PURPOSE_NOTES = {
    "2d": "has the largest view within a slice, and none of the slices beside it",
    "3d_fullres": "sees what surrounds a voxel in all directions",
    "3d_lowres": "the first step of the cascade, and a configuration of its own",
}
SCHEME_TITLES = {
    "ct": "clipped and scaled by numbers of the whole dataset",
    "zscore": "z-score of each image",
    "rgb_to_0_1": "divided by 255",
    "rescale_to_0_1": "each image to 0..1",
    "none": "as they are",
}


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A row of a table of decisions.

    Attributes:
        subject: as in the plan's reasons.
        title: in words.
        value: what was decided.
        note: what it means, where the plan gives no reason.
    """

    subject: str
    title: str
    value: str
    note: str = ""


def group_reasons(plan: Plan) -> dict[str, list[Reason]]:
    """Every reason of the plan at the one place where it is shown.

    Returns:
        Reasons under `RECOMMENDED`, under the name of their configuration, or under `WHOLE_DATASET`.
    """
    groups: dict[str, list[Reason]] = {name: [] for name in (RECOMMENDED, WHOLE_DATASET, *plan.configurations)}
    for reason in plan.reasons:
        parts = reason.subject.split(".")
        if reason.subject == RECOMMENDED:
            groups[RECOMMENDED].append(reason)
        elif parts[0] == "configurations" and len(parts) > 1 and parts[1] in plan.configurations:
            groups[parts[1]].append(reason)
        else:
            groups[WHOLE_DATASET].append(reason)
    return groups


def show_reason(reason: Reason) -> Html:
    """The text of a reason, and its subject for whoever reads the page by program."""
    return element("span", reason.text, attributes={"class": "reason", "data-subject": reason.subject})


def show_general_decisions(plan: Plan, reasons: Sequence[Reason]) -> Html:
    """What holds for all configurations."""
    order = ", ".join("zyx"[axis] for axis in plan.axis_order)
    decisions = [
        Decision(subject="preset", title="preset", value=plan.preset),
        Decision(
            subject="gpu_memory_gib", title="memory of the GPU", value=f"{format_number(plan.gpu_memory_gib)} GiB"
        ),
        Decision(
            subject="n_folds",
            title="folds of cross-validation",
            value=str(plan.n_folds),
            note="every case is held out once" if plan.n_folds > 1 else "no cross-validation",
        ),
        Decision(subject="axis_order", title="order of axes, through-plane first", value=order),
    ]
    decisions += [
        Decision(subject=f"normalization[{i}]", title=f"intensities of {channel.channel}", value=_tell_scheme(channel))
        for i, channel in enumerate(plan.normalization)
    ]
    subjects = {reason.subject for reason in reasons}
    decisions += [
        Decision(subject=subject, title=name, value="not planned")
        for name in CONFIGURATIONS
        if name not in plan.configurations and (subject := f"configurations.{name}") in subjects
    ]
    return _show_decisions(decisions, reasons)


def show_configuration_decisions(plan: Plan, configuration: ConfigurationPlan, reasons: Sequence[Reason]) -> Html:
    """What was decided about one configuration."""
    subject = f"configurations.{configuration.name}"
    axes = name_axes(plan, configuration)
    lowres_axis = configuration.lowres_axis
    decisions = [
        Decision(
            subject=subject,
            title="purpose",
            value=PURPOSES.get(configuration.name, OTHER_PURPOSE),
            note=PURPOSE_NOTES.get(configuration.name, ""),
        ),
        Decision(
            subject=f"{subject}.spacing_mm",
            title="spacing",
            value=f"{format_size(configuration.spacing_mm)} mm ({axes})",
        ),
        Decision(
            subject=f"{subject}.patch_size",
            title="patch",
            value=f"{format_size(configuration.patch_size)} voxels, {tell_extent(configuration)}",
        ),
        Decision(subject=f"{subject}.network", title="network", value=_tell_network(configuration.network)),
        Decision(subject=f"{subject}.batch_size", title="patches per batch", value=str(configuration.batch_size)),
        Decision(
            subject=f"{subject}.batch_dice",
            title="Dice in the loss",
            value="over the whole batch" if configuration.batch_dice else "of each patch",
        ),
        Decision(
            subject=f"{subject}.median_shape",
            title="median case",
            value=f"{format_size(configuration.median_shape)} voxels",
            note="the median along each axis, of scans that are cropped and brought to the spacing",
        ),
        Decision(
            subject=f"{subject}.largest_shape",
            title="largest case",
            value=f"{format_size(configuration.largest_shape)} voxels",
            note="the largest size along each axis, which need not be those of one case",
        ),
    ]
    if lowres_axis is not None:
        axis = "zyx"[plan.axis_order[-configuration.n_axes :][lowres_axis]]
        value = f"{axis}: by the nearest neighbour, for it is far coarser than the others"
        decisions.append(Decision(subject=f"{subject}.lowres_axis", title="resampling", value=value))
    if configuration.previous is not None:
        decisions.append(
            Decision(
                subject=f"{subject}.previous", title="also looks at", value=f"what {configuration.previous} predicts"
            )
        )
    return _show_decisions(decisions, reasons, prefix=f"{subject}.")


def name_axes(plan: Plan, configuration: ConfigurationPlan) -> str:
    """The axes of a configuration's arrays, such as "z, y, x"."""
    return ",\u00a0".join("zyx"[axis] for axis in plan.axis_order[-configuration.n_axes :])


def tell_extent(configuration: ConfigurationPlan) -> str:
    """How large a patch is, in millimetres."""
    pairs = zip(configuration.patch_size, configuration.spacing_mm, strict=True)
    return f"{format_size([float(f'{size * edge_mm:.3g}') for size, edge_mm in pairs])} mm"


def show_stages(plan: Plan, configuration: ConfigurationPlan) -> Html:
    """The network, stage by stage, with totals.

    Raises:
        PlanError: the architecture is unknown.
    """
    # A cascade sees the previous prediction as one more channel per foreground class.
    n_channels = len(plan.channels) + plan.n_previous(configuration.name)
    stages = list_stages(configuration, n_channels=n_channels, n_outputs=plan.labels.n_outputs)
    totals = [sum(_costs(stage)[i] for stage in stages) for i in range(3)]
    columns = [Column(title="stage")]
    columns += [Column(title=title) for title in ("patch", "spacing in mm", "stride", "kernel")]
    columns += [Column(title=title, kind="number") for title in ("features", "encoder blocks", "decoder blocks")]
    columns += [Column(title=title, kind="number") for title in ("parameters", "feature-map values", "multiply-adds")]
    rows: list[list[Child]] = []
    for stage in stages:
        name = f"{stage.index + 1}" + (" (input)" if stage.index == 0 else "")
        spacing_mm = [float(f"{edge_mm:.3g}") for edge_mm in stage.spacing_mm]
        row: list[Child] = [f"{stage.index + 1}, bottleneck" if stage is stages[-1] else name]
        row += [format_size(size) for size in (stage.patch_size, spacing_mm, stage.stride, stage.kernel_size)]
        row += [str(number) for number in (stage.features, stage.encoder_blocks, stage.decoder_blocks or NO_VALUE)]
        row += [_show_share(cost, total) for cost, total in zip(_costs(stage), totals, strict=True)]
        rows.append(row)
    footer: list[Child] = ["total", *[""] * 7, *(exact(total, format_large(total)) for total in totals)]
    text = (
        f"One patch with {n_channels} input channel{'s' if n_channels > 1 else ''}, forwards; axes are "
        f"({name_axes(plan, configuration)}). The bars show each stage's part of the total. Feature maps take most of "
        "the memory of training, multiply-adds most of its time."
    )
    return join(element("p", text), table(columns, rows, footer=footer))


def show_costs(plan: Plan, estimates: Estimates, epoch_times_s: Mapping[str, float]) -> Html:
    """What each configuration takes, as estimated and as measured."""
    measured = [known for name in plan.configurations if (known := plan.measurement(name))]
    columns = [Column(title="configuration")]
    columns += [
        Column(title=title, kind="number")
        for title in ("voxels of the median case", "of the largest", "disk for all cases", "memory for training")
    ]
    if epoch_times_s:
        columns.append(Column(title="time per epoch, in earlier trainings", kind="number"))
    rows: list[list[Child]] = []
    for entry in estimates.configurations:
        largest = join(
            exact(entry.largest_voxels, format_large(entry.largest_voxels)),
            classed("span", "note", f" {entry.largest_case}"),
        )
        row: list[Child] = [entry.configuration, format_large(entry.median_voxels), largest]
        disk = format_memory(entry.disk_gib) if entry.grid == entry.configuration else f"that of {entry.grid}"
        row += [disk, format_memory(entry.training_memory_gib)]
        if epoch_times_s:
            time_s = epoch_times_s.get(entry.configuration)
            row.append(NO_VALUE if time_s is None else format_duration(time_s))
        rows.append(row)
    text = (
        "Computed from the fingerprint: what the preprocessed cases take on disk, and about what training takes on a "
        "GPU at the plan's batch size."
    )
    return join(
        element("p", text),
        table(columns, rows, is_stacked=True),
        element("h3", "Measured") if measured else "",
        _show_measurements(measured) if measured else "",
    )


def _show_measurements(measurements: Sequence[Measurement]) -> Html:
    columns = [Column(title="configuration"), Column(title="device")]
    titles = ("memory at its peak", "one step", f"epoch of {ITERATIONS_PER_EPOCH} steps", "largest batch")
    columns += [Column(title=title, kind="number") for title in titles]
    rows: list[list[Child]] = [
        [
            measured.configuration,
            measured.device,
            format_memory(measured.peak_memory_gib),
            f"{format_number(1000 * measured.step_time_s)} ms",
            format_duration(ITERATIONS_PER_EPOCH * measured.step_time_s),
            str(measured.largest_batch_size),
        ]
        for measured in measurements
    ]
    text = (
        "Training steps at the plan's batch size that were run on the device, augmentation included: reading and "
        "validation come on top."
    )
    return join(element("p", text), table(columns, rows, is_stacked=True))


def _show_decisions(decisions: Sequence[Decision], reasons: Sequence[Reason], *, prefix: str = "") -> Html:
    """One row per decision with all its reasons, then one per reason about something else.

    Args:
        decisions: in the order to show.
        reasons: all of them are shown.
        prefix: that subjects of such other reasons are shown without.
    """
    columns = [Column(title="decision"), Column(title="value"), Column(title="why", kind="prose")]
    rows: list[list[Child]] = []
    for decision in decisions:
        why = [show_reason(reason) for reason in reasons if reason.subject == decision.subject]
        rows.append(
            [
                decision.title,
                classed("span", "value", decision.value),
                join(*why, separator=" ") if why else classed("span", "note", decision.note),
            ]
        )
    listed = {decision.subject for decision in decisions}
    rows += [
        [reason.subject.removeprefix(prefix), NO_VALUE, show_reason(reason)]
        for reason in reasons
        if reason.subject not in listed
    ]
    return table(columns, rows, is_stacked=True)


def _tell_network(network: NetworkPlan) -> str:
    features = f"{min(network.features)} to {max(network.features)} features"
    return f"{network.architecture} of {len(network.features)} stages, {features}"


def _tell_scheme(channel: ChannelNormalization) -> str:
    title = SCHEME_TITLES.get(channel.scheme, channel.scheme)
    return f"{title}, inside the non-zero mask" if channel.use_mask else title


def _costs(stage: Stage) -> tuple[int, int, int]:
    return stage.n_parameters, stage.n_values, stage.n_multiply_adds


def _show_share(cost: int, total: int) -> Html:
    """A number with a bar behind it: its part of the total."""
    part = f"--part:{100 * cost / max(total, 1):.1f}%"
    return element("span", exact(cost, format_large(cost)), attributes={"class": "share", "style": part})

"""Plans and tables as plain text, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from autoseg.core.errors import describe_problems
from autoseg.core.geometry import join_numbers
from autoseg.core.runtime import format_memory
from autoseg.planning.estimates import ConfigurationEstimate, Estimates
from autoseg.planning.plan import ConfigurationPlan, Plan

EDITED = (
    "This plan was edited by hand after it was made: the reasons tell why the planner had decided as it did, and may "
    "not be true of what stands there now."
)


def describe_plan(plan: Plan) -> str:
    """A plan in a few lines: the dataset, and each configuration."""
    lines = [
        f"{plan.dataset}: {_count(plan.channels, 'channel')} ({', '.join(plan.channels)}), "
        f"{_count(plan.labels.names, 'label')} ({_shorten(plan.labels.names)})"
    ]
    for configuration in plan.configurations.values():
        mark = " (recommended)" if configuration.name == plan.recommended else ""
        lines.append(
            f"  {configuration.name}: {join_numbers(configuration.spacing_mm)} mm, "
            f"patch {join_numbers(configuration.patch_size)}, batch {configuration.batch_size}, "
            f"{len(configuration.network.features)} stages{mark}"
        )
    return "\n".join(lines)


def explain_plan(plan: Plan, estimates: Estimates) -> str:
    """A plan with the reason of every decision, what each configuration will take, and what is odd about the cases."""
    about: dict[str, list[str]] = {name: [] for name in ("", *plan.configurations)}
    for reason in plan.reasons:
        parts = reason.subject.split(".")
        of = parts[1] if len(parts) > 1 and parts[0] == "configurations" and parts[1] in about else ""
        subject = ".".join(parts[2:]) if of else reason.subject
        about[of].append(f"  {subject or 'why'}: {reason.text}")
    blocks = [describe_plan(plan), "\n".join(["Dataset", *about[""]])]
    if plan.is_edited:
        blocks.insert(1, EDITED)
    taken = {estimate.configuration: estimate for estimate in estimates.configurations}
    for name, configuration in plan.configurations.items():
        lines = [name, *about[name], f"  takes: {_describe_estimate(configuration, taken[name])}"]
        lines += [
            f"  measured: on {known.device} {known.peak_memory_gib:.2f} GiB and {known.step_time_s:.3g} s a step at "
            f"batch size {configuration.batch_size}; the largest batch size is {known.largest_batch_size}"
            for known in (plan.measurement(name),)
            if known
        ]
        blocks.append("\n".join(lines))
    if estimates.warnings:
        blocks.append(describe_problems("Some cases deserve a look.", estimates.warnings))
    return "\n\n".join(blocks)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their heads, the first flush left, the others flush right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *cells])

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


def _describe_estimate(configuration: ConfigurationPlan, taken: ConfigurationEstimate) -> str:
    disk = f"{format_memory(taken.disk_gib)} of disk for the preprocessed cases"
    if taken.grid != configuration.name:
        disk = f"the preprocessed cases of {taken.grid}"
    return (
        f"{disk}; a case has {taken.median_voxels:,.0f} "
        f"voxels (median), the largest, {taken.largest_case}, {taken.largest_voxels:,}; training "
        f"about {format_memory(taken.training_memory_gib)} at batch size {configuration.batch_size}"
    )


def _count(things: Sequence[str], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _shorten(names: Sequence[str], most: int = 20) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest

"""Plans and tables as plain text, for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from autoseg.core.errors import SEVERITIES, describe_problems, group_problems, list_some
from autoseg.core.geometry import join_numbers
from autoseg.core.runtime import format_memory
from autoseg.core.text import spell_out
from autoseg.evaluation.selection import Selection
from autoseg.planning.estimates import ConfigurationEstimate, Estimates
from autoseg.planning.plan import ConfigurationPlan, Plan

if TYPE_CHECKING:
    from autoseg.data.check import CheckResult
    from autoseg.evaluation.scores import Evaluation

UNDEFINED = "-"
EDITED = (
    "This plan was edited by hand after it was made: the reasons tell why the planner had decided as it did, and may "
    "not be true of what stands there now."
)


def describe_check(result: CheckResult) -> str:
    """What was found wrong with a dataset: how often what, as a table, and then each with its cases and its advice."""
    of_severity = {
        severity: [problem for problem in result.problems if problem.severity == severity] for severity in SEVERITIES
    }
    counts = ", ".join(_count(found, severity) for severity, found in of_severity.items() if found)
    headline = f"{spell_out(result.dataset)}: {result.n_cases} cases, {counts or 'nothing wrong'}"
    if not result.problems:
        return headline
    rows = [
        (
            severity,
            kind,
            str(len(members)),
            list_some([spell_out(problem.case) for problem in members if problem.case], most=4),
        )
        for severity, found in of_severity.items()
        for (kind, _), members in group_problems(found).items()
    ]
    blocks = [headline, format_table(("severity", "problem", "how often", "cases"), rows, n_left=4)]
    blocks += [describe_problems(f"{severity}s".upper(), found) for severity, found in of_severity.items() if found]
    return "\n\n".join(blocks)


def describe_plan(plan: Plan) -> str:
    """A plan in a few lines: the dataset, and each configuration."""
    lines = [
        f"{plan.dataset}: {_count(plan.channels, 'channel')} ({', '.join(plan.channels)}), "
        f"{_count(plan.labels.names, 'label')} ({list_some(plan.labels.names, most=20)})"
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


def describe_selection(selection: Selection) -> str:
    """Candidates in a table, what was chosen and why, and the post-processing that goes with it."""
    rows = [
        (
            f"{known.name}{' (selected)' if known.name == selection.chosen else ''}",
            f"{known.raw_dice:.4f}",
            f"{known.mean_dice:.4f}",
            f"{known.cost:.3g}",
        )
        for known in selection.candidates
    ]
    parts = [
        format_table(("candidate", "Dice", "after post-processing", "billions of multiply-adds a case"), rows),
        f"Selected: {selection.why}.",
    ]
    adopted = [known for known in selection.candidate.decisions if known.adopted]
    lines = [f"  {known.step}: Dice {known.gain:+.4f} ({known.low:+.4f} to {known.high:+.4f})" for known in adopted]
    parts.append(
        "Post-processing (gain in Dice, 95% interval):\n" + "\n".join(lines) if lines else "No post-processing."
    )
    if selection.missing:
        listed = "\n".join(f"  {name}: {why}" for name, why in selection.missing.items())
        parts.append(f"Not compared:\n{listed}")
    return "\n\n".join(parts)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, n_left: int = 1) -> str:
    """Columns under their heads, the first `n_left` flush left, the others flush right."""
    # Before they are measured: what cannot be printed takes more room than it seems.
    header, rows = [spell_out(cell) for cell in header], [[spell_out(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        return "  ".join(
            cell.ljust(width) if column < n_left else cell.rjust(width) for column, (cell, width) in enumerate(cells)
        )

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


def describe_label_dice(evaluation: Evaluation) -> str:
    """The mean Dice of every label, one below the other."""
    rows = [(label, _figure(value, 4)) for label, value in evaluation.label_dice.items()]
    return format_table(("label", "Dice"), [*rows, ("mean", _figure(evaluation.mean_dice, 4))])


def describe_case_dice(evaluation: Evaluation) -> str:
    """The Dice of every case and label, and the means."""
    rows = [
        (case.case, *(_figure(score.dice, 4) for score in case.labels), _figure(case.mean_dice, 4))
        for case in evaluation.cases
    ]
    means = evaluation.label_dice
    rows.append(("mean", *(_figure(mean, 4) for mean in means.values()), _figure(evaluation.mean_dice, 4)))
    return format_table(("case", *means, "mean"), rows)


def describe_scores(evaluation: Evaluation) -> str:
    """Every label summed up over cases, and what the columns mean and count."""
    heads = ("label", "n", "missed", "false", "Dice [95%]", "median", "HD95", "ASSD", "surface", "lesions", "volume")
    rows = []
    for label in evaluation.labels:
        dice = label.metrics["dice"]
        known = dice.n > 0
        means = {name: statistic.mean for name, statistic in label.metrics.items()}
        rows.append(
            (
                label.label,
                *map(str, (label.n_cases, label.n_missed, label.n_false)),
                f"{dice.mean:.3f} [{dice.low:.3f}, {dice.high:.3f}]" if known else UNDEFINED,
                _figure(dice.median, 3),
                _figure(means["hd95_mm"], 2),
                _figure(means["assd_mm"], 2),
                _figure(means["surface_dice"], 3),
                _figure(means["lesion_f1"], 3),
                f"{100 * means['volume_error']:+.1f}%" if known else UNDEFINED,
            )
        )
    settings = evaluation.settings
    explanation = (
        "n: cases whose reference has the label. missed: of these, without a voxel predicted: 0 in Dice,\n"
        "surface and lesions, not in the distances. false: predicted, but not in the reference: in no mean.\n"
        "Means over cases, with the 95% bootstrap interval; HD95 and ASSD in mm; surface: Dice of the surfaces\n"
        f"at {settings.tolerance_mm:g} mm; lesions: F1 of components that match from an IoU of "
        f"{settings.min_lesion_iou:g}; volume: its error."
    )
    return f"{format_table(heads, rows)}\n\n{explanation}"


def _figure(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else UNDEFINED


def _describe_estimate(configuration: ConfigurationPlan, taken: ConfigurationEstimate) -> str:
    disk = f"{format_memory(taken.disk_gib)} of disk for the preprocessed cases"
    if taken.grid != configuration.name:
        disk = f"the preprocessed cases of {taken.grid}"
    return (
        f"{disk}; a case has {taken.median_voxels:,.0f} "
        f"voxels (median), the largest, {taken.largest_case}, {taken.largest_voxels:,}; training "
        f"about {format_memory(taken.training_memory_gib)} at batch size {configuration.batch_size}"
    )


def _count(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"

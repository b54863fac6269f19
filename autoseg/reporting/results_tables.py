"""Results in tables and words: metrics per label, the choice of a model, and the plan in a paragraph."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autoseg.core.errors import list_some
from autoseg.evaluation.scores import Evaluation, LabelSummary, ScoreSettings, Statistic
from autoseg.evaluation.select import compare
from autoseg.evaluation.selection import Candidate, Comparison, Selection, StepDecision
from autoseg.planning.plan import ConfigurationPlan, Plan
from autoseg.reporting.agreement_figures import normalise_rows
from autoseg.reporting.html import (
    NO_VALUE,
    Child,
    Column,
    Html,
    bullets,
    classed,
    element,
    exact,
    format_large,
    format_number,
    format_size,
    join,
    table,
)
from autoseg.reporting.plan_tables import OTHER_PURPOSE, PURPOSES, SCHEME_TITLES, name_axes, tell_extent
from autoseg.reporting.report_parts import MAX_OPEN_ROWS, details, fold_away
from autoseg.reporting.results_figures import collect_scores

MAX_LABELS_ACROSS = 6
N_LARGEST_CONFUSIONS = 20
PERCENT, MILLIMETRES = "%", "mm"


def tell_plan(plan: Plan, configurations: Sequence[ConfigurationPlan]) -> str:
    """The plan in a paragraph, in plain words.

    Args:
        plan: of the dataset.
        configurations: those to tell of, at least one.
    """
    n_channels, n_labels = len(plan.channels), len(plan.labels.names)
    schemes = {SCHEME_TITLES.get(channel.scheme, channel.scheme) for channel in plan.normalization}
    text = (
        f"Every scan of {plan.dataset} has {n_channels} channel{'s' if n_channels > 1 else ''} "
        f"({list_some(plan.channels)}), in which {n_labels} label{'s are' if n_labels > 1 else ' is'} to be found "
        f"({list_some(plan.labels.names)}). Intensities are scaled: {'; '.join(sorted(schemes))}. "
    )
    text += " ".join(_tell_configuration(plan, configuration) for configuration in configurations)
    is_one = len(configurations) == 1
    chosen = next((reason.text for reason in plan.reasons if reason.subject == "n_folds"), None)
    if plan.n_folds == 1:
        why = f": {chosen}" if chosen else ", on all cases: nothing tells how good it is"
        return f"{text} {'It is' if is_one else 'They are'} trained once{why}."
    part = "part" if chosen else _name_part(plan.n_folds)
    return (
        f"{text} {'It is' if is_one else 'Each is'} trained {plan.n_folds} times, each time without a "
        f"{part} of the cases. These are then segmented by the network that has not seen them: "
        "that is what all figures below are about."
    )


def _tell_configuration(plan: Plan, configuration: ConfigurationPlan) -> str:
    kind, part = ("pixels", "patches") if configuration.n_axes == 2 else ("voxels", "blocks")
    return (
        f"The configuration {configuration.name} {PURPOSES.get(configuration.name, OTHER_PURPOSE)}: scans are brought "
        f"to {kind} of {format_size(configuration.spacing_mm)} mm ({name_axes(plan, configuration)}), and the network, "
        f"{configuration.network.architecture} of {len(configuration.network.features)} stages, sees {part} of "
        f"{format_size(configuration.patch_size)} {kind} at once, which is {tell_extent(configuration)}."
    )


def _name_part(n: int) -> str:
    return {2: "half", 3: "third", 4: "fourth", 5: "fifth", 10: "tenth"}.get(n, f"{n}th part")


def estimate_mean_dice(evaluation: Evaluation) -> tuple[float, float]:
    """The 95% interval of the mean over labels of the mean Dice over cases; NaN for fewer than two cases."""
    dice = collect_scores(evaluation)
    if len(dice) < 2 or not np.isfinite(dice).any():
        return math.nan, math.nan
    _, low, high = compare(dice, np.zeros_like(dice))
    return low, high


def format_dice(value: float) -> str:
    """Three digits after the point."""
    return f"{value:.3f}" if math.isfinite(value) else NO_VALUE


def format_interval(low: float, high: float) -> str:
    """Of Dice."""
    return f"{low:.3f} to {high:.3f}" if math.isfinite(low) and math.isfinite(high) else NO_VALUE


def show_dice(evaluation: Evaluation) -> Html:
    """Dice of every label."""
    columns = [Column(title="label")]
    columns += [
        Column(title=title, kind="number")
        for title in ("mean Dice", "95% interval of the mean", "median", "cases", "missed", "found where there is none")
    ]
    rows: list[list[Child]] = []
    for summary in evaluation.labels:
        dice = summary.metrics["dice"]
        interval = format_interval(dice.low, dice.high) if dice.n > 1 else NO_VALUE
        rows.append(
            [
                summary.label,
                classed("span", "value", format_dice(dice.mean)),
                interval,
                format_dice(dice.median),
                *(str(n) for n in (summary.n_cases, summary.n_missed, summary.n_false)),
            ]
        )
    shown = table(columns, rows, is_stacked=True)
    return fold_away(f"The Dice of all {len(rows)} labels in numbers", shown, n_rows=len(rows))


def list_metrics(settings: ScoreSettings) -> dict[str, tuple[str, str, str]]:
    """Title, unit and meaning of every metric that is shown, by its name in `METRICS`."""
    tolerance, beta = format_number(settings.tolerance_mm), format_number(settings.beta)
    matched = f"overlap by an IoU of at least {format_number(settings.min_lesion_iou)}"
    return {
        "dice": ("Dice", "", "overlap of prediction and reference; 1 is perfect, 0 is none"),
        "iou": ("IoU", "", "overlap as a part of what either of them has; always below Dice"),
        "precision": ("precision", "", "part of the prediction that is right"),
        "recall": ("recall", "", "part of the reference that was found"),
        "f_beta": (f"F{beta}", "", f"both together, recall counting {beta} times as much"),
        "volume_error": ("volume error", PERCENT, "how much too large (+) or too small the prediction is"),
        "hd95_mm": ("HD95", MILLIMETRES, "95 % of the surfaces are no farther apart than this; smaller is better"),
        "assd_mm": ("ASSD", MILLIMETRES, "mean distance of the surfaces; smaller is better"),
        "surface_dice": ("surface Dice", "", f"part of both surfaces that is within {tolerance} mm of the other"),
        "lesion_f1": ("lesion F1", "", f"of separate pieces: those count as found that {matched}"),
        "lesion_recall": ("lesion recall", "", "part of the reference's pieces that was found"),
        "lesion_precision": ("lesion precision", "", "part of the predicted pieces that is right"),
    }


def show_metrics(evaluation: Evaluation) -> Html:
    """All metrics of every label: mean, its interval, and median."""
    metrics = list_metrics(evaluation.settings)
    titles = {name: f"{title}{f', {unit}' if unit else ''}" for name, (title, unit, _) in metrics.items()}
    is_upright = len(evaluation.labels) > MAX_LABELS_ACROSS
    columns, rows = [Column(title="label" if is_upright else "metric")], list[list[Child]]()
    meanings: Child = ""
    if is_upright:
        columns += [Column(title=title, kind="number") for title in titles.values()]
        for summary in evaluation.labels:
            cells = [_show_statistic(summary, name, unit) for name, (_, unit, _) in metrics.items()]
            rows.append([summary.label, *cells])
        meanings = bullets(join(element("strong", title), f": {meaning}.") for title, _, meaning in metrics.values())
    else:
        columns += [Column(title=summary.label, kind="number") for summary in evaluation.labels]
        for name, (_, unit, meaning) in metrics.items():
            heading = join(titles[name], element("br"), classed("small", "note", meaning))
            rows.append([heading, *(_show_statistic(summary, name, unit) for summary in evaluation.labels)])
    text = (
        "The mean over cases; below it the 95% interval of the mean, and the median. Cases whose reference lacks the "
        "label do not count."
    )
    return details(
        "All metrics of every label",
        element("p", text),
        table(columns, rows, is_stacked=True),
        meanings,
        is_open=len(rows) <= MAX_OPEN_ROWS,
    )


def _show_statistic(summary: LabelSummary, metric: str, unit: str) -> Html:
    statistic = summary.metrics.get(metric)
    if statistic is None or not statistic.n:
        return join(NO_VALUE)
    mean, low, high, median = (
        _format_metric(value, unit) for value in (statistic.mean, statistic.low, statistic.high, statistic.median)
    )
    lines: list[Child] = [classed("span", "value", mean)]
    if _has_interval(statistic):
        lines += [element("br"), classed("span", "note", f"{low} to {high}")]
    lines += [element("br"), classed("span", "note", f"median {median}")]
    return join(*lines)


def _has_interval(statistic: Statistic) -> bool:
    return statistic.n > 1 and math.isfinite(statistic.low) and math.isfinite(statistic.high)


def _format_metric(value: float, unit: str) -> str:
    if not math.isfinite(value):
        return NO_VALUE
    if unit == PERCENT:
        return f"{100 * value:+.1f}"
    return f"{value:.2f}" if unit == MILLIMETRES else f"{value:.3f}"


def show_selection(selection: Selection) -> Html:
    """Which model predicts, what it was compared with, and what is done to its label maps."""
    chosen = selection.candidate
    parts: list[Child] = [
        classed("p", "lead", element("strong", chosen.name), " was chosen: ", selection.why, "."),
        _show_candidates(selection),
        _show_comparisons(selection.comparisons),
    ]
    if selection.missing:
        listed = bullets(join(element("strong", name), f": {why}") for name, why in selection.missing.items())
        parts += [element("h3", "Not compared"), listed]
    parts += [element("h3", "Post-processing"), _show_postprocessing(chosen)]
    if len(selection.candidates) > 1:
        parts.append(_show_labels_of_candidates(selection.candidates))
    return join(*parts)


def _show_candidates(selection: Selection) -> Html:
    columns = [Column(title="model")]
    columns += [
        Column(title=title, kind="number")
        for title in ("mean Dice", "before post-processing", "multiply-adds for a median case")
    ]
    columns.append(Column(title="post-processing"))
    rows: list[list[Child]] = []
    for candidate in selection.candidates:
        is_chosen = candidate.name == selection.chosen
        cost = candidate.cost * 1e9
        rows.append(
            [
                join(candidate.name, classed("span", "badge", "chosen") if is_chosen else ""),
                classed("span", "value", format_dice(candidate.mean_dice)),
                format_dice(candidate.raw_dice),
                exact(round(cost), format_large(cost)) if math.isfinite(cost) else NO_VALUE,
                list_some([str(step) for step in candidate.steps], most=3) or "none helps",
            ]
        )
    return table(columns, rows, is_stacked=True)


def _show_comparisons(comparisons: Sequence[Comparison]) -> Html:
    if not comparisons:
        return join()
    columns = [Column(title="compared")]
    columns += [Column(title=title, kind="number") for title in ("gain in mean Dice", "95% interval")]
    columns.append(Column(title="beyond noise"))
    rows: list[list[Child]] = [
        [
            f"{comparison.candidate} against {comparison.against}",
            _format_gain(comparison.gain),
            f"{_format_gain(comparison.low)} to {_format_gain(comparison.high)}",
            "yes" if comparison.better else "no",
        ]
        for comparison in comparisons
    ]
    text = "On the same cases. Where the interval holds 0, the cheaper one is as good as the data can tell."
    return join(element("h3", "Compared with each other"), element("p", text), table(columns, rows, is_stacked=True))


def _format_gain(value: float) -> str:
    return f"{value:+.4f}" if math.isfinite(value) else NO_VALUE


def _show_postprocessing(candidate: Candidate) -> Html:
    if not candidate.decisions:
        return element("p", "Nothing was tried.")
    adopted = [decision for decision in candidate.decisions if decision.adopted]
    others = [decision for decision in candidate.decisions if not decision.adopted]
    text = (
        f"Of {len(candidate.decisions)} steps that were tried on the label maps of {candidate.name}, {len(adopted)} "
        f"{'is' if len(adopted) == 1 else 'are'} done from now on."
    )
    return join(
        element("p", text),
        fold_away("What is done", _show_decisions(adopted), n_rows=len(adopted)) if adopted else "",
        details("Tried, and not done", _show_decisions(others), is_open=len(others) <= 5) if others else "",
    )


def _show_decisions(decisions: Sequence[StepDecision]) -> Html:
    columns = [Column(title="step")]
    columns += [Column(title=title, kind="number") for title in ("gain in Dice", "95% interval")]
    columns.append(Column(title="decision", kind="prose"))
    rows: list[list[Child]] = [
        [
            str(decision.step),
            _format_gain(decision.gain),
            f"{_format_gain(decision.low)} to {_format_gain(decision.high)}",
            join(classed("span", "good", "done") if decision.adopted else "not done", f": {decision.why}"),
        ]
        for decision in decisions
    ]
    return table(columns, rows, is_stacked=True)


def _show_labels_of_candidates(candidates: Sequence[Candidate]) -> Html:
    labels = list(dict.fromkeys(label for candidate in candidates for label in candidate.label_dice))
    columns = [Column(title="label"), *(Column(title=candidate.name, kind="number") for candidate in candidates)]
    rows: list[list[Child]] = []
    for label in labels:
        values = [candidate.label_dice.get(label, math.nan) for candidate in candidates]
        best = max((value for value in values if math.isfinite(value)), default=math.nan)
        rows.append(
            [label, *(classed("span", "value", format_dice(v)) if v == best else format_dice(v) for v in values)]
        )
    return details(
        "Mean Dice of every label by model, after post-processing",
        table(columns, rows, is_stacked=True),
        is_open=len(rows) <= MAX_OPEN_ROWS,
    )


def show_largest_confusions(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> Html:
    """The confusions that take the largest part of a label of the reference."""
    parts = np.nan_to_num(normalise_rows(confusion))
    np.fill_diagonal(parts, 0)
    # Of the background only what is far from all labels would be large, and that tells nothing.
    order = np.argsort(-parts, axis=None, kind="stable")[:N_LARGEST_CONFUSIONS]
    columns = [Column(title="in the reference"), Column(title="predicted as")]
    columns += [Column(title=title, kind="number") for title in ("part of the label", "voxels")]
    rows: list[list[Child]] = []
    for row, column in zip(*np.unravel_index(order, parts.shape), strict=True):
        if parts[row, column] > 0:
            count = int(confusion[row][column])
            rows.append(
                [names[row], names[column], f"{100 * parts[row, column]:.1f} %", exact(count, format_large(count))]
            )
    if not rows:
        return element("p", "No voxel of a label was taken for another one.")
    return table(columns, rows, is_stacked=True)

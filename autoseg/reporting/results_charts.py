"""Charts of a cross-validation on its page, each with words that say how to read it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

from autoseg.evaluation.crossval import Calibration, CrossValidation
from autoseg.evaluation.scores import Evaluation
from autoseg.planning.plan import Plan
from autoseg.reporting.agreement_figures import (
    MAX_CONFUSION_CLASSES,
    N_PANELS,
    compare_volumes,
    confusion_inches,
    draw_bland_altman,
    draw_calibration,
    draw_confusion,
)
from autoseg.reporting.charts import WIDTH_INCHES
from autoseg.reporting.html import Html, classed, element, figure, format_number, join
from autoseg.reporting.report_parts import PictureFolder
from autoseg.reporting.results_figures import (
    MAX_NAMED_CASES,
    draw_case_bars,
    draw_label_dice,
    draw_learning_curves,
)
from autoseg.reporting.results_tables import format_dice, show_largest_confusions
from autoseg.training.record import EpochFigures

BACKGROUND = "background"
N_LABELS_DESCRIBED = 6


def show_curves(curves: Mapping[int, Sequence[EpochFigures]], pictures: PictureFolder, prefix: str) -> Html:
    """Learning curves of all folds."""
    last = {fold: curves[fold][-1] for fold in sorted(curves) if curves[fold]}
    ends = "; ".join(
        f"fold {fold}: {figures.epoch} epochs, Dice {format_number(figures.smoothed_dice, n_digits=3)}"
        for fold, figures in last.items()
    )
    caption = (
        "Above, the loss, which training makes smaller: solid (and smoothed) on cases that were held back, dotted on "
        "those that are learned from. A solid line that rises while the dotted one falls learns by heart. Below, the "
        "Dice on patches of the cases held back: it should have become flat. Folds whose lines lie far apart had "
        "easier or harder cases, or went wrong."
    )
    return pictures.add_chart(
        f"{prefix}-curves.png",
        lambda path: draw_learning_curves(path, curves),
        description=f"Learning curves. At the end, {ends}",
        caption=caption,
    )


def show_label_dice(evaluation: Evaluation, pictures: PictureFolder, prefix: str) -> Html:
    """Dice of every label, case by case."""
    summaries = [
        f"{summary.label}: mean {format_dice(summary.metrics['dice'].mean)}, median "
        f"{format_dice(summary.metrics['dice'].median)}"
        for summary in evaluation.labels[:N_LABELS_DESCRIBED]
    ]
    caption = (
        "Each dot is a case; 1 is a perfect overlap, 0 is none. The red, solid line is the mean and the green, dashed "
        "line the median; the box holds the middle half of the cases. A mean far left of its median comes from a few "
        "bad cases. The label with the lowest mean is on top."
    )
    return pictures.add_chart(
        f"{prefix}-dice.png",
        lambda path: draw_label_dice(path, evaluation),
        description=f"Dice per label. {'; '.join(summaries)}",
        caption=caption,
    )


def show_cases(evaluation: Evaluation, pictures: PictureFolder, prefix: str) -> Html:
    """Every case with its mean Dice."""
    known = [case for case in evaluation.cases if math.isfinite(case.mean_dice)]
    worst = min(known, key=lambda case: case.mean_dice, default=None)
    caption = (
        "One bar per case, as long as its mean Dice over labels, the worst on top. The red, solid line is the mean, "
        "the green, dashed line the median."
    )
    if len(evaluation.cases) > MAX_NAMED_CASES:
        caption += " Only the worst and the best have their names."
    if len(known) < len(evaluation.cases):
        n_empty = len(evaluation.cases) - len(known)
        caption += f" In {n_empty} of them there is nothing to find, so that they have no Dice."
    ending = f", the worst is {worst.case} with {format_dice(worst.mean_dice)}" if worst else ""
    return pictures.add_chart(
        f"{prefix}-cases.png",
        lambda path: draw_case_bars(path, evaluation),
        description=f"Mean Dice of {len(evaluation.cases)} cases{ending}",
        caption=caption,
    )


def show_confusion(plan: Plan, known: CrossValidation, pictures: PictureFolder, prefix: str) -> Html:
    """What the voxels of every label were predicted as; of many labels, only where most went wrong."""
    names = [BACKGROUND, *plan.labels.names]
    if len(names) != len(known.confusion):
        # Of a plan that has been changed since.
        names = [BACKGROUND, *(f"class {i}" for i in range(1, len(known.confusion)))]
    if len(names) > MAX_CONFUSION_CLASSES:
        text = f"The confusions that take the largest part of a label; a matrix of {len(names)} classes cannot be read."
        return join(element("p", text), show_largest_confusions(known.confusion, names))
    caption = (
        "Each row is a label as it was drawn by hand, and says what its voxels were predicted as, in percent. On the "
        "diagonal they are right. What was missed is in the column of the background, what is too much in its row, "
        "which is mostly right because most of a scan is background."
    )
    drawn = pictures.add(
        f"{prefix}-confusion.png",
        lambda path: draw_confusion(path, known.confusion, names),
        description="Confusion of labels: rows are the reference, columns the prediction",
    )
    if confusion_inches(len(names)) <= WIDTH_INCHES:
        return element("figure", drawn, element("figcaption", caption), attributes={"class": "chart"})
    width = {"style": f"width: {6 * confusion_inches(len(names)):.0f}rem"}
    scrolled = classed("div", "scroll", element("div", drawn, attributes=width))
    return classed("div", "wide-picture", figure(scrolled, caption))


def show_volumes(evaluation: Evaluation, pictures: PictureFolder, prefix: str) -> Html:
    """Volumes of predictions against those of references, for the labels that disagree most."""
    agreements = compare_volumes(evaluation)
    if not agreements:
        return element("p", "No label is in any case.")
    text = (
        "Each dot is a case: across, its volume; up, how much larger the prediction is than the reference. The red "
        "line is the mean difference, and 95 % of the cases are expected between the dashed lines (Bland and Altman). "
        "Dots that rise or fall from left to right: large structures are drawn too large, or too small."
    )
    if len(agreements) > N_PANELS:
        text += f" Of {len(agreements)} labels, these {N_PANELS} disagree most, measured by their volume."
    panels = []
    for place, agreement in enumerate(agreements[:N_PANELS], start=1):
        limits = agreement.limits_ml
        between = f", limits {limits[0]:+.3g} to {limits[1]:+.3g} ml" if limits else ""
        panels.append(
            pictures.add(
                f"{prefix}-volumes-{place}.png",
                functools.partial(draw_bland_altman, agreement=agreement),
                description=f"Volumes of {agreement.label}: mean difference {agreement.bias_ml:+.3g} ml{between}",
            )
        )
    return join(element("p", text), classed("div", "panels", *panels))


def show_calibration(calibration: Calibration, pictures: PictureFolder, prefix: str) -> Html:
    """How sure the network is, and how often it is right."""
    error = calibration.expected_error
    caption = (
        "Of all voxels for which the network is, say, 80 % sure, 80 % should be right: dots on the dashed line. Below "
        "it the network is too sure of itself, above it too cautious. The bars count the voxels: dots with few of them "
        f"matter little. On average it is off by {format_number(100 * error, n_digits=2)} percentage points (expected "
        "calibration error). Only voxels count that are labelled or predicted."
    )
    return pictures.add_chart(
        f"{prefix}-calibration.png",
        lambda path: draw_calibration(path, calibration),
        description=f"Reliability diagram; expected calibration error {format_number(error, n_digits=2)}",
        caption=caption,
    )

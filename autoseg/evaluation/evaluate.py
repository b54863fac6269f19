"""Scores of label maps against references: of one case, and summed up over cases.

What counts where. A label that is in the reference and was missed scores 0 in Dice, IoU, recall, F-beta, surface Dice
and lesion F1 and recall; its precision and its distances are not defined and do not count. A label that is not in the
reference has nothing to be found, so that no metric of it is defined, whether something was predicted or not; such
predictions are counted apart. Voxels that the reference marks as ignored are background in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from autoseg.core.geometry import joint_box
from autoseg.core.labels import mask_of
from autoseg.evaluation import surfaces
from autoseg.evaluation.intervals import bootstrap_interval
from autoseg.evaluation.lesions import count_lesions
from autoseg.evaluation.metrics import Counts, count_mask, dice, f_beta, iou, precision, recall, volume_error
from autoseg.evaluation.scores import (
    DEFAULT_SETTINGS,
    EMPTY,
    METRICS,
    MISSED,
    OK,
    ONLY_PREDICTED,
    UNKNOWN,
    CaseScore,
    Evaluation,
    LabelScore,
    LabelSummary,
    ScoreSettings,
    Statistic,
    Target,
)

Slices = tuple[slice, ...]


# -- one case ----------------------------------------------------------------------------------------------------------


def score_case(
    case: str,
    prediction: NDArray,
    reference: NDArray,
    targets: Sequence[Target],
    *,
    spacing_mm: Sequence[float],
    settings: ScoreSettings = DEFAULT_SETTINGS,
    n_threads: int = 1,
    is_known: Callable[[str], bool] = lambda name: True,
    voxel_ml: float | None = None,
) -> CaseScore:
    """Scores one label map.

    A volume of one slice is scored as the image that it is: its surface is an outline. (In an array of one slice every
    voxel of a mask would be surface.)

    Args:
        case: its name.
        prediction: (Z, Y, X) integers, not negative; or (Y, X).
        reference: the same shape.
        targets: labels and regions to score.
        spacing_mm: of the axes. The slice of a (Y, X) image counts as 1 mm thick in volumes.
        settings: of the metrics.
        n_threads: that share the targets.
        is_known: whether a target, by its name, was looked for when the reference was made.
        voxel_ml: volume of a voxel; None for that of a box of this spacing.
    """
    if voxel_ml is None:
        voxel_ml = math.prod(spacing_mm) / 1000
    thick = tuple(axis for axis, size in enumerate(reference.shape) if size > 1) or (0,)
    flat = tuple(axis for axis in range(reference.ndim) if axis not in thick)
    prediction, reference = prediction.squeeze(flat), reference.squeeze(flat)
    spacing_mm = [spacing_mm[axis] for axis in thick]
    largest = max((value for target in targets for value in target.values), default=0)
    # One pass for all labels finds where each is; what is left to do for each is as large as it and not as the volume.
    found, wanted = (ndimage.find_objects(array, max_label=max(1, largest)) for array in (prediction, reference))

    def score(target: Target) -> LabelScore:
        if not is_known(target.name):
            return _not_annotated(target)
        boxes = [box for value in target.values for box in (found[value - 1], wanted[value - 1]) if box is not None]
        box = joint_box(boxes) if boxes else (slice(0, 0),) * reference.ndim
        masks = [mask_of(array[box], target.values) for array in (prediction, reference)]
        if settings.ignore is not None:
            for mask in masks:
                mask &= reference[box] != settings.ignore
        return _score_masks(target, *masks, spacing_mm=spacing_mm, voxel_ml=voxel_ml, settings=settings)

    with ThreadPoolExecutor(max(1, n_threads)) as pool:
        scores = tuple(pool.map(score, targets))
    return CaseScore(case=case, labels=scores, mean_dice=_mean([score.dice for score in scores]))


def _score_masks(
    target: Target,
    prediction: NDArray[np.bool_],
    reference: NDArray[np.bool_],
    *,
    spacing_mm: Sequence[float],
    voxel_ml: float,
    settings: ScoreSettings,
) -> LabelScore:
    """Scores masks of at least one axis, which may be empty."""
    counts = count_mask(prediction, reference)
    planes = _planes_to_keep(prediction | reference)
    prediction, reference = prediction[np.ix_(*planes)], reference[np.ix_(*planes)]
    lesions = count_lesions(prediction, reference, min_iou=settings.min_lesion_iou)
    hd95_mm = assd_mm = math.nan
    surface_dice = 0.0 if counts.reference else math.nan
    if counts.predicted and counts.reference:
        positions_mm = [
            indices.astype(np.float64) * spacing for indices, spacing in zip(planes, spacing_mm, strict=True)
        ]
        distances_mm = surfaces.surface_distances(prediction, reference, positions_mm=positions_mm)
        hd95_mm, assd_mm = surfaces.hd95(distances_mm), surfaces.assd(distances_mm)
        surface_dice = surfaces.surface_dice(distances_mm, tolerance_mm=settings.tolerance_mm)
    return LabelScore(
        label=target.name,
        values=target.values,
        status=_status(counts),
        n_reference=counts.reference,
        n_predicted=counts.predicted,
        reference_ml=counts.reference * voxel_ml,
        predicted_ml=counts.predicted * voxel_ml,
        dice=dice(counts),
        iou=iou(counts),
        precision=precision(counts),
        recall=recall(counts),
        f_beta=f_beta(counts, beta=settings.beta),
        volume_error=volume_error(counts),
        hd95_mm=hd95_mm,
        assd_mm=assd_mm,
        surface_dice=surface_dice,
        n_lesions=lesions.reference,
        n_predicted_lesions=lesions.predicted,
        n_matched_lesions=lesions.overlap,
        lesion_f1=dice(lesions),
        lesion_recall=recall(lesions),
        lesion_precision=precision(lesions),
    )


def _not_annotated(target: Target) -> LabelScore:
    return LabelScore(
        label=target.name,
        values=target.values,
        status=UNKNOWN,
        n_reference=0,
        n_predicted=0,
        reference_ml=math.nan,
        predicted_ml=math.nan,
        n_lesions=0,
        n_predicted_lesions=0,
        n_matched_lesions=0,
        **{name: math.nan for name in METRICS},
    )


def _status(counts: Counts) -> str:
    if counts.reference:
        return OK if counts.predicted else MISSED
    return ONLY_PREDICTED if counts.predicted else EMPTY


def _planes_to_keep(mask: NDArray[np.bool_]) -> list[NDArray[np.intp]]:
    """Per axis the planes that hold a voxel of the mask, and those beside them.

    One stray voxel in a corner makes the box around a label as large as the volume. Nearly all of its planes are empty,
    and without them it is small again. What was apart stays apart, as at least one empty plane is left between.
    """
    planes = []
    for axis in range(mask.ndim):
        held = mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis))
        planes.append(np.flatnonzero(ndimage.binary_dilation(held)))
    return planes


# -- all cases ---------------------------------------------------------------------------------------------------------


def summarise_scores(
    cases: Sequence[CaseScore],
    *,
    settings: ScoreSettings,
    not_scored: Sequence[str] = (),
    model: str | None = None,
    key: str | None = None,
) -> Evaluation:
    """Sums up over cases, each with the same labels in the same order.

    NaN does not count: Dice, for instance, is averaged over the cases whose reference has the label, and counts as 0
    where it was missed; distances are averaged over the cases where they exist. How many cases that were is said beside
    each mean. The standard deviation is that of these cases (divided by their number).

    Args:
        cases: case by case.
        settings: that they were scored with.
        not_scored: references without a prediction.
        model: the sha256 of the model that made the predictions.
        key: see `Evaluation`.
    """
    labels = []
    for position, first in enumerate(cases[0].labels if cases else ()):
        scores = [case.labels[position] for case in cases]
        counts = {status: sum(score.status == status for score in scores) for status in (OK, MISSED, ONLY_PREDICTED)}
        labels.append(
            LabelSummary(
                label=first.label,
                n_cases=counts[OK] + counts[MISSED],
                n_missed=counts[MISSED],
                n_false=counts[ONLY_PREDICTED],
                metrics={name: _summarise([getattr(score, name) for score in scores]) for name in METRICS},
            )
        )
    return Evaluation(
        settings=settings,
        labels=tuple(labels),
        mean_dice=_mean([label.metrics["dice"].mean for label in labels]),
        cases=tuple(cases),
        not_scored=tuple(not_scored),
        model=model,
        key=key,
    )


def _summarise(values: Sequence[float]) -> Statistic:
    known = np.array([value for value in values if math.isfinite(value)], np.float64)
    if not known.size:
        return Statistic(n=0, mean=math.nan, std=math.nan, median=math.nan, low=math.nan, high=math.nan)
    low, high = bootstrap_interval(known)
    mean, std, median = float(known.mean()), float(known.std()), float(np.median(known))
    return Statistic(n=known.size, mean=mean, std=std, median=median, low=low, high=high)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")

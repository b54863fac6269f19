"""Measures of agreement between two masks or label maps: counts first, ratios second.

What a ratio is where there is nothing to divide by is the same for all of them: NaN where the reference is empty, since
there is nothing to be found, and 0 where something was missed. Precision is NaN as well where nothing is predicted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Voxels of one label in a reference and a prediction; or its lesions, see `autoseg.evaluation.lesions`.

    Attributes:
        overlap: in both.
        predicted: in the prediction.
        reference: in the reference.
    """

    overlap: int
    predicted: int
    reference: int


def count_mask(prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> Counts:
    """Counts the voxels of one label.

    Args:
        prediction: of any shape.
        reference: the same shape.
    """
    return Counts(
        overlap=int(np.count_nonzero(prediction & reference)),
        predicted=int(np.count_nonzero(prediction)),
        reference=int(np.count_nonzero(reference)),
    )


def count_labels(prediction: NDArray, reference: NDArray, values: Sequence[int]) -> tuple[Counts, ...]:
    """Counts the voxels of every label in one pass.

    Args:
        prediction: unsigned or signed integers of any shape, not negative.
        reference: the same shape.
        values: the labels.

    Returns:
        Counts in the order of `values`.
    """
    size = max(values) + 1
    predicted = _histogram(prediction, size)
    wanted = _histogram(reference, size)
    overlap = _histogram(reference[prediction == reference], size)
    return tuple(
        Counts(overlap=int(overlap[value]), predicted=int(predicted[value]), reference=int(wanted[value]))
        for value in values
    )


def dice(counts: Counts) -> float:
    """Dice coefficient, 2 x overlap / (predicted + reference), Dice 1945; NaN where the reference is empty."""
    return 2 * counts.overlap / (counts.predicted + counts.reference) if counts.reference else math.nan


def iou(counts: Counts) -> float:
    """Intersection over union, Jaccard 1912; NaN where the reference is empty."""
    union = counts.predicted + counts.reference - counts.overlap
    return counts.overlap / union if counts.reference else math.nan


def precision(counts: Counts) -> float:
    """Part of the prediction that is right; NaN where the prediction or the reference is empty."""
    return counts.overlap / counts.predicted if counts.predicted and counts.reference else math.nan


def recall(counts: Counts) -> float:
    """Part of the reference that was found; NaN where the reference is empty."""
    return counts.overlap / counts.reference if counts.reference else math.nan


def f_beta(counts: Counts, *, beta: float) -> float:
    """Weighted harmonic mean of precision and recall, van Rijsbergen 1979; NaN where the reference is empty.

    Args:
        counts: of a label.
        beta: recall counts this many times as much as precision; 1 gives Dice.
    """
    weighed = (1 + beta**2) * counts.overlap
    return weighed / (beta**2 * counts.reference + counts.predicted) if counts.reference else math.nan


def volume_error(counts: Counts) -> float:
    """(predicted - reference) / reference; NaN where the reference is empty."""
    return (counts.predicted - counts.reference) / counts.reference if counts.reference else math.nan


def _histogram(array: NDArray, size: int) -> NDArray[np.int64]:
    """How often 0 ... size - 1 occur; what is larger does not count, so a stray value cannot take all memory."""
    flat = array.ravel()
    if flat.max(initial=0) >= size:
        flat = flat[flat < size]
    return np.bincount(flat.astype(np.int64, copy=False), minlength=size)

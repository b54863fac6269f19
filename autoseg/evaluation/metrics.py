"""Measures of agreement between two label maps: counts first, ratios second."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Voxels of one label in a reference and a prediction.

    Attributes:
        overlap: in both.
        predicted: in the prediction.
        reference: in the reference.
    """

    overlap: int
    predicted: int
    reference: int


def count_labels(prediction: NDArray, reference: NDArray, values: Sequence[int]) -> tuple[Counts, ...]:
    """Counts every label in one pass.

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


def _histogram(array: NDArray, size: int) -> NDArray[np.int64]:
    """How often 0 ... size - 1 occur; what is larger does not count, so a stray value cannot take all memory."""
    flat = array.ravel()
    if flat.max(initial=0) >= size:
        flat = flat[flat < size]
    return np.bincount(flat.astype(np.int64, copy=False), minlength=size)

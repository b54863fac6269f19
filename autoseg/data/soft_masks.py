"""Masks in black and white whose borders are grey, as smoothing, resizing or JPEG makes them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_BLACK_BELOW, _WHITE_FROM = 32, 224
_MAX_GREY_FRACTION = 0.05

MIN_SHADES = 8
"""Between black and white, that are no list of classes. Pascal VOC, for instance, has 1 to 20, and 255 for unknown."""

WHITE = 255


def is_nearly_binary(label: NDArray) -> bool:
    """Whether a label map of 8 bits is black and white but for a few voxels between."""
    if label.dtype != np.uint8:
        return False
    counts = _counts(label)
    return bool(counts[_BLACK_BELOW:_WHITE_FROM].sum() <= _MAX_GREY_FRACTION * label.size)


def has_grey_borders(label: NDArray, *, n_shades: int = MIN_SHADES) -> bool:
    """Whether there also is something white, with at least so many shades between."""
    if not is_nearly_binary(label):
        return False
    counts = _counts(label)
    return bool(counts[_WHITE_FROM:].any() and np.count_nonzero(counts[_BLACK_BELOW:_WHITE_FROM]) >= n_shades)


def halve(label: NDArray) -> NDArray:
    """What is brighter than half as white, the rest as black; uint8."""
    return np.where(label > WHITE // 2, np.uint8(WHITE), np.uint8(0))


def _counts(label: NDArray) -> NDArray[np.int64]:
    return np.bincount(label.ravel(), minlength=WHITE + 1)

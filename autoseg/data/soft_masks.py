"""Masks in black and white whose borders are grey, as smoothing, resizing or JPEG makes them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoseg.data.raw import in_pieces

_BLACK_BELOW, _WHITE_FROM = 32, 224
_MAX_GREY_FRACTION = 0.05

MIN_SHADES = 8
"""Between black and white, that are no list of classes. Pascal VOC, for instance, has 1 to 20, and 255 for unknown."""

WHITE = 255


def has_grey_borders(label: NDArray, *, n_shades: int = MIN_SHADES) -> bool:
    """Whether a label map of 8 bits is black and white, but for a few voxels in at least so many shades between."""
    if label.dtype != np.uint8:
        return False
    counts = sum((np.bincount(piece, minlength=WHITE + 1) for piece in in_pieces(label)), np.zeros(WHITE + 1, np.int64))
    grey = counts[_BLACK_BELOW:_WHITE_FROM]
    is_mask = counts[_WHITE_FROM:].any() and grey.sum() <= _MAX_GREY_FRACTION * label.size
    return bool(is_mask and np.count_nonzero(grey) >= n_shades)


def halve(label: NDArray) -> NDArray:
    """What is brighter than half as white, the rest as black; uint8."""
    return np.where(label > WHITE // 2, np.uint8(WHITE), np.uint8(0))

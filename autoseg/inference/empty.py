"""Parts of an image that are background for sure, at which no network has to look."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from autoseg.inference.sliding_window import Place
from autoseg.planning.plan import Plan
from autoseg.preprocessing.normalize import lowest_of_ct

AIR_TOLERANCE = 0.01
"""In units of normalized intensity: splines ripple a little."""


def is_zero(occupied: NDArray[np.bool_], shape: Sequence[int], place: Place) -> bool:
    """Whether a box of the network's grid, and a little around it, has no content.

    Args:
        occupied: where the scan has some, see `autoseg.preprocessing.occupied.crop_occupied`.
        shape: of the network's grid.
        place: the box.
    """
    box = []
    for part, n_grid, n_scan in zip(place, shape, occupied.shape, strict=True):
        scale = n_scan / n_grid
        box.append(slice(max(0, math.floor(part.start * scale) - 1), math.ceil(part.stop * scale) + 1))
    return not occupied[tuple(box)].any()


def air_values(plan: Plan) -> list[float] | None:
    """What the lowest foreground is after normalization, channel by channel; None where it tells nothing.

    Nearly all that is labelled is denser, by the training cases' 0.5th percentile; unless that is the lowest of all, as
    where images were cut off at -160 and lungs are labelled.
    """
    if any(
        channel.scheme != "ct" or channel.minimum is None or channel.minimum >= channel.percentile_00_5
        for channel in plan.normalization
    ):
        return None
    return [lowest_of_ct(channel) + AIR_TOLERANCE for channel in plan.normalization]


def is_air(image: Tensor, place: Place, air: Sequence[float]) -> bool:
    """Whether a box of CT is below all foreground, and a first stage, if there is one, has found nothing there.

    Args:
        image: (C, Z, Y, X) normalized; of a second stage, what the first one has found is its last channel.
        place: the box.
        air: see `air_values`.
    """
    box = image[(slice(None), *place)]
    # A tile may lie beside a volume that is smaller than it.
    return not box.numel() or not bool((box.amax(dim=(1, 2, 3)) > box.new_tensor([*air, 0.0][: len(box)])).any())

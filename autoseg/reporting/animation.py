"""A walk through the slices of a case, as an animated GIF."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from autoseg.core.serialize import atomic_path
from autoseg.reporting.figures import OverlayRow
from autoseg.reporting.slice_pictures import N_GREYS, choose_view, draw_slice, to_picture

MAX_FRAMES = 40
EDGE_PIXELS = 360
MAX_BYTES = 1_500_000
FRAME_MS, LAST_FRAME_MS = 140, 900
N_SLICES_AROUND = 2

MEDIA_TYPE = "image/gif"
ATTEMPTS = ((N_GREYS, 1.0), (32, 1.0), (16, 1.0), (16, 0.75), (12, 0.6), (8, 0.45))
"""Shades of grey, and the edge as a part of `EDGE_PIXELS`: the first that makes a file small enough is taken."""


def choose_frames(row: OverlayRow) -> list[int]:
    """The slices with labels and a few around them; all slices where there are no labels.

    Args:
        row: the case.

    Returns:
        Ascending indices, at most `MAX_FRAMES`, evenly thinned out.
    """
    n_z = row.image.shape[0]
    has_label = np.zeros(n_z, bool)
    for label in row.labels:
        has_label |= (label > 0).any(axis=(1, 2))
    present = np.flatnonzero(has_label)
    first, last = (int(present[0]), int(present[-1])) if present.size else (0, n_z - 1)
    first, last = max(0, first - N_SLICES_AROUND), min(n_z - 1, last + N_SLICES_AROUND)
    n_frames = min(MAX_FRAMES, last - first + 1)
    return np.rint(np.linspace(first, last, n_frames)).astype(int).tolist()


def write_animation(path: Path, row: OverlayRow, *, max_bytes: int = MAX_BYTES) -> list[int]:
    """Writes the slices of a case one after the other, from feet to head, with the borders of its labels.

    The file has few enough colours to stay below a size; where that does not suffice, it becomes smaller.

    Args:
        path: of the GIF.
        row: the case; its title is left to the caller.
        max_bytes: of the file, as far as the last of `ATTEMPTS` allows.

    Returns:
        The indices of the slices.
    """
    frames = choose_frames(row)
    data = b""
    for n_greys, part in ATTEMPTS:
        data = _encode(row, frames, edge_pixels=round(EDGE_PIXELS * part), n_greys=n_greys)
        if len(data) <= max_bytes:
            break
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return frames


def _encode(row: OverlayRow, frames: list[int], *, edge_pixels: int, n_greys: int) -> bytes:
    view = choose_view(row, edge_pixels=edge_pixels)
    first, *others = (to_picture(draw_slice(row, z, view, n_greys=n_greys), z) for z in frames)
    buffer = io.BytesIO()
    durations_ms = [FRAME_MS] * len(others) + [LAST_FRAME_MS]
    first.save(buffer, "gif", save_all=True, append_images=others, duration=durations_ms, loop=0, optimize=False)
    return buffer.getvalue()

"""Slices of a case with the borders of reference and prediction, drawn with numpy: quick enough for animations.

Slices are seen as radiologists see them: anterior up, the patient's right on the left. They are cut to where labels
are. Borders of the reference are wide and green with a dark rim, those of the prediction thin and red with white
dashes, on top: they are told apart without colours too.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import maximum_filter, minimum_filter

from autoseg.core.serialize import atomic_path
from autoseg.reporting.charts import safe_text
from autoseg.reporting.figures import (
    PREDICTION_COLOUR,
    REFERENCE_COLOUR,
    OverlayRow,
    choose_slices,
    choose_window,
    coarse_steps,
)

N_GREYS = 64
BLACK, WHITE = 0, N_GREYS - 1
GREEN, RED, TEXT = range(N_GREYS, N_GREYS + 3)
TEXT_COLOUR = "#ffd040"
STILL_EDGE_PIXELS = 480
REFERENCE_PIXELS, PREDICTION_PIXELS, RIM_PIXELS = 6, 3, 3
"""Widths of lines at `STILL_EDGE_PIXELS`; both sides of the rim together."""

MIN_REFERENCE_PIXELS, MIN_PREDICTION_PIXELS = 3, 2
DASH_PIXELS, WHITE_DASH_PIXELS = 13, 4
GAP_PIXELS = 4
TITLE_PIXELS = 26
MEDIA_TYPE = "image/jpeg"

MARGIN_FRACTION = 0.3
MIN_VIEW_MM = 40.0


@dataclass(frozen=True, kw_only=True)
class View:
    """How slices of a case are cut, enlarged and lit.

    Attributes:
        rows, columns: first and last + 1 along y and x.
        shape: (height, width) of the picture, in pixels; in true proportion.
        window: the intensities shown as black and white.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    shape: tuple[int, int]
    window: tuple[float, float]


def choose_view(row: OverlayRow, *, edge_pixels: int) -> View:
    """The part of a case's slices that has all labels, with a margin; the whole slices where there are none.

    Args:
        row: the case.
        edge_pixels: the longer edge of the picture.
    """
    _, n_y, n_x = row.image.shape
    rows, columns = (0, n_y), (0, n_x)
    found = np.zeros((n_y, n_x), bool)
    for label in row.labels:
        found |= (label > 0).any(axis=0)
    if found.any():
        rows = _widen(np.flatnonzero(found.any(axis=1)), n_y, row.spacing_mm[1])
        columns = _widen(np.flatnonzero(found.any(axis=0)), n_x, row.spacing_mm[2])
    height_mm, width_mm = (rows[1] - rows[0]) * row.spacing_mm[1], (columns[1] - columns[0]) * row.spacing_mm[2]
    longest_mm = max(height_mm, width_mm)
    # No thinner than this, or a slice of a needle would have no pixels.
    height, width = (max(round(edge_pixels * size / longest_mm), edge_pixels // 8) for size in (height_mm, width_mm))
    coarse = coarse_steps(row.image.shape)
    window = row.window or choose_window(row.image[coarse], [label[coarse] for label in row.labels])
    return View(rows=rows, columns=columns, shape=(height, width), window=window)


def _widen(places: NDArray[np.integer], size: int, step_mm: float) -> tuple[int, int]:
    """First and last + 1 of the places with a margin, within the size."""
    first, last = int(places[0]), int(places[-1]) + 1
    missing = max(0.0, MIN_VIEW_MM / step_mm - (last - first)) / 2
    margin = int(np.ceil(max(MARGIN_FRACTION * (last - first) / 2, missing, 2)))
    return max(0, first - margin), min(size, last + margin)


def draw_slice(row: OverlayRow, z: int, view: View, *, n_greys: int = N_GREYS) -> NDArray[np.uint8]:
    """One slice.

    Args:
        row: the case.
        z: index of the slice.
        view: see `choose_view`.
        n_greys: shades of grey; fewer make smaller files.

    Returns:
        `view.shape`, entries of `palette()`.
    """
    cut = slice(*view.rows), slice(*view.columns)
    low, high = view.window
    light = np.nan_to_num((row.image[z][cut].astype(np.float32) - low) / (high - low), nan=0.0).clip(0, 1)
    height, width = view.shape
    # y grows to anterior, which is up; x grows to the patient's right, which is on the left.
    seen = Image.fromarray(np.ascontiguousarray(light[::-1, ::-1]))
    enlarged = seen.resize((width, height), Image.Resampling.BICUBIC)
    shades = np.rint(np.asarray(enlarged).clip(0, 1) * (n_greys - 1)) * ((N_GREYS - 1) / (n_greys - 1))
    drawn = np.rint(shades).astype(np.uint8)
    scale = max(view.shape) / STILL_EDGE_PIXELS
    if row.reference is not None:
        label = _fit(row.reference[z][cut], view.shape)
        line = max(MIN_REFERENCE_PIXELS, int(REFERENCE_PIXELS * scale))
        drawn[find_outline(label, line + max(2, int(RIM_PIXELS * scale)))] = BLACK
        drawn[find_outline(label, line)] = GREEN
    if row.prediction is not None:
        label = _fit(row.prediction[z][cut], view.shape)
        line = max(MIN_PREDICTION_PIXELS, int(PREDICTION_PIXELS * scale))
        y, x = np.nonzero(find_outline(label, line))
        drawn[y, x] = np.where((y + x) % DASH_PIXELS < WHITE_DASH_PIXELS, WHITE, RED)
    return drawn


def _fit(label: NDArray, shape: tuple[int, int]) -> NDArray:
    """(Y, X) to `shape` by the nearest neighbour, seen as radiologists see it."""
    y, x = (((np.arange(n) + 0.5) * size / n).astype(int) for n, size in zip(shape, label.shape, strict=True))
    return label[::-1, ::-1][np.ix_(y, x)]


def find_outline(label: NDArray, width: int) -> NDArray[np.bool_]:
    """The pixels, in a line about `width` wide, where the value changes or foreground ends at the edge. (Y, X)."""
    if not label.any():
        return np.zeros(label.shape, bool)
    around = {"size": width + 1, "mode": "constant", "cval": 0}
    return maximum_filter(label, **around) != minimum_filter(label, **around)


def palette() -> NDArray[np.uint8]:
    """(N, 3): the greys, then the colours of reference, prediction and text."""
    greys = np.rint(np.linspace(0, 255, N_GREYS))[:, np.newaxis].repeat(3, axis=1)
    colours = [np.multiply(to_rgb(colour), 255) for colour in (REFERENCE_COLOUR, PREDICTION_COLOUR, TEXT_COLOUR)]
    return np.rint(np.concatenate([greys, colours])).astype(np.uint8)


def to_picture(drawn: NDArray[np.uint8], z: int) -> Image.Image:
    """A slice as a picture with a palette, with the sides of the patient and the slice's index written on it."""
    picture = Image.fromarray(drawn)
    picture.putpalette(palette().tobytes())
    size = max(11, min(round(max(drawn.shape) / 27), min(drawn.shape) // 4))
    write, height, width = ImageDraw.Draw(picture), *drawn.shape
    for text, x, y, anchor in (
        ("R", 0.02 * width, height / 2, "lm"),
        ("L", 0.98 * width, height / 2, "rm"),
        (f"z {z}", 0.02 * width, 0.98 * height, "ld"),
    ):
        write.text((x, y), text, fill=TEXT, anchor=anchor, font=_font(size), stroke_width=2, stroke_fill=BLACK)
    return picture


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf"), size)


@dataclass(frozen=True, kw_only=True, eq=False)
class Slices:
    """A few slices of one case.

    Attributes:
        pictures: side by side from the lowest to the highest.
        indices: of these slices.
    """

    pictures: tuple[Image.Image, ...]
    indices: tuple[int, ...]

    def files(self) -> list[bytes]:
        """Files of `MEDIA_TYPE`."""
        files = []
        for picture in self.pictures:
            buffer = io.BytesIO()
            # Full resolution of colour, or the thin lines would fray.
            picture.convert("RGB").save(buffer, "jpeg", quality=82, subsampling=0, optimize=True)
            files.append(buffer.getvalue())
        return files


def write_strip(path: Path, pictures: Sequence[Image.Image], *, title: str) -> Path:
    """Writes pictures beside each other as one PNG with a title above."""
    height = max(picture.height for picture in pictures) + TITLE_PIXELS
    width = sum(picture.width + GAP_PIXELS for picture in pictures) - GAP_PIXELS
    whole = Image.new("RGB", (width, height), "white")
    text = safe_text(title).replace(r"\$", "$")
    ImageDraw.Draw(whole).text((2, TITLE_PIXELS / 2), text, fill="black", anchor="lm", font=_font(14))
    left = 0
    for picture in pictures:
        whole.paste(picture.convert("RGB"), (left, TITLE_PIXELS))
        left += picture.width + GAP_PIXELS
    with atomic_path(path) as temporary:
        whole.quantize(256, dither=Image.Dither.NONE).save(temporary, "png")
    return path


def draw_slices(row: OverlayRow, *, n_slices: int = 3, is_about_errors: bool = False) -> Slices:
    """Draws the slices of a case that are worth seeing.

    Args:
        row: the case; its title is left to the caller.
        n_slices: at most so many.
        is_about_errors: those where reference and prediction differ most, rather than those with most labels.
    """
    in_plane = (slice(None), *coarse_steps(row.image.shape[1:]))
    labels: Sequence[NDArray] = [label[in_plane] for label in row.labels]
    if is_about_errors and len(labels) == 2:
        wrong = (labels[0] != labels[1]).astype(np.uint8)
        labels = [wrong] if wrong.any() else labels
    indices = choose_slices(labels, n_z=row.image.shape[0], n_slices=n_slices)
    view = choose_view(row, edge_pixels=STILL_EDGE_PIXELS)
    return Slices(pictures=tuple(to_picture(draw_slice(row, z, view), z) for z in indices), indices=tuple(indices))

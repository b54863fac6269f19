"""Slices of a case with all its labels in colours of their own, as pictures for a page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from autoseg.reporting.figures import OverlayRow, choose_slices, choose_window, coarse_steps, find_borders, orient
from autoseg.reporting.html import PALETTE, Html, classed, element, picture

HEIGHT_PIXELS = 480
DPI = 110
MEDIA_TYPE = "image/jpeg"
FILL_OPACITY = 0.33
OUTLINE = (withStroke(linewidth=2, foreground="#000000b0"),)

MIN_NUMBERED_FRACTION = 0.002
"""Where colours repeat, regions that take more of a slice than this have the label's value written on them."""


@dataclass(frozen=True, kw_only=True)
class LabelSlices:
    """Pictures of one case.

    Attributes:
        pictures: files of `MEDIA_TYPE`, from the lowest slice to the highest.
        indices: of those slices.
        values: the labels that can be seen, ascending.
    """

    pictures: tuple[bytes, ...]
    indices: tuple[int, ...]
    values: tuple[int, ...]


def colour_of(value: int, values: Sequence[int]) -> str:
    """The colour of a label, by its place among all values of the dataset; colours repeat."""
    place = values.index(value) if value in values else value
    return PALETTE[place % len(PALETTE)]


def show_label_slices(drawn: LabelSlices, *, title: str) -> Html:
    """The pictures side by side.

    Args:
        drawn: from `draw_label_slices`.
        title: of the case.
    """
    pictures = (
        picture(data, MEDIA_TYPE, description=f"{title}, slice {index}")
        for data, index in zip(drawn.pictures, drawn.indices, strict=True)
    )
    return classed("div", "pictures", *pictures)


def show_legend(drawn: LabelSlices, labels: Mapping[int, str]) -> Html | None:
    """The colour, name and value of each label that can be seen; None where there is none.

    Args:
        drawn: from `draw_label_slices`.
        labels: names of all values of the dataset, in its order.
    """
    items = []
    for value in drawn.values:
        colour = {"width": "14", "height": "14", "rx": "3", "fill": colour_of(value, list(labels))}
        square = element("rect", attributes=colour)
        sample = element("svg", square, attributes={"viewBox": "0 0 16 14", "aria-hidden": "true"})
        items.append(element("li", sample, f"{labels.get(value, 'unknown')} ({value})"))
    return classed("ul", "legend", *items) if items else None


def draw_label_slices(row: OverlayRow, values: Sequence[int], *, n_slices: int = 3) -> LabelSlices:
    """Draws axial slices of one case with its reference, or with its prediction where it has none.

    Slices are seen as radiologists see them: anterior up, the patient's right on the left.

    Args:
        row: the case; its title is left to the caller.
        values: of all labels of the dataset, as in the files.
        n_slices: at most so many.
    """
    label = row.labels[0] if row.labels else np.zeros(row.image.shape, np.uint8)
    coarse = coarse_steps(row.image.shape)
    in_plane = (slice(None), *coarse[1:])
    indices = choose_slices([label[in_plane]], n_z=label.shape[0], n_slices=n_slices)
    window = row.window or choose_window(row.image[coarse], [label[coarse]])
    seen = np.unique(label[indices])
    return LabelSlices(
        pictures=tuple(_draw(row, label[z], z, window, values) for z in indices),
        indices=tuple(indices),
        values=tuple(int(value) for value in seen if value > 0),
    )


def _draw(row: OverlayRow, label: NDArray, z: int, window: tuple[float, float], values: Sequence[int]) -> bytes:
    step_y, step_x = row.spacing_mm[1], row.spacing_mm[2]
    width_mm, height_mm = row.image.shape[2] * step_x, row.image.shape[1] * step_y
    height = HEIGHT_PIXELS / DPI
    figure = Figure(figsize=(height * float(np.clip(row.aspect, 0.5, 2.0)), height), dpi=DPI, facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    extent = (0, width_mm, 0, height_mm)
    axes.imshow(
        row.image[z].astype(np.float32), cmap="gray", vmin=window[0], vmax=window[1], origin="lower", extent=extent
    )
    fill = np.zeros((*label.shape, 4), np.float32)
    for value in np.unique(label[label > 0]).tolist():
        inside, colour = label == value, colour_of(value, values)
        fill[inside] = (*to_rgb(colour), FILL_OPACITY)
        borders = find_borders(inside) * (step_x, step_y)
        axes.add_collection(LineCollection(list(borders), colors=colour, linewidths=1.2, capstyle="projecting"))
        if len(values) > len(PALETTE) and inside.mean() > MIN_NUMBERED_FRACTION:
            _write_value(axes, inside, value, (step_y, step_x))
    axes.imshow(fill, origin="lower", extent=extent, interpolation="nearest")
    orient(axes, width_mm, height_mm, z, fontsize=13, effects=OUTLINE)
    buffer = io.BytesIO()
    # Full resolution of colour, or the thin lines would fray.
    figure.savefig(buffer, format="jpeg", pil_kwargs={"quality": 82, "subsampling": 0, "optimize": True})
    return buffer.getvalue()


def _write_value(axes: Axes, inside: NDArray[np.bool_], value: int, step_mm: tuple[float, float]) -> None:
    """On the pixel of the region that is nearest to its centre, which itself may lie outside."""
    pixels = np.argwhere(inside)
    y, x = pixels[np.argmin(np.square(pixels - pixels.mean(axis=0)).sum(axis=1))]
    axes.text(
        (x + 0.5) * step_mm[1],
        (y + 0.5) * step_mm[0],
        str(value),
        color="white",
        fontsize=8,
        path_effects=OUTLINE,
        ha="center",
        va="center",
    )

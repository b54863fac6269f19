"""Pictures of segmentations and of training, as PNG files.

Matplotlib is used through its objects, never through pyplot, which keeps global state and looks for a display.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import AbstractPathEffect
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from autoseg.core.runtime import format_duration
from autoseg.core.serialize import atomic_path
from autoseg.training.record import EpochFigures

DPI = 110
PANEL_HEIGHT_INCHES = 3.0
ROW_TITLE_INCHES = 0.34
LEGEND_INCHES = 0.34
GAP_INCHES = 0.06
# The reference is drawn first and wider, so that where both run together a red line with green rims is seen.
REFERENCE_COLOUR, REFERENCE_WIDTH = "#00d040", 2.4
PREDICTION_COLOUR, PREDICTION_WIDTH = "#ff2020", 1.0
MAX_EDGE_TO_SEARCH = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class OverlayRow:
    """One case of an overlay. Arrays are in canonical orientation (RAS+).

    Attributes:
        title: written above the slices.
        image: (Z, Y, X).
        spacing_mm: (z, y, x).
        reference: (Z, Y, X), integers, 0 is background; None where there is none.
        prediction: likewise.
        window: the intensities shown as black and white; None chooses them by what is labelled.
    """

    title: str
    image: NDArray
    spacing_mm: Sequence[float]
    reference: NDArray | None = None
    prediction: NDArray | None = None
    window: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name, label in (("reference", self.reference), ("prediction", self.prediction)):
            if label is not None and label.shape != self.image.shape:
                raise ValueError(f"{self.title}: {name} has shape {label.shape}, the image has {self.image.shape}")

    @property
    def labels(self) -> list[NDArray]:
        """Reference and prediction, where present."""
        return [label for label in (self.reference, self.prediction) if label is not None]

    @property
    def aspect(self) -> float:
        """Width of a slice by its height."""
        _, n_y, n_x = self.image.shape
        return n_x * self.spacing_mm[2] / (n_y * self.spacing_mm[1])


def draw_overlays(path: Path, rows: Sequence[OverlayRow], *, n_slices: int = 3) -> Path:
    """Draws axial slices of cases, one case below the other, and borders of labels: reference green, prediction red.

    Slices are seen as radiologists see them: anterior up, the patient's right on the left.

    Args:
        path: of the PNG.
        rows: the cases, at least one.
        n_slices: at most so many of each case; those with most foreground, spread over its extent.

    Returns:
        The path.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("an overlay needs at least one row")
    chosen = [choose_slices(row.labels, n_z=row.image.shape[0], n_slices=n_slices) for row in rows]
    # A very long or very thin slice would make the picture unwieldy; it is then shown smaller, in true proportion.
    cell_width = PANEL_HEIGHT_INCHES * float(np.clip(max(row.aspect for row in rows), 0.5, 2.5))
    width = max(len(slices) for slices in chosen) * (cell_width + GAP_INCHES) + GAP_INCHES
    row_height = PANEL_HEIGHT_INCHES + ROW_TITLE_INCHES
    height = len(rows) * row_height + LEGEND_INCHES
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    for i, (row, slices) in enumerate(zip(rows, chosen, strict=True)):
        bottom = height - (i + 1) * row_height
        figure.text(
            GAP_INCHES / width, (bottom + PANEL_HEIGHT_INCHES + 0.11) / height, row.title, fontsize=10, va="bottom"
        )
        window = row.window or choose_window(row.image, row.labels)
        for j, z in enumerate(slices):
            left = GAP_INCHES + j * (cell_width + GAP_INCHES)
            box = (left / width, bottom / height, cell_width / width, PANEL_HEIGHT_INCHES / height)
            _draw_slice(figure.add_axes(box), row, z, window)
    _draw_legend(figure, rows)
    return save_figure(figure, path)


def coarse_steps(shape: Sequence[int]) -> tuple[slice, ...]:
    """Every n-th voxel of large volumes, on which slices and window are chosen: that is quick, and good enough."""
    return tuple(slice(None, None, -(-size // MAX_EDGE_TO_SEARCH)) for size in shape)


def choose_slices(labels: Sequence[NDArray], *, n_z: int, n_slices: int) -> list[int]:
    """The slices worth seeing: those with most foreground that are not too close together.

    Every class counts the same however large it is, so that small structures are seen too.

    Args:
        labels: (Z, Y, X) each, integers; may be empty.
        n_z: slices of the volume.
        n_slices: wanted.

    Returns:
        Ascending indices, at least one and at most `n_slices`; evenly spread where there is no foreground.
    """
    score = np.zeros(n_z)
    for label in labels:
        for value in np.unique(label[label > 0]):
            counts = np.count_nonzero(label == value, axis=(1, 2))
            score += counts / counts.max()
    present = np.flatnonzero(score)
    if not present.size:
        return sorted({int((i + 0.5) * n_z / n_slices) for i in range(n_slices)})
    # At half of the even distance there is always room for all, wherever the first ones lie.
    distance = max(1, int(present[-1] - present[0] + 1) // (2 * n_slices))
    chosen: list[int] = []
    while score.any() and len(chosen) < n_slices:
        best = int(np.argmax(score))
        chosen.append(best)
        score[max(0, best - distance + 1) : best + distance] = 0
    return sorted(chosen)


def choose_window(image: NDArray, labels: Sequence[NDArray]) -> tuple[float, float]:
    """Intensities to show as black and white: those of the foreground and as much again on either side.

    Args:
        image: (Z, Y, X).
        labels: (Z, Y, X) each, integers; without foreground the window spans the image but for its extremes.

    Returns:
        The lower and the higher intensity, which differ.
    """
    values = image[np.isfinite(image)].astype(np.float64)
    if not values.size:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(values, (0.5, 99.5)))
    inside = np.zeros(image.shape, bool)
    for label in labels:
        inside |= label > 0
    inside &= np.isfinite(image)
    if inside.any():
        first, last = (float(value) for value in np.percentile(image[inside].astype(np.float64), (2, 98)))
        margin = last - first
        # Beyond the range of the whole image there is nothing to show.
        low, high = max(low, first - margin), min(high, last + margin)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def find_borders(label: NDArray) -> NDArray[np.float64]:
    """The edges between pixels of different value, and those between foreground and the outside of the array.

    Args:
        label: (Y, X), integers.

    Returns:
        (N, 2, 2): N segments, each two points (x, y) in pixels, where pixel (0, 0) spans 0 to 1 on both axes.
    """
    padded = np.pad(label, 1)
    y, x = np.nonzero(padded[:, 1:] != padded[:, :-1])
    upright = np.stack([np.stack([x, y - 1], -1), np.stack([x, y], -1)], 1)
    y, x = np.nonzero(padded[1:] != padded[:-1])
    level = np.stack([np.stack([x - 1, y], -1), np.stack([x, y], -1)], 1)
    return np.concatenate([upright, level]).astype(np.float64)


def _draw_slice(axes: Axes, row: OverlayRow, z: int, window: tuple[float, float]) -> None:
    step_y, step_x = row.spacing_mm[1], row.spacing_mm[2]
    width_mm, height_mm = row.image.shape[2] * step_x, row.image.shape[1] * step_y
    axes.imshow(
        row.image[z].astype(np.float32),
        cmap="gray",
        vmin=window[0],
        vmax=window[1],
        origin="lower",
        extent=(0, width_mm, 0, height_mm),
    )
    for label, colour, line_width in (
        (row.reference, REFERENCE_COLOUR, REFERENCE_WIDTH),
        (row.prediction, PREDICTION_COLOUR, PREDICTION_WIDTH),
    ):
        if label is not None and label[z].any():
            borders = find_borders(label[z]) * (step_x, step_y)
            axes.add_collection(
                LineCollection(list(borders), colors=colour, linewidths=line_width, capstyle="projecting")
            )
    orient(axes, width_mm, height_mm, z, fontsize=9)


def orient(
    axes: Axes,
    width_mm: float,
    height_mm: float,
    z: int,
    *,
    fontsize: float,
    effects: Sequence[AbstractPathEffect] = (),
) -> None:
    """Turns an axial slice as radiologists see it, and writes R, L and its number on it.

    Args:
        axes: with the slice, x to the patient's right and y to the front.
        width_mm, height_mm: of the slice.
        z: its number.
        fontsize: of what is written.
        effects: on that.
    """
    # y grows to anterior, which is up; x grows to the patient's right, which is on the left.
    axes.set_xlim(width_mm, 0)
    axes.set_ylim(0, height_mm)
    axes.set_aspect("equal")
    axes.set_axis_off()
    for text, x, y, across in (("R", 0.015, 0.5, "left"), ("L", 0.985, 0.5, "right"), (f"z {z}", 0.015, 0.03, "left")):
        axes.text(
            x, y, text, transform=axes.transAxes, color="#ffd040", fontsize=fontsize, ha=across, path_effects=effects
        )


def _draw_legend(figure: Figure, rows: Sequence[OverlayRow]) -> None:
    entries = []
    if any(row.reference is not None for row in rows):
        entries.append(Line2D([], [], color=REFERENCE_COLOUR, linewidth=REFERENCE_WIDTH, label="reference"))
    if any(row.prediction is not None for row in rows):
        entries.append(Line2D([], [], color=PREDICTION_COLOUR, linewidth=PREDICTION_WIDTH, label="prediction"))
    if entries:
        figure.legend(handles=entries, loc="lower center", ncols=2, fontsize=9, frameon=False, borderaxespad=0.1)


def draw_curves(path: Path, epochs: Sequence[EpochFigures], *, title: str = "") -> Path:
    """Draws how a training went: losses, Dice on patches of the validation cases, learning rate.

    Args:
        path: of the PNG.
        epochs: in order.
        title: written above.

    Returns:
        The path.
    """
    figure = Figure(figsize=(8, 7), dpi=DPI, facecolor="white", layout="constrained")
    losses, dice, rate = cast(list[Axes], list(figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1))))
    epoch = np.array([figures.epoch for figures in epochs])

    _draw_line(losses, epoch, [figures.train_loss for figures in epochs], "#1f77b4", "training")
    _draw_line(losses, epoch, [figures.validation_loss for figures in epochs], "#d9541e", "validation")
    losses.set_ylabel("loss")
    _draw_line(dice, epoch, [figures.validation_dice for figures in epochs], "#9fd3a5", "each epoch")
    _draw_line(dice, epoch, [figures.smoothed_dice for figures in epochs], "#1b7a2b", "smoothed")
    dice.set_ylabel("mean Dice of patches")
    dice.set_ylim(0, 1)
    _draw_line(rate, epoch, [figures.learning_rate for figures in epochs], "#555555", "")
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    rate.set_xlabel("epoch")
    if epochs:
        rate.set_xlim(epoch.min() - 0.5, epoch.max() + 0.5)
    rate.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (losses, dice, rate):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=9)

    pace = f"after {format_duration(epochs[-1].time_s)}" if epochs else ""
    figure.suptitle(", ".join(part for part in (title, pace) if part), fontsize=11)
    return save_figure(figure, path)


def _draw_line(axes: Axes, epoch: NDArray, numbers: Sequence[float], colour: str, name: str) -> None:
    values = np.array(numbers, np.float64)
    known = np.isfinite(values)
    if not known.any():
        return
    # Few points would be invisible as a line. Gaps are bridged: an epoch's patches may have none of the labels.
    marker = "o" if known.sum() <= 3 else ""
    axes.plot(epoch[known], values[known], color=colour, label=name or "_", marker=marker, markersize=4)


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes the figure as a PNG."""
    FigureCanvasAgg(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    return path

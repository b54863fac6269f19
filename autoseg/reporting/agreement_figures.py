"""Charts of how predictions and references agree: confusion of labels, volumes, and the network's confidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from autoseg.evaluation.crossval import Calibration
from autoseg.evaluation.scores import Evaluation
from autoseg.reporting.charts import (
    BAR,
    FAINT,
    INK,
    LINE_COLOURS,
    MEAN_COLOUR,
    SMALL_SIZE,
    TEXT_SIZE,
    TINY_SIZE,
    WIDTH_INCHES,
    new_figure,
    safe_names,
    tidy_axes,
)
from autoseg.reporting.figures import save_figure
from autoseg.reporting.html import NO_VALUE
from autoseg.reporting.results_figures import collect_scores

MAX_CONFUSION_CLASSES = 20
N_PANELS = 9
PANEL_INCHES = (3.3, 2.9)
MINUS = "\N{MINUS SIGN}"
LIMITS = 1.96
"""Standard deviations to either side of the mean difference that hold 95 % of normally distributed differences."""


@dataclass(frozen=True, kw_only=True, eq=False)
class VolumeAgreement:
    """Volumes of one label in references and predictions, over the cases where either has it.

    Attributes:
        label: its name.
        mean_ml: (cases,), of reference and prediction.
        difference_ml: (cases,), prediction - reference.
    """

    label: str
    mean_ml: NDArray[np.float64]
    difference_ml: NDArray[np.float64]

    @property
    def bias_ml(self) -> float:
        """Mean difference."""
        return float(self.difference_ml.mean())

    @property
    def limits_ml(self) -> tuple[float, float] | None:
        """Limits of agreement (Bland and Altman, Lancet 1986); None for fewer than two cases."""
        if self.difference_ml.size < 2:
            return None
        room = LIMITS * float(self.difference_ml.std(ddof=1))
        return self.bias_ml - room, self.bias_ml + room

    @property
    def disagreement(self) -> float:
        """The limit that is farther from 0, as a fraction of the mean volume."""
        limits = self.limits_ml or (self.bias_ml, self.bias_ml)
        return max(abs(limits[0]), abs(limits[1])) / float(self.mean_ml.mean())


def compare_volumes(evaluation: Evaluation) -> list[VolumeAgreement]:
    """The agreement of every label that any case has, the one with the largest disagreement first."""
    references, predictions = (collect_scores(evaluation, name) for name in ("reference_ml", "predicted_ml"))
    found = []
    for summary, reference, prediction in zip(evaluation.labels, references.T, predictions.T, strict=True):
        known = np.isfinite(reference) & np.isfinite(prediction) & (reference + prediction > 0)
        if known.any():
            mean_ml, difference_ml = (reference + prediction)[known] / 2, (prediction - reference)[known]
            found.append(VolumeAgreement(label=summary.label, mean_ml=mean_ml, difference_ml=difference_ml))
    return sorted(found, key=lambda agreement: -agreement.disagreement)


def draw_bland_altman(path: Path, agreement: VolumeAgreement) -> Path:
    """Draws the difference of predicted and reference volume against their mean (Bland and Altman, Lancet 1986).

    Args:
        path: of the PNG.
        agreement: of one label.

    Returns:
        The path.
    """
    width, height = PANEL_INCHES
    figure = new_figure(height, width_inches=width)
    axes = figure.subplots()
    n = agreement.mean_ml.size
    axes.scatter(
        agreement.mean_ml,
        agreement.difference_ml,
        s=14 if n <= 100 else 6,
        c=LINE_COLOURS[0],
        alpha=0.55,
        linewidths=0,
        zorder=3,
    )
    axes.axhline(0, color=FAINT, linewidth=0.8)
    axes.axhline(agreement.bias_ml, zorder=2, color=MEAN_COLOUR, linewidth=2)
    lines = [(agreement.bias_ml, f"mean {agreement.bias_ml:+.3g}")]
    for limit in agreement.limits_ml or ():
        axes.axhline(limit, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), zorder=2)
        lines.append((limit, f"{limit:+.3g}"))
    # Room on the right for the numbers of the lines, and above and below for the lines themselves.
    low, high = float(agreement.mean_ml.min()), float(agreement.mean_ml.max())
    span = (high - low) or max(abs(high), 1e-6)
    axes.set_xlim(low - 0.06 * span, high + 0.48 * span)
    reach = max(*(abs(value) for value, _ in lines), float(np.abs(agreement.difference_ml).max()), 1e-9)
    axes.set_ylim(-1.18 * reach, 1.18 * reach)
    # Where the limits are close to the mean, the numbers are moved apart.
    least = 0.21 * reach
    placed = sorted(lines)
    middle = next(i for i, (_, text) in enumerate(placed) if text.startswith("mean"))
    for i, (value, text) in enumerate(placed):
        y = placed[middle][0] + np.sign(i - middle) * max(abs(value - placed[middle][0]), least)
        axes.text(
            0.985,
            y + 0.035 * reach,
            text,
            transform=axes.get_yaxis_transform(),
            fontsize=TINY_SIZE,
            color=INK,
            ha="right",
            va="bottom",
            zorder=4,
            bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.1},
        )
    axes.set_title(safe_names([agreement.label], longest=30)[0], fontsize=TEXT_SIZE, color=INK, loc="left")
    axes.set_xlabel("mean of both, ml")
    axes.set_ylabel(f"prediction {MINUS} reference, ml")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    tidy_axes(axes)
    axes.yaxis.label.set_fontsize(TINY_SIZE + 0.5)
    axes.xaxis.label.set_fontsize(TINY_SIZE + 0.5)
    return save_figure(figure, path)


def normalise_rows(confusion: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """Counts as parts of their row; rows without any are NaN. (K, K) to (K, K)."""
    counts = np.array(confusion, np.float64)
    totals = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)


def confusion_inches(n_classes: int) -> float:
    """How wide a matrix of so many classes is drawn."""
    return max(WIDTH_INCHES, 2.0 + 0.42 * n_classes)


def draw_confusion(path: Path, confusion: Sequence[Sequence[int]], names: Sequence[str]) -> Path:
    """Draws what the voxels of every class of the reference (rows) were predicted as (columns), in percent of the row.

    Args:
        path: of the PNG.
        confusion: (K, K) voxels.
        names: of the K classes.

    Returns:
        The path.
    """
    parts, n = normalise_rows(confusion), len(names)
    edge = confusion_inches(n)
    figure = new_figure(edge * 0.92, width_inches=edge)
    axes = figure.subplots()
    axes.imshow(np.nan_to_num(parts), cmap="Blues", vmin=0, vmax=1.05)
    size = 11.5 if n <= 5 else SMALL_SIZE if n <= 10 else TINY_SIZE
    for row, column in np.ndindex(n, n):
        part = parts[row, column]
        axes.text(
            column,
            row,
            _tell_percent(float(part)),
            ha="center",
            va="center",
            fontsize=size,
            color="white" if part > 0.55 else INK,
        )
    short = safe_names(names, longest=18)
    axes.set_xticks(range(n), short, rotation=45 if n <= 5 else 90, ha="right" if n <= 5 else "center")
    axes.set_yticks(range(n), short)
    axes.set_xlabel("predicted as, in % of the row", fontsize=TEXT_SIZE, color=INK)
    axes.set_ylabel("in the reference", fontsize=TEXT_SIZE, color=INK)
    axes.tick_params(labelsize=SMALL_SIZE, colors=INK, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xticks(np.arange(n + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(n + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#d9dfe5", linewidth=0.7)
    axes.tick_params(which="minor", length=0)
    return save_figure(figure, path)


def _tell_percent(part: float) -> str:
    if not np.isfinite(part):
        return NO_VALUE
    return "" if part == 0 else "<1" if part < 0.005 else f"{100 * part:.0f}"


def draw_calibration(path: Path, calibration: Calibration) -> Path:
    """Draws how often the network is right against how sure it is, with the number of voxels below.

    Args:
        path: of the PNG.
        calibration: at least one voxel.

    Returns:
        The path.
    """
    figure = new_figure(5.4)
    axes, below = cast(list[Axes], list(figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))))
    n_voxels = np.array(calibration.n_voxels, np.float64)
    edges = np.linspace(0, 1, len(n_voxels) + 1)
    sure, right = np.array(calibration.confidence, np.float64), np.array(calibration.accuracy, np.float64)
    known = np.isfinite(sure) & np.isfinite(right) & (n_voxels > 0)
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1.4, linestyle=(0, (5, 3)))
    axes.vlines(sure[known], sure[known], right[known], color=LINE_COLOURS[1], linewidth=3, alpha=0.45)
    axes.plot(sure[known], right[known], color=LINE_COLOURS[0], linewidth=1.8, marker="o", markersize=6)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("how often it is right")
    axes.text(0.06, 0.74, "more often right\nthan it thinks", fontsize=SMALL_SIZE, color=FAINT, ha="left")
    axes.text(0.98, 0.06, "less often right\nthan it thinks", fontsize=SMALL_SIZE, color=FAINT, ha="right")
    keys = [
        Line2D([], [], color=LINE_COLOURS[0], marker="o", linewidth=1.8, label="this model"),
        Line2D([], [], color=FAINT, linestyle=(0, (5, 3)), linewidth=1.4, label="ideal"),
    ]
    axes.legend(handles=keys, fontsize=SMALL_SIZE, frameon=False, loc="upper left", ncols=2)
    filled = n_voxels > 0
    below.bar(edges[:-1][filled], n_voxels[filled], width=np.diff(edges)[filled] * 0.94, align="edge", color=BAR)
    below.set_yscale("log")
    below.set_ylabel("voxels")
    below.set_xlabel("how sure the network is")
    for part in (axes, below):
        tidy_axes(part)
    return save_figure(figure, path)

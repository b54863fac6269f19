"""Charts of a cross-validation: learning curves, Dice per label and per case, volumes per label."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike, NDArray

from autoseg.evaluation.scores import Evaluation
from autoseg.reporting.charts import (
    BAR,
    BOX,
    BOX_EDGE,
    FAINT,
    INK,
    LINE_COLOURS,
    MARKERS,
    MEAN_STYLE,
    MEDIAN_STYLE,
    SMALL_SIZE,
    TINY_SIZE,
    add_legend,
    mean_and_median_keys,
    new_figure,
    safe_names,
    tidy_axes,
)
from autoseg.reporting.figures import save_figure
from autoseg.reporting.html import format_number
from autoseg.training.record import EpochFigures

MAX_NAMED_CASES = 60
N_WORST_NAMED, N_BEST_NAMED = 10, 5
MAX_WIDE_ROWS = 12
MARKS_PER_CURVE = 8
SMOOTHED_PARTS = 50
"""Curves are smoothed over a fiftieth of their epochs to either side."""

LONG_CHART_INCHES = 9.0
LOG_FROM_RATIO = 30.0


def draw_learning_curves(path: Path, curves: Mapping[int, Sequence[EpochFigures]]) -> Path:
    """Draws the trainings of all folds on top of each other: the losses, and the Dice on patches held back.

    Args:
        path: of the PNG.
        curves: epochs by fold; folds without epochs are left out.

    Returns:
        The path.
    """
    figure = new_figure(5.8)
    losses, dice = cast(list[Axes], list(figure.subplots(2, 1, sharex=True)))
    folds = [fold for fold in sorted(curves) if curves[fold]]
    keys = []
    for i, fold in enumerate(folds):
        epochs = curves[fold]
        number = np.array([figures.epoch for figures in epochs])
        # Marks at different places, so that they tell the folds apart where the lines run together.
        step = max(1, len(number) // MARKS_PER_CURVE)
        colour, marker = LINE_COLOURS[i % len(LINE_COLOURS)], MARKERS[i % len(MARKERS)]
        marks = {"marker": marker, "markersize": 4.5, "markevery": (i * step // len(folds), step), "linewidth": 1.6}
        _plot(losses, number, [figures.train_loss for figures in epochs], colour, {"linestyle": ":", "linewidth": 1.3})
        for axes, values in (
            (losses, np.array([figures.validation_loss for figures in epochs], np.float64)),
            (dice, np.array([figures.validation_dice for figures in epochs], np.float64)),
        ):
            _plot(axes, number, values, colour, {"alpha": 0.25, "linewidth": 0.7})
            _plot(axes, number, smooth_centred(values), colour, marks)
        keys.append(Line2D([], [], label=f"fold {fold}", color=colour, marker=marker))
    losses.set_ylabel("loss")
    dice.set_ylabel("Dice on patches")
    dice.set_xlabel("epoch")
    dice.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    for axes in (losses, dice):
        tidy_axes(axes)
    styles = [
        Line2D([], [], color=FAINT, linestyle="-", label="held-back cases"),
        Line2D([], [], color=FAINT, linestyle=":", label="training cases"),
    ]
    losses.legend(handles=styles, fontsize=SMALL_SIZE, frameon=False, loc="upper right")
    add_legend(figure, keys, n_columns=5)
    return save_figure(figure, path)


def _plot(axes: Axes, number: NDArray, values: ArrayLike, colour: str, look: Mapping[str, Any]) -> None:
    found = np.asarray(values, np.float64)
    known = np.isfinite(found)
    if known.any():
        # A single epoch would be invisible as a line.
        few = {"marker": "o", "markersize": 4.5, "markevery": None} if known.sum() < 3 else {}
        axes.plot(number[known], found[known], color=colour, **{**look, **few})


def smooth_centred(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of each value and as many before it as after it: it does not lag. (N,) to (N,); NaN does not count."""
    n, known = len(values), np.isfinite(values)
    place = np.arange(n)
    # Narrower at both ends, where there is nothing beyond.
    half = np.minimum(n // SMOOTHED_PARTS, np.minimum(place, n - 1 - place))
    sums, counts = (
        np.concatenate([[0.0], np.cumsum(column)])
        for column in (np.where(known, values, 0.0), known.astype(np.float64))
    )
    first, last = place - half, place + half + 1
    return np.divide(sums[last] - sums[first], counts[last] - counts[first], out=np.full(n, np.nan), where=known)


def collect_scores(evaluation: Evaluation, metric: str = "dice") -> NDArray[np.float64]:
    """One metric as a table, in the order of the evaluation's cases and labels.

    Returns:
        (cases, labels), NaN where it is not defined.
    """
    place = {summary.label: i for i, summary in enumerate(evaluation.labels)}
    table = np.full((len(evaluation.cases), len(place)), np.nan)
    for row, case in zip(table, evaluation.cases, strict=True):
        for score in case.labels:
            if score.label in place:
                row[place[score.label]] = getattr(score, metric)
    return table


def draw_label_dice(path: Path, evaluation: Evaluation) -> Path:
    """Draws the Dice of every label: a dot per case, a box, the mean as a red line, the median as a green, dashed one.

    The label with the lowest mean stands on top, labels that no case has at the bottom.

    Args:
        path: of the PNG.
        evaluation: at least one label.

    Returns:
        The path.
    """
    rows = {
        summary.label: column[np.isfinite(column)]
        for summary, column in zip(evaluation.labels, collect_scores(evaluation).T, strict=True)
    }
    order = sorted(rows, key=lambda name: (not rows[name].size, float(rows[name].mean()) if rows[name].size else 0.0))
    found = np.concatenate(list(rows.values())) if rows else np.zeros(0)
    figure = draw_strips({name: rows[name] for name in order}, x_label="Dice", empty="in no reference")
    # Below the lowest case there is nothing to see.
    low = math.floor((float(found.min()) - 0.04) * 10) / 10 if found.size else 0.0
    figure.axes[0].set_xlim(max(0.0, low) - (0.02 if low <= 0 else 0.0), 1.0 + 0.01 * (1 - max(0.0, low)))
    return save_figure(figure, path)


def draw_volumes(path: Path, volumes_ml: Mapping[str, NDArray[np.float64]]) -> Path:
    """Draws the volumes of every label as `draw_label_dice` draws its Dice.

    Volumes that differ by more than a factor of `LOG_FROM_RATIO` are drawn on a logarithmic scale.

    Args:
        path: of the PNG.
        volumes_ml: by label, (cases,), above 0.

    Returns:
        The path.
    """
    figure = draw_strips(volumes_ml, x_label="volume in ml", empty="in no case")
    found = np.concatenate([*volumes_ml.values(), np.zeros(0)])
    axes = figure.axes[0]
    if found.size and found.max() > LOG_FROM_RATIO * found.min():
        axes.set_xscale("log")
        axes.set_xlabel("volume in ml, on a logarithmic scale")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
    elif found.size:
        axes.set_xlim(left=0)
    return save_figure(figure, path)


def draw_strips(rows: Mapping[str, NDArray[np.float64]], *, x_label: str, empty: str) -> Figure:
    """One row per name: dots, the box of the middle half, mean and median.

    Args:
        rows: values by name, (n,) each, finite; the first row is on top.
        x_label: what they are.
        empty: what to write where a row has no values.
    """
    n = len(rows)
    is_wide = n <= MAX_WIDE_ROWS
    row_inches = 0.42 if is_wide else 0.21
    figure = new_figure(n * row_inches + 1.15)
    axes = figure.subplots()
    # Fixed, so that a page looks the same each time it is written.
    rng = np.random.default_rng(0)
    for y, values in enumerate(rows.values()):
        if not values.size:
            axes.text(
                0.01, y, empty, fontsize=TINY_SIZE, color=FAINT, va="center", transform=axes.get_yaxis_transform()
            )
            continue
        first, third = np.percentile(values, (25, 75))
        axes.barh(y, third - first, left=first, height=0.62, color=BOX, edgecolor=BOX_EDGE, linewidth=0.8, zorder=1)
        jitter = rng.uniform(-0.24, 0.24, values.size)
        size, opacity = (9, 0.5) if values.size <= 100 else (4, 0.35)
        axes.scatter(values, y + jitter, s=size if is_wide else size / 2, c=INK, alpha=opacity, linewidths=0, zorder=2)
        half = 0.42
        axes.plot([values.mean()] * 2, [y - half, y + half], solid_capstyle="butt", zorder=3, **MEAN_STYLE)  # type: ignore[arg-type]
        axes.plot([np.median(values)] * 2, [y - half, y + half], dash_capstyle="butt", zorder=4, **MEDIAN_STYLE)  # type: ignore[arg-type]
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.set_yticks(range(n), safe_names(list(rows)))
    axes.set_ylim(n - 0.45, -0.55)
    axes.set_xlabel(x_label)
    tidy_axes(axes)
    axes.tick_params(axis="y", length=0, labelsize=SMALL_SIZE if is_wide else TINY_SIZE)
    axes.grid(visible=False, axis="y")
    if n > 2 * MAX_WIDE_ROWS:
        axes.tick_params(axis="x", top=True, labeltop=True)
    dot = Line2D([], [], linestyle="", marker="o", markersize=3.5, color=INK, alpha=0.6, label="a case")
    box = Line2D([], [], linewidth=7, color=BOX_EDGE, alpha=0.6, label="middle half")
    add_legend(figure, [*mean_and_median_keys(), dot, box], n_columns=4)
    return figure


def draw_case_bars(path: Path, evaluation: Evaluation) -> Path:
    """Draws a bar per case, as long as its mean Dice, the lowest on top, with lines at the mean and the median.

    Up to `MAX_NAMED_CASES` cases all have their names; of more, the worst and a few of the best.

    Args:
        path: of the PNG.
        evaluation: at least one case.

    Returns:
        The path.
    """
    cases = sorted(evaluation.cases, key=lambda case: (math.isnan(case.mean_dice), case.mean_dice, case.case))
    dice = np.array([case.mean_dice for case in cases], np.float64)
    n, n_known = len(cases), int(np.isfinite(dice).sum())
    names = safe_names([case.case for case in cases])
    is_named = n <= MAX_NAMED_CASES
    height = n * 0.21 + 1.15 if is_named else min(LONG_CHART_INCHES, 5.0 + n / 200)
    figure = new_figure(height)
    axes = figure.subplots()
    axes.barh(np.arange(n_known), dice[:n_known], height=0.72 if is_named else 1.0, color=BAR, linewidth=0)
    axes.set_yticks([])
    if is_named:
        axes.set_yticks(range(n), names)
        for y, value in enumerate(dice.tolist()):
            text = f"{value:.2f}" if math.isfinite(value) else "nothing to find"
            # At the beginning, where neither the mean nor the median is in the way.
            axes.text(0.012, y, text, fontsize=TINY_SIZE, color=INK, va="center")
    else:
        _name_extremes(axes, names[:n_known], inches_per_row=(height - 1.15) / n)
    if n_known:
        known = dice[:n_known]
        axes.plot([known.mean()] * 2, [-0.5, n - 0.5], **MEAN_STYLE)  # type: ignore[arg-type]
        axes.plot([np.median(known)] * 2, [-0.5, n - 0.5], **MEDIAN_STYLE)  # type: ignore[arg-type]
    axes.set_ylim(n - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.set_xlabel("mean Dice of the case")
    tidy_axes(axes)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0, labelsize=TINY_SIZE)
    add_legend(figure, mean_and_median_keys(), n_columns=2)
    return save_figure(figure, path)


def _name_extremes(axes: Axes, names: Sequence[str], *, inches_per_row: float) -> None:
    """Names of the first and the last rows, apart from each other, each with a line to its row."""
    between = 0.16 / inches_per_row
    worst = [(i, i * max(1.0, between)) for i in range(min(N_WORST_NAMED, len(names)))]
    last = len(names) - 1
    best = [(last - i, last - i * max(1.0, between)) for i in range(N_BEST_NAMED) if last - i >= N_WORST_NAMED]
    for row, y in (*worst, *best):
        axes.annotate(
            names[row],
            xy=(0, row),
            xytext=(-0.06, y),
            xycoords=axes.get_yaxis_transform(),
            textcoords=axes.get_yaxis_transform(),
            ha="right",
            va="center",
            fontsize=TINY_SIZE,
            color=INK,
            arrowprops={
                "arrowstyle": "-",
                "color": FAINT,
                "linewidth": 0.6,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (1, 0.5),
            },
        )

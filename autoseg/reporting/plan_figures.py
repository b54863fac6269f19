"""The scans of a dataset as its fingerprint knows them: geometry, intensities and labels, each with a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from autoseg.core.labels import LabelSpec
from autoseg.planning.fingerprint import ChannelFingerprint, Fingerprint
from autoseg.planning.plan import Plan
from autoseg.reporting.html import (
    NO_VALUE,
    Child,
    Column,
    Html,
    classed,
    element,
    format_number,
    join,
    table,
)
from autoseg.reporting.plots import Mark, draw_axis, draw_box, draw_channel, draw_histogram, draw_sample, fit_scale

AXES = ("z", "y", "x")
AXIS_TITLES = ("z, from feet to head", "y, from back to front", "x, from left to right")
"""Axes of canonical orientation, as all arrays of a fingerprint are."""

Placed = tuple[float | None, ...]
"""A number per axis (z, y, x); None along an axis that has none."""


def show_geometry(fingerprint: Fingerprint, plan: Plan) -> Html:
    """Spacings, sizes and extents along each axis, with what the plan makes of them.

    Args:
        fingerprint: of the scans.
        plan: of the same dataset.
    """
    spacings_mm = np.array([case.spacing_mm for case in fingerprint.cases])
    shapes = np.array([case.shape for case in fingerprint.cases], np.float64)
    cropped = np.array([case.cropped_shape for case in fingerprint.cases], np.float64)
    targets = {
        name: place_on_axes(plan, name, configuration.spacing_mm) for name, configuration in plan.configurations.items()
    }
    patches_mm = {
        name: place_on_axes(plan, name, np.multiply(configuration.patch_size, configuration.spacing_mm).tolist())
        for name, configuration in plan.configurations.items()
    }
    parts: list[Child] = [
        element("h3", "Spacing of the voxels, in mm"),
        element(
            "p", "The distance of neighbouring voxels in the files. Marked: the spacing that scans are brought to."
        ),
        _show_axes(spacings_mm, "spacing in mm", title="target", marks=_merge(targets)),
        element("h3", "Size of the scans, in voxels"),
        element("p", _explain_cropping(fingerprint, shapes, cropped)),
        _show_axes(cropped, "size in voxels"),
        element("h3", "Extent of the scans, in mm"),
        element("p", "Size times spacing. Marked: how much of it the network sees at once, which is its patch."),
        _show_axes(cropped * spacings_mm, "extent in mm", title="patch", marks=_merge(patches_mm)),
    ]
    return join(*parts)


def place_on_axes(plan: Plan, configuration: str, values: Sequence[float]) -> Placed:
    """Values of a configuration, which are in the plan's order of axes, as (z, y, x); None where 2D has none."""
    placed: list[float | None] = [None, None, None]
    for axis, value in zip(plan.axis_order[-plan.configuration(configuration).n_axes :], values, strict=True):
        placed[axis] = value
    return tuple(placed)


def show_channels(channels: Sequence[ChannelFingerprint]) -> Html:
    """Intensities of every channel."""
    columns = [Column(title="channel")]
    columns += [
        Column(title=title, kind="number")
        for title in ("minimum", "0.5 %", "median", "99.5 %", "maximum", "mean", "deviation")
    ]
    columns.append(Column(title="distribution", kind="plot"))
    rows: list[list[Child]] = []
    for channel in channels:
        low, high = channel.percentile_00_5, channel.percentile_99_5
        numbers = (channel.minimum, low, channel.median, high, channel.maximum, channel.mean, channel.std)
        drawing = draw_channel(channel) or NO_VALUE
        rows.append([channel.name, *(format_number(number) for number in numbers), drawing])
    text = (
        "Of the labelled voxels of all cases, equally many from each. The box spans the 0.5th to the 99.5th percentile "
        "with a bar at the median, the line all values (an arrow where it goes on), and the dot below is the mean with "
        "one standard deviation to either side."
    )
    return join(element("p", text), table(columns, rows, is_stacked=True))


def show_labels(fingerprint: Fingerprint, labels: LabelSpec) -> Html | None:
    """Volume of every label, and in how many cases it is present.

    Returns:
        Nothing where the fingerprint has no volumes.
    """
    known = [case.label_volumes_ml for case in fingerprint.cases if len(case.label_volumes_ml) == len(labels.names)]
    if not known:
        return None
    volumes_ml = np.array(known, np.float64)
    present = [column[column > 0] for column in volumes_ml.T]
    scale = fit_scale(np.concatenate(present), is_log=True) if any(column.size for column in present) else None
    columns = [
        Column(title="label"),
        Column(title="present in", kind="number"),
        Column(title="median ml", kind="number"),
        Column(title="smallest to largest", kind="number"),
        Column(title="volumes in ml", kind="plot", axis=draw_axis(scale) if scale else None),
    ]
    rows: list[list[Child]] = []
    for name, value, found in zip(labels.names, labels.values, present, strict=True):
        heading = join(name, " ", element("small", f"({value})", attributes={"class": "note"}))
        count = f"{found.size} of {len(known)}"
        if scale is None or not found.size:
            rows.append([heading, count, NO_VALUE, NO_VALUE, ""])
            continue
        extremes = f"{_format_volume(found.min())} to {_format_volume(found.max())}"
        drawing = draw_box(found, scale, description=f"volumes of {name}")
        rows.append([heading, count, _format_volume(np.median(found)), extremes, drawing])
    n_rare = sum(2 * found.size < len(known) for found in present)
    text = (
        "Volumes where the label is present, on a logarithmic scale: a dot per case, a box around the middle half of "
        "them with a bar at the median, a line from the smallest to the largest."
    )
    if n_rare:
        text += f" {n_rare} of {len(labels.names)} labels are present in fewer than half of the cases."
    return join(element("p", text), table(columns, rows, is_stacked=True))


def _show_axes(
    values: NDArray[np.float64], quantity: str, *, title: str = "", marks: Mapping[str, Placed] | None = None
) -> Html:
    """One row per axis.

    Args:
        values: (cases, 3), in (z, y, x).
        quantity: what they are.
        title: of the column of the marks; empty for none.
        marks: by what they are called.
    """
    marks = marks or {}
    columns = [Column(title="axis")]
    columns += [Column(title=name, kind="number") for name in ("smallest", "median", "largest")]
    columns += [Column(title=title, kind="number")] if title else []
    columns.append(Column(title="number of cases", kind="plot"))
    rows: list[list[Child]] = []
    for axis, axis_title in enumerate(AXIS_TITLES):
        column = values[:, axis]
        here = [
            Mark(name=name, value=value, look=look)
            for look, (name, placed) in enumerate(marks.items())
            if (value := placed[axis]) is not None
        ]
        row: list[Child] = [axis_title]
        row += [format_number(float(value)) for value in np.percentile(column, (0, 50, 100))]
        if title:
            numbers = [classed("span", "marked", draw_sample(mark.look), format_number(mark.value)) for mark in here]
            row.append(join(*numbers) if numbers else NO_VALUE)
        row.append(draw_histogram(column, here, description=f"{quantity} along {AXES[axis]}"))
        rows.append(row)
    legend = [element("li", draw_sample(look), name) for look, name in enumerate(marks)]
    return join(classed("ul", "legend", *legend) if legend else "", table(columns, rows, is_stacked=True))


def _merge(marks: Mapping[str, Placed]) -> dict[str, Placed]:
    """Configurations that would be marked at the same places become one; those with more axes come first."""
    merged: dict[str, Placed] = {}
    names: dict[str, str] = {}
    for name, placed in sorted(marks.items(), key=lambda item: item[1].count(None)):
        for other, known in merged.items():
            if all(a is None or (b is not None and math.isclose(a, b)) for a, b in zip(placed, known, strict=True)):
                names[other] += f", {name}"
                break
        else:
            merged[name], names[name] = placed, name
    return {names[name]: placed for name, placed in merged.items()}


def _format_volume(volume_ml: float) -> str:
    return format_number(volume_ml, n_digits=3)


def _explain_cropping(fingerprint: Fingerprint, shapes: NDArray[np.float64], cropped: NDArray[np.float64]) -> str:
    n_cropped = int((shapes != cropped).any(axis=1).sum())
    if not n_cropped:
        return "No scan has a rim of zeros that could be cut off."
    return (
        f"After the rim of zeros is cut off, which {n_cropped} of {len(shapes)} scans have. The median scan keeps "
        f"{fingerprint.median_cropped_fraction:.0%} of its voxels."
    )

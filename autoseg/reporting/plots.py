"""Distributions as small drawings in SVG, each as wide as the cell of the table that it stands in.

Drawn by the browser they are sharp at any size, follow its dark mode, and show names in any script. Values are rounded
to a grid before they are drawn, so that the size of a plot does not grow with the number of cases.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoseg.planning.fingerprint import ChannelFingerprint
from autoseg.reporting.html import Html, element, format_number

WIDTH, MARGIN = 320, 8
N_BINS = 65
N_MARKS = 3
"""So many looks of marks does the page's style have."""

MIN_SPREAD = 1e-3
"""Values that differ by less than this fraction are drawn as equal."""

LOG_FROM_RATIO = 30.0
"""Values that differ by more than this factor are drawn on a logarithmic scale, where that is left open."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Where values lie along the width of a plot.

    Attributes:
        low: the value at the left end.
        high: the value at the right end, larger.
        is_log: logarithmic; then both are positive.
    """

    low: float
    high: float
    is_log: bool = False

    def place(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values to positions; those outside go to the ends. Any shape."""
        low, high = self._bend(np.array([self.low, self.high]))
        fraction = (self._bend(np.clip(values, self.low, self.high)) - low) / (high - low)
        return MARGIN + fraction * (WIDTH - 2 * MARGIN)

    def place_one(self, value: float) -> float:
        """The position of one value."""
        return float(self.place(np.array([value]))[0])

    def ticks(self) -> list[float]:
        """Round values within the scale: three to eight, or powers of ten."""
        if self.is_log and self.high / self.low > LOG_FROM_RATIO:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            if last - first > 2:
                return [10.0**exponent for exponent in range(first, last + 1, (last - first) // 6 + 1)]
            finer = [factor * 10.0**exponent for exponent in range(first - 1, last + 1) for factor in (1, 2, 5)]
            return [tick for tick in finer if self.low <= tick <= self.high]
        rough = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step_size = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
        first, last = math.ceil(self.low / step_size - 1e-9), math.floor(self.high / step_size + 1e-9)
        return [count * step_size for count in range(first, last + 1)]

    def _bend(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.log(values) if self.is_log else values


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A value of the plan to compare the cases with.

    Attributes:
        name: what it is.
        value: where it is.
        look: 0 to `N_MARKS` - 1: its colour and dashes.
    """

    name: str
    value: float
    look: int


def fit_scale(values: Iterable[float], *, is_log: bool | None = None) -> Scale:
    """A scale that holds all values with some room on either side.

    Args:
        values: at least one; all positive on a logarithmic scale.
        is_log: None for a logarithmic scale where the values are positive and far apart.
    """
    known = np.fromiter(values, np.float64)
    low, high = float(known.min()), float(known.max())
    if is_log is None:
        is_log = low > 0 and high / low > LOG_FROM_RATIO
    if is_log:
        room = max((high / low) ** 0.03, 1.25)
        return Scale(low=low / room, high=high * room, is_log=True)
    # Values that are nearly equal would have equal numbers at their ticks.
    is_spread = high - low > MIN_SPREAD * max(abs(low), abs(high))
    room = (high - low) * 0.04 if is_spread else abs(high) * 0.25 or 0.5
    return Scale(low=low - room, high=high + room)


def draw_histogram(values: NDArray[np.float64], marks: Sequence[Mark], *, description: str) -> Html:
    """How often values occur, with marks and a scale below.

    Args:
        values: (n,), at least one, finite.
        marks: vertical lines.
        description: for those who cannot see it.
    """
    height, base = 52, 38
    scale = fit_scale([*values.tolist(), *(mark.value for mark in marks)])
    bin_width = (WIDTH - 2 * MARGIN) / N_BINS
    index = np.minimum(((scale.place(values) - MARGIN) / bin_width).astype(int), N_BINS - 1)
    counts = np.bincount(index, minlength=N_BINS)
    bars = "".join(
        f"M{_short(MARGIN + i * bin_width)} {base}v-{_short(max(2.0, count / counts.max() * (base - 4)))}"
        f"h{_short(bin_width - 0.5)}V{base}z"
        for i, count in enumerate(counts.tolist())
        if count
    )
    lines = [
        _path(f"M{_short(scale.place_one(mark.value))} 0V{base + 2}", f"mark mark-{mark.look % N_MARKS}")
        for mark in marks
    ]
    return _drawing(height, [*_axis(scale, top=base, y_text=height - 2), _path(bars, "bars"), *lines], description)


def draw_axis(scale: Scale) -> Html:
    """The numbers of a scale that several plots below each other share."""
    return _drawing(16, _axis(scale, top=12, y_text=9), "scale")


def draw_box(values: NDArray[np.float64], scale: Scale, *, description: str) -> Html:
    """A box from the first to the third quartile, whiskers to the extremes, a line at the median, a dot per value.

    Args:
        values: (n,); may be empty.
        scale: shared with other boxes.
        description: for those who cannot see it.
    """
    height, middle = 18, 9
    drawn = [_path("".join(f"M{_short(scale.place_one(tick))} 0v{height}" for tick in scale.ticks()), "grid")]
    if values.size:
        low, first, median, third, high = scale.place(np.percentile(values, (0, 25, 50, 75, 100))).tolist()
        places = np.unique(np.round(scale.place(values)))
        drawn += [
            _path(f"M{_short(low)} {middle}H{_short(high)}", "whisker"),
            _path(f"M{_short(first)} 3H{_short(third)}V{height - 3}H{_short(first)}z", "box"),
            _path("".join(f"M{place:.0f} {middle}h0" for place in places), "dots"),
            _path(f"M{_short(median)} 2V{height - 2}", "median"),
        ]
    return _drawing(height, drawn, description)


def draw_channel(channel: ChannelFingerprint) -> Html | None:
    """The intensities of a channel: line from minimum to maximum, box of percentiles, median, mean and deviation.

    Returns:
        The drawing; None where a number is not finite.
    """
    low, high = channel.percentile_00_5, channel.percentile_99_5
    numbers = (channel.minimum, channel.maximum, low, high, channel.median, channel.mean, channel.std)
    if not all(math.isfinite(number) for number in numbers):
        return None
    # Few voxels can be far from all others; they may lie beyond the ends.
    room = max(high - low, channel.std)
    ends = max(channel.minimum, low - room), min(channel.maximum, high + room)
    scale = fit_scale((*ends, low, high, channel.mean - channel.std, channel.mean + channel.std), is_log=False)
    x_low, x_high = scale.place_one(ends[0]), scale.place_one(ends[1])
    first, last = scale.place_one(channel.mean - channel.std), scale.place_one(channel.mean + channel.std)
    mean, median = scale.place_one(channel.mean), scale.place_one(channel.median)
    left = "l4 -4m-4 4l4 4" if channel.minimum < ends[0] else "m0 -4v8"
    right = "l-4 -4m4 4l-4 4" if channel.maximum > ends[1] else "m0 -4v8"
    drawn = [
        *_axis(scale, top=26, y_text=38),
        _path(f"M{_short(x_low)} 11H{_short(x_high)}M{_short(x_low)} 11{left}M{_short(x_high)} 11{right}", "whisker"),
        _path(
            f"M{_short(scale.place_one(low))} 4H{_short(scale.place_one(high))}V18H{_short(scale.place_one(low))}z",
            "box",
        ),
        _path(f"M{_short(median)} 2V20", "median"),
        _path(f"M{_short(first)} 22H{_short(last)}M{_short(first)} 19.5v5M{_short(last)} 19.5v5", "spread"),
        _path(f"M{_short(mean)} 22h0", "mean"),
    ]
    return _drawing(40, drawn, f"intensities of {channel.name}")


def draw_sample(look: int) -> Html:
    """A mark as it stands in legends."""
    line = _path("M8 0V14", f"mark mark-{look % N_MARKS}")
    return element("svg", line, attributes={"viewBox": "0 0 16 14", "aria-hidden": "true"})


def _axis(scale: Scale, *, top: int, y_text: int) -> list[Html]:
    """A line with ticks and their numbers; numbers that would touch the one before are left out."""
    drawn, right = [], -math.inf
    ticks = scale.ticks()
    marks = "".join(f"M{_short(scale.place_one(tick))} {top}v3" for tick in ticks)
    drawn.append(_path(f"M{MARGIN} {top}H{WIDTH - MARGIN}{marks}", "grid"))
    for tick in ticks:
        text, x = format_number(round(tick, 12)), scale.place_one(tick)
        half = 2.8 * len(text)
        x = min(max(x, half), WIDTH - half)
        if x - half > right + 5:
            place = {"x": _short(x), "y": str(y_text), "text-anchor": "middle"}
            drawn.append(element("text", text, attributes=place))
            right = x + half
    return drawn


def _path(shape: str, css_class: str) -> Html:
    return element("path", attributes={"class": css_class, "d": shape})


def _drawing(height: int, parts: Sequence[Html], description: str) -> Html:
    box = {"viewBox": f"0 0 {WIDTH} {height}", "role": "img", "aria-label": description}
    return element("svg", *parts, attributes=box)


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")

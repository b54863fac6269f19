"""Scales, ticks and shapes of the small plots, and numbers as they are written beside them."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from fingerprints import CT

from autoseg.core.runtime import format_memory
from autoseg.reporting.html import escape, format_large, format_number
from autoseg.reporting.plots import WIDTH, Scale, draw_box, draw_channel, draw_histogram, fit_scale


def test_plots_hold_their_numbers() -> None:
    for low, high, is_log in ((0.0, 1.0, False), (-1024.0, 3071.0, False), (0.01, 2000.0, True), (1.0, 1.2, True)):
        scale = Scale(low=low, high=high, is_log=is_log)
        ticks = scale.ticks()
        assert 3 <= len(ticks) <= 9
        assert min(ticks) >= low - 1e-9
        assert max(ticks) <= high + 1e-9
        places = scale.place(np.array([low, *ticks, high]))
        assert (np.diff(places) >= -1e-6).all()
        assert 0 <= places[0] < places[-1] <= WIDTH


@pytest.mark.parametrize("values", [[0.0], [1.0, 1.0], [-5.0], [1e-9, 1e9], [0.97656, 0.97657], [0.0, 1e-12]])
def test_scales_of_any_values(values: list[float]) -> None:
    scale = fit_scale(values)
    assert scale.low < min(values)
    assert scale.high > max(values)
    assert 1 <= len(scale.ticks()) <= 12
    assert "nan" not in draw_histogram(np.array(values), [], description="").markup


def test_a_histogram_counts_and_a_box_spans() -> None:
    bars = draw_histogram(np.array([1.0] * 4 + [2.0] * 8), [], description="d").markup
    heights = [float(height) for height in re.findall(r"\d 38v-([\d.]+)", bars)]
    assert heights == [17, 34]
    scale = Scale(low=1.0, high=100.0, is_log=True)
    box = draw_box(np.array([1.0, 10.0, 100.0]), scale, description="d").markup
    assert 'class="whisker" d="M8 9H312"' in box
    assert 'class="median" d="M160 2V16"' in box
    assert "box" not in draw_box(np.array([]), scale, description="d").markup


def test_intensities_far_away_are_cut_and_missing_ones_not_drawn() -> None:
    drawn = draw_channel(CT)
    assert drawn is not None
    assert "l-4 -4m4 4l-4 4" in drawn.markup
    assert "30,000" not in drawn.markup
    assert draw_channel(dataclasses.replace(CT, mean=float("nan"))) is None
    assert draw_channel(
        dataclasses.replace(CT, minimum=5, maximum=5, mean=5, median=5, std=0, percentile_00_5=5, percentile_99_5=5)
    )


def test_numbers_as_people_write_them() -> None:
    assert [format_number(value) for value in (0, 0.01234, 12.5, 12345.6, float("nan"))] == [
        "0",
        "0.01234",
        "12.5",
        "12,346",
        "\N{EN DASH}",
    ]
    assert [format_large(value) for value in (640, 12_500, 31.4e6, 1.2e9, 3e12, 5e15)] == [
        "640",
        "12.5 k",
        "31.4 M",
        "1.2 G",
        "3 T",
        "5,000 T",
    ]
    assert [format_memory(gib) for gib in (0.0001, 0.5, 1.44, 12.3)] == ["1 MiB", "512 MiB", "1.4 GiB", "12 GiB"]


def test_what_cannot_be_printed_is_spelled_out() -> None:
    assert escape("a\tb\u00a0c<'\"&\x00") == "a\\tb\u00a0c&lt;&#x27;&quot;&amp;\\x00"

"""The pictures are read back: what should be seen is there, in its colour and at its place."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from autoseg.reporting.figures import (
    DPI,
    LEGEND_INCHES,
    PANEL_HEIGHT_INCHES,
    ROW_TITLE_INCHES,
    OverlayRow,
    choose_slices,
    choose_window,
    draw_curves,
    draw_overlays,
    find_borders,
)
from autoseg.training.record import EpochFigures

SPACING_MM = (5.0, 2.0, 2.0)
ROW_HEIGHT = round((PANEL_HEIGHT_INCHES + ROW_TITLE_INCHES) * DPI)
LEGEND_HEIGHT = LEGEND_INCHES * DPI


def make_case() -> tuple[np.ndarray, np.ndarray]:
    """A dark volume (8, 30, 40) with a block that is brighter and labelled."""
    image, label = np.zeros((8, 30, 40), np.float32), np.zeros((8, 30, 40), np.uint8)
    label[2:6, 10:20, 12:28] = 1
    label[3:5, 12:16, 15:20] = 2
    return image + 50 * (label > 0), label


def read_picture(path: Path) -> np.ndarray:
    """(height, width, 3) without the legend."""
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    picture = matplotlib.image.imread(path)
    return picture[: round(picture.shape[0] - LEGEND_HEIGHT), :, :3]


def draw_case(path: Path, image: np.ndarray, *, n_slices: int = 3, **options: Any) -> Path:
    row = OverlayRow(title="case", image=image, spacing_mm=SPACING_MM, **options)
    return draw_overlays(path, [row], n_slices=n_slices)


def find_green(picture: np.ndarray) -> np.ndarray:
    return (picture[..., 1] > 0.6) & (picture[..., 0] < 0.3) & (picture[..., 2] < 0.5)


def find_red(picture: np.ndarray) -> np.ndarray:
    return (picture[..., 0] > 0.6) & (picture[..., 1] < 0.35) & (picture[..., 2] < 0.35)


def test_reference_is_green_and_prediction_red(tmp_path: Path) -> None:
    image, label = make_case()
    for reference, prediction in ((label, None), (None, label), (None, None), (label, label)):
        path = draw_case(tmp_path / "a.png", image, reference=reference, prediction=prediction)
        picture = read_picture(path)
        assert find_green(picture).any() == (reference is not None)
        assert find_red(picture).any() == (prediction is not None)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"], "no half-written file is left"


def test_contours_lie_on_the_borders(tmp_path: Path) -> None:
    image, label = np.zeros((1, 30, 40), np.float32), np.zeros((1, 30, 40), np.uint8)
    label[0, 15:24, 20:30] = 3
    picture = read_picture(draw_case(tmp_path / "a.png", image, reference=label, n_slices=1))
    rows, columns = np.nonzero(find_green(picture))
    pixels_per_voxel = PANEL_HEIGHT_INCHES * DPI / 30
    top = ROW_TITLE_INCHES * DPI
    assert rows.min() == pytest.approx(top + (30 - 24) * pixels_per_voxel, abs=4)
    assert rows.max() == pytest.approx(top + (30 - 15) * pixels_per_voxel, abs=4)
    width = picture.shape[1]
    assert columns.min() == pytest.approx(width / 2 + (20 - 30) * pixels_per_voxel, abs=4)
    assert columns.max() == pytest.approx(width / 2, abs=4)


def test_both_are_legible_where_they_coincide(tmp_path: Path) -> None:
    image, label = make_case()
    together = read_picture(draw_case(tmp_path / "a.png", image, reference=label, prediction=label))
    alone = read_picture(draw_case(tmp_path / "b.png", image, prediction=label))
    assert find_red(together).sum() > 0.5 * find_red(alone).sum()
    assert find_green(together).sum() > 0.5 * find_red(alone).sum()


def test_anterior_is_up_and_right_is_left(tmp_path: Path) -> None:
    image = np.zeros((3, 40, 50), np.float32)
    image[:, 33:37, 40:45] = 100
    picture = read_picture(draw_case(tmp_path / "a.png", image, n_slices=1, window=(0.0, 100.0)))
    panel = picture[round(ROW_TITLE_INCHES * DPI) + 4 : ROW_HEIGHT - 4, 10:-10]
    rows, columns = np.nonzero(panel.min(-1) > 0.9)
    assert rows.max() < panel.shape[0] / 2
    assert columns.max() < panel.shape[1] / 2


@pytest.mark.parametrize(("step_y_mm", "step_x_mm"), [(1.0, 1.0), (1.0, 2.0), (2.0, 1.0)])
def test_proportions_are_true(tmp_path: Path, step_y_mm: float, step_x_mm: float) -> None:
    label = np.zeros((1, 40, 40), np.uint8)
    label[0, 10:30, 10:30] = 1
    row = OverlayRow(title="", image=np.zeros(label.shape), reference=label, spacing_mm=(5.0, step_y_mm, step_x_mm))
    other = OverlayRow(title="", image=np.zeros((1, 40, 60)), spacing_mm=(5.0, 1.0, 1.0))
    rows, columns = np.nonzero(find_green(read_picture(draw_overlays(tmp_path / "a.png", [row, other]))))
    assert np.ptp(columns) / np.ptp(rows) == pytest.approx(step_x_mm / step_y_mm, rel=0.06)


def test_size_of_the_picture(tmp_path: Path) -> None:
    image, label = make_case()
    row = OverlayRow(title="case", image=image, reference=label, prediction=label, spacing_mm=SPACING_MM)
    one = matplotlib.image.imread(draw_overlays(tmp_path / "one.png", [row]))
    three = matplotlib.image.imread(draw_overlays(tmp_path / "three.png", [row] * 3))
    single = matplotlib.image.imread(draw_overlays(tmp_path / "single.png", [row], n_slices=1))
    assert three.shape[1] == one.shape[1]
    assert three.shape[0] - one.shape[0] == pytest.approx(2 * ROW_HEIGHT, abs=2)
    assert one.shape[0] == pytest.approx(ROW_HEIGHT + LEGEND_HEIGHT, abs=2)
    assert one.shape[1] == pytest.approx(3 * single.shape[1], rel=0.03)
    assert single.shape[1] == pytest.approx(PANEL_HEIGHT_INCHES * DPI * 40 / 30, rel=0.06)


def test_a_grid_holds_cases_of_any_size(tmp_path: Path) -> None:
    image, label = make_case()
    rows = [
        OverlayRow(title="all", image=image, reference=label, prediction=label, spacing_mm=SPACING_MM),
        OverlayRow(title="one slice", image=image[3:4], reference=label[3:4], spacing_mm=(1.0, 4.0, 1.0)),
        OverlayRow(title="only the image", image=image.astype(np.int16), spacing_mm=SPACING_MM),
    ]
    picture = read_picture(draw_overlays(tmp_path / "deep" / "grid.png", rows))
    bands = [picture[i * ROW_HEIGHT : (i + 1) * ROW_HEIGHT] for i in range(3)]
    assert [bool(find_green(band).any()) for band in bands] == [True, True, False]
    assert [bool(find_red(band).any()) for band in bands] == [True, False, False]


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_nothing_to_see_is_drawn_too(tmp_path: Path, value: float) -> None:
    image, empty = np.full((4, 8, 8), value, np.float32), np.zeros((4, 8, 8), np.uint8)
    picture = read_picture(draw_case(tmp_path / "a.png", image, reference=empty, prediction=empty))
    assert not find_green(picture).any()
    assert not find_red(picture).any()


def test_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prediction has shape \(2, 4, 5\), the image has \(2, 4, 4\)"):
        draw_case(tmp_path / "a.png", np.zeros((2, 4, 4)), prediction=np.zeros((2, 4, 5), int))
    with pytest.raises(ValueError, match="at least one row"):
        draw_overlays(tmp_path / "a.png", [])
    assert not list(tmp_path.iterdir())


def test_slices_show_most_foreground_and_are_spread() -> None:
    label = np.zeros((40, 10, 10), np.uint8)
    label[5:35, 4, 4] = 1
    label[20, :5] = 1
    label[21, :4] = 1
    chosen = choose_slices([label], n_z=40, n_slices=3)
    assert 20 in chosen
    assert len(chosen) == 3
    assert min(np.diff(chosen)) >= 5
    assert 5 <= chosen[0] < chosen[-1] < 35


def test_a_small_structure_counts_as_much_as_a_large_one() -> None:
    label = np.zeros((30, 10, 10), np.uint8)
    label[:, :8] = 1
    label[7, 9, 9] = 2
    assert 7 in choose_slices([label], n_z=30, n_slices=1)


def test_slices_without_foreground_or_with_few() -> None:
    assert choose_slices([], n_z=30, n_slices=3) == [5, 15, 25]
    assert choose_slices([], n_z=1, n_slices=3) == [0]
    label = np.zeros((30, 4, 4), np.uint8)
    label[12:14, 1, 1] = 1
    assert choose_slices([label], n_z=30, n_slices=3) == [12, 13]


def test_window_frames_the_foreground() -> None:
    image = np.linspace(-1000, 3000, 4000).reshape(10, 20, 20)
    label = ((image > 0) & (image < 100)).astype(np.uint8)
    low, high = choose_window(image, [label])
    assert -110 < low < -80
    assert 180 < high < 210
    assert choose_window(image, [])[0] < -900
    assert choose_window(np.full((2, 2, 2), 7), []) == (6.5, 7.5)


def test_borders_of_a_pixel() -> None:
    label = np.zeros((3, 4), np.uint8)
    label[0, 3] = 5
    segments = {frozenset(map(tuple, segment)) for segment in find_borders(label)}
    corners = {"a": (3.0, 0.0), "b": (4.0, 0.0), "c": (4.0, 1.0), "d": (3.0, 1.0)}
    assert segments == {frozenset(corners[name] for name in pair) for pair in ("ab", "bc", "cd", "da")}
    assert find_borders(np.zeros((3, 4), np.uint8)).shape == (0, 2, 2)


def make_epochs(n: int) -> list[EpochFigures]:
    return [
        EpochFigures(
            epoch=i + 1,
            iteration=250 * (i + 1),
            time_s=2.0 * (i + 1),
            train_loss=1 / (i + 1),
            validation_loss=math.nan if i % 2 else 1.1 / (i + 1),
            validation_dice=math.nan if i == 2 else 1 - 1 / (i + 1),
            smoothed_dice=0.9 - 0.8 / (i + 1),
            class_dice=(0.5,),
            learning_rate=0.01 * (1 - i / n),
            step_s=0.1,
            data_wait_fraction=0.0,
        )
        for i in range(n)
    ]


@pytest.mark.parametrize("n", [0, 1, 40])
def test_curves_of_any_length(tmp_path: Path, n: int) -> None:
    picture = matplotlib.image.imread(draw_curves(tmp_path / "curves.png", make_epochs(n), title="fold 0"))
    assert picture.shape[:2] == (7 * DPI, 8 * DPI)
    blue = (picture[..., 2] > 0.6) & (picture[..., 0] < 0.3)
    assert blue.any() == (n > 0)

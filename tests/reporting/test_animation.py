"""Slices and animations are read back: what should be seen is there, in its colour and at its place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from autoseg.reporting.animation import EDGE_PIXELS, MAX_BYTES, MAX_FRAMES, choose_frames, write_animation
from autoseg.reporting.figures import OverlayRow
from autoseg.reporting.slice_pictures import (
    GREEN,
    RED,
    TITLE_PIXELS,
    WHITE,
    choose_view,
    draw_slice,
    draw_slices,
    write_strip,
)


def make_row(shape: tuple[int, int, int] = (30, 60, 80)) -> OverlayRow:
    """A block, of which the prediction is a voxel too far to the right and front."""
    reference = np.zeros(shape, np.uint8)
    reference[5:20, 20:40, 30:60] = 1
    image = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32) + 5 * reference
    prediction = np.roll(reference, (4, 4), axis=(1, 2))
    return OverlayRow(title="a", image=image, spacing_mm=(3.0, 1.0, 1.0), reference=reference, prediction=prediction)


def find_green(picture: NDArray) -> NDArray[np.bool_]:
    return (picture[..., 1] > 150) & (picture[..., 0] < 80) & (picture[..., 2] < 130)


def find_red(picture: NDArray) -> NDArray[np.bool_]:
    return (picture[..., 0] > 150) & (picture[..., 1] < 90) & (picture[..., 2] < 90)


def read_frames(path: Path) -> list[NDArray[np.uint8]]:
    frames = []
    with Image.open(path) as picture:
        for place in range(getattr(picture, "n_frames", 1)):
            picture.seek(place)
            frames.append(np.asarray(picture.convert("RGB")))
    return frames


def test_an_animation_walks_through_the_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    indices = write_animation(path, make_row())
    assert indices == list(range(3, 22)), "the labels and two slices around them"
    frames = read_frames(path)
    assert len(frames) == len(indices)
    assert max(frames[0].shape) == EDGE_PIXELS
    for index, frame in zip(indices, frames, strict=True):
        assert find_green(frame).any() == find_red(frame).any() == (5 <= index < 20)
    with Image.open(path) as picture:
        assert picture.info["loop"] == 0, "for ever"
    assert [file.name for file in tmp_path.iterdir()] == ["a.gif"], "no half-written file is left"


def test_without_a_reference_there_is_no_green(tmp_path: Path) -> None:
    write_animation(tmp_path / "a.gif", replace(make_row(), reference=None))
    frames = read_frames(tmp_path / "a.gif")
    assert not any(find_green(frame).any() for frame in frames)
    assert any(find_red(frame).any() for frame in frames)


def test_long_scans_are_thinned_out(tmp_path: Path) -> None:
    row = make_row((300, 20, 20))
    empty = np.zeros_like(row.prediction)
    frames = choose_frames(replace(row, reference=empty, prediction=None))
    assert len(frames) == MAX_FRAMES
    assert (frames[0], frames[-1]) == (0, 299)
    assert set(np.diff(frames)) <= {7, 8}
    one = OverlayRow(title="", image=np.zeros((1, 9, 9)), spacing_mm=(1.0, 1.0, 1.0))
    assert choose_frames(one) == [0]
    write_animation(tmp_path / "a.gif", one)
    assert len(read_frames(tmp_path / "a.gif")) == 1


def test_noise_does_not_make_large_files(tmp_path: Path) -> None:
    image = np.random.default_rng(0).normal(size=(60, 400, 400)).astype(np.float32)
    write_animation(tmp_path / "a.gif", OverlayRow(title="", image=image, spacing_mm=(1.0, 1.0, 1.0)))
    assert (tmp_path / "a.gif").stat().st_size < MAX_BYTES
    write_animation(tmp_path / "b.gif", make_row(), max_bytes=100_000)
    assert (tmp_path / "b.gif").stat().st_size < 100_000


def test_the_right_is_on_the_left_and_anterior_is_up() -> None:
    image, label = np.zeros((1, 100, 100), np.float32), np.zeros((1, 100, 100), np.uint8)
    label[0, 80:90, 10:20] = 1  # anterior, and on the patient's left
    label[0, 10, 90] = 1  # so that the view holds all
    row = OverlayRow(title="", image=image, spacing_mm=(1.0, 1.0, 1.0), reference=label)
    drawn = draw_slice(row, 0, choose_view(row, edge_pixels=200))
    y, x = np.nonzero(drawn == GREEN)
    assert (drawn.shape[0], drawn.shape[1]) == (200, 200)
    assert np.median(y) < 60
    assert np.median(x) > 140


def test_borders_are_where_the_labels_end() -> None:
    row = make_row()
    view = choose_view(row, edge_pixels=400)
    drawn = draw_slice(row, 10, view)
    scale = view.shape[1] / (view.columns[1] - view.columns[0])
    # Columns 34 to 64 of the prediction, from the right.
    x = np.flatnonzero(((drawn == RED) | (drawn == WHITE)).sum(axis=0) > 0.3 * 20 * scale)
    assert x.min() == pytest.approx((view.columns[1] - 64) * scale, abs=3)
    assert x.max() == pytest.approx((view.columns[1] - 34) * scale, abs=3)


def test_the_view_holds_all_labels_and_keeps_proportions() -> None:
    row = make_row((10, 300, 400))
    view = choose_view(row, edge_pixels=100)
    assert view.rows[0] < 20
    assert 44 < view.rows[1] < 300
    assert view.columns[0] < 30
    assert 64 < view.columns[1] < 400
    coarse = replace(row, spacing_mm=(1.0, 2.0, 1.0))
    view = choose_view(replace(coarse, reference=None, prediction=None), edge_pixels=300)
    assert view.shape == (300, 200)


def test_slices_about_errors_are_those_that_are_wrong() -> None:
    row = make_row()
    assert row.reference is not None
    prediction = row.reference.copy()
    prediction[18] = 0
    wrong = draw_slices(replace(row, prediction=prediction), n_slices=1, is_about_errors=True)
    assert wrong.indices == (18,)
    right = draw_slices(replace(row, prediction=row.reference), n_slices=3, is_about_errors=True)
    assert len(right.indices) == 3, "where nothing is wrong, the slices with most labels"


def test_several_slices_are_one_file(tmp_path: Path) -> None:
    slices = draw_slices(make_row(), n_slices=2)
    path = write_strip(tmp_path / "a.png", slices.pictures, title="$x$ 心\n")
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    first = slices.pictures[0]
    assert pixels.shape[0] == first.height + TITLE_PIXELS
    assert pixels.shape[1] > 2 * first.width
    for half in (pixels[:, : first.width], pixels[:, -first.width :]):
        assert find_green(half).any()
        assert find_red(half).any()
    assert all(data[:2] == b"\xff\xd8" for data in slices.files())


def test_intensities_that_are_no_numbers() -> None:
    row = make_row()
    row.image[:, 10:30] = np.nan
    row.image[:, 40:50] = np.inf
    drawn = draw_slice(row, 10, choose_view(row, edge_pixels=100))
    assert drawn.max() <= RED

"""Steps of post-processing on masks with known answers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from autoseg.core.errors import FormatError
from autoseg.core.steps import FOREGROUND, HOLES, LARGEST, SMALL, Step
from autoseg.inference.postprocess import apply_steps


def make_label() -> NDArray[np.uint8]:
    """A large organ 3 with a hole, a small piece of it far away, a tumour 7 that touches the organ, another alone."""
    label = np.zeros((10, 12, 14), np.uint8)
    label[1:6, 1:6, 1:6] = 3
    label[3, 3, 3] = 0
    label[8:10, 9:11, 11:13] = 3
    label[6, 2:4, 2:4] = 7
    label[9, 1, 12] = 7
    return label


def step(kind: str, *values: int, min_ml: float | None = None) -> Step:
    return Step(kind=kind, target="target", values=values, min_ml=min_ml)


def test_the_largest_component_of_a_label_is_kept() -> None:
    label = make_label()
    result = apply_steps(label, [step(LARGEST, 3)], voxel_ml=0.001)
    expected = label.copy()
    expected[8:10, 9:11, 11:13] = 0
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(label, make_label())


def test_the_largest_component_of_the_whole_foreground_takes_labels_together() -> None:
    result = apply_steps(make_label(), [Step(kind=LARGEST, target=FOREGROUND, values=(3, 7))], voxel_ml=0.001)
    expected = make_label()
    expected[8:] = 0
    np.testing.assert_array_equal(result, expected)


def test_components_that_touch_at_a_corner_are_one() -> None:
    label = np.zeros((3, 3, 3), np.uint8)
    label[0, 0, 0] = label[1, 1, 1] = label[2, 2, 2] = 1
    np.testing.assert_array_equal(apply_steps(label, [step(LARGEST, 1)], voxel_ml=1), label)


def test_components_under_a_volume_are_removed_and_those_of_just_that_volume_stay() -> None:
    label = make_label()
    result = apply_steps(label, [step(SMALL, 3, min_ml=0.009)], voxel_ml=0.001)
    assert (result == 3).sum() == 124
    np.testing.assert_array_equal(apply_steps(label, [step(SMALL, 3, min_ml=0.008)], voxel_ml=0.001), label)
    np.testing.assert_array_equal(result == 7, label == 7)


def test_holes_are_filled_but_what_opens_to_the_outside_or_holds_another_label_is_not() -> None:
    label = make_label()
    label[2, 2, 2] = 7
    label[1:3, 4, 4] = 0
    result = apply_steps(label, [step(HOLES, 3)], voxel_ml=0.001)
    assert result[3, 3, 3] == 3
    assert result[2, 2, 2] == 7
    assert (result[1:3, 4, 4] == 0).all()


def test_holes_of_a_slice_are_filled_whichever_axis_is_thin() -> None:
    image = np.zeros((9, 9), np.uint8)
    image[2:7, 2:7] = 3
    image[4, 4] = 0
    for axis in range(3):
        filled = apply_steps(np.expand_dims(image, axis), [step(HOLES, 3)], voxel_ml=1)
        assert filled.shape == np.expand_dims(image, axis).shape
        assert filled.sum() == 3 * 25


def test_steps_follow_each_other_and_labels_that_are_absent_do_not_matter() -> None:
    steps = [step(LARGEST, 3), step(HOLES, 3), step(LARGEST, 9), step(HOLES, 9), step(SMALL, 7, min_ml=0.002)]
    result = apply_steps(make_label(), steps, voxel_ml=0.001)
    assert [(result == value).sum() for value in (3, 7)] == [125, 4]
    empty = np.zeros((3, 4, 5), np.uint8)
    np.testing.assert_array_equal(apply_steps(empty, steps, voxel_ml=0.001), empty)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), density=st.sampled_from([0.1, 0.4]))
def test_the_orientation_does_not_matter(seed: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    label = (rng.random((5, 6, 7)) < density) * rng.integers(1, 3, (5, 6, 7))
    steps = [step(LARGEST, 1, 2), step(SMALL, 1, min_ml=0.002), step(HOLES, 2)]
    expected = apply_steps(label.astype(np.uint8), steps, voxel_ml=0.001)
    for axes in itertools.chain([(0,), (1,), (2,), (0, 1, 2)]):
        flipped = apply_steps(np.flip(label, axes).astype(np.uint8), steps, voxel_ml=0.001)
        np.testing.assert_array_equal(np.flip(flipped, axes), expected)


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "dilate", "values": (1,)},
        {"kind": LARGEST, "values": ()},
        {"kind": SMALL, "values": (1,)},
        {"kind": LARGEST, "values": (1,), "min_ml": 1.0},
        {"kind": HOLES, "values": (1, 2)},
    ],
)
def test_steps_that_make_no_sense_are_refused(bad: dict) -> None:
    with pytest.raises(FormatError):
        Step(target="x", **bad)

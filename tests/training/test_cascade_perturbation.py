"""What is done to the predictions of a first stage, against scipy's morphology."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from autoseg.training import cascade
from autoseg.training.cascade import CLOSE, GROW, MAX_REMOVED_FRACTION, OPEN, SHRINK, perturb

SHAPE = (14, 18, 20)


def make_classes(seed: int = 0, dtype: type = np.uint8) -> NDArray:
    """Blobs of the classes 1 and 4, some at the border, of different sizes."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), 1.5)
    classes: NDArray = np.zeros(SHAPE, dtype)
    classes[noise > 0.1] = 1
    classes[noise < -0.15] = 4
    return classes


def always(monkeypatch: pytest.MonkeyPatch, *, morphology: float, removal: float) -> None:
    monkeypatch.setattr(cascade, "MORPHOLOGY_PROBABILITY", morphology)
    monkeypatch.setattr(cascade, "REMOVAL_PROBABILITY", removal)


def ball(radius: int) -> NDArray[np.bool_]:
    offsets = np.indices((2 * radius + 1,) * 3) - radius
    return np.asarray((offsets**2).sum(axis=0) <= radius**2)


def change_by_hand(mask: NDArray[np.bool_], kind: int, radius: int) -> NDArray[np.bool_]:
    """Outside the array nothing is known, so nothing shrinks from its border."""

    def grow(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return np.asarray(ndimage.binary_dilation(mask, ball(radius)))

    def shrink(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return np.asarray(ndimage.binary_erosion(mask, ball(radius), border_value=1))

    return {
        GROW: grow,
        SHRINK: shrink,
        OPEN: lambda mask: grow(shrink(mask)),
        CLOSE: lambda mask: shrink(grow(mask)),
    }[kind](mask)


@pytest.mark.parametrize("radius", [1, 2, 4])
@pytest.mark.parametrize("kind", [GROW, SHRINK, OPEN, CLOSE])
def test_structures_change_as_with_a_ball(kind: int, radius: int) -> None:
    """What grows covers other classes, what shrinks leaves background."""
    for seed, class_index in ((0, 1), (1, 4)):
        classes = make_classes(seed)
        mask = classes == class_index
        changed = change_by_hand(mask, kind, radius)
        assert (changed != mask).any()
        expected = classes.copy()
        expected[mask] = 0
        expected[changed] = class_index
        result = classes.copy()
        cascade._change_size(result, class_index, kind=kind, radius=radius)
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("kind", [GROW, SHRINK, OPEN, CLOSE])
def test_a_small_structure_far_from_the_borders_changes_as_with_a_ball(kind: int) -> None:
    """Work is done in a box around it: nothing may be cut off there."""
    classes = np.zeros((40, 41, 42), np.uint8)
    classes[15:24, 15:24, 16:25] = 2
    classes[18:21, 18:21, 18:21] = 0
    classes[20, 20, 27] = 2
    expected = 2 * change_by_hand(classes == 2, kind, 3).astype(np.uint8)
    result = classes.copy()
    cascade._change_size(result, 2, kind=kind, radius=3)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("kind", [GROW, SHRINK, OPEN, CLOSE])
@pytest.mark.parametrize("value", [0, 1])
def test_what_fills_the_patch_or_is_not_there_stays(kind: int, value: int) -> None:
    classes = np.full((4, 5, 6), value, np.uint8)
    cascade._change_size(classes, 1, kind=kind, radius=2)
    assert (classes == value).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_shape_and_type_stay_and_no_class_appears(dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch, morphology=1, removal=1)
    classes = make_classes(dtype=dtype)
    before = classes.copy()
    classes.flags.writeable = False
    n_changed = 0
    for seed in range(20):
        result = perturb(classes, np.random.default_rng(seed))
        assert result.shape == SHAPE
        assert result.dtype == dtype
        assert set(np.unique(result)) <= {0, 1, 4}
        np.testing.assert_array_equal(classes, before)
        n_changed += bool((result != classes).any())
    assert n_changed == 20


def test_nothing_found_stays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch, morphology=1, removal=1)
    assert not perturb(np.zeros(SHAPE, np.uint8), np.random.default_rng(0)).any()


def test_the_same_draw_does_the_same_and_another_one_does_not() -> None:
    classes = make_classes()
    first, again, other = ([perturb(classes, rng) for _ in range(10)] for rng in map(np.random.default_rng, (0, 0, 1)))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_what_is_not_drawn_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = make_classes()
    rng = np.random.default_rng(0)
    n_same = sum(np.array_equal(perturb(classes, rng), classes) for _ in range(300))
    # Neither of both: 0.6 * 0.8 of the draws; five standard errors. Rarely a draw changes nothing.
    assert n_same / 300 == pytest.approx(0.48, abs=5 * 0.5 / 300**0.5)
    always(monkeypatch, morphology=0, removal=0)
    assert perturb(classes, rng) is classes


def test_one_of_the_small_components_is_removed_and_large_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch, morphology=0, removal=1)
    classes = np.zeros((10, 10, 10), np.uint8)
    classes[:2] = 3
    classes[4, 1:3, 1:3] = 3
    classes[4, 7:9, 7:9] = 3
    classes[8, 8, 8] = 5
    assert (classes[:2] > 0).sum() > MAX_REMOVED_FRACTION * classes.size
    gone = set()
    for seed in range(20):
        result = perturb(classes, np.random.default_rng(seed))
        assert (result[:2] == 3).all()
        assert not (result == 5).any()
        left = (bool(result[4, 1, 1]), bool(result[4, 7, 7]))
        assert sorted(left) == [False, True]
        assert (result[4] > 0).sum() == 4
        gone.add(left)
    assert len(gone) == 2

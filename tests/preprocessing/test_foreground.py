"""Voxels that patches are centred on: evenly from a class, and by its components."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from autoseg.preprocessing.foreground import MAX_FOREGROUND_PER_CLASS, sample_foreground, sample_voxels


def test_foreground_of_large_classes_is_an_even_draw() -> None:
    label = np.zeros((40, 40, 40), np.uint16)
    label[:, :, :20] = 1
    label[:, :, 30:32] = 300
    counts, positions = sample_foreground(label, n_classes=301, seed=3)
    assert len(counts) == 300
    assert counts[0] == MAX_FOREGROUND_PER_CLASS
    assert counts[299] == 40 * 40 * 2
    assert sum(counts) == len(positions)
    assert (label[tuple(positions[: counts[0]].T)] == 1).all()
    assert (label[tuple(positions[counts[0] :].T)] == 300).all()
    assert len(np.unique(positions, axis=0)) == len(positions)
    # Within five standard errors of the middle of the class along each axis.
    drawn = positions[: counts[0]]
    assert np.abs(drawn.mean(axis=0) - (19.5, 19.5, 9.5)).max() < 5 * 12 / np.sqrt(len(drawn))
    again = sample_foreground(label, n_classes=301, seed=3)[1]
    np.testing.assert_array_equal(again, positions)
    assert not np.array_equal(sample_foreground(label, n_classes=301, seed=4)[1], positions)


def cubes(n_axes: int, n_small: int, edge: int) -> NDArray[np.uint8]:
    """Class 2: a cube of 40 voxels along each of the last axes, and smaller ones; class 1 between them."""
    label = np.zeros((64, 96, 96)[3 - n_axes :], np.uint8)
    label[..., 45:60] = 1
    label[(slice(2, 42),) * n_axes] = 2
    for index in range(n_small):
        y, x = divmod(index, 5)
        label[
            (slice(50, 50 + edge),) * (n_axes - 2) + (slice(5 * y, 5 * y + edge), slice(70 + 5 * x, 70 + 5 * x + edge))
        ] = 2
    return label.reshape((1,) * (3 - n_axes) + label.shape)


@pytest.mark.parametrize(("n_axes", "n_small", "edge"), [(3, 5, 3), (2, 5, 3), (3, 20, 1), (2, 20, 1), (3, 1, 20)])
def test_half_of_a_class_is_drawn_by_component_by_its_diameter(n_axes: int, n_small: int, edge: int) -> None:
    """So that small lesions are seen, and single voxels that are there by mistake do not take all."""
    label = cubes(n_axes, n_small, edge)
    counts, positions = sample_foreground(label, n_classes=3, seed=5)
    kept = positions[counts[0] :]
    n_voxels, half = 40**n_axes + n_small * edge**n_axes, len(kept) // 2
    assert counts[1] == len(kept) == 2 * min(MAX_FOREGROUND_PER_CLASS // 2, n_voxels)
    assert (label[tuple(kept.T)] == 2).all()
    evenly, by_component = kept[:half], kept[half:]
    assert len(np.unique(evenly, axis=0)) == half
    of_evenly = n_small * edge**n_axes / n_voxels
    of_components = n_small * edge / (40 + n_small * edge)
    for drawn, expected in ((evenly, of_evenly), (by_component, of_components)):
        is_small = drawn[:, 2] >= 70
        assert is_small.mean() == pytest.approx(expected, abs=5 * np.sqrt(expected * (1 - expected) / half))
        # Evenly from 2 to 41 along each axis that there is.
        large = drawn[~is_small][:, 3 - n_axes :]
        assert np.abs(large.mean(axis=0) - 21.5).max() < 5 * 11.6 / np.sqrt(len(large))
    again = sample_foreground(label, n_classes=3, seed=5)[1]
    np.testing.assert_array_equal(again, positions)
    assert not np.array_equal(sample_foreground(label, n_classes=3, seed=6)[1], positions)


def test_a_structure_in_one_slice_of_a_volume_has_the_diameter_of_its_area() -> None:
    """As where somebody has annotated a few slices only."""
    label = np.zeros((5, 60, 60), np.uint8)
    label[2, 2:42, 2:42] = label[2, 2:42:4, 50] = 1
    positions = sample_foreground(label, n_classes=2, seed=0)[1]
    share = (positions[len(positions) // 2 :, 2] == 50).mean()
    assert share == pytest.approx(10 / 50, abs=5 * np.sqrt(0.2 * 0.8 / 1610))


def test_of_few_voxels_in_two_components_all_are_kept_once_and_as_many_are_drawn() -> None:
    label = np.zeros((9, 9, 9), np.uint8)
    label[1:4, 1:4, 1:4] = label[7, 7, 7] = 1
    counts, positions = sample_foreground(label, n_classes=2, seed=0)
    assert counts == (56,)
    np.testing.assert_array_equal(positions[:28], np.argwhere(label))
    # A chance of 1 to 3, in 28 draws.
    assert 1 <= (positions[28:] == 7).all(axis=1).sum() <= 17


@pytest.mark.parametrize("edge", [10, 30])
def test_a_class_of_one_component_is_drawn_evenly_alone(edge: int) -> None:
    """As before there was a draw by component: a training on such cases repeats to the bit."""
    label = np.zeros((40, 40, 40), np.uint8)
    label[3 : 3 + edge, 2 : 2 + edge, 1 : 1 + edge] = 2
    voxels = np.flatnonzero(label == 2)
    if len(voxels) > MAX_FOREGROUND_PER_CLASS:
        voxels = np.sort(np.random.default_rng(7).choice(voxels, MAX_FOREGROUND_PER_CLASS, replace=False))
    counts, positions = sample_foreground(label, n_classes=4, seed=7)
    assert counts == (0, len(voxels), 0)
    np.testing.assert_array_equal(positions, np.stack(np.unravel_index(voxels, label.shape), axis=1))


def test_every_kept_voxel_is_of_its_class() -> None:
    """Of many components that lie among each other."""
    label = np.random.default_rng(0).choice(np.array([0, 1, 2, 3, 4, 5], np.uint16), (40, 41, 42), p=[0.6, *[0.08] * 5])
    counts, positions = sample_foreground(label, n_classes=5, seed=0)
    assert len(counts) == 4
    assert sum(counts) == len(positions)
    np.testing.assert_array_equal(label[tuple(positions.T)], np.repeat(np.arange(1, 5), counts))


def test_of_many_voxels_some_are_drawn_evenly() -> None:
    mask = np.zeros((30, 30, 30), bool)
    mask[5:25, :, 10:] = True
    drawn = sample_voxels(mask, np.random.default_rng(0))
    assert drawn.shape == (MAX_FOREGROUND_PER_CLASS, 3)
    assert drawn.dtype == np.int32
    assert mask[tuple(drawn.T)].all()
    assert len(np.unique(drawn, axis=0)) == len(drawn)
    np.testing.assert_array_equal(drawn, sample_voxels(mask, np.random.default_rng(0)))
    # Uniform on 5 to 24: its mean has a deviation of 5.8 / 64.
    assert drawn[:, 0].mean() == pytest.approx(14.5, abs=5 * 5.8 / 64)
    assert len(sample_voxels(np.zeros((2, 2, 2), bool), np.random.default_rng(0))) == 0

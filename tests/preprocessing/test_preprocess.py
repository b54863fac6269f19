"""From a scan to the network's grid and back, and the normalization of intensities."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from tiny_plans import make_tiny_configuration, make_tiny_plan

from autoseg.core.geometry import Geometry, make_geometry
from autoseg.core.labels import LabelSpec
from autoseg.core.serialize import read_json, write_json
from autoseg.planning.plan import ChannelNormalization, Plan
from autoseg.preprocessing.normalize import nonzero_mask, normalize
from autoseg.preprocessing.occupied import find_occupied
from autoseg.preprocessing.preprocess import (
    CaseRecord,
    preprocess_image,
    preprocess_label,
    record_case,
    restore_label,
)

SPACING_MM = (0.9, 4.0, 1.3)
SHAPE = (10, 7, 9)
# (1, 2, 0) and (2, 0, 1) are not their own inverses: with the other four alone a wrong inverse would not show.
ORDERS = list(itertools.permutations((0, 1, 2)))


def channel(scheme: str, *, use_mask: bool = False, **changes: float) -> ChannelNormalization:
    made = ChannelNormalization(
        channel="MR", scheme=scheme, use_mask=use_mask, mean=0.0, std=1.0, percentile_00_5=-1e9, percentile_99_5=1e9
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def make_plan(
    spacing_mm: tuple[float, ...],
    axis_order: tuple[int, ...] = (0, 1, 2),
    normalization: tuple[ChannelNormalization, ...] | None = None,
) -> Plan:
    """A plan with one configuration, named after its axes; `spacing_mm` is in the network's order."""
    configuration = make_tiny_configuration((8,) * len(spacing_mm), spacing_mm=spacing_mm)
    first, second, third = axis_order
    return replace(
        make_tiny_plan(configuration, labels=LabelSpec(names=("a", "b"), values=(1, 2))),
        normalization=normalization or (channel("zscore"),),
        axis_order=(first, second, third),
    )


def make_scan(seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.uint8], Geometry]:
    """An image that is zero around a box, classes within the box, and an oblique geometry."""
    rng = np.random.default_rng(seed)
    image = np.zeros((1, *SHAPE), np.float32)
    classes = np.zeros(SHAPE, np.uint8)
    box = (slice(2, 9), slice(0, 6), slice(3, 8))
    image[(0, *box)] = rng.uniform(1, 2, (7, 6, 5))
    classes[box] = rng.integers(0, 3, (7, 6, 5))
    angle = 0.3
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag(SPACING_MM[::-1])
    affine[:3, 3] = (-31.5, 4.25, 100)
    return image, classes, make_geometry(SHAPE[::-1], affine, header_spacing_mm=SPACING_MM[::-1])


def in_order(values: tuple[float, ...], order: tuple[int, ...]) -> tuple[float, ...]:
    return tuple(values[axis] for axis in order)


@pytest.mark.parametrize("order", ORDERS)
def test_round_trip_on_the_scans_own_spacing_is_exact(order: tuple[int, ...]) -> None:
    image, classes, geometry = make_scan()
    plan = make_plan(in_order(SPACING_MM, order), order)
    record = record_case(find_occupied(image), geometry, plan, plan.recommended)
    assert record.crop.shape == (7, 6, 5)
    assert record.shape == in_order((7, 6, 5), order)
    on_grid = preprocess_label(classes, record)
    assert tuple(on_grid.shape) == record.shape
    np.testing.assert_array_equal(restore_label(on_grid, record), classes)


@pytest.mark.parametrize("order", ORDERS)
def test_image_and_label_go_to_the_same_place(order: tuple[int, ...]) -> None:
    """A marked voxel is found at the place that the order of the axes says, in image and label alike."""
    image, classes, geometry = make_scan()
    classes[:] = 0
    image[0, 5, 1, 4], classes[5, 1, 4] = 50, 2
    plan = make_plan(in_order(SPACING_MM, order), order)
    record = record_case(find_occupied(image), geometry, plan, plan.recommended)
    place = in_order((5 - 2, 1 - 0, 4 - 3), order)
    assert np.argwhere(preprocess_label(classes, record).numpy() == 2).tolist() == [list(place)]
    result = preprocess_image(image, record, plan)[0]
    assert np.unravel_index(int(result.argmax()), result.shape) == place


@pytest.mark.parametrize("order", ORDERS)
def test_smooth_structures_survive_a_coarser_or_finer_grid(order: tuple[int, ...]) -> None:
    z, y, x = np.ogrid[:40, :36, :32]
    ball = (((z - 18) / 13) ** 2 + ((y - 20) / 11) ** 2 + ((x - 15) / 10) ** 2 < 1).astype(np.uint8)
    image = ndimage.gaussian_filter(ball.astype(np.float32), 1)[None] + 1
    geometry = make_geometry((32, 36, 40), np.diag([1.1, 0.9, 2.0, 1]), header_spacing_mm=(1.1, 0.9, 2.0))
    for factor in (0.7, 1.5):
        target = in_order((2.0 * factor, 0.9 * factor, 1.1 * factor), order)
        record = record_case(find_occupied(image), geometry, make_plan(target, order), "3d_fullres")
        assert record.shape == in_order((round(40 / factor), round(36 / factor), round(32 / factor)), order)
        on_grid = preprocess_label(ball, record)
        restored = restore_label(on_grid, record)
        assert 2 * (restored & ball).sum() / (restored.sum() + ball.sum()) > 0.95
        np.testing.assert_allclose(ndimage.center_of_mass(restored), ndimage.center_of_mass(ball), atol=0.25)


def test_only_images_are_smoothed_where_the_plan_asks_for_it() -> None:
    image, classes, geometry = make_scan()
    plan = make_plan((6.0, 4.0, 3.0))
    (configuration,) = plan.configurations.values()
    smoothing = replace(plan, configurations={configuration.name: replace(configuration, smoothed=True)})
    plain, smoothed = (
        record_case(find_occupied(image), geometry, made, configuration.name) for made in (plan, smoothing)
    )
    assert (plain.smoothed, smoothed.smoothed) == (False, True)
    assert torch.equal(preprocess_label(classes, plain), preprocess_label(classes, smoothed))
    found = [preprocess_image(image, record, plan) for record in (plain, smoothed)]
    assert found[0].shape == found[1].shape
    assert found[1].std() < found[0].std()


def test_restoring_fills_background_outside_the_crop() -> None:
    image, _, geometry = make_scan()
    record = record_case(find_occupied(image), geometry, make_plan((1.0, 3.0, 1.0)), "3d_fullres")
    expected = np.zeros(SHAPE, np.uint8)
    expected[record.crop.slices] = 1
    full = torch.full(record.shape, 7, dtype=torch.uint8)
    np.testing.assert_array_equal(restore_label(full, record), expected * 7)


def test_record_survives_json(tmp_path: Path) -> None:
    image, _, geometry = make_scan()
    record = record_case(find_occupied(image), geometry, make_plan((4.0, 1.1, 1.2), (1, 2, 0)), "3d_fullres")
    assert record.nearest_axis == 0
    write_json(tmp_path / "record.json", record)
    assert read_json(tmp_path / "record.json", CaseRecord) == record


def test_slices_of_a_2d_configuration_keep_their_distance() -> None:
    image, classes, geometry = make_scan()
    plan = make_plan((0.5, 0.5), (1, 0, 2))
    record = record_case(find_occupied(image), geometry, plan, plan.recommended)
    assert record.spacing_mm == (4.0, 0.5, 0.5)
    assert record.shape == (6, round(7 * 0.9 / 0.5), round(5 * 1.3 / 0.5))
    # Each slice is resampled by itself: changing one slice changes that slice alone. The values keep the image's range
    # and mean, so that clipping and z-score stay the same.
    changed = image.copy()
    changed[0, 2:9, 3, 3:8] = changed[0, 2:9, 3, 3:8][::-1, ::-1]
    before, after = preprocess_image(image, record, plan), preprocess_image(changed, record, plan)
    differs = (before - after).abs().amax(dim=(0, 2, 3)) > 1e-4
    assert differs.tolist() == [False, False, False, True, False, False]
    assert preprocess_label(classes, record).shape == record.shape


def test_image_of_zeros_is_kept_whole() -> None:
    _, _, geometry = make_scan()
    image = np.zeros((1, *SHAPE), np.float32)
    for use_mask in (False, True):
        plan = make_plan(SPACING_MM, normalization=(channel("zscore", use_mask=use_mask),))
        record = record_case(find_occupied(image), geometry, plan, plan.recommended)
        assert record.crop.shape == SHAPE
        with np.errstate(all="raise"):
            assert not preprocess_image(image, record, plan).any()


def test_input_is_not_changed() -> None:
    image, classes, geometry = make_scan()
    copies = image.copy(), classes.copy()
    plan = make_plan(SPACING_MM, normalization=(channel("zscore", use_mask=True),))
    record = record_case(find_occupied(image), geometry, plan, plan.recommended)
    preprocess_image(image, record, plan).add_(1)
    preprocess_label(classes, record).add_(1)
    np.testing.assert_array_equal(image, copies[0])
    np.testing.assert_array_equal(classes, copies[1])


# -- normalization -----------------------------------------------------------------------------------------------------


def test_ct_is_clipped_then_scaled_by_the_datasets_figures() -> None:
    scheme = channel("ct", mean=50.0, std=25.0, percentile_00_5=-100.0, percentile_99_5=300.0)
    image = np.array([-1000, -100, 50, 75, 300, 3000], np.float32).reshape(1, 1, 1, 6)
    assert normalize(image, (scheme,)).flatten().tolist() == [-6, -6, 0, 1, 10, 10]


def test_zscore_uses_the_image_itself() -> None:
    image = np.array([1, 3, 1, 3], np.float32).reshape(1, 1, 1, 4)
    assert normalize(image, (channel("zscore"),)).flatten().tolist() == [-1, 1, -1, 1]


def test_masked_zscore_ignores_the_outside_and_leaves_it_zero() -> None:
    image = np.zeros((1, 5, 5, 5), np.float32)
    image[0, 1:4, 1:4, 1:4] = np.where(np.indices((3, 3, 3)).sum(0) % 2 == 0, 10, 20)
    # A hole counts as inside.
    image[0, 2, 2, 2] = 0
    inside = image[0, 1:4, 1:4, 1:4]
    result = normalize(image, (channel("zscore", use_mask=True),))
    expected = (inside - inside.mean()) / inside.std()
    np.testing.assert_allclose(result[0, 1:4, 1:4, 1:4], expected, rtol=1e-5)
    assert result[0, 2, 2, 2] < -1
    assert np.count_nonzero(result) == 27


def test_mask_is_the_union_of_the_channels_with_holes_filled() -> None:
    image = np.zeros((2, 5, 5, 5), np.float32)
    image[0, 1:4, 1:4, 1:3] = 1
    image[1, 1:4, 1:4, 3] = -1
    image[:, 2, 2, 2] = 0
    expected = np.zeros((5, 5, 5), bool)
    expected[1:4, 1:4, 1:4] = True
    np.testing.assert_array_equal(nonzero_mask(image), expected)


def test_rgb_goes_to_0_1_and_each_channel_has_its_own_scheme() -> None:
    image = np.stack([np.full((1, 1, 2), 51.0), np.array([[[4.0, 8.0]]])]).astype(np.float32)
    result = normalize(image, (channel("rgb_to_0_1"), channel("zscore")))
    np.testing.assert_allclose(result[0], 0.2)
    np.testing.assert_allclose(result[1], [[[-1, 1]]])
    assert result.dtype == np.float32


def test_a_channel_is_rescaled_by_its_own_range_or_kept() -> None:
    image = np.array([[2, 4, 6], [2, 4, 6]], np.float32).reshape(2, 1, 1, 3)
    result = normalize(image, (channel("rescale_to_0_1"), channel("none")))
    assert result.reshape(2, 3).tolist() == [[0, 0.5, 1], [2, 4, 6]]


def test_a_channel_that_a_case_lacks_stays_zero() -> None:
    image = np.array([[0, 0, 0], [25, 50, 75]], np.float32).reshape(2, 1, 1, 3)
    result = normalize(image, (channel("ct", mean=50.0, std=25.0),) * 2)
    assert result.reshape(2, 3).tolist() == [[0, 0, 0], [-1, 0, 1]]


@pytest.mark.parametrize("value", [0.0, 0.1, -1024.0, 1e6])
@pytest.mark.parametrize("use_mask", [False, True])
def test_constant_image_does_not_divide_by_zero(value: float, use_mask: bool) -> None:
    image = np.full((1, 4, 4, 4), value, np.float32)
    with np.errstate(all="raise"):
        result = normalize(image, (channel("zscore", use_mask=use_mask),))
        ct = normalize(image, (channel("ct", mean=float(np.float32(value)), std=0.0),))
    assert not result.any()
    assert not ct.any()

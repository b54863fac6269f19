"""Resampling against skimage, scipy and torch, and against dense implementations written here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage.transform import resize

from autoseg.preprocessing import resample
from autoseg.preprocessing.resample import (
    LINEAR,
    axis_matrix,
    choose_nearest_axis,
    resample_image,
    resample_label,
    resample_logits,
)

SHAPES = [
    ((7, 9, 11), (13, 17, 20)),
    ((13, 16, 20), (5, 7, 9)),
    ((6, 15, 8), (12, 4, 8)),
    ((1, 9, 10), (1, 5, 23)),
    ((5, 9, 10), (1, 12, 3)),
    ((1, 4, 1), (3, 9, 2)),
    ((31, 2, 3), (30, 3, 2)),
]


def random_volume(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def blobs(shape: tuple[int, int, int], n_classes: int, *, seed: int = 0, dtype: type = np.uint8) -> NDArray:
    """A label map of smooth regions: each voxel has the class whose blurred noise is largest."""
    rng = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(rng.normal(size=shape), 1.5) for _ in range(n_classes)]
    return np.argmax(fields, axis=0).astype(dtype)


@pytest.mark.parametrize(("shape", "target"), SHAPES)
def test_image_equals_skimage(shape: tuple[int, int, int], target: tuple[int, int, int]) -> None:
    image = random_volume((2, *shape))
    before = image.copy()
    result = resample_image(torch.from_numpy(image), target, nearest_axis=None)
    options = {"order": 3, "mode": "edge", "anti_aliasing": False, "clip": True, "preserve_range": True}
    expected = np.stack([resize(channel.astype(np.float64), target, **options) for channel in image])
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-5)
    assert result.dtype == torch.float32
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(("shape", "target"), SHAPES)
def test_image_equals_scipy_within_its_range(shape: tuple[int, int, int], target: tuple[int, int, int]) -> None:
    image = random_volume(shape, seed=1)
    factors = np.divide(target, shape)
    expected = ndimage.zoom(image.astype(np.float64), factors, order=3, mode="nearest", grid_mode=True)
    result = resample_image(torch.from_numpy(image)[None], target, nearest_axis=None)[0]
    np.testing.assert_allclose(result.numpy(), np.clip(expected, image.min(), image.max()), atol=1e-5)


def test_image_stays_within_the_range_of_each_channel() -> None:
    image = np.zeros((2, 8, 8, 8), np.float32)
    image[0, 4:] = 1
    image[1, :, 4:] = 100
    result = resample_image(torch.from_numpy(image), (19, 21, 8), nearest_axis=None)
    assert result[0].aminmax() == (0, 1)
    assert result[1].aminmax() == (0, 100)


def test_same_shape_is_left_alone() -> None:
    image = torch.from_numpy(random_volume((1, 4, 5, 6)))
    assert torch.equal(resample_image(image, (4, 5, 6), nearest_axis=0), image)


def test_smoothing_makes_larger_voxels_means_and_leaves_smaller_ones() -> None:
    noise = torch.randn((1, 30, 36, 45), generator=torch.Generator().manual_seed(0))
    plain, smoothed = (
        resample_image(noise, (10, 12, 15), nearest_axis=None, smoothed=smoothed) for smoothed in (False, True)
    )
    means = torch.nn.functional.avg_pool3d(noise, 3)
    # Every third voxel keeps its noise; a mean of 27 has a fifth of it, a Gaussian of about that size a little less.
    assert plain.std() > 0.9
    assert 0.7 < smoothed.std() / means.std() < 1
    assert np.corrcoef(means.flatten(), smoothed.flatten())[0, 1] > 0.85
    constant = torch.full((1, 30, 36, 45), 3.0)
    torch.testing.assert_close(
        resample_image(constant, (10, 12, 15), nearest_axis=None, smoothed=True), constant[:, :10, :12, :15]
    )
    larger = [resample_image(noise, (31, 40, 90), nearest_axis=None, smoothed=smoothed) for smoothed in (False, True)]
    assert torch.equal(*larger)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("n_out", [3, 5, 11])
def test_nearest_axis_never_mixes_planes(axis: int, n_out: int) -> None:
    """Every plane of the result is one source plane, resampled by itself: the one at the same place."""
    image = random_volume((1, 5, 6, 7), seed=2)
    n_in = image.shape[axis + 1]
    target = [9, 8, 10]
    target[axis] = n_out
    result = resample_image(torch.from_numpy(image), target, nearest_axis=axis)[0].numpy()
    in_plane = [size for other, size in enumerate(target) if other != axis]
    for plane in range(n_out):
        source = min(int((plane + 0.5) * n_in / n_out), n_in - 1)
        expected = resize(
            image[0].take(source, axis).astype(np.float64),
            in_plane,
            order=3,
            mode="edge",
            anti_aliasing=False,
            clip=False,
        )
        np.testing.assert_allclose(
            result.take(plane, axis), np.clip(expected, image.min(), image.max()), atol=1e-5, err_msg=f"plane {plane}"
        )


def test_nearest_axis_is_the_coarsest_of_source_else_target() -> None:
    assert choose_nearest_axis((5.0, 1.0, 1.0), (1.0, 1.0, 1.0)) == 0
    assert choose_nearest_axis((1.0, 1.0, 1.0), (1.0, 5.0, 1.0)) == 1
    assert choose_nearest_axis((1.0, 1.0, 5.0), (5.0, 1.0, 1.0)) == 2
    assert choose_nearest_axis((3.0, 1.0, 1.0), (1.0, 1.0, 1.0)) is None
    assert choose_nearest_axis((0.25, 1.0, 1.0), (1.0, 1.0, 1.0)) is None


# -- labels ------------------------------------------------------------------------------------------------------------


def masks_by_hand(label: NDArray, shape: tuple[int, ...], nearest_axis: int | None) -> NDArray[np.float64]:
    """(K, *shape): each class' mask, interpolated along one axis after the other by the definition."""
    masks = np.stack([label == value for value in range(int(label.max()) + 1)]).astype(np.float64)
    for axis, n_out in enumerate(shape):
        n_in = label.shape[axis]
        positions = (np.arange(n_out) + 0.5) * n_in / n_out - 0.5
        below = np.floor(positions + (0.5 if axis == nearest_axis else 0)).astype(int)
        weight = np.zeros(n_out) if axis == nearest_axis else positions - below
        weight = weight.reshape([-1 if other == axis + 1 else 1 for other in range(4)])
        low = masks.take(np.clip(below, 0, n_in - 1), axis + 1)
        high = masks.take(np.clip(below + 1, 0, n_in - 1), axis + 1)
        masks = (1 - weight) * low + weight * high
    return masks


@pytest.mark.parametrize("nearest_axis", [None, 0, 2])
@pytest.mark.parametrize("target", [(13, 7, 31), (5, 19, 10), (3, 3, 3), (1, 24, 5), (9, 22, 13)])
def test_label_has_the_largest_interpolated_mask(target: tuple[int, int, int], nearest_axis: int | None) -> None:
    label = blobs((9, 11, 13), 5)
    result = resample_label(torch.from_numpy(label), target, nearest_axis=nearest_axis).numpy()
    masks = masks_by_hand(label, target, nearest_axis)
    ordered = np.sort(masks, axis=0)
    clear = ordered[-1] - ordered[-2] > 1e-5
    assert clear.mean() > 0.8
    np.testing.assert_array_equal(result[clear], masks.argmax(axis=0)[clear])
    chosen = np.take_along_axis(masks, result[None].astype(int), axis=0)[0]
    np.testing.assert_allclose(chosen, ordered[-1], atol=1e-5)


def test_label_answers_known_by_hand() -> None:
    line = torch.tensor([0, 3, 3, 7], dtype=torch.uint8).reshape(1, 1, 4)
    assert resample_label(line, (1, 1, 8), nearest_axis=None).flatten().tolist() == [0, 0, 3, 3, 3, 3, 7, 7]
    # Half way between two voxels each has one half: the lowest class wins.
    assert resample_label(line, (1, 1, 2), nearest_axis=None).flatten().tolist() == [0, 3]
    swapped = torch.tensor([7, 3, 0, 0], dtype=torch.uint8).reshape(1, 1, 4)
    assert resample_label(swapped, (1, 1, 2), nearest_axis=None).flatten().tolist() == [3, 0]


def test_a_class_that_falls_between_the_samples_is_gone() -> None:
    line = torch.zeros((1, 1, 9), dtype=torch.uint8)
    line[..., 3] = 2
    assert resample_label(line, (1, 1, 3), nearest_axis=None).flatten().tolist() == [0, 0, 0]
    line[..., 4] = 2
    assert resample_label(line, (1, 1, 3), nearest_axis=None).flatten().tolist() == [0, 2, 0]


@pytest.mark.parametrize(
    ("target", "nearest_axis"), [((21, 15, 27), None), ((7, 5, 18), None), ((14, 15, 9), 0), ((35, 5, 45), 2)]
)
def test_label_up_then_down_is_identity(target: tuple[int, int, int], nearest_axis: int | None) -> None:
    label = torch.from_numpy(np.random.default_rng(3).integers(0, 6, (7, 5, 9)).astype(np.uint8))
    up = resample_label(label, target, nearest_axis=nearest_axis)
    assert tuple(up.shape) == target
    assert torch.equal(resample_label(up, (7, 5, 9), nearest_axis=nearest_axis), label)


def test_uint16_labels_keep_their_type_and_classes() -> None:
    small = blobs((6, 8, 7), 4)
    table = np.array([0, 255, 256, 40_000], np.uint16)
    expected = table[resample_label(torch.from_numpy(small), (11, 5, 14), nearest_axis=None).numpy()]
    result = resample_label(torch.from_numpy(table[small]), (11, 5, 14), nearest_axis=None)
    assert result.dtype == torch.uint16
    np.testing.assert_array_equal(result.numpy(), expected)


def test_empty_label_stays_empty() -> None:
    result = resample_label(torch.zeros((3, 4, 5), dtype=torch.uint8), (5, 3, 9), nearest_axis=None)
    assert result.shape == (5, 3, 9)
    assert not result.any()


# -- logits ------------------------------------------------------------------------------------------------------------


def assemble(logits: torch.Tensor, shape: tuple[int, int, int], nearest_axis: int | None) -> torch.Tensor:
    """The slabs, put together; each row exactly once and in order."""
    parts, next_row = [], 0
    for rows, slab in resample_logits(logits, shape, nearest_axis=nearest_axis):
        assert rows.start == next_row
        assert slab.shape == (logits.shape[0], rows.stop - rows.start, *shape[1:])
        next_row = rows.stop
        parts.append(slab)
    assert next_row == shape[0]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("rows_per_slab", [1, 3, 100])
@pytest.mark.parametrize("target", [(13, 17, 9), (3, 4, 5), (7, 20, 4), (7, 8, 9), (1, 1, 30)])
def test_logits_equal_torch_interpolate(
    target: tuple[int, int, int], rows_per_slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.from_numpy(random_volume((4, 7, 8, 9)))
    monkeypatch.setattr(resample, "SLAB_BYTES", rows_per_slab * 4 * 4 * target[1] * target[2])
    result = assemble(logits, target, None)
    expected = torch.nn.functional.interpolate(logits[None], target, mode="trilinear", align_corners=False)[0]
    torch.testing.assert_close(result, expected, atol=2e-6, rtol=1e-5)
    assert torch.equal(result.argmax(0), expected.argmax(0))


@pytest.mark.parametrize("nearest_axis", [0, 1, 2])
def test_logits_take_the_nearest_plane_along_the_coarse_axis(
    nearest_axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.from_numpy(random_volume((3, 4, 5, 6)))
    target = (9, 11, 13)
    planes = ((torch.arange(target[nearest_axis]) + 0.5) * logits.shape[nearest_axis + 1] / target[nearest_axis]).long()
    picked = logits.index_select(nearest_axis + 1, planes)
    expected = torch.nn.functional.interpolate(picked[None], target, mode="trilinear", align_corners=False)[0]
    monkeypatch.setattr(resample, "SLAB_BYTES", 1)
    torch.testing.assert_close(assemble(logits, target, nearest_axis), expected, atol=2e-6, rtol=1e-5)


def test_half_precision_logits_come_out_in_float32() -> None:
    logits = torch.from_numpy(random_volume((2, 4, 4, 4))).bfloat16()
    result = assemble(logits, (6, 4, 5), None)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, assemble(logits.float(), (6, 4, 5), None))


def test_matrix_of_an_axis_keeps_constants() -> None:
    for n_in, n_out in [(1, 5), (5, 1), (7, 12), (12, 7), (200, 133)]:
        for order in (0, 1, 3):
            matrix = axis_matrix(n_in, n_out, order)
            assert matrix.shape == (n_out, n_in)
            torch.testing.assert_close(matrix.sum(dim=1), torch.ones(n_out), atol=1e-5, rtol=0)
        assert (axis_matrix(n_in, n_out, LINEAR) >= 0).all()

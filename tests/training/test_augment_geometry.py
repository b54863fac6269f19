"""The geometry of augmentation against scipy, and the region that it reads against what it leaves empty."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import numpy as np
import pytest
import scipy.ndimage
import torch
from augmentations import generator, smooth

from autoseg.training.augment_geometry import covering_size, resample

# The region to read


def test_covering_size_known_answers() -> None:
    def size(
        patch: tuple[int, ...], degrees: list[tuple[float, ...]], scale: list[float | tuple[float, ...]]
    ) -> tuple[int, ...]:
        angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
        per_axis = [np.broadcast_to(factor, len(patch)) for factor in scale]
        return covering_size(patch, angles_rad=angles, scale=torch.from_numpy(np.array(per_axis)))

    patch, still = (10, 30, 41), (0.0, 0.0, 0.0)
    assert size(patch, [still, still], [1, 0.7]) == patch
    # A quarter turn puts 20 voxels where 14.5 were (about Z), or 4.5 (about Y).
    assert size(patch, [(90, 0, 0)], [1]) == (10, 30 + 2 * 6, 41)
    assert size(patch, [(0, -90, 0)], [1]) == (10 + 2 * 16, 30, 41)
    assert size(patch, [(0, 0, 90)], [1]) == (10 + 2 * 10, 30, 41)
    # A corner turned onto an axis reaches half the diagonal: hypot(29, 40) / 2 = 24.7, so 10.2 and 4.7 voxels more.
    onto_y, onto_x = np.rad2deg(np.arctan2(40, 29)), np.rad2deg(np.arctan2(29, 40))
    assert size(patch, [(onto_y, 0, 0), (-onto_x, 0, 0)], [1, 1]) == (10, 30 + 2 * 11, 41 + 2 * 5)
    assert size(patch[1:], [(onto_y,), (-onto_x,)], [1, 1]) == (30 + 2 * 11, 41 + 2 * 5)
    # Scale 1.4: 4.5, 14.5, 20 voxels from the centre become 6.3, 20.3, 28.
    assert size(patch, [still, still], [1, 1.4]) == (10 + 2 * 2, 30 + 2 * 6, 41 + 2 * 8)
    # Both: 14.5 and 20 become 20 * 1.4 = 28 and 14.5 * 1.4 = 20.3.
    assert size(patch, [(90, 0, 0)], [1.4]) == (10 + 2 * 2, 30 + 2 * 14, 41 + 2 * 1)
    # Each axis of the patch by its own factor, and then turned: 20 * 1.5 = 30 along Y, 14.5 * 1.4 = 20.3 along X.
    assert size(patch, [still], [(1, 1.4, 1.5)]) == (10, 30 + 2 * 6, 41 + 2 * 10)
    assert size(patch, [(90, 0, 0)], [(1, 1.4, 1.5)]) == (10, 30 + 2 * 16, 41 + 2 * 1)


# Resampling


def by_scipy(image: np.ndarray, matrix: np.ndarray, patch: tuple[int, ...], order: Literal[0, 1]) -> np.ndarray:
    start = np.array([(read - size) // 2 for read, size in zip(image.shape, patch, strict=True)])
    middle = (np.array(patch) - 1) / 2
    offset = start + middle - matrix @ middle
    return scipy.ndimage.affine_transform(image, matrix, offset, patch, order=order, mode="grid-constant")


def about(axis: int, degrees: float) -> np.ndarray:
    """A rotation by hand: the axis before the missing one towards the one after it."""
    a, b = [other for other in range(3) if other != axis]
    matrix, angle = np.eye(3), np.deg2rad(degrees)
    matrix[a, a] = matrix[b, b] = np.cos(angle)
    matrix[a, b], matrix[b, a] = -np.sin(angle), np.sin(angle)
    return matrix


@pytest.mark.parametrize(
    ("degrees", "scale", "flip"),
    [
        ((20, 0, 0), (1, 1, 1), (False, False, False)),
        ((0, -25, 0), (1, 1, 1), (False, False, False)),
        ((0, 0, 30), (1.25, 1.25, 1.25), (False, True, False)),
        ((15, -20, 10), (0.77, 0.77, 0.77), (True, False, True)),
        ((0, 0, 0), (1.37, 1.37, 1.37), (False, False, True)),
        ((25, 0, 0), (1, 0.8, 0.8), (True, False, False)),
        ((15, -20, 10), (0.8, 1.2, 0.9), (False, True, False)),
    ],
)
def test_geometry_3d_against_scipy(
    degrees: tuple[float, ...], scale: tuple[float, ...], flip: tuple[bool, ...]
) -> None:
    read, patch = (13, 40, 29), (8, 31, 20)
    image = smooth((1, 2, *read))
    label = torch.randint(0, 4, (1, *read), generator=generator())
    new_image, new_label = resample(
        image,
        label,
        patch_size=patch,
        angles_rad=torch.deg2rad(torch.tensor([degrees], dtype=torch.float64)),
        scale=torch.tensor([scale]),
        flip=torch.tensor([flip]),
    )
    rotation = about(0, degrees[0]) @ about(1, degrees[1]) @ about(2, degrees[2])
    matrix = rotation @ np.diag(np.where(flip, -1.0, 1.0) * scale)
    for channel in range(2):
        expected = by_scipy(image[0, channel].numpy(), matrix, patch, order=1)
        np.testing.assert_allclose(new_image[0, channel].numpy(), expected, atol=2e-4)
    agreeing = new_label[0].numpy() == by_scipy(label[0].numpy(), matrix, patch, order=0)
    assert agreeing.mean() > 0.995, "voxels exactly between two may round either way"


def test_geometry_2d_against_scipy() -> None:
    read, patch = (40, 61), (21, 48)
    image, label = smooth((1, 1, *read)), torch.randint(0, 4, (1, *read), generator=generator())
    angle, scale = np.deg2rad(37.0), 0.83
    new_image, new_label = resample(
        image,
        label,
        patch_size=patch,
        angles_rad=torch.tensor([[angle]]),
        scale=torch.tensor([[scale, scale]]),
        flip=torch.tensor([[False, True]]),
    )
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = rotation @ np.diag([scale, -scale])
    np.testing.assert_allclose(new_image[0, 0].numpy(), by_scipy(image[0, 0].numpy(), matrix, patch, 1), atol=2e-4)
    assert (new_label[0].numpy() == by_scipy(label[0].numpy(), matrix, patch, 0)).mean() > 0.995


def test_interpolation_and_crop_agree_about_where_the_centre_is() -> None:
    """With an odd difference between read and patch half a voxel is easily lost."""
    read, patch = (9, 12, 15), (6, 7, 8)
    image, label = smooth((1, 1, *read)), torch.randint(0, 4, (1, *read), generator=generator())
    for flip in itertools.product([False, True], repeat=3):
        exact, interpolated = (
            resample(
                image,
                label,
                patch_size=patch,
                angles_rad=torch.zeros(1, 3),
                scale=torch.full((1, 3), scale),
                flip=torch.tensor([flip]),
            )
            for scale in (1.0, 1.0 + 1e-6)
        )
        torch.testing.assert_close(interpolated[0], exact[0], atol=1e-4, rtol=0)
        assert torch.equal(interpolated[1], exact[1])


def test_scale_below_one_enlarges() -> None:
    ball = torch.zeros(1, 1, 33, 33, 33)
    ball[..., 12:21, 12:21, 12:21] = 1
    sizes = []
    for scale in (1.4, 1.0, 0.7):
        drawn: dict[str, Any] = {"angles_rad": torch.zeros(1, 3), "flip": torch.zeros(1, 3, dtype=torch.bool)}
        _, label = resample(ball, ball[:, 0], patch_size=(21, 21, 21), scale=torch.full((1, 3), scale), **drawn)
        sizes.append(int(label.sum()))
    assert sizes == [7**3, 9**3, 13**3]


def test_outside_is_zero_and_background() -> None:
    ones = torch.ones(1, 1, 20, 20)
    image, label = resample(
        ones,
        ones[:, 0].long() * 3,
        patch_size=(20, 20),
        angles_rad=torch.tensor([[np.pi / 4]]),
        scale=torch.ones(1, 2),
        flip=torch.zeros(1, 2, dtype=torch.bool),
    )
    assert image[0, 0, 0, 0] == 0
    assert label[0, 0, 0] == 0
    assert image[0, 0, 10, 10] == 1
    assert label[0, 10, 10] == 3

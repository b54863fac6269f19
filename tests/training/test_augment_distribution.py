"""How rotation, scale and mirroring are distributed, against the transforms of batchgenerators with the same table.

The effect is read off images whose values are positions: linear interpolation keeps those exact, so a patch of them
shows where each of its voxels came from, however small it is.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from augmentations import NEVER, generator, same_distribution
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from autoseg.training.augment import AugmentConfig, apply_parameters, draw_parameters, read_size
from autoseg.training.augment_geometry import resample

spatial_transforms = pytest.importorskip("batchgenerators.transforms.spatial_transforms")

PATCHES = [(4, 5, 6), (3, 10, 11), (7, 8), (5, 9)]
"""3D; 3D with thick slices; 2D; 2D with one side longer, which is turned less."""
N_DRAWS = 2000


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _oracle_seed() -> None:
    np.random.seed(0)  # noqa: NPY002 - batchgenerators draws from numpy's and Python's global states
    random.seed(0)


def positions(size: tuple[int, ...]) -> NDArray[np.float32]:
    """(D, *size): each voxel's position along each axis, from the centre."""
    axes = [np.arange(n) - (n - 1) / 2 for n in size]
    return np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)


def linear_maps(patches: NDArray[np.float32]) -> NDArray[np.float64]:
    """The maps, (N, D, D), from positions in the patch to those in what was read. Nothing but a linear map fits."""
    n_samples, n_axes, *patch = patches.shape
    to = positions(tuple(patch)).reshape(n_axes, -1).astype(np.float64)
    read = patches.reshape(n_samples, n_axes, -1).astype(np.float64)
    maps = read @ to.T @ np.linalg.inv(to @ to.T)
    np.testing.assert_allclose(maps @ to, read, atol=2e-4)
    return maps


def ours(patch: tuple[int, ...], **changes: Any) -> NDArray[np.float64]:
    """What the published table does with these probabilities, and no others."""
    config = dataclasses.replace(AugmentConfig.for_patch(patch), **(NEVER | changes))
    parameters = draw_parameters(
        n_samples=N_DRAWS,
        n_channels=len(patch),
        n_axes=len(patch),
        config=config,
        generator=generator(),
    )
    image = torch.from_numpy(positions(read_size(patch, parameters)))
    patches, _ = apply_parameters(
        image.expand(N_DRAWS, *image.shape),
        torch.zeros(N_DRAWS, *image.shape[1:], dtype=torch.uint8),
        patch_size=patch,
        parameters=parameters,
    )
    return linear_maps(patches.numpy())


def by_batchgenerators(patch: tuple[int, ...], *, rotation: float = 0.0, scaling: float = 0.0) -> NDArray[np.float64]:
    """The same by `SpatialTransform`, as the published method uses it: slices of a thick-sliced patch are channels."""
    config = AugmentConfig.for_patch(patch)
    n_axes, folded = len(patch), config.anisotropic
    # As wide as half the diagonal needs.
    read = tuple(size + 2 * int(np.linalg.norm(patch)) for size in patch)
    if folded:
        read = (patch[0], *read[1:])
    image = positions(read)
    images = np.broadcast_to(image, (N_DRAWS, *image.shape))
    if folded:
        images = images.reshape(N_DRAWS, -1, *read[1:])
    angle = (-np.deg2rad(config.rotation_max_deg), np.deg2rad(config.rotation_max_deg))
    transform = spatial_transforms.SpatialTransform(
        patch[1:] if folded else patch,
        do_elastic_deform=False,
        angle_x=angle,
        angle_y=angle,
        angle_z=angle,
        scale=(0.7, 1.4),
        p_rot_per_sample=rotation,
        p_scale_per_sample=scaling,
        border_mode_data="constant",
        order_data=1,
        random_crop=False,
    )
    return linear_maps(transform(data=images)["data"].reshape(N_DRAWS, n_axes, *patch))


def scales(maps: NDArray[np.float64]) -> NDArray[np.float64]:
    """The factors, (N, D), by which positions along each axis of the patch are multiplied: above 1 things get small."""
    return np.linalg.norm(maps, axis=1)


def angles(maps: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, 1) in 2D, (N, 3) in 3D: the rotation as a vector along its axis, as long as its angle.

    batchgenerators turns about the first axis first and ours about the last, so that ours are distributed as the
    inverses of theirs. The components of the vector are distributed alike in both.
    """
    rotations = maps / scales(maps)[:, None, :]
    if maps.shape[1] == 2:
        return np.arctan2(rotations[:, 1:, 0], rotations[:, :1, 0])
    return Rotation.from_matrix(rotations).as_rotvec()


@pytest.mark.parametrize("patch", PATCHES)
def test_rotation_is_drawn_as_in_batchgenerators(patch: tuple[int, ...]) -> None:
    config = AugmentConfig.for_patch(patch)
    our_angles, their_angles = (
        angles(ours(patch, rotation_probability=1)),
        angles(by_batchgenerators(patch, rotation=1)),
    )
    for axis in range(our_angles.shape[1]):
        if config.anisotropic and axis > 0:
            np.testing.assert_allclose(our_angles[:, axis], 0, atol=1e-5)
            np.testing.assert_allclose(their_angles[:, axis], 0, atol=1e-5)
        else:
            assert same_distribution(our_angles[:, axis], their_angles[:, axis])
    assert same_distribution(*(np.linalg.norm(a, axis=1) for a in (our_angles, their_angles)))
    if our_angles.shape[1] == 1 or config.anisotropic:
        assert np.rad2deg(np.abs(our_angles).max()) == pytest.approx(config.rotation_max_deg, rel=0.01)


@pytest.mark.parametrize("patch", PATCHES)
def test_rotation_and_scale_are_chosen_as_often_as_in_batchgenerators(patch: tuple[int, ...]) -> None:
    counts = []
    for maps in (
        ours(patch, rotation_probability=0.2, scaling_probability=0.2),
        by_batchgenerators(patch, rotation=0.2, scaling=0.2),
    ):
        rotated = np.abs(angles(maps)).max(1) > 1e-4
        scaled = np.abs(scales(maps)[:, -1] - 1) > 1e-4
        counts.append(np.bincount(2 * rotated + scaled, minlength=4))
        np.testing.assert_allclose(counts[-1] / N_DRAWS, [0.64, 0.16, 0.16, 0.04], atol=0.045)
    assert scipy.stats.chi2_contingency(np.array(counts)).pvalue > 0.01


@pytest.mark.parametrize("patch", [(9, 10, 8), (12, 15)])
def test_scale_does_what_it_does_in_batchgenerators(patch: tuple[int, ...]) -> None:
    read = tuple(size + 10 for size in patch)
    noise = np.random.default_rng(0).normal(size=(1, 1, *read))
    image = scipy.ndimage.gaussian_filter(noise, (0, 0, *[2.0] * len(patch))).astype(np.float32)
    theirs = spatial_transforms.SpatialTransform(
        patch, do_elastic_deform=False, do_rotation=False, scale=(1.25, 1.25), order_data=1, random_crop=False
    )(data=image)["data"]
    by_ours, _ = resample(
        torch.from_numpy(image),
        torch.zeros(1, *read),
        patch_size=patch,
        angles_rad=torch.zeros(1, 3 if len(patch) == 3 else 1),
        scale=torch.full((1, len(patch)), 1.25),
        flip=torch.zeros(1, len(patch), dtype=torch.bool),
    )
    np.testing.assert_allclose(by_ours.numpy(), theirs, atol=1e-4 * image.std())


@pytest.mark.parametrize("patch", PATCHES)
def test_scale_is_drawn_as_in_batchgenerators(patch: tuple[int, ...]) -> None:
    our_scales, their_scales = scales(ours(patch, scaling_probability=1)), scales(by_batchgenerators(patch, scaling=1))
    assert same_distribution(our_scales[:, -1], their_scales[:, -1])


def test_scale_of_a_patch_with_thick_slices_leaves_the_first_axis_as_in_batchgenerators() -> None:
    patch = (3, 10, 11)
    np.testing.assert_allclose(scales(by_batchgenerators(patch, scaling=1))[:, 0], 1, atol=1e-5)
    np.testing.assert_allclose(scales(ours(patch, scaling_probability=1))[:, 0], 1, atol=1e-5)


@pytest.mark.parametrize("patch", [(4, 5, 6), (3, 10, 11), (7, 8)])
@pytest.mark.parametrize("without_first", [False, True])
def test_mirroring_is_drawn_as_in_batchgenerators(patch: tuple[int, ...], without_first: bool) -> None:
    axes = tuple(range(int(without_first), len(patch)))
    images = np.repeat(positions(patch)[None], N_DRAWS, axis=0)
    their_maps = linear_maps(spatial_transforms.MirrorTransform(axes)(data=images)["data"])
    our_maps = ours(patch, mirror_probability=0.5, mirror_axes=axes)
    counts = []
    for maps in (our_maps, their_maps):
        signs = np.diagonal(maps, axis1=1, axis2=2)
        np.testing.assert_allclose(maps, np.round(signs)[:, :, None] * np.eye(len(patch)), atol=1e-5)
        mirrored = signs < 0
        assert mirrored[:, axes].any(0).all()
        assert not mirrored[:, : axes[0]].any()
        counts.append(np.bincount(mirrored @ 2 ** np.arange(len(patch)), minlength=2 ** len(patch)))
    table = np.array(counts)
    assert scipy.stats.chi2_contingency(table[:, table.any(0)]).pvalue > 0.01, "how often each combination came"

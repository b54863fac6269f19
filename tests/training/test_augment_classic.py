"""The pipeline of batchgenerators: reproducible, and doing to a batch what the one in torch does."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from augmentations import NEVER, same_distribution, smooth
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from autoseg.core.errors import TrainingError
from autoseg.training.augment import AugmentConfig, apply_parameters, draw_parameters, read_size
from autoseg.training.augment_classic import ClassicAugmentation

SEED = 2**62 + 12345
N_DRAWS = 400
PATCHES = [(9, 11, 10), (4, 14, 13), (20, 13), (12, 14)]


pytestmark = pytest.mark.usefixtures("one_thread")


def table(patch: tuple[int, ...], **changes: Any) -> AugmentConfig:
    """The published table for the patch with nothing in it but what `changes` says."""
    return dataclasses.replace(AugmentConfig.for_patch(patch), **(NEVER | changes))


def everything(patch: tuple[int, ...]) -> AugmentConfig:
    return table(patch, **(dict.fromkeys(NEVER, 1.0) | {"mirror_probability": 0.5}))


def batch(n_samples: int, n_channels: int, size: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    return smooth((n_samples, n_channels, *size)).numpy(), np.random.default_rng(1).integers(0, 4, (n_samples, *size))


def centre(array: NDArray, patch: tuple[int, ...]) -> NDArray:
    starts = [(read - size) // 2 for read, size in zip(array.shape[-len(patch) :], patch, strict=True)]
    region: tuple[Any, ...] = tuple(slice(start, start + size) for start, size in zip(starts, patch, strict=True))
    return array[(Ellipsis, *region)]


# Reproducible


@pytest.mark.parametrize("patch", PATCHES)
def test_same_seed_same_result(patch: tuple[int, ...]) -> None:
    augmentation = ClassicAugmentation(patch, everything(patch))
    images, classes = batch(3, 2, augmentation.read_size)
    before = images.copy(), classes.copy()
    first = augmentation(images, classes, seed=SEED)
    other = augmentation(images, classes, seed=SEED + 2**40)
    np.random.seed(len(patch))  # noqa: NPY002 - the result must not depend on it
    random.seed(len(patch))
    again = ClassicAugmentation(patch, everything(patch))(images, classes, seed=SEED)
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert not np.array_equal(first[0], other[0])
    assert (first[0].shape, first[0].dtype) == ((3, 2, *patch), np.float32)
    assert (first[1].shape, first[1].dtype) == ((3, *patch), np.int64)
    assert np.isfinite(first[0]).all()
    np.testing.assert_array_equal(images, before[0])
    np.testing.assert_array_equal(classes, before[1])


def test_threads_do_not_disturb_one_another() -> None:
    pipelines = [ClassicAugmentation(patch, everything(patch)) for patch in [(9, 11, 10), (20, 13)]]
    inputs = [batch(2, 1, pipeline.read_size) for pipeline in pipelines]

    def augment(number: int) -> NDArray:
        which = number % 2
        return pipelines[which](*inputs[which], seed=number)[0]

    alone = [augment(number) for number in range(24)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(augment, range(24)))
    for one, two in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, two)


def test_global_random_states_are_left_as_they_were() -> None:
    augmentation = ClassicAugmentation((9, 11, 10), everything((9, 11, 10)))
    inputs = batch(2, 1, augmentation.read_size)
    np.random.seed(3)  # noqa: NPY002 - the state that must not change
    random.seed(3)
    expected = np.random.random(700), [random.random() for _ in range(700)]  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    drawn: tuple[list[float], list[float]] = ([], [])
    for seed in range(7):
        augmentation(*inputs, seed=seed)
        with pytest.raises(ValueError, match="Seed"):
            augmentation(*inputs, seed=2**70)
        drawn[0].extend(np.random.random(100))  # noqa: NPY002
        drawn[1].extend(random.random() for _ in range(100))
    np.testing.assert_array_equal(drawn[0], expected[0])
    assert drawn[1] == expected[1]


def test_batchgenerators_is_not_imported_before_a_pipeline_is_made() -> None:
    program = "import autoseg.training.augment_classic, sys; print('batchgenerators' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


# Known answers


@pytest.mark.parametrize("patch", PATCHES)
def test_nothing_to_do_is_the_central_crop(patch: tuple[int, ...]) -> None:
    augmentation = ClassicAugmentation(patch, table(patch))
    assert augmentation.read_size == patch
    # With a scale that is drawn in name only, more is read, but no more slices where they are thick.
    config = table(patch, scaling_probability=1e-12)
    augmentation = ClassicAugmentation(patch, config)
    more = np.subtract(augmentation.read_size, patch)
    assert (more % 2 == 0).all()
    assert (more[1:] > 0).all()
    assert (more[0] > 0) != config.anisotropic
    images, classes = batch(3, 2, augmentation.read_size)
    new_images, new_classes = augmentation(images, classes, seed=SEED)
    np.testing.assert_array_equal(new_images, centre(images, patch))
    np.testing.assert_array_equal(new_classes, centre(classes, patch))


@pytest.mark.parametrize("patch", [(5, 6, 7), (6, 7)])
@pytest.mark.parametrize("mirror_axes", [None, (0,)])
def test_classes_with_a_side_change_places_where_left_and_right_are_mirrored(
    patch: tuple[int, ...], mirror_axes: tuple[int, ...] | None
) -> None:
    last = len(patch) - 1
    config = table(patch, mirror_probability=1, mirror_axes=mirror_axes, side_axis=last, opposite=(0, 2, 1, 3))
    images, classes = batch(3, 2, patch)
    new_images, new_classes = ClassicAugmentation(patch, config)(images, classes, seed=SEED)
    axes = tuple(range(-len(patch), 0)) if mirror_axes is None else (-len(patch),)
    expected = np.flip(classes, axes)
    np.testing.assert_array_equal(new_images, np.flip(images, axes))
    np.testing.assert_array_equal(new_classes, np.array([0, 2, 1, 3])[expected] if mirror_axes is None else expected)


@pytest.mark.parametrize("patch", PATCHES)
def test_image_and_classes_stay_together(patch: tuple[int, ...]) -> None:
    config = table(patch, rotation_probability=1, scaling_probability=1, mirror_probability=0.5)
    augmentation = ClassicAugmentation(patch, config)
    images = smooth((6, 1, *augmentation.read_size), sigma=3).numpy()
    new_images, new_classes = augmentation(images, np.where(images[:, 0] > 0, 200, 7), seed=SEED)
    assert set(np.unique(new_classes)) == {7, 200}, "no class in between"
    disagreeing = (new_images[:, 0] > 0) != (new_classes == 200)
    assert disagreeing.mean() < 0.08
    # Where they disagree is the surface, nowhere else.
    assert np.abs(new_images[:, 0][disagreeing]).max() < 0.6


def test_anisotropic_patches_never_mix_slices() -> None:
    """Slices of constant value stay constant, unless rotation, scale or low resolution reach across them."""
    patch = (5, 24, 20)
    chosen = ("rotation", "scaling", "low_resolution", "low_resolution_channel")
    config = table(patch, **{f"{name}_probability": 1 for name in chosen})
    for anisotropic in (True, False):
        augmentation = ClassicAugmentation(patch, dataclasses.replace(config, anisotropic=anisotropic))
        size = augmentation.read_size
        assert (size[0] == 5) == anisotropic
        values = np.resize([3.0, -1.0, 4.0, 0.5, -2.0], size[0]).astype(np.float32).reshape(-1, 1, 1)
        images = np.broadcast_to(values, (4, 2, *size))
        new_images, _ = augmentation(images, np.zeros((4, *size), np.int64), seed=SEED)
        change = np.abs(new_images - centre(images, patch))
        assert change.max() < 1e-5 if anisotropic else change.mean() > 0.1


def test_noise_comes_before_the_blur() -> None:
    patch = (20, 20, 20)
    config = table(patch, noise_probability=1, noise_std_range=(0.1, 0.1))
    blurring: dict[str, Any] = {
        "blur_probability": 1,
        "blur_channel_probability": 1,
        "blur_sigma_range": (1, 1),
    }
    inputs = np.zeros((2, 1, *patch), np.float32), np.zeros((2, *patch), np.int64)
    noisy, _ = ClassicAugmentation(patch, config)(*inputs, seed=1)
    blurred, _ = ClassicAugmentation(patch, dataclasses.replace(config, **blurring))(*inputs, seed=1)
    assert noisy.std() == pytest.approx(0.1, rel=0.05)
    # Averaging with a Gaussian of one voxel is like averaging (2 sqrt(pi))**3 voxels.
    assert centre(blurred, (14, 14, 14)).std() == pytest.approx(0.1 / (2 * np.sqrt(np.pi)) ** 1.5, rel=0.1)


def test_what_does_not_fit_is_refused() -> None:
    patch = (8, 8, 8)
    augmentation = ClassicAugmentation(patch, AugmentConfig())
    images, classes = batch(2, 1, augmentation.read_size)
    with pytest.raises(ValueError, match="do not fit"):
        augmentation(images, classes[:, 1:], seed=0)
    with pytest.raises(ValueError, match="do not fit"):
        augmentation(centre(images, patch), centre(classes, patch), seed=0)
    for name, wrong in {"scaling_range": (0.7, 0.9), "contrast_range": (0.5, 1.0), "gamma_range": (0.7, 0.9)}.items():
        with pytest.raises(TrainingError, match=name):
            ClassicAugmentation(patch, dataclasses.replace(AugmentConfig(), **{name: wrong}))  # type: ignore[arg-type]


# Where each voxel of a patch comes from


def positions(n_samples: int, size: tuple[int, ...]) -> NDArray[np.float32]:
    """Images, (N, D, *size), whose channels hold the position of each voxel along each axis, from the centre.

    Linear interpolation keeps them exact, so that a patch of them shows what was done to the geometry.
    """
    axes = [np.arange(n) - (n - 1) / 2 for n in size]
    return np.broadcast_to(
        np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32), (n_samples, len(size), *size)
    )


def matrices(patches: NDArray[np.float32]) -> NDArray[np.float64]:
    """The linear maps, (N, D, D), from positions in the patch to those it was read from; nothing but linear fits."""
    n_samples, n_axes, *patch = patches.shape
    to = positions(1, tuple(patch)).reshape(n_axes, -1).astype(np.float64)
    read = patches.reshape(n_samples, n_axes, -1).astype(np.float64)
    linear = read @ to.T @ np.linalg.inv(to @ to.T)
    np.testing.assert_allclose(linear @ to, read, atol=2e-4)
    return linear


def both_geometries(
    patch: tuple[int, ...], config: AugmentConfig, *, n_samples: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """By torch and by batchgenerators."""
    parameters = draw_parameters(
        n_samples=n_samples,
        n_channels=len(patch),
        n_axes=len(patch),
        config=config,
        generator=torch.Generator().manual_seed(0),
    )
    images = torch.from_numpy(positions(n_samples, read_size(patch, parameters)).copy())
    torch_patches, _ = apply_parameters(images, images[:, 0].byte(), patch_size=patch, parameters=parameters)
    classic = ClassicAugmentation(patch, config)
    images_classic = positions(n_samples, classic.read_size)
    classic_patches, _ = classic(images_classic, np.zeros((n_samples, *classic.read_size), np.int64), seed=SEED)
    return matrices(torch_patches.numpy()), matrices(classic_patches)


@pytest.mark.parametrize("patch", [(3, 4, 5), (2, 6, 7), (6, 7), (4, 7)])
def test_read_size_holds_every_draw_and_little_more(patch: tuple[int, ...]) -> None:
    """A position outside would be that of the border, and `matrices` would notice that it does not fit."""
    config = table(patch, rotation_probability=1, scaling_probability=1, scaling_range=(1.4, 1.4))
    classic = ClassicAugmentation(patch, config)
    n_samples = 400
    patches, _ = classic(
        positions(n_samples, classic.read_size), np.zeros((n_samples, *classic.read_size), np.int64), seed=SEED
    )
    matrices(patches)
    reached = np.abs(patches).max(axis=(0, *range(2, patches.ndim)))
    border = (np.array(classic.read_size) - 1) / 2
    assert (reached <= border + 1e-3).all()
    assert (reached > border - 1.1).all()


@pytest.mark.parametrize("patch", [(3, 4, 5), (2, 7, 8), (6, 7), (4, 7)])
def test_rotation_has_the_same_distribution_as_in_torch(patch: tuple[int, ...]) -> None:
    ours, classic = both_geometries(patch, table(patch, rotation_probability=1), n_samples=N_DRAWS)
    if len(patch) == 2:
        assert same_distribution(*(np.arctan2(m[:, 1, 0], m[:, 0, 0]) for m in (ours, classic)))
        return
    of_ours, of_classic = (Rotation.from_matrix(m).as_rotvec() for m in (ours, classic))
    for axis in range(3):
        if AugmentConfig.for_patch(patch).anisotropic and axis > 0:
            np.testing.assert_allclose(of_classic[:, axis], 0, atol=1e-6)
        else:
            assert same_distribution(of_ours[:, axis], of_classic[:, axis])
    assert same_distribution(np.linalg.norm(of_ours, axis=1), np.linalg.norm(of_classic, axis=1))


@pytest.mark.parametrize("patch", [(3, 4, 5), (2, 7, 8), (6, 7)])
def test_scale_has_the_same_distribution_as_in_torch(patch: tuple[int, ...]) -> None:
    config = table(patch, scaling_probability=1)
    ours, classic = both_geometries(patch, config, n_samples=N_DRAWS)
    for drawn in (ours, classic):
        expected = drawn[:, -1:, -1:] * np.eye(len(patch))
        if config.anisotropic:
            expected[:, 0, 0] = 1
        np.testing.assert_allclose(drawn, expected, atol=1e-4, err_msg="one factor for all axes that are scaled")
        factor = drawn[:, -1, -1]
        assert (factor.min(), factor.max()) == (pytest.approx(0.7, abs=0.01), pytest.approx(1.4, abs=0.01))
    assert same_distribution(ours[:, -1, -1], classic[:, -1, -1])


@pytest.mark.parametrize("patch", [(3, 4, 5), (6, 7)])
def test_geometry_is_chosen_as_often_as_in_torch(patch: tuple[int, ...]) -> None:
    chances = {"rotation_probability": 0.3, "scaling_probability": 0.4, "mirror_probability": 0.2}
    config = table(patch, mirror_axes=(0, len(patch) - 1), **chances)
    counts = []
    for drawn in both_geometries(patch, config, n_samples=1500):
        # Columns are rotated, scaled and mirrored unit vectors. No angle of the table in 3D turns one around.
        scaled = np.abs(np.linalg.norm(drawn[:, :, 0], axis=1) - 1) > 1e-4
        rotated = np.abs(drawn[:, 0, 1:]).max(1) > 1e-4
        mirrored = np.stack([drawn[:, axis, axis] < 0 for axis in range(len(patch))], axis=1)[~rotated]
        if len(patch) == 3:
            assert not mirrored[:, 1].any()
        counts.append([scaled.sum(), rotated.sum(), *mirrored.sum(0)[[0, -1]]])
        expected = np.array([0.4, 0.3, 0.2 * 0.7, 0.2 * 0.7]) * len(drawn)
        np.testing.assert_allclose(counts[-1], expected, atol=4 * np.sqrt(expected.max()))
    assert scipy.stats.chi2_contingency(np.array(counts)).pvalue > 0.01


# Intensities


def both_effects(images: NDArray[np.float32], **changes: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The images, (N, C, *patch), by torch and by batchgenerators."""
    patch = images.shape[2:]
    config = table(patch, **changes)
    parameters = draw_parameters(
        n_samples=len(images),
        n_channels=images.shape[1],
        n_axes=len(patch),
        config=config,
        generator=torch.Generator().manual_seed(0),
    )
    classes = np.zeros((len(images), *patch), np.int64)
    ours, _ = apply_parameters(
        torch.from_numpy(images), torch.from_numpy(classes), patch_size=patch, parameters=parameters
    )
    return ours.numpy(), ClassicAugmentation(patch, config)(images, classes, seed=SEED)[0]


@pytest.mark.parametrize("patch", [(7, 8, 9), (3, 9, 10), (12, 11)])
def test_intensities_have_the_same_distribution_as_in_torch(patch: tuple[int, ...]) -> None:
    image = np.abs(smooth((1, 2, *patch), sigma=1).numpy())
    images = np.repeat(image, N_DRAWS, axis=0)
    axes = tuple(range(2, images.ndim))

    def change(patches: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.abs(patches - image).mean(axes).flatten()

    ours, classic = both_effects(images, noise_probability=1)
    assert same_distribution((ours - images).std(axes)[:, 0], (classic - images).std(axes)[:, 0])
    strength = (classic - images).std(axes)
    np.testing.assert_allclose(strength[:, 0], strength[:, 1], rtol=0.4, err_msg="one strength for all channels")

    ours, classic = both_effects(images, brightness_probability=1)
    assert same_distribution(ours.mean(axes).flatten(), classic.mean(axes).flatten())

    ours, classic = both_effects(images, contrast_probability=1)
    assert same_distribution(ours.std(axes)[:, 0], classic.std(axes)[:, 0])

    for transform in ("gamma", "inverted_gamma"):
        ours, classic = both_effects(images, **{f"{transform}_probability": 1})
        for percent in (5, 50, 98):
            assert same_distribution(*(np.percentile(p, percent, axes).flatten() for p in (ours, classic)))

    ours, classic = (change(p) for p in both_effects(images, blur_probability=1))
    assert abs((ours > 0).mean() - (classic > 0).mean()) < 0.08
    assert same_distribution(ours[ours > 0], classic[classic > 0])

    ours, classic = (change(p) for p in both_effects(images, low_resolution_probability=1))
    assert abs((ours > 1e-6).mean() - (classic > 1e-6).mean()) < 0.08
    # The spline's ringing differs from the convolution's by a few percent, so moments are compared, not distributions.
    assert ours[ours > 1e-6].mean() == pytest.approx(classic[classic > 1e-6].mean(), rel=0.1)


def test_intensities_are_chosen_as_often_as_in_torch() -> None:
    images = np.repeat(smooth((1, 2, 4, 5, 4)).numpy(), 1000, axis=0)
    for name, probability in {
        "noise": 0.3,
        "blur": 0.5,
        "brightness": 0.3,
        "contrast": 0.3,
        "inverted_gamma": 0.3,
        "gamma": 0.3,
    }.items():
        counts = []
        for patches in both_effects(images, **{f"{name}_probability": probability}):
            changed = np.abs(patches - images).max((2, 3, 4)) > 1e-6
            counts.append([(changed.sum(1) == n).sum() for n in range(3)])
        observed = np.array(counts)
        assert scipy.stats.chi2_contingency(observed[:, observed.any(0)]).pvalue > 0.01, name

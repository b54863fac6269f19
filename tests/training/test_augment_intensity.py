"""Intensity transforms: known answers from scipy and torch, and distributions from batchgenerators."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
import torch.nn.functional as F
from augmentations import NEVER, generator, same_distribution, smooth
from skimage.transform import resize
from torch import Tensor

from autoseg.training import augment_intensity as intensity
from autoseg.training.augment import AugmentConfig, apply_parameters, draw_parameters

N_DRAWS = 400


pytestmark = pytest.mark.usefixtures("one_thread")


# Known answers


@pytest.mark.parametrize("shape", [(13, 21, 17), (40, 27), (5, 30, 3)])
def test_blur_against_scipy(shape: tuple[int, ...]) -> None:
    planes = torch.randn((4, *shape), generator=generator())
    sigmas = [0.5, 0.7, 0.83, 1.0]
    blurred = intensity.blur(planes, torch.tensor(sigmas))
    for plane, sigma, image in zip(planes, sigmas, blurred, strict=True):
        expected = scipy.ndimage.gaussian_filter(plane.double().numpy(), sigma)
        np.testing.assert_allclose(image.numpy(), expected, atol=2e-3 * plane.std())


def test_low_resolution_against_torch_in_2d() -> None:
    planes, zooms = torch.randn((3, 27, 34), generator=generator()), [0.5, 0.65, 0.93]
    lowered = intensity.lower_resolution(planes, torch.tensor(zooms), keep_first_axis=False)
    for plane, zoom, image in zip(planes, zooms, lowered, strict=True):
        low = F.interpolate(plane[None, None], size=(round(27 * zoom), round(34 * zoom)), mode="nearest-exact")
        expected = F.interpolate(low, size=(27, 34), mode="bicubic", align_corners=False)
        torch.testing.assert_close(image, expected[0, 0], atol=1e-4, rtol=0)


def test_low_resolution_in_3d_is_close_to_the_cubic_spline() -> None:
    plane = smooth((1, 1, 24, 30, 21), sigma=1)[0]
    lowered = intensity.lower_resolution(plane, torch.tensor([0.6]), keep_first_axis=False)[0]
    low_shape = [round(size * 0.6) for size in plane.shape[1:]]
    low = resize(plane[0].numpy(), low_shape, order=0, mode="edge", anti_aliasing=False)
    linear, cubic = (resize(low, plane.shape[1:], order=order, mode="edge", anti_aliasing=False) for order in (1, 3))
    assert np.abs(lowered.numpy() - cubic).mean() < 0.3 * np.abs(linear - cubic).mean()


def test_low_resolution_at_full_size_changes_nothing() -> None:
    planes = torch.randn((2, 9, 10, 11), generator=generator())
    torch.testing.assert_close(intensity.lower_resolution(planes, torch.ones(2), keep_first_axis=False), planes)


@pytest.mark.parametrize("transform", [intensity.apply_gamma, intensity.apply_inverted_gamma])
def test_gamma_keeps_mean_and_std_and_order(transform: Callable[[Tensor, Tensor], Tensor]) -> None:
    planes = smooth((1, 3, 16, 18, 14))[0] * torch.tensor([1.0, 50.0, 0.1]).view(3, 1, 1, 1) + 2
    bent = transform(planes, torch.tensor([0.7, 1.5, 1.2]))
    before, after = torch.std_mean(planes.flatten(1), 1), torch.std_mean(bent.flatten(1), 1)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(b.flatten().argmax(), a.flatten().argmax()) for b, a in zip(bent, planes, strict=True))
    assert ((bent - planes).flatten(1).std(1) > 0.02 * before[0]).all()


def test_gamma_known_answer() -> None:
    """Without its restored moments gamma 2 is a square: so the result is a straight line of the squares."""
    values = torch.linspace(0, 1, 101)
    bent = intensity.apply_gamma(values.view(1, 101, 1), torch.tensor([2.0])).flatten()
    assert np.corrcoef(bent, values**2)[0, 1] == pytest.approx(1, abs=1e-6)
    inverted = intensity.apply_inverted_gamma(values.view(1, 101, 1), torch.tensor([2.0])).flatten()
    assert np.corrcoef(inverted, 1 - (1 - values) ** 2)[0, 1] == pytest.approx(1, abs=1e-6)


def test_gamma_of_a_constant_plane_is_the_plane() -> None:
    planes = torch.full((1, 6, 6, 6), -3.0)
    torch.testing.assert_close(intensity.apply_gamma(planes, torch.tensor([1.4])), planes)


def test_contrast_known_answer() -> None:
    planes = torch.tensor([[0.0, 1, 2, 3, 4], [0.0, 1, 2, 3, 4]])
    scaled = intensity.scale_contrast(planes, torch.tensor([0.5, 1.25]))
    torch.testing.assert_close(scaled, torch.tensor([[1, 1.5, 2, 2.5, 3], [0, 0.75, 2, 3.25, 4]]))


# Drawn from the table, against batchgenerators


def effects(images: Tensor, **probabilities: Any) -> Tensor:
    """The published table with these probabilities, and no others, on patches of (N, C, *patch)."""
    parameters = draw_parameters(
        n_samples=images.shape[0],
        n_channels=images.shape[1],
        n_axes=images.ndim - 2,
        config=AugmentConfig(**(NEVER | probabilities)),
        generator=generator(3),
    )
    labels = torch.zeros((images.shape[0], *images.shape[2:]), dtype=torch.uint8)
    return apply_parameters(images, labels, patch_size=tuple(images.shape[2:]), parameters=parameters)[0]


@pytest.fixture
def oracle_seed() -> None:
    np.random.seed(0)  # noqa: NPY002 - batchgenerators draws from numpy's and Python's global states
    random.seed(0)


@pytest.mark.usefixtures("oracle_seed")
def test_brightness_contrast_and_gamma_are_drawn_as_in_batchgenerators() -> None:
    oracle = pytest.importorskip("batchgenerators.augmentations.color_augmentations")
    images = smooth((1, 1, 9, 10, 11)).abs().expand(N_DRAWS, 1, 9, 10, 11)
    flat = images.numpy().reshape(N_DRAWS, 1, -1)

    ours = effects(images, brightness_probability=1).flatten(1).mean(1).numpy()
    theirs = [oracle.augment_brightness_multiplicative(x.copy(), (0.75, 1.25)).mean() for x in flat]
    assert same_distribution(ours, np.array(theirs))

    ours = effects(images, contrast_probability=1).flatten(1).std(1, correction=0).numpy()
    theirs = [oracle.augment_contrast(x.copy(), (0.75, 1.25)).std() for x in flat]
    assert same_distribution(ours, np.array(theirs))

    for inverted, probability in [(False, "gamma_probability"), (True, "inverted_gamma_probability")]:
        bent = effects(images, **{probability: 1}).flatten(1)
        bent_by_oracle = [
            oracle.augment_gamma(x.copy(), (0.7, 1.5), inverted, per_channel=True, retain_stats=True) for x in flat
        ]
        for percent in (5, 50, 98):
            theirs = [np.percentile(x, percent) for x in bent_by_oracle]
            assert same_distribution(np.percentile(bent.numpy(), percent, axis=1), np.array(theirs))


@pytest.mark.usefixtures("oracle_seed")
def test_noise_is_drawn_as_in_batchgenerators() -> None:
    oracle = pytest.importorskip("batchgenerators.transforms.noise_transforms")
    images = torch.zeros(N_DRAWS, 2, 10, 10, 10)
    noisy = effects(images, noise_probability=1)
    by_oracle = oracle.GaussianNoiseTransform(noise_variance=(0, 0.1))(data=images.double().numpy())["data"]
    ours, theirs = noisy.flatten(1).double().numpy(), by_oracle.reshape(N_DRAWS, -1)
    assert same_distribution(ours.std(1), theirs.std(1))
    assert same_distribution(ours.flatten()[::97], theirs.flatten()[::97])
    assert scipy.stats.kstest(ours.std(1), scipy.stats.uniform(0, 0.1).cdf).pvalue > 0.01
    assert scipy.stats.kstest((ours / ours.std(1, keepdims=True)).flatten()[::97], "norm").pvalue > 0.01
    torch.testing.assert_close(noisy[:, 0].flatten(1).std(1), noisy[:, 1].flatten(1).std(1), rtol=0.2, atol=0)
    assert (noisy[:, 0] != noisy[:, 1]).float().mean() > 0.99, "channels share the strength, not the noise"


@pytest.mark.usefixtures("oracle_seed")
def test_blur_and_low_resolution_are_drawn_as_in_batchgenerators() -> None:
    augment_gaussian_blur = pytest.importorskip(
        "batchgenerators.augmentations.noise_augmentations"
    ).augment_gaussian_blur
    resampling = pytest.importorskip("batchgenerators.augmentations.resample_augmentations")
    image = smooth((1, 2, 12, 14, 13), sigma=0.7)
    images = image.expand(N_DRAWS, 2, 12, 14, 13)

    def change(batch: np.ndarray) -> np.ndarray:
        return np.abs(batch - image.numpy()).mean((2, 3, 4)).flatten()

    ours = change(effects(images, blur_probability=1).numpy())
    theirs = change(np.stack([augment_gaussian_blur(x.numpy().copy(), (0.5, 1.0), True, 0.5) for x in images]))
    assert abs((ours > 0).mean() - (theirs > 0).mean()) < 0.06
    assert same_distribution(ours[ours > 0], theirs[theirs > 0])

    ours = change(effects(images, low_resolution_probability=1).numpy())
    theirs = change(
        np.stack(
            [
                resampling.augment_linear_downsampling_scipy(x.numpy().copy(), (0.5, 1), True, 0.5, None, 0, 3)
                for x in images[: N_DRAWS // 2]
            ]
        )
    )
    assert abs((ours > 0).mean() - (theirs > 0).mean()) < 0.07
    # The spline's ringing differs from the convolution's by a few percent, so moments are compared, not distributions.
    assert ours[ours > 0].mean() == pytest.approx(theirs[theirs > 0].mean(), rel=0.08)
    assert ours[ours > 0].std() == pytest.approx(theirs[theirs > 0].std(), rel=0.15)

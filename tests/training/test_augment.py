"""Augmentation as a whole: what is drawn, how much is read for it, and what must not change."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from augmentations import NEVER, NO_AUGMENTATION, generator, smooth
from torch import Tensor

from autoseg.core.errors import TrainingError
from autoseg.training.augment import AugmentConfig, AugmentParameters, apply_parameters, draw_parameters, read_size

ALWAYS: dict[str, Any] = dict.fromkeys(NEVER, 1.0)
EVERYTHING = dataclasses.replace(AugmentConfig(**ALWAYS), mirror_probability=0.5)


pytestmark = pytest.mark.usefixtures("one_thread")


def draw(
    patch: tuple[int, ...], config: AugmentConfig, *, n_samples: int, n_channels: int = 1, seed: int = 0
) -> AugmentParameters:
    return draw_parameters(
        n_samples=n_samples, n_channels=n_channels, n_axes=len(patch), config=config, generator=generator(seed)
    )


def classes_like(images: Tensor, n_classes: int) -> Tensor:
    return torch.randint(0, n_classes, (images.shape[0], *images.shape[2:]), generator=generator())


def centre(batch: Tensor, patch: tuple[int, ...]) -> Tensor:
    for axis, size in enumerate(reversed(patch), start=1):
        batch = batch.narrow(-axis, (batch.shape[-axis] - size) // 2, size)
    return batch


# What is drawn


def test_for_patch_follows_the_table() -> None:
    cube, flat = AugmentConfig.for_patch((64, 64, 64)), AugmentConfig.for_patch((16, 64, 64))
    assert cube == AugmentConfig()
    assert cube.rotation_max_deg_per_axis(3) == (30, 30, 30)
    assert flat.anisotropic
    assert flat.rotation_max_deg_per_axis(3) == (180, 0, 0)
    assert not AugmentConfig.for_patch((20, 60, 60)).anisotropic, "exactly three times is not more than three times"
    assert AugmentConfig.for_patch((64, 96)).rotation_max_deg_per_axis(2) == (180,)
    assert AugmentConfig.for_patch((64, 97)).rotation_max_deg_per_axis(2) == (15,)


@pytest.mark.parametrize(
    "wrong",
    [
        {"gamma_probability": 1.1},
        {"mirror_probability": -0.1},
        {"scaling_range": (0.0, 1.4)},
        {"gamma_range": (1.5, 0.7)},
        {"low_resolution_range": (0.5, 1.5)},
        {"rotation_max_deg": 200.0},
        {"noise_std_range": (-0.1, 0.1)},
    ],
)
def test_config_names_the_wrong_field(wrong: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=next(iter(wrong))):
        AugmentConfig(**wrong)


def test_probabilities_and_ranges_are_those_of_the_table() -> None:
    n = 20_000
    drawn = draw_parameters(n_samples=n, n_channels=2, n_axes=3, config=AugmentConfig(), generator=generator())

    def fraction(mask: Tensor) -> float:
        return float(mask.float().mean())

    rotated, scaled = (drawn.angles_rad != 0).any(1), drawn.scale[:, 0] != 1
    noisy, blurred = drawn.noise_std > 0, drawn.blur_sigma > 0
    expected = {
        "rotated": (rotated, 0.2),
        "scaled": (scaled, 0.2),
        "scaled by another factor along another axis": ((drawn.scale != drawn.scale[:, :1]).any(1), 0.0),
        "enlarged": (drawn.scale[:, 0] < 1, 0.1),
        "rotated and scaled": (rotated & scaled, 0.04),
        "noisy": (noisy[:, 0], 0.1),
        "noisy in one channel only": (noisy[:, 0] != noisy[:, 1], 0.0),
        "blurred": (blurred[:, 0], 0.1),
        "blurred in both channels": (blurred.all(1), 0.05),
        "brighter or darker": (drawn.brightness[:, 0] != 1, 0.15),
        "darker": (drawn.brightness[:, 0] < 1, 0.075),
        "contrast": (drawn.contrast[:, 0] != 1, 0.15),
        "low resolution": (drawn.low_resolution[:, 0] != 1, 0.125),
        "low resolution in both": ((drawn.low_resolution != 1).all(1), 0.0625),
        "inverted gamma": (drawn.inverted_gamma[:, 0] != 1, 0.1),
        "gamma": (drawn.gamma[:, 0] != 1, 0.3),
        "gamma below 1": (drawn.gamma[:, 0] < 1, 0.15),
        **{f"mirrored along {axis}": (drawn.flip[:, axis], 0.5) for axis in range(3)},
    }
    for name, (mask, probability) in expected.items():
        assert fraction(mask) == pytest.approx(probability, abs=0.012), name
    assert torch.rad2deg(drawn.angles_rad[rotated]).abs().amax(0).tolist() == pytest.approx([30, 30, 30], abs=0.1)
    for values, (low, high) in [
        (drawn.scale[scaled], (0.7, 1.4)),
        (drawn.noise_std[noisy], (0, 0.1)),
        (drawn.blur_sigma[blurred], (0.5, 1)),
        (drawn.brightness, (0.75, 1.25)),
        (drawn.contrast, (0.75, 1.25)),
        (drawn.low_resolution, (0.5, 1)),
        (drawn.inverted_gamma, (0.7, 1.5)),
        (drawn.gamma, (0.7, 1.5)),
    ]:
        assert values.min() >= low
        assert values.max() <= high
        assert values.min() == pytest.approx(low, abs=0.01)
        assert values.max() == pytest.approx(high, abs=0.01)


def test_a_transform_leaves_what_is_drawn_for_the_others() -> None:
    every = draw((8, 9, 7), EVERYTHING, n_samples=20, n_channels=2)

    def changed(**changes: Any) -> tuple[AugmentParameters, set[str]]:
        """What is drawn then, and the names of what differs."""
        drawn = draw((8, 9, 7), dataclasses.replace(EVERYTHING, **changes), n_samples=20, n_channels=2)
        pairs = {name: (torch.as_tensor(vars(every)[name]), torch.as_tensor(vars(drawn)[name])) for name in vars(every)}
        return drawn, {name for name, pair in pairs.items() if not torch.equal(*pair)}

    drawn_by = {
        "rotation": "angles_rad",
        "scaling": "scale",
        "noise": "noise_std",
        "blur": "blur_sigma",
        "brightness": "brightness",
        "contrast": "contrast",
        "low_resolution": "low_resolution",
        "inverted_gamma": "inverted_gamma",
        "gamma": "gamma",
        "mirror": "flip",
    }
    assert {f"{name}_probability" for name in drawn_by} == set(NEVER)
    for name, parameter in drawn_by.items():
        assert changed(**{f"{name}_probability": 0.0})[1] == {parameter}
    assert changed(scaling_range=(0.8, 0.9))[1] == {"scale"}
    in_plane, names = changed(anisotropic=True)
    assert names == {"angles_rad", "scale", "keep_first_axis"}
    assert torch.equal(in_plane.angles_rad[:, 0], every.angles_rad[:, 0])
    assert torch.equal(in_plane.scale[:, 1:], every.scale[:, 1:])
    assert (in_plane.scale[:, 0] == 1).all()


# What is read


@pytest.mark.parametrize("patch", [(12, 20, 15), (5, 24, 20), (24, 17)])
def test_read_size_leaves_no_empty_corner_and_no_idle_margin(patch: tuple[int, ...]) -> None:
    table = dataclasses.replace(AugmentConfig.for_patch(patch), **NEVER)
    config = dataclasses.replace(table, rotation_probability=0.7, scaling_probability=0.7, mirror_probability=0.5)
    larger = 0
    for seed in range(60):
        parameters = draw(patch, config, n_samples=2, seed=seed)
        read = read_size(patch, parameters)
        assert all(more >= 0 and more % 2 == 0 for more in np.subtract(read, patch))
        images, labels = apply_parameters(
            torch.ones(2, 1, *read), torch.ones(2, *read), patch_size=patch, parameters=parameters
        )
        torch.testing.assert_close(images, torch.ones_like(images))
        assert labels.all()
        for axis in range(len(patch)):
            if read[axis] > patch[axis]:
                larger += 1
                less = tuple(size - 2 * (other == axis) for other, size in enumerate(read))
                images, _ = apply_parameters(
                    torch.ones(2, 1, *less), torch.ones(2, *less), patch_size=patch, parameters=parameters
                )
                assert images.min() < 1 - 1e-4, "one voxel less on each side leaves a corner empty"
    assert larger > 60


def test_read_size_is_the_patch_unless_something_turns_or_shrinks() -> None:
    patch = (10, 14, 12)
    still = dataclasses.replace(EVERYTHING, rotation_probability=0, scaling_range=(0.7, 1.0))
    assert read_size(patch, draw(patch, still, n_samples=20)) == patch
    shrinking = dataclasses.replace(still, scaling_range=(1.4, 1.4))
    assert read_size(patch, draw(patch, shrinking, n_samples=20)) == (14, 20, 18)
    in_plane = AugmentConfig(anisotropic=True, rotation_probability=1, rotation_max_deg=180, scaling_probability=1)
    size = read_size(patch, draw(patch, in_plane, n_samples=20))
    assert size[0] == 10
    assert min(size[1:]) > 14


def test_reading_more_than_needed_gives_the_same_patch() -> None:
    patch = (10, 14, 12)
    parameters = draw(patch, dataclasses.replace(EVERYTHING, scaling_probability=0.5), n_samples=3, n_channels=2)
    size = read_size(patch, parameters)
    assert np.prod(size) > np.prod(patch)
    images = smooth((3, 2, *(n + 6 for n in size)))
    labels = classes_like(images, 4)
    full = apply_parameters(images, labels, patch_size=patch, parameters=parameters)
    small = apply_parameters(centre(images, size), centre(labels, size), patch_size=patch, parameters=parameters)
    torch.testing.assert_close(small[0], full[0], atol=1e-3, rtol=0)
    assert (small[1] != full[1]).float().mean() < 1e-3, "nearest voxels may differ where two are equally near"


# What must not change


@pytest.mark.parametrize(("read", "patch"), [((9, 14, 11), (6, 8, 8)), ((15, 12), (8, 9)), ((6, 7, 8), (6, 7, 8))])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_nothing_to_do_is_the_centre_crop(read: tuple[int, ...], patch: tuple[int, ...], dtype: torch.dtype) -> None:
    images = smooth((3, 2, *read))
    labels = classes_like(images, 5).to(dtype)
    before = images.clone(), labels.clone()
    parameters = draw(patch, NO_AUGMENTATION, n_samples=3, n_channels=2)
    new_images, new_labels = apply_parameters(images, labels, patch_size=patch, parameters=parameters)
    assert torch.equal(new_images, centre(images, patch))
    assert torch.equal(new_labels, centre(labels, patch).long())
    assert (new_images.dtype, new_labels.dtype) == (torch.float32, torch.int64)
    new_images.zero_()
    assert torch.equal(images, before[0]), "the input shares no memory with the result"
    assert torch.equal(labels, before[1])


@pytest.mark.parametrize("patch", [(4, 6, 5), (6, 5)])
def test_mirroring_is_exactly_one_of_the_flips_for_image_and_label(patch: tuple[int, ...]) -> None:
    n_samples, read = 64, tuple(size + 3 for size in patch)
    images = torch.rand((n_samples, 2, *read), generator=generator())
    labels = torch.arange(int(np.prod(read))).view(1, *read).repeat(n_samples, 1, 1, *[1] * (len(patch) - 2))
    config = dataclasses.replace(NO_AUGMENTATION, mirror_probability=0.5)
    parameters = draw(patch, config, n_samples=n_samples, n_channels=2)
    new_images, new_labels = apply_parameters(images, labels, patch_size=patch, parameters=parameters)
    axes = range(-len(patch), 0)
    every = [c for n in range(len(patch) + 1) for c in itertools.combinations(axes, n)]
    seen = set()
    for sample in range(n_samples):
        expected = centre(images[sample], patch), centre(labels[sample], patch)
        matching = [c for c in every if torch.equal(new_images[sample], expected[0].flip(c))]
        assert len(matching) == 1
        assert torch.equal(new_labels[sample], expected[1].flip(matching[0]))
        seen.add(matching[0])
    assert seen == set(every)


@pytest.mark.parametrize("patch", [(20, 26, 23), (6, 32, 28), (40, 33)])
def test_image_and_label_stay_together(patch: tuple[int, ...]) -> None:
    table = dataclasses.replace(AugmentConfig.for_patch(patch), **NEVER)
    config = dataclasses.replace(table, rotation_probability=1, scaling_probability=0.5, mirror_probability=0.5)
    parameters = draw(patch, config, n_samples=6)
    images = smooth((6, 1, *read_size(patch, parameters)), sigma=3)
    labels = (images[:, 0] > 0).to(torch.uint8)
    new_images, new_labels = apply_parameters(images, labels, patch_size=patch, parameters=parameters)
    disagreeing = (new_images[:, 0] > 0).long() != new_labels
    assert 0.2 < new_labels.float().mean() < 0.8
    assert disagreeing.float().mean() < 0.05
    # Where they disagree is the surface, nowhere else.
    assert new_images[:, 0][disagreeing].abs().max() < 0.5


def test_labels_keep_their_classes() -> None:
    classes = torch.tensor([0, 3, 7, 200], dtype=torch.uint8)
    patch = (10, 12, 14)
    parameters = draw(patch, EVERYTHING, n_samples=4)
    images = smooth((4, 1, *read_size(patch, parameters)))
    labels = classes[classes_like(images, 4)]
    _, new_labels = apply_parameters(images, labels, patch_size=patch, parameters=parameters)
    assert new_labels.unique().tolist() == classes.tolist()


def test_anisotropic_patches_never_mix_slices() -> None:
    """Slices of constant value stay constant, unless rotation, scale or low resolution reach across them."""
    patch = (5, 24, 20)
    table = dataclasses.replace(AugmentConfig.for_patch(patch), **NEVER)
    turning = dataclasses.replace(table, rotation_probability=1)
    scaling = dataclasses.replace(table, scaling_probability=1)
    lowering = dataclasses.replace(table, low_resolution_probability=1, low_resolution_channel_probability=1)
    all_three = dataclasses.replace(lowering, rotation_probability=1, scaling_probability=1)

    def slices_before_and_after(config: AugmentConfig) -> tuple[Tensor, Tensor]:
        parameters = draw(patch, config, n_samples=8, n_channels=2)
        # As much as a turned and shrunk plane needs, for all configurations.
        slices = torch.tensor([3.0, -1.0, 4.0, 0.5, -2.0]).view(1, 1, 5, 1, 1).expand(8, 2, 5, 44, 44)
        labels = torch.arange(5).view(1, 5, 1, 1).expand(8, 5, 44, 44)
        images, classes = apply_parameters(slices, labels, patch_size=patch, parameters=parameters)
        if config.anisotropic:
            assert read_size(patch, parameters)[0] == 5
            assert torch.equal(classes, labels[..., :24, :20])
        return slices[..., :24, :20].contiguous(), images

    before, after = slices_before_and_after(all_three)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)
    for mixing in (turning, scaling, lowering):
        before, after = slices_before_and_after(dataclasses.replace(mixing, anisotropic=False))
        assert (after - before).abs().mean() > 0.1, "the same check notices a mixture"


@pytest.mark.parametrize("patch", [(9, 11, 10), (4, 16, 14), (20, 13)])
def test_same_seed_same_result(patch: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    parameters = draw(patch, EVERYTHING, n_samples=3, n_channels=2, seed=7)
    images = torch.rand((3, 2, *read_size(patch, parameters)), generator=generator())
    labels = classes_like(images, 3)
    first = apply_parameters(images, labels, patch_size=patch, parameters=parameters)
    torch.manual_seed(2)
    again, other = (
        apply_parameters(
            images, labels, patch_size=patch, parameters=draw(patch, EVERYTHING, n_samples=3, n_channels=2, seed=seed)
        )
        for seed in (7, 8)
    )
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == (3, 2, *patch)
    assert first[1].shape == (3, *patch)
    assert torch.isfinite(first[0]).all()


def test_each_sample_gets_its_own_parameters() -> None:
    """What is grouped for speed must come back to the sample it belongs to: each one alone gives the same."""
    patch, n_samples = (8, 10, 9), 7
    config = dataclasses.replace(AugmentConfig(), rotation_probability=0.5, blur_probability=0.5, noise_probability=0.5)
    drawn = draw(patch, config, n_samples=n_samples, n_channels=2, seed=1)
    images = smooth((n_samples, 2, *read_size(patch, drawn)))
    labels = classes_like(images, 3)
    together = apply_parameters(images, labels, patch_size=patch, parameters=drawn)
    for sample in range(n_samples):
        one = slice(sample, sample + 1)
        parameters = drawn.select([sample])
        alone = apply_parameters(images[one], labels[one], patch_size=patch, parameters=parameters)
        torch.testing.assert_close(together[0][one], alone[0], atol=1e-3, rtol=0)
        assert torch.equal(together[1][one], alone[1])


def test_shapes_that_do_not_fit_are_refused() -> None:
    images, labels = torch.zeros(1, 1, 8, 8, 8), torch.zeros(1, 8, 8, 8)
    parameters = draw((8, 8, 8), NO_AUGMENTATION, n_samples=1)
    with pytest.raises(ValueError, match="larger"):
        apply_parameters(images, labels, patch_size=(8, 8, 9), parameters=parameters)
    with pytest.raises(ValueError, match="do not fit"):
        apply_parameters(images, labels[..., :7], patch_size=(4, 4, 4), parameters=parameters)


@pytest.mark.parametrize("patch", [(12, 16), (8, 12, 16)])
def test_labels_with_a_side_change_places_where_left_and_right_are_mirrored(patch: tuple[int, ...]) -> None:
    last = len(patch) - 1
    config = dataclasses.replace(NO_AUGMENTATION, mirror_probability=0.5, side_axis=last, opposite=(0, 2, 1, 3))
    images = smooth((8, 1, *patch))
    labels = classes_like(images, 4)
    parameters = draw(patch, config, n_samples=8)
    flipped = parameters.flip[:, last]
    assert flipped.any()
    assert not flipped.all()
    patches, classes = apply_parameters(images, labels, patch_size=patch, parameters=parameters)
    unaware = dataclasses.replace(parameters, changes_sides=torch.zeros(8, dtype=torch.bool))
    plain_patches, plain = apply_parameters(images, labels, patch_size=patch, parameters=unaware)
    assert torch.equal(patches, plain_patches)
    assert torch.equal(classes[~flipped], plain[~flipped])
    assert torch.equal(classes[flipped], torch.tensor([0, 2, 1, 3])[plain[flipped]])


def test_axes_that_must_not_be_mirrored_are_not_and_the_others_draw_as_before() -> None:
    config = dataclasses.replace(NO_AUGMENTATION, mirror_probability=0.5)
    every = draw((8, 12, 16), config, n_samples=50).flip
    some = draw((8, 12, 16), dataclasses.replace(config, mirror_axes=(0, 1)), n_samples=50).flip
    assert torch.equal(some[:, :2], every[:, :2])
    assert every[:, 2].any()
    assert not some[:, 2].any()

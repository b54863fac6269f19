"""The augmentation table with the transforms of batchgenerators, on the CPU: what the one in torch is measured against.

batchgenerators (Isensee et al., 2020) is what trained the published networks. It is imported when a pipeline is made.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.core.errors import TrainingError
from autoseg.training.augment import AugmentConfig
from autoseg.training.augment_geometry import covering_size

GLOBAL_RANDOM_STATES = threading.Lock()
N_ANGLES = {1: 361, 3: 31}  # tried per axis in search of the largest reach, by the number of axes to turn about


class ClassicAugmentation:
    """Rotation to gamma by batchgenerators, in the table's order, and then mirroring, which here may swap classes.

    It does what `augment` does to a batch, with these differences: brightness is drawn evenly from its range, and low
    resolution goes back up with the cubic spline. The region to read is the same for every batch.

    Example:
        >>> augmentation = ClassicAugmentation((64, 64, 64), AugmentConfig.for_patch((64, 64, 64)))
        >>> augmentation.read_size
        (150, 154, 150)
    """

    def __init__(self, patch_size: tuple[int, ...], config: AugmentConfig) -> None:
        """Makes the pipeline.

        Args:
            patch_size: in voxels, (Y, X) or (Z, Y, X).
            config: the table.

        Raises:
            TrainingError: a range lies on one side of 1 and batchgenerators would draw from outside it.
        """
        self._patch_size = patch_size
        self._config = config
        self._read_size = _largest_read_size(patch_size, config)
        self._transform = _make_pipeline(patch_size, config)

    @property
    def read_size(self) -> tuple[int, ...]:
        """Size of the region to read around each patch: no draw, however extreme, shows an empty corner.

        It exceeds the patch by an even number of voxels, equally on both sides.
        """
        return self._read_size

    def __call__(
        self, images: NDArray[np.float32], classes: NDArray[np.int64], *, seed: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Augments a batch and cuts it to the patch. The same seed gives the same result, bit for bit.

        batchgenerators draws from the global random states of numpy and Python. They are set for the time of the call
        and put back after it, under one lock for all pipelines of the process: one batch at a time, however many
        threads ask. Whatever else draws from them meanwhile, in another thread, would disturb both.

        Args:
            images: (N, C, *read_size) float32.
            classes: (N, *read_size) integers from 0, below 2**24.
            seed: from 0, below 2**64.

        Returns:
            (N, C, *patch) float32 and (N, *patch) int64 with the same classes. The inputs are not changed.

        Raises:
            ValueError: the shapes do not fit together or are not those of the region to read.
        """
        if classes.shape != (len(images), *self._read_size) or images.shape[2:] != self._read_size:
            raise ValueError(
                f"images {images.shape} and classes {classes.shape} do not fit the region to read, {self._read_size}"
            )
        with _global_random_states(seed):
            result = self._transform(data=images, seg=classes[:, None].astype(np.float32))
        patches, patch_classes = result["data"], result["seg"][:, 0].astype(np.int64)
        self._mirror(patches, patch_classes, seed)
        return patches, patch_classes

    def mirror_outputs(self, of_outputs: Tensor, *, seed: int) -> Tensor:
        """See `autoseg.training.augment.AugmentParameters.mirror_outputs`."""
        config = self._config
        if config.side_axis is None or not config.opposite_outputs:
            return of_outputs
        changes_sides = torch.from_numpy(self._draw_flips(len(of_outputs), seed)[:, config.side_axis])
        return torch.where(changes_sides[:, None], of_outputs[:, list(config.opposite_outputs)], of_outputs)

    def _mirror(self, images: NDArray[np.float32], classes: NDArray[np.int64], seed: int) -> None:
        """Mirrors in place. batchgenerators has one probability for all axes and does not know left from right."""
        config = self._config
        opposite = np.array(config.opposite, dtype=np.int64)
        for sample, flags in enumerate(self._draw_flips(len(images), seed)):
            flipped = np.flatnonzero(flags)
            images[sample] = np.flip(images[sample], tuple(flipped + 1))
            classes[sample] = np.flip(classes[sample], tuple(flipped))
            if config.side_axis is not None and flags[config.side_axis] and len(opposite):
                classes[sample] = opposite[classes[sample]]

    def _draw_flips(self, n_samples: int, seed: int) -> NDArray[np.bool_]:
        """Which axes of each sample are mirrored, (N, D)."""
        config, n_axes = self._config, len(self._patch_size)
        axes = range(n_axes) if config.mirror_axes is None else config.mirror_axes
        flip = np.random.default_rng(seed).random((n_samples, n_axes)) < config.mirror_probability
        return flip & np.isin(np.arange(n_axes), axes)


@contextmanager
def _global_random_states(seed: int) -> Iterator[None]:
    """numpy's and Python's global random states as the seed makes them; afterwards as they were."""
    with GLOBAL_RANDOM_STATES:
        of_numpy, of_python = np.random.get_state(), random.getstate()  # noqa: NPY002 - what batchgenerators draws from
        try:
            # numpy takes 32 bits at a time.
            np.random.seed([seed & 0xFFFFFFFF, seed >> 32])  # noqa: NPY002
            random.seed(seed)
            yield
        finally:
            np.random.set_state(of_numpy)  # noqa: NPY002
            random.setstate(of_python)


def _make_pipeline(patch_size: tuple[int, ...], config: AugmentConfig) -> Callable[..., dict[str, Any]]:
    """The table as transforms of a batch: called with `data` and `seg`, gives a dict of both, cut to the patch."""
    from batchgenerators.transforms import abstract_transforms, color_transforms, noise_transforms
    from batchgenerators.transforms.resample_transforms import SimulateLowResolutionTransform
    from batchgenerators.transforms.spatial_transforms import SpatialTransform

    about = np.deg2rad([*config.rotation_max_deg_per_axis(len(patch_size)), 0.0, 0.0][:3])
    spatial: Callable[..., dict[str, Any]] = SpatialTransform(
        patch_size[1:] if config.anisotropic else patch_size,
        do_elastic_deform=False,
        do_rotation=True,
        angle_x=(-about[0], about[0]),
        angle_y=(-about[1], about[1]),
        angle_z=(-about[2], about[2]),
        p_rot_per_sample=config.rotation_probability,
        do_scale=True,
        scale=_factors("scaling_range", config.scaling_range),
        p_scale_per_sample=config.scaling_probability,
        # What is read holds every position but for rounding, and that must not make an outermost voxel zero.
        border_mode_data="nearest",
        border_mode_seg="nearest",
        order_data=1,
        order_seg=0,
        random_crop=False,
    )
    gamma = {"gamma_range": _factors("gamma_range", config.gamma_range), "per_channel": True, "retain_stats": True}
    pipeline: Callable[..., dict[str, Any]] = abstract_transforms.Compose(
        [
            _for_each_slice(spatial) if config.anisotropic else spatial,
            # What it calls variance is the standard deviation.
            noise_transforms.GaussianNoiseTransform(
                noise_variance=config.noise_std_range, p_per_sample=config.noise_probability
            ),
            noise_transforms.GaussianBlurTransform(
                # Given integers it would draw integers.
                blur_sigma=(float(config.blur_sigma_range[0]), float(config.blur_sigma_range[1])),
                different_sigma_per_channel=True,
                p_per_channel=config.blur_channel_probability,
                p_per_sample=config.blur_probability,
            ),
            color_transforms.BrightnessMultiplicativeTransform(
                config.brightness_range, per_channel=True, p_per_sample=config.brightness_probability
            ),
            color_transforms.ContrastAugmentationTransform(
                _factors("contrast_range", config.contrast_range),
                preserve_range=True,
                per_channel=True,
                p_per_sample=config.contrast_probability,
            ),
            SimulateLowResolutionTransform(
                zoom_range=config.low_resolution_range,
                per_channel=True,
                p_per_channel=config.low_resolution_channel_probability,
                order_downsample=0,
                order_upsample=3,
                p_per_sample=config.low_resolution_probability,
                ignore_axes=(0,) if config.anisotropic else None,
            ),
            color_transforms.GammaTransform(invert_image=True, p_per_sample=config.inverted_gamma_probability, **gamma),
            color_transforms.GammaTransform(invert_image=False, p_per_sample=config.gamma_probability, **gamma),
        ]
    )
    return pipeline


def _for_each_slice(transform: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A transform of (N, C, Y, X) for (N, C, Z, Y, X): slices are channels to it, so all get the same and none mix."""

    def transform_slices(**batch: NDArray[np.float32]) -> dict[str, Any]:
        folded = {name: values.reshape(len(values), -1, *values.shape[3:]) for name, values in batch.items()}
        return {
            name: values.reshape(*batch[name].shape[:3], *values.shape[2:])
            for name, values in transform(**folded).items()
        }

    return transform_slices


def _factors(name: str, bounds: tuple[float, float]) -> tuple[float, float]:
    """The bounds of factors that batchgenerators draws below or above 1 with equal chance, if it stays inside them."""
    low, high = bounds
    if low < 1 and high <= 1:
        raise TrainingError(
            f"augmentation: {name} lies on one side of 1, where batchgenerators would draw from outside it; give a "
            "range with 1 inside, or use the augmentation in torch"
        )
    return bounds


def _largest_read_size(patch_size: tuple[int, ...], config: AugmentConfig) -> tuple[int, ...]:
    """What the most extreme draws of rotation and scale reach, together."""
    turning = config.rotation_probability > 0
    # Beyond a quarter turn the corners come to where they have been before.
    maxima = [min(maximum, 90.0) * turning for maximum in config.rotation_max_deg_per_axis(len(patch_size))]
    n_angles = N_ANGLES[max(1, sum(maximum > 0 for maximum in maxima))]
    # batchgenerators turns about the first axis first, `rotation_matrices` about the last. With the axes in reverse the
    # two are alike, but for signs, and all signs are tried.
    angles = [torch.linspace(-m, m, n_angles if m > 0 else 1, dtype=torch.float64) for m in reversed(maxima)]
    angles_rad = torch.deg2rad(torch.cartesian_prod(*angles).reshape(-1, len(angles)))
    scale = torch.ones(len(angles_rad), len(patch_size), dtype=torch.float64)
    if config.scaling_probability > 0:
        scale[:, int(config.anisotropic) :] = max(1.0, config.scaling_range[1])
    return covering_size(patch_size[::-1], angles_rad=angles_rad, scale=scale.flip(1))[::-1]

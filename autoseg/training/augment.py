"""Augmentation of a batch of patches, on the device where the batch is: 2D and 3D, images and labels together.

Three steps: `draw_parameters` draws all that is random for a batch, on the CPU; `read_size` says how large a region
around each patch this batch needs, mostly the patch itself or little more; `apply_parameters` makes patches of what was
read. Applying is deterministic, so the same generator gives the same patches on every device, up to rounding and the
noise field. Each sample is changed by itself, so a part of a batch becomes what it becomes in the whole batch. Spatial
axes are (Z, Y, X).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from autoseg.core.errors import TrainingError
from autoseg.core.runtime import send
from autoseg.training import augment_intensity as intensity
from autoseg.training.augment_geometry import covering_size, resample

ANISOTROPIC_PATCH_RATIO = 3.0
ELONGATED_PATCH_RATIO = 1.5


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """The augmentation table. Probabilities are per sample; the defaults are the published ones for a 3D patch.

    Attributes:
        anisotropic: 3D only: rotate and scale only in the plane of the last two axes, and keep the first at full
            resolution, so that slices never mix.
        rotation_probability: of a rotation, about all axes at once.
        rotation_max_deg: angles are drawn from minus to plus this, about each axis; 180 at most.
        scaling_probability: of scaling about the centre, all axes alike.
        scaling_range: of the factor on distances in the patch: below 1 enlarges structures; drawn below or above 1 with
            equal chance.
        noise_probability: of Gaussian noise.
        noise_std_range: of the noise, the same for all channels; the published table calls it variance, but its
            implementation uses it as standard deviation.
        blur_probability: of Gaussian blur.
        blur_channel_probability: of each channel, if the sample is blurred.
        blur_sigma_range: of the blur in voxels, drawn per channel.
        brightness_probability: of multiplying all values.
        brightness_range: of the factor, drawn per channel, below or above 1 with equal chance.
        contrast_probability: of multiplying the distance to the channel's mean, within the channel's range.
        contrast_range: of the factor, drawn as for brightness.
        low_resolution_probability: of simulated low resolution.
        low_resolution_channel_probability: of each channel, if the sample is chosen.
        low_resolution_range: of the size as a fraction of the full one, drawn per channel.
        inverted_gamma_probability: of gamma on the negative image.
        gamma_probability: of gamma.
        gamma_range: of the exponent for both, drawn as for brightness.
        mirror_probability: of mirroring, for each axis on its own.
        mirror_axes: of the patch that may be mirrored; None for all.
        side_axis: the axis that runs from left to right, whose mirroring makes another class of some classes.
        opposite: the class that each class becomes then; empty where all stay.
        opposite_outputs: the output of the network that each output becomes then; empty where all stay.
    """

    anisotropic: bool = False
    rotation_probability: float = 0.2
    rotation_max_deg: float = 30.0
    scaling_probability: float = 0.2
    scaling_range: tuple[float, float] = (0.7, 1.4)
    noise_probability: float = 0.1
    noise_std_range: tuple[float, float] = (0.0, 0.1)
    blur_probability: float = 0.2
    blur_channel_probability: float = 0.5
    blur_sigma_range: tuple[float, float] = (0.5, 1.0)
    brightness_probability: float = 0.15
    brightness_range: tuple[float, float] = (0.75, 1.25)
    contrast_probability: float = 0.15
    contrast_range: tuple[float, float] = (0.75, 1.25)
    low_resolution_probability: float = 0.25
    low_resolution_channel_probability: float = 0.5
    low_resolution_range: tuple[float, float] = (0.5, 1.0)
    inverted_gamma_probability: float = 0.1
    gamma_probability: float = 0.3
    gamma_range: tuple[float, float] = (0.7, 1.5)
    mirror_probability: float = 0.5
    mirror_axes: tuple[int, ...] | None = None
    side_axis: int | None = None
    opposite: tuple[int, ...] = ()
    opposite_outputs: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_probability") and not 0 <= value <= 1:
                raise TrainingError(f"augmentation: {field.name} is {value}, expected 0 to 1")
            if field.name.endswith("_range"):
                low, high = value
                allowed = low >= 0 if field.name == "noise_std_range" else low > 0
                if not (allowed and low <= high < float("inf")):
                    raise TrainingError(f"augmentation: {field.name} is {list(value)}, expected positive [low, high]")
        if self.low_resolution_range[1] > 1:
            raise TrainingError(
                f"augmentation: low_resolution_range is {list(self.low_resolution_range)}, expected at most 1"
            )
        if not 0 <= self.rotation_max_deg <= 180:
            raise TrainingError(f"augmentation: rotation_max_deg is {self.rotation_max_deg}, expected 0 to 180")

    @classmethod
    def for_patch(cls, patch_size: tuple[int, ...]) -> AugmentConfig:
        """The published table for a patch of this shape, (Y, X) or (Z, Y, X) in voxels."""
        if len(patch_size) == 2:
            elongated = max(patch_size) / min(patch_size) > ELONGATED_PATCH_RATIO
            return cls(rotation_max_deg=15.0 if elongated else 180.0)
        anisotropic = max(patch_size) / patch_size[0] > ANISOTROPIC_PATCH_RATIO
        return cls(anisotropic=anisotropic, rotation_max_deg=180.0 if anisotropic else 30.0)

    def rotation_max_deg_per_axis(self, n_axes: int) -> tuple[float, ...]:
        """The largest angle about each rotation axis: one for 2D; about Z, Y and X for 3D."""
        if n_axes == 2:
            return (self.rotation_max_deg,)
        return (self.rotation_max_deg, *[0.0 if self.anisotropic else self.rotation_max_deg] * 2)


@dataclass(frozen=True, kw_only=True)
class AugmentParameters:
    """What was drawn for one batch, on the CPU. A value that leaves the image as it is means "not chosen".

    Attributes:
        angles_rad: (N, 1) for 2D, (N, 3) for 3D: about Z, Y and X; 0 leaves it.
        scale: (N, D), the factor on distances along each axis of the patch; 1 leaves it.
        flip: (N, D) bool.
        noise_std: (N, C), 0 leaves it, as for the blur; for all that follow 1 does.
        noise_seed: (N,) int64, of the noise field.
        blur_sigma: (N, C), in voxels.
        brightness: (N, C).
        contrast: (N, C).
        low_resolution: (N, C).
        inverted_gamma: (N, C).
        gamma: (N, C).
        keep_first_axis: low resolution leaves the first spatial axis as it is, so that slices do not mix.
        changes_sides: (N,) bool: whether left and right are mirrored.
        opposite: (K,) the class that each class becomes then; empty where all stay.
        opposite_outputs: (n,) likewise of the network's outputs.
    """

    angles_rad: Tensor
    scale: Tensor
    flip: Tensor
    noise_std: Tensor
    noise_seed: Tensor
    blur_sigma: Tensor
    brightness: Tensor
    contrast: Tensor
    low_resolution: Tensor
    inverted_gamma: Tensor
    gamma: Tensor
    keep_first_axis: bool
    changes_sides: Tensor
    opposite: Tensor
    opposite_outputs: Tensor

    def select(self, samples: Sequence[int]) -> AugmentParameters:
        """What was drawn for these samples of the batch."""
        of_each = {field.name for field in fields(self)} - {"keep_first_axis", "opposite", "opposite_outputs"}
        return replace(self, **{name: getattr(self, name)[list(samples)] for name in of_each})

    def mirror_outputs(self, of_outputs: Tensor) -> Tensor:
        """What belongs to each output of the network, (N, n), as it is when left and right have changed places."""
        if not len(self.opposite_outputs):
            return of_outputs
        return torch.where(self.changes_sides[:, None], of_outputs[:, self.opposite_outputs], of_outputs)


def draw_parameters(
    *, n_samples: int, n_channels: int, n_axes: int, config: AugmentConfig, generator: torch.Generator
) -> AugmentParameters:
    """Draws everything a batch needs.

    The amount that is drawn does not depend on what is chosen, so changing one probability leaves the others' draws.
    """
    each = (n_samples, n_channels)

    def uniform(bounds: tuple[float, float], shape: tuple[int, ...]) -> Tensor:
        return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(shape, generator=generator)

    def factor(bounds: tuple[float, float], shape: tuple[int, ...] = each) -> Tensor:
        """Below or above 1 with equal chance, where the bounds allow both."""
        low, high = bounds
        below, above = uniform((low, min(high, 1.0)), shape), uniform((max(low, 1.0), high), shape)
        return torch.where(
            torch.rand(shape, generator=generator) < (0.5 if low < 1 < high else float(low < 1)), below, above
        )

    def chosen(probability: float, shape: tuple[int, ...] = (n_samples, 1)) -> Tensor:
        return torch.rand(shape, generator=generator) < probability

    maxima = torch.deg2rad(torch.tensor(config.rotation_max_deg_per_axis(n_axes)))
    angles = maxima * uniform((-1.0, 1.0), (n_samples, len(maxima)))
    noise_std = uniform(config.noise_std_range, (n_samples, 1))
    blurred = chosen(config.blur_probability) & chosen(config.blur_channel_probability, each)
    lowered = chosen(config.low_resolution_probability) & chosen(config.low_resolution_channel_probability, each)
    angles_rad = torch.where(chosen(config.rotation_probability), angles, 0.0)
    scale = torch.where(chosen(config.scaling_probability), factor(config.scaling_range, (n_samples, 1)), 1.0)
    scale = scale.repeat(1, n_axes)
    if config.anisotropic:
        scale[:, 0] = 1.0
    flip = chosen(config.mirror_probability, (n_samples, n_axes))
    if config.mirror_axes is not None:
        flip &= torch.tensor([axis in config.mirror_axes for axis in range(n_axes)])
    sides = torch.zeros(n_samples, dtype=torch.bool) if config.side_axis is None else flip[:, config.side_axis]
    return AugmentParameters(
        angles_rad=angles_rad,
        scale=scale,
        flip=flip,
        noise_std=torch.where(chosen(config.noise_probability), noise_std, 0.0).expand(each),
        noise_seed=torch.randint(2**62, (n_samples,), generator=generator),
        blur_sigma=torch.where(blurred, uniform(config.blur_sigma_range, each), 0.0),
        brightness=torch.where(chosen(config.brightness_probability), factor(config.brightness_range), 1.0),
        contrast=torch.where(chosen(config.contrast_probability), factor(config.contrast_range), 1.0),
        low_resolution=torch.where(lowered, uniform(config.low_resolution_range, each), 1.0),
        inverted_gamma=torch.where(chosen(config.inverted_gamma_probability), factor(config.gamma_range), 1.0),
        gamma=torch.where(chosen(config.gamma_probability), factor(config.gamma_range), 1.0),
        keep_first_axis=config.anisotropic,
        changes_sides=sides,
        opposite=torch.tensor(config.opposite, dtype=torch.int64),
        opposite_outputs=torch.tensor(config.opposite_outputs, dtype=torch.int64),
    )


def read_size(patch_size: tuple[int, ...], parameters: AugmentParameters) -> tuple[int, ...]:
    """Size of the region to read around each patch of a batch so that no rotated or shrunk sample shows empty corners.

    Args:
        patch_size: in voxels, (Y, X) or (Z, Y, X).
        parameters: what was drawn for the batch.

    Returns:
        Size in voxels, same axes: the smallest that will do for all samples, nowhere smaller than the patch. It exceeds
        the patch by an even number, equally on both sides.
    """
    return covering_size(patch_size, angles_rad=parameters.angles_rad, scale=parameters.scale)


@torch.no_grad()
def apply_parameters(
    images: Tensor, labels: Tensor, *, patch_size: tuple[int, ...], parameters: AugmentParameters
) -> tuple[Tensor, Tensor]:
    """Does to a batch what was drawn for it, and cuts it to the patch.

    Mirroring is part of the geometry and so comes before the intensities rather than after: the result is distributed
    alike, because no intensity transform prefers a direction.

    Args:
        images: (N, C, *read) float32, on any device.
        labels: (N, *read), integers below 2**24, on the same device.
        patch_size: in voxels, (Y, X) or (Z, Y, X), nowhere larger than the read region; see `read_size`.
        parameters: for N samples of C channels; see `draw_parameters`.

    Returns:
        (N, C, *patch) float32 and (N, *patch) int64 with the same classes. The inputs are not changed.

    Raises:
        ValueError: the shapes do not fit together.
    """
    read = tuple(images.shape[2:])
    if labels.shape != (images.shape[0], *read) or len(read) != len(patch_size):
        raise ValueError(
            f"images {tuple(images.shape)}, labels {tuple(labels.shape)} and patch {patch_size} do not fit"
        )
    if any(size > available for size, available in zip(patch_size, read, strict=True)):
        raise ValueError(f"patch {patch_size} is larger than what was read, {read}")
    # In half precision the sums behind blur, low resolution and sampling positions would be visibly wrong.
    with torch.autocast(images.device.type, enabled=False):
        patches, classes = resample(
            images,
            labels,
            patch_size=patch_size,
            angles_rad=parameters.angles_rad,
            scale=parameters.scale,
            flip=parameters.flip,
        )
        changed = send(torch.nonzero(parameters.changes_sides).flatten(), classes.device)
        if len(changed) and len(parameters.opposite):
            classes[changed] = send(parameters.opposite, classes.device)[classes[changed]]
        for sample in torch.nonzero(parameters.noise_std.any(dim=1)).flatten().tolist():
            noise = torch.Generator(patches.device).manual_seed(int(parameters.noise_seed[sample]))
            patches[sample] = intensity.add_noise(patches[sample], parameters.noise_std[sample], generator=noise)
        planes = patches.flatten(0, 1)
        _edit(planes, parameters.blur_sigma, 0.0, intensity.blur)
        _edit(planes, parameters.brightness, 1.0, intensity.scale_brightness)
        _edit(planes, parameters.contrast, 1.0, intensity.scale_contrast)
        _edit(
            planes,
            parameters.low_resolution,
            1.0,
            lambda p, zoom: intensity.lower_resolution(p, zoom, keep_first_axis=parameters.keep_first_axis),
        )
        _edit(planes, parameters.inverted_gamma, 1.0, intensity.apply_inverted_gamma)
        _edit(planes, parameters.gamma, 1.0, intensity.apply_gamma)
    return patches, classes


def _edit(planes: Tensor, values: Tensor, neutral: float, transform: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Replaces those planes, (N * C, *spatial), whose value, (N, C), is not the one that leaves them as they are."""
    values = values.flatten()
    chosen = torch.nonzero(values != neutral).flatten()
    if len(chosen):
        rows = send(chosen, planes.device)
        planes[rows] = transform(planes[rows], values[chosen])

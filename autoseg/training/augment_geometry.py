"""Rotation, scaling, mirroring and the crop to the patch, as one resampling of a batch.

Geometry is in voxels around the centre of the patch, so that a rotation is a rotation whatever the shape of the patch;
normalised coordinates appear only where torch asks for them. The spacing is not looked at, as in the published method.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from autoseg.core.runtime import send

ROUNDING_VOXELS = 1e-6  # less than this beyond a voxel's centre does not ask for the next voxel


def rotation_matrices(angles_rad: Tensor) -> Tensor:
    """Rotations about the axes, in voxel coordinates.

    Args:
        angles_rad: (N, 1) for 2D; (N, 3) for 3D: about Z, Y and X.

    Returns:
        (N, D, D), same dtype, from patch to read coordinates. In 3D the one about X acts first, the one about Z last.
        About Z the Y axis turns towards X, about Y the Z axis towards X, about X the Z axis towards Y; 2D as about Z.
    """
    cos, sin = angles_rad.cos(), angles_rad.sin()
    n_axes = 2 if angles_rad.shape[1] == 1 else 3
    total = torch.eye(n_axes, dtype=angles_rad.dtype).repeat(len(angles_rad), 1, 1)
    planes = [(0, 1)] if n_axes == 2 else [(1, 2), (0, 2), (0, 1)]
    for column, (a, b) in enumerate(planes):
        turn = torch.eye(n_axes, dtype=angles_rad.dtype).repeat(len(angles_rad), 1, 1)
        turn[:, a, a] = turn[:, b, b] = cos[:, column]
        turn[:, a, b] = -sin[:, column]
        turn[:, b, a] = sin[:, column]
        total = total @ turn
    return total


def covering_size(patch_size: tuple[int, ...], *, angles_rad: Tensor, scale: Tensor) -> tuple[int, ...]:
    """The smallest region around the patch that holds every voxel these samples ask for.

    Args:
        patch_size: in voxels, (Y, X) or (Z, Y, X).
        angles_rad: (N, 1) for 2D, (N, 3) for 3D, see `rotation_matrices`.
        scale: (N, D), the factor on distances along each axis of the patch; above 1 asks for more than the patch.

    Returns:
        Size in voxels, same axes. It exceeds the patch by an even number, equally on both sides.
    """
    half_patch = (torch.tensor(patch_size, dtype=torch.float64) - 1) / 2
    half_scaled = half_patch * scale.to(torch.float64)
    corners = (rotation_matrices(angles_rad.to(torch.float64)).abs() @ half_scaled[..., None])[..., 0]
    margins = (corners.amax(0) - half_patch - ROUNDING_VOXELS).ceil().clamp(min=0).to(torch.int64)
    return tuple(size + 2 * margin for size, margin in zip(patch_size, margins.tolist(), strict=True))


def resample(
    images: Tensor, labels: Tensor, *, patch_size: tuple[int, ...], angles_rad: Tensor, scale: Tensor, flip: Tensor
) -> tuple[Tensor, Tensor]:
    """Cuts the central patch out of each sample, rotated, scaled and mirrored about its centre.

    Samples that are neither rotated nor scaled keep their exact voxels. What lies outside the read region is 0 and
    background. Images are interpolated linearly, labels take the nearest voxel.

    Args:
        images: (N, C, *read) float32.
        labels: (N, *read), integers below 2**24.
        patch_size: in voxels, nowhere larger than the read region.
        angles_rad: (N, 1) for 2D, (N, 3) for 3D, see `rotation_matrices`; on the CPU, as are the next two.
        scale: (N, D), the factor on distances along each axis of the patch; below 1 enlarges structures.
        flip: (N, D) bool, the axes to mirror.

    Returns:
        (N, C, *patch) float32 and (N, *patch) int64, on the device of the images; new memory.
    """
    n_samples, n_channels = images.shape[:2]
    patches = images.new_empty((n_samples, n_channels, *patch_size))
    classes = torch.empty((n_samples, *patch_size), dtype=torch.int64, device=labels.device)
    moved = (angles_rad != 0).any(1) | (scale != 1).any(1)
    _crop(images, labels, patches, classes, samples=torch.nonzero(~moved).flatten(), flip=flip)
    samples = torch.nonzero(moved).flatten()
    if len(samples):
        theta = _affine(images.shape[2:], patch_size, angles_rad[samples], scale[samples], flip[samples])
        grid = F.affine_grid(send(theta, images.device), [len(samples), 1, *patch_size], align_corners=False)
        chosen = send(samples, images.device)
        patches[chosen] = F.grid_sample(_take(images, samples), grid, mode="bilinear", align_corners=False)
        masks = _take(labels, samples).to(torch.float32)[:, None]
        classes[chosen] = F.grid_sample(masks, grid, mode="nearest", align_corners=False)[:, 0].to(torch.int64)
    return patches, classes


def _crop(images: Tensor, labels: Tensor, patches: Tensor, classes: Tensor, *, samples: Tensor, flip: Tensor) -> None:
    """Writes the mirrored central crop of `samples` (indices, on the CPU) into `patches` and `classes`."""
    patch_size = classes.shape[1:]
    starts = _starts(labels.shape[1:], patch_size)
    for axis, (start, size) in enumerate(zip(starts, patch_size, strict=True)):
        images, labels = images.narrow(axis + 2, start, size), labels.narrow(axis + 1, start, size)
    # Samples that are mirrored alike go together: at most 2^D groups however large the batch.
    kinds, kind_of = torch.unique(flip[samples], dim=0, return_inverse=True)
    for kind, flags in enumerate(kinds.tolist()):
        members = samples[kind_of == kind]
        axes = [axis - len(patch_size) for axis, flipped in enumerate(flags) if flipped]
        chosen = send(members, images.device)
        patches[chosen] = _take(images, members).flip(axes)
        classes[chosen] = _take(labels, members).to(torch.int64).flip(axes)


def _starts(read_size: tuple[int, ...], patch_size: tuple[int, ...]) -> tuple[int, ...]:
    return tuple((read - patch) // 2 for read, patch in zip(read_size, patch_size, strict=True))


def _take(batch: Tensor, samples: Tensor) -> Tensor:
    """Rows of a batch, without copying where they follow one another: a read region can be several times the patch."""
    first, last = int(samples[0]), int(samples[-1])
    if last - first + 1 == len(samples):
        return batch[first : last + 1]
    return batch[send(samples, batch.device)]


def _affine(
    read_size: tuple[int, ...], patch_size: tuple[int, ...], angles_rad: Tensor, scale: Tensor, flip: Tensor
) -> Tensor:
    """What `torch.nn.functional.affine_grid` wants: normalised patch coordinates to normalised read coordinates.

    In voxels: read = centre + rotation @ mirroring @ (scale * (patch - (size - 1) / 2)). With edges at -1 and 1, a
    patch coordinate u is u * size / 2 voxels from the centre; voxel v of the read region is at (2 v + 1) / read - 1.

    Returns:
        (N, D, D + 1) float32, rows and columns in torch's order, last spatial axis first.
    """
    read, patch = torch.tensor(read_size, dtype=torch.float64), torch.tensor(patch_size, dtype=torch.float64)
    # Not the centre of the read region: where the sizes differ by an odd number, this agrees with the exact crop.
    centre = torch.tensor(_starts(read_size, patch_size), dtype=torch.float64) + (patch - 1) / 2
    signs = 1 - 2 * flip.to(torch.float64)
    matrix = rotation_matrices(angles_rad.to(torch.float64)) * (signs * scale)[:, None, :]
    linear = matrix * patch / read[:, None]
    offset = ((2 * centre + 1) / read - 1).expand(len(scale), -1)
    return torch.cat([linear.flip(1, 2), offset.flip(1)[..., None]], dim=2).to(torch.float32)

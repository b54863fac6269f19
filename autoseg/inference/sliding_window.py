"""Sliding-window prediction: tiles x mirroring x networks, in a few dozen lines.

Isensee et al., Nature Methods 2021: tiles overlap by half, a Gaussian favours their centres, mirrored copies are
averaged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoseg.core.runtime import autocast_dtype
from autoseg.networks.build import channels_last

# Enough to keep a processor busy, little enough that the activations of a batch stay small.
MAX_BATCH_VOXELS = {"cpu": 2**19, "mps": 2**20, "cuda": 2**23}


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """How a volume is covered.

    Attributes:
        patch_size: of a tile, ([Z,] Y, X); two axes tile each slice of a volume by itself.
        step_fraction: distance of neighbouring tiles, as a fraction of the patch, over 0 and at most 1.
        mirror_axes: axes of the patch over which mirrored copies are averaged; 0 is its first axis.
        side_axis: the one of them that runs from left to right; in copies that are mirrored along it, classes with a
            side have changed places.
        opposite: the class that each class becomes then; empty where all stay.
    """

    patch_size: tuple[int, ...]
    step_fraction: float = 0.5
    mirror_axes: tuple[int, ...] = ()
    side_axis: int | None = None
    opposite: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.step_fraction <= 1:
            raise ValueError(f"step_fraction is {self.step_fraction}, expected more than 0 and at most 1")

    @property
    def tile(self) -> tuple[int, ...]:
        """The patch in three axes; a 2D patch is one voxel thick."""
        return (1, *self.patch_size)[-3:]

    @property
    def mirrorings(self) -> list[tuple[int, ...]]:
        """Every combination of the mirrored axes, first none at all."""
        sizes = range(len(self.mirror_axes) + 1)
        return [axes for size in sizes for axes in itertools.combinations(self.mirror_axes, size)]


def tile_starts(size: int, patch: int, step_fraction: float) -> list[int]:
    """Where tiles start along an axis: evenly spread, the first at 0, the last at the end."""
    if size <= patch:
        return [0]
    # At least a voxel, else the slices of a volume that is tiled in 2D would be predicted twice.
    n_steps = math.ceil((size - patch) / max(1.0, patch * step_fraction))
    return [round(index * (size - patch) / n_steps) for index in range(n_steps + 1)]


def gaussian_weight(patch_size: Sequence[int]) -> Tensor:
    """Weights of a tile's voxels: a Gaussian about its centre with sigma = patch / 8, never zero; largest value 1."""
    weight = torch.ones(())
    for size in patch_size:
        offsets = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
        axis = torch.exp(-0.5 * (offsets / (size / 8)) ** 2)
        weight = weight.unsqueeze(-1) * axis
    weight = weight / weight.max()
    # Below float16's normal range a voxel that only tile corners see would lose its digits.
    return weight.clamp_min(1e-4).float()


@torch.inference_mode()
def predict_logits(image: Tensor, networks: Sequence[nn.Module], *, n_classes: int, config: WindowConfig) -> Tensor:
    """Logits of a whole volume, averaged over networks, mirrorings and overlapping tiles.

    Args:
        image: (C, Z, Y, X) float32 on the device of the networks, in the network's axes.
        networks: in evaluation mode.
        n_classes: channels of their output.
        config: how the volume is covered.

    Returns:
        (K, Z, Y, X) float32 on the same device.
    """
    image, inner = _pad(image, config.tile)
    weight = gaussian_weight(config.patch_size).reshape(config.tile).to(image.device)
    total = torch.zeros((n_classes, *image.shape[1:]), device=image.device)
    weights = torch.zeros(image.shape[1:], device=image.device)
    axes = zip(image.shape[1:], config.tile, strict=True)
    starts = list(itertools.product(*(tile_starts(size, patch, config.step_fraction) for size, patch in axes)))
    place: tuple[slice, ...]
    for place, logits in _predict_tiles(image, networks, starts, config):
        total[:, place[0], place[1], place[2]] += logits * weight
        weights[place] += weight
    total /= weights
    return total[:, inner[0], inner[1], inner[2]]


def _pad(image: Tensor, tile: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
    """Pads (C, Z, Y, X) with zeros to at least a tile, evenly on both sides; and where the volume is in it."""
    padding: list[int] = []
    inner = []
    for size, patch in zip(image.shape[1:], tile, strict=True):
        missing = max(0, patch - size)
        padding = [missing // 2, missing - missing // 2, *padding]
        inner.append(slice(missing // 2, missing // 2 + size))
    return nn.functional.pad(image, padding), tuple(inner)


def _predict_tiles(
    image: Tensor, networks: Sequence[nn.Module], starts: Sequence[tuple[int, ...]], config: WindowConfig
) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """Each tile's place and its logits (K, Z, Y, X); tiles and mirrored copies share batches."""
    n_axes = len(config.patch_size)
    n_per_batch = max(1, MAX_BATCH_VOXELS[image.device.type] // math.prod(config.patch_size))
    mirrorings = config.mirrorings
    jobs = [(start, mirroring) for start in starts for mirroring in mirrorings]
    collected: Tensor | None = None
    n_collected = 0
    for first in range(0, len(jobs), n_per_batch):
        part = jobs[first : first + n_per_batch]
        tiles = torch.stack([_flip(_tile(image, start, config.tile, n_axes), axes) for start, axes in part])
        for (start, axes), logits in zip(part, _average(networks, tiles), strict=True):
            copy = _flip(logits, axes)
            if config.side_axis in axes and config.opposite:
                copy = copy[list(config.opposite)]
            collected = copy if collected is None else collected + copy
            n_collected += 1
            if n_collected == len(mirrorings):
                window = tuple(slice(begin, begin + size) for begin, size in zip(start, config.tile, strict=True))
                yield window, (collected / n_collected).reshape(-1, *config.tile)
                collected, n_collected = None, 0


def _tile(image: Tensor, start: Sequence[int], tile: Sequence[int], n_axes: int) -> Tensor:
    window = (slice(begin, begin + size) for begin, size in zip(start, tile, strict=True))
    cut = image[(slice(None), *window)]
    return cut if n_axes == 3 else cut.squeeze(1)


def _flip(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """Mirrors spatial axes of (C, [Z,] Y, X)."""
    return tensor.flip([axis + 1 for axis in axes]) if axes else tensor


def _average(networks: Sequence[nn.Module], tiles: Tensor) -> Tensor:
    """Mean logits of the networks, float32."""
    precision = autocast_dtype(tiles.device)
    tiles = tiles.contiguous(memory_format=channels_last(tiles.ndim - 2))
    with torch.autocast(tiles.device.type, dtype=precision or torch.float32, enabled=precision is not None):
        total = networks[0](tiles).float()
        for network in networks[1:]:
            total = total + network(tiles).float()
    return total / len(networks)

"""What tests of augmentation share: images to change, and a table in which nothing happens."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import scipy.ndimage
import scipy.stats
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.training.augment import AugmentConfig

NEVER: dict[str, Any] = {
    field.name: 0.0
    for field in dataclasses.fields(AugmentConfig)
    if field.name.endswith("_probability") and not field.name.endswith("_channel_probability")
}
"""The probability of every transform."""
NO_AUGMENTATION = AugmentConfig(**NEVER)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth(shape: tuple[int, ...], seed: int = 0, sigma: float = 2.0) -> Tensor:
    """Smooth random images, (N, C, *spatial) float32, of mean 0 and standard deviation 1."""
    noise = np.random.default_rng(seed).normal(size=shape)
    image = scipy.ndimage.gaussian_filter(noise, (0, 0, *[sigma] * (len(shape) - 2)))
    return torch.from_numpy((image - image.mean()) / image.std()).float()


def same_distribution(a: NDArray, b: NDArray) -> bool:
    return scipy.stats.ks_2samp(a, b).pvalue > 0.01

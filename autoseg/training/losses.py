"""Losses: Dice and cross entropy from one softmax, on every supervised output.

Drozdzal et al., "The importance of skip connections in biomedical image segmentation", 2016 (soft Dice); Isensee et
al., Nature Methods 2021 (their sum, deep supervision).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DICE_SMOOTH = 1e-5


def dice_ce_loss(logits: Tensor, classes: Tensor, *, batch_dice: bool) -> Tensor:
    """Cross entropy plus one minus the mean soft Dice of the foreground classes.

    Args:
        logits: (N, K, ...), any floating type.
        classes: (N, ...) int64, 0..K-1.
        batch_dice: sum over the batch before the ratio is taken.

    Returns:
        A scalar, float32.
    """
    n_classes = logits.shape[1]
    log_probabilities = torch.log_softmax(logits.float(), dim=1)
    target = classes.unsqueeze(1)
    of_target = log_probabilities.gather(1, target)
    cross_entropy = -of_target.mean()
    predicted = log_probabilities.exp().flatten(2).sum(dim=2)
    # Sums per class by scattering: the one-hot copy of the target would be as large as the logits. Each plane by itself
    # first: one float32 sum over millions of voxels, one after the other, loses per cents.
    planes = classes.reshape(*classes.shape[:2], -1)
    zeros = log_probabilities.new_zeros(*planes.shape[:2], n_classes)
    overlap = zeros.scatter_add(2, planes, of_target.exp().reshape(planes.shape)).sum(dim=1)
    reference = zeros.scatter_add(2, planes, torch.ones_like(planes, dtype=zeros.dtype)).sum(dim=1)
    if batch_dice:
        overlap, reference, predicted = (sums.sum(dim=0) for sums in (overlap, reference, predicted))
    dice = (2 * overlap + DICE_SMOOTH) / (predicted + reference + DICE_SMOOTH)
    return cross_entropy + 1 - dice[..., 1:].mean()


def deep_supervision_weights(n_outputs: int) -> tuple[float, ...]:
    """1, 1/2, 1/4, ... for the outputs from full resolution down, with the sum 1."""
    total = sum(0.5**level for level in range(n_outputs))
    return tuple(0.5**level / total for level in range(n_outputs))


def deep_supervision_loss(outputs: Sequence[Tensor], classes: Tensor, *, batch_dice: bool) -> Tensor:
    """`dice_ce_loss` at every resolution, weighted.

    Args:
        outputs: logits (N, K, ...) from full resolution down.
        classes: (N, ...) int64 at full resolution.
        batch_dice: see `dice_ce_loss`.
    """
    total = outputs[0].new_zeros((), dtype=torch.float32)
    for weight, logits in zip(deep_supervision_weights(len(outputs)), outputs, strict=True):
        total = total + weight * dice_ce_loss(logits, nearest_classes(classes, logits.shape[2:]), batch_dice=batch_dice)
    return total


def nearest_classes(classes: Tensor, shape: Sequence[int]) -> Tensor:
    """Classes (N, ...) at a lower resolution that divides theirs, by nearest neighbour: a strided view."""
    steps = (full // low for full, low in zip(classes.shape[1:], shape, strict=True))
    return classes[(slice(None), *(slice(step // 2, None, step) for step in steps))]

"""Following the progress of a network on patches of validation cases."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.core.runtime import run_ahead
from autoseg.training.learner import Learner
from autoseg.training.losses import dice_ce_loss
from autoseg.training.patches import Batch, PatchSampler
from autoseg.training.record import ValidationSlice

MAX_SLICES = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchScores:
    """How good a network is on patches.

    Attributes:
        loss: mean over the batches, at full resolution.
        class_dice: (K - 1,) of the foreground classes, over all patches together; NaN where there is none of a class.
        slices: of some patches, to look at.
    """

    loss: float
    class_dice: NDArray[np.float64]
    slices: tuple[ValidationSlice, ...]

    @property
    def mean_dice(self) -> float:
        """Over the classes that occur; NaN where none does."""
        return float(np.nanmean(self.class_dice)) if np.isfinite(self.class_dice).any() else math.nan


def score_patches(
    learner: Learner, sampler: PatchSampler, *, n_batches: int, n_classes: int, batch_dice: bool
) -> PatchScores:
    """Scores a network on the first batches of a sampler: the same patches every time, without augmentation.

    Args:
        learner: has the network.
        sampler: of validation cases.
        n_batches: to look at.
        n_classes: with the background.
        batch_dice: how the loss is taken.
    """
    counts = torch.zeros(3, n_classes, dtype=torch.float64)
    losses: list[float] = []
    slices: list[ValidationSlice] = []
    for batch in run_ahead(sampler.batch, iter(range(n_batches)), n_threads=1, depth=2):
        images, classes = learner.to_device(batch)
        logits = learner.predict(images)
        losses.append(float(dice_ce_loss(logits, classes, batch_dice=batch_dice)))
        predicted = logits.argmax(dim=1)
        for row, voxels in enumerate((classes[predicted == classes], predicted, classes)):
            counts[row] += torch.bincount(voxels.flatten(), minlength=n_classes).cpu()
        slices += _cut_slices(batch, predicted, n_most=MAX_SLICES - len(slices))
    overlap, predicted_sum, reference_sum = counts.numpy()
    with np.errstate(invalid="ignore"):
        dice = 2 * overlap / (predicted_sum + reference_sum)
    return PatchScores(loss=float(np.mean(losses)), class_dice=dice[1:], slices=tuple(slices))


def _cut_slices(batch: Batch, predicted: Tensor, *, n_most: int) -> list[ValidationSlice]:
    """The slice with the most foreground of each of a few patches, the last first: those are centred on foreground."""
    result = []
    for sample in range(len(batch.cases))[::-1][: max(0, n_most)]:
        image, reference, prediction = batch.images[sample, 0], batch.classes[sample], predicted[sample]
        if reference.ndim == 3:
            index = int((reference != 0).sum(dim=(1, 2)).argmax())
            image, reference, prediction = image[index], reference[index], prediction[index]
        result.append(
            ValidationSlice(
                case=batch.cases[sample],
                image=image.numpy(),
                reference=reference.numpy(),
                predicted=prediction.cpu().numpy(),
            )
        )
    return result

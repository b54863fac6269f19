"""Following the progress of a network on patches of validation cases."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.core.runtime import run_ahead
from autoseg.networks.outputs import Outputs
from autoseg.training.learner import Learner
from autoseg.training.losses import output_loss
from autoseg.training.patches import Batch, PatchSampler
from autoseg.training.ranks import ALONE, Ranks
from autoseg.training.record import ValidationSlice

MAX_SLICES = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchScores:
    """How good a network is on patches.

    Attributes:
        loss: mean over the batches, at full resolution.
        class_dice: of the foreground classes, or of the regions, over all patches together; NaN where there is none.
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
    learner: Learner,
    sampler: PatchSampler,
    *,
    n_batches: int,
    outputs: Outputs,
    batch_dice: bool,
    ranks: Ranks = ALONE,
) -> PatchScores:
    """Scores a network on the first batches of a sampler: the same patches every time, without augmentation.

    Args:
        learner: has the network.
        sampler: of validation cases.
        n_batches: to look at.
        outputs: what the channels of the network's output mean.
        batch_dice: how the loss is taken.
        ranks: processes that score some of the batches each; slices are of those that this one has scored.
    """
    counts = torch.zeros(3, outputs.n, dtype=torch.float64)
    loss = torch.zeros((), dtype=torch.float64)
    slices: list[ValidationSlice] = []
    for batch in run_ahead(sampler.batch, range(ranks.index, n_batches, ranks.count), n_threads=1, depth=2):
        images, classes = batch.part_classes(*learner.to_device(batch))
        logits = learner.predict(images)
        known = None if batch.known is None else batch.known.to(logits.device)
        loss += float(output_loss(logits, classes, outputs, batch_dice=batch_dice, annotated=known))
        predicted = outputs.decide(logits, dim=1)
        for sample, (found, wanted) in enumerate(zip(predicted, classes, strict=True)):
            counted = count_overlap(found, wanted, outputs)
            counts += counted if batch.known is None else counted * batch.known[sample]
        slices += _cut_slices(batch, predicted, ignore=outputs.ignore, n_most=MAX_SLICES - len(slices))
    overlap, predicted_sum, reference_sum = ranks.total(counts).numpy()
    with np.errstate(invalid="ignore"):
        dice = 2 * overlap / (predicted_sum + reference_sum)
    # The first of exclusive classes is the background.
    scored = dice if outputs.has_regions else dice[1:]
    return PatchScores(loss=float(ranks.total(loss)) / n_batches, class_dice=scored, slices=tuple(slices))


def count_overlap(predicted: Tensor, reference: Tensor, outputs: Outputs) -> Tensor:
    """Voxels of each output in both, predicted, and in the reference: (3, n) int64 on the CPU.

    Args:
        predicted: classes.
        reference: classes, or `outputs.ignore`, of the same shape.
        outputs: what the channels mean.
    """
    if outputs.ignore is not None:
        counts = reference != outputs.ignore
        predicted, reference = predicted[counts], reference[counts]
    if outputs.has_regions:
        found, wanted = (outputs.members(classes.flatten()) for classes in (predicted, reference))
        return torch.stack([voxels.sum(dim=1) for voxels in (found & wanted, found, wanted)]).cpu()
    parts = (reference[predicted == reference], predicted, reference)
    return torch.stack([torch.bincount(voxels.flatten(), minlength=outputs.n) for voxels in parts]).cpu()


def _cut_slices(batch: Batch, predicted: Tensor, *, ignore: int | None, n_most: int) -> list[ValidationSlice]:
    """The slice with the most foreground of each of a few patches, the last first: those are centred on foreground."""
    result = []
    for sample in range(len(batch.cases))[::-1][: max(0, n_most)]:
        image, reference, prediction = batch.images[sample, 0], batch.classes[sample], predicted[sample]
        if batch.n_labels is not None:
            reference = reference % batch.n_labels
        if ignore is not None:
            reference = reference.masked_fill(reference == ignore, 0)
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

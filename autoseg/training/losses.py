"""Losses: Dice and cross entropy, of classes from one softmax or of regions from sigmoids, on every supervised output.

Drozdzal et al., "The importance of skip connections in biomedical image segmentation", 2016 (soft Dice); Isensee et
al., Nature Methods 2021 (their sum, deep supervision).

Every loss is made of sums over the voxels of each sample. Where a process has only some samples of a batch, `gather`
makes those sums of all samples of its own, (n, S) to (N, S); what is made of them is then the loss of the whole batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from autoseg.networks.outputs import Outputs

DICE_SMOOTH = 1e-5
MAX_LOGITS_AT_ONCE = 2**26
"""Of more, as of a hundred classes, the loss is summed in parts, each made again for its gradient: what it is made of
would take several times the memory of the logits."""

Gather = Callable[[Tensor], Tensor]


def have_all(sums: Tensor) -> Tensor:
    """The `Gather` of a process that has all samples of a batch."""
    return sums


def dice_ce_loss(
    logits: Tensor,
    classes: Tensor,
    *,
    batch_dice: bool,
    ignore: int | None = None,
    annotated: Tensor | None = None,
    gather: Gather = have_all,
) -> Tensor:
    """Cross entropy plus one minus the mean soft Dice of the foreground classes.

    A class that was not annotated in a sample may be anywhere in its background: there, only the sum of its probability
    and that of the background counts (the marginal loss of Shi et al., Medical Image Analysis 2021), and its Dice does
    not.

    Args:
        logits: (N, K, ...), any floating type.
        classes: (N, ...) int64, 0..K-1, or `ignore`.
        batch_dice: sum over the batch before the ratio is taken.
        ignore: class of voxels that do not count; None where all do.
        annotated: (N, K) bool, the classes that were annotated in each sample; None for all.
        gather: makes sums of these samples those of the whole batch.

    Returns:
        A scalar, float32.
    """
    sums = functools.partial(_sums_of_classes, ignore=ignore, annotated=annotated)
    overlap, predicted, reference, entropy = _in_parts(sums, logits, classes)
    return _mean_loss(
        overlap[:, 1:],
        predicted[:, 1:],
        reference[:, 1:],
        entropy=entropy,
        n_voxels=reference.sum(dim=1, keepdim=True),
        known=torch.ones_like(reference[:, 1:]) if annotated is None else annotated[:, 1:].to(reference.dtype),
        batch_dice=batch_dice,
        gather=gather,
    )


def _sums_of_classes(
    logits: Tensor, classes: Tensor, *, ignore: int | None, annotated: Tensor | None
) -> tuple[Tensor, ...]:
    """Over the voxels of each sample: overlap, predicted and reference (N, K), cross entropy (N, 1), float32.

    Arguments are those of `dice_ce_loss`.
    """
    log_probabilities = torch.log_softmax(logits.float(), dim=1)
    if annotated is not None:
        log_probabilities = _merge_into_background(log_probabilities, annotated)
    counts = None if ignore is None else classes != ignore
    if counts is not None:
        classes = classes.where(counts, 0)
    target = classes.unsqueeze(1)
    of_target = log_probabilities.gather(1, target)
    probabilities, of_target_probability = log_probabilities.exp(), of_target.exp()
    if counts is not None:
        weight = counts.unsqueeze(1).to(of_target.dtype)
        of_target, probabilities = of_target * weight, probabilities * weight
        of_target_probability = of_target_probability * weight
    predicted = probabilities.flatten(2).sum(dim=2)
    # Sums per class by scattering: the one-hot copy of the target would be as large as the logits. Each plane by itself
    # first: one float32 sum over millions of voxels, one after the other, loses per cents.
    planes = classes.reshape(*classes.shape[:2], -1)
    zeros = log_probabilities.new_zeros(*planes.shape[:2], logits.shape[1])
    ones = (
        torch.ones_like(planes, dtype=zeros.dtype) if counts is None else counts.reshape(planes.shape).to(zeros.dtype)
    )
    overlap = zeros.scatter_add(2, planes, of_target_probability.reshape(planes.shape)).sum(dim=1)
    reference = zeros.scatter_add(2, planes, ones).sum(dim=1)
    return overlap, predicted, reference, -of_target.flatten(1).sum(dim=1, keepdim=True)


def _in_parts(
    sums: Callable[[Tensor, Tensor], tuple[Tensor, ...]], logits: Tensor, classes: Tensor
) -> tuple[Tensor, ...]:
    """Sums over the voxels (N, K, ...) and (N, ...), of as many planes at a time as `MAX_LOGITS_AT_ONCE` allows."""
    n_parts = math.ceil(logits.numel() / MAX_LOGITS_AT_ONCE)
    if n_parts == 1:
        return sums(logits, classes)
    if logits.requires_grad:
        sums = functools.partial(checkpoint, sums, use_reentrant=False, preserve_rng_state=False)
    parts = zip(logits.chunk(n_parts, dim=2), classes.chunk(n_parts, dim=1), strict=True)
    of_parts = (sums(*part) for part in parts)
    return functools.reduce(lambda before, more: tuple(map(torch.add, before, more)), of_parts)


def dice_bce_loss(
    logits: Tensor,
    members: Tensor,
    *,
    batch_dice: bool,
    counts: Tensor | None = None,
    annotated: Tensor | None = None,
    gather: Gather = have_all,
) -> Tensor:
    """Binary cross entropy plus one minus the mean soft Dice of regions that may overlap.

    Args:
        logits: (N, R, ...), any floating type.
        members: (N, R, ...) bool, which regions each voxel is of.
        batch_dice: sum over the batch before the ratio is taken.
        counts: (N, ...) bool, the voxels that count; None for all.
        annotated: (N, R) bool, the regions that were annotated in each sample; None for all.
        gather: makes sums of these samples those of the whole batch.

    Returns:
        A scalar, float32.
    """
    logits, wanted = logits.float(), members.float()
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    probabilities = logits.sigmoid()
    if counts is not None:
        weight = counts.unsqueeze(1).to(logits.dtype)
        entropy, probabilities, wanted = entropy * weight, probabilities * weight, wanted * weight
    predicted = probabilities.flatten(2).sum(dim=2)
    known = torch.ones_like(predicted) if annotated is None else annotated.to(logits.dtype)
    n_voxels = logits[0, 0].numel() if counts is None else counts.flatten(1).sum(dim=1, keepdim=True)
    return _mean_loss(
        (probabilities * wanted).flatten(2).sum(dim=2),
        predicted,
        wanted.flatten(2).sum(dim=2),
        entropy=known * entropy.flatten(2).sum(dim=2),
        n_voxels=known * n_voxels,
        known=known,
        batch_dice=batch_dice,
        gather=gather,
    )


def _merge_into_background(log_probabilities: Tensor, annotated: Tensor) -> Tensor:
    """Logarithms (N, K, ...) where the background has the probability of all that was not annotated beside its own."""
    outside = ~annotated
    outside[:, 0] = True
    spread = outside.reshape(*outside.shape, *[1] * (log_probabilities.ndim - 2))
    background = log_probabilities.masked_fill(~spread, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.cat([background, log_probabilities[:, 1:]], dim=1)


def _mean_loss(
    overlap: Tensor,
    predicted: Tensor,
    reference: Tensor,
    *,
    entropy: Tensor,
    n_voxels: Tensor,
    known: Tensor,
    batch_dice: bool,
    gather: Gather,
) -> Tensor:
    """Cross entropy plus one minus the mean soft Dice of what was annotated, which is 1 where nothing was.

    Args:
        overlap, predicted, reference: (N, K) float32, sums over what counts.
        entropy: (N, E) float32, sums over voxels.
        n_voxels: (N, E) float32, how many these are.
        known: (N, K) float32, 1 for what was annotated, 0 for the rest.
        batch_dice: sum over the batch before the ratio is taken.
        gather: see `dice_ce_loss`.
    """
    parts = (overlap, predicted, reference, known, entropy, n_voxels)
    # All at once: talking to other processes takes its time, however little is said.
    gathered = gather(torch.cat(parts, dim=1))
    overlap, predicted, reference, known, entropy, n_voxels = gathered.split([part.shape[1] for part in parts], dim=1)
    cross_entropy = entropy.sum() / n_voxels.sum().clamp_min(1)
    if batch_dice:
        overlap, reference, predicted = ((sums * known).sum(dim=0) for sums in (overlap, reference, predicted))
        known = known.amax(dim=0)
    dice = (2 * overlap + DICE_SMOOTH) / (predicted + reference + DICE_SMOOTH)
    return cross_entropy + ((1 - dice) * known).sum() / known.sum().clamp_min(1)


def output_loss(
    logits: Tensor,
    classes: Tensor,
    outputs: Outputs,
    *,
    batch_dice: bool,
    annotated: Tensor | None = None,
    gather: Gather = have_all,
) -> Tensor:
    """The loss of one supervised output, for exclusive classes or for regions.

    Args:
        logits: (N, n, ...).
        classes: (N, ...) int64, 0..n_classes-1, or `outputs.ignore`.
        outputs: what the channels mean.
        batch_dice: sum over the batch before the ratio is taken.
        annotated: (N, n) bool, what was annotated in each sample; None for all.
        gather: see `dice_ce_loss`.
    """
    if not outputs.has_regions:
        return dice_ce_loss(
            logits, classes, batch_dice=batch_dice, ignore=outputs.ignore, annotated=annotated, gather=gather
        )
    counts = None if outputs.ignore is None else classes != outputs.ignore
    members = outputs.members(classes if counts is None else classes.where(counts, 0)).movedim(0, 1)
    return dice_bce_loss(logits, members, batch_dice=batch_dice, counts=counts, annotated=annotated, gather=gather)


def deep_supervision_weights(n_outputs: int) -> tuple[float, ...]:
    """1, 1/2, 1/4, ... for the outputs from full resolution down, with the sum 1."""
    total = sum(0.5**level for level in range(n_outputs))
    return tuple(0.5**level / total for level in range(n_outputs))


def deep_supervision_loss(
    logits: Sequence[Tensor],
    classes: Tensor,
    *,
    batch_dice: bool,
    outputs: Outputs | None = None,
    annotated: Tensor | None = None,
    gather: Gather = have_all,
) -> Tensor:
    """`output_loss` at every resolution, weighted.

    Args:
        logits: (N, n, ...) from full resolution down.
        classes: (N, ...) int64 at full resolution.
        batch_dice: see `dice_ce_loss`.
        outputs: what the channels mean; None for exclusive classes.
        annotated: see `output_loss`.
        gather: see `dice_ce_loss`.
    """
    known = outputs or Outputs(logits[0].shape[1])
    total = logits[0].new_zeros((), dtype=torch.float32)
    for weight, of_level in zip(deep_supervision_weights(len(logits)), logits, strict=True):
        wanted = nearest_classes(classes, of_level.shape[2:])
        total = total + weight * output_loss(
            of_level, wanted, known, batch_dice=batch_dice, annotated=annotated, gather=gather
        )
    return total


def nearest_classes(classes: Tensor, shape: Sequence[int]) -> Tensor:
    """Classes (N, ...) at a lower resolution that divides theirs, by nearest neighbour: a strided view."""
    steps = (full // low for full, low in zip(classes.shape[1:], shape, strict=True))
    return classes[(slice(None), *(slice(step // 2, None, step) for step in steps))]

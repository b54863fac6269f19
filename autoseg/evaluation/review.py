"""What all folds together tell of a case of the training data, from logits that come row by row.

On the network's grid, where the reference is known too: nothing needs to be restored to the scan's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import theilslopes
from torch import Tensor

from autoseg.evaluation.crossval import N_CONFIDENCE_BINS, Calibration, CaseReview, Suspect
from autoseg.evaluation.intervals import robust_deviation
from autoseg.inference.quality import Agreement, QualityModel, count_values
from autoseg.networks.outputs import Outputs

MIN_REVIEWED_CASES = 10
MIN_SUSPICION = 2.0
"""Robust z-score from which a case is shown to a person."""

LOW_RESIDUALS = 2.0
"""Estimates so many residual standard deviations below the median of the training cases are flagged."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ReviewCounts:
    """Of one case, to be added up over cases.

    Attributes:
        confusion: (K, K) voxels by class of the reference (rows) and of the prediction.
        bins: (3, `N_CONFIDENCE_BINS`): voxels, sum of confidences, voxels that are right.
    """

    confusion: NDArray[np.int64]
    bins: NDArray[np.float64]


class Reviewer:
    """Compares what the folds make of one case, with each other and with the reference."""

    def __init__(self, n_folds: int, outputs: Outputs, *, own: int) -> None:
        """Nothing is counted yet.

        Args:
            n_folds: at least one.
            outputs: what the channels of their logits mean.
            own: position of the fold that had not seen the case.
        """
        self._n_folds, self._outputs, self._own = n_folds, outputs, own
        n_classes = outputs.n_classes
        self._agreement = Agreement(n_folds, outputs, of=own) if n_folds > 1 else None
        self._confusion = torch.zeros(n_classes**2, dtype=torch.int64)
        self._consensus = torch.zeros(3, n_classes, dtype=torch.int64)
        self._bins = torch.zeros(3, N_CONFIDENCE_BINS, dtype=torch.float64)
        self._loss, self._n_loss = 0.0, 0

    def add(self, logits: Tensor, reference: Tensor, *, known: Sequence[bool] | None = None) -> None:
        """Counts some rows.

        Args:
            logits: (F * K, n, A, B).
            reference: (n, A, B) classes, or what is to be ignored, int64, on the same device.
            known: which outputs were annotated in the case; None for all.
        """
        if known is not None:
            of_folds = logits.unflatten(0, (self._n_folds, self._outputs.n))
            logits = self._outputs.without_unknown(of_folds, known, dim=1).flatten(0, 1)
        if self._agreement is not None:
            self._agreement.add(logits)
        # Row by row: in single precision, all folds of a hundred classes would take gigabytes.
        for row in range(logits.shape[1]):
            self._add_row(logits[:, row].unflatten(0, (self._n_folds, self._outputs.n)).float(), reference[row])

    def _add_row(self, of_folds: Tensor, reference: Tensor) -> None:
        """Logits (F, K, A, B) float32 and classes (A, B)."""
        outputs, n_classes = self._outputs, self._outputs.n_classes
        if outputs.ignore is not None:
            of_folds, reference = of_folds[:, :, reference != outputs.ignore], reference[reference != outputs.ignore]
        own = of_folds[self._own]
        predicted, consensus = outputs.decide(own), outputs.decide(of_folds.mean(dim=0))
        self._confusion += count_values(reference * n_classes + predicted, n_classes**2)
        for row, classes in enumerate((reference[consensus == reference], consensus, reference)):
            self._consensus[row] += count_values(classes, n_classes)
        matters = (predicted != 0) | (reference != 0)
        if not matters.any():
            return
        # Some devices have no double precision.
        logits = own[:, matters].cpu()
        wanted, predicted = reference[matters].cpu(), predicted[matters].cpu()
        self._loss -= float(outputs.log_likelihood(logits, wanted).double().sum())
        self._n_loss += len(wanted)
        confidence = outputs.log_confidence(logits).exp().double()
        right = (predicted == wanted).double()
        bins = (confidence * N_CONFIDENCE_BINS).long().clamp(max=N_CONFIDENCE_BINS - 1)
        for row, weights in enumerate((torch.ones_like(right), confidence, right)):
            self._bins[row] += torch.bincount(bins, weights=weights, minlength=N_CONFIDENCE_BINS)

    def counts(self) -> ReviewCounts:
        """What adds up over cases."""
        shape = (self._outputs.n_classes,) * 2
        return ReviewCounts(confusion=self._confusion.reshape(shape).numpy(), bins=self._bins.numpy())

    def review(self, case: str, fold: int) -> CaseReview:
        """What is told of the case by itself.

        Args:
            case: its name.
            fold: that had not seen it.
        """
        overlap, predicted, reference = self._consensus[:, 1:].double()
        return CaseReview(
            case=case,
            fold=fold,
            loss=self._loss / max(1, self._n_loss),
            agreement=self._agreement.value if self._agreement is not None else float("nan"),
            consensus_dice=float((2 * overlap / (predicted + reference)).nanmean()),
        )


def calibrate(counts: Sequence[ReviewCounts]) -> Calibration:
    """The calibration over all cases."""
    n_voxels, confidence, right = sum((known.bins for known in counts), np.zeros((3, N_CONFIDENCE_BINS)))
    with np.errstate(invalid="ignore"):
        return Calibration(
            n_voxels=tuple(int(n) for n in n_voxels),
            confidence=tuple((confidence / n_voxels).tolist()),
            accuracy=tuple((right / n_voxels).tolist()),
        )


def fit_quality(reviews: Sequence[CaseReview], dice: Sequence[float]) -> QualityModel | None:
    """How the agreement of folds tells the out-of-fold Dice: a line by Theil and Sen.

    Its slope is the median of those of all pairs of cases, so that a few wrong labels, whose Dice is low however much
    the folds agree, do not bend it.

    Args:
        reviews: of the cases.
        dice: mean Dice of the same cases; NaN where there is nothing to be found.

    Returns:
        None where there are fewer than `MIN_REVIEWED_CASES` cases, or agreement does not rise with Dice.
    """
    agreement, known = np.array([review.agreement for review in reviews]), np.array(dice, np.float64)
    finite = np.isfinite(agreement) & np.isfinite(known)
    agreement, known = agreement[finite], known[finite]
    if len(known) < MIN_REVIEWED_CASES or np.ptp(agreement) == 0 or np.ptp(known) == 0:
        return None
    slope, intercept, *_ = theilslopes(known, agreement)
    if not slope > 0:
        return None
    estimates = np.clip(intercept + slope * agreement, 0, 1)
    residual_std = robust_deviation(known - estimates)
    return QualityModel(
        intercept=float(intercept),
        slope=float(slope),
        residual_std=residual_std,
        correlation=float(np.corrcoef(agreement, known)[0, 1]),
        low_dice=float(max(0.0, np.median(estimates) - LOW_RESIDUALS * residual_std)),
        n_cases=len(known),
    )


def find_suspects(reviews: Sequence[CaseReview]) -> tuple[Suspect, ...]:
    """Cases whose labels a person should look at, most suspicious first.

    The score is the mean of three robust z-scores (distance from the median in scaled median absolute deviations): of
    the loss of the fold that had not seen the case, of how far the mean of all folds is from the reference, and of how
    little the folds agree.
    """
    if len(reviews) < MIN_REVIEWED_CASES:
        return ()
    loss = np.array([review.loss for review in reviews])
    consensus = np.array([review.consensus_dice for review in reviews])
    agreement = np.array([review.agreement for review in reviews])
    z = np.stack([robust_z(loss), -robust_z(consensus), -robust_z(agreement)])
    score = z.mean(axis=0)
    suspects = []
    for index in np.argsort(-score):
        if not score[index] >= MIN_SUSPICION:
            break
        why = [
            f"loss {loss[index]:.2f} (usual {np.nanmedian(loss):.2f})",
            f"all folds together have a Dice of {consensus[index]:.2f} with its labels (usual "
            f"{np.nanmedian(consensus):.2f})",
            f"the folds agree by {agreement[index]:.2f} (usual {np.nanmedian(agreement):.2f})",
        ]
        suspects.append(Suspect(case=reviews[index].case, score=float(score[index]), why="; ".join(why)))
    return tuple(suspects)


def robust_z(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance from the median in scaled median absolute deviations, within 10; NaN counts as usual, 0."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return np.zeros(len(values))
    centre = np.median(finite)
    deviation = max(robust_deviation(finite - centre), 1e-6)
    return np.nan_to_num(np.clip((values - centre) / deviation, -10, 10))

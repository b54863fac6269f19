"""What cross-validation tells of a configuration: every case segmented by the fold that had not seen it."""

from __future__ import annotations

from dataclasses import dataclass

from autoseg.evaluation.scores import Evaluation
from autoseg.inference.quality import QualityModel

N_CONFIDENCE_BINS = 10


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How often the network is right when it is so sure, over voxels where it or the reference has foreground.

    Attributes:
        n_voxels: per bin of confidence, evenly spaced from 0 to 1.
        confidence: mean probability of the class that was chosen, per bin; NaN in empty bins.
        accuracy: part of the voxels where that class is right, per bin; NaN in empty bins.
    """

    n_voxels: tuple[int, ...]
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]

    @property
    def expected_error(self) -> float:
        """Mean distance of confidence and accuracy over voxels (expected calibration error, Guo et al. 2017)."""
        total = sum(self.n_voxels)
        parts = zip(self.n_voxels, self.confidence, self.accuracy, strict=True)
        return sum(n * abs(sure - right) for n, sure, right in parts if n) / total if total else float("nan")


@dataclass(frozen=True, kw_only=True)
class CaseReview:
    """What all folds together tell of a case of the training data.

    Attributes:
        case: its name.
        fold: that had not seen it.
        loss: cross-entropy of that fold, mean over the voxels where it or the reference has foreground.
        agreement: of that fold with each other one, Dice, mean over the labels that either has.
        consensus_dice: Dice of the mean of all folds with the reference, mean over the labels that either has: folds
            that have learned from a label and still contradict it speak against the label.
    """

    case: str
    fold: int
    loss: float
    agreement: float
    consensus_dice: float


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """A case whose labels a person should look at.

    Attributes:
        case: its name.
        score: how suspicious, as a robust z-score: 0 is usual.
        why: in words.
    """

    case: str
    score: float
    why: str


@dataclass(frozen=True, kw_only=True)
class CrossValidation:
    """Everything that is known of a configuration whose folds are all trained, for `cv.json`.

    Attributes:
        configuration: its name.
        model: the sha256 of its folds.
        key: digest of the model and of the references as they were.
        evaluation: out-of-fold scores of all cases, without post-processing.
        folds: the fold that had not seen each case.
        confusion: of the reviewed cases, voxels on the network's grid by class of the reference (rows) and of the
            prediction (columns); class 0 is the background.
        calibration: of the folds' probabilities there.
        reviews: case by case; cases that take too much memory, or that there was no time for, are left out.
        suspects: most suspicious first.
        quality: None where agreement tells nothing: too few cases or folds.
    """

    configuration: str
    model: str
    key: str
    evaluation: Evaluation
    folds: dict[str, int]
    confusion: tuple[tuple[int, ...], ...]
    calibration: Calibration
    reviews: tuple[CaseReview, ...]
    suspects: tuple[Suspect, ...]
    quality: QualityModel | None

"""What scoring label maps gives: per case and label, and summed up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from autoseg.core.errors import AutosegError
from autoseg.core.labels import LabelSpec

OK, EMPTY, ONLY_PREDICTED, MISSED = "ok", "in neither", "not in the reference", "missed"
UNKNOWN = "not annotated"


@dataclass(frozen=True, kw_only=True)
class Target:
    """Something that is scored: a label, or a region of several.

    Attributes:
        name: of the label or region.
        values: in the files, that belong to it.
    """

    name: str
    values: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raises AutosegError: no values, or values that no label map has."""
        if not self.values or any(not 0 < value < 2**16 for value in self.values):
            raise AutosegError(f"{self.name}: values are {list(self.values)}, expected whole numbers from 1 to 65535")


def targets_of(labels: LabelSpec) -> tuple[Target, ...]:
    """One target per region, or where there are none, per label."""
    return tuple(Target(name=name, values=values) for name, values in labels.structure_values.items())


def parse_regions(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Names and values of regions from texts such as "whole=1,2".

    Raises:
        AutosegError: not of that form, or a name twice.
    """
    regions: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, _, values = (part.strip() for part in text.rpartition("="))
        parts = [part.strip() for part in values.split(",")]
        if not name or not all(part.isdecimal() for part in parts):
            raise AutosegError(f"found the region '{text}', expected a name and values, for instance whole=1,2")
        if name in regions:
            raise AutosegError(f"found the region '{name}' twice, expected another name for one of them")
        regions[name] = tuple(int(part) for part in parts)
    return regions


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """What scores depend on besides the label maps.

    Attributes:
        beta: of the F-measure: recall counts this many times as much as precision.
        tolerance_mm: of the surface Dice: surfaces this close count as equal.
        min_lesion_iou: intersection over union from which a predicted component may match one of the reference.
        ignore: value of voxels in the reference that nobody has annotated and that do not count; None where all are.
    """

    beta: float = 2.0
    tolerance_mm: float = 2.0
    min_lesion_iou: float = 0.1
    ignore: int | None = None

    def __post_init__(self) -> None:
        """Raises AutosegError: a value that has no meaning."""
        wrong = [
            f"{name} is {value:g}, expected {expected}"
            for name, value, expected, fits in (
                ("beta", self.beta, "more than 0", self.beta > 0),
                ("the tolerance", self.tolerance_mm, "0 mm or more", self.tolerance_mm >= 0),
                ("the value to ignore", self.ignore or 0, "1 to 65535", self.ignore is None or 0 < self.ignore < 2**16),
                ("the least IoU of lesions", self.min_lesion_iou, "0 < IoU <= 1", 0 < self.min_lesion_iou <= 1),
            )
            if not (fits and math.isfinite(value))
        ]
        if wrong:
            raise AutosegError("settings of the scores: " + "; ".join(wrong))


DEFAULT_SETTINGS = ScoreSettings()


@dataclass(frozen=True, kw_only=True)
class LabelScore:
    """How well one label or region of one case was found. What is not defined is NaN, and the status says why.

    Attributes:
        label: its name.
        values: in the files.
        status: "ok"; "missed", in the reference only; "not in the reference", predicted where there is none; "in
            neither"; "not annotated", so that nothing is known.
        n_reference, n_predicted: voxels.
        reference_ml, predicted_ml: volumes.
        dice, iou, recall: NaN where the reference is empty; 0 where it was missed.
        precision: NaN where nothing is predicted, or nothing is to be found.
        f_beta: NaN where the reference is empty.
        volume_error: (predicted - reference) / reference; NaN where the reference is empty.
        hd95_mm, assd_mm: distances of the surfaces; NaN unless both are there.
        surface_dice: part of both surfaces that is within the tolerance of the other; NaN where the reference is empty.
        n_lesions, n_predicted_lesions, n_matched_lesions: connected components.
        lesion_f1, lesion_recall, lesion_precision: of those; NaN as Dice, recall and precision are.
    """

    label: str
    values: tuple[int, ...]
    status: str
    n_reference: int
    n_predicted: int
    reference_ml: float
    predicted_ml: float
    dice: float
    iou: float
    precision: float
    recall: float
    f_beta: float
    volume_error: float
    hd95_mm: float
    assd_mm: float
    surface_dice: float
    n_lesions: int
    n_predicted_lesions: int
    n_matched_lesions: int
    lesion_f1: float
    lesion_recall: float
    lesion_precision: float


METRICS = (
    "dice",
    "iou",
    "precision",
    "recall",
    "f_beta",
    "volume_error",
    "hd95_mm",
    "assd_mm",
    "surface_dice",
    "lesion_f1",
    "lesion_recall",
    "lesion_precision",
)
"""The attributes of `LabelScore` that are summed up over cases."""


@dataclass(frozen=True, kw_only=True)
class CaseScore:
    """The scores of one case.

    Attributes:
        case: its name.
        labels: one score per label or region.
        mean_dice: over those that are in the reference; NaN where none is.
    """

    case: str
    labels: tuple[LabelScore, ...]
    mean_dice: float


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """One metric over cases. Cases where it is NaN do not count.

    Attributes:
        n: cases that count.
        mean, std, median: over these; NaN where there are none.
        low, high: the 95% bootstrap interval of the mean.
    """

    n: int
    mean: float
    std: float
    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class LabelSummary:
    """One label or region over all cases.

    Attributes:
        label: its name.
        n_cases: whose reference has it.
        n_missed: of these, where nothing of it was predicted: their Dice, IoU, recall, F and surface Dice count as 0,
            their precision and distances not at all.
        n_false: cases where it was predicted but is not in the reference; they count in no metric.
        metrics: by name, see `METRICS`.
    """

    label: str
    n_cases: int
    n_missed: int
    n_false: int
    metrics: dict[str, Statistic]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The scores of a set of predictions.

    Attributes:
        settings: of the metrics.
        labels: summed up over cases.
        mean_dice: mean over the labels of their mean Dice.
        cases: case by case.
        not_scored: references without a prediction, which do not count.
        model: the sha256 of the model that made the predictions, where that is known.
        key: of a validation, the digest of the model and of the references as they were.
    """

    settings: ScoreSettings
    labels: tuple[LabelSummary, ...]
    mean_dice: float
    cases: tuple[CaseScore, ...]
    not_scored: tuple[str, ...] = field(default=())
    model: str | None = None
    key: str | None = None

    @property
    def label_dice(self) -> dict[str, float]:
        """Mean Dice per label over the cases whose reference has it."""
        return {summary.label: summary.metrics["dice"].mean for summary in self.labels}

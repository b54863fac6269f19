"""Scores of a folder of predictions against a folder of references."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoseg.core.errors import DatasetError, FormatError, Problem, describe_problems
from autoseg.core.labels import LabelSpec
from autoseg.core.runtime import map_threads, n_cpus
from autoseg.data.check import grid_difference, label_values
from autoseg.data.files import by_name, list_images
from autoseg.data.io import case_name, read_label
from autoseg.evaluation.metrics import count_labels, dice

logger = logging.getLogger(__name__)

OK, EMPTY, ONLY_PREDICTED = "ok", "in neither", "not in the reference"


@dataclass(frozen=True, kw_only=True)
class LabelScore:
    """How well one label of one case was found.

    Attributes:
        label: its name.
        value: in the files.
        dice: NaN where the reference does not have the label: there is nothing to overlap with.
        status: "ok", "in neither", or "not in the reference" for a label that was predicted where there is none.
        n_reference, n_predicted: voxels.
    """

    label: str
    value: int
    dice: float
    status: str
    n_reference: int
    n_predicted: int


@dataclass(frozen=True, kw_only=True)
class CaseScore:
    """The scores of one case.

    Attributes:
        case: its name.
        labels: one score per label.
        mean_dice: over the labels that are in the reference.
    """

    case: str
    labels: tuple[LabelScore, ...]
    mean_dice: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The scores of a set of predictions.

    Attributes:
        cases: case by case.
        label_dice: mean per label over the cases whose reference has it.
        mean_dice: mean of `label_dice` over the labels.
        not_scored: references without a prediction, which do not count.
    """

    cases: tuple[CaseScore, ...]
    label_dice: dict[str, float]
    mean_dice: float
    not_scored: tuple[str, ...]


def score_case(case: str, prediction: NDArray, reference: NDArray, labels: LabelSpec) -> CaseScore:
    """Scores one label map.

    Args:
        case: its name.
        prediction: (Z, Y, X) integers.
        reference: the same shape.
        labels: names and values to score.
    """
    scores = []
    for name, value, counts in zip(
        labels.names, labels.values, count_labels(prediction, reference, labels.values), strict=True
    ):
        status = OK if counts.reference else ONLY_PREDICTED if counts.predicted else EMPTY
        scores.append(
            LabelScore(
                label=name,
                value=value,
                dice=dice(counts),
                status=status,
                n_reference=counts.reference,
                n_predicted=counts.predicted,
            )
        )
    return CaseScore(case=case, labels=tuple(scores), mean_dice=_mean([score.dice for score in scores]))


def summarise_scores(cases: Sequence[CaseScore], *, not_scored: Sequence[str] = ()) -> Evaluation:
    """Means over cases. NaN, where a label is not in the reference, does not count."""
    names = [score.label for score in cases[0].labels] if cases else []
    label_dice = {name: _mean([case.labels[index].dice for case in cases]) for index, name in enumerate(names)}
    return Evaluation(
        cases=tuple(cases),
        label_dice=label_dice,
        mean_dice=_mean(list(label_dice.values())),
        not_scored=tuple(not_scored),
    )


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")


def evaluate_folders(prediction: Path, reference: Path, *, labels: LabelSpec | None = None) -> Evaluation:
    """Scores every prediction that has a reference of the same name.

    Args:
        prediction: a folder of label maps, or one file.
        reference: a folder of label maps, or one file; two files may have different names.
        labels: names and values; None for every value that occurs.

    Raises:
        DatasetError: no common case, or cases that cannot be compared, all of them listed.
    """
    predicted, wanted = _label_files(prediction), _label_files(reference)
    if prediction.is_file() and reference.is_file():
        wanted = dict(zip(predicted, wanted.values(), strict=True))
    common = sorted(predicted.keys() & wanted.keys())
    if not common:
        raise DatasetError(
            f"{prediction} and {reference} have no file name in common: found {_some(predicted)} and {_some(wanted)}"
        )
    extra = sorted(predicted.keys() - wanted.keys())
    if extra:
        logger.warning("%d predictions have no reference and are not scored: %s", len(extra), _some(extra))

    def read_pair(case: str) -> tuple[NDArray, NDArray] | Problem:
        try:
            (found, found_grid), (expected, grid) = read_label(predicted[case]), read_label(wanted[case])
        except FormatError as error:
            return Problem(kind="label map cannot be used", case=case, text=str(error), advice="replace the file")
        difference = grid_difference(grid, found_grid)
        if difference:
            advice = "compare predictions with references of the same images"
            kind = "prediction and reference differ in shape or affine"
            return Problem(kind=kind, case=case, found=difference[0], expected=difference[1], advice=advice)
        if min(int(found.min()), int(expected.min())) < 0:
            return Problem(kind="label map with negative values", case=case, advice="use values from 0 up")
        return found, expected

    def values_of(case: str) -> set[int] | Problem:
        pair = read_pair(case)
        return pair if isinstance(pair, Problem) else label_values(pair[0]) | label_values(pair[1])

    if labels is None:
        answers = map_threads(values_of, common, n_threads=n_cpus(), description="looking for labels")
        _raise_problems(answers, prediction)
        values = sorted(set().union(*(answer for answer in answers if isinstance(answer, set))) - {0})
        if not values:
            raise DatasetError(f"{prediction} and {reference}: every voxel is background, there is nothing to score")
        labels = LabelSpec(names=tuple(f"label {value}" for value in values), values=tuple(values))
    chosen = labels

    def score(case: str) -> CaseScore | Problem:
        pair = read_pair(case)
        return pair if isinstance(pair, Problem) else score_case(case, *pair, chosen)

    scores = map_threads(score, common, n_threads=n_cpus(), description="scoring")
    _raise_problems(scores, prediction)
    return summarise_scores(
        [score for score in scores if isinstance(score, CaseScore)],
        not_scored=sorted(wanted.keys() - predicted.keys()),
    )


def _raise_problems(answers: Sequence[object], folder: Path) -> None:
    problems = [answer for answer in answers if isinstance(answer, Problem)]
    if problems:
        raise DatasetError(describe_problems(f"{folder}: {len(problems)} cases cannot be scored.", problems))


def _label_files(path: Path) -> dict[str, Path]:
    if path.is_dir():
        return by_name(list_images(path))
    if not path.exists():
        raise DatasetError(f"{path}: no such file or folder")
    return {case_name(path): path}


def _some(names: object) -> str:
    listed = sorted(names)  # type: ignore[call-overload]
    shown = ", ".join(listed[:3]) or "no label map"
    return shown + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")

"""Scores of a folder of label maps against a folder of references."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from numpy.typing import NDArray

from autoseg.core.errors import AutosegError, DatasetError, FormatError, Problem, list_some
from autoseg.core.geometry import Geometry, grid_difference
from autoseg.core.labels import LabelSpec
from autoseg.core.runtime import map_threads, n_cpus
from autoseg.data.files import by_name, is_called_mask, list_case_files, list_images, masks_among, name_after_images
from autoseg.data.io import adopt_place, case_name, read_label
from autoseg.data.load import label_values
from autoseg.evaluation.evaluate import score_case, summarise_scores
from autoseg.evaluation.scores import DEFAULT_SETTINGS, CaseScore, Evaluation, ScoreSettings, Target, targets_of

logger = logging.getLogger(__name__)


def evaluate_folders(
    prediction: Path,
    reference: Path,
    *,
    labels: LabelSpec | None = None,
    regions: Mapping[str, Sequence[int]] | None = None,
    settings: ScoreSettings = DEFAULT_SETTINGS,
    model: str | None = None,
    outdated: Collection[str] = (),
) -> Evaluation:
    """Scores every prediction that has a reference of the same name, or of the same with "_mask" or the like.

    Args:
        prediction: a folder of label maps, or one file.
        reference: a folder of label maps, or one file; two files may have different names.
        labels: names and values; None for every value that occurs.
        regions: names and values of what is scored besides: all voxels with one of the values.
        settings: of the metrics.
        model: the sha256 of the model that made the predictions.
        outdated: cases whose predictions do not count.

    Raises:
        AutosegError: regions or an ignored value that do not go together with the labels.
        DatasetError: no common case, or cases that cannot be compared, all of them listed.
    """
    added = [Target(name=name, values=tuple(values)) for name, values in (regions or {}).items()]
    pairs, not_scored = _match(prediction, reference, outdated)
    if labels is None:
        labels = _find_labels(pairs, ignore=settings.ignore, where=prediction)
    if labels is None:
        raise DatasetError(f"{prediction} and {reference}: every voxel is background, there is nothing to score")
    targets = (*targets_of(labels), *added)
    _check_targets(targets, ignore=settings.ignore)
    n_threads = n_cpus()

    def score(case: str) -> CaseScore | Problem:
        pair = _read_pair(case, *pairs[case])
        if isinstance(pair, Problem):
            return pair
        found, expected, grid = pair
        # Threads that have no case of their own share the labels of the others'.
        n_sharing = max(1, n_threads // len(pairs))
        return score_case(
            case,
            found,
            expected,
            targets,
            spacing_mm=grid.spacing_mm,
            settings=settings,
            n_threads=n_sharing,
            voxel_ml=grid.voxel_volume_ml,
        )

    scores = map_threads(score, pairs, n_threads=n_threads, description="scoring")
    _raise_problems(scores, prediction)
    return summarise_scores(
        [score for score in scores if isinstance(score, CaseScore)],
        settings=settings,
        not_scored=not_scored,
        model=model,
    )


def _match(
    prediction: Path, reference: Path, outdated: Collection[str]
) -> tuple[dict[str, tuple[Path, Path]], list[str]]:
    """Prediction and reference of each case that has both, in order, and the references without a prediction."""
    predicted = {case: file for case, file in _label_files(prediction).items() if case not in outdated}
    wanted = name_after_images(_label_files(reference, among_images=True), predicted)
    if prediction.is_file() and reference.is_file():
        wanted = dict(zip(predicted, wanted.values(), strict=True))
    common = sorted(predicted.keys() & wanted.keys())
    if not common:
        raise DatasetError(
            f"{prediction} and {reference} have no file name in common: found {_some(predicted)} and {_some(wanted)}; "
            "a reference is called as its prediction, or CASE_mask.nii.gz for CASE.nii.gz; two files may have any names"
        )
    extra = sorted(predicted.keys() - wanted.keys())
    if extra:
        logger.warning("%d predictions have no reference and are not scored: %s", len(extra), _some(extra))
    return {case: (predicted[case], wanted[case]) for case in common}, sorted(wanted.keys() - predicted.keys())


def _read_pair(case: str, prediction: Path, reference: Path) -> tuple[NDArray, NDArray, Geometry] | Problem:
    """Both label maps on the grid that they share, or why they cannot be compared."""
    try:
        (found, found_grid), (expected, grid) = read_label(prediction), read_label(reference)
    except FormatError as error:
        return Problem(kind="label map cannot be used", case=case, text=str(error), advice="replace the file")
    grid = adopt_place(grid, reference, prediction)
    difference = grid_difference(grid, found_grid)
    if difference:
        advice = "compare predictions with references of the same images"
        kind = "prediction and reference differ in shape or affine"
        return Problem(kind=kind, case=case, found=difference[0], expected=difference[1], advice=advice)
    if min(int(found.min()), int(expected.min())) < 0:
        return Problem(kind="label map with negative values", case=case, advice="use values from 0 up")
    return found, expected, grid


def _find_labels(pairs: Mapping[str, tuple[Path, Path]], *, ignore: int | None, where: Path) -> LabelSpec | None:
    """A label for each value that occurs in any pair; None where all is background."""

    def values_of(case: str) -> tuple[set[int], set[int]] | Problem:
        pair = _read_pair(case, *pairs[case])
        return pair if isinstance(pair, Problem) else (label_values(pair[0]), label_values(pair[1]))

    answers = map_threads(values_of, pairs, n_threads=n_cpus(), description="looking for labels")
    _raise_problems(answers, where)
    return _labels_found([answer for answer in answers if isinstance(answer, tuple)], ignore=ignore)


def _labels_found(found: Sequence[tuple[set[int], set[int]]], *, ignore: int | None) -> LabelSpec | None:
    """A label for each value of the predictions and references, case by case; None where all is background."""
    in_predictions, in_references = (set().union(*sets) for sets in zip(*found, strict=True))
    missed = sorted(in_references - in_predictions - {0, ignore})
    if missed:
        text = "no prediction has the value %s that references have; if it marks what nobody annotated, --ignore it"
        logger.warning(text, ", ".join(map(str, missed)))
    values = sorted((in_predictions | in_references) - {0, ignore})
    return LabelSpec.of_values(values) if values else None


def _check_targets(targets: Sequence[Target], *, ignore: int | None) -> None:
    names = [target.name for target in targets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AutosegError(f"{', '.join(twice)}: is the name of a label; give the region another")
    ignored = [target.name for target in targets if ignore in target.values]
    if ignored:
        raise AutosegError(f"the value {ignore} is to be ignored, but {', '.join(ignored)} has it; take it out of one")


def _raise_problems(answers: Sequence[object], folder: Path) -> None:
    problems = [answer for answer in answers if isinstance(answer, Problem)]
    if problems:
        raise DatasetError.listing(f"{folder}: {len(problems)} cases cannot be scored.", problems)


def _label_files(path: Path, *, among_images: bool = False) -> dict[str, Path]:
    """By name; of masks that may lie among their images, also in the folders of their cases, the masks alone."""
    if path.is_dir():
        files = list_images(path)
        if among_images:
            files = masks_among(files) or files or [file for file in list_case_files(path) if is_called_mask(file)]
        return by_name(files) if files else {}
    if not path.exists():
        raise DatasetError(f"{path}: no such file or folder")
    return {case_name(path): path}


def _some(names: Iterable[str]) -> str:
    return list_some(sorted(names), most=3) or "no label map"

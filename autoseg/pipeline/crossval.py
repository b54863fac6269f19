"""Cross-validation: every case segmented by the fold that had not seen it, scored, and looked at by all folds."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.core.errors import FormatError, ImageTooLargeError, TrainingError, TrainingInterrupted
from autoseg.core.geometry import axis_first
from autoseg.core.runtime import format_duration, never, track
from autoseg.core.serialize import read_json, write_json
from autoseg.pipeline.cascade import prepare_second_stage
from autoseg.pipeline.complete import why_incomplete
from autoseg.pipeline.configurations import default_configuration
from autoseg.pipeline.fold_validation import validate_fold, validation_key, validation_label_map
from autoseg.pipeline.preprocess import preprocess_cases
from autoseg.pipeline.stored import open_stored, prepare_stored
from autoseg.pipeline.workspace import DEFAULT_WORK, Workspace
from autoseg.training.record import FoldFiles, read_log

if TYPE_CHECKING:
    from autoseg.evaluation.crossval import CaseReview, CrossValidation
    from autoseg.evaluation.review import ReviewCounts

logger = logging.getLogger(__name__)

MIN_REVIEW_S = 600.0


def cross_validate(
    work: Path | str = DEFAULT_WORK,
    *,
    configuration: str | None = None,
    device: str = "auto",
    stop: Callable[[], bool] = never,
) -> CrossValidation:
    """Scores the out-of-fold label maps of all cases, and writes `models/<configuration>/cv.json`.

    What is there already of these very weights is read; folds that are not validated yet are.

    Args:
        work: the work folder.
        configuration: its name; None for the recommended one.
        device: as in `train`.
        stop: asked after every case; True raises.

    Raises:
        TrainingError: not all folds are trained to their end, or they are of another plan or other splits.
        TrainingInterrupted: `stop` said so.
    """
    import numpy as np

    from autoseg.evaluation.crossval import CrossValidation
    from autoseg.evaluation.evaluate import summarise_scores
    from autoseg.evaluation.review import calibrate, find_suspects, fit_quality
    from autoseg.evaluation.scores import ScoreSettings
    from autoseg.inference.model import read_model

    workspace = Workspace(root=Path(work))
    plan = workspace.read_plan()
    name = default_configuration(plan, configuration).name
    if (why := why_incomplete(workspace, name)) is not None:
        raise TrainingError(f"{workspace.model(name)}: cannot be cross-validated: {why}")
    dataset, splits = workspace.read_dataset(), workspace.read_splits()
    folds = range(len(splits.folds))
    digest = read_model(workspace.model(name)).digest(list(folds))
    validated = {case for split in splits.folds for case in split.validation}
    key = validation_key(digest, [case for case in dataset.cases if case.id in validated])
    preprocess_cases(workspace, dataset, plan, name)
    if plan.configuration(name).previous is not None:
        prepare_second_stage(workspace, plan, plan.configuration(name), device=device, stop=stop)
    if (current := _read_current(workspace, name, key)) is not None:
        return current
    parts = {fold: validate_fold(workspace, name, fold, device=device, stop=stop) for fold in folds}
    scores = {score.case: score for part in parts.values() for score in part.cases}
    fold_of = {score.case: fold for fold, part in parts.items() for score in part.cases}
    settings = ScoreSettings(ignore=plan.labels.ignore)
    reviewed = list(_review(workspace, name, fold_of, device=device, stop=stop))
    reviews, counts = [review for review, _ in reviewed], [of_case for _, of_case in reviewed]
    nothing = np.zeros((plan.labels.n_classes,) * 2, np.int64)
    result = CrossValidation(
        configuration=name,
        model=digest,
        key=key,
        evaluation=summarise_scores(list(scores.values()), settings=settings, model=digest),
        folds=fold_of,
        confusion=tuple(tuple(row) for row in sum((of_case.confusion for of_case in counts), nothing).tolist()),
        calibration=calibrate(counts),
        reviews=tuple(reviews),
        # A single fold has no other one to agree with.
        suspects=find_suspects(reviews) if len(folds) > 1 else (),
        quality=fit_quality(reviews, [scores[review.case].mean_dice for review in reviews]),
    )
    write_json(workspace.crossval_file(name), result)
    logger.info("%s: mean Dice %.4f over all %d cases", name, result.evaluation.mean_dice, len(scores))
    return result


def read_cross_validation(workspace: Workspace, configuration: str) -> CrossValidation | None:
    """What is written in `cv.json`, whichever weights it is of; None where it is missing or of another version."""
    from autoseg.evaluation.crossval import CrossValidation

    file = workspace.crossval_file(configuration)
    if not file.is_file():
        return None
    try:
        content: CrossValidation = read_json(file, CrossValidation)
    except FormatError as error:
        logger.info("%s; it is made anew", error)
        return None
    return content


def _read_current(workspace: Workspace, configuration: str, key: str) -> CrossValidation | None:
    """The cross-validation that is there, where it has this key and all of its label maps are there."""
    found = read_cross_validation(workspace, configuration)
    if found is None or found.key != key:
        return None
    maps = (validation_label_map(workspace, configuration, fold, case) for case, fold in found.folds.items())
    return found if all(label_map.is_file() for label_map in maps) else None


def _review(
    workspace: Workspace, configuration: str, fold_of: dict[str, int], *, device: str, stop: Callable[[], bool]
) -> Iterator[tuple[CaseReview, ReviewCounts]]:
    """Every case as all folds see it, without mirrored copies; a part of the cases where that takes too long.

    Networks of a few minutes can need hours for many large volumes. So the review takes as long as the training did, or
    `MIN_REVIEW_S`, and folds have their turn one after the other.
    """
    import numpy as np
    import torch

    from autoseg.evaluation.review import Reviewer
    from autoseg.inference.predictor import Predictor

    folds = sorted(set(fold_of.values()))
    predictor = Predictor(
        workspace.model(configuration), device=device, folds=folds, mirroring=False, postprocess=False
    )
    known = {case.id: case for case in workspace.read_dataset().cases}
    cases = [known[case_id] for case_id in _in_turn(fold_of)]
    logs = (read_log(FoldFiles.of(workspace.model(configuration), fold).log) for fold in folds)
    limit_s = max(MIN_REVIEW_S, sum(log[-1].time_s for log in logs if log))
    began = time.monotonic()
    with track(f"all folds of {configuration} look at all cases", total=len(cases)) as advance:
        for number, case in enumerate(cases):
            if stop():
                raise TrainingInterrupted("stopped while all folds looked at the cases; the same command repeats that")
            if time.monotonic() - began > limit_s:
                logger.info(
                    "%s: all folds looked at %d of %d cases in %s; it takes no longer than their training, or %s; the "
                    "rest is left out of the labels to look at",
                    configuration,
                    number,
                    len(cases),
                    format_duration(time.monotonic() - began),
                    format_duration(MIN_REVIEW_S),
                )
                break
            stored = open_stored(workspace, predictor, case)
            prepared = prepare_stored(stored)
            axis = predictor.choose_axis(prepared)
            try:
                predictor.check_memory(predictor.needed_gib(prepared, axis=axis, separate=True))
            except ImageTooLargeError as error:
                logger.warning("%s is not looked at by all folds together: %s", case.id, error)
                continue
            label = stored.label.transpose(axis_first(axis))
            fold = fold_of[case.id]
            reviewer = Reviewer(len(folds), predictor.outputs, own=folds.index(fold))
            for rows, logits in predictor.sweep(prepared, axis=axis, separate=True):
                reference = torch.from_numpy(np.asarray(label[rows], np.int64)).to(logits.device)
                reviewer.add(logits, reference, known=stored.stored.known)
                del logits
            yield reviewer.review(case.id, fold), reviewer.counts()
            advance(1)


def _in_turn(fold_of: dict[str, int]) -> list[str]:
    """Cases, one of each fold after the other."""
    by_fold: dict[int, list[str]] = {}
    for case, fold in fold_of.items():
        by_fold.setdefault(fold, []).append(case)
    return [case for turn in itertools.zip_longest(*by_fold.values()) for case in turn if case is not None]

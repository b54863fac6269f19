"""Validating a fold: the whole volumes of the cases that it has not learned from, segmented and scored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from autoseg.core.errors import FormatError, ImageTooLargeError, TrainingError, TrainingInterrupted
from autoseg.core.runtime import n_cpus, never, track
from autoseg.core.serialize import digest as digest_of
from autoseg.core.serialize import holds_json, read_json, write_json
from autoseg.data.dataset import Case
from autoseg.data.io import read_label, write_volume
from autoseg.data.references import read_reference
from autoseg.pipeline.examine import file_identity
from autoseg.pipeline.workspace import Workspace
from autoseg.training.folds import fold_folder, trained_folds
from autoseg.training.record import FoldFiles, TrainingRecord

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from autoseg.evaluation.scores import Evaluation
    from autoseg.inference.predictor import Predictor, PreparedImage
    from autoseg.planning.plan import Plan
    from autoseg.preprocessing.store import PreprocessedCase

logger = logging.getLogger(__name__)

EVALUATION = "evaluation.json"


def validate_fold(
    workspace: Workspace,
    configuration: str,
    fold: int,
    *,
    device: str = "auto",
    stop: Callable[[], bool] = never,
) -> Evaluation:
    """Predicts the whole volumes of a fold's validation cases and scores them.

    The label maps, without post-processing, and `evaluation.json` go to `validation/` in the fold's folder. Where the
    scores of these very weights against these very labels are there already, they are read.

    Args:
        workspace: the work folder.
        configuration: its name.
        fold: which.
        device: as in `train`.
        stop: asked after every case; True raises.

    Raises:
        TrainingInterrupted: `stop` said so.
    """
    from autoseg.evaluation.evaluate import score_case, summarise_scores
    from autoseg.evaluation.scores import Evaluation, ScoreSettings, targets_of
    from autoseg.inference.model import read_model
    from autoseg.inference.predictor import Predictor

    model = read_model(workspace.model(configuration))
    folder = validation_folder(workspace, configuration, fold)
    ids = set(workspace.read_splits().folds[fold].validation)
    cases = [case for case in workspace.read_dataset().cases if case.id in ids]
    file, digest = folder / EVALUATION, model.digest([fold])
    key = validation_key(digest, cases)
    label_maps = {case.id: validation_label_map(workspace, configuration, fold, case.id) for case in cases}
    if file.exists() and all(label_map.is_file() for label_map in label_maps.values()):
        try:
            known: Evaluation = read_json(file, Evaluation)
        except FormatError as error:
            logger.info("scoring fold %d again: %s", fold, error)
        else:
            if known.key == key:
                return known
    predictor = Predictor(model, device=device, folds=[fold], postprocess=False)
    labels = predictor.plan.labels
    targets, settings = targets_of(labels), ScoreSettings(ignore=labels.ignore)
    _keep_label_maps_of(folder, key)
    scores = []
    with track(f"validating fold {fold}", total=len(cases)) as advance:
        for case in cases:
            if stop():
                raise TrainingInterrupted("stopped while validating; the same command goes on with the next case")
            label_map = label_maps[case.id]
            if label_map.is_file():
                predicted, _ = read_label(label_map)
            else:
                predicted = _segment_stored(predictor, open_stored(workspace, predictor, case), case.id)
            reference, geometry = read_reference(case, labels)
            if not label_map.is_file():
                write_volume(label_map, predicted, geometry, like=case.label_files[0])
            score = score_case(
                case.id,
                predicted,
                reference,
                targets,
                spacing_mm=geometry.spacing_mm,
                settings=settings,
                n_threads=n_cpus(),
                is_known=case.knows,
                voxel_ml=geometry.voxel_volume_ml,
            )
            scores.append(score)
            advance(1, f"mean Dice {scores[-1].mean_dice:.3f}")
    evaluation = summarise_scores(scores, settings=settings, model=digest, key=key)
    write_json(file, evaluation)
    return evaluation


def _segment_stored(predictor: Predictor, stored: PreprocessedCase, case: str) -> NDArray:
    """The label map of a case of the training data, on the grid of its scan.

    Raises:
        TrainingError: it needs more memory than there is.
    """
    try:
        return predictor.segment(prepare_stored(stored)).label
    except ImageTooLargeError as error:
        raise TrainingError(
            f"{case}: cannot be validated: {error}; a machine with more of it goes on from here with the same command"
        ) from error


def _keep_label_maps_of(folder: Path, key: str) -> None:
    """Deletes label maps of another key; those that a validation of this one has made before it was stopped stay."""
    file, content = folder / "begun.json", {"key": key}
    if not holds_json(file, content):
        for label_map in folder.glob("*.nii.gz"):
            label_map.unlink()
        write_json(file, content)


def validation_key(model: str, cases: Sequence[Case]) -> str:
    """What scores depend on: the model, the cases as they are now, and which labels are said to be annotated."""
    files = sorted((case.id, [file_identity(file) for file in case.files]) for case in cases)
    annotated = {case.id: case.annotated for case in cases if case.annotated is not None}
    return digest_of((model, files, annotated) if annotated else (model, files))


def read_scores(workspace: Workspace, configuration: str, fold: int) -> Evaluation | None:
    """What `validate_fold` has found last; None where it has not been called."""
    from autoseg.evaluation.scores import Evaluation

    file = validation_folder(workspace, configuration, fold) / EVALUATION
    if not file.is_file():
        return None
    scores: Evaluation = read_json(file, Evaluation)
    return scores


def validation_folder(workspace: Workspace, configuration: str, fold: int) -> Path:
    """Where the label maps of a fold's validation cases are."""
    return fold_folder(workspace.model(configuration), fold) / "validation"


def validation_label_map(workspace: Workspace, configuration: str, fold: int, case: str) -> Path:
    """The label map that a fold has made of one of its validation cases."""
    return validation_folder(workspace, configuration, fold) / f"{case}.nii.gz"


def open_stored(workspace: Workspace, predictor: Predictor, case: Case) -> PreprocessedCase:
    """A case of the training data on the grid of a predictor, from the store."""
    return open_preprocessed(workspace, predictor.plan, predictor.name, case.id)


def open_preprocessed(workspace: Workspace, plan: Plan, configuration: str, case: str) -> PreprocessedCase:
    """A case on the grid of a configuration; of a cascade, with what its first stage has found."""
    from autoseg.preprocessing.store import PreprocessedCase

    is_second = plan.configuration(configuration).previous is not None
    previous = workspace.first_stage(configuration, case) if is_second else None
    return PreprocessedCase(workspace.preprocessed(plan.grid(configuration), case), previous=previous)


def prepare_stored(stored: PreprocessedCase) -> PreparedImage:
    """Its image, for the predictor whose grid it is on."""
    import numpy as np
    import torch

    from autoseg.inference.predictor import PreparedImage

    image = torch.from_numpy(np.asarray(stored.image, np.float32))
    if stored.previous is not None:
        found = torch.from_numpy(np.asarray(stored.previous, np.float32))
        image = torch.cat([image, found.unsqueeze(0)])
    return PreparedImage(image=image, record=stored.record)


def why_incomplete(workspace: Workspace, configuration: str) -> str | None:
    """Why a configuration cannot be cross-validated, and what to do; None where it can.

    Folds that were trained by another plan or on other cases must not count: their validation cases may be among those
    that they have learned from.
    """
    from autoseg.pipeline.settle import how_to_begin_anew, planned_digest, read_settled

    model, splits = workspace.model(configuration), workspace.read_splits()
    if any(set(fold.training) & set(fold.validation) for fold in splits.folds):
        return (
            "the network is trained and judged on the same cases, which are of one group; add cases of other patients, "
            "or tell with --groups which cases belong together, and plan again"
        )
    finished, wanted = set(trained_folds(model)), set(range(len(splits.folds)))
    if missing := sorted(wanted - finished):
        folds = ",".join(map(str, missing))
        return f"folds {folds} are not trained to their end; run 'autoseg train -c {configuration} --fold {folds}'"
    advice = how_to_begin_anew(model)
    settled = read_settled(model)
    if settled is None:
        return f"nothing says how its folds were trained; {advice}"
    if settled.planned != planned_digest(workspace.read_plan(), configuration):
        return f"its folds were trained by another plan than that of now; {advice}"
    if finished != wanted:
        return f"it holds folds that the splits do not have; move or delete {model}, then train again"
    for fold, split in enumerate(splits.folds):
        record: TrainingRecord = read_json(FoldFiles.of(model, fold).training, TrainingRecord)
        cases = sorted(record.training_cases), sorted(record.validation_cases)
        if cases != (sorted(split.training), sorted(split.validation)):
            return f"fold {fold} was trained on other cases than the splits have now; {advice}"
    return None

"""Validating a fold: the whole volumes of the cases that it has not learned from, segmented and scored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from autoseg.core.errors import FormatError, ImageTooLargeError, TrainingError, TrainingInterrupted
from autoseg.core.runtime import n_cpus, never, track
from autoseg.core.serialize import digest as digest_of
from autoseg.core.serialize import holds_json, read_json, write_json
from autoseg.data.dataset import Case
from autoseg.data.io import read_label, write_volume
from autoseg.data.references import read_reference
from autoseg.pipeline.examine import file_identity
from autoseg.pipeline.stored import open_stored, prepare_stored
from autoseg.pipeline.workspace import Workspace
from autoseg.training.folds import fold_folder

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from autoseg.evaluation.scores import Evaluation
    from autoseg.inference.predictor import Predictor
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
    from autoseg.evaluation.scores import ScoreSettings, targets_of
    from autoseg.inference.model import read_model
    from autoseg.inference.predictor import Predictor

    model = read_model(workspace.model(configuration))
    folder = validation_folder(workspace, configuration, fold)
    ids = set(workspace.read_splits().folds[fold].validation)
    cases = [case for case in workspace.read_dataset().cases if case.id in ids]
    file, digest = folder / EVALUATION, model.digest([fold])
    key = validation_key(digest, cases)
    label_maps = {case.id: validation_label_map(workspace, configuration, fold, case.id) for case in cases}
    current = _read_current(workspace, configuration, fold, key=key, label_maps=label_maps.values())
    if current is not None:
        return current
    predictor = Predictor(model, device=device, folds=[fold], postprocess=False)
    labels = predictor.plan.labels
    targets, settings = targets_of(labels), ScoreSettings(ignore=labels.ignore)
    keep_label_maps_of({"key": key}, folder / "begun.json")
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


def _read_current(
    workspace: Workspace, configuration: str, fold: int, *, key: str, label_maps: Iterable[Path]
) -> Evaluation | None:
    """The scores that are there, where they have this key and all of these label maps are there."""
    try:
        found = read_scores(workspace, configuration, fold)
    except FormatError as error:
        logger.info("scoring fold %d again: %s", fold, error)
        return None
    if found is None or found.key != key:
        return None
    return found if all(label_map.is_file() for label_map in label_maps) else None


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


def keep_label_maps_of(made_of: Mapping[str, object], record: Path) -> None:
    """Deletes the label maps of a folder that were made of something else; what was made before a stop stays.

    Args:
        made_of: what label maps that are made from now on depend on.
        record: the file in that folder that says so of those that are there.
    """
    if not holds_json(record, made_of):
        for label_map in record.parent.glob("[!.]*.nii.gz"):
            label_map.unlink(missing_ok=True)
        write_json(record, made_of)


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

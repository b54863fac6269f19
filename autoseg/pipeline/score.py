"""Scoring a folder of label maps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.core.errors import AutosegError
from autoseg.core.labels import LabelSpec
from autoseg.core.serialize import read_json, write_json
from autoseg.pipeline.segment import PredictionRecord

if TYPE_CHECKING:
    from autoseg.evaluation.evaluate import Evaluation


def evaluate(prediction: Path | str, reference: Path | str, *, labels: LabelSpec | None = None) -> Evaluation:
    """Scores label maps against references of the same file names, and writes `evaluation.json` beside them.

    Example:
        >>> import autoseg
        >>> evaluation = autoseg.evaluate("segmentations", "dataset/labelsTs")
        >>> sorted(evaluation.label_dice)
        ['aorta', 'kidneys', 'lesion', 'liver', 'spleen']

    Args:
        prediction: a folder of label maps, or one file.
        reference: the same.
        labels: names and values; None for those in `prediction.json` of the folder, or else every value that occurs.

    Raises:
        DatasetError: nothing in common, or label maps that cannot be compared.
    """
    from autoseg.evaluation.evaluate import evaluate_folders

    folder = Path(prediction)
    record_file = folder / "prediction.json"
    if labels is None and record_file.is_file():
        record: PredictionRecord = read_json(record_file, PredictionRecord)
        labels = record.labels
    evaluation = evaluate_folders(folder, Path(reference), labels=labels)
    if folder.is_dir():
        try:
            write_json(folder / "evaluation.json", evaluation)
        except OSError as error:
            raise AutosegError(f"{folder}: the scores cannot be written ({error})") from error
    return evaluation

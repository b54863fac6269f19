"""Scoring a folder of label maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.core.errors import AutosegError
from autoseg.core.labels import LabelSpec
from autoseg.core.serialize import write_json
from autoseg.evaluation.scores import DEFAULT_SETTINGS, ScoreSettings
from autoseg.inference.record import CASE_DONE, labels_of, read_records

if TYPE_CHECKING:
    from autoseg.evaluation.scores import Evaluation


def evaluate(
    prediction: Path | str,
    reference: Path | str,
    *,
    labels: LabelSpec | None = None,
    regions: Mapping[str, Sequence[int]] | None = None,
    settings: ScoreSettings = DEFAULT_SETTINGS,
) -> Evaluation:
    """Scores label maps against references of the same file names.

    `evaluation.json` and `evaluation.csv` are written into the folder of the label maps; for a single file nothing is.
    What counts where a label is missing is said in `autoseg.evaluation.evaluate`. A label map beside which a later
    prediction has failed is an older one and is not scored.

    Example:
        >>> import autoseg
        >>> evaluation = autoseg.evaluate("segmentations", "dataset/labelsTs")
        >>> sorted(evaluation.label_dice)
        ['aorta', 'kidneys', 'lesion', 'liver', 'spleen']

    Args:
        prediction: a folder of label maps, or one file.
        reference: the same.
        labels: names and values; None for those in `prediction.json` of the folder, or else every value that occurs.
        regions: names and values of what is scored besides: all voxels with one of the values.
        settings: of the metrics. Where the labels are those in `prediction.json`, so is the value to ignore, unless one
            is given.

    Raises:
        AutosegError: regions or an ignored value that do not go together with the labels, or a folder that cannot be
            written.
        DatasetError: nothing in common, or label maps that cannot be compared.
    """
    from autoseg.evaluation.folders import evaluate_folders
    from autoseg.evaluation.tables import write_csv

    folder = Path(prediction)
    records, model = read_records(folder), None
    failed = {case for record in records for case, found in record.cases.items() if found.status != CASE_DONE}
    if records:
        models = {record.model for record in records}
        model = models.pop() if len(models) == 1 else None
        if labels is None:
            labels = labels_of(records, folder)
            if settings.ignore is None:
                settings = replace(settings, ignore=labels.ignore)
    evaluation = evaluate_folders(
        folder, Path(reference), labels=labels, regions=regions, settings=settings, model=model, outdated=failed
    )
    if folder.is_dir():
        try:
            write_json(folder / "evaluation.json", evaluation)
            write_csv(folder / "evaluation.csv", evaluation)
        except OSError as error:
            raise AutosegError(f"{folder}: the scores cannot be written ({error})") from error
    return evaluation

"""Pages that people look at: how good the models of a work folder are, and what a folder of predictions holds."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.core.errors import AutosegError, DatasetError, PredictionError
from autoseg.core.locks import locked
from autoseg.core.serialize import read_json
from autoseg.data.io import read_label, read_raw
from autoseg.data.references import read_shown_reference
from autoseg.inference.record import CASE_DONE, CaseResult, labels_of, read_records
from autoseg.pipeline.choose import selected_models
from autoseg.pipeline.crossval import read_cross_validation
from autoseg.pipeline.fold_validation import validation_label_map
from autoseg.pipeline.workspace import DEFAULT_WORK, Workspace
from autoseg.training.folds import trained_folds
from autoseg.training.record import FoldFiles, TrainingRecord, read_log

if TYPE_CHECKING:
    from autoseg.reporting.predictions_page import PredictedCase
    from autoseg.reporting.results_page import ConfigurationResults

logger = logging.getLogger(__name__)


def report(work: Path | str = DEFAULT_WORK) -> Path:
    """Writes `report/results.html`: curves, scores, cases to look at, and how the model was selected.

    Whatever is not there yet, folds or a cross-validation, is left out and named on the page.

    Example:
        >>> import autoseg
        >>> autoseg.report("work").name
        'results.html'

    Args:
        work: the work folder.

    Returns:
        The page, which needs no other file. Its pictures are beside it too, in `results/`.

    Raises:
        WorkspaceError: the work folder is not planned.
        AutosegError: nothing is trained yet.
    """
    from autoseg.reporting.figures import OverlayRow
    from autoseg.reporting.results_page import write_results_page

    workspace = Workspace(root=Path(work))
    plan, dataset = workspace.read_plan(), workspace.read_dataset()
    found = [_read_results(workspace, name) for name in plan.configurations]
    results = [result for result in found if result.curves or result.crossval is not None]
    trained = {result.name: result.choices.configuration for result in results if result.choices is not None}
    plan = dataclasses.replace(plan, configurations={**plan.configurations, **trained})
    if not results:
        raise AutosegError(
            f"{workspace.root}: no fold is trained yet, so there is nothing to report; run 'autoseg train'"
        )
    by_id = {case.id: case for case in dataset.cases}
    folds = {result.name: result.crossval.folds for result in results if result.crossval is not None}

    def overlay(configuration: str, case: str) -> OverlayRow:
        if case not in by_id:
            raise DatasetError(f"case {case} is not in {workspace.dataset_file} any more")
        image = by_id[case].image_files[0]
        raw = read_raw(image)
        reference = read_shown_reference(by_id[case], plan.labels)
        prediction, _ = read_label(validation_label_map(workspace, configuration, folds[configuration][case], case))
        for name, shape in (("the label map", reference.shape), ("what the network found", prediction.shape)):
            if shape != raw.geometry.shape:
                raise DatasetError(f"{image}: has {raw.geometry.shape} voxels, {name} {shape}")
        return OverlayRow(
            title=case,
            image=raw.load_shown(),
            spacing_mm=raw.geometry.spacing_mm,
            reference=reference,
            prediction=prediction,
        )

    chosen = selected_models(workspace)
    selection = None if chosen is None else chosen[0]
    with locked(workspace.root / ".report.lock", waiting_for="writes the report"):
        return write_results_page(workspace.results_page, plan, results, selection=selection, overlays=overlay)


def _read_results(workspace: Workspace, configuration: str) -> ConfigurationResults:
    """Everything there is of a configuration."""
    from autoseg.reporting.results_page import ConfigurationResults

    curves = {}
    for folder in sorted(workspace.model(configuration).glob("fold_*")):
        fold = folder.name.removeprefix("fold_")
        epochs = read_log(FoldFiles(folder=folder).log)
        if fold.isdecimal() and epochs:
            curves[int(fold)] = epochs
    crossval, model = read_cross_validation(workspace, configuration), workspace.model(configuration)
    if crossval is not None and not (trained_folds(model) and crossval.model == _digest(model)):
        text = "%s: its cross-validation is of other weights, and is left out; run 'autoseg select'"
        logger.warning(text, model)
        crossval = None
    # One after the other: the first that says how it was trained speaks for all.
    records = (read_json(FoldFiles.of(model, fold).training, TrainingRecord) for fold in curves)
    choices = next((record.choices for record in records if record.choices is not None), None)
    return ConfigurationResults(name=configuration, curves=curves, crossval=crossval, choices=choices)


def _digest(model: Path) -> str | None:
    """Of a model; None where the first stage of a cascade is not there."""
    from autoseg.inference.model import read_model

    try:
        return read_model(model).digest()
    except PredictionError as error:
        logger.warning("%s", error)
        return None


def report_predictions(folder: Path | str) -> Path:
    """Writes `autoseg_report.html` into a folder of label maps: pictures, volumes, and cases that stand out.

    Args:
        folder: that `predict` has written.

    Returns:
        The page.

    Raises:
        AutosegError: it is no such folder.
    """
    from autoseg.reporting.figures import OverlayRow
    from autoseg.reporting.predictions_page import write_predictions_page

    folder = Path(folder)
    records = read_records(folder)
    if not records:
        raise AutosegError(f"{folder}: found no prediction.json, expected a folder that 'autoseg predict' has written")
    labels, newest = labels_of(records, folder), records[-1]
    cases = {case: result for record in records for case, result in record.cases.items()}

    def overlay(case: str) -> OverlayRow:
        files = [Path(file) for file in cases[case].files]
        prediction, geometry = read_label(folder / (cases[case].label_map or f"{case}.nii.gz"))
        missing = [str(file) for file in files if not file.exists()]
        if missing or not files:
            raise DatasetError(f"the image is not there any more: {', '.join(missing) or 'no file is recorded'}")
        raw = read_raw(files[0])
        if raw.geometry.shape != geometry.shape:
            raise DatasetError(f"{files[0]}: has {raw.geometry.shape} voxels, its label map {geometry.shape}")
        return OverlayRow(title=case, image=raw.load_shown(), spacing_mm=geometry.spacing_mm, prediction=prediction)

    facts = [
        ("dataset of the model", newest.dataset),
        ("configuration", newest.configuration),
        ("folds", ", ".join(map(str, newest.folds))),
        ("mirrored copies", "yes" if newest.mirrored else "no"),
        ("post-processing", "; ".join(map(str, newest.postprocessing)) or "none"),
        ("device", newest.device),
        ("images", str(len(cases))),
        ("started", newest.started[:16].replace("T", " ") + " UTC"),
    ]
    return write_predictions_page(
        folder / "autoseg_report.html",
        f"Predictions in {folder.resolve().name}",
        facts,
        [_describe(case, result) for case, result in sorted(cases.items())],
        overlay,
        values=labels.values,
        names=labels.names,
        structures=labels.structures,
    )


def _describe(case: str, result: CaseResult) -> PredictedCase:
    from autoseg.reporting.predictions_page import PredictedCase

    return PredictedCase(
        case=case,
        volumes_ml=result.volumes_ml,
        warnings=result.warnings,
        error=result.error if result.status != CASE_DONE else None,
        estimated_dice=result.estimated_dice,
        is_flagged=result.is_doubtful,
        seconds=result.seconds,
    )

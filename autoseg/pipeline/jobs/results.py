"""What there is of the results of a job, to see whether it gets anywhere."""

from __future__ import annotations

from pathlib import Path

from autoseg.core.serialize import read_json
from autoseg.inference.record import CASE_DONE, PredictionRecord, record_file
from autoseg.pipeline.fold_validation import validation_folder
from autoseg.pipeline.jobs.batch import Batch, Job
from autoseg.pipeline.workspace import Workspace
from autoseg.training.record import FoldFiles


def count_results(batch: Batch, job: Job) -> str:
    """What there is of a job's results, to see whether it gets anywhere."""
    workspace = Workspace(root=batch.work)
    if job.task == "train":
        assert job.fold is not None
        configuration = job.configurations[0]
        checkpoint = FoldFiles.of(workspace.model(configuration), job.fold).checkpoint
        saved_at = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        return f"{saved_at}, {_count(validation_folder(workspace, configuration, job.fold))}"
    # Only images that are done count: a label map that replaces an older one is no progress.
    if job.task == "predict" and batch.prediction is not None:
        record = record_file(batch.prediction.output, job.part)
        known = read_json(record, PredictionRecord).cases.values() if record.exists() else ()
        return str(sum(case.status == CASE_DONE for case in known))
    if job.task == "preprocess":
        folders = [workspace.preprocessed(grid, "") for grid in job.configurations]
        cases = [case for folder in folders if folder.is_dir() for case in folder.iterdir() if case.name[0] != "."]
        made_at = [case.stat().st_mtime_ns for case in cases]
        return f"{len(made_at)}, {max(made_at, default=0)}"
    return str(sum(1 for _ in (workspace.root / "models").rglob("*")))


def _count(folder: Path) -> int:
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0

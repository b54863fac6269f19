"""The stages as functions with explicit paths, each usable from Python, and the work folder they share."""

from autoseg.pipeline.cascade import force_cascade
from autoseg.pipeline.choose import select
from autoseg.pipeline.crossval import cross_validate
from autoseg.pipeline.demo import run_demo
from autoseg.pipeline.examine import check
from autoseg.pipeline.explain import measure, require_gpu
from autoseg.pipeline.fit import train
from autoseg.pipeline.fold_validation import read_scores, validate_fold
from autoseg.pipeline.pages import report, report_predictions
from autoseg.pipeline.prepare import plan, plan_from_fingerprint
from autoseg.pipeline.preprocess import preprocess_cases
from autoseg.pipeline.quick import configuration_for_time
from autoseg.pipeline.score import evaluate
from autoseg.pipeline.segment import predict
from autoseg.pipeline.share import export
from autoseg.pipeline.workspace import DEFAULT_WORK, Workspace

__all__ = [
    "DEFAULT_WORK",
    "Workspace",
    "check",
    "configuration_for_time",
    "cross_validate",
    "evaluate",
    "export",
    "force_cascade",
    "measure",
    "plan",
    "plan_from_fingerprint",
    "predict",
    "preprocess_cases",
    "read_scores",
    "report",
    "report_predictions",
    "require_gpu",
    "run_demo",
    "select",
    "train",
    "validate_fold",
]

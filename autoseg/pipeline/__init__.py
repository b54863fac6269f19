"""The stages as functions with explicit paths, each usable from Python, and the work folder they share."""

from autoseg.pipeline.demo import run_demo
from autoseg.pipeline.explain import measure, require_gpu
from autoseg.pipeline.fit import train, validate_fold
from autoseg.pipeline.prepare import plan, plan_from_fingerprint, preprocess_cases
from autoseg.pipeline.score import evaluate
from autoseg.pipeline.segment import predict
from autoseg.pipeline.share import export
from autoseg.pipeline.workspace import DEFAULT_WORK, Workspace

__all__ = [
    "DEFAULT_WORK",
    "Workspace",
    "evaluate",
    "export",
    "measure",
    "plan",
    "plan_from_fingerprint",
    "predict",
    "preprocess_cases",
    "require_gpu",
    "run_demo",
    "train",
    "validate_fold",
]

"""The stages as functions with explicit paths, each usable from Python, and the work folder they share."""

from autoseg.pipeline.demo import run_demo
from autoseg.pipeline.fit import train, validate_fold
from autoseg.pipeline.prepare import plan, preprocess_cases
from autoseg.pipeline.score import evaluate
from autoseg.pipeline.segment import find_images, predict
from autoseg.pipeline.workspace import DEFAULT_WORK, Workspace

__all__ = [
    "DEFAULT_WORK",
    "Workspace",
    "evaluate",
    "find_images",
    "plan",
    "predict",
    "preprocess_cases",
    "run_demo",
    "train",
    "validate_fold",
]

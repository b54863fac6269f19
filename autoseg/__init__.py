"""autoseg: the best segmentation network for a folder of medical scans, without configuring anything.

The whole interface: `check`, `plan` (with `Choices` and `SplitChoices`), `train`, `select`, `predict`, `evaluate`,
`report`, `export` and `Predictor`. Names are loaded when they are first used, so that importing the package is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoseg.data.splits import SplitChoices as SplitChoices
    from autoseg.inference.predictor import Predictor as Predictor
    from autoseg.pipeline import check as check
    from autoseg.pipeline import evaluate as evaluate
    from autoseg.pipeline import export as export
    from autoseg.pipeline import plan as plan
    from autoseg.pipeline import predict as predict
    from autoseg.pipeline import report as report
    from autoseg.pipeline import select as select
    from autoseg.pipeline import train as train
    from autoseg.planning.choices import Choices as Choices

__version__ = "0.1.0"
__all__ = [
    "Choices",
    "Predictor",
    "SplitChoices",
    "__version__",
    "check",
    "evaluate",
    "export",
    "plan",
    "predict",
    "report",
    "select",
    "train",
]

_HOMES = {
    "Choices": "autoseg.planning.choices",
    "Predictor": "autoseg.inference.predictor",
    "SplitChoices": "autoseg.data.splits",
    "check": "autoseg.pipeline",
    "evaluate": "autoseg.pipeline",
    "export": "autoseg.pipeline",
    "plan": "autoseg.pipeline",
    "predict": "autoseg.pipeline",
    "report": "autoseg.pipeline",
    "select": "autoseg.pipeline",
    "train": "autoseg.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'autoseg' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)

"""The folds of a model, by the files that are in its folder."""

from __future__ import annotations

from pathlib import Path

PLAN = "plan.json"
"""In the folder of a model: the plan as its folds are trained."""

WEIGHTS, CHECKPOINT, TRAINING = "weights.safetensors", "checkpoint.safetensors", "training.json"
"""In the folder of a fold: final weights, the state to resume from, and how it was trained."""

BEGUN_MARK = ".begun"
"""In the folder of a fold for which the training is settled, but that has nothing of the above yet."""


def fold_folder(model: Path, fold: int) -> Path:
    """Where a fold of a model is kept."""
    return model / f"fold_{fold}"


def trained_folds(model: Path) -> tuple[int, ...]:
    """Folds in the folder of a model that have final weights, in order."""
    return folds_with(model, WEIGHTS)


def unfinished_folds(model: Path) -> tuple[int, ...]:
    """Folds in the folder of a model that have a checkpoint but no final weights yet, in order."""
    finished = trained_folds(model)
    return tuple(fold for fold in folds_with(model, CHECKPOINT) if fold not in finished)


def usable_folds(model: Path) -> tuple[int, ...]:
    """Folds in the folder of a model that can be predicted with, finished or not, in order."""
    return tuple(sorted({*trained_folds(model), *unfinished_folds(model)}))


def folds_with(model: Path, name: str) -> tuple[int, ...]:
    """Folds in the folder of a model that have a file of this name, in order."""
    folds = (path.parent.name.removeprefix("fold_") for path in model.glob(f"fold_*/{name}"))
    return tuple(sorted(int(fold) for fold in folds if fold.isdecimal()))

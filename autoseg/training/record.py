"""What a training run writes down, for people and for the stages that follow it."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.core.errors import FormatError
from autoseg.core.serialize import atomic_path, from_plain, to_plain
from autoseg.planning.plan import ConfigurationPlan, Reason
from autoseg.training.config import Budget
from autoseg.training.folds import BEGUN_MARK, CHECKPOINT, TRAINING, WEIGHTS, fold_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


SMOOTHING = 0.9
RECORDED_PACKAGES = (
    "numpy",
    "scipy",
    "monai",
    "batchgenerators",
    "nibabel",
    "SimpleITK",
    "tifffile",
    "pillow",
    "medpy",
    "safetensors",
)
"""What the weights of a network, the images they learn from, and their scores pass through."""


@dataclass(frozen=True, kw_only=True)
class FoldFiles:
    """The files of one fold in its folder."""

    folder: Path

    @classmethod
    def of(cls, model: Path, fold: int) -> FoldFiles:
        """Those of a fold of a model."""
        return cls(folder=fold_folder(model, fold))

    @property
    def weights(self) -> Path:
        """Final weights."""
        return self.folder / WEIGHTS

    @property
    def checkpoint(self) -> Path:
        """State to resume from."""
        return self.folder / CHECKPOINT

    @property
    def log(self) -> Path:
        """One line per epoch."""
        return self.folder / "log.jsonl"

    @property
    def training(self) -> Path:
        """How it was trained; there from the beginning."""
        return self.folder / TRAINING

    @property
    def begun(self) -> Path:
        """There from when the training is settled until `training` is."""
        return self.folder / BEGUN_MARK

    @property
    def lock(self) -> Path:
        """Held by whoever trains it."""
        return self.folder / ".training.lock"

    def discard(self) -> None:
        """Deletes what a training has left."""
        for file in (self.checkpoint, self.weights, self.log, self.training):
            file.unlink(missing_ok=True)

    def forget(self) -> None:
        """Deletes the mark of a training that is about to begin too; for folds that are trained anew."""
        self.discard()
        self.begun.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class TrainingChoices:
    """How all folds of a configuration are trained.

    Attributes:
        recipe: a name in `RECIPES`.
        configuration: as planned, but for the patch size and the features of the network.
        planned_patch_size: tells how patches are augmented: smaller ones are rounded, which changes their shape.
        budget: of a fold.
        batch_size: patches per step.
        foreground_fraction: part of each batch that is centred on a foreground voxel.
        sampling: how such a patch is found, a name in `autoseg.training.patches.SAMPLING`.
        mirror: whether patches are mirrored.
        reasons: for each of them; the subjects begin with "training.".
    """

    recipe: str
    configuration: ConfigurationPlan
    planned_patch_size: tuple[int, ...]
    budget: Budget
    batch_size: int
    foreground_fraction: float
    sampling: str
    mirror: bool
    reasons: tuple[Reason, ...]


@dataclass(frozen=True, kw_only=True)
class FoldRecord:
    """How a fold was trained, as far as it concerns whoever gets the model: nothing of the cases.

    Attributes:
        autoseg: version.
        torch: version.
        device: that it was trained on last.
        precision: of the network's arithmetic, such as "bfloat16".
        recipe: name.
        seed: of weights, patches and augmentation.
        batch_size: patches per step.
        mirrored: whether patches were mirrored; if so, prediction averages over mirrored copies.
        environment: versions of Python, of the system and of packages, see `describe_environment`.
    """

    autoseg: str
    torch: str
    device: str
    precision: str
    recipe: str
    seed: int
    batch_size: int
    mirrored: bool
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainingRecord(FoldRecord):
    """How a fold was trained, for `training.json`.

    Attributes:
        training_cases, validation_cases: their ids.
        choices: that it was trained with last.
        n_processes: that trained it last, together.
    """

    training_cases: tuple[str, ...]
    validation_cases: tuple[str, ...]
    choices: TrainingChoices | None = None
    n_processes: int = 1


@dataclass(frozen=True, kw_only=True)
class EpochFigures:
    """One line of `log.jsonl`.

    Attributes:
        epoch: counted from 1.
        iteration: steps done at its end.
        time_s: training time at its end, over all resumed parts.
        train_loss: mean over the epoch's steps, deep supervision included.
        validation_loss: on patches of the validation cases, at full resolution.
        validation_dice: mean over the foreground classes that occur in those patches.
        smoothed_dice: running mean of it, see `smooth`.
        class_dice: per foreground class; null where the patches have none of it.
        learning_rate: of the last step.
        step_s: mean time of a step.
        data_wait_fraction: part of the time that was spent waiting for patches.
    """

    epoch: int
    iteration: int
    time_s: float
    train_loss: float
    validation_loss: float
    validation_dice: float
    smoothed_dice: float
    class_dice: tuple[float, ...]
    learning_rate: float
    step_s: float
    data_wait_fraction: float


def smooth(mean: float, value: float) -> float:
    """A running mean after one more value. It begins with the first that is a number; what is none is passed over."""
    if not math.isfinite(value) or not math.isfinite(mean):
        return value if math.isfinite(value) else mean
    return SMOOTHING * mean + (1 - SMOOTHING) * value


@dataclass(frozen=True, kw_only=True, eq=False)
class ValidationSlice:
    """One slice of a validation patch and what the network makes of it, to look at while it learns.

    Attributes:
        case: it is from.
        image: (Y, X) float32, the first channel, normalized.
        reference: (Y, X) classes, 0 is background.
        predicted: (Y, X) classes.
    """

    case: str
    image: NDArray[np.float32]
    reference: NDArray[np.integer]
    predicted: NDArray[np.integer]


def describe_environment() -> dict[str, str]:
    """What is needed to make the environment of this process again: Python, the system, and versions of packages."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # It runs from its sources, or without this one.
    return found


def read_log(path: Path) -> list[EpochFigures]:
    """The epochs of a log; none where there is no log yet.

    Raises:
        FormatError: the file is damaged.
    """
    if not path.exists():
        return []
    try:
        return [from_plain(EpochFigures, json.loads(line)) for line in path.read_text().splitlines()]
    except (ValueError, FormatError) as error:
        raise FormatError(f"{path}: is not a log of epochs ({error}); delete it, or the whole fold") from error


def write_log(path: Path, epochs: Sequence[EpochFigures]) -> None:
    """Writes the whole log atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(to_plain(figures)) + "\n" for figures in epochs))

"""Trackers follow a training while it runs: they get the figures of its epochs and slices to look at."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from matplotlib.colors import to_rgb
from numpy.typing import NDArray

from autoseg.core.errors import TrainingError
from autoseg.reporting.figures import PREDICTION_COLOUR, REFERENCE_COLOUR, choose_window
from autoseg.reporting.slice_pictures import find_outline
from autoseg.training.record import EpochFigures, ValidationSlice

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# TensorBoard makes the part before the slash the heading of a group.
SLICES = "slices (reference green, prediction red)"
MAX_SLICES = 4
EVERY_EPOCH_UNTIL = 100
EPOCHS_BETWEEN_SLICES = 10

MAX_SLICE_EDGE = 256
PANEL_EDGE_PIXELS = 384
GAP_PIXELS = 4
REFERENCE_WIDTH_PIXELS, PREDICTION_WIDTH_PIXELS = 4, 2
N_GREYS = 64
"""As many as can be told apart on a screen; pictures are about a quarter smaller than with 256."""


class Tracker(Protocol):
    """What follows a training."""

    def log(self, epochs: Sequence[EpochFigures], slices: Sequence[ValidationSlice]) -> None:
        """Called after each epoch.

        Args:
            epochs: all so far, in order; those before a resumption too.
            slices: of the last one; none where there is nothing to look at.
        """

    def close(self) -> None:
        """Called once at the end, also of a training that was stopped."""


class TensorBoardTracker:
    """Writes event files into `tensorboard/` of a fold's folder, for `tensorboard --logdir autoseg-work/models`.

    The curves are complete however often a training is resumed, also where an earlier part was not tracked: what the
    event files lack is written from the epochs so far, and what was lost or is of another training is no longer shown.

    The figures of an epoch take about 1 KiB, four slices of 128 x 128 about 100 KiB, larger ones at most 450 KiB. After
    a hundred epochs only every tenth has its slices, so that a thousand epochs with slices of 128 x 128 take about
    20 MiB. TensorBoard shows ten of them unless it is told otherwise (`--samples_per_plugin images=200`).

    Args:
        folder: of the fold.
        labels: names of the foreground classes.

    Raises:
        TrainingError: the package tensorboard is missing.
    """

    def __init__(self, folder: Path, labels: Sequence[str]) -> None:
        try:
            import tensorboard  # noqa: F401
            from torch.utils.tensorboard import SummaryWriter  # noqa: F401
        except ImportError as error:
            raise TrainingError(
                f"tracking with TensorBoard needs the package tensorboard ({error}); install it: "
                "pip install tensorboard"
            ) from error
        self.folder = folder / "tensorboard"
        self.labels = tuple(labels)
        self._writer: SummaryWriter | None = None
        self._n_written = 0

    def log(self, epochs: Sequence[EpochFigures], slices: Sequence[ValidationSlice]) -> None:
        """Writes the epochs that are not written yet, and the slices of the last; see `Tracker.log`."""
        if not epochs:
            return
        if self._writer is None:
            self._writer = self._open(epochs)
        for figures in epochs[self._n_written :]:
            for tag, value in self._scalars(figures).items():
                self._writer.add_scalar(tag, value, figures.iteration)
        self._n_written = len(epochs)
        last = epochs[-1]
        if last.epoch <= EVERY_EPOCH_UNTIL or last.epoch % EPOCHS_BETWEEN_SLICES == 0:
            for i, shown in enumerate(slices[:MAX_SLICES], start=1):
                picture = draw_validation_slice(shown)
                self._writer.add_image(f"{SLICES}/{i} {shown.case}", picture, last.iteration, dataformats="HWC")
        # So that nothing is missing when the process is killed after the checkpoint of this epoch.
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        if self._writer is not None:
            self._writer.close()

    def _scalars(self, figures: EpochFigures) -> dict[str, float]:
        """What is shown of an epoch, by tag."""
        dice = {f"label dice/{name}": value for name, value in zip(self.labels, figures.class_dice, strict=True)}
        scalars = {
            "loss/training": figures.train_loss,
            "loss/validation": figures.validation_loss,
            "dice/mean": figures.validation_dice,
            "dice/mean, smoothed": figures.smoothed_dice,
            **dice,
            "speed/learning_rate": figures.learning_rate,
            "speed/step_s": figures.step_s,
            "speed/data_wait_fraction": figures.data_wait_fraction,
        }
        return {tag: value for tag, value in scalars.items() if math.isfinite(value)}

    def _open(self, epochs: Sequence[EpochFigures]) -> SummaryWriter:
        """A writer that goes on after the epochs that are in the event files already.

        Readers of event files differ. The one in Python hides what earlier files have from `purge_step` on, but only
        where the first file began with such a mark too, so every file does. The one that `tensorboard` starts by
        default ignores the mark: it hides, tag by tag, what has the step of a later event or a higher one. Where a lost
        epoch ended before the one that takes its place, that is not enough, and the files are written anew.
        """
        from torch.utils.tensorboard import SummaryWriter

        files = sorted(self.folder.glob("events.out.tfevents.*"))
        shown = self._read_scalars() if files else {}
        # The last epoch has just ended: what is there of it comes from an attempt that was lost.
        n_kept = 0
        while n_kept < len(epochs) - 1 and self._is_shown(epochs[n_kept], shown):
            n_kept += 1
        purge_step = epochs[n_kept - 1].iteration + 1 if n_kept else 0
        steps = {step for values in shown.values() for step in values}
        if not n_kept or any(purge_step <= step < epochs[n_kept].iteration for step in steps):
            n_kept, purge_step = 0, 0
            for file in files:
                file.unlink()
        elif files:
            _wait_for_later_name(files[-1])
        self._n_written = n_kept
        return SummaryWriter(str(self.folder), purge_step=purge_step)

    def _read_scalars(self) -> dict[str, dict[int, float]]:
        """The values that the event files show, by tag and step."""
        from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

        reader = EventAccumulator(str(self.folder), size_guidance={SCALARS: 0})
        reader.Reload()
        return {tag: {event.step: event.value for event in reader.Scalars(tag)} for tag in reader.Tags()[SCALARS]}

    def _is_shown(self, figures: EpochFigures, shown: Mapping[str, Mapping[int, float]]) -> bool:
        """Whether an epoch is among these values, each of which is as precise as float32."""
        return all(
            shown.get(tag, {}).get(figures.iteration) == np.float32(value)
            for tag, value in self._scalars(figures).items()
        )


def _wait_for_later_name(file: Path) -> None:
    """Event files are read in the order of their names, which begin with the second in which they were made."""
    made_at_s = int(file.name.split(".")[3])
    time.sleep(min(1.0, max(0.0, made_at_s + 1 - time.time())))


def draw_validation_slice(shown: ValidationSlice) -> NDArray[np.uint8]:
    """A slice twice: on the left as it is, on the right with the borders of the reference, green, and prediction, red.

    Where the slice is axial it is seen as radiologists see it: anterior up, the patient's right on the left. Pixels
    are enlarged as they are, without blur; of a very large slice every n-th is shown.

    Args:
        shown: the slice.

    Returns:
        (height, width, 3); the larger side of each panel has about 300 to 500 pixels.
    """
    coarser = -(-max(shown.image.shape) // MAX_SLICE_EDGE)
    # The network's grid runs to superior, anterior and right; pictures run down and to the right.
    image, reference, predicted = (
        array[::coarser, ::coarser][::-1, ::-1] for array in (shown.image, shown.reference, shown.predicted)
    )
    # By the reference alone: a prediction that changes from epoch to epoch would make the brightness flicker.
    low, high = choose_window(image[np.newaxis], [reference[np.newaxis]])
    brightness = np.nan_to_num((image - low) / (high - low)).clip(0, 1)
    grey = (np.rint(brightness * (N_GREYS - 1)) * (255 / (N_GREYS - 1))).astype(np.uint8)
    scale = max(1, round(PANEL_EDGE_PIXELS / max(image.shape)))
    plain = np.repeat(_enlarge(grey, scale)[..., np.newaxis], 3, axis=2)
    marked = plain.copy()
    for label, colour, width in (
        (reference, REFERENCE_COLOUR, REFERENCE_WIDTH_PIXELS),
        (predicted, PREDICTION_COLOUR, PREDICTION_WIDTH_PIXELS),
    ):
        marked[find_outline(_enlarge(label, scale), width)] = np.rint(np.multiply(to_rgb(colour), 255))
    gap = np.full((plain.shape[0], GAP_PIXELS, 3), 255, np.uint8)
    return np.concatenate([plain, gap, marked], axis=1)


def _enlarge(array: NDArray, scale: int) -> NDArray:
    """(Y, X) to (Y * scale, X * scale)."""
    return array.repeat(scale, axis=0).repeat(scale, axis=1)


TRACKERS: dict[str, Callable[[Path, Sequence[str]], Tracker]] = {"tensorboard": TensorBoardTracker}
"""By the name that a user gives; each is made from the fold's folder and the names of the foreground classes."""


def make_tracker(name: str, folder: Path, labels: Sequence[str]) -> Tracker:
    """The tracker of a name.

    Args:
        name: in `TRACKERS`, or `package.module:name` of something that is called as those are.
        folder: of the fold.
        labels: names of the foreground classes.

    Raises:
        TrainingError: there is no such tracker, or it lacks a package.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        if name not in TRACKERS:
            raise TrainingError(
                f"tracker '{name}' is unknown; known are {', '.join(TRACKERS)}, and your own as package.module:name"
            )
        return TRACKERS[name](folder, labels)
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError) as error:
        raise TrainingError(
            f"tracker '{name}' cannot be loaded ({error}); is its package installed where autoseg is?"
        ) from error
    tracker: Tracker = make(folder, labels)
    return tracker

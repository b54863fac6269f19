"""Training one fold: batches in, weights out, interruptible at every step."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoseg.core.errors import TrainingError
from autoseg.core.runtime import autocast_dtype, derive_seed, format_duration, n_cpus, track
from autoseg.core.serialize import atomic_path, digest, from_plain, to_plain
from autoseg.networks.build import build_network, channels_last
from autoseg.planning.plan import ConfigurationPlan, Plan
from autoseg.preprocessing.store import PreprocessedCase
from autoseg.training.augment import AugmentConfig, apply_parameters
from autoseg.training.checkpoint import (
    RunState,
    load_checkpoint,
    load_weights,
    read_state,
    save_checkpoint,
    save_weights,
)
from autoseg.training.config import RECIPES, Recipe, TrainConfig
from autoseg.training.losses import deep_supervision_loss, dice_ce_loss
from autoseg.training.patches import Batch, PatchSampler, read_ahead

logger = logging.getLogger(__name__)

CHECKPOINT_INTERVAL_S = 60.0
MAX_BAD_STEPS = 20
# One validation batch per so many training steps keeps validation to a few percent of the time.
STEPS_PER_VALIDATION_BATCH = 20
SMOOTHING = 0.9

Stop = Callable[[], bool]


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
        smoothed_dice: moving average of it.
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


class TrainingInterrupted(TrainingError):
    """Training was asked to stop; its state is saved and the same command goes on from there."""


@dataclass(frozen=True, kw_only=True)
class FoldFiles:
    """The files of one fold in its folder."""

    folder: Path

    @property
    def weights(self) -> Path:
        """Final weights."""
        return self.folder / "weights.safetensors"

    @property
    def checkpoint(self) -> Path:
        """State to resume from."""
        return self.folder / "checkpoint.safetensors"

    @property
    def log(self) -> Path:
        """One line per epoch."""
        return self.folder / "log.jsonl"


def train_fold(
    folder: Path,
    plan: Plan,
    configuration: ConfigurationPlan,
    *,
    training: Sequence[PreprocessedCase],
    validation: Sequence[PreprocessedCase],
    config: TrainConfig,
    device: torch.device,
    resume: bool = True,
    stop: Stop = lambda: False,
    on_epoch: Callable[[Sequence[EpochFigures]], None] = lambda figures: None,
) -> nn.Module:
    """Trains the network of a configuration on one fold, or goes on where an earlier call was stopped.

    Args:
        folder: of the fold; gets `weights.safetensors`, `checkpoint.safetensors` and `log.jsonl`.
        plan: the plan.
        configuration: of the plan.
        training: preprocessed cases to learn from.
        validation: preprocessed cases to follow the progress on.
        config: budget, recipe, seed.
        device: to train on.
        resume: go on from the checkpoint where there is one; otherwise start anew.
        stop: asked after every step; True saves and raises `TrainingInterrupted`.
        on_epoch: called with all epochs so far after each.

    Returns:
        The trained network, in evaluation mode, on `device`.

    Raises:
        TrainingError: the checkpoint is of another run, or the loss is not finite again and again.
        TrainingInterrupted: `stop` said so.
    """
    run = _Run(folder, plan, configuration, training=training, validation=validation, config=config, device=device)
    if resume:
        run.resume()
    else:
        run.discard()
    if not run.finished:
        run.train(stop, on_epoch)
    return run.network.eval()


class _Run:
    """A training run in memory: the network, its optimizer, and how far it has come."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        configuration: ConfigurationPlan,
        *,
        training: Sequence[PreprocessedCase],
        validation: Sequence[PreprocessedCase],
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        self.files = FoldFiles(folder=folder)
        self.plan, self.configuration, self.config, self.device = plan, configuration, config, device
        self.recipe = RECIPES[config.recipe]
        self.batch_size = _choose_batch_size(configuration, self.recipe, config, device)
        seed = derive_seed("training", config.seed, configuration.name, *(case.id for case in training))
        self.seed = seed
        torch.manual_seed(derive_seed("weights", seed))
        n_channels = len(plan.channels)
        network = build_network(configuration.network, n_channels=n_channels, n_classes=plan.labels.n_classes)
        self.memory_format = channels_last(configuration.n_axes)
        self.network = network.to(device)
        self.optimizer = _make_optimizer(self.network, self.recipe, device)
        self.precision = autocast_dtype(device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision is torch.float16)
        augmentation = AugmentConfig.for_patch(configuration.patch_size) if config.augment else None
        self.training = self._sampler(training, name="training", augmentation=augmentation)
        self.validation = self._sampler(validation, name="validation", augmentation=None)
        # The budget may grow when a run is resumed; whatever else shapes the result may not change.
        fixed = (to_plain(configuration), config.recipe, config.seed, self.batch_size, config.augment)
        self.config_digest = digest((*fixed, config.foreground_fraction, seed))
        self.iteration, self.elapsed_s, self.epoch_time_s = 0, 0.0, 0.0
        self.epoch_losses: list[float] = []
        self.epochs: list[EpochFigures] = []
        self.n_bad_steps = 0
        self.wait_s = 0.0
        self.finished = False

    def _sampler(
        self, cases: Sequence[PreprocessedCase], *, name: str, augmentation: AugmentConfig | None
    ) -> PatchSampler:
        return PatchSampler(
            cases,
            patch_size=self.configuration.patch_size,
            batch_size=self.batch_size,
            foreground_fraction=self.config.foreground_fraction,
            seed=f"{name}/{self.seed}",
            augmentation=augmentation,
        )

    # -- state ---------------------------------------------------------------------------------------------------------

    def discard(self) -> None:
        """Forgets an earlier run in this folder."""
        for file in (self.files.checkpoint, self.files.weights, self.files.log):
            file.unlink(missing_ok=True)

    def resume(self) -> None:
        """Goes on from the checkpoint, if there is one."""
        if not self.files.checkpoint.exists():
            self.discard()
            return
        state = read_state(self.files.checkpoint)
        if state.config != self.config_digest:
            raise TrainingError(
                f"{self.files.folder}: holds a training with another plan, cases, recipe, batch size or seed; "
                "give the same options again, or --no-resume to start anew"
            )
        load_checkpoint(self.files.checkpoint, self.network, self.optimizer)
        self.iteration, self.elapsed_s, self.epoch_time_s = state.iteration, state.elapsed_s, state.epoch_time_s
        self.epoch_losses = list(state.epoch_losses)
        if state.loss_scale is not None and self.scaler.is_enabled():
            self.scaler.update(state.loss_scale)
        self.epochs = _read_log(self.files.log)[: state.epoch]
        done = self.config.budget.fraction_done(self.iteration, self.elapsed_s)
        self.finished = done >= 1 and self.files.weights.exists()
        if self.finished:
            load_weights(self.files.weights, self.network)
        logger.info(
            "%s: %s at step %d after %s",
            self.files.folder.name,
            "already trained" if self.finished else "resuming",
            self.iteration,
            format_duration(self.elapsed_s),
        )

    def save(self) -> None:
        """Writes the checkpoint and the log."""
        state = RunState(
            config=self.config_digest,
            iteration=self.iteration,
            epoch=len(self.epochs),
            elapsed_s=self.elapsed_s,
            epoch_losses=tuple(self.epoch_losses),
            epoch_time_s=self.epoch_time_s,
            loss_scale=self.scaler.get_scale() if self.scaler.is_enabled() else None,
            finished=self.finished,
        )
        with atomic_path(self.files.log) as temporary:
            temporary.write_text("".join(json.dumps(to_plain(figures)) + "\n" for figures in self.epochs))
        save_checkpoint(self.files.checkpoint, self.network, self.optimizer, state)

    # -- training ------------------------------------------------------------------------------------------------------

    @property
    def fraction_done(self) -> float:
        return self.config.budget.fraction_done(self.iteration, self.elapsed_s)

    def train(self, stop: Stop, on_epoch: Callable[[Sequence[EpochFigures]], None]) -> None:
        """Steps until the budget is used up."""
        self._announce()
        saved_at = time.monotonic()
        batches = read_ahead(self.training.batch, count(self.iteration), n_threads=max(1, n_cpus() // 2), depth=4)
        with track(f"training {self.files.folder.name}", total=1000) as advance, _closing(batches):
            shown = 0
            while self.fraction_done < 1:
                self._timed_step(batches)
                if (
                    self.config.budget.epoch_is_over(len(self.epoch_losses), self.epoch_time_s)
                    or self.fraction_done >= 1
                ):
                    self._end_epoch()
                    on_epoch(self.epochs)
                    if time.monotonic() - saved_at > CHECKPOINT_INTERVAL_S:
                        self.save()
                        saved_at = time.monotonic()
                now_shown = int(1000 * self.fraction_done)
                advance(now_shown - shown, self._status())
                shown = now_shown
                if stop() and self.fraction_done < 1:
                    self.save()
                    raise TrainingInterrupted(
                        f"stopped at step {self.iteration}; the same command goes on from there ({self.files.folder})"
                    )
        save_weights(self.files.weights, self.network)
        self.finished = True
        self.save()

    def _announce(self) -> None:
        n_weights = sum(parameter.numel() for parameter in self.network.parameters())
        logger.info(
            "%s: %s, patch %s, batch %d, %.1f million weights, %s on %s, recipe %s",
            self.files.folder.name,
            self.configuration.name,
            "x".join(map(str, self.configuration.patch_size)),
            self.batch_size,
            n_weights / 1e6,
            str(self.precision or torch.float32).removeprefix("torch."),
            self.device,
            self.config.recipe,
        )

    def _timed_step(self, batches: Iterator[Batch]) -> None:
        started = time.monotonic()
        batch = next(batches)
        self.wait_s += time.monotonic() - started
        self._step(batch)
        self.iteration += 1
        spent = time.monotonic() - started
        self.elapsed_s += spent
        self.epoch_time_s += spent

    def _step(self, batch: Batch) -> None:
        rate = self.recipe.rate(self.fraction_done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        images, classes = self._to_device(batch)
        if batch.augmentation is not None:
            patch_size = self.configuration.patch_size
            images, classes = apply_parameters(images, classes, patch_size=patch_size, parameters=batch.augmentation)
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            outputs = self.network(images.to(memory_format=self.memory_format))
        loss = deep_supervision_loss(outputs, classes, batch_dice=self.configuration.batch_dice)
        value = float(loss.detach())
        if not math.isfinite(value):
            self._count_bad_step(batch, value)
            self.epoch_losses.append(math.nan)
            return
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.max_gradient_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.epoch_losses.append(value)

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.device.type == "cuda":
            images, classes = batch.images.pin_memory(), batch.classes.pin_memory()
            return images.to(self.device, non_blocking=True), classes.to(self.device, non_blocking=True)
        return batch.images.to(self.device), batch.classes.to(self.device)

    def _autocast(self) -> AbstractContextManager[Any]:
        enabled = self.precision is not None
        return torch.autocast(self.device.type, dtype=self.precision or torch.float32, enabled=enabled)

    def _count_bad_step(self, batch: Batch, value: float) -> None:
        self.n_bad_steps += 1
        logger.warning(
            "step %d: the loss is %s on %s; the step is skipped", self.iteration, value, ", ".join(batch.cases)
        )
        if self.n_bad_steps > MAX_BAD_STEPS:
            raise TrainingError(
                f"the loss was not finite in {self.n_bad_steps} steps, last on {', '.join(batch.cases)}; look at these "
                "images, or train with another --seed"
            )

    # -- epochs --------------------------------------------------------------------------------------------------------

    def _end_epoch(self) -> None:
        started = time.monotonic()
        n_steps = len(self.epoch_losses)
        loss, class_dice = self._validate(n_batches=math.ceil(n_steps / STEPS_PER_VALIDATION_BATCH))
        dice = float(np.nanmean(class_dice)) if np.isfinite(class_dice).any() else math.nan
        previous = self.epochs[-1].smoothed_dice if self.epochs else dice
        step_time_s = self.epoch_time_s / n_steps
        # Validation on patches belongs to the budget: a user who gives 15 minutes waits 15 minutes.
        self.elapsed_s += time.monotonic() - started
        figures = EpochFigures(
            epoch=len(self.epochs) + 1,
            iteration=self.iteration,
            time_s=self.elapsed_s,
            train_loss=float(np.nanmean(self.epoch_losses)) if np.isfinite(self.epoch_losses).any() else math.nan,
            validation_loss=loss,
            validation_dice=dice,
            smoothed_dice=SMOOTHING * previous + (1 - SMOOTHING) * dice if math.isfinite(previous) else dice,
            class_dice=tuple(class_dice.tolist()),
            learning_rate=self.optimizer.param_groups[0]["lr"],
            step_s=step_time_s,
            data_wait_fraction=self.wait_s / max(self.epoch_time_s, 1e-9),
        )
        self.epochs.append(figures)
        self.epoch_losses, self.epoch_time_s, self.wait_s = [], 0.0, 0.0
        logger.info(
            "%s epoch %d, step %d: loss %.3f, validation loss %.3f, Dice %.3f, %s, %s left",
            self.files.folder.name,
            figures.epoch,
            figures.iteration,
            figures.train_loss,
            figures.validation_loss,
            figures.validation_dice,
            format_duration(self.elapsed_s),
            self._time_left(),
        )

    def _validate(self, *, n_batches: int) -> tuple[float, np.ndarray]:
        """Mean loss and Dice per foreground class over the same patches every time, without augmentation."""
        n_classes = self.plan.labels.n_classes
        counts = torch.zeros(3, n_classes, dtype=torch.float64)
        losses = []
        self.network.eval()
        numbers = iter(range(n_batches))
        for batch in read_ahead(self.validation.batch, numbers, n_threads=1, depth=2):
            images, classes = self._to_device(batch)
            with torch.inference_mode(), self._autocast():
                logits = self.network(images.to(memory_format=self.memory_format))
            losses.append(float(dice_ce_loss(logits, classes, batch_dice=self.configuration.batch_dice)))
            predicted = logits.argmax(dim=1)
            for row, voxels in enumerate((classes[predicted == classes], predicted, classes)):
                counts[row] += torch.bincount(voxels.flatten(), minlength=n_classes).cpu()
        overlap, predicted_sum, reference_sum = counts.numpy()
        with np.errstate(invalid="ignore"):
            dice = 2 * overlap / (predicted_sum + reference_sum)
        return float(np.mean(losses)), dice[1:]

    def _status(self) -> str:
        recent = [loss for loss in self.epoch_losses[-20:] if math.isfinite(loss)]
        loss = f"loss {sum(recent) / len(recent):.3f}" if recent else ""
        dice = f"Dice {self.epochs[-1].validation_dice:.3f}" if self.epochs else ""
        return ", ".join(part for part in (loss, dice, f"{self._time_left()} left") if part)

    def _time_left(self) -> str:
        done = self.fraction_done
        return format_duration(self.elapsed_s * (1 - done) / done) if done else "?"


def _choose_batch_size(
    configuration: ConfigurationPlan, recipe: Recipe, config: TrainConfig, device: torch.device
) -> int:
    if config.batch_size is not None:
        return config.batch_size
    if device.type == "cpu" and recipe.max_cpu_batch is not None:
        # The same voxels per step for 2D, whose patches are slices.
        limit = recipe.max_cpu_batch if configuration.n_axes == 3 else 16 * recipe.max_cpu_batch
        return min(limit, configuration.batch_size)
    return configuration.batch_size


def _make_optimizer(network: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    fused = device.type in ("cuda", "cpu")
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(
            network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=fused
        )
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            network.parameters(),
            lr=recipe.learning_rate,
            momentum=0.99,
            nesterov=True,
            weight_decay=recipe.weight_decay,
            fused=fused,
        )
    raise TrainingError(f"optimizer '{recipe.optimizer}' is unknown; known are adamw and sgd")


def _read_log(path: Path) -> list[EpochFigures]:
    if not path.exists():
        return []
    return [from_plain(EpochFigures, json.loads(line)) for line in path.read_text().splitlines()]


@contextmanager
def _closing(batches: Iterator[Batch]) -> Iterator[None]:
    """Ends the reading threads however the block ends."""
    try:
        yield
    finally:
        batches.close()  # type: ignore[attr-defined]

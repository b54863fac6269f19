"""Training one fold: batches in, weights out, interruptible at every step."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from autoseg import __version__
from autoseg.core.errors import TrainingError, TrainingInterrupted, first_line
from autoseg.core.faults import DeviceError, describe_lost_device, is_device_lost, is_device_memory, is_out_of_memory
from autoseg.core.geometry import join_numbers
from autoseg.core.runtime import can_compute, computing, derive_seed, format_duration, n_cpus, never, run_ahead, track
from autoseg.core.serialize import digest, write_json
from autoseg.networks.build import build_trainable
from autoseg.networks.outputs import Outputs
from autoseg.planning.plan import Plan
from autoseg.preprocessing.store import PreprocessedCase
from autoseg.training.augment import apply_parameters
from autoseg.training.checkpoint import (
    DamagedError,
    RunState,
    load_checkpoint,
    load_weights,
    read_state,
    save_checkpoint,
    save_weights,
)
from autoseg.training.config import CHECKPOINT_INTERVAL_S, PRECISIONS, Budget, TrainConfig
from autoseg.training.learner import Learner
from autoseg.training.patches import Batch, PatchSampler
from autoseg.training.ranks import ALONE, Ranks
from autoseg.training.recipe import RECIPES
from autoseg.training.record import (
    EpochFigures,
    FoldFiles,
    TrainingChoices,
    TrainingRecord,
    ValidationSlice,
    describe_environment,
    read_log,
    smooth,
    write_log,
)
from autoseg.training.samplers import training_sampler, validation_sampler
from autoseg.training.validation import score_patches

logger = logging.getLogger(__name__)

MAX_BAD_STEPS = 20
MAX_LOADERS = 12
"""Threads that read batches ahead; the batches that wait take memory."""
# One validation batch per so many training steps keeps validation to a few percent of the time.
STEPS_PER_VALIDATION_BATCH = 20
MAX_DATA_WAIT = 0.05
# Compiling takes a minute or two and saves perhaps a fifth of the time afterwards.
MIN_TIME_TO_COMPILE_S = 900.0
LATE_RATE = 0.05
"""As a part of the highest learning rate: below it, there is little left to learn."""

Stop = Callable[[], bool]
OnEpoch = Callable[[Sequence[EpochFigures], Sequence[ValidationSlice]], None]


def train_fold(
    folder: Path,
    plan: Plan,
    choices: TrainingChoices,
    *,
    training: Sequence[PreprocessedCase],
    validation: Sequence[PreprocessedCase],
    config: TrainConfig,
    device: torch.device,
    resume: bool = True,
    spent_s: float = 0.0,
    checkpoint_interval_s: float = CHECKPOINT_INTERVAL_S,
    stop: Stop = never,
    on_epoch: OnEpoch = lambda epochs, slices: None,
    ranks: Ranks = ALONE,
) -> nn.Module:
    """Trains the network of a configuration on one fold, or goes on where an earlier call was stopped.

    Several processes that call it with the same arguments, each with its own `ranks`, train one network together. A
    training may be resumed by another number of processes than began it.

    Args:
        folder: of the fold; gets the files of `FoldFiles`.
        plan: its labels, channels and axes.
        choices: what is trained and how long, see `autoseg.training.adapt.choose_training`.
        training: preprocessed cases to learn from.
        validation: preprocessed cases to follow the progress on.
        config: what was asked for, as far as the choices do not say it: seed, augmentation, precision, compiling.
        device: to train on.
        resume: go on from the checkpoint where there is one; otherwise start anew.
        spent_s: seconds of the budget that are spent already.
        checkpoint_interval_s: the state is saved at the end of each epoch, and after this time at the latest.
        stop: asked after every step; True, in any of the processes, saves and raises `TrainingInterrupted` in all.
        on_epoch: called after each epoch with all so far, and slices of validation patches as the network sees them; by
            the first process only.
        ranks: processes that train together, see `autoseg.training.ranks.joined`. Each takes a part of every batch; the
            first one writes the files.

    Returns:
        The trained network, in evaluation mode, on `device`.

    Raises:
        TrainingError: the checkpoint is of another run or not there for all processes, the loss is not finite again and
            again, or memory is short.
        DeviceError: the GPU has failed.
        TrainingInterrupted: `stop` said so.
    """
    run = _Run(
        folder, plan, choices, training=training, validation=validation, config=config, device=device, ranks=ranks
    )
    run.elapsed_s = ranks.first_says(spent_s)
    if resume:
        run.resume()
    else:
        run.discard()
    run.check_together()
    if not run.finished:
        try:
            with computing(device, deterministic=config.deterministic):
                run.train(stop, on_epoch, checkpoint_interval_s=checkpoint_interval_s)
        except (MemoryError, RuntimeError) as error:
            if is_device_lost(error):
                raise DeviceError(run.tell_lost_device(error)) from error
            if is_out_of_memory(error):
                raise TrainingError(run.tell_no_memory(error)) from error
            raise
    return run.learner.network.eval()


class _Run:
    """A training run in memory: the network, its optimizer, and how far it has come."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        choices: TrainingChoices,
        *,
        training: Sequence[PreprocessedCase],
        validation: Sequence[PreprocessedCase],
        config: TrainConfig,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self.files, self.ranks = FoldFiles(folder=folder), ranks
        self.plan, self.choices, self.config, self.device = plan, choices, config, device
        self.budget, self.outputs = choices.budget, Outputs.of(plan.labels)
        self.mirrors = choices.mirror and config.augment != "none"
        self.recipe = RECIPES[choices.recipe]
        self.configuration = configuration = choices.configuration
        seed = derive_seed("training", config.seed, configuration.name, *(case.id for case in training))
        self.seed = seed
        torch.manual_seed(derive_seed("weights", seed))
        network = build_trainable(plan, configuration)
        self.learner = Learner(
            network,
            configuration,
            recipe=self.recipe,
            device=device,
            precision=config.precision,
            outputs=self.outputs,
        )
        # Which one is fastest is measured, and may come out otherwise in another process.
        precision = PRECISIONS[int(ranks.first_says(PRECISIONS.index(self.learner.precision_name)))]
        self.learner.use_precision(precision)
        self.cases = {"training": tuple(training), "validation": tuple(validation)}
        # A case that is made again elsewhere keeps its key, one whose scan was only touched what it holds.
        self.config_digest = self._digest([case.key for case in training])
        self.content_digest = self._digest([case.content for case in training])
        self.iteration, self.elapsed_s, self.before_s, self.epoch_time_s = 0, 0.0, 0.0, 0.0
        self.epoch_losses: list[float] = []
        self.epochs: list[EpochFigures] = []
        self.n_bad_steps = 0
        self.saved_at_step: int | None = None
        self.wait_s = 0.0
        self.warned_of_waiting = False
        self.finished = False
        self.ended: tuple[int, float] | None = None

    def _digest(self, cases: Sequence[str]) -> str:
        """Of what shapes the result, and may not change when a run is resumed, with these names of the cases.

        The budget may grow, and compiling may fail.
        """
        fixed = dataclasses.replace(self.choices, budget=Budget(iterations=1), reasons=())
        asked = self.config.augment, self.config.precision, self.config.deterministic
        plan = self.plan
        return digest((fixed, asked, self.seed, (plan.labels, plan.normalization, plan.axis_order, cases)))

    def _training_sampler(self, *, augments: bool = True) -> PatchSampler:
        return training_sampler(
            self.cases["training"],
            self.plan,
            self.choices,
            self.config,
            seed=self.seed,
            samples=self.ranks.own_samples(self.choices.batch_size),
            augments=augments,
        )

    def _say(self, level: int, text: str, *values: object) -> None:
        """Logs what all processes know, once."""
        if self.ranks.is_first:
            logger.log(level, f"%s: {text}", self.files.folder.name, *values)

    def _seconds_since(self, started: float) -> float:
        """Since that value of `time.monotonic`, for the first process: the budget has to be the same for all."""
        return self.ranks.first_says(time.monotonic() - started)

    # -- state ---------------------------------------------------------------------------------------------------------

    def discard(self) -> None:
        """Forgets an earlier run in this folder."""
        if self.ranks.is_first:
            self.files.discard()

    def resume(self) -> None:
        """Goes on from the checkpoint, if there is one."""
        if not self.files.checkpoint.exists():
            if self.files.weights.exists():
                raise TrainingError(
                    f"{self.files.folder}: is trained, but its checkpoint is gone, so it cannot go on; predict with it "
                    "as it is, or train anew with --no-resume"
                )
            self.discard()
            return
        state = read_state(self.files.checkpoint)
        if state.config != self.config_digest and state.content != self.content_digest:
            raise TrainingError(
                f"{self.files.folder}: holds a training with another plan, cases, recipe, batch size or seed; "
                "give the same options again, or --no-resume to start anew"
            )
        load_checkpoint(self.files.checkpoint, self.learner.network, self.learner.optimizer)
        self._take(state)
        self.finished = self.fraction_done >= 1 and self._load_final_weights()
        self._tell_resumed()

    def _take(self, state: RunState) -> None:
        """Goes on from where a training was."""
        if state.device == self.device.type and can_compute(self.device, state.precision):
            # What is fastest was measured when the run began, and may come out otherwise on a busy machine.
            self.learner.use_precision(state.precision)
            self.learner.loss_scale = state.loss_scale, state.steps_at_scale
        self.iteration, self.elapsed_s, self.epoch_time_s = state.iteration, state.elapsed_s, state.epoch_time_s
        self.before_s, self.n_bad_steps, self.ended = state.before_s, state.n_bad_steps, state.ended
        self.saved_at_step = state.iteration
        self.epoch_losses = list(state.epoch_losses)
        self.epochs = read_log(self.files.log)[: state.epoch]

    def _load_final_weights(self) -> bool:
        """Whether the final weights are there and whole, and this training's: a longer one may have been stopped."""
        if not self.files.weights.exists() or (self.ended and self.budget.fraction_done(*self.ended) < 1):
            return False
        try:
            load_weights(self.files.weights, self.learner.network)
        except DamagedError as error:
            # The checkpoint holds the same; what is left of the training is to write them.
            self._say(logging.WARNING, "%s; they are made again from the checkpoint", error)
            return False
        return True

    def _tell_resumed(self) -> None:
        last_rate = self.epochs[-1].learning_rate if self.epochs else math.inf
        is_late = last_rate <= LATE_RATE * self.recipe.highest_rate(mirrored=self.mirrors)
        if self.fraction_done >= 1 and not self.finished and not is_late:
            self._say(
                logging.WARNING,
                "was begun with a longer budget than that of now, which is used up: it ends at step %d as it is, in "
                "the middle of learning; to go on, give the same command with the budget that it was begun with",
                self.iteration,
            )
        state_told = "already trained" if self.finished else "resuming"
        self._say(logging.INFO, "%s at step %d after %s", state_told, self.iteration, format_duration(self.elapsed_s))

    def check_together(self) -> None:
        """Makes sure that all processes have come as far.

        Raises:
            TrainingError: they have not.
        """
        known = self.iteration, self.finished
        if not self.ranks.all_true(known == tuple(self.ranks.first_says(value) for value in known)):
            raise TrainingError(
                f"{self.files.folder}: is not the same for all processes that train together; the work folder must be "
                "on a disk that all of their machines share"
            )

    def save(self) -> None:
        """Writes the checkpoint and the log."""
        if not self.ranks.is_first:
            return
        loss_scale, steps_at_scale = self.learner.loss_scale
        state = RunState(
            config=self.config_digest,
            iteration=self.iteration,
            epoch=len(self.epochs),
            elapsed_s=self.elapsed_s,
            before_s=self.before_s,
            epoch_losses=tuple(self.epoch_losses),
            epoch_time_s=self.epoch_time_s,
            loss_scale=loss_scale,
            steps_at_scale=steps_at_scale,
            n_bad_steps=self.n_bad_steps,
            device=self.device.type,
            precision=self.learner.precision_name,
            finished=self.finished,
            ended=self.ended,
            content=self.content_digest,
        )
        write_log(self.files.log, self.epochs)
        save_checkpoint(self.files.checkpoint, self.learner.network, self.learner.optimizer, state)
        self.saved_at_step = self.iteration

    # -- faults --------------------------------------------------------------------------------------------------------

    def save_after(self, error: Exception) -> None:
        """Saves the state before a step that memory was short for, where that is whole and can still be read."""
        is_alone = self.ranks.count == 1
        if self.learner.is_changing or self.iteration == 0 or not is_alone or not is_out_of_memory(error):
            return
        try:
            self.save()
        except (TrainingError, OSError, MemoryError, RuntimeError) as another:
            self._say(logging.WARNING, "the state could not be saved either (%s)", first_line(another))

    def tell_no_memory(self, error: Exception) -> str:
        """Where memory was short, and what to do."""
        size = f"a batch of {self.choices.batch_size} patches of {join_numbers(self.configuration.patch_size)} voxels"
        anew = "train anew with --no-resume and a smaller --batch-size, this fold alone with --fold"
        if is_device_memory(error):
            what = f"the memory of {self.device} is full"
            advice = "end what else runs on the GPU ('nvidia-smi' shows that)"
            less = f"{anew}, or plan again with less --gpu-memory"
        else:
            what = "the memory of this machine, or what may be used of it, is full"
            advice = "end what else runs here, or ask for more (--memory on a cluster)"
            less = anew
        return (
            f"{self.files.folder}: {what} at step {self.iteration + 1}, with {size} ({first_line(error)}). What to do: "
            f"{advice}, then {self._tell_saved()}; or {less}"
        )

    def tell_lost_device(self, error: Exception) -> str:
        """That the GPU has failed, and what to do."""
        where = f"{self.files.folder}: at step {self.iteration + 1}"
        return f"{where} {describe_lost_device(error)}; then {self._tell_saved()}"

    def _tell_saved(self) -> str:
        if self.saved_at_step is None:
            return "the same command begins again: nothing was saved yet"
        return f"the same command goes on from step {self.saved_at_step}"

    # -- training ------------------------------------------------------------------------------------------------------

    @property
    def fraction_done(self) -> float:
        return self.budget.fraction_done(self.iteration, self.elapsed_s)

    def train(self, stop: Stop, on_epoch: OnEpoch, *, checkpoint_interval_s: float) -> None:
        """Steps until the budget is used up."""
        self._compile_where_it_pays()
        if self.iteration == 0:
            self.before_s = self.elapsed_s
        self.learner.join(self.ranks)
        sampler = self._training_sampler()
        self._announce()
        saved_at = time.monotonic()
        n_threads = max(1, min(n_cpus() // 2, MAX_LOADERS))
        batches = run_ahead(sampler.batch, count(self.iteration), n_threads=n_threads, depth=n_threads + 2)
        with self._progress() as advance, closing(batches):
            shown = 0
            # Choosing a network may have taken all of a tiny budget.
            while self.fraction_done < 1 or self.iteration == 0:
                try:
                    self._timed_step(batches)
                except (MemoryError, RuntimeError) as error:
                    self.save_after(error)
                    raise
                if self.budget.epoch_is_over(len(self.epoch_losses), self.epoch_time_s) or self.fraction_done >= 1:
                    slices = self._end_epoch()
                    started = time.monotonic()
                    # Before anybody is told of it, which may fail.
                    self.save()
                    if self.ranks.is_first:
                        on_epoch(self.epochs, slices)
                    saved_at = time.monotonic()
                    self.elapsed_s += self._seconds_since(started)
                elif time.monotonic() - saved_at > checkpoint_interval_s:
                    self.save()
                    saved_at = time.monotonic()
                now_shown = int(1000 * self.fraction_done)
                advance(now_shown - shown, self._status())
                shown = now_shown
                if not self.ranks.all_true(not stop()) and self.fraction_done < 1:
                    self.save()
                    # Whoever ends first may take the others with it.
                    self.ranks.wait()
                    raise TrainingInterrupted(
                        f"stopped at step {self.iteration}; the same command goes on from there ({self.files.folder})"
                    )
        if self.ranks.is_first:
            save_weights(self.files.weights, self.learner.network)
        self.finished, self.ended = True, (self.iteration, self.elapsed_s)
        self.save()
        self.ranks.wait()

    def _progress(self) -> AbstractContextManager[Callable[..., None]]:
        """In thousandths of the budget; shown once."""
        if self.ranks.is_first:
            return track(f"training {self.files.folder.name}", total=1000)
        return nullcontext(lambda n=1, note="": None)

    def _compile_where_it_pays(self) -> None:
        on_gpu = self.device.type == "cuda"
        may_compile = self.config.compile is None and on_gpu and not self.config.deterministic
        if self.config.compile or may_compile:
            started = time.monotonic()
            batch = self._training_sampler(augments=False).batch(0)
            images, classes = batch.part_classes(*self.learner.to_device(batch))
            step_s = self.ranks.first_says(self.learner.time_step(images, classes))
            left_s = step_s * self.budget.expected_iterations(step_s) * (1 - self.fraction_done)
            if self.config.compile or (may_compile and left_s > MIN_TIME_TO_COMPILE_S):
                self._say(logging.INFO, "compiling the network, which can take minutes")
                self.learner.compile(images, classes, ranks=self.ranks)
            # A user who gives 15 minutes waits 15 minutes.
            self.elapsed_s += self._seconds_since(started)

    def _announce(self) -> None:
        """Says what is about to be trained, and writes it down."""
        if not self.ranks.is_first:
            return
        record = TrainingRecord(
            autoseg=__version__,
            torch=torch.__version__,
            device=str(self.device),
            precision=self.learner.precision_name,
            recipe=self.choices.recipe,
            seed=self.config.seed,
            batch_size=self.choices.batch_size,
            mirrored=self.mirrors,
            choices=self.choices,
            training_cases=tuple(case.id for case in self.cases["training"]),
            validation_cases=tuple(case.id for case in self.cases["validation"]),
            n_processes=self.ranks.count,
            environment=describe_environment(),
        )
        write_json(self.files.training, record)
        self.files.begun.unlink(missing_ok=True)
        n_weights = sum(parameter.numel() for parameter in self.learner.network.parameters())
        self._say(
            logging.INFO,
            "%s, patch %s, batch %d, %.1f million weights, %s on %s, recipe %s",
            self.configuration.name,
            join_numbers(self.configuration.patch_size),
            self.choices.batch_size,
            n_weights / 1e6,
            record.precision,
            f"{self.ranks.count} x {record.device}" if self.ranks.count > 1 else record.device,
            record.recipe,
        )

    def _timed_step(self, batches: Iterator[Batch]) -> None:
        started = time.monotonic()
        batch = next(batches)
        self.wait_s += time.monotonic() - started
        self._step(batch)
        self.iteration += 1
        spent = self._seconds_since(started)
        self.elapsed_s += spent
        self.epoch_time_s += spent

    def _step(self, batch: Batch) -> None:
        # The schedule begins with the first step: what was spent before takes nothing from the warm-up.
        first = self.budget.fraction_done(0, self.before_s)
        fraction = (self.fraction_done - first) / (1 - first) if first < 1 else 0.0
        rate = self.recipe.rate(fraction, mirrored=self.mirrors)
        value = self.learner.step(lambda: self._loss(batch), learning_rate=rate)
        if not math.isfinite(value):
            self._count_bad_step(batch, value)
        self.epoch_losses.append(value if math.isfinite(value) else math.nan)

    def _loss(self, batch: Batch) -> Tensor:
        """Augments a batch and runs the network on it."""
        images, classes = self.learner.to_device(batch)
        if batch.augmentation is not None:
            patch_size = self.configuration.patch_size
            images, classes = apply_parameters(images, classes, patch_size=patch_size, parameters=batch.augmentation)
        if batch.absent is not None:
            # At the end: what augmentation makes of an empty channel is no image either.
            absent = batch.absent.to(images.device)
            images = images.masked_fill(absent.reshape(*absent.shape, *[1] * (images.ndim - 2)), 0)
        images, classes = batch.part_classes(images, classes)
        return self.learner.loss(images, classes, known=batch.known, n_samples=self.choices.batch_size)

    def _count_bad_step(self, batch: Batch, value: float) -> None:
        self.n_bad_steps += 1
        cases = ", ".join(batch.cases_of_all)
        self._say(logging.WARNING, "step %d: the loss is %s on %s; the step is skipped", self.iteration, value, cases)
        if self.n_bad_steps > MAX_BAD_STEPS:
            raise TrainingError(
                f"the loss was not finite in {self.n_bad_steps} steps, last on {cases}; look at these images, or train "
                "anew with --no-resume and another --seed"
            )

    # -- epochs --------------------------------------------------------------------------------------------------------

    def _end_epoch(self) -> tuple[ValidationSlice, ...]:
        """Validates on patches and writes the epoch down; returns what there is to look at."""
        started = time.monotonic()
        n_steps = len(self.epoch_losses)
        ends = [0, *(epoch.iteration for epoch in self.epochs)]
        # The last epoch may be short; its point of the curve is of as many patches as the others all the same.
        n_longest = max([n_steps, *(end - begin for begin, end in pairwise(ends))])
        scores = score_patches(
            self.learner,
            validation_sampler(self.cases["validation"], self.plan, self.choices, seed=self.seed),
            n_batches=math.ceil(n_longest / STEPS_PER_VALIDATION_BATCH),
            outputs=self.outputs,
            batch_dice=self.configuration.batch_dice,
            ranks=self.ranks,
        )
        dice = scores.mean_dice
        previous = self.epochs[-1].smoothed_dice if self.epochs else math.nan
        step_time_s = self.epoch_time_s / n_steps
        # Validation on patches belongs to the budget: a user who gives 15 minutes waits 15 minutes.
        self.elapsed_s += self._seconds_since(started)
        figures = EpochFigures(
            epoch=len(self.epochs) + 1,
            iteration=self.iteration,
            time_s=self.elapsed_s,
            train_loss=float(np.nanmean(self.epoch_losses)) if np.isfinite(self.epoch_losses).any() else math.nan,
            validation_loss=scores.loss,
            validation_dice=dice,
            smoothed_dice=smooth(previous, dice),
            class_dice=tuple(scores.class_dice.tolist()),
            learning_rate=self.learner.optimizer.param_groups[0]["lr"],
            step_s=step_time_s,
            data_wait_fraction=self.wait_s / max(self.epoch_time_s, 1e-9),
        )
        self.epochs.append(figures)
        if 2 * sum(map(math.isnan, self.epoch_losses)) < n_steps:
            # Now and then a step fails, in float16 above all: that ends no training of days.
            self.n_bad_steps = 0
        self.epoch_losses, self.epoch_time_s, self.wait_s = [], 0.0, 0.0
        self._tell_epoch(figures)
        return scores.slices

    def _tell_epoch(self, figures: EpochFigures) -> None:
        """Says how an epoch went, and once, if so, that the data come too slowly."""
        self._say(
            logging.INFO,
            "epoch %d, step %d: loss %.3f, validation loss %.3f, Dice %.3f, %s, %s left",
            figures.epoch,
            figures.iteration,
            figures.train_loss,
            figures.validation_loss,
            figures.validation_dice,
            format_duration(self.elapsed_s),
            self._time_left(),
        )
        if figures.data_wait_fraction > MAX_DATA_WAIT and not self.warned_of_waiting:
            self.warned_of_waiting = True
            self._say(
                logging.WARNING,
                "%.0f%% of the time is spent waiting for data; a faster disk for the work folder, or more processors, "
                "would speed it up",
                100 * figures.data_wait_fraction,
            )

    def _status(self) -> str:
        recent = [loss for loss in self.epoch_losses[-20:] if math.isfinite(loss)]
        loss = f"loss {sum(recent) / len(recent):.3f}" if recent else ""
        dice = f"Dice {self.epochs[-1].validation_dice:.3f}" if self.epochs else ""
        return ", ".join(part for part in (loss, dice, f"{self._time_left()} left") if part)

    def _time_left(self) -> str:
        done = self.fraction_done
        return format_duration(self.elapsed_s * (1 - done) / done) if done else "?"

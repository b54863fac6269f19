"""What a training run is asked to do: its budget, and everything else that changes its result."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autoseg.core.errors import TrainingError
from autoseg.core.runtime import format_duration
from autoseg.training.recipe import RECIPES

ITERATIONS_PER_EPOCH = 250
CHECKPOINT_INTERVAL_S = 600.0
# A budget shorter than this many full epochs is cut into as many shorter ones, so that there is a curve to look at.
MIN_EPOCHS_SHOWN = 20
AUGMENTATIONS = ("torch", "batchgenerators", "none")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
NETWORKS = ("auto", "planned")
SAMPLINGS = ("published", "balanced")
"""Names in `autoseg.training.patches.SAMPLING`, which brings torch, as this module must not."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to train. With both limits, the one that is reached first ends the training.

    Attributes:
        iterations: training steps; None for no limit.
        max_time_s: seconds spent in training, over all resumed parts; None for no limit.
        iterations_per_epoch: steps between two validations on patches, at most; with a limit of time an epoch ends
            after a part of that too.
    """

    iterations: int | None = None
    max_time_s: float | None = None
    iterations_per_epoch: int = ITERATIONS_PER_EPOCH

    def __post_init__(self) -> None:
        if self.iterations is None and self.max_time_s is None:
            raise TrainingError("the budget has no limit; give --epochs, --iterations or --max-time")
        if (self.iterations is not None and self.iterations < 1) or (
            self.max_time_s is not None and self.max_time_s <= 0
        ):
            raise TrainingError("the budget is empty; --epochs, --iterations and --max-time must be positive")

    @classmethod
    def make(
        cls, *, epochs: int | None = None, iterations: int | None = None, max_time_s: float | None = None
    ) -> Budget | None:
        """The budget from what a user gave; None where nothing was given.

        Raises:
            TrainingError: epochs and iterations together, or a value that is not positive.
        """
        if epochs is not None and iterations is not None:
            raise TrainingError("give --epochs or --iterations, not both")
        if epochs is not None:
            return cls(iterations=epochs * ITERATIONS_PER_EPOCH, max_time_s=max_time_s)
        if iterations is None and max_time_s is None:
            return None
        length = ITERATIONS_PER_EPOCH
        if iterations is not None:
            length = min(length, max(1, math.ceil(iterations / MIN_EPOCHS_SHOWN)))
        return cls(iterations=iterations, max_time_s=max_time_s, iterations_per_epoch=length)

    def describe(self) -> str:
        """Such as "15 min 0 s", "2,500 steps", or "2,500 steps or 15 min 0 s"."""
        steps = [] if self.iterations is None else [f"{self.iterations:,} steps"]
        return " or ".join(steps + ([] if self.max_time_s is None else [format_duration(self.max_time_s)]))

    def expected_iterations(self, step_s: float) -> float:
        """How many steps of so many seconds the budget allows."""
        by_time = math.inf if self.max_time_s is None else self.max_time_s / step_s
        return min(by_time, math.inf if self.iterations is None else self.iterations)

    def fraction_done(self, iteration: int, elapsed_s: float) -> float:
        """From 0 to 1; the schedule follows it, so it fits whichever budget was given."""
        fractions = [0.0]
        if self.iterations is not None:
            fractions.append(iteration / self.iterations)
        if self.max_time_s is not None:
            fractions.append(elapsed_s / self.max_time_s)
        return min(1.0, max(fractions))

    def epoch_is_over(self, n_iterations: int, epoch_time_s: float) -> bool:
        """Whether an epoch of so many steps and seconds ends here."""
        by_time = self.max_time_s is not None and epoch_time_s >= self.max_time_s / MIN_EPOCHS_SHOWN
        return n_iterations >= self.iterations_per_epoch or by_time


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What is asked of a training run; what is None is left to the recipe, see `autoseg.training.adapt`.

    Attributes:
        budget: how long to train; None for a full training.
        recipe: a name in `RECIPES`.
        network: "auto", so that a short training may take smaller patches and a narrower network, or "planned".
        batch_size: patches per step.
        seed: of weights, patches and augmentation.
        foreground_fraction: part of each batch that is centred on a foreground voxel.
        sampling: how a foreground-centred patch is found, a name in `autoseg.training.patches.SAMPLING`: "published"
            draws a case, then one of its classes; "balanced" a class, then a case that has it.
        augment: "torch", in batches on the device of the network; "batchgenerators", the same table in the classic
            pipeline on the CPU, one batch at a time, for comparison; or "none".
        mirror: whether mirroring is part of the augmentation.
        precision: of the network's arithmetic: "float32", "bfloat16", "float16", or "auto" for the fastest that the
            device trains well in.
        compile: whether the network is compiled (`torch.compile`); None does it on a GPU where the training is long
            enough to gain by it. May be changed when a run is resumed.
        deterministic: only operations that repeat their results bit for bit; then nothing is compiled unless asked.
    """

    budget: Budget | None = None
    recipe: str = "fast"
    network: str = "auto"
    batch_size: int | None = None
    seed: int = 0
    foreground_fraction: float | None = None
    sampling: str | None = None
    augment: str = "torch"
    mirror: bool | None = None
    precision: str = "auto"
    compile: bool | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise TrainingError(f"recipe '{self.recipe}' is unknown; known are {', '.join(RECIPES)}")
        if self.network not in NETWORKS:
            raise TrainingError(f"network '{self.network}' is unknown; known are {', '.join(NETWORKS)}")
        if self.augment not in AUGMENTATIONS:
            raise TrainingError(f"augmentation '{self.augment}' is unknown; known are {', '.join(AUGMENTATIONS)}")
        if self.precision not in PRECISIONS:
            raise TrainingError(f"precision '{self.precision}' is unknown; known are {', '.join(PRECISIONS)}")
        if self.batch_size is not None and self.batch_size < 1:
            raise TrainingError(f"the batch size is {self.batch_size}, expected at least 1")
        if self.foreground_fraction is not None and not 0 <= self.foreground_fraction <= 1:
            raise TrainingError(f"foreground_fraction is {self.foreground_fraction}, expected 0 to 1")
        if self.sampling is not None and self.sampling not in SAMPLINGS:
            raise TrainingError(f"sampling '{self.sampling}' is unknown; known are {', '.join(SAMPLINGS)}")

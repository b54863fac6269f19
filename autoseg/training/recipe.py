"""Recipes: how the weights are optimised."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autoseg.core.errors import TrainingError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the weights are optimised.

    Attributes:
        optimizer: "muon", "adamw" or "sgd" (Nesterov momentum 0.99).
        learning_rate: the largest.
        weight_decay: in the gradient for "sgd", decoupled for the others.
        schedule: "cosine" or "linear" to zero, both after a linear warm-up, or "poly" (power 0.9, no warm-up).
        warmup_fraction: of the budget, but for "poly".
        max_gradient_norm: gradients are scaled down to it.
        max_cpu_batch: patches per step on a CPU, where steps count for more than patches; None for the plan's.
        adapts: whether a short training may take smaller patches and a narrower network than planned.
        sampling, foreground_fraction: see `autoseg.training.config.TrainConfig`.
        patches_per_case: that a full training sees, where the user gives no budget; None for `max_epochs`.
        min_epochs, max_epochs: of a full training.
        full_cpu_time_s: a full training on a CPU, where the planned steps would take days; None for `max_epochs`.
        min_steps_to_mirror: patches are mirrored only in a run of at least so many steps,
        steps_per_label_to_mirror: and of at least so many times the number of labels: the network has to learn every
            structure in eight poses instead of one,
        patches_per_case_to_mirror: and that sees at least so many patches of each case for each label: mirroring
            prevents learning by heart, which takes seeing the same often.
        max_steps_to_mirror: a run of so many steps mirrors in any case.
        mirrored_rate: factor of the learning rate where patches are mirrored.
    """

    optimizer: str
    learning_rate: float
    weight_decay: float
    schedule: str
    warmup_fraction: float
    max_gradient_norm: float
    max_cpu_batch: int | None
    adapts: bool
    sampling: str
    foreground_fraction: float
    patches_per_case: int | None
    min_epochs: int
    max_epochs: int
    full_cpu_time_s: float | None
    min_steps_to_mirror: int
    steps_per_label_to_mirror: int
    patches_per_case_to_mirror: int
    max_steps_to_mirror: int
    mirrored_rate: float

    def highest_rate(self, *, mirrored: bool) -> float:
        """The learning rate after the warm-up."""
        return self.learning_rate * (self.mirrored_rate if mirrored else 1.0)

    def rate(self, fraction_done: float, *, mirrored: bool) -> float:
        """The learning rate after a fraction of the budget."""
        largest = self.highest_rate(mirrored=mirrored)
        if self.schedule == "poly":
            return largest * (1 - fraction_done) ** 0.9
        if fraction_done < self.warmup_fraction:
            return largest * (0.01 + 0.99 * fraction_done / self.warmup_fraction)
        progress = (fraction_done - self.warmup_fraction) / (1 - self.warmup_fraction)
        if self.schedule == "linear":
            return largest * (1 - progress)
        return largest * 0.5 * (1 + math.cos(math.pi * progress))


RECIPES: dict[str, Recipe] = {
    "fast": Recipe(
        optimizer="muon",
        learning_rate=12e-3,
        weight_decay=0.01,
        schedule="cosine",
        warmup_fraction=0.05,
        max_gradient_norm=12.0,
        max_cpu_batch=2,
        adapts=True,
        sampling="balanced",
        foreground_fraction=2 / 3,
        patches_per_case=500,
        min_epochs=50,
        max_epochs=250,
        full_cpu_time_s=3600.0,
        min_steps_to_mirror=1600,
        steps_per_label_to_mirror=400,
        patches_per_case_to_mirror=20,
        max_steps_to_mirror=10_000,
        mirrored_rate=0.5,
    ),
    "published": Recipe(
        optimizer="sgd",
        learning_rate=1e-2,
        weight_decay=3e-5,
        schedule="poly",
        warmup_fraction=0.0,
        max_gradient_norm=12.0,
        max_cpu_batch=None,
        adapts=False,
        sampling="published",
        foreground_fraction=1 / 3,
        patches_per_case=None,
        min_epochs=1000,
        max_epochs=1000,
        full_cpu_time_s=None,
        min_steps_to_mirror=0,
        steps_per_label_to_mirror=0,
        patches_per_case_to_mirror=0,
        max_steps_to_mirror=0,
        mirrored_rate=1.0,
    ),
}


def choose_batch_size(recipe: Recipe, planned: int, *, n_axes: int, on_cpu: bool) -> int:
    """Patches per step, where the user gives no number.

    Args:
        recipe: may limit it on a CPU.
        planned: the plan's batch size.
        n_axes: 2 or 3 spatial axes of a patch.
        on_cpu: whether training runs there.
    """
    if not on_cpu or recipe.max_cpu_batch is None:
        return planned
    # Slices are smaller than volumes by about this much.
    return min(planned, recipe.max_cpu_batch * (16 if n_axes == 2 else 1))


def make_optimizer(network: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of a recipe."""
    import torch

    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(
            network.parameters(),
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            fused=device.type in ("cuda", "cpu"),
        )
    if recipe.optimizer == "sgd":
        # Not fused: where the first step of float16 training is skipped, that would keep unwritten memory as momentum.
        return torch.optim.SGD(
            network.parameters(),
            lr=recipe.learning_rate,
            momentum=0.99,
            nesterov=True,
            weight_decay=recipe.weight_decay,
        )
    if recipe.optimizer == "muon":
        from autoseg.training.muon import Muon

        # What makes the logits is no feature of anything, and keeps its own scale.
        hidden: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in network.named_parameters():
            (hidden if parameter.ndim > 2 and not name.startswith("heads.") else others).append(parameter)
        return Muon(hidden, others, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    raise TrainingError(f"optimizer '{recipe.optimizer}' is unknown; known are muon, adamw and sgd")

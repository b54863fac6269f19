"""One step of training: forward, backward, update, in the precision of the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from autoseg.core.runtime import autocast_dtype
from autoseg.networks.build import build_network, channels_last
from autoseg.planning.plan import ConfigurationPlan, Plan
from autoseg.training.losses import deep_supervision_loss
from autoseg.training.recipe import Recipe, make_optimizer


def build_trainable(plan: Plan, configuration: ConfigurationPlan) -> nn.Module:
    """The network of a configuration for the channels and classes of its plan, with fresh weights, on the CPU."""
    return build_network(configuration.network, n_channels=len(plan.channels), n_classes=plan.labels.n_classes)


class Learner:
    """A network and all that changes its weights."""

    def __init__(
        self, network: nn.Module, configuration: ConfigurationPlan, *, recipe: Recipe, device: torch.device
    ) -> None:
        """Moves the network to the device and makes its optimizer.

        Args:
            network: of the configuration.
            configuration: says how the loss is taken.
            recipe: how the weights are optimised.
            device: to train on.
        """
        self.network = network.to(device)
        self.optimizer = make_optimizer(self.network, recipe, device)
        self.precision = autocast_dtype(device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision is torch.float16)
        self.device = device
        self.memory_format = channels_last(configuration.n_axes)
        self._batch_dice = configuration.batch_dice
        self._max_gradient_norm = recipe.max_gradient_norm

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision in which the network is run."""
        enabled = self.precision is not None
        return torch.autocast(self.device.type, dtype=self.precision or torch.float32, enabled=enabled)

    def loss(self, images: Tensor, classes: Tensor) -> Tensor:
        """Runs the network on a batch.

        Args:
            images: (N, C, *patch) float32, on the device.
            classes: (N, *patch) int64, on the device.

        Returns:
            The loss over all supervised outputs, a scalar.
        """
        self.network.train()
        with self.autocast():
            outputs = self.network(images.to(memory_format=self.memory_format))
        return deep_supervision_loss(outputs, classes, batch_dice=self._batch_dice)

    def step(self, compute_loss: Callable[[], Tensor], *, learning_rate: float) -> float:
        """Takes the gradient of a loss and changes the weights.

        Args:
            compute_loss: called once, when the gradients of the step before are gone; so whatever it makes on the way
                is gone too when the gradients come.
            learning_rate: of this step.

        Returns:
            The loss. Where it is not finite, or else the norm of its gradient, that number: then the weights are as
            they were.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        loss = compute_loss()
        value = float(loss.detach())
        if not math.isfinite(value):
            return value
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.network.parameters(), self._max_gradient_norm))
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            # One such step would make every weight NaN; the scaler of float16 training skips it by itself.
            return norm
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return value

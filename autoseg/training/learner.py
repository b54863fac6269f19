"""One step of training: forward, backward, update, in the precision of the device."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from autoseg.core.errors import first_line
from autoseg.core.runtime import autocast_dtype, send
from autoseg.networks.build import channels_last
from autoseg.networks.outputs import Outputs
from autoseg.planning.plan import ConfigurationPlan
from autoseg.training.losses import deep_supervision_loss
from autoseg.training.patches import Batch
from autoseg.training.ranks import ALONE, Ranks
from autoseg.training.recipe import Recipe, make_optimizer

logger = logging.getLogger(__name__)

N_TIMED_STEPS = 3
FIRST_LOSS_SCALE = 2.0**16


class Learner:
    """A network and all that changes its weights.

    Attributes:
        network: its weights are what is learned; in the mode that the last call left it in.
        optimizer: of the recipe.
        device: that both are on.
        precision: of the network's arithmetic.
        scaler: of the loss, in use in float16 only, whose small gradients would be zero without.
        outputs: what the channels of the network's output mean; None for classes that exclude each other.
        is_changing: whether the weights are being changed: an error that comes meanwhile leaves them half changed.
    """

    def __init__(
        self,
        network: nn.Module,
        configuration: ConfigurationPlan,
        *,
        recipe: Recipe,
        device: torch.device,
        precision: str = "auto",
        outputs: Outputs | None = None,
    ) -> None:
        """Moves the network to the device and makes its optimizer.

        Args:
            network: of the configuration.
            configuration: says how the loss is taken.
            recipe: how the weights are optimised.
            device: to train on.
            precision: "float32", "bfloat16", "float16", or "auto" for the fastest that trains well on the device.
            outputs: what the channels of the network's output mean; None for classes that exclude each other.
        """
        self.network = network.to(device)
        self.optimizer = make_optimizer(self.network, recipe, device)
        self.device, self.outputs = device, outputs
        self.is_changing = False
        self.use_precision(precision)
        self._forward: nn.Module = self.network
        self._ranks = ALONE
        self._memory_format = channels_last(configuration.n_axes)
        self._batch_dice = configuration.batch_dice
        self._max_gradient_norm = recipe.max_gradient_norm

    def use_precision(self, name: str) -> None:
        """Computes in this precision from now on; see `__init__`."""
        chosen = autocast_dtype(self.device) if name == "auto" else getattr(torch, name)
        self.precision: torch.dtype = chosen or torch.float32
        self.scaler = torch.amp.GradScaler(
            self.device.type,
            init_scale=FIRST_LOSS_SCALE,
            enabled=self.precision is torch.float16,
        )

    @property
    def loss_scale(self) -> tuple[float | None, int]:
        """The scale of the loss, None but for float16, and for how many steps it has been that: it grows after many."""
        state = self.scaler.state_dict()
        return state.get("scale"), state.get("_growth_tracker", 0)

    @loss_scale.setter
    def loss_scale(self, known: tuple[float | None, int]) -> None:
        if self.scaler.is_enabled() and known[0] is not None:
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": known[0], "_growth_tracker": known[1]})

    @property
    def precision_name(self) -> str:
        """Such as "bfloat16"."""
        return str(self.precision).removeprefix("torch.")

    def join(self, ranks: Ranks) -> None:
        """Learns together with other processes from now on, each from its part of a batch."""
        self._ranks = ranks
        self._forward = ranks.distribute(self._forward)

    def to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images, float32, and classes of a batch on the device of the network; int64 unless augmented next."""
        images, classes = batch.images, batch.classes
        if self.device.type == "cuda":
            images, classes = images.pin_memory(), classes.pin_memory()
        images, classes = (send(tensor, self.device) for tensor in (images, classes))
        return images.float(), classes if batch.augmentation is not None else classes.long()

    def loss(
        self, images: Tensor, classes: Tensor, *, known: Tensor | None = None, n_samples: int | None = None
    ) -> Tensor:
        """Runs the network on a batch, to learn from it.

        Args:
            images: (N, C, *patch) float32, on the device.
            classes: (N, *patch) int64, on the device.
            known: see `Batch`.
            n_samples: of the whole batch, where several processes have a part each; what they have beyond does not
                count.

        Returns:
            The loss of the whole batch over all supervised outputs, a scalar.
        """
        self.network.train()
        # Before the network runs: a copy would wait for it.
        annotated = None if known is None else send(known, self.device)
        with self._autocast():
            logits = self._forward(images.to(memory_format=self._memory_format))
        return deep_supervision_loss(
            logits,
            classes,
            batch_dice=self._batch_dice,
            outputs=self.outputs,
            annotated=annotated,
            gather=lambda sums: self._ranks.gather(sums)[:n_samples],
        )

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Tensor:
        """Logits (N, K, *patch) at full resolution, of images as for `loss`."""
        self.network.eval()
        with self._autocast():
            logits: Tensor = self.network(images.to(memory_format=self._memory_format))
        return logits

    def step(self, compute_loss: Callable[[], Tensor], *, learning_rate: float) -> float:
        """Takes the gradient of a loss and changes the weights.

        Args:
            compute_loss: called once, when the gradients of the step before are gone; so whatever it makes on the way
                is gone too when the gradients come.
            learning_rate: of this step.

        Returns:
            The loss. If it, or else the norm of its gradient, is not finite, that number is returned, and the weights
            are unchanged.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        loss = compute_loss()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        gradient_norm = nn.utils.clip_grad_norm_(self.network.parameters(), self._max_gradient_norm)
        # Both together: a GPU is waited for once, when all of its work has been given to it.
        value, norm = torch.stack([loss.detach().float(), gradient_norm.float()]).tolist()
        if not self.scaler.is_enabled() and not (math.isfinite(value) and math.isfinite(norm)):
            # One such step would make every weight NaN; the scaler of float16 training skips it by itself.
            return norm if math.isfinite(value) else value
        self.is_changing = True
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.is_changing = False
        return value

    def time_step(self, images: Tensor, classes: Tensor) -> float:
        """Seconds of a step, from a few on this batch that change nothing."""
        seconds = []
        for _ in range(N_TIMED_STEPS):
            started = time.monotonic()
            self._try_step(images, classes)
            seconds.append(time.monotonic() - started)
        return min(seconds)

    def compile(self, images: Tensor, classes: Tensor, *, ranks: Ranks = ALONE) -> bool:
        """Compiles the network for learning and tries it on this batch; a failure leaves it as it was.

        Args:
            images: as for `loss`.
            classes: as for `loss`.
            ranks: processes that compile now and `join` later; a failure in one is one in all.

        Returns:
            Whether it worked.
        """
        worked = True
        try:
            # torch.compile tells mypy that it makes a function.
            self._forward = cast(nn.Module, torch.compile(self.network, dynamic=False))
            self._try_step(images, classes)
        except Exception as error:  # whatever goes wrong in a compiler, its back end or a missing tool
            worked = False
            logger.warning(
                "the network could not be compiled, so training goes on without, slower (%s)", first_line(error)
            )
        if not ranks.all_true(worked):
            self._forward = self.network
            return False
        return True

    def _try_step(self, images: Tensor, classes: Tensor) -> None:
        """Forward and backward, without a change of the weights."""
        self.loss(images, classes).backward()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _autocast(self) -> AbstractContextManager[Any]:
        reduced = self.precision is not torch.float32
        return torch.autocast(self.device.type, dtype=self.precision if reduced else None, enabled=reduced)

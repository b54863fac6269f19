"""How long a training step of a network takes on the device at hand."""

from __future__ import annotations

import time

import torch

from autoseg.core.runtime import computing
from autoseg.core.serialize import digest
from autoseg.networks.build import build_trainable
from autoseg.networks.outputs import Outputs
from autoseg.planning.plan import ConfigurationPlan, Plan
from autoseg.training.config import TrainConfig
from autoseg.training.learner import Learner
from autoseg.training.recipe import RECIPES

N_TIMED_STEPS = 2

_STEP_TIMES_S: dict[str, float] = {}
"""Of this process, by what they depend on: who asks twice gets the same answer, and two decisions agree."""


def time_step(
    plan: Plan, config: TrainConfig, configuration: ConfigurationPlan, *, batch_size: int, device: torch.device
) -> float:
    """Seconds of a training step on noise, without reading and augmentation."""
    how = config.recipe, config.precision, config.deterministic, batch_size, str(device)
    key = digest((configuration, plan.labels, len(plan.channels), *how))
    if key not in _STEP_TIMES_S:
        _STEP_TIMES_S[key] = _measure_step(plan, config, configuration, batch_size=batch_size, device=device)
    return _STEP_TIMES_S[key]


def _measure_step(
    plan: Plan, config: TrainConfig, configuration: ConfigurationPlan, *, batch_size: int, device: torch.device
) -> float:
    """Seconds of the fastest of a few steps, with a learning rate of zero."""
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(forked), computing(device, deterministic=config.deterministic):
        # To try every kernel for every size would take longer than the steps.
        torch.backends.cudnn.benchmark = False
        network = build_trainable(plan, configuration)
        recipe = RECIPES[config.recipe]
        learner = Learner(
            network,
            configuration,
            recipe=recipe,
            device=device,
            precision=config.precision,
            outputs=Outputs.of(plan.labels),
        )
        patch = configuration.patch_size
        images = torch.randn(batch_size, len(plan.channels), *patch, device=device)
        if plan.n_previous(configuration.name):
            images = torch.cat([images, torch.zeros_like(images[:, :1])], dim=1)
        classes = torch.randint(plan.labels.n_classes, (batch_size, *patch), device=device)
        seconds = []
        # The first one warms up.
        for _ in range(1 + N_TIMED_STEPS):
            started = time.monotonic()
            learner.step(lambda: learner.loss(images, classes), learning_rate=0.0)
            seconds.append(time.monotonic() - started)
    return min(seconds)

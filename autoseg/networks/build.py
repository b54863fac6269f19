"""The registry of networks: a name in a plan becomes a module."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from autoseg.core.errors import PlanError
from autoseg.networks.residual import make_residual_unet
from autoseg.networks.unet import make_plain_unet
from autoseg.planning.plan import NetworkPlan

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {"unet": make_plain_unet, "resenc_unet": make_residual_unet}


def build_network(plan: NetworkPlan, *, n_channels: int, n_classes: int) -> nn.Module:
    """Builds the network of a plan, with fresh weights, in the layout of `channels_last`.

    Args:
        plan: names the architecture.
        n_channels: of the input.
        n_classes: of the output, with the background.

    Raises:
        PlanError: the architecture is unknown.
    """
    if plan.architecture not in ARCHITECTURES:
        raise PlanError(f"architecture '{plan.architecture}' is unknown; known are {', '.join(ARCHITECTURES)}")
    network = ARCHITECTURES[plan.architecture](plan, n_channels=n_channels, n_classes=n_classes)
    # mypy knows no overload of `to` with a memory format alone.
    return network.to(memory_format=channels_last(len(plan.strides[0])))  # type: ignore[call-overload]


def channels_last(n_axes: int) -> torch.memory_format:
    """The memory layout that convolutions of 2 or 3 spatial axes are quickest in."""
    return torch.channels_last if n_axes == 2 else torch.channels_last_3d

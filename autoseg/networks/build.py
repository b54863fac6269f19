"""The registry of networks: a name in a plan becomes a module."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from autoseg.core.errors import PlanError
from autoseg.networks.residual import make_residual_unet
from autoseg.networks.unet import make_plain_unet
from autoseg.planning.plan import ConfigurationPlan, NetworkPlan, Plan

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {"unet": make_plain_unet, "resenc_unet": make_residual_unet}


def build_trainable(plan: Plan, configuration: ConfigurationPlan) -> nn.Module:
    """The network of a configuration for the channels and labels of its plan, with fresh weights, on the CPU."""
    return build_network(
        configuration.network,
        n_channels=len(plan.channels),
        n_outputs=plan.labels.n_outputs,
        n_previous=plan.n_previous(configuration.name),
    )


def build_network(plan: NetworkPlan, *, n_channels: int, n_outputs: int, n_previous: int = 0) -> nn.Module:
    """Builds the network of a plan, with fresh weights, in the layout of `channels_last`.

    Args:
        plan: names the architecture.
        n_channels: of the image.
        n_outputs: channels of the output: the classes with the background, or the regions.
        n_previous: foreground classes of the first stage of a cascade. Where there are some, the input has one more
            channel, with the class that the first stage has found, and the network sees a mask for each class.

    Raises:
        PlanError: the architecture is unknown.
    """
    if plan.architecture not in ARCHITECTURES:
        raise PlanError(f"architecture '{plan.architecture}' is unknown; known are {', '.join(ARCHITECTURES)}")
    network = ARCHITECTURES[plan.architecture](plan, n_channels=n_channels + n_previous, n_outputs=n_outputs)
    if n_previous:
        network.register_forward_pre_hook(lambda _, inputs: (_masks_of_classes(inputs[0], n_previous),))
    # mypy knows no overload of `to` with a memory format alone.
    return network.to(memory_format=channels_last(len(plan.strides[0])))  # type: ignore[call-overload]


def _masks_of_classes(images: Tensor, n_previous: int) -> Tensor:
    """(N, C + n_previous, ...) from (N, C + 1, ...), whose last channel holds classes, 0 the background."""
    classes = torch.arange(1, n_previous + 1, device=images.device, dtype=images.dtype)
    masks = images[:, -1:] == classes.reshape(-1, *[1] * (images.ndim - 2))
    both = torch.cat([images[:, :-1], masks.to(images.dtype)], dim=1)
    return both.contiguous(memory_format=channels_last(both.ndim - 2))


def channels_last(n_axes: int) -> torch.memory_format:
    """The memory layout that convolutions of 2 or 3 spatial axes are quickest in."""
    return torch.channels_last if n_axes == 2 else torch.channels_last_3d

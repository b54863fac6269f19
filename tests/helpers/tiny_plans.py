"""Plans of U-Nets with a few thousand weights, made by hand, and such networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from autoseg.core.labels import LabelSpec
from autoseg.networks.build import build_network
from autoseg.planning.plan import PLAN_VERSION, ChannelNormalization, ConfigurationPlan, NetworkPlan, Plan, Reason


def make_tiny_network_plan(n_axes: int = 3, *, features: tuple[int, ...] = (4, 8)) -> NetworkPlan:
    """Every stage but the first halves every axis; there is one block each."""
    n_stages = len(features)
    return NetworkPlan(
        architecture="unet",
        features=features,
        strides=((1,) * n_axes, *((2,) * n_axes,) * (n_stages - 1)),
        kernel_sizes=((3,) * n_axes,) * n_stages,
        encoder_blocks=(1,) * n_stages,
        decoder_blocks=(1,) * (n_stages - 1),
    )


def make_tiny_configuration(
    patch_size: tuple[int, ...],
    *,
    spacing_mm: tuple[float, ...] | None = None,
    median_shape: tuple[float, ...] | None = None,
    largest_shape: tuple[float, ...] | None = None,
    features: tuple[int, ...] = (4, 8),
    batch_dice: bool = False,
) -> ConfigurationPlan:
    """Named after its axes. Voxels are of 1 mm and cases as large as a patch, or else as large as the median."""
    n_axes = len(patch_size)
    median_shape = median_shape or patch_size
    return ConfigurationPlan(
        name="2d" if n_axes == 2 else "3d_fullres",
        spacing_mm=spacing_mm or (1.0,) * n_axes,
        median_shape=median_shape,
        largest_shape=largest_shape or median_shape,
        patch_size=patch_size,
        batch_size=2,
        lowres_axis=None,
        batch_dice=batch_dice,
        previous=None,
        network=make_tiny_network_plan(n_axes, features=features),
    )


def make_normalization(name: str = "MR") -> ChannelNormalization:
    return ChannelNormalization(
        channel=name, scheme="zscore", use_mask=False, mean=0, std=1, percentile_00_5=0, percentile_99_5=1
    )


def make_tiny_plan(
    *configurations: ConfigurationPlan,
    labels: LabelSpec,
    channels: Sequence[str] = ("MR",),
    reasons: tuple[Reason, ...] = (),
) -> Plan:
    """The last configuration is recommended."""
    return Plan(
        version=PLAN_VERSION,
        dataset="test",
        labels=labels,
        preset="unet",
        gpu_memory_gib=8,
        normalization=tuple(map(make_normalization, channels)),
        axis_order=(0, 1, 2),
        n_folds=5,
        configurations={configuration.name: configuration for configuration in configurations},
        recommended=configurations[-1].name,
        reasons=reasons,
        provenance={},
    )


def make_network(plan: Plan, *, seed: int) -> nn.Module:
    """The network of the recommended configuration, with random weights."""
    torch.manual_seed(seed)
    network = build_network(
        plan.configuration(plan.recommended).network, n_channels=len(plan.channels), n_outputs=plan.labels.n_outputs
    )
    # Features have equal means: with rows of sum zero no class is ahead everywhere.
    head = network.get_parameter("heads.0.weight").data
    head -= head.mean(dim=1, keepdim=True)
    return network

"""The plain U-Net and the registry of networks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import prod

import pytest
import torch
from torch import nn

from autoseg.core.errors import PlanError
from autoseg.networks.build import build_network
from autoseg.networks.unet import ConvBlock
from autoseg.planning.plan import NetworkPlan

PLAN_2D = NetworkPlan(
    architecture="unet",
    features=(4, 6, 10),
    strides=((1, 1), (2, 2), (2, 2)),
    kernel_sizes=((3, 3),) * 3,
    encoder_blocks=(2, 2, 2),
    decoder_blocks=(2, 2),
)
PLAN_3D = NetworkPlan(
    architecture="unet",
    features=(4, 6, 8, 10),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 1, 2)),
    kernel_sizes=((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3)),
    encoder_blocks=(1, 2, 3, 1),
    decoder_blocks=(2, 1, 2),
)
TWO_STAGES = NetworkPlan(
    architecture="unet",
    features=(3, 5),
    strides=((1, 1, 1), (2, 2, 2)),
    kernel_sizes=((3, 3, 3), (3, 3, 3)),
    encoder_blocks=(1, 1),
    decoder_blocks=(1,),
)
PLANS = {"2d": PLAN_2D, "3d": PLAN_3D, "two stages": TWO_STAGES}
SIZES = {"2d": (16, 24), "3d": (8, 16, 24), "two stages": (4, 6, 8)}


def make(name: str, *, n_channels: int = 2, n_classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return build_network(PLANS[name], n_channels=n_channels, n_classes=n_classes)


@pytest.mark.parametrize("name", PLANS)
def test_training_gives_one_output_per_resolution_but_the_lowest(name: str) -> None:
    outputs = make(name).train()(torch.randn(2, 2, *SIZES[name]))
    assert len(outputs) == max(1, len(PLANS[name].features) - 2)
    size = SIZES[name]
    for output, stride in zip(outputs, PLANS[name].strides, strict=False):
        size = tuple(edge // step for edge, step in zip(size, stride, strict=True))
        assert output.shape == (2, 3, *size)


@pytest.mark.parametrize("name", PLANS)
def test_evaluation_gives_the_full_resolution_alone(name: str) -> None:
    network = make(name)
    images = torch.randn(2, 2, *SIZES[name])
    with torch.no_grad():
        output = network.eval()(images)
        assert isinstance(output, torch.Tensor)
        assert output.shape == (2, 3, *SIZES[name])
        # Instance norm has no running statistics, so both modes compute the same.
        torch.testing.assert_close(network.train()(images)[0], output)


def n_parameters(plan: NetworkPlan, *, n_channels: int, n_classes: int) -> int:
    """By formula: every convolution has a bias, every norm a scale and a shift."""

    def convolutions(n_in: int, n_out: int, kernel: tuple[int, ...], n_blocks: int) -> int:
        first, others = n_in * n_out * prod(kernel), n_out * n_out * prod(kernel)
        return first + (n_blocks - 1) * others + n_blocks * 3 * n_out

    features = plan.features
    total = sum(
        convolutions(n_in, n_out, kernel, n_blocks)
        for (n_in, n_out), kernel, n_blocks in zip(
            pairwise((n_channels, *features)), plan.kernel_sizes, plan.encoder_blocks, strict=True
        )
    )
    for level, n_blocks in enumerate(plan.decoder_blocks):
        total += features[level + 1] * features[level] * prod(plan.strides[level + 1]) + features[level]
        total += convolutions(2 * features[level], features[level], plan.kernel_sizes[level], n_blocks)
    n_heads = max(1, len(features) - 2)
    return total + sum((width + 1) * n_classes for width in features[:n_heads])


@pytest.mark.parametrize("name", PLANS)
def test_number_of_parameters(name: str) -> None:
    network = make(name, n_channels=3, n_classes=5)
    counted = sum(parameter.numel() for parameter in network.parameters())
    assert counted == n_parameters(PLANS[name], n_channels=3, n_classes=5)


@pytest.mark.parametrize("name", PLANS)
def test_gradient_reaches_every_parameter(name: str) -> None:
    network = make(name).train()
    outputs = network(torch.randn(2, 2, *SIZES[name]))
    sum((output * torch.randn_like(output)).sum() for output in outputs).backward()
    # The bias of a convolution before an instance norm is subtracted again; all else has an effect.
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        cancelled = parameter_name.endswith("0.bias") and parameter_name.startswith(("encoder", "decoder"))
        assert cancelled or parameter.grad.abs().max() > 1e-6, parameter_name


def test_flat_kernels_do_not_mix_planes_where_nothing_is_strided() -> None:
    plan = replace(PLAN_2D, strides=((1, 1, 1), (1, 2, 2), (1, 2, 2)), kernel_sizes=((1, 3, 3),) * 3)
    network = build_network(plan, n_channels=1, n_classes=2).eval()
    for block in network.modules():
        if isinstance(block, ConvBlock):
            # The norm's mean is over all planes; without it there are the kernels alone.
            block[1] = nn.Identity()
    images = torch.randn(1, 1, 4, 8, 8)
    changed = images.clone()
    changed[0, 0, 2] += 1
    with torch.no_grad():
        differs = (network(images) - network(changed)).abs().amax(dim=(0, 1, 3, 4)) > 0
    assert differs.tolist() == [False, False, True, False]


def test_weights_and_features_are_channels_last() -> None:
    network = make("3d")
    weight = next(parameter for parameter in network.parameters() if parameter.ndim == 5)
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)
    images = torch.randn(2, 2, *SIZES["3d"])
    network.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            network(images), network(images.contiguous(memory_format=torch.channels_last_3d)), atol=1e-5, rtol=1e-4
        )


def test_weights_are_drawn_for_the_leaky_relu() -> None:
    """He et al. 2015: the variance of a weight is 2 / (1 + slope^2) / fan_in."""
    plan = replace(TWO_STAGES, features=(32, 64))
    torch.manual_seed(0)
    network = build_network(plan, n_channels=1, n_classes=2)
    weight = next(parameter for parameter in network.parameters() if parameter.shape == (64, 32, 3, 3, 3))
    expected = (2 / (1 + 0.01**2) / (32 * 27)) ** 0.5
    assert float(weight.detach().std()) == pytest.approx(expected, rel=0.02)
    biases = [parameter for name, parameter in network.named_parameters() if name.endswith("bias")]
    assert not any(bias.any() for bias in biases)


def test_unknown_architecture() -> None:
    with pytest.raises(PlanError, match="architecture 'u-net' is unknown; known are unet"):
        build_network(replace(PLAN_2D, architecture="u-net"), n_channels=1, n_classes=2)

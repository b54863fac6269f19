"""What holds for a U-Net with any encoder, and the registry of networks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from torch import nn

from autoseg.core.errors import PlanError
from autoseg.networks.build import ARCHITECTURES, build_network, channels_last
from autoseg.networks.unet import Conv3d, InstanceNorm
from autoseg.planning.memory import count_feature_map_values
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
    features=(4, 6, 6, 10),
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


every_network = pytest.mark.parametrize(("name", "architecture"), list(product(PLANS, ARCHITECTURES)))


def make(name: str, architecture: str, *, n_channels: int = 2, n_classes: int = 3) -> nn.Module:
    """A network in which every convolution has a say: scales of norms that start at zero are drawn too."""
    torch.manual_seed(0)
    plan = replace(PLANS[name], architecture=architecture)
    network = build_network(plan, n_channels=n_channels, n_outputs=n_classes)
    for module in network.modules():
        if isinstance(module, InstanceNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return network


@every_network
def test_training_gives_one_output_per_resolution_but_the_lowest(name: str, architecture: str) -> None:
    outputs = make(name, architecture).train()(torch.randn(2, 2, *SIZES[name]))
    assert len(outputs) == max(1, len(PLANS[name].features) - 2)
    size = SIZES[name]
    for output, stride in zip(outputs, PLANS[name].strides, strict=False):
        size = tuple(edge // step for edge, step in zip(size, stride, strict=True))
        assert output.shape == (2, 3, *size)


@every_network
def test_evaluation_gives_the_full_resolution_alone(name: str, architecture: str) -> None:
    network = make(name, architecture)
    images = torch.randn(2, 2, *SIZES[name])
    with torch.no_grad():
        output = network.eval()(images)
        assert isinstance(output, torch.Tensor)
        assert output.shape == (2, 3, *SIZES[name])
        # Instance norm has no running statistics, so both modes compute the same.
        torch.testing.assert_close(network.train()(images)[0], output)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_number_of_parameters(architecture: str) -> None:
    """By hand, for 2 channels, 3 classes, and 3 and 5 features: a 3x3x3 kernel has 27 weights, a norm two vectors."""
    encoder = {
        "unet": (2 * 3 * 27 + 3 * 3) + (3 * 5 * 27 + 3 * 5),
        # The stem; the first block; the second block; the projection of its skip, which has no bias.
        "resenc_unet": (2 * 3 * 27 + 3 * 3)
        + 2 * (3 * 3 * 27 + 3 * 3)
        + (3 * 5 * 27 + 3 * 5 + 5 * 5 * 27 + 3 * 5)
        + (3 * 5 + 2 * 5),
    }
    decoder = (5 * 3 * 8 + 3) + (6 * 3 * 27 + 3 * 3) + (3 * 3 + 3)
    counted = sum(parameter.numel() for parameter in make("two stages", architecture).parameters())
    assert counted == encoder[architecture] + decoder


@every_network
def test_feature_maps_have_as_many_values_as_planned(name: str, architecture: str) -> None:
    """Counted at every convolution and, as the budgets do, once at a skip that changes, and at one head alone."""
    network = make(name, architecture)
    counts = []
    for path, module in network.named_modules():
        # The skip as a whole counts, its parts do not; one that is empty is the identity.
        is_skip = path.endswith(".skip") and len(list(module.children())) > 0
        is_convolution = isinstance(module, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d))
        is_lower_head = path.startswith("heads.") and path != "heads.0"
        if is_skip or (is_convolution and ".skip." not in path and not is_lower_head):
            module.register_forward_hook(lambda module, inputs, output: counts.append(output.numel()))
    with torch.no_grad():
        network.train()(torch.randn(1, 2, *SIZES[name]))
    plan = replace(PLANS[name], architecture=architecture)
    assert sum(counts) == count_feature_map_values(plan, SIZES[name], n_outputs=3)


@every_network
def test_gradient_reaches_every_parameter(name: str, architecture: str) -> None:
    network = make(name, architecture).train()
    outputs = network(torch.randn(2, 2, *SIZES[name]))
    sum((output * torch.randn_like(output)).sum() for output in outputs).backward()
    # The bias of a convolution before an instance norm is subtracted again; all else has an effect.
    cancelled = {
        f"{path}.{index}.bias"
        for path, module in network.named_modules()
        if isinstance(module, nn.Sequential)
        for index, (_, after) in enumerate(pairwise(module.children()))
        if isinstance(after, InstanceNorm)
    }
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter_name in cancelled or parameter.grad.abs().max() > 1e-6, parameter_name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_flat_kernels_do_not_mix_planes_where_nothing_is_strided(architecture: str) -> None:
    plan = replace(
        PLAN_2D,
        architecture=architecture,
        strides=((1, 1, 1), (1, 2, 2), (1, 2, 2)),
        kernel_sizes=((1, 3, 3),) * 3,
    )
    network = build_network(plan, n_channels=1, n_outputs=2).eval()
    for module in network.modules():
        # The norm's mean is over all planes; without it there are the kernels alone.
        for child_name, child in module.named_children():
            if isinstance(child, InstanceNorm):
                setattr(module, child_name, nn.Identity())
    images = torch.randn(1, 1, 4, 8, 8)
    changed = images.clone()
    changed[0, 0, 2] += 1
    with torch.no_grad():
        differs = (network(images) - network(changed)).abs().amax(dim=(0, 1, 3, 4)) > 0
    assert differs.tolist() == [False, False, True, False]


@every_network
def test_weights_and_features_are_channels_last(name: str, architecture: str) -> None:
    network = make(name, architecture).eval()
    layout = channels_last(len(SIZES[name]))
    for path, parameter in network.named_parameters():
        assert parameter.ndim == 1 or parameter.is_contiguous(memory_format=layout), path
    kept = []
    for module_name, module in network.named_modules():
        # Pooling inside a skip may copy; the block must restore the layout.
        if module_name and ".skip" not in module_name and not isinstance(module, nn.ModuleList):
            module.register_forward_hook(
                lambda module, inputs, output: kept.append(output.is_contiguous(memory_format=layout))
            )
    images = torch.randn(2, 2, *SIZES[name])
    with torch.no_grad():
        output = network(images)
        assert len(kept) > 10
        assert all(kept)
        torch.testing.assert_close(output, network(images.contiguous(memory_format=layout)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_are_drawn_for_the_leaky_relu(architecture: str) -> None:
    """He et al. 2015: the variance of a weight is 2 / (1 + slope^2) / fan_in."""
    plan = replace(TWO_STAGES, architecture=architecture, features=(32, 64))
    torch.manual_seed(0)
    network = build_network(plan, n_channels=1, n_outputs=2)
    weight = next(parameter for parameter in network.parameters() if parameter.shape == (64, 32, 3, 3, 3))
    expected = (2 / (1 + 0.01**2) / (32 * 27)) ** 0.5
    assert float(weight.detach().std()) == pytest.approx(expected, rel=0.02)
    biases = [parameter for name, parameter in network.named_parameters() if name.endswith("bias")]
    assert not any(bias.any() for bias in biases)


def test_unknown_architecture() -> None:
    with pytest.raises(PlanError, match="architecture 'u-net' is unknown; known are unet, resenc_unet"):
        build_network(replace(PLAN_2D, architecture="u-net"), n_channels=1, n_outputs=2)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "stride"), [((3, 3, 3), (1, 1, 1)), ((3, 3, 3), (1, 2, 2)), ((1, 3, 3), (1, 1, 1))])
def test_weights_get_the_right_gradient_in_bfloat16_however_thin_the_input(
    depth: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 32, depth, 6, 6, generator=generator).to(memory_format=channels_last(3))
    z, y, x = (edge // 2 for edge in kernel)
    convolution = Conv3d(32, 32, kernel, stride=stride, padding=(z, y, x))
    convolution.to(memory_format=channels_last(3))  # type: ignore[call-overload]
    expected = nn.functional.conv3d(
        features, convolution.weight, convolution.bias, stride=stride, padding=convolution.padding
    )
    wanted = torch.randn(expected.shape, generator=generator)
    (exact,) = torch.autograd.grad(expected, convolution.weight, wanted)
    for _ in range(5):
        # What freed memory holds is what a kernel that reads beyond its input would find.
        junk = [torch.full((size,), float("nan")) for size in (1_000, 10_000, 100_000, 1_000_000)]
        del junk
        convolution.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = convolution(features)
        output.backward(wanted.to(output.dtype))
        assert convolution.weight.grad is not None
        assert (output.float() - expected).norm() < 0.01 * expected.norm()
        assert (convolution.weight.grad - exact).norm() < 0.01 * exact.norm()

"""The U-Net with a residual encoder.

Isensee et al., "nnU-Net Revisited: A Call for Rigorous Validation in 3D Medical Image Segmentation", MICCAI 2024. The
skips are those of ResNet-D: He et al., "Bag of Tricks for Image Classification with Convolutional Neural Networks",
CVPR 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoseg.networks.unet import NEGATIVE_SLOPE, NORM_EPS, ConvBlock, InstanceNorm, UNet, make_convolution
from autoseg.planning.plan import NetworkPlan

_AVERAGE_POOL: dict[int, Callable[..., Tensor]] = {2: F.avg_pool2d, 3: F.avg_pool3d}


class AveragePool(nn.Module):
    """Means of blocks, (N, C, [Z,] Y, X) to (N, C, [Z / step,] Y / step, X / step); repeatable where asked."""

    def __init__(self, stride: Sequence[int]) -> None:
        super().__init__()
        self.stride = tuple(stride)

    def forward(self, features: Tensor) -> Tensor:
        """The means."""
        if features.is_cuda and torch.are_deterministic_algorithms_enabled():
            # torch has no backward pass of its pooling there that repeats bit for bit.
            return self.by_blocks(features)
        return _AVERAGE_POOL[len(self.stride)](features, self.stride)

    def by_blocks(self, features: Tensor) -> Tensor:
        """The same by reshaping; the sizes must be multiples of the stride, as those of planned patches are."""
        for axis, step in reversed(list(enumerate(self.stride, start=2))):
            features = features.unflatten(axis, (-1, step))
        return features.mean(dim=tuple(range(3, features.ndim, 2)))


class ResidualBlock(nn.Module):
    """Two convolutions with norms, added to a skip, then a leaky ReLU; (N, in, ...) to (N, out, ...).

    The skip is pooled where the block has a stride, projected where it changes the channels, else the input itself. The
    last norm starts with a scale of zero, so that a fresh block passes its skip on.
    """

    def __init__(
        self, n_in: int, n_out: int, *, kernel_size: Sequence[int], stride: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        last_norm = InstanceNorm(n_out, eps=NORM_EPS)
        nn.init.zeros_(last_norm.weight)
        self.body = nn.Sequential(
            ConvBlock(n_in, n_out, kernel_size=kernel_size, stride=stride),
            make_convolution(n_out, n_out, kernel_size=kernel_size),
            last_norm,
        )
        self.skip = nn.Sequential()
        if stride and any(step != 1 for step in stride):
            self.skip.append(AveragePool(stride))
        if n_in != n_out:
            self.skip.append(make_convolution(n_in, n_out, kernel_size=(1,) * len(kernel_size), bias=False))
            self.skip.append(InstanceNorm(n_out, eps=NORM_EPS))

    def forward(self, features: Tensor) -> Tensor:
        """(N, in, [Z,] Y, X) to (N, out, [Z',] Y', X')."""
        # The body comes first: a sum takes the layout of its first operand, and pooling over three axes loses it.
        return F.leaky_relu(self.body(features) + self.skip(features), NEGATIVE_SLOPE, inplace=True)


def _residual_stage(
    n_in: int, n_out: int, *, n_blocks: int, kernel_size: Sequence[int], stride: Sequence[int]
) -> nn.Sequential:
    """`n_blocks` blocks, of which the first changes channels and resolution."""
    first = ResidualBlock(n_in, n_out, kernel_size=kernel_size, stride=stride)
    return nn.Sequential(first, *(ResidualBlock(n_out, n_out, kernel_size=kernel_size) for _ in range(n_blocks - 1)))


def make_residual_unet(plan: NetworkPlan, *, n_channels: int, n_outputs: int) -> UNet:
    """The U-Net whose encoder is a convolution as its stem, then `plan.encoder_blocks` residual blocks per stage.

    Args:
        plan: stages, features, strides and kernels.
        n_channels: of the input.
        n_outputs: channels of the output: the classes with the background, or the regions.
    """
    widths = (plan.features[0], *plan.features)
    stages = zip(plan.encoder_blocks, plan.kernel_sizes, plan.strides, strict=True)
    encoder = [
        _residual_stage(widths[i], widths[i + 1], n_blocks=blocks, kernel_size=kernel, stride=stride)
        for i, (blocks, kernel, stride) in enumerate(stages)
    ]
    encoder[0].insert(0, ConvBlock(n_channels, plan.features[0], kernel_size=plan.kernel_sizes[0]))
    return UNet(encoder, plan, n_outputs=n_outputs)

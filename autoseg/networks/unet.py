"""The U-Net of the published method, built from a `NetworkPlan`: the parts that all encoders share, and the plain one.

Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation", Nature
Methods 2021; Ronneberger et al., "U-Net", MICCAI 2015.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoseg.planning.plan import NetworkPlan

NEGATIVE_SLOPE = 0.01
NORM_EPS = 1e-5

_TRANSPOSED: dict[int, Callable[..., nn.Module]] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class InstanceNorm(nn.Module):
    """Instance norm with a weight and a bias per channel, which keeps the channels-last layout on a CPU.

    There torch's own copies to channels-first, and the convolutions around it have to copy back.
    """

    def __init__(self, n_channels: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_channels))
        self.bias = nn.Parameter(torch.zeros(n_channels))
        self.eps = eps

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, [Z,] Y, X) to the same shape; zero mean and unit variance in each channel of each sample."""
        if features.device.type != "cpu":
            return F.instance_norm(features, weight=self.weight, bias=self.bias, eps=self.eps)
        normed = [
            F.batch_norm(sample, None, None, self.weight, self.bias, training=True, eps=self.eps)
            for sample in features.split(1)
        ]
        return normed[0] if len(normed) == 1 else torch.cat(normed)


class Conv3d(nn.Conv3d):
    """A convolution whose weights get the right gradient in bfloat16 on a CPU, too, where the input is two voxels deep.

    Where it pads that axis itself, oneDNN (3.12, of torch 2.13) reads memory there that nobody has written.
    """

    def forward(self, features: Tensor) -> Tensor:
        """(N, in, Z, Y, X) to (N, out, Z', Y', X')."""
        if features.device.type != "cpu" or features.shape[2] != 2 or self.padding[0] == 0:
            return super().forward(features)
        depth, *plane = (int(edge) for edge in self.padding)
        padded = F.pad(features, (0, 0, 0, 0, depth, depth))
        return F.conv3d(
            padded, self.weight, self.bias, self.stride, (0, *plane), dilation=self.dilation, groups=self.groups
        )


_CONVOLUTION: dict[int, Callable[..., nn.Module]] = {2: nn.Conv2d, 3: Conv3d}


def make_convolution(
    n_in: int,
    n_out: int,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int] | None = None,
    bias: bool = True,
) -> nn.Module:
    """A convolution of 2 or 3 axes, padded so that the stride alone changes the size; (N, in, ...) to (N, out, ...)."""
    n_axes = len(kernel_size)
    return _CONVOLUTION[n_axes](
        n_in,
        n_out,
        tuple(kernel_size),
        stride=tuple(stride or (1,) * n_axes),
        padding=tuple(edge // 2 for edge in kernel_size),
        bias=bias,
    )


class ConvBlock(nn.Sequential):
    """Convolution, instance norm, leaky ReLU; (N, in, ...) to (N, out, ...)."""

    def __init__(
        self, n_in: int, n_out: int, *, kernel_size: Sequence[int], stride: Sequence[int] | None = None
    ) -> None:
        super().__init__(
            make_convolution(n_in, n_out, kernel_size=kernel_size, stride=stride),
            InstanceNorm(n_out, eps=NORM_EPS),
            nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True),
        )


def _conv_stage(
    n_in: int, n_out: int, *, n_blocks: int, kernel_size: Sequence[int], stride: Sequence[int] | None = None
) -> nn.Sequential:
    """`n_blocks` convolutions, of which the first changes channels and resolution."""
    first = ConvBlock(n_in, n_out, kernel_size=kernel_size, stride=stride)
    return nn.Sequential(first, *(ConvBlock(n_out, n_out, kernel_size=kernel_size) for _ in range(n_blocks - 1)))


class UNet(nn.Module):
    """A U-Net around any encoder.

    Decoder outputs come from the highest resolution down; while training all of them but the lowest are returned for
    deep supervision, otherwise the first alone.
    """

    def __init__(self, encoder: Iterable[nn.Module], plan: NetworkPlan, *, n_outputs: int) -> None:
        """Adds the decoder, and draws the weights of all convolutions.

        Args:
            encoder: one module per stage; each takes the output of the one before, and makes the features and the
                resolution that the plan wants of its stage.
            plan: stages, features, strides and kernels.
            n_outputs: channels of the output: the classes with the background, or the regions.
        """
        super().__init__()
        n_axes = len(plan.strides[0])
        self.encoder = nn.ModuleList(encoder)
        # Lists of the decoder run from the highest resolution to the lowest, as the encoder's do.
        self.upsamplers = nn.ModuleList(
            _TRANSPOSED[n_axes](
                plan.features[i + 1], plan.features[i], tuple(plan.strides[i + 1]), tuple(plan.strides[i + 1])
            )
            for i in range(len(plan.features) - 1)
        )
        self.decoder = nn.ModuleList(
            _conv_stage(2 * plan.features[i], plan.features[i], n_blocks=blocks, kernel_size=plan.kernel_sizes[i])
            for i, blocks in enumerate(plan.decoder_blocks)
        )
        # The lowest decoder output is not supervised, unless it is the only one.
        n_heads = max(1, len(plan.decoder_blocks) - 1)
        self.heads = nn.ModuleList(_CONVOLUTION[n_axes](width, n_outputs, 1) for width in plan.features[:n_heads])
        self.apply(_initialise)

    def forward(self, images: Tensor) -> list[Tensor] | Tensor:
        """Segments a batch.

        Args:
            images: (N, C, [Z,] Y, X), every axis divisible by the plan's divisor.

        Returns:
            While training, logits (N, K, [Z,] Y, X) at full, half, ... resolution; else those at full resolution.
        """
        skips = []
        features = images
        for stage in self.encoder:
            features = stage(features)
            skips.append(features)
        outputs: list[Tensor] = []
        for level in reversed(range(len(self.decoder))):
            features = torch.cat((self.upsamplers[level](features), skips[level]), dim=1)
            features = self.decoder[level](features)
            if level < len(self.heads) and (self.training or level == 0):
                outputs.append(self.heads[level](features))
        return outputs[::-1] if self.training else outputs[0]


def make_plain_unet(plan: NetworkPlan, *, n_channels: int, n_outputs: int) -> UNet:
    """The U-Net whose encoder is `plan.encoder_blocks` convolutions per stage.

    Args:
        plan: stages, features, strides and kernels.
        n_channels: of the input.
        n_outputs: channels of the output: the classes with the background, or the regions.
    """
    widths = (n_channels, *plan.features)
    stages = zip(plan.encoder_blocks, plan.kernel_sizes, plan.strides, strict=True)
    encoder = [
        _conv_stage(widths[i], widths[i + 1], n_blocks=blocks, kernel_size=kernel, stride=stride)
        for i, (blocks, kernel, stride) in enumerate(stages)
    ]
    return UNet(encoder, plan, n_outputs=n_outputs)


def _initialise(module: nn.Module) -> None:
    """He initialisation for the leaky ReLU; biases start at zero."""
    if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        nn.init.kaiming_normal_(module.weight, a=NEGATIVE_SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

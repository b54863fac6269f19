"""What a network costs, stage by stage, without building it: parameters, feature-map values and multiply-adds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from autoseg.planning.memory import count_values_per_stage, size_per_stage
from autoseg.planning.plan import ConfigurationPlan, NetworkPlan


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One resolution of a U-Net: its part of the encoder, its part of the decoder, and its segmentation layer.

    The transposed convolution that leads from the next coarser resolution up to this one belongs to this stage, as the
    convolution with a stride that leads down to it does.

    Attributes:
        index: 0 at full resolution.
        patch_size: in voxels of this stage.
        spacing_mm: of this stage.
        features: channels.
        stride: down-sampling at the entrance of the encoder's part.
        kernel_size: of the convolutions.
        encoder_blocks: convolutions or residual blocks of the encoder.
        decoder_blocks: convolutions of the decoder; 0 at the bottleneck.
        n_parameters: weights, biases, and scales and shifts of the norms.
        n_values: feature-map values of one patch, as `autoseg.planning.memory` counts them.
        n_multiply_adds: of the convolutions in one forward pass with one patch, as while training: with the
            segmentation layers of deep supervision.
    """

    index: int
    patch_size: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    features: int
    stride: tuple[int, ...]
    kernel_size: tuple[int, ...]
    encoder_blocks: int
    decoder_blocks: int
    n_parameters: int
    n_values: int
    n_multiply_adds: int


def list_stages(configuration: ConfigurationPlan, *, n_channels: int, n_outputs: int) -> tuple[Stage, ...]:
    """The stages of a configuration's network, from full resolution to the bottleneck.

    Args:
        configuration: with a network of an architecture in `autoseg.planning.memory.ENCODER_COUNTS`.
        n_channels: of the network's input; that of a cascade has the previous prediction too.
        n_outputs: channels of the output: the classes with the background, or the regions.

    Raises:
        PlanError: the architecture is unknown.
    """
    network = configuration.network
    values = count_values_per_stage(network, configuration.patch_size, n_outputs)
    sizes = size_per_stage(network, configuration.patch_size)
    layers = _list_layers(network, n_channels, n_outputs)
    stages = []
    spacing_mm = configuration.spacing_mm
    for i, stride in enumerate(network.strides):
        spacing_mm = tuple(edge_mm * step for edge_mm, step in zip(spacing_mm, stride, strict=True))
        stages.append(
            Stage(
                index=i,
                patch_size=sizes[i],
                spacing_mm=spacing_mm,
                features=network.features[i],
                stride=stride,
                kernel_size=network.kernel_sizes[i],
                encoder_blocks=network.encoder_blocks[i],
                decoder_blocks=(*network.decoder_blocks, 0)[i],
                n_parameters=sum(layer.n_weights + layer.n_offsets for layer in layers[i]),
                n_values=values[i],
                n_multiply_adds=sum(layer.n_weights * prod(sizes[layer.stage]) for layer in layers[i]),
            )
        )
    return tuple(stages)


class _Layer(NamedTuple):
    """A convolution, and the norm behind it.

    Attributes:
        stage: index of the stage for each of whose voxels every weight is used once.
        n_weights: of the kernel.
        n_offsets: biases, and scales and shifts of the norm.
    """

    stage: int
    n_weights: int
    n_offsets: int


def _convolution(stage: int, n_in: int, n_out: int, kernel_size: tuple[int, ...]) -> _Layer:
    """With a bias and a norm."""
    return _Layer(stage, n_in * n_out * prod(kernel_size), 3 * n_out)


def _list_layers(network: NetworkPlan, n_channels: int, n_outputs: int) -> list[list[_Layer]]:
    """All layers of each stage."""
    features, n_stages = network.features, len(network.features)
    layers = [ENCODER_LAYERS[network.architecture](network, i, n_channels) for i in range(n_stages)]
    for i, n_blocks in enumerate(network.decoder_blocks):
        n_out, kernel = features[i], network.kernel_sizes[i]
        # A transposed convolution whose kernel is its stride writes each voxel once: it runs over those of its input.
        layers[i].append(_Layer(i + 1, features[i + 1] * n_out * prod(network.strides[i + 1]), n_out))
        layers[i].append(_convolution(i, 2 * n_out, n_out, kernel))
        layers[i] += [_convolution(i, n_out, n_out, kernel)] * (n_blocks - 1)
    # The lowest decoder stage has a segmentation layer only where it is the only one.
    for i in range(max(1, n_stages - 2)):
        layers[i].append(_Layer(i, features[i] * n_outputs, n_outputs))
    return layers


def _list_plain_encoder(network: NetworkPlan, stage: int, n_channels: int) -> list[_Layer]:
    """The convolutions of one stage."""
    n_in, n_out = (n_channels, *network.features)[stage : stage + 2]
    kernel = network.kernel_sizes[stage]
    others = [_convolution(stage, n_out, n_out, kernel)] * (network.encoder_blocks[stage] - 1)
    return [_convolution(stage, n_in, n_out, kernel), *others]


def _list_residual_encoder(network: NetworkPlan, stage: int, n_channels: int) -> list[_Layer]:
    """The two convolutions of each block of one stage, the projection of the first one's skip, and the stem."""
    n_in, n_out = (network.features[0], *network.features)[stage : stage + 2]
    kernel = network.kernel_sizes[stage]
    layers = [_convolution(stage, n_in, n_out, kernel)]
    layers += [_convolution(stage, n_out, n_out, kernel)] * (2 * network.encoder_blocks[stage] - 1)
    if n_in != n_out:
        layers.append(_Layer(stage, n_in * n_out, 2 * n_out))
    if stage == 0:
        layers.append(_convolution(stage, n_channels, n_out, kernel))
    return layers


ENCODER_LAYERS: dict[str, Callable[[NetworkPlan, int, int], list[_Layer]]] = {
    "unet": _list_plain_encoder,
    "resenc_unet": _list_residual_encoder,
}
"""How to list the layers of one encoder stage of each architecture, from the network, the stage and the input."""

"""How much memory a network needs to train, without building it: the number of values in its feature maps.

Feature maps take nearly all the memory of training a U-Net, and their number follows from the plan alone. What one
value costs is not computed but calibrated: a preset names the number of values that was seen to fit its GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from autoseg.core.errors import PlanError
from autoseg.planning.plan import NetworkPlan


def count_feature_map_values(network: NetworkPlan, patch_size: tuple[int, ...], n_outputs: int) -> int:
    """Values in the feature maps of one forward pass with one patch.

    Counted are the outputs of all convolutions and transposed convolutions, and of the segmentation layer of full
    resolution. Those of the lower decoder stages are left out: the budgets of the presets were calibrated without them.

    Args:
        network: the network, of an architecture in `ENCODER_COUNTS`.
        patch_size: in voxels, divisible by the network's strides.
        n_outputs: channels of the output: the classes with the background, or the regions.

    Returns:
        The number of values, for a batch of one.

    Raises:
        PlanError: the architecture is unknown.
    """
    return sum(count_values_per_stage(network, patch_size, n_outputs))


def count_values_per_stage(network: NetworkPlan, patch_size: tuple[int, ...], n_outputs: int) -> list[int]:
    """The same per stage: what encoder, decoder and segmentation layer put out at its resolution."""
    if network.architecture not in ENCODER_COUNTS:
        raise PlanError(
            f"network: no memory estimate for architecture '{network.architecture}'; "
            f"known are {', '.join(ENCODER_COUNTS)}"
        )
    encoder = ENCODER_COUNTS[network.architecture](network)
    # The convolutions of a decoder stage, and the transposed convolution that leads to it; the bottleneck has neither.
    decoder = [1 + n_blocks for n_blocks in network.decoder_blocks] + [0]
    voxels = [prod(size) for size in size_per_stage(network, patch_size)]
    values = [(e + d) * f * v for e, d, f, v in zip(encoder, decoder, network.features, voxels, strict=True)]
    values[0] += n_outputs * voxels[0]
    return values


def size_per_stage(network: NetworkPlan, patch_size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The patch in voxels of each stage, from the input to the bottleneck."""
    size, sizes = patch_size, []
    for stride in network.strides:
        size = tuple(edge // step for edge, step in zip(size, stride, strict=True))
        sizes.append(size)
    return sizes


def _count_plain(network: NetworkPlan) -> Sequence[int]:
    """One output per convolution."""
    return network.encoder_blocks


def _count_residual(network: NetworkPlan) -> Sequence[int]:
    """A stem, then two outputs per block, and one for the skip where its channels or its size change."""
    features_in = (network.features[0], *network.features[:-1])
    per_stage = zip(network.encoder_blocks, features_in, network.features, network.strides, strict=True)
    counts = [
        2 * n_blocks + (n_in != n_out or any(step != 1 for step in stride))
        for n_blocks, n_in, n_out, stride in per_stage
    ]
    counts[0] += 1
    return counts


ENCODER_COUNTS: dict[str, Callable[[NetworkPlan], Sequence[int]]] = {
    "unet": _count_plain,
    "resenc_unet": _count_residual,
}
"""How many outputs the encoder of each architecture has per stage, each with the channels and the size of its stage."""

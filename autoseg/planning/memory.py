"""How much memory a network needs to train, without building it: the number of values in its feature maps.

Feature maps take nearly all the memory of training a U-Net, and their number follows from the plan alone. What one
value costs is not computed but calibrated: a preset names the number of values that was seen to fit its GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from autoseg.core.errors import PlanError
from autoseg.planning.plan import NetworkPlan


def count_feature_map_values(network: NetworkPlan, patch_size: tuple[int, ...], n_classes: int) -> int:
    """Values in the feature maps of one forward pass with one patch.

    Counted are the outputs of all convolutions and transposed convolutions, and of the segmentation layer of full
    resolution. Those of the lower decoder stages are left out: the budgets of the presets were calibrated without them.

    Args:
        network: the network, of an architecture in `ENCODER_COUNTS`.
        patch_size: in voxels, divisible by the network's strides.
        n_classes: channels of the output, the background included.

    Returns:
        The number of values, for a batch of one.

    Raises:
        PlanError: the architecture is unknown.
    """
    if network.architecture not in ENCODER_COUNTS:
        raise PlanError(
            f"network: no memory estimate for architecture '{network.architecture}'; "
            f"known are {', '.join(ENCODER_COUNTS)}"
        )
    voxels = _voxels_per_stage(network, patch_size)
    return ENCODER_COUNTS[network.architecture](network, voxels) + _count_decoder(network, voxels, n_classes)


def _voxels_per_stage(network: NetworkPlan, patch_size: tuple[int, ...]) -> list[int]:
    size, voxels = patch_size, []
    for stride in network.strides:
        size = tuple(edge // step for edge, step in zip(size, stride, strict=True))
        voxels.append(prod(size))
    return voxels


def _count_plain_encoder(network: NetworkPlan, voxels: list[int]) -> int:
    """One output per convolution."""
    return sum(n * f * v for n, f, v in zip(network.encoder_blocks, network.features, voxels, strict=True))


def _count_residual_encoder(network: NetworkPlan, voxels: list[int]) -> int:
    """A stem, then two outputs per block, and one for the projection of the skip where its shape changes."""
    total = network.features[0] * voxels[0]
    previous_features = network.features[0]
    for n_blocks, features, stride, n_voxels in zip(
        network.encoder_blocks, network.features, network.strides, voxels, strict=True
    ):
        has_projection = features != previous_features or any(step != 1 for step in stride)
        total += (2 * n_blocks + has_projection) * features * n_voxels
        previous_features = features
    return total


def _count_decoder(network: NetworkPlan, voxels: list[int], n_classes: int) -> int:
    """Per stage the transposed convolution and the convolutions; once the segmentation layer."""
    per_stage = zip(network.decoder_blocks, network.features[:-1], voxels[:-1], strict=True)
    return sum((1 + n) * f * v for n, f, v in per_stage) + n_classes * voxels[0]


ENCODER_COUNTS: dict[str, Callable[[NetworkPlan, list[int]], int]] = {
    "unet": _count_plain_encoder,
    "resenc_unet": _count_residual_encoder,
}
"""How to count the encoder of each architecture, from the network and its voxels per stage."""

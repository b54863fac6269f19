"""The cost of a network by formula, against the network itself."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from autoseg.core.errors import PlanError
from autoseg.networks.build import ARCHITECTURES, build_network
from autoseg.planning.cost import list_stages
from autoseg.planning.memory import count_feature_map_values
from autoseg.planning.plan import ConfigurationPlan, NetworkPlan


def configure(network: NetworkPlan, patch_size: tuple[int, ...], spacing_mm: tuple[float, ...]) -> ConfigurationPlan:
    shape = tuple(float(edge) for edge in patch_size)
    return ConfigurationPlan(
        name="3d_fullres" if len(patch_size) == 3 else "2d",
        spacing_mm=spacing_mm,
        median_shape=shape,
        largest_shape=shape,
        patch_size=patch_size,
        batch_size=2,
        lowres_axis=None,
        batch_dice=False,
        previous=None,
        network=network,
    )


CONFIGURATIONS = {
    "2d": configure(
        NetworkPlan(
            architecture="unet",
            features=(32, 64, 128, 256, 512, 512, 512),
            strides=((1, 1),) + ((2, 2),) * 5 + ((2, 1),),
            kernel_sizes=((3, 3),) * 7,
            encoder_blocks=(2,) * 7,
            decoder_blocks=(2,) * 6,
        ),
        patch_size=(512, 256),
        spacing_mm=(0.75, 0.75),
    ),
    "3d": configure(
        NetworkPlan(
            architecture="unet",
            features=(32, 64, 128, 256, 320, 320),
            strides=((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 1)),
            kernel_sizes=((1, 3, 3),) * 2 + ((3, 3, 3),) * 4,
            encoder_blocks=(1, 3, 4, 6, 6, 6),
            decoder_blocks=(1, 2, 1, 3, 1),
        ),
        patch_size=(20, 256, 192),
        spacing_mm=(3.0, 0.5, 0.5),
    ),
    "two stages": configure(
        NetworkPlan(
            architecture="unet",
            features=(3, 5),
            strides=((1, 1, 1), (2, 2, 1)),
            kernel_sizes=((3, 3, 1), (3, 3, 3)),
            encoder_blocks=(1, 1),
            decoder_blocks=(1,),
        ),
        patch_size=(4, 6, 8),
        spacing_mm=(1.0, 1.0, 2.0),
    ),
}


@pytest.mark.parametrize(("name", "architecture"), list(product(CONFIGURATIONS, ARCHITECTURES)))
def test_stages_add_up_to_the_network(name: str, architecture: str) -> None:
    network = replace(CONFIGURATIONS[name].network, architecture=architecture)
    configuration = replace(CONFIGURATIONS[name], network=network)
    stages = list_stages(configuration, n_channels=4, n_outputs=3)
    # Tensors without memory: the shapes alone are computed.
    with torch.device("meta"), FlopCounterMode(display=False) as flops:
        module = build_network(network, n_channels=4, n_outputs=3).train()
        module(torch.empty(1, 4, *configuration.patch_size))
    assert sum(stage.n_parameters for stage in stages) == sum(p.numel() for p in module.parameters())
    assert 2 * sum(stage.n_multiply_adds for stage in stages) == flops.get_total_flops()
    values = count_feature_map_values(network, configuration.patch_size, n_outputs=3)
    assert sum(stage.n_values for stage in stages) == values


def test_each_part_belongs_to_its_resolution() -> None:
    """By hand for 2 channels and 4 classes: 192 voxels with kernels of 9 weights above, 48 with 27 below."""
    upper, lower = list_stages(CONFIGURATIONS["two stages"], n_channels=2, n_outputs=4)
    assert (upper.index, lower.index) == (0, 1)
    assert (upper.patch_size, lower.patch_size) == ((4, 6, 8), (2, 3, 8))
    assert (upper.spacing_mm, lower.spacing_mm) == ((1.0, 1.0, 2.0), (2.0, 2.0, 2.0))
    assert (upper.features, lower.features) == (3, 5)
    assert (upper.stride, lower.stride) == ((1, 1, 1), (2, 2, 1))
    assert (upper.kernel_size, lower.kernel_size) == ((3, 3, 1), (3, 3, 3))
    assert (upper.encoder_blocks, upper.decoder_blocks) == (1, 1)
    assert (lower.encoder_blocks, lower.decoder_blocks) == (1, 0)
    # Encoder, transposed convolution, decoder, segmentation layer; then the bottleneck.
    assert upper.n_parameters == (2 * 3 * 9 + 9) + (5 * 3 * 4 + 3) + (6 * 3 * 9 + 9) + (3 * 4 + 4)
    assert lower.n_parameters == 3 * 5 * 27 + 15
    assert upper.n_multiply_adds == 192 * (2 * 3 * 9 + 5 * 3 + 6 * 3 * 9 + 3 * 4)
    assert lower.n_multiply_adds == 48 * 3 * 5 * 27
    assert upper.n_values == 192 * (3 + 3 + 3 + 4)
    assert lower.n_values == 48 * 5


def test_unknown_architecture() -> None:
    configuration = CONFIGURATIONS["2d"]
    unknown = replace(configuration, network=replace(configuration.network, architecture="swin"))
    with pytest.raises(PlanError, match=r"'swin'.*known are unet"):
        list_stages(unknown, n_channels=1, n_outputs=2)

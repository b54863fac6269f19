"""The number of feature-map values, counted by hand for networks of two stages."""

from __future__ import annotations

import dataclasses

import pytest

from autoseg.core.errors import PlanError
from autoseg.planning.memory import count_feature_map_values
from autoseg.planning.plan import NetworkPlan

PLAIN = NetworkPlan(
    architecture="unet",
    features=(32, 64),
    strides=((1, 1, 1), (1, 2, 2)),
    kernel_sizes=((1, 3, 3), (3, 3, 3)),
    encoder_blocks=(2, 2),
    decoder_blocks=(2,),
)


def test_plain_encoder() -> None:
    # 4 x 8 x 8 = 256 voxels above, 4 x 4 x 4 = 64 below.
    encoder = 2 * 32 * 256 + 2 * 64 * 64
    decoder = (1 + 2) * 32 * 256 + 5 * 256
    assert count_feature_map_values(PLAIN, (4, 8, 8), n_outputs=5) == encoder + decoder


def test_residual_encoder() -> None:
    network = dataclasses.replace(PLAIN, architecture="resenc_unet", encoder_blocks=(1, 3), decoder_blocks=(1,))
    stem, first = 32 * 256, 2 * 32 * 256
    second = (2 * 3 + 1) * 64 * 64
    decoder = (1 + 1) * 32 * 256 + 5 * 256
    assert count_feature_map_values(network, (4, 8, 8), n_outputs=5) == stem + first + second + decoder


def test_residual_projection_is_counted_where_only_the_size_changes() -> None:
    network = NetworkPlan(
        architecture="resenc_unet",
        features=(32, 32),
        strides=((1, 1), (2, 2)),
        kernel_sizes=((3, 3), (3, 3)),
        encoder_blocks=(1, 1),
        decoder_blocks=(1,),
    )
    assert count_feature_map_values(network, (8, 8), n_outputs=2) == 32 * 64 * 3 + 3 * 32 * 16 + 2 * 32 * 64 + 2 * 64


def test_segmentation_layers_below_full_resolution_are_not_counted() -> None:
    def difference(network: NetworkPlan, patch: tuple[int, ...]) -> int:
        return count_feature_map_values(network, patch, 3) - count_feature_map_values(network, patch, 2)

    deeper = NetworkPlan(
        architecture="unet",
        features=(32, 64, 128),
        strides=((1, 1), (2, 2), (2, 2)),
        kernel_sizes=((3, 3),) * 3,
        encoder_blocks=(2,) * 3,
        decoder_blocks=(2,) * 2,
    )
    assert difference(deeper, (16, 16)) == 16 * 16


def test_unknown_architecture() -> None:
    with pytest.raises(PlanError, match=r"'swin'.*known are unet"):
        count_feature_map_values(dataclasses.replace(PLAIN, architecture="swin"), (4, 8, 8), 2)

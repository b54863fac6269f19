"""The residual block and its skip."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoseg.networks.build import channels_last
from autoseg.networks.residual import AveragePool, ResidualBlock


def draw(n_channels: int, size: tuple[int, ...]) -> Tensor:
    features = torch.randn(2, n_channels, *size, generator=torch.Generator().manual_seed(0))
    return features.contiguous(memory_format=channels_last(len(size)))


def test_a_fresh_block_is_its_skip() -> None:
    features = draw(4, (4, 6, 8))
    with torch.no_grad():
        same = ResidualBlock(4, 4, kernel_size=(3, 3, 3))(features)
        torch.testing.assert_close(same, F.leaky_relu(features, 0.01))
        unstrided = ResidualBlock(4, 4, kernel_size=(3, 3, 3), stride=(1, 1, 1))(features)
        torch.testing.assert_close(unstrided, same)
        pooled = ResidualBlock(4, 4, kernel_size=(1, 3, 3), stride=(1, 2, 2))(features)
        torch.testing.assert_close(pooled, F.leaky_relu(F.avg_pool3d(features, (1, 2, 2)), 0.01))


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_a_skip_to_other_channels_is_projected_and_normalized(stride: tuple[int, int]) -> None:
    features = draw(3, (8, 8))
    block = ResidualBlock(3, 5, kernel_size=(3, 3), stride=stride)
    (projection,) = (module for module in block.skip.modules() if isinstance(module, nn.Conv2d))
    assert projection.bias is None
    assert projection.weight.shape == (5, 3, 1, 1)
    with torch.no_grad():
        projected = torch.einsum("nchw,kc->nkhw", F.avg_pool2d(features, stride), projection.weight[:, :, 0, 0])
        expected = F.leaky_relu(F.instance_norm(projected), 0.01)
        torch.testing.assert_close(block(features), expected, atol=1e-5, rtol=1e-4)


def test_body_is_added_before_the_last_activation() -> None:
    """With a skip of ones and a body that is one shift, the sum is -1, of which the leaky ReLU leaves a hundredth."""
    block = ResidualBlock(2, 2, kernel_size=(3, 3))
    nn.init.constant_(block.get_parameter("body.2.bias"), -2)
    with torch.no_grad():
        torch.testing.assert_close(block(torch.ones(1, 2, 4, 4)), torch.full((1, 2, 4, 4), -0.01))


@pytest.mark.parametrize("stride", [(2, 2), (1, 2), (2, 2, 2), (1, 2, 2)])
def test_pooling_by_blocks_is_average_pooling(stride: tuple[int, ...]) -> None:
    """What deterministic training on a GPU uses in place of torch's pooling."""
    pool = AveragePool(stride)
    features = torch.randn(2, 3, *(4 * step for step in stride), requires_grad=True)
    torch.testing.assert_close(pool.by_blocks(features), pool(features))
    weights = torch.randn_like(pool(features))
    gradients = [torch.autograd.grad((run(features) * weights).sum(), features)[0] for run in (pool, pool.by_blocks)]
    torch.testing.assert_close(*gradients)

"""One step of training: which loss, how large a change, and when there is none."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_plans import make_tiny_configuration
from torch import Tensor

from autoseg.networks.build import build_network
from autoseg.training.learner import Learner
from autoseg.training.losses import deep_supervision_loss
from autoseg.training.recipe import RECIPES

pytestmark = pytest.mark.usefixtures("one_thread")


def make_learner(*, recipe: str = "fast", batch_dice: bool = False, precision: str = "float32") -> Learner:
    """Always with the same weights, of two outputs of three classes."""
    torch.manual_seed(0)
    configuration = make_tiny_configuration((16, 16), features=(4, 8, 8), batch_dice=batch_dice)
    return Learner(
        build_network(configuration.network, n_channels=1, n_outputs=3),
        configuration,
        recipe=RECIPES[recipe],
        device=torch.device("cpu"),
        precision=precision,
    )


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Two patches, in one of which there is much more of everything."""
    generator = torch.Generator().manual_seed(1)
    classes = torch.randint(3, (2, 16, 16), generator=generator)
    classes[1, 2:] = 0
    return torch.randn(2, 1, 16, 16, generator=generator), classes


def weights_of(learner: Learner) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in learner.network.parameters()])


def test_the_configuration_says_over_what_dice_is_taken(batch: tuple[Tensor, Tensor]) -> None:
    images, classes = batch
    losses = []
    for batch_dice in (False, True):
        learner = make_learner(batch_dice=batch_dice)
        loss = learner.loss(images, classes)
        expected = deep_supervision_loss(learner.network(images), classes, batch_dice=batch_dice)
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
        losses.append(float(loss.detach()))
    assert abs(losses[0] - losses[1]) > 0.01


def test_large_gradients_are_scaled_down_to_the_norm_of_the_recipe(batch: tuple[Tensor, Tensor]) -> None:
    images, classes = batch

    def change(factor: float) -> Tensor:
        learner = make_learner(recipe="published")
        before = weights_of(learner)
        learner.step(lambda: learner.loss(images, classes) * factor, learning_rate=0.01)
        return weights_of(learner) - before

    large, larger = change(1e4), change(1e6)
    torch.testing.assert_close(large, larger, rtol=1e-3, atol=1e-6)
    # The first step of Nesterov's momentum goes by the gradient and, ahead, by 0.99 of it again.
    assert float(large.norm()) == pytest.approx(0.01 * 1.99 * 12, rel=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gradient_that_is_not_finite_changes_nothing_though_the_loss_is(
    batch: tuple[Tensor, Tensor], precision: str
) -> None:
    learner = make_learner(precision=precision)
    head = learner.network.get_parameter("heads.0.weight")
    before = weights_of(learner)
    losses = []

    def compute_loss() -> Tensor:
        # The square root of zero is zero, its slope infinite.
        loss = learner.loss(*batch) + (head * 0).sum().sqrt()
        losses.append(float(loss.detach()))
        return loss

    assert not math.isfinite(learner.step(compute_loss, learning_rate=0.1))
    assert math.isfinite(losses[0])
    assert torch.equal(weights_of(learner), before)

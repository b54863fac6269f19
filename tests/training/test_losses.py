"""Losses against an independent one-hot implementation and against MONAI."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autoseg.training.losses import (
    DICE_SMOOTH,
    deep_supervision_loss,
    deep_supervision_weights,
    dice_ce_loss,
    nearest_classes,
)


def by_hand(logits: Tensor, classes: Tensor, *, batch_dice: bool) -> Tensor:
    """The same in float64, with a one-hot copy, voxels of a sample in one row."""
    n_classes = logits.shape[1]
    flat = logits.double().flatten(2)
    probabilities = flat.exp() / flat.exp().sum(dim=1, keepdim=True)
    wanted = torch.nn.functional.one_hot(classes.flatten(1), n_classes).permute(0, 2, 1).double()
    cross_entropy = -(wanted * probabilities.log()).sum(dim=1).mean()
    axes = (0, 2) if batch_dice else (2,)
    overlap, size = (probabilities * wanted).sum(axes), probabilities.sum(axes) + wanted.sum(axes)
    dice = (2 * overlap + DICE_SMOOTH) / (size + DICE_SMOOTH)
    return cross_entropy + 1 - dice[..., 1:].mean()


def make_batch(
    shape: tuple[int, ...], *, n_samples: int = 3, n_classes: int = 4, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Logits and classes; the last class does not occur in the first sample."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(n_samples, n_classes, *shape, generator=generator)
    classes = torch.randint(0, n_classes, (n_samples, *shape), generator=generator)
    classes[0] = classes[0].clamp(max=n_classes - 2)
    return logits.to(dtype), classes


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("shape", [(7, 9), (4, 5, 6), (1, 8), (1, 1, 5)])
def test_equals_the_one_hot_formula(shape: tuple[int, ...], batch_dice: bool) -> None:
    logits, classes = make_batch(shape)
    expected = by_hand(logits, classes, batch_dice=batch_dice)
    result = dice_ce_loss(logits, classes, batch_dice=batch_dice)
    assert result.shape == ()
    assert result.dtype == torch.float32
    assert float(result) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("batch_dice", [False, True])
def test_gradient_equals_that_of_the_one_hot_formula(batch_dice: bool) -> None:
    logits, classes = make_batch((4, 5, 6))
    first, second = logits.clone().requires_grad_(), logits.double().requires_grad_()
    dice_ce_loss(first, classes, batch_dice=batch_dice).backward()
    by_hand(second, classes, batch_dice=batch_dice).backward()
    assert first.grad is not None
    assert second.grad is not None
    torch.testing.assert_close(first.grad.double(), second.grad, atol=1e-7, rtol=1e-4)


def test_gradient_equals_finite_differences() -> None:
    logits, classes = make_batch((3, 4), n_samples=2, n_classes=3)
    variable = logits.clone().requires_grad_()
    dice_ce_loss(variable, classes, batch_dice=False).backward()
    assert variable.grad is not None
    step = 1e-2
    for index in [(0, 0, 0, 0), (0, 1, 2, 3), (1, 2, 1, 1), (1, 0, 2, 0)]:
        above, below = logits.clone(), logits.clone()
        above[index] += step
        below[index] -= step
        difference = dice_ce_loss(above, classes, batch_dice=False) - dice_ce_loss(below, classes, batch_dice=False)
        assert float(variable.grad[index]) == pytest.approx(float(difference) / (2 * step), abs=1e-4)


@pytest.mark.parametrize("batch_dice", [False, True])
def test_equals_monai(batch_dice: bool) -> None:
    """MONAI leaves absent classes at 1 - smooth / (predicted + smooth), too, so both definitions coincide."""
    losses = pytest.importorskip("monai.losses")
    logits, classes = make_batch((4, 5, 6))
    monai = losses.DiceCELoss(
        include_background=True,
        to_onehot_y=True,
        softmax=True,
        batch=batch_dice,
        lambda_dice=0.0,
    )(logits, classes[:, None])
    dice = losses.DiceLoss(
        include_background=False,
        to_onehot_y=True,
        softmax=True,
        batch=batch_dice,
        smooth_nr=DICE_SMOOTH,
        smooth_dr=DICE_SMOOTH,
    )(logits, classes[:, None])
    result = dice_ce_loss(logits, classes, batch_dice=batch_dice)
    assert float(result) == pytest.approx(float(monai + dice), abs=1e-5)


def test_batch_dice_differs_where_samples_differ_in_size() -> None:
    logits, classes = make_batch((6, 6))
    classes[1] = 0
    alone, together = (float(dice_ce_loss(logits, classes, batch_dice=flag)) for flag in (False, True))
    assert abs(alone - together) > 0.01
    one_alone, one_together = (float(dice_ce_loss(logits[:1], classes[:1], batch_dice=flag)) for flag in (False, True))
    assert one_alone == pytest.approx(one_together, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_logits(dtype: torch.dtype) -> None:
    logits, classes = make_batch((4, 5, 6), dtype=dtype)
    variable = logits.requires_grad_()
    loss = dice_ce_loss(variable, classes, batch_dice=True)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(by_hand(logits.detach(), classes, batch_dice=True)), abs=1e-4)
    loss.backward()
    assert variable.grad is not None
    assert variable.grad.dtype == dtype
    assert variable.grad.isfinite().all()


def test_perfect_prediction_is_near_zero_and_a_wrong_one_far() -> None:
    _, classes = make_batch((4, 5, 6))
    perfect = 50 * torch.nn.functional.one_hot(classes, 4).movedim(-1, 1).float()
    assert float(dice_ce_loss(perfect, classes, batch_dice=False)) == pytest.approx(0, abs=1e-4)
    wrong = perfect.roll(1, dims=1)
    assert float(dice_ce_loss(wrong, classes, batch_dice=False)) > 40


def test_large_structures_are_summed_exactly() -> None:
    """A running float32 sum of two million probabilities would be off by per cents."""
    logits = torch.zeros(1, 2, 128, 128, 128)
    logits[:, 1] = 3.2
    classes = torch.ones(1, 128, 128, 128, dtype=torch.int64)
    probability = 1 / (1 + torch.tensor(-3.2, dtype=torch.float64).exp())
    expected = -probability.log() + 1 - 2 * probability / (1 + probability)
    assert float(dice_ce_loss(logits, classes, batch_dice=False)) == pytest.approx(float(expected), abs=5e-4)


def test_extreme_logits_stay_finite() -> None:
    logits, classes = make_batch((4, 5))
    variable = (logits * 1e4).requires_grad_()
    loss = dice_ce_loss(variable, classes, batch_dice=False)
    loss.backward()
    assert loss.isfinite()
    assert variable.grad is not None
    assert variable.grad.isfinite().all()


def test_deep_supervision_weights() -> None:
    assert deep_supervision_weights(1) == (1.0,)
    assert deep_supervision_weights(2) == pytest.approx((2 / 3, 1 / 3))
    assert deep_supervision_weights(4) == pytest.approx((8 / 15, 4 / 15, 2 / 15, 1 / 15))


def test_deep_supervision_is_the_weighted_sum() -> None:
    shapes = [(8, 12, 8), (8, 6, 4), (4, 3, 2)]
    outputs = [make_batch(shape)[0] for shape in shapes]
    classes = make_batch(shapes[0])[1]
    parts = [
        by_hand(outputs[0], classes, batch_dice=True),
        by_hand(outputs[1], classes[:, :, 1::2, 1::2], batch_dice=True),
        by_hand(outputs[2], classes[:, 1::2, 2::4, 2::4], batch_dice=True),
    ]
    expected = (4 * parts[0] + 2 * parts[1] + parts[2]) / 7
    result = deep_supervision_loss(outputs, classes, batch_dice=True)
    assert float(result) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("steps", [(1, 1), (2, 2), (1, 4), (2, 1, 8), (3, 2, 1)])
def test_nearest_classes_takes_a_voxel_next_to_the_centre(steps: tuple[int, ...]) -> None:
    low = (3, 2, 4)[: len(steps)]
    full = tuple(size * step for size, step in zip(low, steps, strict=True))
    positions = torch.stack(torch.meshgrid(*(torch.arange(size) for size in full), indexing="ij"))
    for axis, step in enumerate(steps):
        result = nearest_classes(positions[axis][None], low)
        assert result.shape == (1, *low)
        centres = (torch.arange(low[axis]) + 0.5) * step - 0.5
        along = result[0].movedim(axis, 0).flatten(1)
        assert ((along - centres[:, None]).abs() <= 0.5).all()

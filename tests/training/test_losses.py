"""Losses against an independent one-hot implementation and against MONAI."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from autoseg.core.labels import LabelSpec, Region
from autoseg.networks.outputs import Outputs
from autoseg.training import losses
from autoseg.training.losses import (
    deep_supervision_loss,
    deep_supervision_weights,
    dice_bce_loss,
    dice_ce_loss,
    nearest_classes,
    output_loss,
)

SMOOTH = 1e-5


def by_hand(logits: Tensor, classes: Tensor, *, batch_dice: bool) -> Tensor:
    """The same in float64, with a one-hot copy, voxels of a sample in one row."""
    n_classes = logits.shape[1]
    flat = logits.double().flatten(2)
    probabilities = flat.exp() / flat.exp().sum(dim=1, keepdim=True)
    wanted = torch.nn.functional.one_hot(classes.flatten(1), n_classes).permute(0, 2, 1).double()
    cross_entropy = -(wanted * probabilities.log()).sum(dim=1).mean()
    axes = (0, 2) if batch_dice else (2,)
    overlap, size = (probabilities * wanted).sum(axes), probabilities.sum(axes) + wanted.sum(axes)
    dice = (2 * overlap + SMOOTH) / (size + SMOOTH)
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


@pytest.mark.parametrize("at_once", [1, 100, 300])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_summed_in_parts_it_is_the_same(at_once: int, batch_dice: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One plane at a time, and of five planes two or three."""
    logits, classes = make_batch((5, 4, 6))
    annotated = torch.rand(logits.shape[:2], generator=torch.Generator().manual_seed(0)) < 0.7
    classes[0, 1, 2] = 9
    found = []
    for limit in (losses.MAX_LOGITS_AT_ONCE, at_once):
        monkeypatch.setattr(losses, "MAX_LOGITS_AT_ONCE", limit)
        variable = logits.clone().requires_grad_()
        loss = dice_ce_loss(variable, classes, batch_dice=batch_dice, ignore=9, annotated=annotated)
        loss.backward()
        assert variable.grad is not None
        found.append((loss.detach(), variable.grad))
    torch.testing.assert_close(found[1], found[0])


def test_of_many_logits_no_copies_wait_for_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a hundred classes: what waits is the logits themselves."""
    logits, classes = make_batch((8, 4, 6))
    monkeypatch.setattr(losses, "MAX_LOGITS_AT_ONCE", logits.numel() // 4)
    waiting: set[int] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() >= logits.numel() // 8:
            waiting.add(tensor.untyped_storage().data_ptr())
        return tensor

    variable = logits.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        dice_ce_loss(variable, classes, batch_dice=False)
    assert waiting <= {variable.untyped_storage().data_ptr()}


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
    monai_losses = pytest.importorskip("monai.losses")
    logits, classes = make_batch((4, 5, 6))
    monai = monai_losses.DiceCELoss(
        include_background=True,
        to_onehot_y=True,
        softmax=True,
        batch=batch_dice,
        lambda_dice=0.0,
    )(logits, classes[:, None])
    dice = monai_losses.DiceLoss(
        include_background=False,
        to_onehot_y=True,
        softmax=True,
        batch=batch_dice,
        smooth_nr=SMOOTH,
        smooth_dr=SMOOTH,
    )(logits, classes[:, None])
    result = dice_ce_loss(logits, classes, batch_dice=batch_dice)
    assert float(result) == pytest.approx(float(monai + dice), abs=1e-5)


def test_a_class_that_is_not_there_counts_by_how_little_of_it_is_found() -> None:
    """Two voxels of background, in each of which a quarter is given to the class: half a voxel of it."""
    logits = torch.tensor([0.75, 0.25]).log().reshape(1, 2, 1).expand(1, 2, 2)
    loss = dice_ce_loss(logits, torch.zeros(1, 2, dtype=torch.int64), batch_dice=False)
    assert float(loss) + math.log(0.75) == pytest.approx(1 - 1e-5 / (0.5 + 1e-5), abs=1e-6)


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


# -- voxels that nobody has annotated, and classes that were not looked for --------------------------------------------

IGNORE = 4
REGIONS = LabelSpec(
    names=("a", "b", "c"),
    values=(1, 2, 3),
    regions=(Region(name="whole", values=(1, 2, 3), written=1), Region(name="core", values=(2, 3), written=2)),
    ignore=9,
)
OUTPUTS = {
    "classes": Outputs.of(LabelSpec(names=("a", "b", "c"), values=(1, 2, 3), ignore=9)),
    "regions": Outputs.of(REGIONS),
}
every_kind = pytest.mark.parametrize("outputs", OUTPUTS.values(), ids=OUTPUTS)
both_dice = pytest.mark.parametrize("batch_dice", [False, True])


def make_for(outputs: Outputs, *shape: int) -> tuple[Tensor, Tensor]:
    """Logits for these outputs, and classes 0 to 3."""
    logits, classes = make_batch(shape)
    return logits[:, : outputs.n], classes


def value_and_gradient(
    logits: Tensor, classes: Tensor, outputs: Outputs, *, batch_dice: bool, annotated: Tensor | None = None
) -> tuple[float, Tensor]:
    variable = logits.clone().requires_grad_()
    loss = output_loss(variable, classes, outputs, batch_dice=batch_dice, annotated=annotated)
    loss.backward()
    assert variable.grad is not None
    return float(loss.detach()), variable.grad


@every_kind
@both_dice
def test_ignored_voxels_change_nothing(outputs: Outputs, batch_dice: bool) -> None:
    """Whatever the logits are there; and the rest is as if they had been cut away."""
    logits, classes = make_for(outputs, 6, 7)
    hidden = torch.zeros(classes.shape, dtype=torch.bool)
    hidden[:, :, :3] = True
    classes = classes.masked_fill(hidden, IGNORE)
    value, gradient = value_and_gradient(logits, classes, outputs, batch_dice=batch_dice)
    assert not gradient.movedim(1, -1)[hidden].any()
    other = torch.where(hidden.unsqueeze(1), 1e3 * logits.flip(0), logits)
    assert value_and_gradient(other, classes, outputs, batch_dice=batch_dice)[0] == value
    cut, of_cut = value_and_gradient(logits[..., 3:], classes[..., 3:], outputs, batch_dice=batch_dice)
    assert value == pytest.approx(cut, rel=1e-6)
    torch.testing.assert_close(gradient[..., 3:], of_cut)


@every_kind
@both_dice
def test_a_label_that_ignores_nothing_is_a_label_without_a_class_to_ignore(outputs: Outputs, batch_dice: bool) -> None:
    logits, classes = make_for(outputs, 4, 5, 6)
    plain = Outputs.of(replace(REGIONS, ignore=None)) if outputs.has_regions else Outputs(4)
    value, gradient = value_and_gradient(logits, classes, outputs, batch_dice=batch_dice)
    expected, of_plain = value_and_gradient(logits, classes, plain, batch_dice=batch_dice)
    assert value == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradient, of_plain)


@every_kind
@both_dice
def test_a_batch_in_which_nobody_has_annotated_anything_teaches_nothing(outputs: Outputs, batch_dice: bool) -> None:
    logits, classes = make_for(outputs, 4, 5)
    value, gradient = value_and_gradient(logits, torch.full_like(classes, IGNORE), outputs, batch_dice=batch_dice)
    assert math.isfinite(value)
    assert not gradient.any()


@both_dice
@pytest.mark.parametrize("unknown", [1, 2, 3])
def test_the_marginal_loss_is_that_of_a_network_with_merged_classes(unknown: int, batch_dice: bool) -> None:
    """One that says "background or the class that was not looked for" with the sum of both probabilities."""
    logits, classes = make_batch((4, 5, 6))
    classes = classes.masked_fill(classes == unknown, 0)
    annotated = torch.ones(3, 4, dtype=torch.bool)
    annotated[:, unknown] = False
    known = [index for index in range(1, 4) if index != unknown]
    background = torch.logsumexp(logits[:, [0, unknown]], dim=1, keepdim=True)
    merged = torch.cat([background, logits[:, known]], dim=1)
    of_merged = torch.zeros_like(classes)
    for number, index in enumerate(known, start=1):
        of_merged[classes == index] = number
    result = dice_ce_loss(logits, classes, batch_dice=batch_dice, annotated=annotated)
    assert float(result) == pytest.approx(float(by_hand(merged, of_merged, batch_dice=batch_dice)), abs=1e-5)


def test_samples_with_different_annotated_classes_are_averaged_over_what_each_has() -> None:
    """Cross entropy over all voxels; Dice over the five pairs of a sample and a class that was looked for in it."""
    logits, classes = make_batch((6, 7), n_samples=2)
    annotated = torch.tensor([[True, True, True, True], [True, False, True, True]])
    classes[1] = classes[1].masked_fill(classes[1] == 1, 0)
    probability = logits.double().softmax(dim=1)
    probability[1, 0] += probability[1, 1]
    wanted = torch.nn.functional.one_hot(classes, 4).movedim(-1, 1).double()
    cross_entropy = -(wanted * probability.log()).sum(dim=1).mean()
    overlap = (probability * wanted).sum(dim=(2, 3))
    size = (probability + wanted).sum(dim=(2, 3))
    dice = (2 * overlap + SMOOTH) / (size + SMOOTH)
    expected = cross_entropy + 1 - (dice[0, 1:].sum() + dice[1, 2:].sum()) / 5
    result = dice_ce_loss(logits, classes, batch_dice=False, annotated=annotated)
    assert float(result) == pytest.approx(float(expected), abs=1e-5)
    known = annotated.double()
    pooled = (2 * (overlap * known).sum(0) + SMOOTH) / ((size * known).sum(0) + SMOOTH)
    together = dice_ce_loss(logits, classes, batch_dice=True, annotated=annotated)
    assert float(together) == pytest.approx(float(cross_entropy + 1 - pooled[1:].mean()), abs=1e-5)


@both_dice
def test_a_class_that_was_not_looked_for_is_not_pushed_out_of_the_background(batch_dice: bool) -> None:
    outputs = OUTPUTS["classes"]
    logits, classes = make_batch((5, 6))
    classes = classes.masked_fill(classes == 2, 0)
    annotated = torch.ones(3, 4, dtype=torch.bool)
    annotated[:, 2] = False
    _, gradient = value_and_gradient(logits, classes, outputs, batch_dice=batch_dice, annotated=annotated)
    of_unknown = gradient[:, 2]
    assert (of_unknown[classes == 0] <= 0).all()
    assert (of_unknown[classes != 0] > 0).all()
    _, as_background = value_and_gradient(logits, classes, outputs, batch_dice=batch_dice)
    assert (as_background[:, 2][classes == 0] > 0).all()


@both_dice
def test_a_region_that_was_not_looked_for_gets_no_gradient_and_takes_none_from_the_others(batch_dice: bool) -> None:
    outputs = OUTPUTS["regions"]
    logits, classes = make_for(outputs, 5, 6)
    annotated = torch.tensor([[True, True], [True, False], [True, False]])
    value, gradient = value_and_gradient(logits, classes, outputs, batch_dice=batch_dice, annotated=annotated)
    assert not gradient[1:, 1].any()
    assert (gradient[:, 0] != 0).all()
    assert (gradient[0, 1] != 0).all()
    other = logits.clone()
    other[1:, 1] = 77
    assert value_and_gradient(other, classes, outputs, batch_dice=batch_dice, annotated=annotated)[0] == value


@every_kind
@both_dice
def test_all_annotated_is_the_same_as_nothing_said(outputs: Outputs, batch_dice: bool) -> None:
    logits, classes = make_for(outputs, 4, 5, 6)
    classes[:, 0] = IGNORE
    everything = torch.ones(3, outputs.n, dtype=torch.bool)
    value, gradient = value_and_gradient(logits, classes, outputs, batch_dice=batch_dice, annotated=everything)
    expected, without = value_and_gradient(logits, classes, outputs, batch_dice=batch_dice)
    assert value == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradient, without)
    assert everything.all(), "what is passed in stays as it is"


# -- regions -----------------------------------------------------------------------------------------------------------


def regions_by_hand(logits: Tensor, members: Tensor, *, batch_dice: bool) -> Tensor:
    """Binary cross entropy and soft Dice of every region, in float64."""
    probability, wanted = 1 / (1 + (-logits.double().flatten(2)).exp()), members.double().flatten(2)
    cross_entropy = -(wanted * probability.log() + (1 - wanted) * (1 - probability).log()).mean()
    axes = (0, 2) if batch_dice else (2,)
    overlap, size = (probability * wanted).sum(axes), (probability + wanted).sum(axes)
    return cross_entropy + 1 - ((2 * overlap + SMOOTH) / (size + SMOOTH)).mean()


@both_dice
@pytest.mark.parametrize("shape", [(7, 9), (4, 5, 6)])
def test_the_loss_of_regions_equals_the_formula(shape: tuple[int, ...], batch_dice: bool) -> None:
    logits, classes = make_for(OUTPUTS["regions"], *shape)
    members = torch.stack([classes >= 1, classes >= 2], dim=1)
    first, second = logits.clone().requires_grad_(), logits.double().requires_grad_()
    expected = regions_by_hand(second, members, batch_dice=batch_dice)
    result = dice_bce_loss(first, members, batch_dice=batch_dice)
    assert float(result.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    result.backward()
    expected.backward()
    assert first.grad is not None
    assert second.grad is not None
    torch.testing.assert_close(first.grad.double(), second.grad, atol=1e-7, rtol=1e-4)
    through_classes = output_loss(logits, classes, OUTPUTS["regions"], batch_dice=batch_dice)
    assert float(through_classes) == pytest.approx(float(expected.detach()), abs=1e-5)


@both_dice
def test_the_loss_of_regions_equals_monai(batch_dice: bool) -> None:
    monai_losses = pytest.importorskip("monai.losses")
    logits, classes = make_for(OUTPUTS["regions"], 4, 5, 6)
    members = torch.stack([classes >= 1, classes >= 2], dim=1)
    dice = monai_losses.DiceLoss(sigmoid=True, batch=batch_dice, smooth_nr=SMOOTH, smooth_dr=SMOOTH)
    expected = dice(logits, members.float()) + torch.nn.BCEWithLogitsLoss()(logits, members.float())
    result = dice_bce_loss(logits, members, batch_dice=batch_dice)
    assert float(result) == pytest.approx(float(expected), abs=1e-5)


def test_deep_supervision_ignores_at_every_resolution() -> None:
    outputs = OUTPUTS["regions"]
    shapes = [(8, 12), (4, 6)]
    logits = [make_for(outputs, *shape)[0] for shape in shapes]
    classes = make_for(outputs, *shapes[0])[1]
    classes[:, :, :6] = IGNORE
    parts = []
    for of_level, low in zip(logits, (classes, classes[:, 1::2, 1::2]), strict=True):
        kept = of_level.shape[-1] // 2
        parts.append(output_loss(of_level[..., kept:], low[..., kept:], outputs, batch_dice=False))
    expected = (2 * parts[0] + parts[1]) / 3
    result = deep_supervision_loss(logits, classes, batch_dice=False, outputs=outputs)
    assert float(result) == pytest.approx(float(expected), rel=1e-6)

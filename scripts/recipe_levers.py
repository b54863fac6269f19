"""Levers of training that autoseg does not have, because they did not pay: for `bench_recipe.py` to show that again.

Each is a context in which `autoseg` trains with it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoseg.inference import predictor
from autoseg.planning.mirroring import Mirroring, plan_mirroring
from autoseg.planning.plan import ConfigurationPlan, Plan
from autoseg.preprocessing import foreground
from autoseg.preprocessing.store import PreprocessedCase
from autoseg.training import checkpoint, ladder, learner, losses, muon, patches, samplers, trainer
from autoseg.training.augment import AugmentConfig
from autoseg.training.losses import DICE_SMOOTH, deep_supervision_weights, dice_ce_loss, nearest_classes

Loss = Callable[[Tensor, Tensor, bool], Tensor]
INTENSITIES = ("noise", "blur", "brightness", "contrast", "low_resolution", "inverted_gamma", "gamma")


@contextmanager
def averaged_weights(half_life: int) -> Iterator[None]:
    """The final weights are an exponential average over the steps, which forgets half in so many of them."""
    averages: dict[int, dict[str, Tensor]] = {}
    step, save = learner.Learner.step, checkpoint.save_weights

    def step_and_average(self: learner.Learner, *positional: Any, **named: Any) -> float:
        value = step(self, *positional, **named)
        weights = self.network.state_dict()
        known = averages.setdefault(id(self.network), {name: tensor.clone() for name, tensor in weights.items()})
        for name, tensor in weights.items():
            known[name].lerp_(tensor, 1 - 0.5 ** (1 / half_life))
        return value

    def save_average(path: Path, network: nn.Module) -> None:
        network.load_state_dict(averages.get(id(network), network.state_dict()))
        save(path, network)

    with (
        patch.object(learner.Learner, "step", step_and_average),
        patch.object(trainer, "save_weights", save_average),
    ):
        yield


@contextmanager
def outputs_weighted(weights: Callable[[int], Sequence[float]]) -> Iterator[None]:
    """The supervised outputs count so, from full resolution down, for a number of them."""
    with patch.object(losses, "deep_supervision_weights", weights):
        yield


@contextmanager
def loss_of(loss: Loss) -> Iterator[None]:
    """Another loss on each supervised output: of logits, classes, and whether sums go over the batch."""

    def supervise(levels: Sequence[Tensor], classes: Tensor, *, batch_dice: bool, **_: object) -> Tensor:
        total = levels[0].new_zeros((), dtype=torch.float32)
        for weight, logits in zip(deep_supervision_weights(len(levels)), levels, strict=True):
            total = total + weight * loss(logits, nearest_classes(classes, logits.shape[2:]), batch_dice)
        return total

    with patch.object(learner, "deep_supervision_loss", supervise):
        yield


def sums_per(batch: bool) -> Loss:
    """The usual loss, with the sums of Dice over the batch, or over each patch by itself."""

    def loss(logits: Tensor, classes: Tensor, batch_dice: bool) -> Tensor:
        return dice_ce_loss(logits, classes, batch_dice=batch)

    return loss


def smoothed(logits: Tensor, classes: Tensor, batch_dice: bool) -> Tensor:
    """Label smoothing of 0.1 in the cross entropy."""
    plain = F.cross_entropy(logits.float(), classes)
    return (
        dice_ce_loss(logits, classes, batch_dice=batch_dice)
        - plain
        + F.cross_entropy(logits.float(), classes, label_smoothing=0.1)
    )


def focal(logits: Tensor, classes: Tensor, batch_dice: bool) -> Tensor:
    """Focal loss (Lin et al., 2017) in place of the cross entropy."""
    entropy = F.cross_entropy(logits.float(), classes, reduction="none")
    focused = ((1 - torch.exp(-entropy)) ** 2 * entropy).mean()
    return dice_ce_loss(logits, classes, batch_dice=batch_dice) - entropy.mean() + focused


def tversky(logits: Tensor, classes: Tensor, batch_dice: bool) -> Tensor:
    """Tversky's index (Salehi et al., 2017) in place of Dice: what is missed counts 0.7, what is too much 0.3."""
    probabilities = torch.softmax(logits.float(), dim=1)
    target = F.one_hot(classes, logits.shape[1]).movedim(-1, 1)
    axes = (0, *range(2, logits.ndim)) if batch_dice else tuple(range(2, logits.ndim))
    hit, predicted, reference = (x.sum(axes) for x in (probabilities * target, probabilities, target))
    index = (hit + DICE_SMOOTH) / (0.3 * predicted + 0.7 * reference + DICE_SMOOTH)
    return F.cross_entropy(logits.float(), classes) + 1 - index[..., 1:].mean()


def dice_of_present(logits: Tensor, classes: Tensor, batch_dice: bool) -> Tensor:
    """Dice is the mean over the classes that a patch has, or the batch where that is summed, not over all."""
    probabilities = torch.softmax(logits.float(), dim=1)
    target = F.one_hot(classes, logits.shape[1]).movedim(-1, 1)
    axes = (0, *range(2, logits.ndim)) if batch_dice else tuple(range(2, logits.ndim))
    hit, predicted, reference = (x.sum(axes)[..., 1:] for x in (probabilities * target, probabilities, target))
    dice = (2 * hit + DICE_SMOOTH) / (predicted + reference + DICE_SMOOTH)
    present = reference > 0
    mean = dice[present].mean() if present.any() else dice.mean()
    return F.cross_entropy(logits.float(), classes) + 1 - mean


@contextmanager
def augmented(**changes: Any) -> Iterator[None]:
    """The published table of augmentation with other values."""
    published = AugmentConfig.for_patch
    with patch.object(AugmentConfig, "for_patch", lambda size: dataclasses.replace(published(size), **changes)):
        yield


@contextmanager
def less_often(factor: float, *, names: Sequence[str]) -> Iterator[None]:
    """Changes of these names are so much less likely."""
    probabilities = (f"{name}_probability" for name in names)
    default = AugmentConfig()
    with augmented(**{name: factor * getattr(default, name) for name in probabilities}):
        yield


@contextmanager
def optimised(**changes: Any) -> Iterator[None]:
    """Muon with other values."""
    with patch.object(muon, "Muon", functools.partial(muon.Muon, **changes)):
        yield


@contextmanager
def rate_of_others(factor: float) -> Iterator[None]:
    """The rate of what is no convolution, such as the weights of norms, as a part of Muon's."""
    step = muon.Muon._step_others

    def step_slower(self: muon.Muon, weights: list[Tensor], group: dict[str, Any]) -> None:
        step(self, weights, {**group, "lr": factor * group["lr"]})

    with patch.object(muon.Muon, "_step_others", step_slower):
        yield


@contextmanager
def in_the_middle() -> Iterator[None]:
    """Cases that are smaller than the patch lie in its middle."""
    draw = patches.PatchSampler._draw_start

    def draw_start(self: patches.PatchSampler, case: PreprocessedCase, *rest: Any) -> tuple[int, ...]:
        room = (size - edge for size, edge in zip(case.label.shape, self._patch, strict=True))
        starts = draw(self, case, *rest)
        return tuple(slack // 2 if slack < 0 else start for start, slack in zip(starts, room, strict=True))

    with patch.object(patches.PatchSampler, "_draw_start", draw_start):
        yield


@contextmanager
def growing_patch(part: float, *, until: float) -> Iterator[None]:
    """Until so much of the training is done, the network sees the middle of each patch, this part of its edges."""
    compute, learn = trainer._Run._loss, learner.Learner.loss
    middle: tuple[Any, ...] = (...,)

    def choose_and_compute(self: trainer._Run, batch: patches.Batch) -> Tensor:
        nonlocal middle
        middle = (..., *_middle(self.configuration, part)) if self.fraction_done < until else (...,)
        return compute(self, batch)

    def learn_from_middle(self: learner.Learner, images: Tensor, classes: Tensor, **rest: Any) -> Tensor:
        return learn(self, images[middle], classes[middle], **rest)

    with (
        patch.object(trainer._Run, "_loss", choose_and_compute),
        patch.object(learner.Learner, "loss", learn_from_middle),
    ):
        yield


def _middle(configuration: ConfigurationPlan, part: float) -> tuple[slice, ...]:
    """Of a patch, this part of its edges, as nearly as the network's strides allow."""
    cuts = []
    for size, step in zip(configuration.patch_size, configuration.network.divisor, strict=True):
        small = min(max(round(part * size / step), 2) * step, size)
        cuts.append(slice((size - small) // 2, (size + small) // 2))
    return tuple(cuts)


@contextmanager
def as_of_small_cases() -> Iterator[None]:
    """Larger patches are taken as early as where there are many small cases."""
    with patch.object(ladder, "_min_steps", lambda rung, *_: rung.min_steps):
        yield


@contextmanager
def voxels_drawn_evenly() -> Iterator[None]:
    """The voxels that patches are centred on are drawn evenly from a class, whatever its components."""
    with patch.object(foreground, "_draw_of_class", lambda voxels, mask, rng: foreground._draw_some(voxels, rng)):
        yield


@contextmanager
def mirrored_along(is_wanted: Callable[[int, int | None], bool]) -> Iterator[None]:
    """Where patches are mirrored, only along these axes, in prediction too: told by axis and that of left and right."""

    def plan_some(plan: Plan, configuration: ConfigurationPlan) -> Mirroring:
        found = plan_mirroring(plan, configuration)
        axes = tuple(axis for axis in found.axes if is_wanted(axis, found.side_axis))
        return dataclasses.replace(found, axes=axes, side_axis=found.side_axis if found.side_axis in axes else None)

    with patch.object(samplers, "plan_mirroring", plan_some), patch.object(predictor, "plan_mirroring", plan_some):
        yield


@contextmanager
def predicted_as_is() -> Iterator[None]:
    """No mirrored copies are averaged in prediction."""
    start = functools.partialmethod(predictor.Predictor.__init__, mirroring=False)
    with patch.object(predictor.Predictor, "__init__", start):
        yield


LEVERS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "averaged weights": functools.partial(averaged_weights, 20),
    "first output only": functools.partial(outputs_weighted, lambda n: (1.0, *[0.0] * (n - 1))),
    "outputs alike": functools.partial(outputs_weighted, lambda n: [1 / n] * n),
    "Dice per patch": functools.partial(loss_of, sums_per(batch=False)),
    "Dice per batch": functools.partial(loss_of, sums_per(batch=True)),
    "Dice of present classes": functools.partial(loss_of, dice_of_present),
    "label smoothing": functools.partial(loss_of, smoothed),
    "focal": functools.partial(loss_of, focal),
    "Tversky": functools.partial(loss_of, tversky),
    "small cases in the middle": in_the_middle,
    "rotated and scaled three times as often": functools.partial(
        augmented, rotation_probability=0.6, scaling_probability=0.6
    ),
    "neither rotated nor scaled": functools.partial(augmented, rotation_probability=0.0, scaling_probability=0.0),
    "intensities as they are": functools.partial(less_often, 0.0, names=INTENSITIES),
    "intensities changed half as often": functools.partial(less_often, 0.5, names=INTENSITIES),
    "augmented half as often": functools.partial(less_often, 0.5, names=("rotation", "scaling", *INTENSITIES)),
    "half the patch in the first half": functools.partial(growing_patch, 0.5, until=0.5),
    "0.7 of the patch in the first half": functools.partial(growing_patch, 0.7, until=0.5),
    "patches as of small cases": as_of_small_cases,
    "momentum 0.9": functools.partial(optimised, momentum=0.9),
    "momentum 0.98": functools.partial(optimised, momentum=0.98),
    "second moments of 100 steps": functools.partial(optimised, betas=(0.9, 0.99)),
    "norms and outputs at a quarter of the rate": functools.partial(rate_of_others, 0.25),
}

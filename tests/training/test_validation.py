"""What is counted on validation patches."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_cases import write_tiny_case
from tiny_plans import make_tiny_configuration
from torch import nn

from autoseg.core.labels import LabelSpec, Region
from autoseg.networks.outputs import Outputs
from autoseg.preprocessing.store import PreprocessedCase
from autoseg.training.learner import Learner
from autoseg.training.losses import MAX_LOGITS_AT_ONCE, output_loss
from autoseg.training.patches import PatchSampler
from autoseg.training.recipe import RECIPES
from autoseg.training.validation import count_overlap, score_patches

CLASSES = LabelSpec(names=("a", "b"), values=(1, 2))
NESTED = replace(
    CLASSES,
    regions=(Region(name="whole", values=(1, 2), written=1), Region(name="core", values=(2,), written=2)),
)
PREDICTED = torch.tensor([[0, 1, 1, 2, 2], [0, 0, 1, 2, 0]])
REFERENCE = torch.tensor([[0, 1, 2, 2, 1], [1, 0, 1, 0, 2]])


def test_voxels_of_classes_are_counted_by_hand() -> None:
    counted = count_overlap(PREDICTED, REFERENCE, Outputs.of(CLASSES))
    assert counted.dtype == torch.int64
    assert counted.tolist() == [[2, 2, 1], [4, 3, 3], [3, 4, 3]]


def test_voxels_of_regions_are_counted_by_hand() -> None:
    """A voxel of the core that is found as another part of the whole is right for the whole."""
    counted = count_overlap(PREDICTED, REFERENCE, Outputs.of(NESTED))
    assert counted.tolist() == [[5, 1], [6, 3], [7, 3]]


@pytest.mark.parametrize("labels", [CLASSES, NESTED], ids=["classes", "regions"])
def test_voxels_that_nobody_has_annotated_do_not_count(labels: LabelSpec) -> None:
    outputs = Outputs.of(replace(labels, ignore=7))
    hidden = torch.tensor([[False, True, False, False, True], [True, False, True, False, False]])
    counted = count_overlap(PREDICTED, REFERENCE.masked_fill(hidden, 3), outputs)
    assert counted.equal(count_overlap(PREDICTED[~hidden], REFERENCE[~hidden], Outputs.of(labels)))
    assert not count_overlap(PREDICTED, torch.full_like(REFERENCE, 3), outputs).any()


# -- scores ------------------------------------------------------------------------------------------------------------

SHAPE = (5, 6, 8)
ANNOTATED = {"more": (True, True, True, False), "less": (True, True, False, False)}
"""Of background and three classes."""


def write_logits(folder: Path, rng: np.random.Generator) -> PreprocessedCase:
    """A case whose channels are what the network of `make_echo` says of it."""
    known = ANNOTATED[folder.name]
    label = rng.integers(0, 4, SHAPE).astype(np.uint8)
    label[~np.array(known)[label]] = 0
    logits = rng.normal(0, 2, (4, *SHAPE)).astype(np.float32)
    return write_tiny_case(folder, logits, label, n_classes=4, known=known)


def make_echo() -> Learner:
    """Has a network whose logits are the image."""
    network = nn.Conv2d(4, 4, 1, bias=False)
    nn.init.dirac_(network.weight)
    configuration = make_tiny_configuration(SHAPE[1:], features=(4, 4), batch_dice=True)
    return Learner(network, configuration, recipe=RECIPES["published"], device=torch.device("cpu"), precision="float32")


@pytest.mark.parametrize("at_once", [MAX_LOGITS_AT_ONCE, 100], ids=["at once", "in parts"])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_of_each_patch_only_the_classes_that_were_looked_for_are_scored(
    tmp_path: Path, batch_dice: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second class in one of two cases, the third in none; the loss of many logits is made in parts."""
    monkeypatch.setattr("autoseg.training.losses.MAX_LOGITS_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    cases = [write_logits(tmp_path / name, rng) for name in ANNOTATED]
    sampler = PatchSampler(cases, patch_size=SHAPE[1:], batch_size=2, foreground_fraction=0.5, seed=0)
    outputs = Outputs(4)
    scores = score_patches(make_echo(), sampler, n_batches=2, outputs=outputs, batch_dice=batch_dice)
    drawn, losses = set(), []
    both, either = np.zeros(4), np.zeros(4)
    for batch in (sampler.batch(0), sampler.batch(1)):
        logits, classes = batch.images.float(), batch.classes.long()
        annotated = torch.tensor([ANNOTATED[case] for case in batch.cases])
        losses.append(float(output_loss(logits, classes, outputs, batch_dice=batch_dice, annotated=annotated)))
        for case, found, wanted in zip(batch.cases, logits.argmax(dim=1), classes, strict=True):
            drawn.add(case)
            for index in np.flatnonzero(ANNOTATED[case]):
                is_found, is_wanted = (classes_of.numpy() == index for classes_of in (found, wanted))
                both[index] += (is_found & is_wanted).sum()
                either[index] += is_found.sum() + is_wanted.sum()
    assert drawn == set(ANNOTATED)
    assert scores.loss == pytest.approx(sum(losses) / 2)
    first, second = (2 * both / either.clip(1))[1:3]
    np.testing.assert_allclose(scores.class_dice, [first, second, math.nan])
    assert scores.mean_dice == pytest.approx((first + second) / 2)

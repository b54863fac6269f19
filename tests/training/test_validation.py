"""What is counted on validation patches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autoseg.core.labels import LabelSpec, Region
from autoseg.networks.outputs import Outputs
from autoseg.training.validation import count_overlap

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

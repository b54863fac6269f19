"""How the patches of a training run are augmented, as its plan and its choices have it: above all left and right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from label_specs import make_kidneys, make_kidneys_of_regions
from numpy.typing import NDArray
from tiny_cases import write_tiny_case
from tiny_plans import make_tiny_configuration, make_tiny_plan

from autoseg.core.labels import LabelSpec
from autoseg.planning.plan import ConfigurationPlan, Plan
from autoseg.preprocessing.store import PreprocessedCase, write_previous
from autoseg.training.augment import AugmentParameters
from autoseg.training.config import Budget, TrainConfig
from autoseg.training.record import TrainingChoices
from autoseg.training.samplers import training_sampler, validation_sampler

SHAPE = (8, 10, 12)
PAIR = make_kidneys(1, 2)
PAIR_OF_REGIONS = make_kidneys_of_regions(1, 2, both=3)
CONFIGURATION = make_tiny_configuration((8, 8, 8), median_shape=SHAPE)


def make_plan(labels: LabelSpec, configuration: ConfigurationPlan = CONFIGURATION) -> Plan:
    return make_tiny_plan(replace(CONFIGURATION, name="3d_lowres"), configuration, labels=labels)


def make_case(folder: Path, labels: LabelSpec) -> PreprocessedCase:
    """Noise, with every class everywhere, and as much of every class that a first stage has found."""
    rng = np.random.default_rng(0)
    label: NDArray[np.uint8] = rng.integers(0, labels.n_stored, SHAPE).astype(np.uint8)
    image = rng.normal(size=(1, *SHAPE)).astype(np.float32)
    write_tiny_case(folder / "case", image, label, n_classes=labels.n_classes)
    write_previous(folder / "previous", rng.integers(0, labels.n_classes, SHAPE).astype(np.uint8), key="k")
    return PreprocessedCase(folder / "case", previous=folder / "previous")


def make_choices(configuration: ConfigurationPlan) -> TrainingChoices:
    return TrainingChoices(
        recipe="fast",
        configuration=configuration,
        planned_patch_size=configuration.patch_size,
        budget=Budget(iterations=6, iterations_per_epoch=3),
        batch_size=32,
        foreground_fraction=1 / 3,
        sampling="published",
        mirror=True,
        reasons=(),
    )


def draw(
    folder: Path,
    labels: LabelSpec,
    *,
    configuration: ConfigurationPlan = CONFIGURATION,
    planned_patch_size: tuple[int, ...] = CONFIGURATION.patch_size,
    mirror: bool = True,
) -> AugmentParameters:
    """Of the first batch, of 32 patches."""
    choices = replace(make_choices(configuration), planned_patch_size=planned_patch_size, mirror=mirror)
    plan = make_plan(labels, configuration)
    sampler = training_sampler([make_case(folder, labels)], plan, choices, TrainConfig(), seed=0)
    parameters = sampler.batch(0).augmentation
    assert parameters is not None
    return parameters


@pytest.mark.parametrize(
    ("labels", "opposite", "opposite_outputs"),
    [(PAIR, [0, 2, 1], [0, 2, 1]), (PAIR_OF_REGIONS, [0, 2, 1, 3], [1, 0])],
    ids=["classes", "regions"],
)
def test_a_pair_changes_sides_where_left_and_right_are_mirrored(
    tmp_path: Path, labels: LabelSpec, opposite: list[int], opposite_outputs: list[int]
) -> None:
    parameters = draw(tmp_path, labels)
    assert parameters.opposite.tolist() == opposite
    assert parameters.opposite_outputs.tolist() == opposite_outputs
    assert parameters.changes_sides.equal(parameters.flip[:, 2])
    assert parameters.flip.any(dim=0).all()
    assert not parameters.flip.all(dim=0).any()


def test_left_and_right_are_not_mirrored_where_a_side_has_no_counterpart(tmp_path: Path) -> None:
    parameters = draw(tmp_path, LabelSpec(names=("appendix right", "liver"), values=(1, 2)))
    assert parameters.flip.any(dim=0).tolist() == [True, True, False]
    assert not parameters.changes_sides.any()


def test_nothing_is_mirrored_where_the_choices_say_so(tmp_path: Path) -> None:
    parameters = draw(tmp_path, PAIR, mirror=False)
    assert not parameters.flip.any()
    assert not parameters.changes_sides.any()


def test_patches_are_not_centred_on_what_is_of_no_region(tmp_path: Path) -> None:
    labels = replace(PAIR_OF_REGIONS, names=(*PAIR_OF_REGIONS.names, "stone"), values=(1, 2, 3, 4))
    two_voxels = replace(
        CONFIGURATION, patch_size=(1, 1, 2), network=replace(CONFIGURATION.network, strides=((1, 1, 1),) * 2)
    )
    choices = replace(make_choices(two_voxels), foreground_fraction=1.0, batch_size=100)
    cases = [make_case(tmp_path, labels)]
    plan = make_plan(labels, two_voxels)
    of_training = training_sampler(cases, plan, choices, TrainConfig(), seed=0, augments=False)
    for sampler in (of_training, validation_sampler(cases, plan, choices, seed=0)):
        classes = sampler.batch(0).classes
        assert ((classes > 0) & (classes < 4)).any(dim=3).all()


def test_in_a_cascade_the_classes_of_both_stages_change_sides(tmp_path: Path) -> None:
    """What nobody has annotated stays that; a first stage never finds it."""
    labels = replace(PAIR, ignore=3)
    configuration = replace(CONFIGURATION, name="3d_cascade_fullres", previous="3d_lowres")
    parameters = draw(tmp_path, labels, configuration=configuration)
    n_labels, opposite = labels.n_stored, (0, 2, 1, 3)
    assert len(parameters.opposite) == n_labels * labels.n_classes
    for found in range(labels.n_classes):
        for own in range(n_labels):
            becomes = opposite[own] + n_labels * opposite[found]
            assert parameters.opposite[own + n_labels * found] == becomes, (own, found)


@pytest.mark.parametrize(("planned", "keeps"), [((8, 32, 32), True), ((16, 16, 16), False)])
def test_the_planned_patch_tells_whether_slices_may_mix(tmp_path: Path, planned: tuple[int, ...], keeps: bool) -> None:
    """A smaller one that it is rounded to has another shape."""
    adapted = replace(CONFIGURATION, patch_size=(8, 8, 8) if keeps else (4, 16, 16))
    parameters = draw(tmp_path, PAIR, configuration=adapted, planned_patch_size=planned)
    assert parameters.keep_first_axis == keeps
    assert bool((parameters.angles_rad[:, 1:] == 0).all()) == keeps

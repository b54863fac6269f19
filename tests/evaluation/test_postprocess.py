"""Post-processing that helps is adopted and that harms is not, on cases with known answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from autoseg.core.steps import FOREGROUND, HOLES, LARGEST, SMALL, Step
from autoseg.evaluation.postprocess import Pair, Postprocessed, decide_steps
from autoseg.evaluation.scores import Target

SHAPE = (16, 20, 20)
VOXEL_ML = 0.001
ORGAN, TUMOUR = Target(name="organ", values=(1,)), Target(name="tumour", values=(2,))
Make = Callable[[np.random.Generator], tuple[NDArray[np.uint8], NDArray[np.uint8]]]


def organ(rng: np.random.Generator) -> NDArray[np.uint8]:
    """One large component, a little different in each case."""
    label = np.zeros(SHAPE, np.uint8)
    z, y, x = rng.integers(1, 4, 3)
    label[z : z + 7, y : y + 9, x : x + 9] = 1
    return label


def decide(make: Make, targets: tuple[Target, ...] = (ORGAN, TUMOUR), n_cases: int = 12) -> Postprocessed:
    pairs = {}
    for number in range(n_cases):
        prediction, reference = make(np.random.default_rng(number))
        pairs[f"case_{number}"] = Pair(prediction=prediction, reference=reference, voxel_ml=VOXEL_ML)
    return decide_steps(sorted(pairs), pairs.__getitem__, targets)


def kinds(decided: Postprocessed) -> list[tuple[str, str]]:
    return [(step.kind, step.target) for step in decided.steps]


def test_nothing_is_done_to_predictions_that_are_right() -> None:
    decided = decide(lambda rng: (organ(rng),) * 2)
    assert decided.steps == ()
    assert not any(decision.adopted for decision in decided.decisions)
    np.testing.assert_array_equal(decided.raw_dice, 1)


def test_a_false_piece_far_from_all_others_is_removed_with_the_largest_foreground() -> None:
    def make(rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        reference = organ(rng)
        reference[4:6, 4:6, 4:6] = 2
        prediction = reference.copy()
        prediction[14:16, 17:20, 17:20] = 1
        return prediction, reference

    decided = decide(make)
    assert kinds(decided)[0] == (LARGEST, FOREGROUND)
    first = decided.decisions[0]
    assert first.adopted
    assert first.gain > 0
    assert first.low > 0
    np.testing.assert_array_equal(decided.dice, 1)
    assert (decided.raw_dice[:, 0] < 1).all()


def test_few_cases_decide_nothing() -> None:
    def make(rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        reference = organ(rng)
        prediction = reference.copy()
        prediction[14:16, 17:20, 17:20] = 1
        return prediction, reference

    assert decide(make, n_cases=4).steps == ()
    assert decide(make, n_cases=6).steps != ()


def test_an_organ_in_two_pieces_keeps_both() -> None:
    def make(rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        reference = organ(rng)
        reference[13:16, 15:20, 15:20] = 1
        return reference.copy(), reference

    decided = decide(make)
    assert decided.steps == ()
    whole = decided.decisions[0]
    assert whole.step.target == FOREGROUND
    assert not whole.adopted
    assert whole.gain < 0
    assert "lowers the Dice of 1 of 2" in whole.why


def test_the_foreground_step_is_refused_where_it_harms_one_label_though_the_mean_rises() -> None:
    def make(rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        reference = organ(rng)
        # A tumour far away, so keeping one component loses it; but a large false organ is lost with it.
        reference[13, 1:4, 1:4] = 2
        prediction = reference.copy()
        prediction[12:16, 14:20, 14:20] = 1
        return prediction, reference

    decided = decide(make)
    assert (LARGEST, FOREGROUND) not in kinds(decided)
    assert (LARGEST, "organ") in kinds(decided) or (SMALL, "organ") in kinds(decided)
    np.testing.assert_array_equal(decided.dice, 1)


def test_small_false_alarms_are_removed_and_true_small_lesions_stay() -> None:
    def make(rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        reference = np.zeros(SHAPE, np.uint8)
        for z in (2, 8):
            reference[z : z + 2, 3 : 3 + int(rng.integers(3, 6)), 3:6] = 2
        prediction = reference.copy()
        prediction[13, 4:12:3, 4:12:3] = 2
        return prediction, reference

    decided = decide(make, (TUMOUR,))
    assert [step.kind for step in decided.steps] == [SMALL]
    assert VOXEL_ML < (decided.steps[0].min_ml or 0) <= 18 * VOXEL_ML
    np.testing.assert_array_equal(decided.dice, 1)


def test_false_alarms_where_there_is_nothing_count_too() -> None:
    def make(rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        reference = np.zeros(SHAPE, np.uint8)
        if rng.random() < 0.5:
            reference[4:8, 4:8, 4:8] = 2
        prediction = reference.copy()
        if not reference.any():
            prediction[2, 2, 2] = 2
        return prediction, reference

    decided = decide(make, (TUMOUR,))
    assert [step.kind for step in decided.steps] == [SMALL]
    np.testing.assert_array_equal(decided.dice, 1)
    assert 0 < decided.raw_dice.mean() < 1


def test_holes_are_filled_where_the_reference_has_none_and_not_where_it_has() -> None:
    def make(rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        reference = organ(rng)
        prediction = reference.copy()
        prediction[5:7, 6:8, 6:8] = 0
        return prediction, reference

    decided = decide(make, (ORGAN,))
    assert [step.kind for step in decided.steps] == [HOLES]
    np.testing.assert_array_equal(decided.dice, 1)

    swapped = decide(lambda rng: make(rng)[::-1], (ORGAN,))
    assert swapped.steps == ()


def test_a_gain_that_one_case_makes_up_for_harm_in_others_is_noise() -> None:
    def make(rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        reference = organ(rng)
        prediction = reference.copy()
        piece = (slice(13, 16), slice(14, 20), slice(14, 20))
        # Wrong in a little more than half of the cases, right in the others.
        prediction[piece] = 1
        if rng.random() < 0.45:
            reference[piece] = 1
        return prediction, reference

    decided = decide(make, (ORGAN,), n_cases=8)
    assert all(step.kind != LARGEST for step in decided.steps)


@pytest.mark.parametrize("value", [2, 3])
def test_regions_are_treated_as_one(value: int) -> None:
    """Components of a region may be of one label or the other."""
    region = Target(name="whole", values=(2, 3))

    def make(rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        reference = organ(rng) * np.uint8(2)
        reference[4:6, 4:6, 4:6] = 3
        prediction = reference.copy()
        prediction[15, 18:, 18:] = value
        return prediction, reference

    decided = decide(make, (region,))
    assert [step.values for step in decided.steps] == [(2, 3)]
    np.testing.assert_array_equal(decided.dice, 1)
    assert isinstance(decided.steps[0], Step)

"""Post-processing that helps is adopted and that harms is not, on cases with known answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from autoseg.core.steps import FOREGROUND, HOLES, LARGEST, SMALL, Step
from autoseg.evaluation.postprocess import Pair, Postprocessed, count_options, decide_steps
from autoseg.evaluation.scores import Target
from autoseg.inference.postprocess import apply_steps

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


# -- regions that overlap, and what is not known -----------------------------------------------------------------------

WHOLE, CORE = Target(name="whole", values=(1, 2)), Target(name="core", values=(2,))


def nested(rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The core has a false piece in the rim, and its reference is one component."""
    reference = organ(rng)
    z, y, x = (int(found[0]) for found in np.nonzero(reference))
    reference[z + 1 : z + 3, y + 1 : y + 4, x + 1 : x + 4] = 2
    prediction = reference.copy()
    prediction[z + 5, y + 6 : y + 8, x + 6 : x + 8] = 2
    return prediction, reference


def test_a_region_within_another_one_is_left_alone() -> None:
    """What is removed of it would be background, a hole in the one around it; by itself it would lose the piece."""
    alone = decide(nested, (CORE,))
    assert [step.target for step in alone.steps] == ["core"]
    np.testing.assert_array_equal(alone.dice, 1)
    both = decide(nested, (WHOLE, CORE))
    assert both.steps == ()
    assert (both.raw_dice[:, 0] == 1).all()
    assert (both.raw_dice[:, 1] < 1).all()
    np.testing.assert_array_equal(both.dice, both.raw_dice)


def test_a_region_around_another_one_is_not_changed_by_itself() -> None:
    """Its largest components alone would be better without a false piece, but a true one of the core would be lost."""

    def make(rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        reference = np.zeros(SHAPE, np.uint8)
        reference[1:4, 2 : 5 + int(rng.integers(3)), 2:6] = 1
        prediction = reference.copy()
        prediction[11:13, 12:14, 12:14] = 1
        prediction[14, 2, 2] = reference[14, 2, 2] = 2
        return prediction, reference

    decided = decide(make, (WHOLE, CORE))
    assert all(step.target == FOREGROUND for step in decided.steps)
    # Cases are in the order of their names.
    numbers = sorted(range(12), key=str)
    for index, target in enumerate((WHOLE, CORE)):
        for row, number in enumerate(numbers):
            prediction, reference = make(np.random.default_rng(number))
            found = apply_steps(prediction, decided.steps, voxel_ml=VOXEL_ML)
            masks = [np.isin(label, target.values) for label in (found, reference)]
            assert decided.dice[row, index] == 2 * (masks[0] & masks[1]).sum() / (masks[0].sum() + masks[1].sum())


def with_false_piece(rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """An organ, and a piece of it far away."""
    reference = organ(rng)
    prediction = reference.copy()
    prediction[14:16, 17:20, 17:20] = 1
    return prediction, reference


def decide_pairs(pairs: dict[str, Pair], targets: tuple[Target, ...]) -> Postprocessed:
    return decide_steps(sorted(pairs), pairs.__getitem__, targets)


def test_what_nobody_has_annotated_decides_nothing() -> None:
    pairs = {}
    for number in range(12):
        prediction, reference = with_false_piece(np.random.default_rng(number))
        ignored = np.zeros(SHAPE, bool)
        ignored[12:] = True
        pairs[f"{number:02}"] = Pair(prediction=prediction, reference=reference, voxel_ml=VOXEL_ML, ignored=ignored)
    hidden = decide_pairs(pairs, (ORGAN,))
    assert hidden.steps == ()
    np.testing.assert_array_equal(hidden.raw_dice, 1)
    seen = {name: replace(pair, ignored=None) for name, pair in pairs.items()}
    assert decide_pairs(seen, (ORGAN,)).steps != ()


def test_ignored_voxels_still_hold_pieces_together() -> None:
    """A prediction that runs on where nobody looked is one component, of which nothing is to be cut off."""
    reference = np.zeros(SHAPE, np.uint8)
    reference[:, 5:9, 5:9] = 1
    ignored = np.zeros(SHAPE, bool)
    ignored[6:8] = True
    prediction = reference.copy()
    reference[ignored] = 9
    pairs = {
        str(number): Pair(prediction=prediction, reference=reference, voxel_ml=VOXEL_ML, ignored=ignored)
        for number in range(10)
    }
    decided = decide_pairs(pairs, (ORGAN,))
    assert decided.steps == ()
    np.testing.assert_array_equal(decided.dice, 1)


def test_a_target_that_was_not_looked_for_in_a_case_has_no_say() -> None:
    """In four cases a tumour is predicted and nothing is known of it; the organ has a false piece in all."""
    pairs = {}
    for number in range(12):
        prediction, reference = with_false_piece(np.random.default_rng(number))
        if number < 4:
            prediction[0, :3, :3] = 2
        pairs[f"{number:02}"] = Pair(
            prediction=prediction,
            reference=reference,
            voxel_ml=VOXEL_ML,
            unknown=frozenset(["tumour"]) if number < 4 else frozenset(),
        )
    decided = decide_pairs(pairs, (ORGAN, TUMOUR))
    assert decided.steps
    assert all(step.target != "tumour" for step in decided.steps)
    assert np.isnan(decided.raw_dice).tolist() == [[False, number < 4] for number in range(12)]
    assert np.isnan(decided.dice).tolist() == [[False, number < 4] for number in range(12)]
    np.testing.assert_array_equal(decided.dice[:, 0], 1)
    np.testing.assert_array_equal(decided.dice[4:, 1], 1)


def test_a_target_that_was_looked_for_nowhere_decides_nothing() -> None:
    pairs = {}
    for number in range(8):
        prediction, reference = with_false_piece(np.random.default_rng(number))
        pairs[str(number)] = Pair(
            prediction=prediction, reference=reference, voxel_ml=VOXEL_ML, unknown=frozenset(["organ"])
        )
    decided = decide_pairs(pairs, (ORGAN,))
    assert decided.steps == ()
    assert np.isnan(decided.dice).all()


@pytest.mark.parametrize("shape", [(9, 11, 13), (1, 21, 23)])
@pytest.mark.parametrize("has_ignored", [False, True])
def test_options_are_counted_as_if_each_were_done(shape: tuple[int, ...], has_ignored: bool) -> None:
    rng = np.random.default_rng(0)
    fills = Step(kind=HOLES, target="organ", values=(1,))
    removes = [Step(kind=SMALL, target="organ", values=(1,), min_ml=n * VOXEL_ML) for n in (2, 4, 8)]
    removes.append(Step(kind=LARGEST, target="organ", values=(1,)))
    tried = [(), (fills,), *((step,) for step in removes), *((step, fills) for step in removes)]
    n_filled = 0
    for density in (0.0, 0.2, 0.5, 0.8):
        prediction = (rng.random(shape) < density).astype(np.uint8)
        prediction[rng.random(shape) < 0.02] = 2
        reference = (rng.random(shape) < 0.5).astype(np.uint8)
        ignored = rng.random(shape) < 0.1 if has_ignored else None
        pair = Pair(prediction=prediction, reference=reference, voxel_ml=VOXEL_ML, ignored=ignored)
        expected = []
        for steps in tried:
            label = apply_steps(prediction, steps, voxel_ml=VOXEL_ML)
            n_filled += int(np.count_nonzero((label == 1) & (prediction != 1)))
            label = label if ignored is None else np.where(ignored, 0, label)
            both = (label == 1) & (reference == 1)
            expected.append([np.count_nonzero(mask) for mask in (both, label == 1, reference == 1)])
        squeezed = replace(
            pair,
            prediction=prediction.squeeze(),
            reference=reference.squeeze(),
            ignored=None if ignored is None else ignored.squeeze(),
        )
        assert count_options(squeezed, ORGAN, tried).tolist() == expected
    assert n_filled

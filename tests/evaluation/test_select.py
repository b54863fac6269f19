"""What is chosen among candidates whose scores are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from autoseg.core.errors import FormatError
from autoseg.evaluation.select import compare, interval_of_labels, mean_of_labels, select
from autoseg.evaluation.selection import Candidate, Selection

RNG = np.random.default_rng(0)
BASE = np.clip(0.85 + 0.05 * RNG.standard_normal((40, 2)), 0, 1)


def make_candidate(name: str, dice: NDArray[np.float64], cost: float) -> Candidate:
    mean = mean_of_labels(dice)
    return Candidate(
        configurations=tuple(name.split(" + ")),
        models=("0",),
        mean_dice=mean,
        raw_dice=mean,
        label_dice={},
        cost=cost,
        steps=(),
        decisions=(),
    )


def choose(**scores: tuple[NDArray[np.float64], float]) -> Selection:
    candidates = [make_candidate(name, *known) for name, known in scores.items()]
    return select(candidates, {name: dice for name, (dice, _) in scores.items()}, missing={"other": "not trained"})


def test_a_clear_gain_is_worth_its_cost() -> None:
    selection = choose(cheap=(BASE, 1.0), dear=(BASE + 0.02, 5.0))
    assert selection.chosen == "dear"
    (comparison,) = selection.comparisons
    assert comparison.better
    assert comparison.gain == pytest.approx(0.02)
    assert selection.candidate.name == "dear"
    assert selection.missing == {"other": "not trained"}


def test_within_noise_the_cheaper_one_wins_and_the_reason_says_so() -> None:
    noise = 0.02 * RNG.standard_normal(BASE.shape)
    noisy = BASE + 0.0005 + noise - noise.mean()
    selection = choose(dear=(noisy, 5.0), cheap=(BASE, 1.0))
    assert mean_of_labels(noisy) > mean_of_labels(BASE)
    assert selection.chosen == "cheap"
    assert "within noise" in selection.why
    assert "cheap is cheaper" in selection.why
    assert [known.name for known in selection.candidates] == ["cheap", "dear"]


def test_the_cheapest_of_those_within_noise_wins() -> None:
    near = BASE + 0.001 * RNG.standard_normal(BASE.shape)
    selection = choose(worst=(BASE - 0.1, 0.1), second=(near - near.mean() + BASE.mean() - 1e-5, 1.0), best=(BASE, 3.0))
    assert selection.chosen == "second"
    assert [known.against for known in selection.comparisons] == ["worst", "second"]


def test_the_best_that_is_also_the_cheapest_needs_no_comparison() -> None:
    selection = choose(best=(BASE + 0.01, 1.0), other=(BASE, 2.0))
    assert (selection.chosen, selection.comparisons) == ("best", ())


def test_labels_that_few_cases_have_count_as_much_as_others() -> None:
    dice = np.array([[0.8, np.nan], [0.6, np.nan], [0.7, 0.1]])
    assert mean_of_labels(dice) == pytest.approx((0.7 + 0.1) / 2)
    assert math.isnan(mean_of_labels(np.full((3, 2), np.nan)))
    gain, low, high = compare(dice + 0.05, dice)
    assert gain == pytest.approx(0.05)
    assert low <= gain <= high


def test_an_interval_is_not_widened_by_cases_without_a_label() -> None:
    rng = np.random.default_rng(1)
    dice = np.stack([0.93 + 0.01 * rng.standard_normal(50), np.full(50, np.nan)], axis=1)
    dice[::10, 1] = 0.9
    gain, low, high = compare(dice, np.zeros_like(dice))
    assert gain == pytest.approx(mean_of_labels(dice))
    assert high - low < 0.01
    np.testing.assert_allclose(compare(dice + 0.1, dice), 0.1)


def test_of_few_cases_the_best_is_chosen_as_their_noise_is_not_known() -> None:
    few = BASE[:3]
    candidates = [make_candidate("cheap", few, 1.0), make_candidate("dear", few + 0.05, 2.0)]
    selection = select(candidates, {"cheap": few, "dear": few + 0.05}, missing={})
    assert (selection.chosen, selection.comparisons) == ("dear", ())
    assert selection.why == "dear has the highest mean Dice; 3 cases are too few to tell what is noise"


def test_the_interval_of_a_mean_holds_it() -> None:
    low, high = interval_of_labels(BASE)
    assert low < mean_of_labels(BASE) < high


def test_a_choice_that_is_no_candidate_is_refused() -> None:
    with pytest.raises(FormatError, match="'x' was chosen, which is none of the candidates cheap"):
        Selection(chosen="x", candidates=(make_candidate("cheap", BASE, 1.0),), comparisons=(), missing={}, why="")


def test_a_label_that_no_case_has_does_not_count() -> None:
    dice = np.array([[0.8, np.nan], [0.6, np.nan]])
    assert mean_of_labels(dice) == pytest.approx(0.7)

"""Budgets and recipes."""

from __future__ import annotations

import pytest

from autoseg.core.errors import TrainingError
from autoseg.training.config import Budget, TrainConfig
from autoseg.training.recipe import RECIPES


def test_fraction_done_follows_whichever_limit_is_nearer() -> None:
    budget = Budget(iterations=100, max_time_s=50)
    assert budget.fraction_done(0, 0) == 0
    assert budget.fraction_done(10, 25) == 0.5
    assert budget.fraction_done(80, 25) == 0.8
    assert budget.fraction_done(200, 25) == 1


def test_epochs_are_250_steps_and_short_budgets_have_twenty_shorter_ones() -> None:
    epochs = Budget.make(epochs=3)
    assert epochs is not None
    assert (epochs.iterations, epochs.iterations_per_epoch) == (750, 250)
    short = Budget.make(iterations=100)
    assert short is not None
    assert short.iterations_per_epoch == 5
    long = Budget.make(iterations=100_000)
    assert long is not None
    assert long.iterations_per_epoch == 250
    assert Budget.make() is None


@pytest.mark.parametrize("wrong", [{"epochs": 1, "iterations": 1}, {"iterations": 0}, {"max_time_s": 0.0}])
def test_impossible_budgets_are_refused(wrong: dict) -> None:
    with pytest.raises(TrainingError):
        Budget.make(**wrong)


def test_published_schedule_is_polynomial() -> None:
    recipe = RECIPES["published"]
    assert recipe.rate(0, mirrored=True) == pytest.approx(0.01)
    assert recipe.rate(0.5, mirrored=False) == pytest.approx(0.01 * 0.5**0.9)
    assert recipe.rate(1, mirrored=True) == 0


def test_cosine_schedule_warms_up_and_ends_at_zero() -> None:
    recipe = RECIPES["fast"]
    rates = [recipe.rate(step / 1000, mirrored=False) for step in range(1001)]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(recipe.learning_rate)
    assert peak == round(1000 * recipe.warmup_fraction)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert recipe.rate(0.3, mirrored=True) == pytest.approx(recipe.mirrored_rate * rates[300])


def test_unknown_recipe_is_named_with_those_that_exist() -> None:
    with pytest.raises(TrainingError, match=r"'slow'.*fast, published"):
        TrainConfig(budget=Budget(iterations=1), recipe="slow")


def test_unknown_sampling_is_named_with_those_that_exist() -> None:
    with pytest.raises(TrainingError, match=r"'best'.*published, balanced"):
        TrainConfig(budget=Budget(iterations=1), sampling="best")

"""The bootstrap interval against its definition and against theory."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autoseg.evaluation.intervals import PIECE_VALUES, bootstrap_interval


def test_agrees_with_theory_where_there_is_one() -> None:
    """Of many values the mean is normal, so the interval is 1.96 standard errors to either side."""
    values = np.random.default_rng(0).standard_normal(400) * 3 + 10
    error = values.std() / math.sqrt(len(values))
    low, high = bootstrap_interval(values)
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error)


def test_agrees_with_scipy() -> None:
    from scipy.stats import bootstrap

    values = np.random.default_rng(1).random(12) ** 3
    expected = bootstrap((values,), np.mean, n_resamples=20_000, method="percentile")
    spread = expected.standard_error
    assert bootstrap_interval(values) == pytest.approx(tuple(expected.confidence_interval), abs=0.15 * spread)


def test_few_values() -> None:
    assert all(math.isnan(end) for end in bootstrap_interval(np.empty(0)))
    assert bootstrap_interval(np.array([0.7])) == (0.7, 0.7)
    # Of two values a quarter of all draws is twice the same one.
    assert bootstrap_interval(np.array([0.0, 1.0])) == (0.0, 1.0)


def test_repeats_itself_and_depends_on_the_seed() -> None:
    values = np.random.default_rng(2).random(50)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values)


def test_more_values_than_fit_into_a_piece() -> None:
    values = np.random.default_rng(3).random(PIECE_VALUES // 500)
    low, high = bootstrap_interval(values)
    error = values.std() / math.sqrt(len(values))
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)

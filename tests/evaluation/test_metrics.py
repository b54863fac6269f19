"""Counts and Dice against MedPy and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from medpy.metric import binary

from autoseg.core.labels import LabelSpec
from autoseg.evaluation.evaluate import EMPTY, OK, ONLY_PREDICTED, score_case, summarise_scores
from autoseg.evaluation.metrics import Counts, count_labels, dice

VALUES = (1, 5, 200)
SPEC = LabelSpec(names=("a", "b", "c"), values=VALUES)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64, np.uint64])
def test_dice_equals_medpy(dtype: type) -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.choice(np.array([0, *VALUES], dtype), (9, 10, 11)) for _ in range(2))
    for value, counts in zip(VALUES, count_labels(first, second, VALUES), strict=True):
        assert dice(counts) == pytest.approx(binary.dc(first == value, second == value), abs=1e-12)
        assert counts.overlap == ((first == value) & (second == value)).sum()
        assert counts.predicted == (first == value).sum()
        assert counts.reference == (second == value).sum()


def test_counts_by_hand() -> None:
    prediction = np.array([[1, 1, 0], [5, 0, 9]])
    reference = np.array([[1, 0, 0], [1, 5, 9]])
    assert count_labels(prediction, reference, (5, 1, 7)) == (
        Counts(overlap=0, predicted=1, reference=1),
        Counts(overlap=1, predicted=2, reference=2),
        Counts(overlap=0, predicted=0, reference=0),
    )


def test_dice_by_hand() -> None:
    assert dice(Counts(overlap=2, predicted=3, reference=5)) == 0.5
    assert dice(Counts(overlap=4, predicted=4, reference=4)) == 1
    assert math.isnan(dice(Counts(overlap=0, predicted=4, reference=0)))
    assert dice(Counts(overlap=0, predicted=0, reference=4)) == 0
    assert math.isnan(dice(Counts(overlap=0, predicted=0, reference=0)))


def test_stray_value_neither_counts_nor_takes_memory() -> None:
    prediction = np.array([[1, 2_000_000_000], [0, 1]], np.int64)
    reference = np.array([[1, 1], [4_000_000_000, 0]], np.int64)
    assert count_labels(prediction, reference, (1,)) == (Counts(overlap=1, predicted=2, reference=2),)


def test_label_in_neither_is_nan_with_a_status() -> None:
    prediction = np.array([[1, 1, 0, 0]])
    reference = np.array([[1, 0, 0, 5]])
    score = score_case("case", prediction, reference, SPEC)
    assert [label.status for label in score.labels] == [OK, OK, EMPTY]
    assert [label.label for label in score.labels] == ["a", "b", "c"]
    assert score.labels[0].dice == pytest.approx(2 / 3)
    assert score.labels[1].dice == 0, "missed"
    assert math.isnan(score.labels[2].dice)
    assert score.mean_dice == pytest.approx(1 / 3)
    assert [(label.n_predicted, label.n_reference) for label in score.labels] == [(2, 1), (0, 1), (0, 0)]


def test_label_not_in_the_reference_is_nan_with_a_status() -> None:
    score = score_case("case", np.array([[1, 5, 5, 0]]), np.array([[1, 0, 0, 0]]), SPEC)
    assert [label.status for label in score.labels] == [OK, ONLY_PREDICTED, EMPTY]
    assert math.isnan(score.labels[1].dice)
    assert score.labels[1].n_predicted == 2
    assert score.mean_dice == 1


def test_means_leave_out_what_is_in_neither() -> None:
    """Mean of the labels' means: a of both cases, b of one case, c of none."""
    first = score_case("first", np.array([1, 1, 5, 5]), np.array([1, 1, 5, 0]), SPEC)
    second = score_case("second", np.array([1, 0, 0]), np.array([0, 1, 0]), SPEC)
    evaluation = summarise_scores([first, second], not_scored=["third"])
    assert evaluation.label_dice["a"] == pytest.approx(0.5)
    assert evaluation.label_dice["b"] == pytest.approx(2 / 3)
    assert math.isnan(evaluation.label_dice["c"])
    assert evaluation.mean_dice == pytest.approx((0.5 + 2 / 3) / 2)
    assert evaluation.not_scored == ("third",)
    empty = summarise_scores([])
    assert math.isnan(empty.mean_dice)
    assert empty.label_dice == {}

"""Counts and ratios against MedPy, MONAI and by hand, and what a case and a set of cases make of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from medpy.metric import binary
from monai.metrics import DiceMetric, MeanIoU
from numpy.typing import NDArray

from autoseg.core.errors import AutosegError
from autoseg.core.labels import LabelSpec
from autoseg.evaluation.evaluate import score_case, summarise_scores
from autoseg.evaluation.metrics import (
    Counts,
    count_labels,
    count_mask,
    dice,
    f_beta,
    iou,
    precision,
    recall,
    volume_error,
)
from autoseg.evaluation.scores import (
    EMPTY,
    METRICS,
    MISSED,
    OK,
    ONLY_PREDICTED,
    CaseScore,
    ScoreSettings,
    Target,
    parse_regions,
    targets_of,
)

VALUES = (1, 5, 200)
TARGETS = targets_of(LabelSpec(names=("a", "b", "c"), values=VALUES))
SETTINGS = ScoreSettings()


def score(prediction: NDArray, reference: NDArray, *, case: str = "case") -> CaseScore:
    """With a spacing of 1 mm."""
    return score_case(case, prediction, reference, TARGETS, spacing_mm=(1.0,) * reference.ndim)


# -- counts and ratios -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64, np.uint64])
def test_ratios_equal_medpys(dtype: type) -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.choice(np.array([0, *VALUES], dtype), (9, 10, 11)) for _ in range(2))
    for value, counts in zip(VALUES, count_labels(first, second, VALUES), strict=True):
        found, wanted = first == value, second == value
        assert dice(counts) == pytest.approx(binary.dc(found, wanted), abs=1e-12)
        assert iou(counts) == pytest.approx(binary.jc(found, wanted), abs=1e-12)
        assert precision(counts) == pytest.approx(binary.precision(found, wanted), abs=1e-12)
        assert recall(counts) == pytest.approx(binary.recall(found, wanted), abs=1e-12)
        assert volume_error(counts) == pytest.approx(binary.ravd(found, wanted), abs=1e-12)
        assert counts == count_mask(found, wanted)
        assert counts == Counts(overlap=(found & wanted).sum(), predicted=found.sum(), reference=wanted.sum()), (
            "by hand"
        )


def test_dice_and_iou_equal_monais() -> None:
    rng = np.random.default_rng(1)
    first, second = (rng.integers(0, 4, (6, 7, 8)) for _ in range(2))
    labels = (1, 2, 3)
    counts = count_labels(first, second, labels)
    hot = [torch.from_numpy(np.stack([array == value for value in labels])[None]) for array in (first, second)]
    for metric, ratio in ((DiceMetric(reduction="none"), dice), (MeanIoU(reduction="none"), iou)):
        metric(*hot)
        np.testing.assert_allclose([ratio(known) for known in counts], metric.aggregate()[0], rtol=1e-6)


def test_counts_by_hand() -> None:
    prediction = np.array([[1, 1, 0], [5, 0, 9]])
    reference = np.array([[1, 0, 0], [1, 5, 9]])
    assert count_labels(prediction, reference, (5, 1, 7)) == (
        Counts(overlap=0, predicted=1, reference=1),
        Counts(overlap=1, predicted=2, reference=2),
        Counts(overlap=0, predicted=0, reference=0),
    )


def test_ratios_by_hand() -> None:
    counts = Counts(overlap=2, predicted=3, reference=5)
    assert dice(counts) == 0.5
    assert iou(counts) == pytest.approx(2 / 6)
    assert precision(counts) == pytest.approx(2 / 3)
    assert recall(counts) == pytest.approx(2 / 5)
    assert volume_error(counts) == pytest.approx(-2 / 5)
    # From its definition: (1 + b^2) p r / (b^2 p + r).
    assert f_beta(counts, beta=2) == pytest.approx(5 * (2 / 3) * (2 / 5) / (4 * (2 / 3) + 2 / 5))
    assert f_beta(counts, beta=1) == dice(counts)
    same = Counts(overlap=4, predicted=4, reference=4)
    assert [ratio(same) for ratio in (dice, iou, precision, recall)] == [1, 1, 1, 1]
    assert volume_error(same) == 0


def test_ratios_of_what_is_not_there() -> None:
    missed = Counts(overlap=0, predicted=0, reference=4)
    assert [ratio(missed) for ratio in (dice, iou, recall, volume_error)] == [0, 0, 0, -1]
    assert f_beta(missed, beta=2) == 0
    assert math.isnan(precision(missed))
    for empty in (Counts(overlap=0, predicted=4, reference=0), Counts(overlap=0, predicted=0, reference=0)):
        assert all(math.isnan(ratio(empty)) for ratio in (dice, iou, precision, recall, volume_error))
        assert math.isnan(f_beta(empty, beta=2))


def test_stray_value_neither_counts_nor_takes_memory() -> None:
    prediction = np.array([[1, 2_000_000_000], [0, 1]], np.int64)
    reference = np.array([[1, 1], [4_000_000_000, 0]], np.int64)
    expected = Counts(overlap=1, predicted=2, reference=2)
    assert count_labels(prediction, reference, (1,)) == (expected,)
    found = score(prediction, reference).labels[0]
    assert (found.n_predicted, found.n_reference, found.dice) == (2, 2, dice(expected))


# -- one case ----------------------------------------------------------------------------------------------------------


def test_what_is_not_there_is_nan_or_zero_with_a_status() -> None:
    """One label is there, one was missed, one is in neither; then one that is in the prediction alone."""
    scores = score(np.array([[1, 1, 0, 0]]), np.array([[1, 0, 0, 5]]))
    assert [label.status for label in scores.labels] == [OK, MISSED, EMPTY]
    assert [label.label for label in scores.labels] == ["a", "b", "c"]
    found, missed, empty = scores.labels
    assert found.dice == pytest.approx(2 / 3)
    zero = {"dice", "iou", "recall", "f_beta", "surface_dice", "lesion_f1", "lesion_recall"}
    for name in METRICS:
        assert math.isfinite(getattr(found, name))
        expected = 0 if name in zero else -1 if name == "volume_error" else math.nan
        assert getattr(missed, name) == pytest.approx(expected, nan_ok=True), name
        assert math.isnan(getattr(empty, name)), name
    assert scores.mean_dice == pytest.approx(1 / 3)
    assert [(label.n_predicted, label.n_reference) for label in scores.labels] == [(2, 1), (0, 1), (0, 0)]

    false = score(np.array([[1, 5, 5, 0]]), np.array([[1, 0, 0, 0]]))
    assert [label.status for label in false.labels] == [OK, ONLY_PREDICTED, EMPTY]
    assert all(math.isnan(getattr(false.labels[1], name)) for name in METRICS)
    assert (false.labels[1].n_predicted, false.labels[1].n_predicted_lesions) == (2, 1)
    assert false.mean_dice == 1


def test_volumes_are_in_millilitres() -> None:
    prediction, reference = np.zeros((2, 2, 4, 5), np.uint8)
    prediction[:, :, :3], reference[:, :, :2] = 1, 1
    for thin in (False, True):
        found, wanted = (array[:1] if thin else array for array in (prediction, reference))
        label = score_case("case", found, wanted, TARGETS, spacing_mm=(5.0, 10.0, 20.0)).labels[0]
        n_slices = 1 if thin else 2
        assert (label.predicted_ml, label.reference_ml) == (n_slices * 12.0, n_slices * 8.0)
        assert label.volume_error == 0.5


def test_region_is_scored_as_one_mask() -> None:
    rng = np.random.default_rng(2)
    first, second = (rng.choice(np.array([0, *VALUES], np.uint8), (5, 6, 7)) for _ in range(2))
    region = Target(name="both", values=(1, 200))
    one, other = (np.isin(array, (1, 200)).astype(np.uint8) for array in (first, second))
    found = score_case("case", first, second, [region], spacing_mm=(3, 1, 1)).labels[0]
    expected = score_case("case", one, other, [Target(name="both", values=(1,))], spacing_mm=(3, 1, 1)).labels[0]
    assert found.values == (1, 200)
    for name in (*METRICS, "status", "n_reference", "n_lesions", "n_matched_lesions"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.dice == pytest.approx(binary.dc(one, other))


def test_ignored_voxels_count_neither_way() -> None:
    rng = np.random.default_rng(3)
    first, second = (rng.choice(np.array([0, *VALUES], np.uint8), (5, 6, 7)) for _ in range(2))
    second[:, 2:4] = 255
    found = score_case("case", first, second, TARGETS, spacing_mm=(1, 1, 1), settings=ScoreSettings(ignore=255))
    first[:, 2:4], second[:, 2:4] = 0, 0
    assert found == score(first, second)
    # What is predicted there is neither right nor wrong.
    assert [label.n_predicted for label in found.labels] == [int((first == value).sum()) for value in VALUES]


def test_threads_give_the_same() -> None:
    rng = np.random.default_rng(4)
    first, second = (rng.choice(np.array([0, *VALUES], np.uint8), (5, 6, 7)) for _ in range(2))
    found = score_case("case", first, second, TARGETS, spacing_mm=(1, 1, 1), n_threads=3)
    assert found == score(first, second)


# -- all cases ---------------------------------------------------------------------------------------------------------


def test_means_leave_out_what_is_not_in_the_reference() -> None:
    """Mean of the labels' means: a of both cases, b of one case, c of none."""
    first = score(np.array([1, 1, 5, 5]), np.array([1, 1, 5, 0]))
    second = score(np.array([1, 0, 0]), np.array([0, 1, 0]))
    evaluation = summarise_scores([first, second], settings=SETTINGS, not_scored=["third"], model="abc")
    assert evaluation.label_dice["a"] == pytest.approx(0.5)
    assert evaluation.label_dice["b"] == pytest.approx(2 / 3)
    assert math.isnan(evaluation.label_dice["c"])
    assert evaluation.mean_dice == pytest.approx((0.5 + 2 / 3) / 2)
    assert (evaluation.not_scored, evaluation.model) == (("third",), "abc")
    assert [label.n_cases for label in evaluation.labels] == [2, 1, 0]
    empty = summarise_scores([], settings=SETTINGS)
    assert math.isnan(empty.mean_dice)
    assert empty.label_dice == {}


def test_statistics_by_hand() -> None:
    """Of four references that have the label one was missed; a fifth does not have it."""
    reference = np.array([0, 1, 1, 0, 0, 0])
    predictions = [[0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0], [0] * 6, [0, 0, 0, 0, 1, 1]]
    references = [reference] * 4 + [np.zeros(6, int)]
    pairs = zip(predictions, references, strict=True)
    evaluation = summarise_scores([score(np.array(found), wanted) for found, wanted in pairs], settings=SETTINGS)
    summary = evaluation.labels[0]
    assert (summary.n_cases, summary.n_missed, summary.n_false) == (4, 1, 1)
    dices = [1, 2 / 3, 2 / 3, 0]
    statistic = summary.metrics["dice"]
    assert (statistic.n, statistic.mean, statistic.std, statistic.median) == pytest.approx(
        (4, np.mean(dices), np.std(dices), 2 / 3)
    )
    assert 0 <= statistic.low < statistic.mean < statistic.high <= 1
    assert set(summary.metrics) == set(METRICS)
    assert summary.metrics["volume_error"].mean == pytest.approx((0 - 0.5 + 1 - 1) / 4)
    assert summary.metrics["precision"].n == 3, "nothing was predicted in the one that was missed"
    assert summary.metrics["hd95_mm"].n == 3
    assert summary.metrics["assd_mm"].mean == pytest.approx((0 + 1 / 3 + 3 / 4) / 3)
    nothing = evaluation.labels[1].metrics["dice"]
    assert nothing.n == 0
    assert all(math.isnan(value) for value in (nothing.mean, nothing.std, nothing.median, nothing.low, nothing.high))


# -- what users choose -------------------------------------------------------------------------------------------------


def test_settings_without_meaning_are_refused() -> None:
    with pytest.raises(AutosegError, match=r"beta is 0, expected more than 0; the tolerance is -1, .* IoU <= 1"):
        ScoreSettings(beta=0, tolerance_mm=-1, min_lesion_iou=1.5)
    with pytest.raises(AutosegError, match="beta is nan"):
        ScoreSettings(beta=math.nan)


def test_regions_from_text() -> None:
    assert parse_regions(["whole=1,2", " core = 3 "]) == {"whole": (1, 2), "core": (3,)}
    for text in ("whole", "=1", "whole=", "whole=a", "whole=1,,2", "whole=-1"):
        with pytest.raises(AutosegError, match="for instance whole=1,2"):
            parse_regions([text])
    with pytest.raises(AutosegError, match="twice"):
        parse_regions(["a=1", "a=2"])
    with pytest.raises(AutosegError, match="from 1 to 65535"):
        Target(name="a", values=(0, 1))

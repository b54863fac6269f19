"""Which lesions match, with known answers and against all ways to match them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from autoseg.evaluation.evaluate import score_case
from autoseg.evaluation.lesions import count_lesions
from autoseg.evaluation.metrics import Counts
from autoseg.evaluation.scores import LabelScore, ScoreSettings, Target

Mask = NDArray[np.bool_]


def row(*spans: tuple[int, int]) -> Mask:
    """Lesions from a start to before a stop, in a row of 40 voxels."""
    mask = np.zeros((1, 1, 40), bool)
    for start, stop in spans:
        mask[..., start:stop] = True
    return mask


def counts(n_matched: int, n_predicted: int, n_reference: int) -> Counts:
    return Counts(overlap=n_matched, predicted=n_predicted, reference=n_reference)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        # One found, one missed, one made up.
        (row((0, 5), (30, 32)), row((1, 6), (10, 14)), counts(1, 2, 2)),
        # One prediction runs two lesions into one, and finds one of them.
        (row((0, 10)), row((0, 4), (6, 10)), counts(1, 1, 2)),
        # One lesion in two pieces: one piece is right.
        (row((0, 4), (6, 10)), row((0, 10)), counts(1, 2, 1)),
        # Exactly the minimum of 1 / 10, and just below it.
        (row((0, 1)), row((0, 10)), counts(1, 1, 1)),
        (row((0, 1)), row((0, 11)), counts(0, 1, 1)),
        # The second prediction and the first lesion have 5 / 11, the most of all; 2 / 8 and 2 / 9 are more together.
        (row((0, 2), (3, 11)), row((0, 8), (9, 12)), counts(2, 2, 2)),
        # Here they have 6 / 11, and the others only 1 / 8 and 2 / 10: the sum decides, not the number of pairs.
        (row((0, 1), (2, 11)), row((0, 8), (9, 12)), counts(1, 2, 2)),
        (row(), row((0, 3)), counts(0, 0, 1)),
        (row((0, 3)), row(), counts(0, 1, 0)),
        (row(), row(), counts(0, 0, 0)),
    ],
)
def test_known_answers(prediction: Mask, reference: Mask, expected: Counts) -> None:
    assert count_lesions(prediction, reference, min_iou=0.1) == expected


def test_corners_connect() -> None:
    mask = np.zeros((4, 4, 4), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[3, 3, 3] = True
    assert count_lesions(mask, mask, min_iou=0.5) == counts(2, 2, 2)
    assert count_lesions(mask[1], mask[1], min_iou=0.5) == counts(1, 1, 1)
    flat = np.eye(3, dtype=bool)
    assert count_lesions(flat, flat, min_iou=0.5) == counts(1, 1, 1)


def ious_of(prediction: Mask, reference: Mask) -> NDArray[np.float64]:
    """Of every predicted component (rows) with every one of the reference (columns)."""
    ones = np.ones((3,) * prediction.ndim)
    (found, n_found), (wanted, n_wanted) = (ndimage.label(mask, ones) for mask in (prediction, reference))
    ious = np.zeros((n_found, n_wanted))
    for first, second in itertools.product(range(n_found), range(n_wanted)):
        a, b = found == first + 1, wanted == second + 1
        ious[first, second] = (a & b).sum() / (a | b).sum()
    return ious


def numbers_of_best_matchings(weights: NDArray[np.float64]) -> set[int]:
    """How many pairs the matchings with the largest sum have, from all ways to match."""
    weights = weights.T if weights.shape[0] > weights.shape[1] else weights
    numbers: dict[float, set[int]] = {}
    for columns in itertools.permutations(range(weights.shape[1]), len(weights)):
        chosen = weights[np.arange(len(weights)), columns]
        numbers.setdefault(round(float(chosen.sum()), 9), set()).add(int((chosen > 0).sum()))
    return numbers[max(numbers)]


def test_matching_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    n_with_choice = 0
    for _ in range(150):
        # Clumps over dots, so that one often meets several.
        prediction, reference = (ndimage.binary_dilation(rng.random((1, 50)) < 0.08, iterations=n) for n in (3, 1))
        prediction &= rng.random((1, 50)) < 0.95
        weights = ious_of(prediction, reference)
        weights[weights < 0.1] = 0
        if max(weights.shape) > 6:
            continue
        assert count_lesions(prediction, reference, min_iou=0.1).overlap in numbers_of_best_matchings(weights)
        n_with_choice += bool(((weights > 0).sum(axis=0) > 1).any() or ((weights > 0).sum(axis=1) > 1).any())
    assert n_with_choice > 30


def test_thousands_of_lesions() -> None:
    """Every one is shifted by a voxel of three, or missing; a matrix of all pairs would have 10^8 numbers."""
    reference = np.zeros((10, 200, 400), bool)
    reference[::2, ::4, ::4] = reference[::2, ::4, 1::4] = reference[::2, 1::4, ::4] = True
    prediction = reference.copy()
    prediction[:, :, 1::4] = False
    prediction[:, :100] = False
    found = count_lesions(prediction, reference, min_iou=0.5)
    assert found == counts(5 * 25 * 100, 5 * 25 * 100, 5 * 50 * 100)


def test_scores_of_lesions() -> None:
    prediction, reference = row((0, 5), (20, 25), (30, 32)), row((1, 6), (10, 14))

    def score(first: Mask, second: Mask, min_iou: float = 0.1) -> LabelScore:
        settings = ScoreSettings(min_lesion_iou=min_iou)
        found, wanted = (array.astype(np.uint8) for array in (first, second))
        targets = [Target(name="lesion", values=(1,))]
        return score_case("case", found, wanted, targets, spacing_mm=(1, 1, 1), settings=settings).labels[0]

    found = score(prediction, reference)
    assert (found.n_lesions, found.n_predicted_lesions, found.n_matched_lesions) == (2, 3, 1)
    assert (found.lesion_recall, found.lesion_precision, found.lesion_f1) == pytest.approx((1 / 2, 1 / 3, 2 / 5))
    assert score(prediction, reference, min_iou=0.7).n_matched_lesions == 0

"""What folds tell of a case, from logits with known answers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from autoseg.core.labels import LabelSpec, Region
from autoseg.evaluation.crossval import CaseReview
from autoseg.evaluation.review import Reviewer, calibrate, find_suspects, fit_quality, robust_z
from autoseg.inference.quality import Agreement, QualityModel
from autoseg.networks.outputs import Outputs

N_CLASSES = 3


def logits_of(classes: Tensor, *, sure: float = 0.9) -> Tensor:
    """(K, Z, Y, X) logits whose softmax gives the classes this probability and the others the rest evenly."""
    probability = torch.full((N_CLASSES, *classes.shape), (1 - sure) / (N_CLASSES - 1))
    probability.scatter_(0, classes[None], sure)
    return probability.log()


def boxes(*slices: tuple[slice, int]) -> Tensor:
    classes = torch.zeros(8, 6, 6, dtype=torch.int64)
    for rows, value in slices:
        classes[rows, 1:5, 1:5] = value
    return classes


A, B, C = boxes((slice(0, 4), 1)), boxes((slice(0, 2), 1)), boxes((slice(0, 4), 1), (slice(5, 7), 2))


def rows_of(networks: list[Tensor]) -> list[Tensor]:
    """Logits (F * K, n, A, B) in three parts."""
    return list(torch.cat([logits_of(classes) for classes in networks]).split([3, 1, 4], dim=1))


def test_agreement_is_the_mean_dice_of_pairs() -> None:
    agreement = Agreement(3, Outputs(N_CLASSES))
    for part in rows_of([A, B, C]):
        agreement.add(part)
    pair_ab, pair_ac, pair_bc = 2 * 2 / 6, (1 + 0) / 2, (2 * 2 / 6 + 0) / 2
    assert agreement.value == pytest.approx((pair_ab + pair_ac + pair_bc) / 3)
    of_first = Agreement(3, Outputs(N_CLASSES), of=0)
    for part in rows_of([A, B, C]):
        of_first.add(part)
    assert of_first.value == pytest.approx((pair_ab + pair_ac) / 2)


def test_a_structure_that_was_not_annotated_makes_a_case_no_worse() -> None:
    """Both folds find C, whose second class nobody has looked for; the reference shows A."""
    reviewer = Reviewer(2, Outputs(N_CLASSES), own=0)
    logits = torch.cat([logits_of(C, sure=0.98)] * 2)
    reviewer.add(logits, A, known=(True, True, False))
    review = reviewer.review("case", 0)
    assert review.consensus_dice == pytest.approx(1)
    assert review.loss < 0.05
    assert reviewer.counts().confusion[0, 2] == 0
    blind = Reviewer(2, Outputs(N_CLASSES), own=0)
    blind.add(logits, A)
    assert blind.review("case", 0).loss > review.loss + 0.1


def test_networks_that_find_nothing_agree() -> None:
    agreement = Agreement(2, Outputs(N_CLASSES))
    agreement.add(rows_of([torch.zeros_like(A)] * 2)[0])
    assert (agreement.value, agreement.is_of_nothing) == (1, True)
    agreement.add(rows_of([A, torch.zeros_like(A)])[0])
    assert not agreement.is_of_nothing
    model = QualityModel(intercept=0, slope=1, residual_std=0, correlation=1, low_dice=0.5, n_cases=9)
    assert math.isnan(model.estimate(math.nan))
    assert [model.estimate(value) for value in (-0.5, 0.3, 2.0)] == [0, 0.3, 1]


def test_a_case_is_reviewed_row_by_row() -> None:
    reviewer = Reviewer(2, Outputs(N_CLASSES), own=1)
    start = 0
    for part in rows_of([A, B]):
        reviewer.add(part, A[start : start + part.shape[1]])
        start += part.shape[1]
    review = reviewer.review("case", 1)
    assert (review.case, review.fold) == ("case", 1)
    # Of the four rows of the reference, the fold of the case has two, sure by 0.9 of each.
    assert review.loss == pytest.approx(-(math.log(0.9) + math.log(0.05)) / 2, rel=1e-5)
    assert review.agreement == pytest.approx(2 * 2 / 6)
    counts = reviewer.counts()
    assert counts.confusion.sum() == A.numel()
    assert counts.confusion[1].tolist() == [2 * 16, 2 * 16, 0]
    calibration = calibrate([counts, counts])
    assert calibration.n_voxels == (0,) * 8 + (0, 2 * 4 * 16) or calibration.n_voxels[8:] == (2 * 4 * 16, 0)
    known = next(index for index, n in enumerate(calibration.n_voxels) if n)
    assert calibration.confidence[known] == pytest.approx(0.9, abs=1e-5)
    assert calibration.accuracy[known] == 0.5
    assert calibration.expected_error == pytest.approx(0.4, abs=1e-5)


def test_one_fold_alone_has_nobody_to_agree_with() -> None:
    reviewer = Reviewer(1, Outputs(N_CLASSES), own=0)
    reviewer.add(logits_of(A), A)
    assert math.isnan(reviewer.review("case", 0).agreement)
    assert reviewer.review("case", 0).consensus_dice == 1


def make_reviews(n: int, *, seed: int = 0) -> list[CaseReview]:
    rng = np.random.default_rng(seed)
    agreement = rng.uniform(0.8, 1.0, n)
    return [
        CaseReview(
            case=f"case_{i}",
            fold=i % 5,
            loss=float(0.5 + 0.05 * rng.standard_normal()),
            agreement=float(agreement[i]),
            consensus_dice=float(0.9 + 0.01 * rng.standard_normal()),
        )
        for i in range(n)
    ]


def test_the_line_from_agreement_to_dice_is_found() -> None:
    reviews = make_reviews(30)
    dice = [0.1 + 0.8 * review.agreement for review in reviews]
    quality = fit_quality(reviews, dice)
    assert quality is not None
    assert (quality.intercept, quality.slope) == (pytest.approx(0.1), pytest.approx(0.8))
    assert quality.correlation == pytest.approx(1)
    assert quality.estimate(0.9) == pytest.approx(0.82)
    # A case without a Dice does not count.
    with_gap = fit_quality(reviews, [float("nan"), *dice[1:]])
    assert with_gap is not None
    assert with_gap.n_cases == 29


def test_a_few_wrong_labels_do_not_bend_the_line() -> None:
    reviews = make_reviews(30)
    dice = [0.1 + 0.8 * review.agreement for review in reviews]
    for index in (3, 11, 20):
        dice[index] = 0.2
    quality = fit_quality(reviews, dice)
    assert quality is not None
    assert quality.estimate(0.9) == pytest.approx(0.82, abs=0.01)
    assert quality.residual_std < 0.01


def test_no_line_where_agreement_tells_nothing() -> None:
    reviews = make_reviews(30)
    assert fit_quality(reviews[:5], [0.5] * 5) is None
    assert fit_quality(reviews, [0.5] * 30) is None
    assert fit_quality(reviews, [1 - review.agreement for review in reviews]) is None


def test_a_case_whose_labels_all_folds_contradict_comes_first() -> None:
    reviews = make_reviews(40)
    reviews[7] = CaseReview(case="wrong", fold=2, loss=3.0, agreement=0.9, consensus_dice=0.3)
    suspects = find_suspects(reviews)
    assert suspects[0].case == "wrong"
    assert "Dice of 0.30 with its labels (usual 0.90)" in suspects[0].why
    assert [known.score for known in suspects] == sorted((known.score for known in suspects), reverse=True)
    assert find_suspects(reviews[:5]) == ()


def test_robust_z_is_not_moved_by_what_it_looks_for() -> None:
    values = np.array([*np.linspace(-1, 1, 101), 1e6])
    z = robust_z(values)
    assert abs(z[:-1]).max() < 3
    assert z[-1] == 10
    assert robust_z(np.array([np.nan, 1.0, 1.0])).tolist() == [0, 0, 0]


# -- regions, ignored voxels, and structures that were not looked for --------------------------------------------------

LABELS = LabelSpec(names=("a", "b"), values=(1, 2))
NESTED = replace(
    LABELS,
    regions=(Region(name="whole", values=(1, 2), written=1), Region(name="core", values=(2,), written=2)),
)


def region_logits(classes: Tensor, *, sure: float = 0.9) -> Tensor:
    """(2, Z, Y, X): regions of the classes are sure by this probability, others as surely not there."""
    members = Outputs.of(NESTED).members(classes)
    return torch.where(members, 1.0, -1.0) * math.log(sure / (1 - sure))


def test_a_case_with_regions_is_reviewed_by_its_classes() -> None:
    reviewer = Reviewer(2, Outputs.of(NESTED), own=0)
    reviewer.add(torch.cat([region_logits(C), region_logits(A)]), C)
    counts = reviewer.counts()
    assert counts.confusion.diagonal().tolist() == [C.numel() - 96, 64, 32]
    assert counts.confusion.sum() == C.numel()
    review = reviewer.review("case", 0)
    # Both regions of every voxel are right by 0.9.
    assert review.loss == pytest.approx(-2 * math.log(0.9), rel=1e-5)
    calibration = calibrate([counts])
    known = next(index for index, n in enumerate(calibration.n_voxels) if n)
    assert calibration.n_voxels[known] == 96
    assert calibration.confidence[known] == pytest.approx(0.81, abs=1e-5)
    assert calibration.accuracy[known] == 1
    # The mean of logits of opposite sign is zero where the folds differ, and that is not above it.
    assert review.consensus_dice == pytest.approx((1 + 0) / 2)
    assert review.agreement == pytest.approx((1 + 0) / 2)


@pytest.mark.parametrize("labels", [LABELS, NESTED], ids=["classes", "regions"])
def test_ignored_voxels_are_not_reviewed(labels: LabelSpec) -> None:
    outputs = Outputs.of(replace(labels, ignore=9))
    make = region_logits if labels.regions else logits_of
    hidden = C.clone()
    hidden[3:] = 3
    reviewer, expected = Reviewer(1, outputs, own=0), Reviewer(1, Outputs.of(labels), own=0)
    reviewer.add(make(B), hidden)
    expected.add(make(B)[:, :3], C[:3])
    assert reviewer.review("case", 0).loss == expected.review("case", 0).loss
    assert reviewer.review("case", 0).consensus_dice == expected.review("case", 0).consensus_dice
    np.testing.assert_array_equal(reviewer.counts().confusion, expected.counts().confusion)
    np.testing.assert_array_equal(reviewer.counts().bins, expected.counts().bins)
    assert reviewer.counts().confusion.sum() == C[:3].numel()


@pytest.mark.parametrize("labels", [LABELS, NESTED], ids=["classes", "regions"])
def test_finding_what_nobody_looked_for_makes_no_case_suspicious(labels: LabelSpec) -> None:
    """The networks find both structures, and the reference has the first alone."""
    outputs = Outputs.of(labels)
    make = region_logits if labels.regions else logits_of
    reference = C.where(C != 2, 1) if labels.regions else C.where(C != 2, 0)
    known = (True, False) if labels.regions else (True, True, False)
    partly, wholly = Reviewer(2, outputs, own=0), Reviewer(2, outputs, own=0)
    partly.add(torch.cat([make(C)] * 2), reference, known=known)
    wholly.add(torch.cat([make(C)] * 2), reference)
    assert partly.review("case", 0).consensus_dice == 1
    assert wholly.review("case", 0).consensus_dice < 1
    assert partly.review("case", 0).loss == pytest.approx(-math.log(0.9), rel=1e-4)
    assert wholly.review("case", 0).loss > partly.review("case", 0).loss
    assert partly.counts().confusion[:, 2].sum() == 0


def test_a_case_in_which_all_was_looked_for_is_reviewed_as_ever() -> None:
    said, unsaid = Reviewer(1, Outputs(N_CLASSES), own=0), Reviewer(1, Outputs(N_CLASSES), own=0)
    said.add(logits_of(C), A, known=(True,) * N_CLASSES)
    unsaid.add(logits_of(C), A)
    assert said.review("case", 0).loss == pytest.approx(unsaid.review("case", 0).loss)
    np.testing.assert_array_equal(said.counts().confusion, unsaid.counts().confusion)

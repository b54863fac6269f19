"""Folds: those of the published method, groups in one piece."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from autoseg.core.errors import DatasetError
from autoseg.core.serialize import read_json, write_json
from autoseg.data.dataset import Case
from autoseg.data.splits import Splits, make_splits, parse_folds


def make_cases(n_cases: int, *, cases_per_group: int = 1) -> list[Case]:
    """Numbered without leading zeros, so that the order of the names is not the order of the numbers."""
    return [
        Case(
            id=f"case_{number}",
            group=f"patient_{number // cases_per_group}",
            images=(Path(f"/i/{number}.nii.gz"),),
            label=Path(f"/l/{number}.nii.gz"),
        )
        for number in range(n_cases)
    ]


def check_cover(splits: Splits, cases: list[Case]) -> None:
    """Every case validates once, and trains in every other fold."""
    ids = sorted(case.id for case in cases)
    assert sorted(case for fold in splits.folds for case in fold.validation) == ids
    for fold in splits.folds:
        assert sorted((*fold.training, *fold.validation)) == ids
        assert fold.training
        assert fold.validation
        assert list(fold.training) == sorted(fold.training)


@pytest.mark.parametrize("n_cases", [5, 7, 23, 260])
def test_equal_to_the_folds_of_the_published_method(n_cases: int) -> None:
    model_selection = pytest.importorskip("sklearn.model_selection")
    cases = make_cases(n_cases)
    ids = np.array(sorted(case.id for case in cases))
    splits = make_splits(cases[::-1])
    expected = list(model_selection.KFold(5, shuffle=True, random_state=12345).split(ids))
    assert len(splits.folds) == 5
    for fold, (training, validation) in zip(splits.folds, expected, strict=True):
        assert fold.training == tuple(ids[training])
        assert fold.validation == tuple(ids[validation])


def test_the_folds_do_not_change_from_version_to_version() -> None:
    splits = make_splits(make_cases(10))
    expected = [("0", "7"), ("3", "9"), ("4", "6"), ("1", "8"), ("2", "5")]
    assert [fold.validation for fold in splits.folds] == [(f"case_{a}", f"case_{b}") for a, b in expected]
    assert splits == make_splits(make_cases(10))


@pytest.mark.parametrize(("n_cases", "cases_per_group"), [(20, 2), (23, 4), (12, 6)])
def test_groups_stay_together(n_cases: int, cases_per_group: int) -> None:
    cases = make_cases(n_cases, cases_per_group=cases_per_group)
    splits = make_splits(cases)
    check_cover(splits, cases)
    group_of = {case.id: case.group for case in cases}
    for fold in splits.folds:
        assert not {group_of[case] for case in fold.training} & {group_of[case] for case in fold.validation}


@pytest.mark.parametrize(("n_cases", "n_folds"), [(2, 2), (3, 3), (4, 4), (5, 5), (6, 5)])
def test_fewer_cases_than_folds(n_cases: int, n_folds: int) -> None:
    cases = make_cases(n_cases)
    splits = make_splits(cases)
    assert len(splits.folds) == n_folds
    check_cover(splits, cases)


def test_one_patient_trains_and_validates() -> None:
    (fold,) = make_splits(make_cases(6, cases_per_group=6)).folds
    assert len(fold.training) == 6
    assert fold.training == fold.validation


def test_one_fold_is_no_split() -> None:
    for n_folds in (0, 1):
        with pytest.raises(DatasetError, match=f"found {n_folds} folds, expected at least 2"):
            make_splits(make_cases(6), n_folds=n_folds)


def test_other_numbers_of_folds() -> None:
    cases = make_cases(11)
    splits = make_splits(cases, n_folds=3)
    assert [len(fold.validation) for fold in splits.folds] == [4, 4, 3]
    check_cover(splits, cases)


def test_splits_come_back_from_their_file(tmp_path: Path) -> None:
    splits = make_splits(make_cases(7))
    write_json(tmp_path / "splits.json", splits)
    assert read_json(tmp_path / "splits.json", Splits) == splits


@pytest.mark.parametrize(
    ("text", "folds"),
    [
        ("0..4", (0, 1, 2, 3, 4)),
        ("all", (0, 1, 2, 3, 4)),
        (" all ", (0, 1, 2, 3, 4)),
        ("0,2", (0, 2)),
        ("3", (3,)),
        ("4, 0 ,1..2", (4, 0, 1, 2)),
        ("1..1", (1,)),
        ("0..2,1..3", (0, 1, 2, 3)),
    ],
)
def test_parse_folds(text: str, folds: tuple[int, ...]) -> None:
    assert parse_folds(text, n_folds=5) == folds


@pytest.mark.parametrize("text", ["", "x", "-1", "0..", "..4", "0-4", "0,,2", "0.5", "3..1", "0,3..1", "²", "0...4"])
def test_folds_that_cannot_be_read(text: str) -> None:
    with pytest.raises(DatasetError, match=r"found the folds .*, expected for instance 0\.\.4"):
        parse_folds(text, n_folds=5)


@pytest.mark.parametrize("text", ["5", "0,7", "3..5", "0..999999999999"])
def test_folds_that_do_not_exist(text: str) -> None:
    with pytest.raises(DatasetError, match="expected folds from 0 to 4: the plan has 5"):
        parse_folds(text, n_folds=5)

"""Folds: those of the published method, those that a user asks for, groups in one piece, no case on both sides."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoseg.core.errors import DatasetError
from autoseg.core.serialize import read_json, write_json
from autoseg.data.dataset import Case
from autoseg.data.layouts import open_dataset
from autoseg.data.splits import ONE_GROUP, SHUFFLED, Fold, SplitChoices, Splits, make_splits, parse_folds, split_dataset


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
    splits = make_splits(make_cases(6, cases_per_group=6))
    assert (splits.reason, splits.is_chosen) == (ONE_GROUP, False)
    (fold,) = splits.folds
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
    # As the files were before they told how the folds were made.
    write_json(tmp_path / "splits.json", {"folds": splits.folds})
    assert read_json(tmp_path / "splits.json", Splits) == splits


def split(
    cases: Sequence[Case], folder: Path, *, n_folds: int | None = None, **choices: Any
) -> tuple[tuple[Case, ...], Splits]:
    return split_dataset(cases, SplitChoices(**choices), n_folds=n_folds, folder=folder)


def refuse(cases: Sequence[Case], folder: Path, *, n_folds: int | None = None, **choices: Any) -> str:
    with pytest.raises(DatasetError) as caught:
        split(cases, folder, n_folds=n_folds, **choices)
    return str(caught.value)


def write(file: Path, content: str | list[Any]) -> Path:
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def with_attributes(n_cases: int, *, cases_per_group: int = 1, **columns: Sequence[object]) -> list[Case]:
    cases = make_cases(n_cases, cases_per_group=cases_per_group)
    rows = [{name: str(values[number]) for name, values in columns.items()} for number in range(n_cases)]
    return [replace(case, attributes=row) for case, row in zip(cases, rows, strict=True)]


def groups_of(cases: Sequence[Case]) -> list[str]:
    return [case.group for case in cases]


def test_nothing_said_is_as_ever(tmp_path: Path) -> None:
    cases = make_cases(23, cases_per_group=2)
    same, splits = split_dataset(cases, folder=tmp_path)
    assert list(same) == cases
    assert splits == make_splits(cases)
    assert (splits.reason, splits.is_chosen) == (SHUFFLED, False)
    assert split(cases, tmp_path, n_folds=3)[1] == make_splits(cases, n_folds=3)


# Groups


def test_groups_from_names_a_column_or_a_table(tmp_path: Path) -> None:
    names = [f"p{number // 3}_slice{number}" for number in range(12)]
    cases = [replace(case, id=name, group=name) for case, name in zip(make_cases(12), names, strict=True)]
    cases = [replace(case, attributes={"patient": case.id[:2]}) for case in cases]
    rows = "".join(f"{name}, {name[:2]} \n" for name in names)
    table = write(tmp_path / "groups.csv", f"case,group\n{rows}of another dataset,p9\n")
    made = [split(cases, tmp_path, groups=by) for by in (r"(.+)_slice\d+", "column:patient", str(table))]
    for grouped, splits in made:
        assert groups_of(grouped) == [name[:2] for name in names]
        assert splits.folds == made[0][1].folds
        check_cover(splits, cases)
        for fold in splits.folds:
            assert not {name[:2] for name in fold.training} & {name[:2] for name in fold.validation}
    assert [splits.reason for _, splits in made] == [
        rf"{SHUFFLED}; groups by '(.+)_slice\d+'",
        f"{SHUFFLED}; groups by 'column:patient'",
        f"{SHUFFLED}; groups by groups.csv",
    ]


def test_cases_without_a_group_are_listed(tmp_path: Path) -> None:
    cases = with_attributes(4, patient=("a", "", "b", ""))
    for by in ("column:patient", "case_([02])", str(write(tmp_path / "g.csv", "case,group\ncase_0,a\ncase_2,b\n"))):
        message = refuse(cases, tmp_path, groups=by)
        assert "case without a group (2)\n  - case_1\n  - case_3\n  What to do: complete" in message


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ("patient", "found 'patient' with 0 groups in parentheses, expected one group such as"),
        ("(.+)_(.+)", "with 2 groups in parentheses"),
        ("(.+", "is no regular expression"),
        ("column:x", "found no column 'x' in the dataset, expected one of age, patient; or give a CSV file"),
        ("nothing.csv", "nothing.csv: no such file"),
    ],
)
def test_groups_that_cannot_be_found(by: str, message: str, tmp_path: Path) -> None:
    assert message in refuse(with_attributes(2, patient="ab", age="12"), tmp_path, groups=by)


def test_tables_that_cannot_be_used(tmp_path: Path) -> None:
    cases, file = make_cases(2), tmp_path / "g.csv"
    write(file, "case;group\n")
    assert "found the columns case;group, expected case and group" in refuse(cases, tmp_path, groups=str(file))
    write(file, "case,group\ncase_0,a\ncase_1,b\ncase_0,c\n")
    assert "case with more than one group (1)\n  - case_0: found 'a' and 'c'" in refuse(
        cases, tmp_path, groups=str(file)
    )
    file.write_bytes(b"case,group\n\xff,a\n")
    assert "cannot be read as a CSV file in UTF-8" in refuse(cases, tmp_path, groups=str(file))


def test_other_columns_of_manifests_are_at_hand(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.nii.gz", "")
    rows = [f"{number}.nii.gz,{number}.nii.gz,{site} ,x" for number, site in enumerate(("A", "B", ""))]
    manifest = write(tmp_path / "list.csv", "\n".join(["image,label,site,id", *rows]))
    expected = [{"site": site, "id": "x"} for site in ("A", "B", "")]
    assert [case.attributes for case in open_dataset(manifest).cases] == expected
    entries = [{"image": f"{number}.nii.gz", "label": f"{number}.nii.gz", "site": number} for number in range(3)]
    entries[2].update(site=None, boxes=[1, 2])
    content = json.dumps({"channels": ["CT"], "labels": {"x": 1}, "cases": entries})
    cases = open_dataset(write(tmp_path / "list.json", content)).cases
    assert [case.attributes for case in cases] == [{"site": "0"}, {"site": "1"}, {"site": ""}]


# The same number of each value in every fold


@pytest.mark.parametrize(("n_cases", "n_folds"), [(40, 5), (43, 5), (17, 3), (9, 2), (101, 10)])
def test_folds_have_as_many_of_each_value(n_cases: int, n_folds: int, tmp_path: Path) -> None:
    sites = ["abc"[number % 7 % 3] for number in range(n_cases)]
    cases = with_attributes(n_cases, site=sites)
    _, splits = split(cases, tmp_path, n_folds=n_folds, stratify="site")
    check_cover(splits, cases)
    assert split(cases[::-1], tmp_path, n_folds=n_folds, stratify="column:site")[1].folds == splits.folds
    site_of = {case.id: case.attributes["site"] for case in cases}
    counts = [Counter(site_of[case] for case in fold.validation) for fold in splits.folds]
    for site in "abc":
        assert max(count[site] for count in counts) - min(count[site] for count in counts) <= 1
    sizes = [len(fold.validation) for fold in splits.folds]
    assert max(sizes) - min(sizes) <= 1


def test_groups_stay_together_where_values_are_balanced(tmp_path: Path) -> None:
    """Of groups of three, one case has another value than the two others."""
    values = ["ab"[number // 3 % 2] if number % 3 else "c" for number in range(90)]
    cases = with_attributes(90, cases_per_group=3, site=values)
    _, splits = split(cases, tmp_path, stratify="site")
    check_cover(splits, cases)
    group_of = {case.id: case.group for case in cases}
    value_of = {case.id: value for case, value in zip(cases, values, strict=True)}
    for fold in splits.folds:
        assert not {group_of[case] for case in fold.training} & {group_of[case] for case in fold.validation}
        assert Counter(value_of[case] for case in fold.validation) == {"a": 6, "b": 6, "c": 6}


def test_no_fold_is_empty_where_groups_differ_in_size(tmp_path: Path) -> None:
    cases = [replace(case, group="large") if number < 20 else case for number, case in enumerate(make_cases(24))]
    rows = "".join(f"{case.id},{case.group == 'large'}\n" for case in cases)
    _, splits = split(cases, tmp_path, stratify=str(write(tmp_path / "v.csv", f"case,value\n{rows}")))
    check_cover(splits, cases)
    assert sorted(len(fold.validation) for fold in splits.folds) == [1, 1, 1, 1, 20]


def test_many_numbers_are_cut_into_quantiles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ages = [float((37 * number) % 40) ** 2 for number in range(40)]
    cases = with_attributes(40, age=ages)
    with caplog.at_level(logging.INFO):
        _, splits = split(cases, tmp_path, stratify="age")
    assert "--stratify age: 40 distinct numbers, cut into bins at the quantiles 95.25, 380.5, 855.75" in caplog.text
    check_cover(splits, cases)
    quarter_of = {case.id: int(age**0.5) // 10 for case, age in zip(cases, ages, strict=True)}
    for fold in splits.folds:
        assert Counter(quarter_of[case] for case in fold.validation) == {0: 2, 1: 2, 2: 2, 3: 2}


def test_values_that_do_not_reach_every_fold_or_are_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cases = with_attributes(12, site="a" * 10 + "bb")
    split(cases, tmp_path, stratify="site")
    assert "not in every fold, because fewer groups have it: b" in caplog.text
    cases[3] = replace(cases[3], attributes={})
    assert "case without a value (1)\n  - case_3" in refuse(cases, tmp_path, stratify="site")


def test_more_folds_than_groups_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, splits = split(make_cases(9, cases_per_group=3), tmp_path, n_folds=7)
    assert len(splits.folds) == 3
    assert "found 3 groups of cases for 7 folds: each group makes one" in caplog.text


# A fixed validation, and folds from a file


@pytest.mark.parametrize(
    ("name", "content"), [("v.txt", "\ufeffcase_1\n\n case_3\r\ncase_1\n"), ("v.CSV", "x,case\n,case_3\n,case_1\n")]
)
def test_a_fixed_validation_is_one_fold(name: str, content: str, tmp_path: Path) -> None:
    cases = make_cases(5)
    _, splits = split(cases, tmp_path, validation=write(tmp_path / name, content))
    assert splits.folds == (Fold(training=("case_0", "case_2", "case_4"), validation=("case_1", "case_3")),)
    assert splits.reason == f"one fold, which validates on the cases that {name} lists"


def test_a_fixed_validation_that_does_not_fit_the_cases(tmp_path: Path) -> None:
    cases, file = make_cases(4, cases_per_group=2), tmp_path / "v.txt"
    message = refuse(cases, tmp_path, validation=write(file, "case_1\ncase_7\n"))
    assert "v.txt: the folds cannot be used" in message
    assert "unknown case (1)\n  - case_7\n" in message
    assert "fold 0, patient_0: case_0 train, case_1 validate\n  What to do: put all cases of a group on one" in message
    assert "found 4 cases to validate on" not in message
    everything = "\n".join(case.id for case in cases)
    assert "fold 0: found 0 cases to train on and 4 to" in refuse(cases, tmp_path, validation=write(file, everything))
    assert "4 cases to train on and 0 to validate" in refuse(cases, tmp_path, validation=write(file, "\n"))
    assert "no such file" in refuse(cases, tmp_path, validation=tmp_path / "x.csv").lower()
    assert "cannot be read as text" in refuse(cases, tmp_path, validation=tmp_path / "x.txt")


def as_nnunet(splits: Splits) -> list[dict[str, list[str]]]:
    return [{"train": list(fold.training[::-1]), "val": list(fold.validation[::-1])} for fold in splits.folds]


def test_nnunets_folds_come_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cases = make_cases(11, cases_per_group=2)
    folds = make_splits(cases[::-1], n_folds=4).folds
    file = write(tmp_path / "mine.json", as_nnunet(Splits(folds=folds)))
    _, splits = split(cases, tmp_path, splits=file)
    assert splits == Splits(folds=folds, reason="as in mine.json")
    write_json(tmp_path / "splits.json", splits)
    assert split(cases, tmp_path, splits=tmp_path / "splits.json")[1].folds == folds
    # Where it lies in the dataset's folder, nothing need be said.
    found = file.rename(tmp_path / "splits_final.json")
    with caplog.at_level(logging.INFO):
        assert split(cases, tmp_path)[1] == Splits(folds=folds, reason="as in splits_final.json")
        assert f"the folds are those of {found}" in caplog.text
        assert split(cases, tmp_path, n_folds=5)[1] == make_splits(cases)
        assert f"{found} is not used" in caplog.text


def test_every_leak_is_listed(tmp_path: Path) -> None:
    cases = make_cases(6, cases_per_group=2)
    ids = [case.id for case in cases]
    folds = [
        {"train": ids[2:], "val": [*ids[:2], ids[2]]},
        {"train": [*ids[:2], ids[4]], "val": [ids[3], ids[5]]},
        {"train": ids[:4], "val": [*ids[4:], "nobody"]},
    ]
    message = refuse(cases, tmp_path, splits=write(tmp_path / "s.json", folds))
    assert "unknown case (1)\n  - nobody\n" in message
    assert "case in training and validation of one fold (1)\n  - case_2: fold 0\n" in message
    assert "group in training and validation of one fold (1)\n  - fold 1, patient_2: case_4 train, case_5" in message
    assert "case in no fold" not in message
    message = refuse(cases, tmp_path, splits=write(tmp_path / "s.json", [{"train": ids[:2], "val": ids[2:4]}]))
    assert "case in no fold (2)\n  - case_4\n  - case_5\n  What to do: add the case" in message
    # The groups that the user tells are those that count.
    by_name = write(tmp_path / "s.json", as_nnunet(make_splits(make_cases(6))))
    assert "group in training and validation" in refuse(cases, tmp_path, splits=by_name)
    split(cases, tmp_path, splits=by_name, groups="(.+)")
    # One patient alone has to do both.
    split(make_cases(6, cases_per_group=6), tmp_path, splits=by_name)


def test_cases_that_never_or_often_validate_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cases = make_cases(4)
    ids = [case.id for case in cases]
    folds = [{"train": ids[:3], "val": ids[3:]}, {"train": ids[:2], "val": ids[2:]}]
    with caplog.at_level(logging.INFO):
        split(cases, tmp_path, splits=write(tmp_path / "s.json", folds))
    assert "2 of 4 cases never validate" in caplog.text
    assert "cases that validate in several folds are scored by the last of them: case_3" in caplog.text


@pytest.mark.parametrize("content", ["[]", "{}", "[1]", '[{"train": ["a"]}]', '[{"train": "a", "val": ["b"]}]', "3"])
def test_files_that_hold_no_folds(content: str, tmp_path: Path) -> None:
    file = write(tmp_path / "s.json", content)
    assert "s.json: is no list of folds, expected for instance" in refuse(make_cases(3), tmp_path, splits=file)
    assert "is not JSON" in refuse(make_cases(3), tmp_path, splits=write(file, "{"))


def test_choices_that_contradict_each_other(tmp_path: Path) -> None:
    file = write(tmp_path / "s.json", as_nnunet(make_splits(make_cases(6))))
    message = refuse(make_cases(6), tmp_path, splits=file, stratify="site")
    assert "found --stratify and --splits, expected one of them" in message
    assert "leave out --folds, or the file" in refuse(make_cases(6), tmp_path, splits=file, n_folds=5)


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

"""Labels and regions as they are listed in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autoseg.core.errors import DatasetError
from autoseg.core.labels import LabelSpec, Region
from autoseg.data.listings import is_whole, labels_of, parse_labels, structure_labels

WHERE = Path("dataset.json")
BRATS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}


def parse(entries: Any, written: Any = None) -> LabelSpec:
    return parse_labels(entries, where=WHERE, written=written)


@pytest.mark.parametrize(
    "entries",
    [
        {"background": 0, "liver": 1, "lesion": 5},
        {"0": "background", "5": "lesion", "1": "liver"},
        {"lesion": "5", "background": "0", "liver": 1},
        {"liver": 1, "lesion": 5},
    ],
)
def test_names_to_values_and_values_to_names_are_the_same_labels(entries: dict[str, Any]) -> None:
    assert parse(entries) == LabelSpec(names=("liver", "lesion"), values=(1, 5))


@pytest.mark.parametrize(
    "entries",
    [
        {"ignore": 3, "background": 0, "liver": 1, "lesion": 5},
        {"background": 0, "liver": 1, "Ignore": 3, "lesion": 5},
        {"background": 0, "liver": 1, "lesion": 5, "ignore": 3},
        {"0": "background", "3": "ignore", "1": "liver", "5": "lesion"},
    ],
)
def test_what_is_to_be_ignored_may_stand_anywhere_and_is_no_label(entries: dict[str, Any]) -> None:
    assert parse(entries) == LabelSpec(names=("liver", "lesion"), values=(1, 5), ignore=3)


def test_regions_are_written_as_the_order_says() -> None:
    labels = parse(BRATS, [1, 2, 3])
    assert labels.values == (1, 2, 3)
    assert labels.names == ("label 1", "label 2", "enhancing")
    assert labels.regions == (
        Region(name="whole", values=(1, 2, 3), written=1),
        Region(name="core", values=(2, 3), written=2),
        Region(name="enhancing", values=(3,), written=3),
    )
    assert parse({**BRATS, "ignore": 9}, [1, 2, 3]).ignore == 9


def test_a_background_in_the_order_of_the_regions_is_none_of_them() -> None:
    assert parse(BRATS, [0, 1, "2", 3]) == parse(BRATS, [1, 2, 3])


@pytest.mark.parametrize(
    ("entries", "written"),
    [
        (BRATS, [1, 2, 3]),
        ({"enhancing": 3, "core": [2, 3], "whole": [1, 2, 3]}, [3, 2, 1]),
        ({"whole": [117, 5, 20], "core": [20, 117], "enhancing": [117]}, [5, 20, 117]),
        ({"left": [1, 3], "right": [2, 3]}, [1, 2]),
        # Of values that as many have, the lowest.
        ({"a": [4, 2], "b": 7}, [2, 7]),
    ],
)
def test_without_an_order_a_region_is_written_as_what_it_shares_least(
    entries: dict[str, Any], written: list[int]
) -> None:
    labels = parse(entries)
    assert [region.written for region in labels.regions] == written
    # What was written comes back as the same regions.
    table = labels.class_of_regions()
    members = labels.memberships()
    for index in range(labels.n_classes):
        pattern = sum(int(is_of) << position for position, is_of in enumerate(members[:, index]))
        assert (members[:, table[pattern]] == members[:, index]).all()


@pytest.mark.parametrize(
    ("entries", "written", "message"),
    [
        (["liver"], None, "found the labels"),
        ({"background": 0}, None, "no label besides the background"),
        ({"background": 0, "ignore": 1}, None, "no label besides the background"),
        ({"a": 1, "b": "c"}, None, r"found the label 'b': 'c'"),
        ({"a": 1.5}, None, r"found the label 'a': 1.5"),
        ({"a": True}, None, r"found the label 'a': True"),
        ({"a": [1, "x"]}, None, r"found the label 'a'"),
        ({"a": []}, None, r"found the label 'a': \[\]"),
        ({"a": 1, "b": 1}, None, "a name or a value is there twice"),
        ({"1": "a", "2": "a"}, None, "a name or a value is there twice"),
        ({"a": 1, "ignore": 1}, None, "value to ignore is 1"),
        ({"a": [1, 2], "ignore": [3, 4]}, None, "several values to ignore"),
        ({"a": 1, "ignore": 3, "IGNORE": 4}, None, "several values to ignore"),
        ({"a": [1, 2], "b": [2, 3], "ignore": 3}, None, "value to ignore is 3"),
        ({"a": [0, 1], "b": 2}, None, r"region 'a': its values are \[0, 1\]"),
        (BRATS, [1, 2], "expected one value for each of the regions whole, core, enhancing"),
        (BRATS, [3, 2, 1], "region 'enhancing': is written as 1"),
        (BRATS, {"whole": 1}, "expected a list of whole numbers"),
        (BRATS, [1, 2.5, 3], "expected a list of whole numbers"),
    ],
)
def test_lists_that_make_no_sense_are_refused_with_the_file(entries: Any, written: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=f"dataset.json: .*{message}"):
        parse(entries, written)


def test_the_order_of_regions_is_read_beside_the_labels() -> None:
    content = {"labels": {"whole": [1, 2], "core": [2]}, "regions_class_order": [2, 2]}
    assert [region.written for region in labels_of(content, where=WHERE).regions] == [2, 2]
    with pytest.raises(DatasetError, match="the key 'labels' is missing"):
        labels_of({}, where=WHERE)


def test_structures_that_never_share_a_voxel_are_plain_labels() -> None:
    assert structure_labels(["liver", "spleen"]) == LabelSpec(
        names=("liver", "spleen"), values=(1, 2), one_file_each=True
    )


def test_structures_that_overlap_are_regions_and_each_combination_is_a_class() -> None:
    labels = structure_labels(["a", "b", "c"], [frozenset("abc"), frozenset("cb")])
    assert labels.names == ("a", "b", "c", "b + c", "a + b + c")
    assert labels.values == (1, 2, 3, 4, 5)
    assert labels.structure_values == {"a": (1, 5), "b": (2, 4, 5), "c": (3, 4, 5)}
    assert [region.written for region in labels.regions] == [1, 2, 3]
    assert labels.one_file_each
    # a, b and c count 1, 2 and 4; "a + b" and "a + c" did not occur and become the last of both.
    assert labels.class_of_regions().tolist() == [0, 1, 2, 2, 3, 3, 4, 5]


@pytest.mark.parametrize(("item", "expected"), [(3, True), (" 3 ", True), (True, False), (3.0, False), ("-3", False)])
def test_whole_numbers(item: Any, expected: bool) -> None:
    assert is_whole(item) == expected

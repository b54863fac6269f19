"""Values in the files and channels of the network."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from label_specs import BRATS, OVERLAPPING

from autoseg.core.errors import DatasetError
from autoseg.core.labels import MAX_REGIONS, LabelSpec, Region, mask_of

SPARSE = LabelSpec(names=("liver", "lesion", "vessel"), values=(6, 2, 255))


def test_values_and_classes_are_inverse_and_follow_the_order_of_the_names() -> None:
    label = np.array([[[0, 6, 2, 255, 6]]], np.int16)
    classes = SPARSE.values_to_classes(label)
    assert classes.tolist() == [[[0, 1, 2, 3, 1]]]
    assert classes.dtype == np.uint8
    values = SPARSE.classes_to_values(classes)
    assert np.array_equal(values, label)
    assert values.dtype == np.uint8
    assert SPARSE.n_classes == 4


@pytest.mark.parametrize(("value", "dtype"), [(255, np.uint8), (256, np.uint16), (65535, np.uint16)])
def test_files_get_the_smallest_type_that_holds_every_value(value: int, dtype: type) -> None:
    labels = LabelSpec(names=("a", "b"), values=(1, value))
    assert labels.dtype == dtype
    label = np.array([[[0, 1, value]]], np.uint16)
    assert np.array_equal(labels.classes_to_values(labels.values_to_classes(label)), label)


@pytest.mark.parametrize(("n_labels", "dtype"), [(255, np.uint8), (256, np.uint16)])
def test_many_classes_do_not_wrap_around(n_labels: int, dtype: type) -> None:
    values = tuple(range(1, n_labels + 1))
    labels = LabelSpec(names=tuple(map(str, values)), values=values)
    classes = labels.values_to_classes(np.arange(n_labels + 1).reshape(1, 1, -1))
    assert classes.dtype == dtype
    assert classes.ravel().tolist() == list(range(n_labels + 1))


@pytest.mark.parametrize(
    ("names", "values", "message"),
    [
        ((), (), "expected at least one name"),
        (("a",), (1, 2), "found 1 names and 2 values"),
        (("a",), (0,), "from 1 to 65535"),
        (("a",), (-1,), "from 1 to 65535"),
        (("a",), (65536,), "from 1 to 65535"),
        (("a", "a"), (1, 2), "twice"),
        (("a", "b"), (1, 1), "twice"),
    ],
)
def test_unusable_labels_are_refused(names: tuple[str, ...], values: tuple[int, ...], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        LabelSpec(names=names, values=values)


def test_what_is_of_no_region_is_background_for_the_network() -> None:
    cavity = replace(BRATS, names=(*BRATS.names, "cavity"), values=(*BRATS.values, 7))
    assert cavity.foreground_classes == BRATS.foreground_classes == (1, 2, 3)
    assert replace(cavity, regions=()).foreground_classes == (1, 2, 3, 4)


def test_the_class_of_nested_regions_is_that_of_the_innermost() -> None:
    """Whole counts 1, core 2, enhancing 4; what is of an inner region but of no outer one has no class of its own."""
    oedema, necrosis, enhancing = 2, 1, 3
    assert BRATS.class_of_regions().tolist() == [
        0,
        oedema,
        necrosis,
        necrosis,
        enhancing,
        enhancing,
        enhancing,
        enhancing,
    ]


def test_the_class_of_overlapping_regions_is_their_combination() -> None:
    assert OVERLAPPING.class_of_regions().tolist() == [0, 1, 2, 3]


def test_a_combination_that_no_class_has_becomes_what_its_last_region_is_written_as() -> None:
    apart = LabelSpec(
        names=("a", "b"),
        values=(10, 20),
        regions=(Region(name="second", values=(20,), written=20), Region(name="first", values=(10,), written=10)),
    )
    assert apart.class_of_regions().tolist() == [0, 2, 1, 1]


def test_of_several_classes_of_the_same_regions_the_written_one_is_taken_and_else_the_first() -> None:
    labels = LabelSpec(
        names=("a", "b", "c"),
        values=(1, 2, 3),
        regions=(Region(name="inner", values=(1, 2), written=2), Region(name="outer", values=(1, 2, 3), written=3)),
    )
    assert labels.class_of_regions().tolist() == [0, 2, 3, 1]


def test_every_class_is_of_the_regions_that_lead_to_it() -> None:
    for labels in (BRATS, OVERLAPPING):
        bits = labels.memberships().T @ (1 << np.arange(len(labels.regions)))
        assert labels.class_of_regions()[bits].tolist() == list(range(labels.n_classes))


def test_memberships_follow_the_values() -> None:
    assert BRATS.memberships().tolist() == [
        [False, True, True, True],
        [False, True, False, True],
        [False, False, False, True],
    ]


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (Region(name="r", values=(1, 2), written=3), r"'r': is written as 3, expected one of its values \[1, 2\]"),
        (Region(name="r", values=(1, 9), written=1), r"'r': its values are \[1, 9\]"),
        (Region(name="r", values=(), written=1), r"'r': its values are \[\]"),
        (Region(name="r", values=(0, 1), written=1), r"'r': its values are \[0, 1\]"),
    ],
)
def test_unusable_regions_are_refused(region: Region, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        LabelSpec(names=("a", "b", "c"), values=(1, 2, 3), regions=(region,))


def test_regions_of_one_name_and_too_many_are_refused() -> None:
    region = Region(name="r", values=(1,), written=1)
    with pytest.raises(DatasetError, match="names a region twice"):
        LabelSpec(names=("a",), values=(1,), regions=(region, region))
    many = tuple(Region(name=str(number), values=(1,), written=1) for number in range(MAX_REGIONS + 1))
    with pytest.raises(DatasetError, match=f"found {MAX_REGIONS + 1}, expected at most {MAX_REGIONS}"):
        LabelSpec(names=("a",), values=(1,), regions=many)


@pytest.mark.parametrize("ignore", [2, 0, -1, 65536])
def test_a_value_to_ignore_must_be_free(ignore: int) -> None:
    with pytest.raises(DatasetError, match=f"the value to ignore is {ignore}"):
        LabelSpec(names=("a", "b"), values=(1, 2), ignore=ignore)


@pytest.mark.parametrize("ignore", [1, 7, 300])
def test_what_is_to_be_ignored_is_the_class_after_all_others(ignore: int) -> None:
    """Wherever its value lies among those of the labels."""
    labels = LabelSpec(names=("liver", "lesion"), values=(6, 2), ignore=ignore)
    label = np.array([[[0, 6, ignore, 2], [ignore, 2, 6, 0]]], np.uint16)
    classes = labels.values_to_classes(label)
    assert classes.tolist() == [[[0, 1, 3, 2], [3, 2, 1, 0]]]
    assert (labels.n_classes, labels.n_stored, labels.n_outputs) == (3, 4, 3)
    assert labels.all_values == (6, 2, ignore)
    back = labels.classes_to_values(np.where(classes == labels.n_classes, 0, classes))
    np.testing.assert_array_equal(back, np.where(label == ignore, 0, label))
    assert back.dtype == np.uint8


def test_a_class_to_ignore_beside_255_others_does_not_wrap_around() -> None:
    values = tuple(range(1, 256))
    labels = LabelSpec(names=tuple(map(str, values)), values=values, ignore=256)
    classes = labels.values_to_classes(np.arange(257).reshape(1, 1, -1))
    assert classes.dtype == np.uint16
    assert classes.ravel().tolist() == list(range(257))


def test_outputs_and_structures_are_the_regions_or_else_the_classes() -> None:
    assert SPARSE.n_outputs == 4
    assert SPARSE.structures == ("liver", "lesion", "vessel")
    assert SPARSE.structure_values == {"liver": (6,), "lesion": (2,), "vessel": (255,)}
    assert BRATS.n_outputs == 3
    assert BRATS.structures == ("whole", "core", "enhancing tumour")
    assert BRATS.structure_values == {"whole": (1, 2, 4), "core": (1, 4), "enhancing tumour": (4,)}
    assert (OVERLAPPING.n_outputs, OVERLAPPING.n_classes, OVERLAPPING.n_stored) == (2, 4, 4)


def test_a_mask_is_where_any_of_the_values_is() -> None:
    label = np.array([[[0, 1, 2, 4, 4]]])
    assert mask_of(label, (1, 4)).tolist() == [[[False, True, False, True, True]]]

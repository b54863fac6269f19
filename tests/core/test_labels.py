"""Values in the files and channels of the network."""

from __future__ import annotations

import numpy as np
import pytest

from autoseg.core.errors import DatasetError
from autoseg.core.labels import LabelSpec

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

"""What is annotated in a case, from label maps and from one mask file per structure."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from autoseg.core.errors import FormatError
from autoseg.core.labels import LabelSpec, Region
from autoseg.data.dataset import Case
from autoseg.data.listings import structure_labels
from autoseg.data.references import combinations_of, read_masks, read_reference

SHAPE = (4, 5, 6)  # (z, y, x)
AFFINE = np.diag([1.0, 1.5, 2.0, 1.0])


def box(z: slice, value: int = 1) -> NDArray[np.uint8]:
    mask = np.zeros(SHAPE, np.uint8)
    mask[z, 1:4, 2:5] = value
    return mask


def save(path: Path, volume: NDArray, affine: NDArray = AFFINE) -> Path:
    nib.save(nib.Nifti1Image(volume.transpose(2, 1, 0), affine), path)
    return path


def make_case(folder: Path, **masks: NDArray) -> Case:
    files = {name: save(folder / f"{name}.nii.gz", mask) for name, mask in masks.items()}
    image = save(folder / "image.nii.gz", np.zeros(SHAPE, np.float32))
    return Case(id="c", group="c", images=(image,), label=None, masks=files)


def test_a_label_map_is_read_as_it_is(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).integers(0, 4, SHAPE).astype(np.uint8)
    image = save(tmp_path / "image.nii.gz", np.zeros(SHAPE, np.float32))
    case = Case(id="c", group="c", images=(image,), label=save(tmp_path / "c.nii.gz", volume))
    label, geometry = read_reference(case, LabelSpec(names=("a",), values=(1,)))
    np.testing.assert_array_equal(label, volume)
    assert geometry.shape == SHAPE
    assert geometry.spacing_mm == (2.0, 1.5, 1.0)


def test_masks_become_one_label_map(tmp_path: Path) -> None:
    """Any value but 0 is inside."""
    case = make_case(tmp_path, a=box(slice(0, 2)), b=box(slice(2, 3), 255))
    label, _ = read_reference(case, structure_labels(["a", "b"]))
    np.testing.assert_array_equal(label, box(slice(0, 2)) + 2 * box(slice(2, 3)))
    assert label.dtype == np.uint8
    given = LabelSpec(names=("b", "a"), values=(9, 300))
    np.testing.assert_array_equal(read_reference(case, given)[0], np.array([0, 300, 9])[label])
    assert combinations_of(case) == set()


def test_a_structure_without_a_file_was_not_looked_for(tmp_path: Path) -> None:
    case = make_case(tmp_path, b=box(slice(0, 2)))
    label, _ = read_reference(case, structure_labels(["a", "b"]))
    np.testing.assert_array_equal(label, 2 * box(slice(0, 2)))
    assert (case.knows("a"), case.knows("b")) == (False, True)
    said = Case(id="c", group="c", images=(), label=None, masks=case.masks, annotated=("a",))
    assert (said.knows("a"), said.knows("b")) == (True, False)
    whole = Case(id="c", group="c", images=(), label=tmp_path / "b.nii.gz")
    assert whole.knows("a")


def test_masks_that_overlap_become_combinations(tmp_path: Path) -> None:
    case = make_case(tmp_path, a=box(slice(0, 3)), b=box(slice(1, 4)), c=box(slice(2, 3)))
    found = combinations_of(case)
    assert found == {frozenset("ab"), frozenset("abc")}
    labels = structure_labels(["a", "b", "c"], sorted(found, key=len))
    label, geometry = read_reference(case, labels)
    expected = np.array([1, 4, 5, 2], np.uint8).reshape(-1, 1, 1) * box(slice(None))
    np.testing.assert_array_equal(label, expected)
    assert label.shape == geometry.shape
    masks, _ = read_masks(case)
    for name, values in labels.structure_values.items():
        np.testing.assert_array_equal(np.isin(label, values), masks[name])


def test_where_a_structure_was_not_looked_for_the_others_are_told_apart_all_the_same(tmp_path: Path) -> None:
    """The value says nothing of a structure that has no file; of those that it could be, it is the simplest."""
    labels = structure_labels(["a", "b", "c"], [frozenset("ab"), frozenset("abc")])
    case = make_case(tmp_path, b=box(slice(0, 3)), c=box(slice(2, 3)))
    label, _ = read_reference(case, labels)
    np.testing.assert_array_equal(np.isin(label, labels.structure_values["b"]), box(slice(0, 3)))
    np.testing.assert_array_equal(np.isin(label, labels.structure_values["c"]), box(slice(2, 3)))
    assert set(np.unique(label)) == {0, 2, 5}


@pytest.mark.parametrize("planned", [[], [frozenset("bc")]])
def test_a_combination_that_was_not_there_when_it_was_planned_is_named(
    tmp_path: Path, planned: list[frozenset[str]]
) -> None:
    case = make_case(tmp_path, a=box(slice(0, 3)), b=box(slice(2, 4)))
    with pytest.raises(FormatError, match="c: 9 voxels are of a and b together"):
        read_reference(case, structure_labels(["a", "b", "c"], planned))


def test_regions_of_label_maps_do_not_change_them(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).choice(np.array([0, 1, 4], np.uint8), SHAPE)
    image = save(tmp_path / "image.nii.gz", np.zeros(SHAPE, np.float32))
    case = Case(id="c", group="c", images=(image,), label=save(tmp_path / "c.nii.gz", volume))
    labels = LabelSpec(
        names=("a", "b"),
        values=(1, 4),
        regions=(Region(name="whole", values=(1, 4), written=1), Region(name="core", values=(4,), written=4)),
    )
    np.testing.assert_array_equal(read_reference(case, labels)[0], volume)


def test_masks_on_another_grid_are_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path, a=box(slice(0, 2)), b=box(slice(2, 3)))
    moved = AFFINE.copy()
    moved[2, 3] = 1
    for volume, affine in ((box(slice(2, 3)), moved), (box(slice(2, 3))[:, :, :5], AFFINE)):
        save(tmp_path / "b.nii.gz", volume, affine)
        for read in (lambda: read_reference(case, structure_labels(["a", "b"])), lambda: combinations_of(case)):
            with pytest.raises(FormatError, match=r"b\.nii\.gz: found .*expected .*of the case's first structure"):
                read()

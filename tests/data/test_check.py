"""Bad input: one error that lists every affected case, with found, expected and what to do."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from autoseg.core.errors import DatasetError, FormatError
from autoseg.core.labels import LabelSpec
from autoseg.data.check import discover_labels, refuse_errors, scan_dataset
from autoseg.data.dataset import Case, Dataset
from autoseg.data.layouts import open_dataset
from autoseg.data.load import LoadedCase, load_image

LABELS = LabelSpec(names=("liver", "lesion"), values=(1, 2))
AFFINE = np.diag([-0.8, -0.9, 3.0, 1.0])
AFFINE[:3, 3] = (100.0, 120.0, -50.0)
SHAPE_IJK = (6, 7, 5)


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


def make_image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE_IJK).astype(np.float32)


def make_label(dtype: type = np.uint8) -> np.ndarray:
    label: np.ndarray = np.zeros(SHAPE_IJK, dtype)
    label[1:4, 2:5, 1:3] = 1
    label[4, 5, 3] = 2
    return label


def add_case(root: Path, case: str) -> tuple[Path, Path]:
    """A case in order, in a pair of folders."""
    image = save(root / "images" / f"{case}.nii.gz", make_image(len(case)))
    return image, save(root / "labels" / f"{case}.nii.gz", make_label())


def with_value(array: np.ndarray, value: float, n_voxels: int = 3) -> np.ndarray:
    array = array.copy()
    array.reshape(-1)[:n_voxels] = value
    return array


def moved(shift_mm: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[0, 3] += shift_mm
    return affine


Spoil = Callable[[Path, Path], object]
BAD: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "image_cut_off": (
        lambda image, label: image.write_bytes(image.read_bytes()[:200]),
        ("image cannot be used", "images/image_cut_off.nii.gz", "mend or replace the image"),
    ),
    "image_is_text": (
        lambda image, label: image.write_text("not an image"),
        ("image cannot be used", "images/image_is_text.nii.gz", "cannot be read as NIfTI"),
    ),
    "image_gone": (
        lambda image, label: image.unlink(),
        ("image cannot be used", "images/image_gone.nii.gz: no such file"),
    ),
    "image_nan": (
        lambda image, label: save(image, with_value(make_image(), np.nan)),
        ("images/image_nan.nii.gz: found 3 voxels that are NaN or infinite, expected finite numbers",),
    ),
    "image_infinite": (
        lambda image, label: save(image, with_value(make_image(), -np.inf, 1)),
        ("images/image_infinite.nii.gz: found 1 voxels that are NaN or infinite",),
    ),
    "image_two_channels": (
        lambda image, label: save(image, np.stack([make_image()] * 2, axis=-1)),
        ("images/image_two_channels.nii.gz: found 2 channels, expected 1",),
    ),
    "label_empty_file": (
        lambda image, label: label.write_bytes(b""),
        ("label map cannot be used", "labels/label_empty_file.nii.gz", "mend or replace the label map"),
    ),
    "label_shape": (
        lambda image, label: save(label, make_label()[:-1]),
        (
            "image and label map differ in shape or affine",
            "label_shape.nii.gz: found the shape (5, 7, 5) (z, y, x), expected (5, 7, 6) as in the image",
            "resample the label map onto the image's grid; if only its header is wrong, copy the image's header",
        ),
    ),
    "label_affine": (
        lambda image, label: save(label, make_label(), moved(1.2)),
        ("label_affine.nii.gz: found an affine that puts a corner 1.50 voxels from", "expected the image's affine"),
    ),
    "label_flipped": (
        lambda image, label: save(label, make_label(), np.diag([-1, 1, 1, 1]) @ AFFINE),
        ("label_flipped.nii.gz: found an affine that puts a corner",),
    ),
    "label_value": (
        lambda image, label: save(label, with_value(make_label(), 7)),
        (
            "label value that is not in the list of labels",
            "label_value.nii.gz: found 7 (3 voxels), expected only 0, 1, 2",
            "add the value to the labels of the dataset, or correct the label maps",
        ),
    ),
    "label_negative": (
        lambda image, label: save(label, with_value(make_label(np.int16), -1)),
        ("label_negative.nii.gz: found -1 (3 voxels), expected only 0, 1, 2",),
    ),
    "label_huge": (
        lambda image, label: save(label, with_value(make_label(np.int32), 70000)),
        ("label_huge.nii.gz: found 70000 (3 voxels), expected only 0, 1, 2",),
    ),
    "label_fraction": (
        lambda image, label: save(label, with_value(make_label(np.float32), 0.5)),
        ("labels/label_fraction.nii.gz: found 3 voxels such as 0.5, expected whole numbers in a label map",),
    ),
    "label_nan": (
        lambda image, label: save(label, with_value(make_label(np.float32), np.nan)),
        ("labels/label_nan.nii.gz: found 3 voxels such as nan, expected whole numbers",),
    ),
}


def measured(dataset: Dataset, measure: Callable[[LoadedCase], Any]) -> list[Any]:
    """Of every case; an error where any cannot be used."""
    found = scan_dataset(dataset, LABELS, measure, n_threads=2)
    refuse_errors(dataset.name, found.problems, n_cases=len(dataset.cases))
    return found.measured


def scan(dataset: Dataset) -> list[str]:
    return measured(dataset, lambda loaded: loaded.case.id)


def test_cases_in_order_are_measured_in_order(tmp_path: Path) -> None:
    for case in ("c", "a", "b"):
        add_case(tmp_path, case)
    loaded: list[LoadedCase] = measured(open_dataset(tmp_path), lambda loaded: loaded)
    assert [case.case.id for case in loaded] == ["a", "b", "c"]
    assert loaded[0].image.shape == (1, 5, 7, 6)
    assert loaded[0].image.dtype == np.float32
    assert loaded[0].geometry.spacing_mm == pytest.approx((3.0, 0.9, 0.8))
    assert np.array_equal(loaded[0].label, nib.as_closest_canonical(nib.load(loaded[0].case.label)).dataobj[:].T)


@pytest.mark.parametrize("kind", BAD)
def test_one_bad_case(kind: str, tmp_path: Path) -> None:
    for case in ("first", "second", kind):
        add_case(tmp_path, case)
    spoil, expected = BAD[kind]
    dataset = open_dataset(tmp_path)
    spoil(tmp_path / "images" / f"{kind}.nii.gz", tmp_path / "labels" / f"{kind}.nii.gz")
    with pytest.raises(DatasetError) as caught:
        scan(dataset)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path.name}: 1 of 3 cases cannot be used. Nothing was planned.")
    assert f"- {kind}: " in message
    assert "- first" not in message
    for part in (*expected, "What to do: "):
        assert part in message


def test_one_error_lists_every_case(tmp_path: Path) -> None:
    for case in ("first", "second", *BAD):
        add_case(tmp_path, case)
    dataset = open_dataset(tmp_path)
    for kind, (spoil, _) in BAD.items():
        spoil(tmp_path / "images" / f"{kind}.nii.gz", tmp_path / "labels" / f"{kind}.nii.gz")
    with pytest.raises(DatasetError) as caught:
        scan(dataset)
    message = str(caught.value)
    assert f"{len(BAD)} of {len(BAD) + 2} cases cannot be used" in message
    for kind, (_, expected) in BAD.items():
        assert message.count(f"- {kind}: ") == 1
        assert all(part in message for part in expected)


def test_everything_that_is_wrong_with_one_case_is_listed(tmp_path: Path) -> None:
    for case in ("a", "b"):
        add_case(tmp_path, case)
    save(tmp_path / "images/a.nii.gz", with_value(make_image(), np.nan))
    save(tmp_path / "labels/a.nii.gz", with_value(make_label(), 9))
    save(tmp_path / "labels/b.nii.gz", with_value(make_label(), 8), moved(40.0))
    with pytest.raises(DatasetError) as caught:
        scan(open_dataset(tmp_path))
    for part in ("2 of 2 cases", "NaN", "found 9 (3 voxels)", "found 8 (3 voxels)", "50.00 voxels"):
        assert part in str(caught.value)


def test_many_unknown_values_are_counted(tmp_path: Path) -> None:
    for case in ("a", "b"):
        add_case(tmp_path, case)
    save(tmp_path / "labels/a.nii.gz", np.arange(210, dtype=np.int16).reshape(SHAPE_IJK))
    with pytest.raises(DatasetError, match=r"found 3 \(1 voxels\), .*, 7 \(1 voxels\) and 202 more, expected only"):
        scan(open_dataset(tmp_path))


def test_one_case_is_read_too(tmp_path: Path) -> None:
    add_case(tmp_path, "a")
    dataset = open_dataset(tmp_path)
    (name,) = scan(dataset)
    assert name == "a"


def test_a_time_series_is_told_from_channels_before_it_is_read(tmp_path: Path) -> None:
    add_case(tmp_path, "a")
    file = tmp_path / "images" / "a.nii.gz"
    series = nib.Nifti1Image(np.zeros((4, 4, 4, 30), np.uint8), np.eye(4))
    # Its voxels cannot be read, which nobody needs to know.
    file.write_bytes(gzip.compress(series.to_bytes()[:400]))
    with pytest.raises(
        DatasetError, match="found 30 channels, expected 1; if these are time points, save each as a case"
    ):
        scan(open_dataset(tmp_path))


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "SAR", "PIL"])
def test_label_stored_in_another_orientation_at_the_same_place_is_accepted(axcodes: str, tmp_path: Path) -> None:
    for case in ("a", "b"):
        add_case(tmp_path, case)
    label = nib.load(tmp_path / "labels/a.nii.gz")
    change = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(axcodes))
    turned = label.as_reoriented(change)
    nib.save(turned, tmp_path / "labels/b.nii.gz")
    assert nib.aff2axcodes(nib.load(tmp_path / "labels/b.nii.gz").affine) == tuple(axcodes)
    labels = measured(open_dataset(tmp_path), lambda loaded: loaded.label)
    assert np.array_equal(labels[0], labels[1])


def test_rounding_in_a_header_is_no_difference(tmp_path: Path) -> None:
    for case in ("a", "b"):
        add_case(tmp_path, case)
    save(tmp_path / "labels/b.nii.gz", make_label(), moved(0.004))  # half a hundredth of a voxel
    assert scan(open_dataset(tmp_path)) == ["a", "b"]


def test_an_error_of_ours_is_not_taken_for_a_bad_case(tmp_path: Path) -> None:
    for case in ("a", "b"):
        add_case(tmp_path, case)

    def measure(loaded: LoadedCase) -> int:
        raise ZeroDivisionError(loaded.case.id)

    with pytest.raises(ZeroDivisionError):
        scan_dataset(open_dataset(tmp_path), LABELS, measure, n_threads=2)


# Several channels


def test_channels_are_stacked_in_their_order(tmp_path: Path) -> None:
    files = [save(tmp_path / f"a_000{channel}.nii.gz", make_image(channel)) for channel in range(3)]
    image, geometry, _ = load_image(files, n_channels=3)
    assert image.shape == (3, *geometry.shape)
    for channel in range(3):
        assert np.array_equal(image[channel], load_image(files[channel : channel + 1], n_channels=1)[0][0])


def test_voxels_without_a_value_get_the_lowest_of_their_file(tmp_path: Path) -> None:
    broken, whole = make_image(0), make_image(1)
    broken[:2, 1, 1], broken[2, 1, 1] = np.nan, -np.inf
    files = [save(tmp_path / f"a_000{channel}.nii.gz", image) for channel, image in enumerate((broken, whole))]
    with pytest.raises(FormatError, match=r"a_0000.* 3 voxels that are NaN or infinite.*--fix"):
        load_image(files, n_channels=2)
    image, _, told = load_image(files, n_channels=2, fix=True)
    assert ["a_0000.nii.gz: 3 voxels" in text for text in told] == [True]
    assert np.count_nonzero(image[0] == np.min(broken[np.isfinite(broken)])) >= 3
    assert np.array_equal(image[1], load_image(files[1:], n_channels=1)[0][0])
    empty = save(tmp_path / "empty.nii.gz", np.full_like(broken, np.nan))
    with pytest.raises(FormatError, match="NaN"):
        load_image([empty], n_channels=1, fix=True)


def test_a_picture_may_have_more_pixels_than_a_scan_millimetres(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12_000), np.uint8)
    for folder, picture in (("images", pixels), ("labels", (pixels > 128).astype(np.uint8))):
        (tmp_path / folder).mkdir()
        Image.fromarray(picture).save(tmp_path / folder / "a.png")
    assert scan(open_dataset(tmp_path)) == ["a"]


def test_channels_on_different_grids_and_the_channel_with_nan_are_named(tmp_path: Path) -> None:
    for case in ("a", "b", "c", "d", "e"):
        save(tmp_path / "l" / f"{case}.nii.gz", make_label())
        for channel in (0, 1):
            save(tmp_path / "i" / f"{case}_{channel}.nii.gz", make_image(channel))
    save(tmp_path / "i/a_1.nii.gz", make_image()[:, :-2])
    save(tmp_path / "i/b_1.nii.gz", make_image(), moved(8.0))
    save(tmp_path / "i/c_1.nii.gz", with_value(make_image(), np.nan))
    save(tmp_path / "i/d_1.nii.gz", np.stack([make_image()] * 2, axis=-1))
    cases = tuple(
        Case(
            id=case,
            group=case,
            images=(tmp_path / "i" / f"{case}_0.nii.gz", tmp_path / "i" / f"{case}_1.nii.gz"),
            label=tmp_path / "l" / f"{case}.nii.gz",
        )
        for case in "abcde"
    )
    with pytest.raises(DatasetError) as caught:
        scan(Dataset(name="two", layout="", channels=("T1", "T2"), labels=LABELS, cases=cases))
    message = str(caught.value)
    assert "two: 4 of 5 cases" in message
    assert f"{tmp_path / 'i/a_1.nii.gz'}: found the shape (5, 5, 6) (z, y, x), expected (5, 7, 6)" in message
    assert f"{tmp_path / 'i/b_1.nii.gz'}: found an affine that puts a corner 10.00 voxels" in message
    assert f"{tmp_path / 'i/c_1.nii.gz'}: found 3 voxels that are NaN or infinite" in message
    assert "found 3 channels, expected 2" in message


# Labels that the layout does not list


def test_discover_labels(tmp_path: Path) -> None:
    for case in ("a", "b", "c"):
        add_case(tmp_path, case)
    save(tmp_path / "labels/b.nii.gz", with_value(make_label(np.int16), 300))
    save(tmp_path / "labels/c.nii.gz", np.zeros(SHAPE_IJK, np.float32))
    labels = discover_labels(open_dataset(tmp_path), n_threads=2)
    assert labels == LabelSpec(names=("label 1", "label 2", "label 300"), values=(1, 2, 300))


def test_discover_labels_lists_every_label_map_that_cannot_be_read(tmp_path: Path) -> None:
    for case in ("a", "b", "c"):
        add_case(tmp_path, case)
    save(tmp_path / "labels/a.nii.gz", with_value(make_label(np.float32), 0.5))
    (tmp_path / "labels/c.nii.gz").write_bytes(b"")
    with pytest.raises(DatasetError) as caught:
        discover_labels(open_dataset(tmp_path), n_threads=2)
    for part in ("label map cannot be used (2)", "- a: ", "such as 0.5", "- c: ", "What to do: mend"):
        assert part in str(caught.value)


def test_discover_labels_without_any_structure_and_with_images_instead(tmp_path: Path) -> None:
    for case in ("a", "b"):
        add_case(tmp_path, case)
        save(tmp_path / f"labels/{case}.nii.gz", np.zeros(SHAPE_IJK, np.uint8))
    with pytest.raises(DatasetError, match="every voxel of every label map is 0"):
        discover_labels(open_dataset(tmp_path), n_threads=1)
    save(tmp_path / "labels/a.nii.gz", np.arange(2000, dtype=np.int16).reshape(10, 10, 20))
    with pytest.raises(DatasetError, match=r"found 1999 different values .* are these intensity images"):
        discover_labels(open_dataset(tmp_path), n_threads=1)

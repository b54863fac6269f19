"""Masks in black and white that were smoothed, resized or compressed: refused with advice, read with --fix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from autoseg.core.errors import DatasetError, FormatError
from autoseg.core.labels import LabelSpec
from autoseg.core.serialize import from_plain, to_plain
from autoseg.data.check import discover_labels
from autoseg.data.dataset import Case, Dataset, LabelMend
from autoseg.data.layouts import open_dataset
from autoseg.data.load import LoadedCase, load_case, load_image
from autoseg.data.soft_masks import has_grey_borders

ROWS, COLUMNS = 96, 112


def disc(radius: float) -> NDArray[np.uint8]:
    rows, columns = np.mgrid[:ROWS, :COLUMNS]
    return (255 * (np.hypot(rows - 40, columns - 60) < radius)).astype(np.uint8)


def softened(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(ndimage.gaussian_filter(mask.astype(np.float32), 0.8).round(), np.uint8)


def write_pairs(folder: Path, masks: dict[str, NDArray[np.uint8]], *, ending: str = "png") -> Dataset:
    for name, mask in masks.items():
        for below, file, pixels in (("images", f"{name}.png", disc(20) // 2 + 7), ("masks", f"{name}.{ending}", mask)):
            (folder / below).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / below / file)
    return open_dataset(folder)


def fixed(dataset: Dataset) -> Dataset:
    return Dataset(**{**vars(dataset), "fix": True})


def load(case: Case, labels: LabelSpec, *, fix: bool = True) -> LoadedCase:
    loaded = load_case(case, n_channels=1, labels=labels, fix=fix)
    assert isinstance(loaded, LoadedCase), loaded
    return loaded


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_grey_borders_are_refused_and_halved_where_they_may_be_mended(ending: str, tmp_path: Path) -> None:
    hard = {"a": disc(14), "b": disc(20), "c": np.zeros((ROWS, COLUMNS), np.uint8)}
    soft = {name: softened(mask) for name, mask in hard.items()}
    dataset = write_pairs(tmp_path, soft, ending=ending)
    with pytest.raises(DatasetError, match=r"--fix'? takes what is brighter than half for the structure, or save the"):
        discover_labels(dataset, n_threads=1)
    labels = discover_labels(fixed(dataset), n_threads=1)
    assert labels.values == (255,)
    for case in dataset.cases[:2]:
        loaded = load(case, labels)
        expected = soft[case.id] > 127
        # A picture lies turned by half a turn.
        differing = (loaded.label[0, ::-1, ::-1] == 255) != expected
        assert differing.sum() <= (0 if ending == "png" else 6)
        assert set(np.unique(loaded.label)) == {0, 255}
        assert loaded.case.mend == LabelMend(halved=True)
        assert from_plain(LabelMend, to_plain(loaded.case.mend)) == loaded.case.mend
        assert any("brighter than half" in remark.text for remark in loaded.remarks)


def test_few_shades_are_halved_too_where_one_structure_is_listed(tmp_path: Path) -> None:
    mask = disc(14)
    mask[40, 60:63] = (3, 100, 251)
    (case,) = write_pairs(tmp_path, {"a": mask}).cases
    labels = LabelSpec(names=("polyp",), values=(1,))
    problems = load_case(case, n_channels=1, labels=labels)
    assert isinstance(problems, list)
    assert any("--fix reads the mask as what it means" in problem.advice for problem in problems)
    loaded = load(case, labels)
    assert set(np.unique(loaded.label)) == {0, 1}
    assert loaded.case.mend == LabelMend(halved=True, values={255: 1})


def test_a_structure_beside_what_nobody_knows_is_not_swapped_with_it(tmp_path: Path) -> None:
    mask = disc(14) // 255
    mask[70, :] = 255
    (case,) = write_pairs(tmp_path, {"a": mask}).cases
    problems = load_case(case, n_channels=1, labels=LabelSpec(names=("polyp",), values=(1,)), fix=True)
    assert isinstance(problems, list)
    assert any("255 (112 voxels)" in problem.found and "--fix" not in problem.advice for problem in problems)


def test_a_jpeg_of_classes_is_not_halved(tmp_path: Path) -> None:
    numbers = disc(14) // 255 + disc(30) // 255
    dataset = write_pairs(tmp_path, {"a": numbers}, ending="jpg")
    with pytest.raises(DatasetError, match="at most 2 in a JPEG, because its compression changes values; save the"):
        discover_labels(fixed(dataset), n_threads=1)
    greys = disc(14)
    greys[40:44, 58:62] = 128
    (case,) = write_pairs(tmp_path / "greys", {"a": greys}, ending="jpg").cases
    for labels in (LabelSpec(names=("a", "b"), values=(128, 255)), LabelSpec(names=("a",), values=(3,))):
        assert isinstance(load_case(case, n_channels=1, labels=labels, fix=True), list)


def test_masks_that_overlap_stay_an_error(tmp_path: Path) -> None:
    for name in ("image", "first", "second"):
        Image.fromarray(disc(14) // (1 if name == "image" else 255)).save(tmp_path / f"{name}.png")
    case = Case(
        id="a",
        group="a",
        images=(tmp_path / "image.png",),
        label=None,
        masks={name: tmp_path / f"{name}.png" for name in ("first", "second")},
    )
    problems = load_case(case, n_channels=1, labels=LabelSpec(names=("first", "second"), values=(1, 2)), fix=True)
    assert isinstance(problems, list)
    assert any("of first and second together" in problem.text for problem in problems)


def test_few_masks_with_grey_borders_among_many_without(tmp_path: Path) -> None:
    dataset = write_pairs(tmp_path, {"a": disc(14), "b": disc(20), "c": softened(disc(14))})
    with pytest.raises(DatasetError, match="1 of 3 label maps are masks in black and white with grey borders"):
        discover_labels(dataset, n_threads=1)
    assert discover_labels(fixed(dataset), n_threads=1).values == (255,)


def test_lists_of_classes_are_no_masks_with_grey_borders(tmp_path: Path) -> None:
    numbers = np.zeros((ROWS, COLUMNS), np.uint8)
    numbers[:63, :40] = np.arange(21, dtype=np.uint8).repeat(3)[:, None]
    numbers[70, :] = 255
    assert not has_grey_borders(numbers), "classes 1 to 20, and 255 for unknown"
    three = np.zeros((ROWS, COLUMNS), np.uint8)
    three[10:30], three[40:42] = 255, 127
    assert not has_grey_borders(three), "three classes"
    many = np.repeat(np.arange(128, dtype=np.uint8) * 2, 84).reshape(ROWS, COLUMNS)
    assert not has_grey_borders(many), "as much grey as black and white"
    assert not has_grey_borders(softened(disc(14)).astype(np.int16) * 4), "no picture of 8 bits"
    assert has_grey_borders(softened(disc(14)))
    with_classes = write_pairs(tmp_path, {"a": three, "b": three})
    assert discover_labels(fixed(with_classes), n_threads=1).values == (127, 255)
    (case, _) = with_classes.cases
    problems = load_case(case, n_channels=1, labels=LabelSpec(names=("a", "b"), values=(1, 2)), fix=True)
    assert isinstance(problems, list), "of several structures nothing is guessed"


@pytest.mark.parametrize("n_channels", [1, 3])
def test_grey_pictures_among_coloured_ones_are_told(n_channels: int, tmp_path: Path) -> None:
    pixels = disc(14) if n_channels == 3 else np.stack([disc(14)] * 3, axis=-1)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    one, others = ("a colour", "grey") if n_channels == 1 else ("a grey", "in colour")
    text = f"expected {n_channels}: {one} picture, and the others are {others}; save all in one way"
    with pytest.raises(FormatError, match=text):
        load_image([tmp_path / "a.png"], n_channels=n_channels)

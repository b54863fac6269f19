"""Malformed datasets: every file can be read, and its voxels cannot be right."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from malformed_entry import ERROR, IMAGE, LABEL, VALUE, WARNING, malformed
from malformed_files import header_bytes
from numpy.typing import NDArray
from small_datasets import (
    LABELS,
    case_names,
    change,
    decathlon,
    edit_json,
    folders,
    make_image,
    nnunet,
    pictures,
    read_voxels,
    save_volume,
)

# -- values ------------------------------------------------------------------------------------------------------------


def set_some(path: Path, value: float, dtype: type = np.float32, n_voxels: int = 5) -> None:
    """Gives a few voxels another value."""

    def how(voxels: NDArray) -> NDArray:
        changed: NDArray = np.array(voxels, dtype, order="C")
        changed.reshape(-1)[:n_voxels] = value
        return changed

    change(path, how)


@malformed(ERROR, IMAGE, "case_1", "NaN", mendable=True)
def image_nan(folder: Path) -> None:
    """One image has a few voxels that are no numbers."""
    set_some(nnunet(folder).image(), float("nan"))


@malformed(ERROR, IMAGE, "case_1", "infinite", mendable=True)
def image_infinite(folder: Path) -> None:
    """One image has a few voxels that are infinite."""
    set_some(nnunet(folder).image(), float("-inf"))


@malformed(ERROR, IMAGE, "case_1")
def image_all_nan(folder: Path) -> None:
    """One image has nothing but voxels that are no numbers."""
    change(nnunet(folder).image(), lambda voxels: np.full(voxels.shape, np.nan, np.float32))


@malformed(ERROR, LABEL, "case_1")
def label_nan(folder: Path) -> None:
    """One label map has a few voxels that are no numbers, as resampling leaves them at the border."""
    set_some(nnunet(folder).label(), float("nan"))


@malformed("")
def labels_stored_as_float(folder: Path) -> None:
    """Label maps hold whole numbers as floating point, which means the same."""
    for path in nnunet(folder).labels:
        change(path, lambda voxels: voxels.astype(np.float32))


@malformed(ERROR, LABEL, "case_1", "0.5")
def labels_of_a_half(folder: Path) -> None:
    """One label map has voxels of 0.5 at borders, as linear interpolation leaves them."""
    set_some(nnunet(folder).label(), 0.5)


@malformed(ERROR, LABEL, "case_1", mendable=True)
def labels_almost_whole(folder: Path) -> None:
    """One label map has 0.99999 where 1 is meant, as a scale in the header leaves it."""
    change(nnunet(folder).label(), lambda voxels: voxels.astype(np.float32) * np.float32(0.99999))


@malformed(ERROR, VALUE, "255", mendable=True)
def masks_of_255(folder: Path) -> None:
    """The list of labels has 1, and all label maps have 255."""
    for path in nnunet(folder, labels={"background": 0, "liver": 1}).labels:
        change(path, lambda voxels: (voxels > 0).astype(np.uint8) * np.uint8(255))


@malformed(ERROR, VALUE, "255", "case_1", mendable=True)
def one_mask_of_255(folder: Path) -> None:
    """The list of labels has 1, and one label map has 255."""
    tree = nnunet(folder, labels={"background": 0, "liver": 1})
    for path in tree.labels:
        save_volume(path, (read_voxels(path) > 0).astype(np.uint8) * np.uint8(255 if path == tree.label() else 1))


@malformed("")
def pictures_of_255(folder: Path) -> None:
    """Masks of pictures are white on black, and nothing lists the labels."""
    from PIL import Image

    for path in pictures(folder).labels:
        Image.fromarray((np.asarray(Image.open(path)) > 0).astype(np.uint8) * np.uint8(255)).save(path)


@malformed(ERROR, VALUE, "20")
def gapped_values(folder: Path) -> None:
    """The list of labels has 1 and 2, and all label maps have 10 and 20, of which nobody knows which is which."""
    for path in nnunet(folder).labels:
        change(path, lambda voxels: voxels * np.uint8(10))


@malformed("")
def gapped_values_in_the_list(folder: Path) -> None:
    """The list and the label maps have 3 and 9, in this order reversed, which is no problem."""
    for path in nnunet(folder, labels={"lesion": 9, "background": 0, "liver": 3}).labels:
        change(path, lambda voxels: np.array([0, 3, 9], np.uint8)[voxels])


@malformed(ERROR, VALUE, "case_1", "-1")
def negative_label(folder: Path) -> None:
    """One label map has voxels of -1."""
    set_some(nnunet(folder).label(), -1, np.int16)


@malformed(ERROR, VALUE, "case_1", "7 (5 voxels)")
def unknown_label(folder: Path) -> None:
    """One label map has a value that the list of labels does not have."""
    set_some(nnunet(folder).label(), 7, np.uint8)


@malformed(WARNING, "label map without any structure", "case_1")
def empty_label_map(folder: Path) -> None:
    """One label map is background everywhere."""
    change(nnunet(folder).label(), np.zeros_like)


@malformed(ERROR, "nothing is labelled")
def all_label_maps_empty(folder: Path) -> None:
    """All label maps are background everywhere."""
    for path in nnunet(folder).labels:
        change(path, np.zeros_like)


@malformed(ERROR, "labels cannot be told")
def all_label_maps_empty_without_list(folder: Path) -> None:
    """All label maps of a pair of folders are background everywhere."""
    for path in folders(folder).labels:
        change(path, np.zeros_like)


@malformed(WARNING, "label that no case has", "spleen")
def label_name_never_used(folder: Path) -> None:
    """The list of labels has a structure that no label map has."""
    nnunet(folder, labels=LABELS | {"spleen": 3})


@malformed(ERROR, "constant image", "case_1")
def constant_image(folder: Path) -> None:
    """All voxels of one image are 7."""
    change(nnunet(folder).image(), lambda voxels: np.full_like(voxels, 7))


@malformed(WARNING, "constant channel", "case_1")
def constant_channel(folder: Path) -> None:
    """All voxels of the second channel of one image are 0."""
    change(nnunet(folder, channels=("T1", "T2")).image(channel=1), np.zeros_like)


@malformed(ERROR, "constant image")
def all_images_constant(folder: Path) -> None:
    """All voxels of all images are 0."""
    for (path,) in nnunet(folder).images:
        change(path, np.zeros_like)


@malformed(ERROR, "labels cannot be told")
def images_and_labels_exchanged(folder: Path) -> None:
    """The folders of images and label maps have each other's names."""
    root = folders(folder).root
    (root / "labels").rename(root / "other")
    (root / "images").rename(root / "labels")
    (root / "other").rename(root / "images")


@malformed(ERROR, VALUE)
def images_and_labels_exchanged_in_a_list(folder: Path) -> None:
    """The image and the label map of every entry have each other's place."""
    path = decathlon(folder).root / "dataset.json"
    entries = json.loads(path.read_text())["training"]
    edit_json(path, training=[{"image": entry["label"], "label": entry["image"]} for entry in entries])


def _other_unit(folder: Path, how: Callable[[NDArray], NDArray]) -> None:
    change(nnunet(folder, names=case_names(6)).image(), how)


@malformed(WARNING, "intensities in another unit", "case_1")
def ct_in_thousands(folder: Path) -> None:
    """One CT is in thousands of Hounsfield units."""
    _other_unit(folder, lambda voxels: voxels.astype(np.float32) / 1000)


@malformed(WARNING, "intensities in another unit", "case_1")
def ct_of_stored_values(folder: Path) -> None:
    """One CT lies 1024 above Hounsfield units, because its intercept was lost."""
    _other_unit(folder, lambda voxels: voxels + np.int16(1024))


@malformed(WARNING, "intensities in another unit", "case_1")
def ct_of_8_bits(folder: Path) -> None:
    """One CT was scaled to 0 to 255."""
    _other_unit(folder, lambda voxels: np.clip((voxels + 1024.0) / 8, 0, 255).astype(np.uint8))


@malformed(WARNING, "the same image under two names", "case_1", "case_2")
def same_case_twice(folder: Path) -> None:
    """A case is there under two names."""
    tree = nnunet(folder)
    shutil.copy(tree.image(1), tree.image(2))
    shutil.copy(tree.label(1), tree.label(2))


@malformed(WARNING, "the same image under two names", "case_1", "case_2")
def same_voxels_in_other_files(folder: Path) -> None:
    """The voxels of a case are there under two names, compressed in another way and with another label map."""
    tree = nnunet(folder)
    tree.image(2).write_bytes(gzip.compress(header_bytes(tree.image(1)), 1))


@malformed(WARNING, "image both to train on and to test on", "case_2")
def test_image_among_training_images(folder: Path) -> None:
    """An image to test on is one that is trained on."""
    tree = nnunet(folder)
    save_volume(tree.root / "imagesTs" / "other_0000.nii.gz", make_image(20))
    save_volume(tree.root / "imagesTs" / "test_0000.nii.gz", make_image(2))


@malformed(WARNING, "image both to train on and to test on", "case_2")
def test_image_of_the_same_name(folder: Path) -> None:
    """A case is in the folder for training and in the folder for tests, under one name."""
    tree = nnunet(folder)
    (tree.root / "imagesTs").mkdir()
    shutil.copy(tree.image(2), tree.root / "imagesTs" / tree.image(2).name)

"""Datasets as they come: every layout, and every way in which files and lists do not fit together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from autoseg.core.errors import DatasetError
from autoseg.data.check import scan_dataset
from autoseg.data.dataset import Case, Dataset
from autoseg.data.layouts import open_dataset
from autoseg.pipeline.inputs import find_images

LABELS = {"background": 0, "liver": 1, "lesion": 2}


def touch(root: Path, *names: str) -> None:
    """Small real images of ones and a zero; the last axis of 4D names such as "a.nii.gz*2" is the channel."""
    for name in names:
        path, _, n_channels = name.partition("*")
        shape = (4, 4, 4, int(n_channels)) if n_channels else (4, 4, 4)
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        voxels = np.ones(shape, np.uint8)
        voxels[0, 0, 0] = 0
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), root / path)


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def ids(dataset: Dataset) -> list[str]:
    return [case.id for case in dataset.cases]


def count_channels(dataset: Dataset) -> list[int]:
    """Opens every case as planning does, so that a wrong channel or file would show."""
    assert dataset.labels is not None
    return scan_dataset(dataset, dataset.labels, lambda loaded: loaded.image.shape[0], n_threads=1).measured


def fail(path: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        open_dataset(path)
    return str(caught.value)


# Medical Segmentation Decathlon


def make_decathlon(root: Path, **changes: Any) -> Path:
    training = [
        {"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in ("hip_10", "hip_2")
    ]
    content = {
        "name": "HIP",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "training": training,
        "test": ["./imagesTs/hip_9.nii.gz"],  # need not be there
    }
    write(root / "dataset.json", {**content, **changes})
    touch(root, "labelsTr/hip_10.nii.gz", "labelsTr/hip_2.nii.gz")
    return root


def test_decathlon_with_one_channel(tmp_path: Path) -> None:
    make_decathlon(tmp_path)
    touch(tmp_path, "imagesTr/hip_10.nii.gz", "imagesTr/hip_2.nii.gz", "imagesTr/not_listed.nii.gz")
    dataset = open_dataset(tmp_path)
    assert dataset.layout == "Medical Segmentation Decathlon"
    assert dataset.name == "HIP"
    assert dataset.channels == ("MRI",)
    assert dataset.labels is not None
    assert dataset.labels.names == ("Anterior", "Posterior")
    assert dataset.labels.values == (1, 2)
    assert dataset.cases[0] == Case(
        id="hip_10",
        group="hip_10",
        images=(tmp_path / "imagesTr/hip_10.nii.gz",),
        label=tmp_path / "labelsTr/hip_10.nii.gz",
    )
    assert ids(dataset) == ["hip_10", "hip_2"]
    assert open_dataset(tmp_path / "dataset.json") == dataset, "the list itself names the dataset as well"


def test_decathlon_with_all_channels_in_one_file(tmp_path: Path) -> None:
    make_decathlon(tmp_path, modality={"1": "T1", "0": "FLAIR"})
    touch(tmp_path, "imagesTr/hip_10.nii.gz*2", "imagesTr/hip_2.nii.gz*2")
    dataset = open_dataset(tmp_path)
    assert dataset.channels == ("FLAIR", "T1")
    assert [len(case.images) for case in dataset.cases] == [1, 1]
    assert count_channels(dataset) == [2, 2]


def test_decathlon_whose_list_leaves_out_the_channel(tmp_path: Path) -> None:
    make_decathlon(tmp_path, modality={"0": "FLAIR", "1": "T1"})
    touch(tmp_path, *(f"imagesTr/hip_{case}_000{channel}.nii.gz" for case in (2, 10) for channel in (0, 1)))
    dataset = open_dataset(tmp_path)
    assert [file.name for file in dataset.cases[1].image_files] == ["hip_2_0000.nii.gz", "hip_2_0001.nii.gz"]
    assert count_channels(dataset) == [2, 2]


def test_decathlon_lists_every_missing_file(tmp_path: Path) -> None:
    make_decathlon(tmp_path, modality={"0": "FLAIR", "1": "T1"})
    touch(tmp_path, "imagesTr/hip_10_0000.nii.gz")
    (tmp_path / "labelsTr/hip_2.nii.gz").unlink()
    message = fail(tmp_path)
    assert "missing file (3)" in message
    assert f"hip_10: {tmp_path / 'imagesTr/hip_10_0001.nii.gz'}" in message
    assert f"hip_2: {tmp_path / 'imagesTr/hip_2.nii.gz'}" in message
    assert f"hip_2: {tmp_path / 'labelsTr/hip_2.nii.gz'}" in message
    assert "What to do: restore the file, or remove the case" in message


def test_decathlon_lists_every_entry_that_cannot_be_read(tmp_path: Path) -> None:
    make_decathlon(tmp_path, training=["a.nii.gz", {"image": "a"}, {"image": ["a", "b"], "label": "c"}])
    message = fail(tmp_path)
    assert all(f"training[{number}]: found " in message for number in range(3))


def test_decathlon_with_a_case_listed_twice(tmp_path: Path) -> None:
    entry = {"image": "imagesTr/hip_2.nii.gz", "label": "labelsTr/hip_2.nii.gz"}
    make_decathlon(tmp_path, training=[entry, entry])
    touch(tmp_path, "imagesTr/hip_2.nii.gz")
    assert "two cases of one name (1)\n  - hip_2" in fail(tmp_path)


def test_decathlon_with_an_empty_list(tmp_path: Path) -> None:
    make_decathlon(tmp_path, training=[])
    assert "found no case in the layout 'Medical Segmentation Decathlon'" in fail(tmp_path)


# nnU-Net raw


def make_nnunet(root: Path, *files: str, **changes: Any) -> Path:
    content = {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": 2, "file_ending": ".nii.gz"}
    write(root / "dataset.json", {**content, **changes})
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir()
    touch(root, *files)
    return root


def test_nnunet_with_one_channel(tmp_path: Path) -> None:
    make_nnunet(
        tmp_path / "Dataset007_Liver",
        "imagesTr/b_0000.nii.gz",
        "imagesTr/a_1_0000.nii.gz",
        "labelsTr/b.nii.gz",
        "labelsTr/a_1.nii.gz",
    )
    dataset = open_dataset(tmp_path / "Dataset007_Liver")
    assert (dataset.layout, dataset.name, dataset.channels) == ("nnU-Net raw", "Dataset007_Liver", ("CT",))
    assert ids(dataset) == ["a_1", "b"]
    assert dataset.labels is not None
    assert dataset.labels.names == ("liver", "lesion")
    assert dataset.labels.values == (1, 2)
    assert count_channels(dataset) == [1, 1]
    assert open_dataset(tmp_path / "Dataset007_Liver" / "dataset.json") == dataset


def test_nnunet_with_two_channels_and_another_ending(tmp_path: Path) -> None:
    make_nnunet(
        tmp_path,
        *(f"imagesTr/{case}_000{channel}.nii" for case in "ab" for channel in (1, 0)),
        "labelsTr/a.nii",
        "labelsTr/b.nii",
        channel_names={"0": "T1", "1": "T2"},
        file_ending=".nii",
    )
    dataset = open_dataset(tmp_path)
    assert [file.name for file in dataset.cases[0].image_files] == ["a_0000.nii", "a_0001.nii"]
    assert dataset.channels == ("T1", "T2")
    assert count_channels(dataset) == [2, 2]


def test_nnunet_ignores_hidden_files_and_other_files(tmp_path: Path) -> None:
    make_nnunet(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    for name in ("imagesTr/._a_0000.nii.gz", "labelsTr/._a.nii.gz", "imagesTr/.DS_Store", "imagesTr/notes.txt"):
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    assert ids(open_dataset(tmp_path)) == ["a"]


def test_nnunet_lists_images_without_label_labels_without_image_and_missing_channels(tmp_path: Path) -> None:
    make_nnunet(
        tmp_path,
        "imagesTr/a_0000.nii.gz",
        "imagesTr/b_0000.nii.gz",
        "imagesTr/c_0000.nii.gz",
        "imagesTr/c_0002.nii.gz",
        "imagesTr/d_0000.nii.gz",
        "imagesTr/d_0001.nii.gz",
        *(f"labelsTr/{case}.nii.gz" for case in "acde"),
        channel_names={"0": "T1", "1": "T2"},
    )
    message = fail(tmp_path)
    assert message.startswith(str(tmp_path))
    assert "wrong number of channels (2)" in message
    assert "- a: found a_0000.nii.gz, expected one file per channel: a_0000, a_0001" in message
    assert "- c: found c_0000.nii.gz, c_0002.nii.gz, expected" in message, "T3 must not be taken for T2"
    assert f"image without label map (1)\n  - b: {tmp_path / 'imagesTr/b_0000.nii.gz'}" in message
    assert f"label map without image (1)\n  - e: {tmp_path / 'labelsTr/e.nii.gz'}" in message
    assert "- d:" not in message


def test_nnunet_does_not_take_the_second_channel_for_the_only_one(tmp_path: Path) -> None:
    make_nnunet(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/b_0001.nii.gz", "labelsTr/a.nii.gz", "labelsTr/b.nii.gz")
    assert "- b: found b_0001.nii.gz, expected one file per channel: b_0000" in fail(tmp_path)


def test_nnunet_images_without_a_channel(tmp_path: Path) -> None:
    make_nnunet(tmp_path, "imagesTr/a.nii.gz", "imagesTr/b_00.nii.gz", "labelsTr/a.nii.gz", "labelsTr/b.nii.gz")
    message = fail(tmp_path)
    assert "image name without a channel (2)" in message
    assert "a.nii.gz" in message
    assert "b_00.nii.gz" in message


def test_nnunet_without_labels_and_with_an_ending_that_nobody_reads(tmp_path: Path) -> None:
    make_nnunet(tmp_path / "a", "imagesTr/a_0000.nii.gz", file_ending=".webp")
    assert "found file_ending '.webp', expected one of .nii.gz, .nii" in fail(tmp_path / "a")
    make_nnunet(tmp_path / "b", "imagesTr/a_0000.nii.gz")
    (tmp_path / "b/labelsTr").rmdir()
    assert "found imagesTr without labelsTr" in fail(tmp_path / "b")


# Labels and channels in dataset.json


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "liver": 1, "lesion": 7},
        {"background": "0", "lesion": "7", "liver": "1"},
        {"0": "background", "7": "lesion", "1": "liver"},
        {"1": "liver", "7": "lesion"},
    ],
)
def test_labels_name_to_value_and_value_to_name(labels: dict[str, Any], tmp_path: Path) -> None:
    make_nnunet(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", labels=labels)
    spec = open_dataset(tmp_path).labels
    assert spec is not None
    assert (spec.names, spec.values) == (("liver", "lesion"), (1, 7))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            {"background": 0, "whole": [1, "x"], "core": 2},
            "expected a name and a whole number, or several for a region",
        ),
        ({"background": 0, "liver": 1, "ignore": 1}, "the value to ignore is 1, expected one from 1 to 65535 that no"),
        ({"background": 0, "liver": 1, "ignore": [2, 3]}, "found several values to ignore"),
        ({"background": 0}, "found no label besides the background"),
        ({}, "found no label besides the background"),
        ({"background": 0, "liver": 1.5}, "found the label 'liver': 1.5, expected a name and a whole number"),
        ({"background": 0, "liver": True}, "found the label 'liver': True, expected a name and a whole number"),
        ({"background": 0, "liver": -1}, "expected whole numbers from 1 to 65535"),
        ({"background": 0, "liver": 1, "lesion": 1}, "twice"),
        (["background", "liver"], "found the labels ['background', 'liver'], expected for instance"),
        (None, "found the labels None"),
    ],
)
def test_labels_that_cannot_be_used(labels: Any, message: str, tmp_path: Path) -> None:
    make_nnunet(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", labels=labels)
    found = fail(tmp_path)
    assert message in found
    assert str(tmp_path / "dataset.json") in found


def test_channels_that_cannot_be_used(tmp_path: Path) -> None:
    make_nnunet(tmp_path / "a", channel_names={"T1": 0})
    assert "found the channels {'T1': 0}, expected {'0': 'T1', '1': 'T2'} or ['T1', 'T2']" in fail(tmp_path / "a")
    make_nnunet(tmp_path / "b")
    write(tmp_path / "b/dataset.json", {"labels": LABELS})
    assert "dataset.json: the key 'channel_names' is missing" in fail(tmp_path / "b")


def test_more_than_ten_channels_are_in_order_of_their_number(tmp_path: Path) -> None:
    make_nnunet(
        tmp_path,
        *(f"imagesTr/a_{channel:04d}.nii.gz" for channel in range(11)),
        "labelsTr/a.nii.gz",
        channel_names={str(channel): f"c{channel}" for channel in reversed(range(11))},
    )
    dataset = open_dataset(tmp_path)
    assert dataset.channels == tuple(f"c{channel}" for channel in range(11))
    assert [file.name[2:6] for file in dataset.cases[0].image_files] == [f"{channel:04d}" for channel in range(11)]


# A pair of folders


@pytest.mark.parametrize("folders", [("images", "labels"), ("imagesTr", "labelsTr")])
def test_a_pair_of_folders(folders: tuple[str, str], tmp_path: Path) -> None:
    touch(tmp_path, *(f"{folder}/{name}" for folder in folders for name in ("b.nii", "a_0001.nii.gz", "a_0002.nii.gz")))
    (tmp_path / folders[0] / "._b.nii").write_bytes(b"\0")
    dataset = open_dataset(tmp_path)
    assert (dataset.layout, dataset.channels, dataset.labels) == ("a pair of folders", ("image",), None)
    assert ids(dataset) == ["a_0001", "a_0002", "b"], "equal names are cases, whatever they end in"
    assert dataset.cases[2].images == (tmp_path / folders[0] / "b.nii",)


def test_a_pair_of_folders_with_channels(tmp_path: Path) -> None:
    touch(tmp_path, *(f"images/{case}_000{channel}.nii.gz" for case in "ab" for channel in (0, 1)))
    touch(tmp_path, "labels/a.nii.gz", "labels/b.nii.gz")
    dataset = open_dataset(tmp_path)
    assert ids(dataset) == ["a", "b"]
    assert dataset.channels == ("image 0", "image 1")
    assert [file.name for file in dataset.cases[1].image_files] == ["b_0000.nii.gz", "b_0001.nii.gz"]


def test_a_pair_of_folders_with_one_channel_and_its_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "images/a_0000.nii.gz", "images/b_0000.nii.gz", "labels/a.nii.gz", "labels/b.nii.gz")
    dataset = open_dataset(tmp_path)
    assert (ids(dataset), dataset.channels) == (["a", "b"], ("image",))


def test_a_pair_of_folders_that_do_not_match(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.nii.gz", "images/b.nii.gz", "images/c.nii.gz", "labels/a.nii.gz", "labels/d.nii.gz")
    message = fail(tmp_path)
    assert "image without label map (2)" in message
    assert str(tmp_path / "images/b.nii.gz") in message
    assert str(tmp_path / "images/c.nii.gz") in message
    assert f"label map without image (1)\n  - d: {tmp_path / 'labels/d.nii.gz'}" in message


@pytest.mark.parametrize("folder", ["images", "labels"])
def test_one_case_in_two_files_is_not_decided_by_chance(folder: str, tmp_path: Path) -> None:
    touch(tmp_path, "images/a.nii.gz", "labels/a.nii.gz", f"{folder}/a.nii")
    message = fail(tmp_path)
    assert "two files of one case (1)" in message
    assert str(tmp_path / folder) in message


def test_an_empty_pair_of_folders(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    assert "found no case in the layout 'a pair of folders'" in fail(tmp_path)


# Manifests


def test_csv_manifest_with_channels_groups_and_a_byte_order_mark(tmp_path: Path) -> None:
    touch(tmp_path, "here/t1.nii.gz", "here/t2.nii.gz", "here/seg.nii.gz", "there/a.nii.gz", "there/b.nii.gz")
    elsewhere = tmp_path / "there"
    manifest = tmp_path / "here" / "scans.csv"
    manifest.write_text(
        "case,image_T1,image_T2,label,group,comment\r\n"
        "007,t1.nii.gz,t2.nii.gz,seg.nii.gz,p1,\r\n"
        f'"b, second",{elsewhere}/a.nii.gz,{elsewhere}/b.nii.gz,../here/seg.nii.gz,0,x\r\n'
        "\r\n",
        encoding="utf-8-sig",
    )
    with pytest.raises(
        DatasetError, match=rf"file outside of the dataset \(2\)(?s:.*){elsewhere}/b(?s:.*)--allow-outside"
    ):
        open_dataset(manifest)
    dataset = open_dataset(manifest, allow_outside=True)
    assert (dataset.layout, dataset.name, dataset.channels) == ("CSV manifest", "scans", ("T1", "T2"))
    assert dataset.labels is None
    assert [(case.id, case.group) for case in dataset.cases] == [("007", "p1"), ("b, second", "0")]
    assert dataset.cases[0].images == (tmp_path / "here/t1.nii.gz", tmp_path / "here/t2.nii.gz")
    assert dataset.cases[1].images == (elsewhere / "a.nii.gz", elsewhere / "b.nii.gz")


def test_csv_manifest_names_cases_after_their_label_maps(tmp_path: Path) -> None:
    touch(tmp_path, "i/a.nii.gz", "i/b.nii.gz", "l/x.nii.gz", "l/y.nii.gz")
    dataset = open_dataset(write(tmp_path / "a.csv", "image,label\ni/a.nii.gz,l/x.nii.gz\ni/b.nii.gz,l/y.nii.gz\n"))
    assert dataset.channels == ("image",)
    assert [(case.id, case.group) for case in dataset.cases] == [("x", "x"), ("y", "y")]


def test_csv_manifest_lists_every_row_that_cannot_be_read(tmp_path: Path) -> None:
    message = fail(write(tmp_path / "a.csv", "image,label\na.nii.gz,\n,b.nii.gz\nc.nii.gz\n"))
    assert "entry without image or label map (3)" in message
    assert all(f"- case {number}: found " in message for number in (1, 2, 3))


def test_csv_manifest_with_other_columns(tmp_path: Path) -> None:
    message = fail(write(tmp_path / "a.csv", "scan;mask\na;b\n"))
    assert "found the columns scan;mask, expected image (or image_<channel> for each channel) and label" in message
    assert "found the columns , expected" in fail(write(tmp_path / "b.csv", ""))


def test_csv_manifest_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("image,label\nMüller.nii.gz,l.nii.gz\n".encode("latin-1"))
    assert "a.csv: cannot be read as a CSV file in UTF-8" in fail(tmp_path / "a.csv")


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_nnunet_with_colours_in_one_file(ending: str, tmp_path: Path) -> None:
    """The exception from one file per channel, as in its dataset 120 of roads."""
    rng = np.random.default_rng(0)
    for folder, pixels in (("imagesTr", rng.integers(0, 255, (8, 9, 3))), ("labelsTr", rng.integers(0, 2, (8, 9)))):
        (tmp_path / folder).mkdir()
        name = f"a_0000{ending}" if folder == "imagesTr" else f"a{ending}"
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / folder / name)
    content = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": {"background": 0, "road": 1}}
    write(tmp_path / "dataset.json", content | {"file_ending": ending})
    assert count_channels(open_dataset(tmp_path)) == [3]
    inputs, problems = find_images([tmp_path / "imagesTr"], channels=("R", "G", "B"))
    assert (inputs, problems) == ({"a": [tmp_path / "imagesTr" / f"a_0000{ending}"]}, [])
    write(tmp_path / "dataset.json", content | {"file_ending": ending, "channel_names": {"0": "R", "1": "G"}})
    assert "expected one file per channel: a_0000, a_0001" in fail(tmp_path)


def test_json_manifest(tmp_path: Path) -> None:
    touch(tmp_path, "t1.nii.gz", "t2.nii.gz", "both.nii.gz*2", "x.nii.gz", "y.nii.gz")
    content = {
        "name": "mine",
        "channels": ["T1", "T2"],
        "labels": {"thing": 1},
        "cases": [
            {"images": ["t1.nii.gz", "t2.nii.gz"], "label": "x.nii.gz", "id": "one", "group": "p"},
            {"image": str(tmp_path / "both.nii.gz"), "label": "y.nii.gz"},
        ],
    }
    dataset = open_dataset(write(tmp_path / "list.json", content))
    assert (dataset.layout, dataset.name, dataset.channels) == ("JSON manifest", "mine", ("T1", "T2"))
    assert [(case.id, case.group, len(case.images)) for case in dataset.cases] == [("one", "p", 2), ("y", "y", 1)]
    assert count_channels(dataset) == [2, 2]
    write(tmp_path / "dataset.json", content)
    assert open_dataset(tmp_path) == dataset, "a folder whose dataset.json is a manifest"


def test_json_manifest_without_labels_leaves_them_to_the_label_maps(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "x.nii.gz")
    entry = {"image": "a.nii.gz", "label": "x.nii.gz"}
    assert open_dataset(write(tmp_path / "l.json", {"channels": ["CT"], "cases": [entry]})).labels is None


def test_group_and_case_zero_are_names_like_any_other(tmp_path: Path) -> None:
    """Two cases of patient 0 must not straddle folds because 0 is false."""
    touch(tmp_path, "a.nii.gz", "x.nii.gz", "y.nii.gz")
    cases = [
        {"image": "a.nii.gz", "label": "x.nii.gz", "group": 0, "id": 0},
        {"image": "a.nii.gz", "label": "y.nii.gz", "group": 0, "id": ""},
        {"image": "a.nii.gz", "label": "y.nii.gz", "group": None, "id": "z"},
    ]
    dataset = open_dataset(write(tmp_path / "l.json", {"channels": ["CT"], "cases": cases}))
    assert [(case.id, case.group) for case in dataset.cases] == [("0", "0"), ("y", "0"), ("z", "z")]


@pytest.mark.parametrize(
    "entry",
    [
        "a.nii.gz",
        {"label": "x.nii.gz"},
        {"image": "a.nii.gz"},
        {"images": [], "label": "x.nii.gz"},
        {"images": 5, "label": "x.nii.gz"},
        {"images": {"T1": "a.nii.gz"}, "label": "x.nii.gz"},
        {"image": "a.nii.gz", "label": ["x.nii.gz"]},
    ],
    ids=str,
)
def test_json_manifest_with_entries_that_cannot_be_read(entry: Any, tmp_path: Path) -> None:
    message = fail(write(tmp_path / "l.json", {"channels": ["CT"], "cases": [entry]}))
    assert "case 1: found " in message
    assert "expected the paths of an image and a label map" in message


@pytest.mark.parametrize("images", [["a.nii.gz", None], ["a.nii.gz", "b.nii.gz"], ["a.nii.gz"] * 4])
def test_json_manifest_with_another_number_of_images_than_channels(images: list[str | None], tmp_path: Path) -> None:
    content = {"channels": ["T1", "T2", "PD"], "cases": [{"images": images, "label": "x.nii.gz"}]}
    message = fail(write(tmp_path / "l.json", content))
    assert f"case 1: found {len(images)}, expected one file with all channels, or 3, with null for" in message


def test_json_manifest_with_labels_and_one_file_each(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "l.nii.gz", "s.nii.gz")
    entry = {"image": "a.nii.gz", "label": {"liver": "l.nii.gz", "spleen": "s.nii.gz"}}
    content = {"channels": ["CT"], "labels": {"liver": 1, "spleen": 2}, "cases": [entry]}
    labels = open_dataset(write(tmp_path / "l.json", content)).labels
    assert labels is not None
    assert labels.one_file_each


def test_json_manifest_whose_cases_are_no_list(tmp_path: Path) -> None:
    assert "'cases' is {'a': 1}, expected a list" in fail(write(tmp_path / "l.json", {"cases": {"a": 1}}))
    assert "the key 'channels' is missing" in fail(write(tmp_path / "l.json", {"cases": []}))


def test_manifest_with_two_cases_of_one_name(tmp_path: Path) -> None:
    touch(tmp_path, "1/i.nii.gz", "1/l.nii.gz", "2/i.nii.gz", "2/l.nii.gz")
    message = fail(write(tmp_path / "a.csv", "image,label\n1/i.nii.gz,1/l.nii.gz\n2/i.nii.gz,2/l.nii.gz\n"))
    assert f"two cases of one name (1)\n  - l: {tmp_path / '2/l.nii.gz'}" in message
    assert "name the cases in a manifest" in message


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "..", ".", " ", "a\nb", "a\0b"])
def test_names_that_cannot_be_folders(name: str, tmp_path: Path) -> None:
    touch(tmp_path, "i.nii.gz", "l.nii.gz")
    entry = {"image": "i.nii.gz", "label": "l.nii.gz", "id": name}
    message = fail(write(tmp_path / "l.json", {"channels": ["CT"], "cases": [entry]}))
    assert "unusable case name (1)" in message
    assert repr(name) in message


# What is no dataset


def test_unknown_layout_says_what_is_there_and_what_is_known(tmp_path: Path) -> None:
    touch(tmp_path, "scan1.nii.gz", "scan2.nii.gz")
    message = fail(tmp_path)
    assert "the layout is not known" in message
    assert "Found: scan1.nii.gz, scan2.nii.gz" in message
    for layout in ("Medical Segmentation Decathlon", "nnU-Net raw", "a pair of folders", "a manifest"):
        assert layout in message
    assert "Images end in .nii.gz, .nii, .nrrd," in message


def test_other_paths_that_are_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "Found: an empty folder" in fail(tmp_path / "empty")
    touch(tmp_path, "a.nii.gz")
    assert "Found: a.nii.gz" in fail(tmp_path / "a.nii.gz")
    assert "missing: no such file or folder" in fail(tmp_path / "missing")
    assert "a.json: is not JSON" in fail(write(tmp_path / "a.json", "{"))
    assert "a.json: found a list, expected an object" in fail(write(tmp_path / "a.json", "[]"))
    assert "the layout is not known" in fail(write(tmp_path / "a.json", "{}"))


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "data/images/a.nii.gz", "data/labels/a.nii.gz")
    monkeypatch.chdir(tmp_path)
    (case,) = open_dataset(Path("data")).cases
    assert case.label == tmp_path / "data/labels/a.nii.gz"

"""Malformed datasets: which files there are, how they are called, and what lists them; and some in order."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from malformed_entry import ERROR, IMAGE, LAYOUT, WARNING, add, malformed
from malformed_files import header_bytes
from small_datasets import (
    N_CASES,
    Tree,
    brats,
    csv_manifest,
    decathlon,
    dicom,
    edit_json,
    folders,
    json_manifest,
    make_image,
    nnunet,
    pictures,
    rows_of,
    save_volume,
    write_rows,
)

DEPTH = 10_000

# -- which files there are ---------------------------------------------------------------------------------------------


@malformed(ERROR, "wrong number of channels", "case_1")
def channel_missing(folder: Path) -> None:
    """One case lacks its second channel."""
    nnunet(folder, channels=("T1", "T2")).image(channel=1).unlink()


@malformed(ERROR, "wrong number of channels", "case_1")
def channel_too_many(folder: Path) -> None:
    """One case has a channel more than the list."""
    save_volume(nnunet(folder).root / "imagesTr" / "case_1_0001.nii.gz", make_image(1, channel=1))


@malformed(ERROR, "image name without a channel", "case_1.nii.gz")
def channel_not_named(folder: Path) -> None:
    """One image has no _0000 in its name."""
    path = nnunet(folder).image()
    path.rename(path.with_name("case_1.nii.gz"))


@malformed(ERROR, "image without label map", "case_1")
def image_without_label(folder: Path) -> None:
    """One image has no label map."""
    nnunet(folder).label().unlink()


@malformed(ERROR, "label map without image", "case_1")
def label_without_image(folder: Path) -> None:
    """One label map has no image."""
    nnunet(folder).image().unlink()


@malformed(ERROR, LAYOUT)
def labels_folder_missing(folder: Path) -> None:
    """There is imagesTr, and no labelsTr."""
    shutil.rmtree(nnunet(folder).root / "labelsTr")


@malformed(ERROR, "case without label map", "BraTS-GLI-00001-000")
def brats_without_label(folder: Path) -> None:
    """One case of BraTS has no label map."""
    brats(folder).label().unlink()


@malformed(ERROR, LAYOUT)
def brats_of_two_generations(folder: Path) -> None:
    """Cases of BraTS 2020 lie beside those of 2023, and their values mean different things."""
    tree = brats(folder)
    name = "BraTS20_Training_001"
    for kind, path in (("flair", tree.image()), ("seg", tree.label())):
        target = tree.root / name / f"{name}_{kind}.nii.gz"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)


@malformed(ERROR, "two files of one case", "case_1")
def two_endings(folder: Path) -> None:
    """A label map is there as .nii and as .nii.gz."""
    path = folders(folder).label()
    path.with_suffix("").write_bytes(header_bytes(path))


@malformed(ERROR, "two files of one case", "case_1")
def two_endings_of_an_image(folder: Path) -> None:
    """An image is there as .nii and as .nii.gz."""
    path = folders(folder).image()
    path.with_suffix("").write_bytes(header_bytes(path))


@malformed(WARNING, "names that some file systems cannot tell apart", "Case_1")
def names_that_differ_in_case(folder: Path) -> None:
    """Two cases differ in upper and lower case alone, and would be one on other systems."""
    nnunet(folder, names=("case_0", "case_1", "Case_1", "case_2"))


@malformed("")
def names_with_spaces(folder: Path) -> None:
    """Names of cases have spaces and quotes, which is no problem."""
    nnunet(folder, names=("case 0", " case 1", "case's 2", "case 3 (copy)"))


@malformed("")
def names_in_other_scripts(folder: Path) -> None:
    """Names of cases are in Greek, Chinese and with umlauts, which is no problem."""
    nnunet(folder, names=("ασθενής", "患者_2", "Übung", "case"))


@malformed(WARNING, "names that some file systems cannot tell apart")
def names_that_look_the_same(folder: Path) -> None:
    """Two names differ in how an accent is stored alone, and would be one on other systems."""
    names = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    nnunet(folder, names=("case_0", *names, "case_3"))


@malformed(ERROR, "image without label map")
def accents_stored_in_two_ways(folder: Path) -> None:
    """The names of an image and its label map differ in how an accent is stored."""
    tree = nnunet(folder, names=("case_0", unicodedata.normalize("NFC", "café"), "case_2"))
    tree.label().rename(tree.root / "labelsTr" / unicodedata.normalize("NFD", "café.nii.gz"))


@malformed(ERROR, "unusable case name")
def name_with_newline(folder: Path) -> None:
    """The name of a case has a newline."""
    nnunet(folder, names=("case_0", "case\nERROR: disk full", "case_2"))


@malformed(ERROR, "unusable case name")
def name_with_tab(folder: Path) -> None:
    """The name of a case has a tab."""
    nnunet(folder, names=("case_0", "case\t1", "case_2"))


@malformed(ERROR, "unusable case name")
def name_with_escape(folder: Path) -> None:
    """The name of a case has a sequence that clears the terminal."""
    nnunet(folder, names=("case_0", "case\x1b[2J\x1b[31m1", "case_2"))


@malformed(ERROR, "unusable case name")
def name_with_eight_bit_control(folder: Path) -> None:
    """The name of a case has a control character above ASCII, which some terminals obey."""
    nnunet(folder, names=("case_0", "case\x9b31m1", "case_2"))


@malformed(ERROR, "image without label map")
def missing_label_of_a_name_with_escape(folder: Path) -> None:
    """An image whose name has a sequence that clears the terminal has no label map."""
    nnunet(folder, names=("case_0", "case\x1b[2J1", "case_2")).label().unlink()


@malformed(ERROR, "unusable case name")
def name_too_long(folder: Path) -> None:
    """The name of a case is so long that files made of it could not be written."""
    nnunet(folder, names=("case_0", "x" * 240, "case_2"))


@malformed("")
def name_with_leading_dash(folder: Path) -> None:
    """The name of a case begins as an option does, which is no problem."""
    nnunet(folder, names=("-rf", "--help", "case_2"))


@malformed("")
def files_of_another_system(folder: Path) -> None:
    """Beside every image lie the hidden file and the folder that other systems leave behind, which is no problem."""
    tree = nnunet(folder)
    for path in (*tree.labels, *(image for (image,) in tree.images)):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
        (path.parent / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        (path.parent / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")


@malformed(ERROR, "missing file", "case_1")
def link_to_itself(folder: Path) -> None:
    """An image is a symbolic link to itself."""
    path = nnunet(folder).image()
    path.unlink()
    path.symlink_to(path.name)


@malformed(ERROR, "missing file", "case_1")
def link_to_nowhere(folder: Path) -> None:
    """A label map is a symbolic link to a file that is gone."""
    path = nnunet(folder).label()
    path.unlink()
    path.symlink_to("/nowhere/case_1.nii.gz")


@malformed("")
def link_to_the_parent(folder: Path) -> None:
    """A folder in the dataset is a symbolic link to the dataset, and nothing follows it."""
    tree = brats(folder)
    (tree.root / "BraTS-GLI-00001-000" / "loop").symlink_to("..")
    (tree.root / "loop").symlink_to(".")


@malformed(ERROR, LAYOUT)
def dataset_that_links_to_itself(folder: Path) -> None:
    """The dataset is a symbolic link to itself."""
    (folder / "dataset").symlink_to("dataset")


# -- dataset.json ------------------------------------------------------------------------------------------------------


def _text(folder: Path, text: str) -> None:
    (nnunet(folder).root / "dataset.json").write_text(text)


@malformed("")
def dataset_json_missing(folder: Path) -> None:
    """There are imagesTr and labelsTr of two channels, and no dataset.json: that is a pair of folders."""
    (nnunet(folder, channels=("T1", "T2")).root / "dataset.json").unlink()


@malformed(ERROR, LAYOUT, "dataset.json", "JSON")
def dataset_json_cut_off(folder: Path) -> None:
    """dataset.json ends in the middle."""
    _text(folder, '{"channel_names": {"0": "CT"}, "labels": {"backgr')


@malformed(ERROR, LAYOUT, "dataset.json", "JSON")
def dataset_json_empty(folder: Path) -> None:
    """dataset.json has no byte."""
    _text(folder, "")


@malformed(ERROR, LAYOUT, "dataset.json")
def dataset_json_binary(folder: Path) -> None:
    """dataset.json is an image that was given this name."""
    tree = nnunet(folder)
    shutil.copy(tree.image(), tree.root / "dataset.json")


@malformed(ERROR, LAYOUT, "dataset.json", "list")
def dataset_json_list(folder: Path) -> None:
    """dataset.json is a list."""
    _text(folder, '["CT"]')


@malformed(ERROR, LAYOUT, "dataset.json", "JSON")
def dataset_json_deep(folder: Path) -> None:
    """dataset.json is nested ten thousand deep."""
    _text(folder, "[" * DEPTH + "]" * DEPTH)


@malformed(ERROR, LAYOUT, "dataset.json", "JSON")
def dataset_json_deep_objects(folder: Path) -> None:
    """The labels of dataset.json are nested ten thousand deep."""
    _text(folder, '{"channel_names": {"0": "CT"}, "labels": ' + '{"a": ' * DEPTH + "1" + "}" * (DEPTH + 1))


@malformed(ERROR, LAYOUT, "dataset.json")
def dataset_json_of_a_gibibyte(folder: Path) -> None:
    """dataset.json has a gibibyte (of zeros that take no room on the disk)."""
    os.truncate(nnunet(folder).root / "dataset.json", 2**30)


@malformed(ERROR, LAYOUT, "dataset.json", "labels")
def labels_missing(folder: Path) -> None:
    """dataset.json has no labels."""
    edit_json(nnunet(folder).root / "dataset.json", labels=None)


@malformed(ERROR, LAYOUT, "dataset.json", "labels")
def labels_as_list(folder: Path) -> None:
    """The labels are a list of names."""
    edit_json(nnunet(folder).root / "dataset.json", labels=["background", "liver", "lesion"])


@malformed(ERROR, LAYOUT, "dataset.json", "1.5")
def label_value_not_whole(folder: Path) -> None:
    """A label has the value "1.5"."""
    edit_json(nnunet(folder).root / "dataset.json", labels={"background": 0, "liver": "1.5", "lesion": 2})


@malformed(ERROR, LAYOUT, "dataset.json", "twice")
def label_value_twice(folder: Path) -> None:
    """Two labels have one value."""
    edit_json(nnunet(folder).root / "dataset.json", labels={"background": 0, "liver": 1, "lesion": 1})


@malformed(ERROR, LAYOUT, "dataset.json")
def label_value_huge(folder: Path) -> None:
    """A label has a value of 400 digits."""
    edit_json(nnunet(folder).root / "dataset.json", labels={"background": 0, "liver": 1, "lesion": "9" * 400})


@malformed(ERROR, LAYOUT, "dataset.json")
def labels_by_the_thousand(folder: Path) -> None:
    """The list has 70,000 labels, more than 16 bits can hold."""
    labels = {"background": 0} | {f"structure {value}": value for value in range(1, 70_000)}
    edit_json(nnunet(folder).root / "dataset.json", labels=labels)


@malformed("")
def background_not_listed(folder: Path) -> None:
    """The labels do not mention the background, which is 0 all the same."""
    edit_json(nnunet(folder).root / "dataset.json", labels={"liver": 1, "lesion": 2})


@malformed(ERROR, LAYOUT, "dataset.json", "background")
def no_foreground(folder: Path) -> None:
    """The only label is the background."""
    edit_json(nnunet(folder).root / "dataset.json", labels={"background": 0})


@malformed("")
def label_name_with_escape(folder: Path) -> None:
    """The name of a label has a sequence that clears the terminal, and one that a page would run."""
    labels = {"background": 0, "liver\x1b[2J": 1, "<script>alert(1)</script>": 2}
    edit_json(nnunet(folder).root / "dataset.json", labels=labels)


@malformed(ERROR, LAYOUT, "dataset.json", "channel")
def channels_missing(folder: Path) -> None:
    """dataset.json has no channel_names."""
    edit_json(nnunet(folder).root / "dataset.json", channel_names=None)


@malformed(ERROR, LAYOUT, "dataset.json", "channels")
def channels_as_number(folder: Path) -> None:
    """The channels are the number 1."""
    edit_json(nnunet(folder).root / "dataset.json", channel_names=1)


@malformed(ERROR, LAYOUT, "dataset.json", "channel")
def no_channel(folder: Path) -> None:
    """The list of channels is empty."""
    edit_json(nnunet(folder).root / "dataset.json", channel_names={})


@malformed(ERROR, LAYOUT, ".xyz")
def file_ending_unknown(folder: Path) -> None:
    """dataset.json names an ending that no format has."""
    edit_json(nnunet(folder).root / "dataset.json", file_ending=".xyz")


@malformed(ERROR, LAYOUT)
def file_ending_of_no_file(folder: Path) -> None:
    """dataset.json names an ending that no file has."""
    edit_json(nnunet(folder).root / "dataset.json", file_ending=".nrrd")


# -- lists of files ----------------------------------------------------------------------------------------------------


def _training(folder: Path, edit: Callable[[list[Any]], object]) -> Tree:
    """The Decathlon with an edited list."""
    tree = decathlon(folder)
    path = tree.root / "dataset.json"
    entries = json.loads(path.read_text())["training"]
    edit(entries)
    edit_json(path, training=entries)
    return tree


@malformed(ERROR, LAYOUT)
def training_list_empty(folder: Path) -> None:
    """The training list has no entry."""
    _training(folder, lambda entries: entries.clear())


@malformed(ERROR, "entry without image or label map", "training[1]")
def training_entry_of_numbers(folder: Path) -> None:
    """An entry of the training list has numbers instead of paths."""
    _training(folder, lambda entries: entries.__setitem__(1, {"image": 5, "label": 6}))


@malformed(ERROR, "entry without image or label map", "training[1]")
def training_entry_is_text(folder: Path) -> None:
    """An entry of the training list is a name."""
    _training(folder, lambda entries: entries.__setitem__(1, "case_1"))


@malformed(ERROR, "missing file", "case_1")
def training_file_missing(folder: Path) -> None:
    """An image of the training list is not there."""
    decathlon(folder).image().unlink()


@malformed(ERROR, "two cases of one name", "case_2")
def training_entry_twice(folder: Path) -> None:
    """An entry of the training list is there twice."""
    _training(folder, lambda entries: entries.append(entries[2]))


def _outside(folder: Path) -> Path:
    """A pair of folders beside the dataset."""
    tree = folders(folder, names=("secret",), below="outside")
    save_volume(tree.image(0), make_image(30))
    return tree.root


@malformed(ERROR, "file outside of the dataset", "--allow-outside", "secret")
def training_entry_outside(folder: Path) -> None:
    """An entry of the training list leads out of the dataset with ".."."""
    _outside(folder)
    entry = {"image": "../outside/images/secret.nii.gz", "label": "../outside/labels/secret.nii.gz"}
    _training(folder, lambda entries: entries.append(entry))


@malformed(ERROR, "file outside of the dataset", "--allow-outside", "secret")
def training_entry_absolute(folder: Path) -> None:
    """An entry of the training list is an absolute path outside of the dataset."""
    other = _outside(folder)
    entry = {"image": f"{other}/images/secret.nii.gz", "label": f"{other}/labels/secret.nii.gz"}
    _training(folder, lambda entries: entries.append(entry))


@malformed("")
def images_are_links(folder: Path) -> None:
    """The images of a dataset are links to files elsewhere, as large datasets are laid out, which is no problem."""
    tree = nnunet(folder)
    (folder / "outside").mkdir()
    for (path,) in tree.images:
        shutil.move(path, folder / "outside" / path.name)
        path.symlink_to(folder / "outside" / path.name)


@malformed(ERROR, "file outside of the dataset", "--allow-outside", "secret", dataset="dataset/cases.csv")
def csv_row_outside(folder: Path) -> None:
    """A row of a CSV manifest leads out of the folder of the manifest."""
    _outside(folder)
    tree = csv_manifest(folder)
    row = ["secret", "../outside/images/secret.nii.gz", "../outside/labels/secret.nii.gz"]
    write_rows(tree, [*rows_of(tree), row])


@malformed(ERROR, LAYOUT, "columns", dataset="dataset/cases.csv")
def csv_without_label_column(folder: Path) -> None:
    """A CSV manifest has no column for the label maps."""
    tree = csv_manifest(folder)
    write_rows(tree, [row[:2] for row in rows_of(tree)], header=("case", "image"))


@malformed(ERROR, LAYOUT, "columns", dataset="dataset/cases.csv")
def csv_with_semicolons(folder: Path) -> None:
    """The columns of a CSV manifest are separated by semicolons."""
    tree = csv_manifest(folder)
    write_rows(tree, rows_of(tree), delimiter=";")


@malformed(ERROR, LAYOUT, "columns", dataset="dataset/cases.csv")
def csv_without_header(folder: Path) -> None:
    """A CSV manifest has no line with the names of the columns."""
    tree = csv_manifest(folder)
    write_rows(tree, rows_of(tree)[1:], header=rows_of(tree)[0])


@malformed("", dataset="dataset/cases.csv")
def csv_with_byte_order_mark(folder: Path) -> None:
    """A CSV manifest begins with a byte order mark, as Excel writes it, which is no problem."""
    tree = csv_manifest(folder)
    write_rows(tree, rows_of(tree), encoding="utf-8-sig")


@malformed(ERROR, LAYOUT, "UTF-8", dataset="dataset/cases.csv")
def csv_in_latin_1(folder: Path) -> None:
    """A CSV manifest is in Latin-1."""
    tree = csv_manifest(folder, names=("Müller", "case_1", "case_2"))
    write_rows(tree, rows_of(tree, ("Müller", "case_1", "case_2")), encoding="latin-1")


@malformed(ERROR, LAYOUT, "UTF-8", dataset="dataset/cases.csv")
def csv_in_utf_16(folder: Path) -> None:
    """A CSV manifest is in UTF-16."""
    tree = csv_manifest(folder)
    write_rows(tree, rows_of(tree), encoding="utf-16")


@malformed(ERROR, LAYOUT, "cases.csv", dataset="dataset/cases.csv")
def csv_empty(folder: Path) -> None:
    """A CSV manifest has no byte."""
    (csv_manifest(folder).root / "cases.csv").write_text("")


@malformed(ERROR, LAYOUT, "cases.csv", dataset="dataset/cases.csv")
def csv_header_alone(folder: Path) -> None:
    """A CSV manifest has no rows."""
    write_rows(csv_manifest(folder), [])


@malformed(ERROR, "two cases of one name", "case_2", dataset="dataset/cases.csv")
def csv_row_twice(folder: Path) -> None:
    """A row of a CSV manifest is there twice."""
    tree = csv_manifest(folder)
    write_rows(tree, [*rows_of(tree), rows_of(tree)[2]])


@malformed(ERROR, "missing file", dataset="dataset/cases.csv")
def csv_with_zero_bytes(folder: Path) -> None:
    """A path in a CSV manifest has a byte of zero."""
    tree = csv_manifest(folder)
    rows = rows_of(tree)
    rows[1][1] += "\0.nii.gz"
    write_rows(tree, rows)


@malformed(ERROR, "entry without image or label map", "case 2", dataset="dataset/cases.csv")
def csv_row_too_short(folder: Path) -> None:
    """A row of a CSV manifest ends before the label map."""
    tree = csv_manifest(folder)
    rows = rows_of(tree)
    write_rows(tree, [rows[0], rows[1][:2], *rows[2:]])


@malformed(ERROR, LAYOUT, "cases.csv", dataset="dataset/cases.csv")
def csv_with_a_long_field(folder: Path) -> None:
    """A field of a CSV manifest never ends, because a quote is missing."""
    tree = csv_manifest(folder)
    with (tree.root / "cases.csv").open("a") as file:
        file.write('case_9,"' + "images/case_1.nii.gz,\n" * 10_000)


@malformed(ERROR, "unusable case name", dataset="dataset/cases.csv")
def csv_case_name_is_a_path(folder: Path) -> None:
    """The name of a case in a CSV manifest leads out of the work folder."""
    tree = csv_manifest(folder)
    rows = rows_of(tree)
    rows[1][0] = "../../escaped"
    write_rows(tree, rows)


@malformed(ERROR, "unusable case name", dataset="dataset/cases.csv")
def csv_case_name_is_parent(folder: Path) -> None:
    """The name of a case in a CSV manifest is ".."."""
    tree = csv_manifest(folder)
    rows = rows_of(tree)
    rows[1][0] = ".."
    write_rows(tree, rows)


def _cases(folder: Path, edit: Callable[[list[Any]], object]) -> None:
    """A JSON manifest with edited cases."""
    path = json_manifest(folder).root / "dataset.json"
    cases = json.loads(path.read_text())["cases"]
    edit(cases)
    edit_json(path, cases=cases)


@malformed(ERROR, LAYOUT, "cases")
def json_cases_as_number(folder: Path) -> None:
    """The cases of a JSON manifest are the number 4."""
    edit_json(json_manifest(folder).root / "dataset.json", cases=N_CASES)


@malformed(ERROR, LAYOUT)
def json_cases_empty(folder: Path) -> None:
    """The cases of a JSON manifest are an empty list."""
    _cases(folder, lambda cases: cases.clear())


@malformed(ERROR, "entry without image or label map", "case 2")
def json_entry_of_lists(folder: Path) -> None:
    """The paths of a case in a JSON manifest are lists of lists."""
    _cases(folder, lambda cases: cases[1].update(image=[[["images/case_1.nii.gz"]]]))


@malformed(ERROR, "structure that is not among the labels", "case_1", "structure 9")
def json_annotated_unknown(folder: Path) -> None:
    """A case of a JSON manifest is annotated with a structure that is not among the labels."""
    _cases(folder, lambda cases: cases[1].update(annotated=["liver", "structure 9"]))


@malformed(ERROR, "missing file", "missing file")
def json_path_is_an_address(folder: Path) -> None:
    """The image of a case in a JSON manifest is an address of the web."""
    _cases(folder, lambda cases: cases[1].update(image="https://example.org/case_1.nii.gz"))


@malformed(ERROR, "file outside of the dataset")
def json_device_as_image(folder: Path) -> None:
    """The image of a case in a JSON manifest is a device that never ends."""
    _cases(folder, lambda cases: cases[1].update(image="/dev/zero"))


@malformed(ERROR, IMAGE, "case_1")
def named_pipe_as_image(folder: Path) -> None:
    """An image is a named pipe, from which reading would wait for ever."""
    path = nnunet(folder).image()
    path.unlink()
    os.mkfifo(path)


# -- in order: what is spoilt above is right before -------------------------------------------------------------------


IN_ORDER: dict[str, tuple[str, Callable[[Path], object]]] = {
    "nnunet": ("nnU-Net's layout with two channels", lambda folder: nnunet(folder, channels=("T1", "T2"))),
    "decathlon": ("the Decathlon's layout with two channels", lambda f: decathlon(f, channels=("FLAIR", "T1"))),
    "json_manifest": ("a JSON manifest", json_manifest),
    "brats": ("BraTS", brats),
    "pictures": ("pictures with masks", pictures),
    "dicom": ("folders of DICOM slices", dicom),
    "nrrd": ("NRRD", lambda folder: folders(folder, ending=".nrrd", label_ending=".nrrd")),
    "nhdr": ("NRRD with the voxels in files of their own", lambda f: folders(f, ending=".nhdr", label_ending=".nrrd")),
    "mhd": (
        "MetaImage with the voxels in files of their own",
        lambda f: folders(f, ending=".mhd", label_ending=".mha"),
    ),
    "tiff": ("stacks of TIFF", lambda folder: folders(folder, ending=".tif", label_ending=".tif")),
}


def _add_in_order() -> None:
    for name, (what, make) in IN_ORDER.items():
        add(
            make,
            name=f"in_order_{name}",
            problem=f"Nothing is wrong: {what}.",
            dataset="dataset",
            severity="",
            kind="",
            words=(),
            mendable=False,
        )


_add_in_order()


# -- no dataset at all -------------------------------------------------------------------------------------------------


@malformed(ERROR, LAYOUT, "imagesTr")
def empty_folder(folder: Path) -> None:
    """The folder of the dataset is empty."""
    (folder / "dataset").mkdir()


@malformed(ERROR, LAYOUT, "imagesTr")
def only_hidden_files(folder: Path) -> None:
    """All files of the dataset begin with a dot."""
    root = nnunet(folder, names=(".case_0", ".case_1")).root
    (root / "dataset.json").unlink()
    (root / "imagesTr").rename(root / ".images")
    (root / "labelsTr").rename(root / ".labels")


@malformed(ERROR, LAYOUT)
def images_folder_empty(folder: Path) -> None:
    """The folders of images and label maps are empty."""
    tree = nnunet(folder)
    for path in (*tree.labels, *(image for (image,) in tree.images)):
        path.unlink()


@malformed(ERROR, LAYOUT, "no such file", dataset="nowhere")
def dataset_missing(folder: Path) -> None:
    """The dataset is not there."""
    nnunet(folder)


@malformed(ERROR, LAYOUT, "notes.txt", dataset="notes.txt")
def dataset_is_a_text(folder: Path) -> None:
    """The dataset is a text file."""
    (folder / "notes.txt").write_text("images are on the other disk\n")


@malformed(ERROR, LAYOUT, dataset="dataset/imagesTr/case_1_0000.nii.gz")
def dataset_is_an_image(folder: Path) -> None:
    """The dataset is an image."""
    nnunet(folder)


@malformed(ERROR, LAYOUT, "imagesTr", dataset="dataset\n/home")
def dataset_named_with_newline(folder: Path) -> None:
    """The name of the dataset's folder has a newline, and the folder is empty."""
    (folder / "dataset\n" / "home").mkdir(parents=True)


@malformed(ERROR, LAYOUT)
def one_level_too_high(folder: Path) -> None:
    """The dataset lies two folders deeper than the one that is named."""
    root = nnunet(folder).root
    root.rename(folder / "inner")
    (folder / "dataset" / "Dataset001").mkdir(parents=True)
    (folder / "inner").rename(folder / "dataset" / "Dataset001" / "raw")

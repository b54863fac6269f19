"""Layouts that folders and file names tell: BraTS, slices by patient, image and mask folders, BIDS."""

from __future__ import annotations

import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tifffile
from PIL import Image

from autoseg.core.errors import DatasetError
from autoseg.core.labels import Region
from autoseg.data.check import discover_labels, scan_dataset
from autoseg.data.dataset import Case, Dataset
from autoseg.data.layouts import open_dataset
from autoseg.data.splits import check_splits, make_splits

GLIOMA = ("flair", "t1", "t1ce", "t2")
GLIOMA_2023 = ("t1c", "t1n", "t2f", "t2w")


def touch(root: Path, *names: str, shape: tuple[int, ...] = (4, 4, 4)) -> None:
    """Small real files of ones and zeros, NIfTI or pictures; of "a.jpg*3" the pixels are colours."""
    for name in names:
        path, _, n_channels = name.partition("*")
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if path.endswith((".nii", ".nii.gz")):
            voxels = np.ones(shape, np.uint8)
            voxels.flat[0] = 0
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), file)
            continue
        pixels = np.zeros((8, 6, 3) if n_channels else (8, 6), np.uint8)
        pixels[2:5, 1:4] = 255
        if path.endswith(".tif"):
            tifffile.imwrite(file, pixels, photometric="rgb" if n_channels else "minisblack")
        else:
            Image.fromarray(pixels).save(file)


def by_id(dataset: Dataset) -> dict[str, Case]:
    assert [case.id for case in dataset.cases] == sorted({case.id for case in dataset.cases})
    return {case.id: case for case in dataset.cases}


def groups(dataset: Dataset) -> dict[str, str]:
    return {case.id: case.group for case in dataset.cases}


def count_channels(dataset: Dataset) -> list[int]:
    """Opens every case as planning does, so that a wrong channel or file would show."""
    labels = dataset.labels or discover_labels(dataset, n_threads=1)
    return scan_dataset(dataset, labels, lambda loaded: loaded.image.shape[0], n_threads=1).measured


def check_folds(dataset: Dataset) -> None:
    """Fails where a group straddles folds, or a case validates in no fold."""
    splits = make_splits(dataset.cases, n_folds=3)
    assert len(splits.folds) == min(3, len({case.group for case in dataset.cases})) > 1
    check_splits(splits, dataset.cases)
    validated = sorted(case for fold in splits.folds for case in fold.validation)
    assert validated == [case.id for case in dataset.cases]


def fail(path: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        open_dataset(path)
    return str(caught.value)


# BraTS


def make_brats(root: Path, case: str, *, without: tuple[str, ...] = (), ending: str = ".nii.gz") -> None:
    joint, channels = ("-", GLIOMA_2023) if "-" in case else ("_", GLIOMA)
    for kind in (*channels, "seg"):
        if kind not in without:
            touch(root, f"{case}/{case}{joint}{kind}{ending}")


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_brats_2020(ending: str, tmp_path: Path) -> None:
    for number in (2, 1, 10):
        make_brats(tmp_path, f"BraTS20_Training_{number:03d}", ending=ending)
    (tmp_path / "name_mapping.csv").write_text("Grade\n")
    dataset = open_dataset(tmp_path)
    assert (dataset.layout, dataset.channels) == ("BraTS, 2017 to 2021", GLIOMA)
    folder = tmp_path / "BraTS20_Training_001"
    assert by_id(dataset)["BraTS20_Training_001"] == Case(
        id="BraTS20_Training_001",
        group="BraTS20_Training_001",
        images=tuple(folder / f"BraTS20_Training_001_{channel}{ending}" for channel in GLIOMA),
        label=folder / f"BraTS20_Training_001_seg{ending}",
    )
    assert dataset.labels is not None
    assert (dataset.labels.names, dataset.labels.values) == (("necrosis", "edema", "enhancing tumour"), (1, 2, 4))
    assert dataset.labels.regions == (
        Region(name="whole tumour", values=(1, 2, 4), written=2),
        Region(name="tumour core", values=(1, 4), written=1),
        Region(name="enhancing tumour", values=(4,), written=4),
    )
    # A voxel that is of no, the first, the first two, or all regions comes back as what it was.
    classes = dataset.labels.class_of_regions()[[0, 0b001, 0b011, 0b111]]
    assert dataset.labels.classes_to_values(classes).tolist() == [0, 2, 1, 4]
    assert count_channels(dataset) == [4, 4, 4]
    check_folds(dataset)


def test_brats_2018_in_folders_of_grades_keeps_patients_together(tmp_path: Path) -> None:
    for case in ("HGG/Brats18_TCIA01_131_1", "HGG/Brats18_TCIA01_131_2", "LGG/Brats18_2013_0_1"):
        folder, name = case.split("/")
        make_brats(tmp_path / folder, name)
    dataset = open_dataset(tmp_path)
    assert groups(dataset) == {
        "Brats18_2013_0_1": "Brats18_2013_0",
        "Brats18_TCIA01_131_1": "Brats18_TCIA01_131",
        "Brats18_TCIA01_131_2": "Brats18_TCIA01_131",
    }
    assert by_id(dataset)["Brats18_2013_0_1"].label == (tmp_path / "LGG/Brats18_2013_0_1/Brats18_2013_0_1_seg.nii.gz")
    check_folds(dataset)


def test_brats_2023_keeps_time_points_together(tmp_path: Path) -> None:
    cases = [f"BraTS-GLI-{patient:05d}-00{time}" for patient in range(4) for time in range(2)]
    for case in cases:
        make_brats(tmp_path, case)
    dataset = open_dataset(tmp_path)
    assert (dataset.layout, dataset.channels) == ("BraTS, 2023 and later", GLIOMA_2023)
    assert groups(dataset) == {case: case[:-4] for case in cases}
    assert dataset.labels is not None
    assert dataset.labels.values == (1, 2, 3)
    assert [(region.values, region.written) for region in dataset.labels.regions] == [
        ((1, 2, 3), 2),
        ((1, 3), 1),
        ((3,), 3),
    ]
    check_folds(dataset)


def test_brats_after_treatment_has_a_resection_cavity(tmp_path: Path) -> None:
    make_brats(tmp_path, "BraTS-GLI-02062-100")
    labels = open_dataset(tmp_path).labels
    assert labels is not None
    assert labels.names == ("necrosis", "edema", "enhancing tumour", "resection cavity")
    assert (labels.values, labels.regions[0].values, labels.regions[3].values) == ((1, 2, 3, 4), (1, 2, 3), (4,))


def test_brats_of_other_tumours_whose_values_differ_has_no_regions(tmp_path: Path) -> None:
    make_brats(tmp_path, "BraTS-PED-00001-000")
    assert open_dataset(tmp_path).labels is None


def test_brats_leaves_out_validation_data_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for number in (1, 2):
        make_brats(tmp_path / "Training", f"BraTS20_Training_{number:03d}")
        make_brats(tmp_path / "Validation", f"BraTS20_Validation_{number:03d}", without=("seg",))
    assert list(by_id(open_dataset(tmp_path))) == ["BraTS20_Training_001", "BraTS20_Training_002"]
    assert f"{tmp_path / 'Validation'}: 2 cases are left out as validation data" in caplog.text


def test_brats_without_a_label_map_in_one_case(tmp_path: Path) -> None:
    for number in (1, 355, 356):
        make_brats(tmp_path, f"BraTS20_Training_{number:03d}", without=("seg",) if number > 1 else ())
    touch(tmp_path, "BraTS20_Training_355/W39_1998.09.19_Segm.nii")
    message = fail(tmp_path)
    assert "case without label map (2)" in message
    assert "found W39_1998.09.19_Segm.nii, expected BraTS20_Training_355_seg.nii.gz" in message
    assert "BraTS20_Training_356: expected BraTS20_Training_356_seg.nii.gz" in message


def test_brats_without_any_label_map(tmp_path: Path) -> None:
    make_brats(tmp_path, "BraTS-GLI-00001-000", without=("seg",))
    assert "found 1 BraTS cases without a label map, expected BraTS-GLI-00001-000-seg.nii.gz" in fail(tmp_path)


def test_brats_that_lacks_channels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_brats(tmp_path, "BraTS20_Training_001", without=("t1",))
    make_brats(tmp_path, "BraTS20_Training_002", without=("t1", "t2"))
    make_brats(tmp_path, "BraTS20_Training_003")
    dataset = open_dataset(tmp_path)
    assert dataset.channels == ("flair", "t1ce", "t2"), "one of three cases has t1"
    assert [file and file.name for file in by_id(dataset)["BraTS20_Training_002"].images] == [
        "BraTS20_Training_002_flair.nii.gz",
        "BraTS20_Training_002_t1ce.nii.gz",
        None,
    ]
    assert "only 1 of 3 cases have t1, which is left out" in caplog.text
    assert "t2 is missing in 1 cases: BraTS20_Training_002" in caplog.text
    assert count_channels(dataset) == [3, 3, 3]


def test_brats_with_a_case_that_has_no_image(tmp_path: Path) -> None:
    for number in (1, 2):
        make_brats(tmp_path, f"BraTS20_Training_{number:03d}")
    make_brats(tmp_path, "BraTS20_Training_003", without=GLIOMA)
    message = fail(tmp_path)
    assert "case without image (1)" in message
    assert "expected BraTS20_Training_003_flair.nii.gz or BraTS20_Training_003_t1.nii.gz" in message


def test_brats_of_two_generations(tmp_path: Path) -> None:
    make_brats(tmp_path, "BraTS2021_00001")
    make_brats(tmp_path, "BraTS-GLI-00001-000")
    message = fail(tmp_path)
    assert "BraTS2021_00001 of 2017 to 2021" in message
    assert "BraTS-GLI-00001-000 of 2023 and later" in message


# A folder of slices for each patient


@pytest.mark.parametrize("below", ["", "kaggle_3m/"])
def test_slices_by_patient(below: str, tmp_path: Path) -> None:
    patients = ("TCGA_CS_4941_19960909", "TCGA_DU_5855_19951217", "TCGA_HT_7473_19970826")
    for patient in patients:
        for number in (1, 2, 10):
            touch(
                tmp_path, f"{below}{patient}/{patient}_{number}.tif*3", f"{below}{patient}/{patient}_{number}_mask.tif"
            )
    (tmp_path / below / "data.csv").write_text("Patient\n")
    dataset = open_dataset(tmp_path)
    assert dataset.layout == "a folder of slices for each patient"
    assert (dataset.channels, dataset.labels) == (("red", "green", "blue"), None)
    folder = tmp_path / below / patients[0]
    assert by_id(dataset)[f"{patients[0]}_10"] == Case(
        id=f"{patients[0]}_10",
        group=patients[0],
        images=(folder / f"{patients[0]}_10.tif",),
        label=folder / f"{patients[0]}_10_mask.tif",
    )
    assert count_channels(dataset) == [3] * 9
    assert discover_labels(dataset, n_threads=1).values == (255,)
    check_folds(dataset)


def test_grey_slices_by_patient(tmp_path: Path) -> None:
    touch(tmp_path, "p/p_1.png", "p/p_1_mask.png")
    assert open_dataset(tmp_path).channels == ("image",)


def test_slices_by_patient_that_do_not_match(tmp_path: Path) -> None:
    touch(tmp_path, "p/p_1.tif", "p/p_1_mask.tif", "p/p_2.tif", "q/q_1.tif", "q/q_2_mask.tif")
    message = fail(tmp_path)
    assert f"image without label map (2)\n  - p_2: {tmp_path / 'p/p_2.tif'}\n  - q_1: " in message
    assert f"label map without image (1)\n  - q_2: {tmp_path / 'q/q_2_mask.tif'}" in message


def test_one_slice_in_two_folders(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{part}/p/p_1{mark}.tif" for part in ("a", "b") for mark in ("", "_mask")))
    message = fail(tmp_path)
    assert "two files of one case (1)" in message
    assert str(tmp_path / "b/p/p_1.tif") in message


# Folders of images and of masks


@pytest.mark.parametrize("below", ["", "data/", "train/"])
@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("images", "masks"),
        ("imgs", "masks"),
        ("image", "mask"),
        ("images", "labels"),
        ("train", "train_masks"),
        ("train_images", "train_masks"),
        ("imagesTr", "labelsTr"),
    ],
)
def test_image_and_mask_folders(below: str, images: str, masks: str, tmp_path: Path) -> None:
    touch(tmp_path, *(f"{below}{images}/{case}.png" for case in "ab"), *(f"{below}{masks}/{case}.png" for case in "ab"))
    dataset = open_dataset(tmp_path)
    assert (dataset.layout, dataset.channels, dataset.labels) == ("a pair of folders", ("image",), None)
    assert by_id(dataset)["b"] == Case(
        id="b",
        group="b",
        images=(tmp_path / below / images / "b.png",),
        label=tmp_path / below / masks / "b.png",
    )
    assert count_channels(dataset) == [1, 1]


@pytest.mark.parametrize("name", ["{}", "{}_0000"])
def test_pictures_in_colours_may_have_the_digits_of_a_channel(name: str, tmp_path: Path) -> None:
    touch(tmp_path, *(f"images/{name.format(case)}.png*3" for case in "ab"), *(f"masks/{case}.png" for case in "ab"))
    dataset = open_dataset(tmp_path)
    assert dataset.channels == ("red", "green", "blue")
    assert count_channels(dataset) == [3, 3]


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("scan_{}", "scan_{}_mask"),
        ("scan_{}", "scan_{}-mask"),
        ("scan_{}", "scan_{}_seg"),
        ("scan_{}", "scan_{}_label"),
        ("scan_{}", "scan_{}_Segmentation"),
        ("scan_{}", "mask_scan_{}"),
        ("image_{}", "mask_{}"),
        ("img-{}", "label-{}"),
        ("{}_image", "{}_mask"),
    ],
)
def test_masks_with_a_mark_in_their_name(image: str, mask: str, tmp_path: Path) -> None:
    """Four digits are no channel where every mask has them too."""
    numbers = ("0000", "0001", "0012")
    touch(tmp_path, *(f"images/{image.format(number)}.jpg*3" for number in numbers))
    touch(tmp_path, *(f"masks/{mask.format(number)}.png" for number in numbers))
    dataset = open_dataset(tmp_path)
    assert dataset.channels == ("red", "green", "blue")
    assert {case.id: case.label and case.label.name for case in dataset.cases} == {
        image.format(number): f"{mask.format(number)}.png" for number in numbers
    }


def test_carvana_keeps_the_photographs_of_a_car_together(tmp_path: Path) -> None:
    cars = ("00087a6bd4dc", "02159e548029", "fff9b3a5373f")
    names = [f"{car}_{number:02d}" for car in cars for number in (1, 2, 16)]
    touch(tmp_path, *(f"train/{name}.jpg*3" for name in names), *(f"train_masks/{name}_mask.gif" for name in names))
    dataset = open_dataset(tmp_path)
    assert groups(dataset) == {name: name[:12] for name in names}
    assert count_channels(dataset) == [3] * 9
    assert discover_labels(dataset, n_threads=1).values == (255,)
    check_folds(dataset)


@pytest.mark.parametrize(
    ("names", "patients"),
    [
        (
            ("patient001_frame01", "patient001_frame12", "patient002_frame01", "patient002_frame07"),
            ("patient001", "patient001", "patient002", "patient002"),
        ),
        (("A0S9V9_ED", "A0S9V9_ES", "B3_ED", "B3_ES"), ("A0S9V9", "A0S9V9", "B3", "B3")),
        # One of them has another name, and every patient was seen once.
        (("patient001_frame01", "patient001_frame12", "other"), None),
        (("patient001_frame01", "patient002_frame12"), None),
    ],
)
def test_moments_of_one_heart_stay_together(
    names: tuple[str, ...], patients: tuple[str, ...] | None, tmp_path: Path
) -> None:
    touch(tmp_path, *(f"{folder}/{name}.png" for folder in ("images", "masks") for name in names))
    assert groups(open_dataset(tmp_path)) == dict(zip(sorted(names), patients or sorted(names), strict=True))


def test_numbers_that_are_no_car_are_cases_of_their_own(tmp_path: Path) -> None:
    names = ("00087a6bd4dc_17", "scan_01", "scan_02")
    touch(tmp_path, *(f"{folder}/{name}.png" for folder in ("images", "masks") for name in names))
    assert groups(open_dataset(tmp_path)) == {name: name for name in names}


def test_image_and_mask_folders_that_do_not_match(tmp_path: Path) -> None:
    touch(tmp_path, *(f"imgs/{name}.jpg" for name in "abc"), *(f"masks/{name}_mask.gif" for name in "abd"))
    message = fail(tmp_path)
    assert f"image without label map (1)\n  - c: {tmp_path / 'imgs/c.jpg'}" in message
    assert f"label map without image (1)\n  - d: {tmp_path / 'masks/d_mask.gif'}" in message


def test_two_masks_of_one_image(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.png", "masks/a.png", "masks/a_mask.png")
    assert "label map without image (1)\n  - a_mask" in fail(tmp_path)


def test_images_without_mask_folder(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.png", "mask_files/a.png")
    message = fail(tmp_path)
    assert "Found: images, mask_files" in message
    assert "a pair of folders: images/ and labels/ or masks/" in message


def test_channels_of_nifti_are_not_guessed_from_the_fourth_axis(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.nii.gz", shape=(4, 4, 4, 3))
    touch(tmp_path, "masks/a.nii.gz")
    assert open_dataset(tmp_path).channels == ("image",)


def test_a_training_folder_beside_others_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    touch(tmp_path, *(f"{part}/{folder}/a.png" for part in ("train", "valid") for folder in ("images", "masks")))
    assert by_id(open_dataset(tmp_path))["a"].images == (tmp_path / "train/images/a.png",)
    assert f"{tmp_path / 'train'} is read; beside it are valid" in caplog.text


# BIDS


def make_bids(
    root: Path,
    *,
    sessions: tuple[str, ...] = ("sub-01", "sub-02", "sub-03"),
    images: tuple[str, ...] = ("T1w",),
    labels: tuple[str, ...] = ("T1w_seg",),
    derivative: str = "labels",
) -> Path:
    for session in sessions:
        folder = f"{session.replace('_', '/')}/anat"
        touch(root, *(f"{folder}/{session}_{image}.nii.gz" for image in images))
        touch(root, *(f"derivatives/{derivative}/{folder}/{session}_{label}.nii.gz" for label in labels))
    return root


@pytest.mark.parametrize("derivative", ["labels", "manual_masks", "lesions", "segmentation"])
def test_bids_with_sessions_keeps_subjects_together(derivative: str, tmp_path: Path) -> None:
    sessions = tuple(f"sub-{subject}_ses-{session}" for subject in ("a1", "b2", "c3") for session in ("01", "02"))
    make_bids(tmp_path, sessions=sessions, derivative=derivative)
    (tmp_path / "dataset_description.json").write_text('{"Name": "Lesions", "BIDSVersion": "1.8.0"}')
    touch(tmp_path, "derivatives/skullstripped/sub-a1/ses-01/anat/sub-a1_ses-01_T1w_brain.nii.gz")
    dataset = open_dataset(tmp_path)
    assert (dataset.name, dataset.layout, dataset.channels) == ("Lesions", "BIDS", ("T1w",))
    assert dataset.labels is None
    assert groups(dataset) == {session: session[:6] for session in sessions}
    assert by_id(dataset)["sub-b2_ses-02"] == Case(
        id="sub-b2_ses-02",
        group="sub-b2",
        images=(tmp_path / "sub-b2/ses-02/anat/sub-b2_ses-02_T1w.nii.gz",),
        label=tmp_path / f"derivatives/{derivative}/sub-b2/ses-02/anat/sub-b2_ses-02_T1w_seg.nii.gz",
    )
    assert count_channels(dataset) == [1] * 6
    check_folds(dataset)


@pytest.mark.parametrize(
    "label",
    [
        "T1w_seg",
        "T1w_dseg",
        "T1w_label-lesion_mask",
        "T1w_desc-manual_mask",
        "T1w_lesion-manual",
        "T1w_seg-manual",
        "label-lesion_mask",
        "dseg",
    ],
)
def test_bids_names_of_label_maps(label: str, tmp_path: Path) -> None:
    dataset = open_dataset(make_bids(tmp_path, labels=(label,)))
    assert [case.label and case.label.name for case in dataset.cases] == [
        f"sub-0{subject}_{label}.nii.gz" for subject in (1, 2, 3)
    ]
    assert (dataset.name, dataset.cases[0].masks) == (tmp_path.name, {})
    check_folds(dataset)


@pytest.mark.parametrize(
    ("labels", "structures"),
    [
        (("T2w_lesion-manual", "T2w_seg-manual"), ["lesion", "seg"]),
        (("T2w_label-SC_seg", "T2w_label-lesion_seg"), ["SC", "lesion"]),
        (("T2w_label-core_mask", "T2w_label-edema_mask", "T2w_softseg"), ["core", "edema"]),
        (("T2w_seg-manual", "T2w_gmseg-manual", "T2w_labels-disc-manual"), ["gmseg", "seg"]),
    ],
)
def test_bids_with_a_mask_for_each_structure(labels: tuple[str, ...], structures: list[str], tmp_path: Path) -> None:
    make_bids(tmp_path, images=("T2w",), labels=labels)
    dataset = open_dataset(tmp_path)
    case = by_id(dataset)["sub-02"]
    assert (list(case.masks), case.label, dataset.labels) == (structures, None, None)
    assert discover_labels(dataset, n_threads=1).structures == tuple(structures)
    assert count_channels(dataset) == [1, 1, 1]


def test_bids_session_that_lacks_a_mask(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    make_bids(tmp_path, labels=("T1w_seg-manual", "T1w_lesion-manual"))
    (tmp_path / "derivatives/labels/sub-02/anat/sub-02_T1w_lesion-manual.nii.gz").unlink()
    case = by_id(open_dataset(tmp_path))["sub-02"]
    assert list(case.masks) == ["seg"]
    assert not case.knows("lesion")
    assert "1 sessions have no mask of lesion: sub-02" in caplog.text


def test_bids_channels_are_what_all_labelled_sessions_have(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    make_bids(tmp_path, images=("T1w", "T2w", "acq-axial_T2w"))
    touch(tmp_path, "sub-01/anat/sub-01_FLAIR.nii.gz", "sub-09/anat/sub-09_T1w.nii.gz")
    touch(tmp_path, "sub-02/anat/sub-02_defacemask.nii.gz")
    dataset = open_dataset(tmp_path)
    assert dataset.channels == ("T1w", "T2w", "acq-axial_T2w")
    assert list(by_id(dataset)) == ["sub-01", "sub-02", "sub-03"]
    assert [file and file.name for file in dataset.cases[2].images] == [
        "sub-03_T1w.nii.gz",
        "sub-03_T2w.nii.gz",
        "sub-03_acq-axial_T2w.nii.gz",
    ]
    assert "1 sessions without label map are left out: sub-09" in caplog.text
    assert "not in all 3 sessions with label maps, and left out: FLAIR (1)" in caplog.text
    assert count_channels(dataset) == [3, 3, 3]


@pytest.mark.parametrize("label", ["T2w_seg", "label-lesion_mask"])
def test_bids_images_on_other_grids_are_left_out(label: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    make_bids(tmp_path, images=("T2w",), labels=(label,))
    for subject in ("sub-01", "sub-02", "sub-03"):
        touch(tmp_path, f"{subject}/anat/{subject}_T1w.nii.gz", shape=(5, 4, 4))
    dataset = open_dataset(tmp_path)
    assert dataset.channels == ("T2w",)
    assert "the channels are T2w alone, because in sub-01 these lie on another grid: T1w" in caplog.text
    assert count_channels(dataset) == [1, 1, 1]


def test_bids_without_label_maps(tmp_path: Path) -> None:
    make_bids(tmp_path, labels=())
    message = fail(tmp_path)
    assert "found BIDS images without label maps, in derivatives nothing, expected for instance" in message
    assert "derivatives/labels/sub-01/anat/sub-01_T1w_dseg.nii.gz" in message
    touch(tmp_path, "derivatives/labels/sub-01/anat/sub-01_PDw_seg.nii.gz")
    assert "in derivatives sub-01_PDw_seg.nii.gz, expected" in fail(tmp_path)


def test_bids_with_label_maps_in_several_derivatives(tmp_path: Path) -> None:
    make_bids(tmp_path, derivative="rater1")
    make_bids(tmp_path, derivative="rater2")
    message = fail(tmp_path)
    assert "found label maps in 2 folders (rater1 has sub-01_T1w_seg.nii.gz; rater2 has" in message
    assert "expected one" in message


def test_bids_label_maps_that_do_not_fit(tmp_path: Path) -> None:
    make_bids(tmp_path, labels=("T1w_label-lesion_mask",))
    touch(tmp_path, "derivatives/labels/sub-04/anat/sub-04_T1w_label-lesion_mask.nii.gz")
    touch(tmp_path, "derivatives/labels/sub-02/anat/sub-02_T1w_desc-second_label-lesion_mask.nii.gz")
    message = fail(tmp_path)
    assert "label map without image (1)\n  - sub-04: " in message
    assert "expected the image sub-04_T1w in sub-04" in message
    assert "two label maps of one structure (1)\n  - sub-02: " in message


def test_bids_with_label_maps_and_masks_beside_them(tmp_path: Path) -> None:
    make_bids(tmp_path, labels=("T1w_dseg", "T1w_label-lesion_mask"))
    assert "found label maps and masks beside them: dseg (3), lesion (3), expected one of the two" in fail(tmp_path)


def test_bids_with_label_maps_of_two_images(tmp_path: Path) -> None:
    make_bids(tmp_path, images=("T1w", "T2w"), labels=("T1w_seg", "T2w_seg"))
    assert "found label maps of different images: T1w (3), T2w (3), expected of the same" in fail(tmp_path)


def test_bids_sessions_without_a_common_image(tmp_path: Path) -> None:
    make_bids(tmp_path, sessions=("sub-01",), images=("T1w",), labels=("dseg",))
    make_bids(tmp_path, sessions=("sub-02",), images=("T2w",), labels=("dseg",))
    assert "found no image that all 2 sessions with label maps have: T1w (1), T2w (1)" in fail(tmp_path)


def test_bids_without_images(tmp_path: Path) -> None:
    touch(tmp_path, "sub-01/sub-01_T1w.nii.gz")
    message = fail(tmp_path)
    assert "found 1 folders sub-* without an image, expected sub-01/anat/sub-01_T1w.nii.gz" in message


# Links to files that were never fetched, as in clones of published datasets


def test_broken_links_are_all_listed(tmp_path: Path) -> None:
    make_bids(tmp_path / "bids", images=("T1w", "T2w"))
    touch(tmp_path / "folders", *(f"{folder}/{name}.png" for folder in ("images", "masks") for name in "ab"))
    for dataset, first in (("bids", "sub-01/anat/sub-01_T1w.nii.gz"), ("folders", "images/a.png")):
        link = tmp_path / dataset / first
        link.unlink()
        link.symlink_to("not/fetched")
        message = fail(tmp_path / dataset)
        assert "missing file (1)" in message
        assert str(link) in message


# Order


def test_no_layout_takes_what_is_of_another(tmp_path: Path) -> None:
    make_brats(tmp_path / "brats", "BraTS20_Training_001")
    touch(tmp_path / "slices", "sub-1/sub-1_1.tif", "sub-1/sub-1_1_mask.tif")
    touch(tmp_path / "folders", "data/images/images_1.png", "data/masks/images_1_mask.png")
    make_bids(tmp_path / "bids")
    assert [open_dataset(tmp_path / name).layout for name in ("brats", "slices", "folders", "bids")] == [
        "BraTS, 2017 to 2021",
        "a folder of slices for each patient",
        "a pair of folders",
        "BIDS",
    ]

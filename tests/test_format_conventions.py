"""Images and datasets as they come, from the files to the scores, through the command line.

What there is to find is easy, and so made that a wrong handling of the files cannot find it: each test says which.
"""

from __future__ import annotations

import json
import locale
import logging
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from autoseg.cli import app
from autoseg.core.errors import PredictionError
from autoseg.core.geometry import grid_difference
from autoseg.data.io import read_geometry
from autoseg.pipeline.inputs import find_images

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (8, 20, 20)  # (z, y, x)
N_TRAIN, N_TEST = 6, 3
GLIOMA = ("flair", "t1", "t1ce", "t2")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def fit(dataset: Path, work: Path, *, steps: int, configuration: str = "3d_fullres") -> None:
    """Plans, and trains one fold without augmentation."""
    run("plan", dataset, "-w", work, "--configurations", configuration)
    train = ["--iterations", steps, "--augment", "none", "--no-mirror", "--device", "cpu", "--batch-size", 2]
    run("train", "--fold", 0, "-w", work, "-c", configuration, *train)


def predict(images: Path, out: Path, work: Path) -> dict[str, Path]:
    """The label maps, by case."""
    run("predict", images, out, "-w", work, "--device", "cpu")
    cases = json.loads((out / "prediction.json").read_text())["cases"]
    return {case: out / known["label_map"] for case, known in cases.items()}


def check_report(out: Path) -> None:
    """Every case must have its picture; what could not be drawn is told in words."""
    run("report", "--predictions", out)
    page = (out / "autoseg_report.html").read_text()
    assert list((out / "autoseg_report").glob("*.*")), "no picture"
    assert "could not be" not in page
    assert "is not there any more" not in page


def dice(a: NDArray, b: NDArray) -> float:
    return float(2 * (a & b).sum() / max(1, a.sum() + b.sum()))


def draw_ball(rng: np.random.Generator, radius: float = 5.0, *, low: float = 6, high: float = 13) -> NDArray[np.bool_]:
    """Flattened, as slices are further apart than voxels in a slice."""
    z, y, x = np.indices(SHAPE)
    cy, cx = rng.uniform(low, high, 2)
    return (2 * (z - SHAPE[0] / 2)) ** 2 + (y - cy) ** 2 + (x - cx) ** 2 <= radius**2


def draw_disc(rng: np.random.Generator, shape: tuple[int, int], x: tuple[float, float], radius: float) -> NDArray:
    rows, columns = np.indices(shape)
    cy, cx = rng.uniform(radius + 1, shape[0] - radius - 2), rng.uniform(*x)
    return (rows - cy) ** 2 + (columns - cx) ** 2 <= radius**2


def save_nifti(path: Path, volume: NDArray, affine: NDArray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume.transpose(2, 1, 0), np.diag([1.0, 1, 2, 1]) if affine is None else affine), path)
    return path


def load_nifti(path: Path) -> NDArray:
    return np.asarray(nib.load(path).dataobj).transpose(2, 1, 0)


def save_pixels(path: Path, pixels: NDArray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)  # type: ignore[arg-type]
    return path


def load_pixels(path: Path) -> NDArray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def straddling_groups(work: Path) -> set[str]:
    """Groups with cases on both sides of a fold."""
    group_of = {case["id"]: case["group"] for case in json.loads((work / "dataset.json").read_text())["cases"]}
    folds = json.loads((work / "splits.json").read_text())["folds"]
    assert len(folds) > 1
    found: set[str] = set()
    for fold in folds:
        training, validation = ({group_of[case] for case in fold[side]} for side in ("training", "validation"))
        found |= training & validation
    return found


# -- NRRD and MetaImage ------------------------------------------------------------------------------------------------


def make_oblique(volume: NDArray) -> sitk.Image:
    """Rotated about two axes, with voxels of three lengths."""
    a, b = np.deg2rad([15, 10])
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing((0.9, 1.1, 2.3))
    image.SetOrigin((-31.7, 12.3, 701.9))
    image.SetDirection((about_z @ about_x).ravel().tolist())
    return image


def draw_half(rng: np.random.Generator) -> tuple[sitk.Image, sitk.Image]:
    """A ball, of which only the half on the patient's left is the structure."""
    ball = draw_ball(rng)
    x = np.indices(SHAPE)[2]
    image = (100 * ball + 10 * rng.standard_normal(SHAPE)).astype(np.float32)
    return make_oblique(image), make_oblique((ball & (x >= x[ball].mean())).astype(np.uint8))


def test_nrrd_and_metaimage_come_back_on_the_same_grid(tmp_path: Path) -> None:
    """The images to segment have their axes in other orders and directions: not heeded, it would be the other half."""
    rng = np.random.default_rng(0)
    rows = ["image,label,case"]
    for index in range(N_TRAIN):
        names = [f"c{index}{kind}{('.nrrd', '.mha')[index % 2]}" for kind in ("", "_label")]
        for name, image in zip(names, draw_half(rng), strict=True):
            sitk.WriteImage(image, tmp_path / name, useCompression=True)
        rows.append(f"{names[0]},{names[1]},c{index}")
    (tmp_path / "cases.csv").write_text("\n".join(rows))
    fit(tmp_path / "cases.csv", tmp_path / "work", steps=60)
    fingerprint = json.loads((tmp_path / "work" / "fingerprint.json").read_text())
    assert fingerprint["cases"][0]["spacing_mm"] == pytest.approx([2.3, 1.1, 0.9])

    for folder in ("in", "wanted"):
        (tmp_path / folder).mkdir()
    endings = {"a": ".nrrd", "b": ".mha", "c": ".mhd", "d": ".nrrd"}
    written = {**endings, "c": ".mha"}
    for (case, ending), axes in zip(endings.items(), ("LPS", "RAI", "PSR", "SAL"), strict=True):
        image, label = (sitk.DICOMOrient(one, axes) for one in draw_half(rng))
        sitk.WriteImage(image, tmp_path / "in" / f"{case}{ending}")
        sitk.WriteImage(label, tmp_path / "wanted" / f"{case}{ending}")
    found = predict(tmp_path / "in", tmp_path / "out", tmp_path / "work")
    assert {case: file.name for case, file in found.items()} == {case: f"{case}{written[case]}" for case in endings}
    for case, file in found.items():
        image, label = sitk.ReadImage(tmp_path / "in" / f"{case}{endings[case]}"), sitk.ReadImage(file)
        for one in ("GetSize", "GetOrigin", "GetSpacing", "GetDirection"):
            assert getattr(label, one)() == getattr(image, one)(), (case, one)
        reference = sitk.ReadImage(tmp_path / "wanted" / f"{case}{endings[case]}")
        assert dice(*(sitk.GetArrayFromImage(one) == 1 for one in (label, reference))) > 0.8, case
    run("evaluate", tmp_path / "out", tmp_path / "wanted")
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["mean_dice"] > 0.8
    check_report(tmp_path / "out")


# -- DICOM -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def same_locale() -> Iterator[None]:
    """GDCM leaves the process in the locale "C" when it writes, which only tests do."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


CT_SPACING, CT_ORIGIN = (0.8, 1.2, 2.5), (-20.0, 11.0, 300.0)
CT_AFFINE = np.diag([-1, -1, 1, 1]) @ np.block(
    [[np.diag(CT_SPACING), np.array(CT_ORIGIN)[:, None]], [np.zeros((1, 3)), np.ones((1, 1))]]
)


def draw_ct(rng: np.random.Generator) -> tuple[NDArray, NDArray]:
    """A ball of 200 HU (the structure) and one of 600 HU in soft tissue; all values are multiples of 4."""
    ball, bone = draw_ball(rng, 4.5, high=8), draw_ball(rng, 4.5, low=12, high=14)
    units = 40 + 160 * ball + 560 * (bone & ~ball) + 10 * rng.standard_normal(SHAPE)
    return (4 * np.rint(units / 4)).astype(np.int16), (ball).astype(np.uint8)


def save_series(folder: Path, voxels: NDArray, *, series: str = "1.2.3.4", first: int = 0) -> Path:
    """Stored with a slope of 4; the names of the files are in another order than the slices."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number, pixels in enumerate(voxels):
        image = sitk.GetImageFromArray(pixels)
        image.SetSpacing(CT_SPACING[:2])
        place = (*CT_ORIGIN[:2], CT_ORIGIN[2] + number * CT_SPACING[2])
        tags = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{series}.{number + 1}",
            "0008|0060": "CT",
            "0008|103e": f"axial {series}",
            "0020|000d": "1.2.3",
            "0020|000e": series,
            "0020|0032": "\\".join(map(str, place)),
            "0020|0037": r"1\0\0\0\1\0",
            "0028|1052": "-1024",
            "0028|1053": "4",
        }
        for key, value in tags.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{first + (7 * number) % len(voxels)}.dcm"))
        writer.Execute(image)
    return folder


def test_dicom_series_are_segmented_as_the_same_images_in_nifti(same_locale: None, tmp_path: Path) -> None:
    """Without slope and intercept all would be beyond the CT scheme's range, or of other intensities."""
    rng = np.random.default_rng(0)
    manifests: dict[str, list[dict[str, str]]] = {"nifti": [], "dicom": []}
    for index in range(N_TRAIN):
        image, label = draw_ct(rng)
        name = f"c{index}"
        label_file = save_nifti(tmp_path / "label" / f"{name}.nii.gz", label, CT_AFFINE)
        files = {
            "nifti": save_nifti(tmp_path / "nifti" / f"{name}.nii.gz", image, CT_AFFINE),
            "dicom": save_series(tmp_path / "dicom" / name, image),
        }
        for kind, file in files.items():
            manifests[kind].append({"id": name, "image": str(file), "label": str(label_file)})
    for kind, cases in manifests.items():
        content = {"channels": ["CT"], "labels": {"lesion": 1}, "cases": cases}
        (tmp_path / f"{kind}.json").write_text(json.dumps(content))
    fit(tmp_path / "nifti.json", tmp_path / "work", steps=60)
    fit(tmp_path / "dicom.json", tmp_path / "work_dicom", steps=1)
    for listed in manifests["dicom"]:
        stored = [work / "preprocessed" / "3d_fullres" / listed["id"] for work in tmp_path.glob("work*")]
        np.testing.assert_array_equal(*(np.load(folder / "image.npy") for folder in stored))
        np.testing.assert_array_equal(*(np.load(folder / "label.npy") for folder in stored))

    wanted = {}
    for index in range(N_TEST):
        image, wanted[f"t{index}"] = draw_ct(rng)
        save_nifti(tmp_path / "in" / f"t{index}.nii.gz", image, CT_AFFINE)
        save_series(tmp_path / "series" / f"t{index}", image)
    expected = predict(tmp_path / "in", tmp_path / "out", tmp_path / "work")
    mixed = save_series(tmp_path / "series" / "mixed", image)
    save_series(mixed, image, series="1.2.3.5", first=100)
    next(
        file
        for file in save_series(tmp_path / "series" / "incomplete", image).iterdir()
        if sitk.ReadImage(file).GetOrigin()[2] == CT_ORIGIN[2] + 3 * CT_SPACING[2]
    ).unlink()
    arguments = [str(tmp_path / "series"), str(tmp_path / "found"), "-w", str(tmp_path / "work"), "--device", "cpu"]
    result = CliRunner().invoke(app, ["predict", *arguments])
    assert isinstance(result.exception, PredictionError)
    message = str(result.exception)
    assert "2 of 5 images could not be segmented; the others are done" in message
    assert "found 2 series, expected 1" in message
    assert "uneven gaps between slices" in message
    run("predict", tmp_path / "series" / "t0", tmp_path / "alone", "-w", tmp_path / "work", "--device", "cpu")
    manifest = json.loads((tmp_path / "found" / "prediction.json").read_text())
    assert manifest["cases"]["mixed"]["status"] == "failed"
    for case, file in expected.items():
        assert dice(load_nifti(file) == 1, wanted[case] == 1) > 0.8
        for folder in ("found", "alone") if case == "t0" else ("found",):
            np.testing.assert_array_equal(load_nifti(tmp_path / folder / f"{case}.nii.gz"), load_nifti(file))
            assert grid_difference(read_geometry(tmp_path / folder / f"{case}.nii.gz"), read_geometry(file)) is None
    assert [file.name for file in (tmp_path / "alone").glob("*.nii.gz")] == ["t0.nii.gz"]
    check_report(tmp_path / "alone")


# -- TIFF stacks -------------------------------------------------------------------------------------------------------

TIFF_SPACING = (2.0, 0.5, 0.5)


def save_stack(path: Path, volume: NDArray, how: str) -> Path:
    """A stack of pages of 2 x 0.5 x 0.5 mm, which ImageJ, OME, a file beside it, or nothing tells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    z, y, x = TIFF_SPACING
    if how == "imagej":
        metadata = {"spacing": z, "unit": "mm", "axes": "ZYX"}
        tifffile.imwrite(path, volume, imagej=True, resolution=(1 / x, 1 / y), metadata=metadata)
    elif how == "ome":
        lengths = {f"PhysicalSize{axis}": 1000 * length for axis, length in zip("ZYX", TIFF_SPACING, strict=True)}
        units = {f"PhysicalSize{axis}Unit": "µm" for axis in "ZYX"}
        tifffile.imwrite(path, volume, ome=True, metadata={"axes": "ZYX", **lengths, **units})
    else:
        tifffile.imwrite(path, volume, photometric="minisblack")
    if how == "json":
        name = path.name.partition(".")[0].removesuffix("_0000")
        path.with_name(f"{name}.json").write_text(json.dumps({"spacing": TIFF_SPACING}))
    return path


def test_tiff_stacks_keep_their_spacing(tmp_path: Path) -> None:
    """A stack of 1 x 1 x 1 mm would have volumes that are twice as large. Masks without spacing are as their image."""
    rng = np.random.default_rng(0)

    def draw() -> tuple[NDArray, NDArray]:
        ball = draw_ball(rng)
        return (1000 + 800 * ball + 100 * rng.standard_normal(SHAPE)).astype(np.uint16), ball.astype(np.uint8)

    ways, label_ways = ("imagej", "ome", "json"), ("nothing", "json", "imagej")
    for index in range(N_TRAIN):
        image, label = draw()
        save_stack(tmp_path / "data" / "imagesTr" / f"c{index}_0000.tif", image, ways[index % 3])
        save_stack(tmp_path / "data" / "labelsTr" / f"c{index}.tif", label, label_ways[index % 3])
    content = {"channel_names": {"0": "light"}, "labels": {"background": 0, "cell": 1}, "file_ending": ".tif"}
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(content))
    fit(tmp_path / "data", tmp_path / "work", steps=60)
    fingerprint = json.loads((tmp_path / "work" / "fingerprint.json").read_text())
    assert [case["spacing_mm"] for case in fingerprint["cases"]] == [list(TIFF_SPACING)] * N_TRAIN

    wanted = {}
    for index, how in enumerate(ways):
        image, wanted[f"t{index}"] = draw()
        save_stack(tmp_path / "in" / f"t{index}.tif", image, how)
        save_stack(tmp_path / "wanted" / f"t{index}.tif", wanted[f"t{index}"], label_ways[index])
    found = predict(tmp_path / "in", tmp_path / "out", tmp_path / "work")
    volumes = json.loads((tmp_path / "out" / "prediction.json").read_text())["cases"]
    assert len(found) == len(ways)
    for case, file in found.items():
        assert file.name == f"{case}.tif"
        assert read_geometry(file).spacing_mm == TIFF_SPACING
        label = tifffile.imread(file)
        assert dice(label == 1, wanted[case] == 1) > 0.8
        assert volumes[case]["volumes_ml"]["cell"] == pytest.approx(label.sum() * 0.5e-3, abs=1e-3)
    run("evaluate", tmp_path / "out", tmp_path / "wanted")
    scores = json.loads((tmp_path / "out" / "evaluation.json").read_text())["cases"]
    for case in scores:
        expected = wanted[case["case"]].sum() * 0.5e-3
        assert case["labels"][0]["reference_ml"] == pytest.approx(expected), "also where the reference has no spacing"
    check_report(tmp_path / "out")


def test_a_spacing_that_is_added_later_is_seen_when_planning_again(tmp_path: Path) -> None:
    """Were only the TIFF files looked at, nothing would seem to have changed."""
    rng = np.random.default_rng(0)
    for index in range(2):
        ball = draw_ball(rng)
        for folder, volume in (("images", 1000 * ball + rng.integers(0, 99, SHAPE)), ("labels", ball)):
            path = tmp_path / "data" / folder / f"c{index}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(path, volume.astype(np.uint16), photometric="minisblack")
    for spacing in ([1.0, 1.0, 1.0], [3.0, 0.5, 0.5]):
        if spacing != [1.0, 1.0, 1.0]:
            for file in (tmp_path / "data").rglob("*.tif"):
                file.with_suffix(".json").write_text(json.dumps({"spacing": spacing}))
        run("plan", tmp_path / "data", "-w", tmp_path / "work", "--no-preprocess")
        fingerprint = json.loads((tmp_path / "work" / "fingerprint.json").read_text())
        assert [case["spacing_mm"] for case in fingerprint["cases"]] == [spacing] * 2


# -- pictures ----------------------------------------------------------------------------------------------------------

PICTURE = (40, 48)


def draw_coloured(rng: np.random.Generator) -> tuple[NDArray, NDArray]:
    """A disc of one colour (the structure, 255) and one of another, which are equally bright."""
    places = [(9.0, 15.0), (32.0, 38.0)]
    first, second = (draw_disc(rng, PICTURE, places[side], 7) for side in rng.permutation(2))
    pixels = np.full((*PICTURE, 3), 90.0)
    pixels[first] = 190, 60, 60
    pixels[second] = 60, 60, 190
    return (pixels + 5 * rng.standard_normal(pixels.shape)).clip(0, 255).astype(np.uint8), 255 * first.astype(np.uint8)


def test_photographs_and_masks_of_carvana(tmp_path: Path) -> None:
    """In grey, or with blue taken for red, the two discs could not be told apart."""
    rng = np.random.default_rng(0)

    def save_car(number: int, images: Path, masks: Path) -> None:
        for view in (1, 2):
            pixels, mask = draw_coloured(rng)
            name = f"{number:012x}_{view:02d}"
            save_pixels(images / f"{name}.jpg", pixels, quality=95)
            save_pixels(masks / f"{name}_mask.gif", mask)

    for number in range(5):
        save_car(number, tmp_path / "data" / "train", tmp_path / "data" / "train_masks")
    fit(tmp_path / "data", tmp_path / "work", steps=30, configuration="2d")
    plan = json.loads((tmp_path / "work" / "plan.json").read_text())
    channels = json.loads((tmp_path / "work" / "dataset.json").read_text())["channels"]
    assert channels == ["red", "green", "blue"]
    assert list(plan["configurations"]) == ["2d"]
    assert straddling_groups(tmp_path / "work") == set()

    save_car(99, tmp_path / "in", tmp_path / "wanted")
    found = predict(tmp_path / "in", tmp_path / "out", tmp_path / "work")
    assert sorted(file.name for file in found.values()) == ["000000000063_01.png", "000000000063_02.png"]
    for case, file in found.items():
        mask = load_pixels(file)
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) == {0, 255}
        assert dice(mask > 0, load_pixels(tmp_path / "wanted" / f"{case}_mask.gif") > 0) > 0.8
    table = run("evaluate", tmp_path / "out", tmp_path / "wanted")
    assert "have no prediction" not in table
    scores = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [case["case"] for case in scores["cases"]] == sorted(found)
    assert scores["mean_dice"] > 0.8
    check_report(tmp_path / "out")


def test_pictures_with_regions_and_pixels_that_nobody_annotated(tmp_path: Path) -> None:
    """Five of six columns are not annotated: as background, nearly nothing would be found. As exclusive classes, the
    whole would be a ring."""
    rng = np.random.default_rng(0)

    def draw() -> tuple[NDArray, NDArray]:
        rows, columns = np.indices(PICTURE)
        cy, cx = rng.uniform(14, 25, 2)
        distance = np.hypot(rows - cy, columns - cx)
        label = np.array([0, 5, 117], np.uint8)[(distance <= 11).astype(int) + (distance <= 6)]
        pixels = 60.0 + 60 * (label > 0) + 60 * (label == 117) + 8 * rng.standard_normal(PICTURE)
        return pixels.clip(0, 255).astype(np.uint8), label

    for index in range(8):
        pixels, label = draw()
        hidden = np.full_like(label, 200)
        kept = rng.choice(PICTURE[1], PICTURE[1] // 6, replace=False)
        hidden[:, kept] = label[:, kept]
        save_pixels(tmp_path / "data" / "imagesTr" / f"c{index}_0000.png", pixels)
        save_pixels(tmp_path / "data" / "labelsTr" / f"c{index}.png", hidden)
    content = {
        "channel_names": {"0": "light"},
        "labels": {"background": 0, "whole": [5, 117], "core": 117, "ignore": 200},
        "regions_class_order": [5, 117],
        "file_ending": ".png",
    }
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(content))
    fit(tmp_path / "data", tmp_path / "work", steps=60, configuration="2d")
    wanted = {}
    for index in range(N_TEST):
        pixels, wanted[f"t{index}"] = draw()
        save_pixels(tmp_path / "in" / f"t{index}_0000.png", pixels)
        save_pixels(tmp_path / "wanted" / f"t{index}.png", wanted[f"t{index}"])
    found = predict(tmp_path / "in", tmp_path / "out", tmp_path / "work")
    for case, file in found.items():
        label = load_pixels(file)
        assert file.name == f"{case}.png"
        assert set(np.unique(label)) <= {0, 5, 117}, "the value to ignore is never written"
        assert dice(label > 0, wanted[case] > 0) > 0.8
        assert dice(label == 117, wanted[case] == 117) > 0.8
    table = run("evaluate", tmp_path / "out", tmp_path / "wanted")
    assert "whole" in table
    assert "core" in table
    check_report(tmp_path / "out")


def test_slices_by_patient_are_segmented_without_their_masks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Taken for images, the masks would be segmented too, or be two files of one case."""
    caplog.set_level(logging.INFO)
    rng = np.random.default_rng(0)

    def save_patient(folder: Path) -> None:
        for number in (1, 2):
            pixels, mask = draw_coloured(rng)
            folder.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(folder / f"{folder.name}_{number}.tif", pixels, photometric="rgb")
            tifffile.imwrite(folder / f"{folder.name}_{number}_mask.tif", mask, photometric="minisblack")

    for patient in "ABCDE":
        save_patient(tmp_path / "data" / f"TCGA_{patient}_19960909")
    fit(tmp_path / "data", tmp_path / "work", steps=30, configuration="2d")
    assert straddling_groups(tmp_path / "work") == set()
    for patient in "YZ":
        save_patient(tmp_path / "in" / f"TCGA_{patient}_2000")
    found = predict(tmp_path / "in" / "TCGA_Z_2000", tmp_path / "out", tmp_path / "work")
    assert sorted(file.name for file in found.values()) == ["TCGA_Z_2000_1.tif", "TCGA_Z_2000_2.tif"]
    assert "2 files are left out as masks of the images beside them" in caplog.text
    for case, file in found.items():
        mask = tifffile.imread(file)
        assert set(np.unique(mask)) == {0, 255}
        assert dice(mask > 0, tifffile.imread(tmp_path / "in" / "TCGA_Z_2000" / f"{case}_mask.tif") > 0) > 0.8
    run("evaluate", tmp_path / "out", tmp_path / "in" / "TCGA_Z_2000")
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["mean_dice"] > 0.8
    check_report(tmp_path / "out")
    everybody = predict(tmp_path / "in", tmp_path / "everybody", tmp_path / "work")
    run("evaluate", tmp_path / "everybody", tmp_path / "in")
    assert len(json.loads((tmp_path / "everybody" / "evaluation.json").read_text())["cases"]) == 4
    assert sorted(everybody) == [f"TCGA_{patient}_2000_{number}" for patient in "YZ" for number in (1, 2)]
    for case, file in found.items():
        np.testing.assert_array_equal(tifffile.imread(everybody[case]), tifffile.imread(file))


# -- BraTS and BIDS ----------------------------------------------------------------------------------------------------


def save_glioma(folder: Path, rng: np.random.Generator, *, without: tuple[str, ...] = (), joint: str = "_") -> NDArray:
    """A tumour whose parts are seen in one channel each; t1 shows something else. The label map."""
    z, y, x = np.indices(SHAPE)
    cy, cx = rng.uniform(8, 11, 2)
    distance = np.sqrt((2 * (z - SHAPE[0] / 2)) ** 2 + (y - cy) ** 2 + (x - cx) ** 2)
    label = np.array([0, 2, 1, 4], np.uint8)[sum((distance <= radius).astype(int) for radius in (7.5, 5.5, 3.5))]
    shown = {
        "flair": label > 0,
        "t1": draw_ball(rng, 6),
        "t1ce": label == 4,
        "t2": np.isin(label, (1, 4)),
    }
    for channel, mask in shown.items():
        if channel not in without:
            image = (100 + 100 * mask + 10 * rng.standard_normal(SHAPE)).astype(np.float32)
            save_nifti(folder / f"{folder.name}{joint}{channel}.nii.gz", image)
    if "seg" not in without:
        save_nifti(folder / f"{folder.name}{joint}seg.nii.gz", label)
    return label


@pytest.fixture(scope="module")
def brats(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """The work folder of a model that was trained without t1 in every second case."""
    folder, rng = tmp_path_factory.mktemp("brats"), np.random.default_rng(0)
    for index in range(N_TRAIN):
        without = ("t1",) if index % 2 else ()
        save_glioma(folder / "data" / f"BraTS20_Training_{index:03d}", rng, without=without)
    fit(folder / "data", folder / "work", steps=80)
    return folder / "work"


def test_brats_from_its_own_layout_to_its_regions(
    brats: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The channels are known by their names: where t1 is missing, the others must not move up. No seg is an image."""
    caplog.set_level(logging.INFO)
    rng = np.random.default_rng(1)
    wanted = {}
    for index, without in enumerate(((), ("t1", "seg"), ("t1",))):
        case = f"BraTS20_Validation_{index:03d}"
        wanted[case] = save_glioma(tmp_path / "in" / case, rng, without=without)
        save_nifti(tmp_path / "wanted" / f"{case}.nii.gz", wanted[case])
    found = predict(tmp_path / "in", tmp_path / "out", brats)
    assert sorted(found) == sorted(wanted)
    assert "2 files are left out, as they are no channel (flair, t1, t1ce, t2)" in caplog.text
    for case, file in found.items():
        label = load_nifti(file)
        assert set(np.unique(label)) == {0, 1, 2, 4}
        for values in ((1, 2, 4), (1, 4), (4,)):
            assert dice(np.isin(label, values), np.isin(wanted[case], values)) > 0.8, (case, values)
    table = run("evaluate", tmp_path / "out", tmp_path / "wanted")
    assert all(region in table for region in ("whole tumour", "tumour core", "enhancing tumour"))
    dice_of_folder = json.loads((tmp_path / "out" / "evaluation.json").read_text())["mean_dice"]
    table = run("evaluate", tmp_path / "out", tmp_path / "in")
    assert "BraTS20_Validation_000" in table
    assert "BraTS20_Validation_001" not in table, "it has no seg beside its channels"
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["mean_dice"] == pytest.approx(
        dice_of_folder, abs=0.01
    )
    cases = json.loads((tmp_path / "out" / "prediction.json").read_text())["cases"]
    lacking = ["lacks the channel t1: it is segmented without"]
    assert [cases[case]["warnings"] for case in sorted(cases)] == [[], lacking, lacking]
    check_report(tmp_path / "out")

    # One folder by itself, in another generation's way to write names, and a channel that may not be missing.
    rng = np.random.default_rng(1)
    save_glioma(tmp_path / "other" / "PATIENT-7", rng, joint="-")
    (tmp_path / "other" / "PATIENT-7" / "PATIENT-7-flair.nii.gz").rename(
        tmp_path / "other" / "PATIENT-7" / "PATIENT-7-FLAIR.nii.gz"
    )
    (other,) = predict(tmp_path / "other" / "PATIENT-7", tmp_path / "out2", brats).values()
    np.testing.assert_array_equal(load_nifti(other), load_nifti(found["BraTS20_Validation_000"]))
    save_glioma(tmp_path / "other" / "PATIENT-8", rng, without=("t1ce",))
    arguments = [str(tmp_path / "other"), str(tmp_path / "out3"), "-w", str(brats), "--device", "cpu"]
    result = CliRunner().invoke(app, ["predict", *arguments])
    assert isinstance(result.exception, PredictionError)
    assert "1 of 2 images could not be segmented; the others are done" in str(result.exception)
    assert "PATIENT-8_t1ce" in str(result.exception)
    assert (tmp_path / "out3" / "PATIENT-7.nii.gz").is_file()


def test_bids_from_its_own_layout(tmp_path: Path) -> None:
    """Only the second channel shows the lesion; taken in the order of the alphabet in the wrong way, nothing would."""
    rng = np.random.default_rng(0)

    def save_session(root: Path, session: str) -> NDArray:
        lesion, other = draw_ball(rng, 4.5), draw_ball(rng, 4.5)
        folder = root / session.replace("_", "/") / "anat"
        for suffix, mask in (("FLAIR", other), ("T1w", lesion)):
            image = (100 + 100 * mask + 10 * rng.standard_normal(SHAPE)).astype(np.float32)
            save_nifti(folder / f"{session}_{suffix}.nii.gz", image)
        return lesion.astype(np.uint8)

    for subject in range(3):
        for number in (1, 2):
            session = f"sub-{subject:02d}_ses-{number}"
            label = save_session(tmp_path / "data", session)
            folder = tmp_path / "data" / "derivatives" / "labels" / session.replace("_", "/") / "anat"
            save_nifti(folder / f"{session}_T1w_dseg.nii.gz", label)
    (tmp_path / "data" / "dataset_description.json").write_text(json.dumps({"Name": "lesions"}))
    fit(tmp_path / "data", tmp_path / "work", steps=60)
    assert straddling_groups(tmp_path / "work") == set()
    wanted = {session: save_session(tmp_path / "in", session) for session in ("sub-08_ses-1", "sub-09")}
    found = predict(tmp_path / "in", tmp_path / "out", tmp_path / "work")
    assert sorted(found) == sorted(wanted)
    for session, file in found.items():
        assert dice(load_nifti(file) == 1, wanted[session] == 1) > 0.8
    alone = predict(tmp_path / "in" / "sub-09" / "anat", tmp_path / "alone", tmp_path / "work")
    assert list(alone) == ["sub-09"]
    check_report(tmp_path / "out")


# -- names of channels, without a network ------------------------------------------------------------------------------


def touch(folder: Path, *names: str, n_channels: int = 1) -> Path:
    for name in names:
        shape = (4, 4, 4) if n_channels == 1 else (4, 4, 4, n_channels)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.ones(shape, np.uint8), np.eye(4)), path)
    return folder


def name_files(cases: dict[str, list[Path | None]]) -> dict[str, list[str | None]]:
    return {case: [file and file.name for file in files] for case, files in cases.items()}  # type: ignore[misc]


def test_channels_are_known_by_their_names(tmp_path: Path) -> None:
    folder = touch(tmp_path, "a_T1.nii.gz", "a_t1CE.nii.gz", "b-t1ce.nii.gz", "b-t1.nii.gz", "b-notes.nii.gz")
    cases, problems = find_images([folder], channels=("t1", "t1ce"))
    assert name_files(cases) == {
        "a": ["a_T1.nii.gz", "a_t1CE.nii.gz"],
        "b": ["b-t1.nii.gz", "b-t1ce.nii.gz"],
    }
    assert problems == []


def test_a_channel_that_is_there_twice_or_not_at_all_is_told(tmp_path: Path) -> None:
    folder = touch(tmp_path, "a_t1.nii.gz", "a_T1.nii", "a_t2.nii.gz", "b_t1.nii.gz", "c_t1.nii.gz", "c_t2.nii.gz")
    cases, problems = find_images([folder], channels=("t1", "t2"))
    assert list(cases) == ["c"]
    assert [problem.case for problem in problems] == ["a", "b"]
    cases, problems = find_images([folder], channels=("t1", "t2"), optional=[1])
    assert name_files(cases) == {"b": ["b_t1.nii.gz", None], "c": ["c_t1.nii.gz", "c_t2.nii.gz"]}


def test_whole_images_that_are_called_like_a_channel_are_whole_images(tmp_path: Path) -> None:
    folder = touch(tmp_path, "car_red.nii.gz", "bus_blue.nii.gz", n_channels=3)
    cases, _ = find_images([folder], channels=("red", "green", "blue"))
    assert name_files(cases) == {"bus_blue": ["bus_blue.nii.gz"], "car_red": ["car_red.nii.gz"]}
    folder = touch(tmp_path / "numbers", "a_1.nii.gz", "a_2.nii.gz", "b_CT.nii.gz")
    assert list(find_images([folder], channels=("1",))[0]) == ["a_1", "a_2", "b_CT"]
    assert list(find_images([folder], channels=("CT",))[0]) == ["a_1", "a_2", "b_CT"]


def test_a_model_of_one_channel_takes_that_one_of_a_case(tmp_path: Path) -> None:
    folder = touch(tmp_path, *(f"P{number}/P{number}_{kind}.nii.gz" for number in (1, 2) for kind in (*GLIOMA, "seg")))
    cases, problems = find_images([folder], channels=("t2",))
    assert name_files(cases) == {"P1": ["P1_t2.nii.gz"], "P2": ["P2_t2.nii.gz"]}
    assert problems == []


def test_masks_beside_images_are_left_out_but_a_mask_that_is_named_is_not(tmp_path: Path) -> None:
    folder = touch(tmp_path, "a.nii.gz", "a_mask.nii.gz", "b_0000.nii.gz", "b-seg.nii.gz", "alone_label.nii.gz")
    assert list(find_images([folder], channels=("CT",))[0]) == ["a", "alone_label", "b_0000"]
    assert list(find_images([folder / "a_mask.nii.gz"], channels=("CT",))[0]) == ["a_mask"]

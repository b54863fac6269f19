"""DICOM: a series as one volume, and series that are none."""

from __future__ import annotations

import locale
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from autoseg.core.errors import FormatError
from autoseg.data.io import is_image, output_ending, read_geometry, read_image, read_label, read_raw, write_volume

SPACING_XY = (0.7, 1.3)
GAP_MM = 2.5
OBLIQUE = np.array([[0.8, 0.6, 0.0], [-0.6 * 0.96, 0.8 * 0.96, 0.28]])
CT, MR, RADIOGRAPH = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.1"


@pytest.fixture(autouse=True)
def same_locale() -> Iterator[None]:
    """GDCM leaves the process in the locale "C" when it writes, which only tests do."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


def make_voxels(n_slices: int = 5, *, rows: int = 6) -> np.ndarray:
    """Multiples of 4, so that a slope of 4 keeps them."""
    return 4 * np.random.default_rng(8).integers(-250, 700, (n_slices, rows, 7)).astype(np.int16)


def save(
    folder: Path,
    voxels: np.ndarray,
    *,
    series: str = "1.2.3.4",
    slope: float = 4,
    intercept: float = -1024,
    direction: np.ndarray = OBLIQUE,
    shift_mm: Callable[[int], float] = lambda number: 0.0,
    tilt_mm: float = 0.0,
    modality: tuple[str, str] = (CT, "CT"),
    prefix: str = "",
) -> np.ndarray:
    """Writes a series whose files are named in another order than they lie; returns its affine to RAS+ mm."""
    folder.mkdir(parents=True, exist_ok=True)
    normal = np.cross(*direction)
    origin = np.array([-31.5, 12.25, 701.5])
    order = np.random.default_rng(2).permutation(len(voxels))
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number, pixels in enumerate(voxels):
        image = sitk.GetImageFromArray(pixels)
        image.SetSpacing(SPACING_XY)
        place = origin + number * tilt_mm * direction[1] + (number * GAP_MM + shift_mm(number)) * normal
        tags = {
            "0008|0016": modality[0],
            "0008|0018": f"{series}.{prefix.encode().hex() or 0}.{number + 1}",
            "0008|0060": modality[1],
            "0008|103e": f"axial {series}",
            "0018|0050": "3.5",
            "0020|000d": "1.2.3",
            "0020|000e": series,
            "0020|0011": "7",
            "0020|0032": "\\".join(f"{value:.10g}" for value in place),
            "0020|0037": "\\".join(f"{value:.10g}" for value in direction.ravel()),
            "0028|1052": str(intercept),
            "0028|1053": str(slope),
        }
        for key, value in tags.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{prefix}{order[number]}.dcm"))
        writer.Execute(image)
    affine = np.eye(4)
    step = GAP_MM * normal + tilt_mm * direction[1]
    affine[:3, :3] = np.stack([direction[0] * SPACING_XY[0], direction[1] * SPACING_XY[1], step], axis=1)
    affine[:3, 3] = origin
    return np.diag([-1, -1, 1, 1]) @ affine


@pytest.mark.parametrize("modality", [(CT, "CT"), (MR, "MR")], ids=["CT", "MR"])
@pytest.mark.parametrize("slope", [1, 4])
def test_series(slope: float, modality: tuple[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    voxels = make_voxels()
    affine = save(tmp_path / "s", voxels, slope=slope, modality=modality)
    (tmp_path / "s" / "notes.txt").write_text("not a slice")
    (tmp_path / "s" / ".hidden.dcm").write_text("not a slice")
    image, geometry = read_image(tmp_path / "s")
    assert image.dtype == np.float32
    # The file's axes lean to the left, the back and upwards.
    assert geometry.file_axcodes == ("L", "P", "S")
    assert np.array_equal(image[0], voxels[:, ::-1, ::-1])
    np.testing.assert_allclose(geometry.affine, affine, atol=1e-6)
    assert geometry.spacing_mm == (GAP_MM, 1.3, 0.7)
    assert read_raw(tmp_path / "s").n_channels == 1
    assert read_geometry(tmp_path / "s") == geometry
    assert is_image(tmp_path / "s")
    assert capfd.readouterr() == ("", "")


def test_the_same_volume_as_itk_reads(tmp_path: Path) -> None:
    save(tmp_path / "s", make_voxels())
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "s"))
    sitk.WriteImage(sitk.ReadImage(names), str(tmp_path / "a.mha"))
    (image, geometry), (expected, other) = read_image(tmp_path / "s"), read_image(tmp_path / "a.mha")
    assert np.array_equal(image, expected)
    np.testing.assert_allclose(geometry.affine, other.affine, atol=1e-6)


def test_label_map_of_a_series(tmp_path: Path) -> None:
    affine = save(tmp_path / "s", make_voxels())
    image, geometry = read_image(tmp_path / "s")
    assert output_ending(tmp_path / "s") == ".nii.gz"
    label = (image[0] > 500).astype(np.uint8)
    write_volume(tmp_path / "a.nii.gz", label, geometry, like=tmp_path / "s")
    read, other = read_label(tmp_path / "a.nii.gz")
    assert np.array_equal(read, label)
    np.testing.assert_allclose(other.affine, affine, atol=1e-4)


def test_slopes_of_its_own_for_each_slice(tmp_path: Path) -> None:
    """As in PET; the first slice is of whole numbers, so that a common type for all would cut the others'."""
    save(tmp_path, np.full((1, 3, 4), 8, np.int16), slope=1, intercept=0, prefix="a")
    save(tmp_path, np.full((1, 3, 4), 2500, np.int16), slope=1250, intercept=0, prefix="b", shift_mm=lambda _: GAP_MM)
    data = (tmp_path / "b0.dcm").read_bytes()
    assert data.count(b"1250") == 1
    (tmp_path / "b0.dcm").write_bytes(data.replace(b"1250", b"2.25"))  # the stored value is 2
    image, _ = read_image(tmp_path)
    assert np.unique(image[0, 0]).tolist() == [8]
    assert np.unique(image[0, 1]).tolist() == [4.5]


def test_tilted_gantry(tmp_path: Path) -> None:
    voxels = make_voxels()
    affine = save(tmp_path / "s", voxels, tilt_mm=0.6)
    image, geometry = read_image(tmp_path / "s")
    np.testing.assert_allclose(geometry.affine, affine, atol=1e-6)
    assert np.array_equal(image[0], voxels[:, ::-1, ::-1])
    assert geometry.spacing_mm[0] == pytest.approx(np.hypot(GAP_MM, 0.6), abs=1e-4)


def test_rounded_positions_are_even(tmp_path: Path) -> None:
    save(tmp_path / "s", make_voxels(), shift_mm=lambda number: 0.02 * (-1) ** number)
    assert read_geometry(tmp_path / "s").spacing_mm[0] == pytest.approx(GAP_MM, abs=0.02)


def test_a_single_slice_has_its_thickness(tmp_path: Path) -> None:
    save(tmp_path / "s", make_voxels(1))
    assert read_geometry(tmp_path / "s").spacing_mm == pytest.approx((3.5, 1.3, 0.7))


def test_one_file_with_several_frames(tmp_path: Path) -> None:
    voxels = make_voxels()
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((*SPACING_XY, GAP_MM))
    image.SetOrigin((1, 2, 3))
    image.SetMetaData("0008|0060", "CT")
    (tmp_path / "s").mkdir()
    sitk.WriteImage(image, str(tmp_path / "s" / "a.dcm"))
    for path in (tmp_path / "s", tmp_path / "s" / "a.dcm"):
        read, geometry = read_image(path)
        assert np.array_equal(read[0], voxels[:, ::-1, ::-1])
        assert geometry.spacing_mm == (GAP_MM, 1.3, 0.7)
        assert np.array(geometry.affine)[:3, 3].tolist() == [-1, -2, 3]
    save(tmp_path / "s", voxels[:2], series="1.2.9")
    with pytest.raises(FormatError, match="found 2 series, expected 1"):
        read_image(tmp_path / "s")


def test_a_file_is_an_image_where_it_is_no_slice(tmp_path: Path) -> None:
    voxels = make_voxels(1)
    save(tmp_path / "x", voxels, modality=(RADIOGRAPH, "CR"))
    image, _ = read_image(tmp_path / "x" / "0.dcm")
    assert np.array_equal(image[0], voxels[:, ::-1, ::-1])
    save(tmp_path / "s", voxels)
    with pytest.raises(FormatError, match=r"0\.dcm: found one slice of a CT series, expected a whole series; put"):
        read_image(tmp_path / "s" / "0.dcm")


def refuse(folder: Path, pattern: str) -> None:
    for read in (read_geometry, read_image):
        with pytest.raises(FormatError, match=f"^{folder}: {pattern}"):
            read(folder)


def test_several_series_are_told(tmp_path: Path) -> None:
    save(tmp_path, make_voxels(), prefix="a")
    save(tmp_path, make_voxels(1), series="1.2.3.5", prefix="b")
    refuse(
        tmp_path,
        r"found 2 series, expected 1: 'axial 1\.2\.3\.4' \(number 7, 5 files\), 'axial 1\.2\.3\.5' "
        r"\(number 7, 1 file\); move the files of each",
    )


def test_missing_slice_is_told(tmp_path: Path) -> None:
    save(tmp_path, make_voxels(9))
    order = np.random.default_rng(2).permutation(9)
    (tmp_path / f"{order[4]}.dcm").unlink()
    refuse(
        tmp_path,
        rf"found uneven gaps between slices: 5 mm between {order[3]}\.dcm and {order[5]}\.dcm \(at .* mm\), "
        "expected 2.5 mm",
    )


def test_slices_at_the_same_place(tmp_path: Path) -> None:
    save(tmp_path, make_voxels())
    shutil.copy(tmp_path / "2.dcm", tmp_path / "copy.dcm")
    refuse(
        tmp_path, r"found (2\.dcm and copy\.dcm|copy\.dcm and 2\.dcm) at the same place \(.* mm\), expected one slice"
    )


def test_slices_that_do_not_fit(tmp_path: Path) -> None:
    save(tmp_path / "size", make_voxels(), prefix="a")
    save(tmp_path / "size", make_voxels(1, rows=5), prefix="b", shift_mm=lambda number: 5 * GAP_MM)
    refuse(tmp_path / "size", r"found 7 x 5 pixels in b0\.dcm, expected 7 x 6 pixels as in a0\.dcm; remove")
    save(tmp_path / "turned", make_voxels(), prefix="a")
    save(tmp_path / "turned", make_voxels(1), prefix="b", direction=np.eye(3)[1:])
    refuse(tmp_path / "turned", r"found the orientation \[\[0\.0, 1\.0, 0\.0\].* in b0\.dcm, expected .* as in a0\.dcm")
    save(tmp_path / "shifted", make_voxels(3), prefix="a")
    shifted = save(tmp_path / "other", make_voxels(3), prefix="b", tilt_mm=1.0)
    assert shifted.shape == (4, 4)
    order = np.random.default_rng(2).permutation(3)
    shutil.move(tmp_path / "other" / f"b{order[1]}.dcm", tmp_path / "shifted" / f"a{order[1]}.dcm")
    refuse(tmp_path / "shifted", "found slices that do not lie on a straight line")


def test_slices_without_positions(tmp_path: Path) -> None:
    for number in range(2):
        sitk.WriteImage(sitk.GetImageFromArray(make_voxels(1)[0]), str(tmp_path / f"{number}.dcm"))
    with pytest.raises(FormatError, match=r"found (2 series|[01]\.dcm without the position of its slice)"):
        read_image(tmp_path)


def test_no_dicom_at_all(tmp_path: Path) -> None:
    refuse(tmp_path, "found no DICOM image in this folder, expected the slices of one series")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "folder").mkdir()
    refuse(tmp_path, "found no DICOM image in this folder, expected the slices of one series")


@pytest.mark.parametrize(
    "change",
    [lambda data: data[:-20], lambda data: data[:300], lambda data: b"", lambda data: b"text " * 100],
    ids=["cut", "cut in the header", "empty", "text"],
)
def test_a_broken_slice_does_not_go_unnoticed(
    change: Callable[[bytes], bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, make_voxels())
    path = tmp_path / "3.dcm"
    path.write_bytes(change(path.read_bytes()))
    # GDCM tells of pixels that are cut off with the header, or, before SimpleITK 2.5.4, not at all.
    unread = r": found 1 DICOM file that cannot be read \(3\.dcm\), expected whole images; copy the series again"
    cut = r"/3\.dcm: its pixels cannot be read \(found 64 bytes of pixels, expected 84\); copy the series again"
    with pytest.raises(FormatError, match=f"^{tmp_path}({unread}|{cut})"):
        read_image(tmp_path)
    with pytest.raises(FormatError, match=f"^{path}: (cannot be read as DICOM|found one slice)"):
        read_image(path)
    assert capfd.readouterr() == ("", "")


def test_objects_beside_the_slices_that_are_no_images(tmp_path: Path) -> None:
    save(tmp_path, make_voxels())
    report = b"1.2.840.10008.5.1.4.1.1.88.11"
    head = bytes(128) + b"DICM" + b"\x02\x00\x02\x00UI" + len(report).to_bytes(2, "little") + report
    (tmp_path / "report.dcm").write_bytes(head)
    assert read_image(tmp_path)[0].shape == (1, 5, 6, 7)
    image = head.replace(report, (CT.encode() + b"\0" * 8)[: len(report)])
    (tmp_path / "report.dcm").write_bytes(image)
    refuse(tmp_path, r"found 1 DICOM file that cannot be read \(report\.dcm\)")

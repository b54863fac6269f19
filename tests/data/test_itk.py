"""NRRD and MetaImage: the same volume as in NIfTI, in any orientation."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from autoseg.core.errors import FormatError
from autoseg.data.io import read_geometry, read_image, read_label, read_raw, write_volume

SHAPE_ZYX = (5, 4, 3)
SPACING_XYZ = (0.7, 1.3, 4.1)
ORIGIN_XYZ = (-31.51, 12.27, 701.3)
ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")


def rotation(degrees: float, axis: int) -> np.ndarray:
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    first, second = [other for other in range(3) if other != axis]
    matrix = np.eye(3)
    matrix[first, first] = matrix[second, second] = cosine
    matrix[first, second], matrix[second, first] = -sine, sine
    return matrix


DIRECTIONS = {
    "identity": np.eye(3),
    "oblique": rotation(17, 2) @ rotation(-11, 0),
    "sagittal": np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]),
    "mirrored": np.diag([-1.0, 1.0, -1.0]) @ rotation(8, 1),
}


def make_voxels(shape: tuple[int, ...] = SHAPE_ZYX) -> np.ndarray:
    return np.random.default_rng(6).integers(-1000, 3000, shape).astype(np.int16)


def save(path: Path, voxels: np.ndarray, direction: np.ndarray | None = None, *, is_vector: bool = False) -> Path:
    image = sitk.GetImageFromArray(voxels, isVector=is_vector)
    n_axes = image.GetDimension()
    whole = np.eye(n_axes)
    whole[:3, :3] = (np.eye(3) if direction is None else direction)[:n_axes, :n_axes]
    image.SetDirection(whole.ravel().tolist())
    image.SetSpacing((*SPACING_XYZ, 1.0)[:n_axes])
    image.SetOrigin((*ORIGIN_XYZ, 0.0)[:n_axes])
    sitk.WriteImage(image, str(path), useCompression=True)
    return path


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("ending", ENDINGS)
def test_the_same_volume_as_in_nifti(ending: str, direction: str, tmp_path: Path) -> None:
    """ITK writes both files, and nibabel reads the other one: what is known of LPS stands in neither of our readers."""
    voxels = make_voxels()
    path = save(tmp_path / f"a{ending}", voxels, DIRECTIONS[direction])
    nifti = save(tmp_path / "a.nii.gz", voxels, DIRECTIONS[direction])
    image, geometry = read_image(path)
    expected, expected_geometry = read_image(nifti)
    assert np.array_equal(image, expected)
    assert image.flags.c_contiguous
    np.testing.assert_allclose(geometry.affine, nib.load(nifti).affine, atol=1e-4)
    np.testing.assert_allclose(geometry.affine, expected_geometry.affine, atol=1e-4)
    assert geometry.file_axcodes == expected_geometry.file_axcodes
    assert sorted(geometry.spacing_mm) == sorted(SPACING_XYZ)
    exact = np.diag([-1, -1, 1]) @ DIRECTIONS[direction] * SPACING_XYZ
    np.testing.assert_allclose(np.array(geometry.affine)[:3, :3], exact, atol=1e-14)
    assert read_geometry(path) == geometry


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_written_like_the_image(ending: str, direction: str, tmp_path: Path) -> None:
    voxels = make_voxels()
    source = save(tmp_path / f"a{ending}", voxels, DIRECTIONS[direction])
    image, geometry = read_image(source)
    write_volume(tmp_path / f"b{ending}", image[0].astype(np.int16), geometry, like=source)
    one, other = (sitk.ReadImage(str(tmp_path / f"{name}{ending}")) for name in "ab")
    assert np.array_equal(sitk.GetArrayFromImage(other), voxels)
    assert other.GetOrigin() == one.GetOrigin()
    assert (other.GetSpacing(), other.GetDirection()) == (one.GetSpacing(), one.GetDirection())
    np.testing.assert_allclose(other.GetSpacing(), SPACING_XYZ, rtol=1e-14)
    np.testing.assert_allclose(other.GetDirection(), DIRECTIONS[direction].ravel(), atol=1e-14)
    assert (tmp_path / f"b{ending}").stat().st_size < 1500


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "SLP", "PIR"])
def test_written_from_nifti(axcodes: str, ending: str, tmp_path: Path) -> None:
    base = nib.load(save(tmp_path / "base.nii.gz", make_voxels(), DIRECTIONS["oblique"]))
    change = nib.orientations.ornt_transform(
        nib.io_orientation(base.affine), nib.orientations.axcodes2ornt(tuple(axcodes))
    )
    nib.save(base.as_reoriented(change), tmp_path / "a.nii.gz")
    image, geometry = read_image(tmp_path / "a.nii.gz")
    write_volume(tmp_path / f"a{ending}", image[0], geometry, like=tmp_path / "a.nii.gz")
    read, other = read_image(tmp_path / f"a{ending}")
    assert np.array_equal(read, image)
    assert other.file_axcodes == tuple(axcodes)
    np.testing.assert_allclose(other.affine, geometry.affine, atol=1e-12)
    write_volume(tmp_path / "b.nii.gz", read[0], other, like=tmp_path / f"a{ending}")
    np.testing.assert_allclose(nib.load(tmp_path / "b.nii.gz").affine, geometry.affine, atol=1e-6)
    assert np.array_equal(read_image(tmp_path / "b.nii.gz")[0], image)


@pytest.mark.parametrize("ending", ENDINGS)
def test_vectors_and_a_fourth_axis_are_channels(ending: str, tmp_path: Path) -> None:
    channels = make_voxels((2, *SHAPE_ZYX))
    vector = save(tmp_path / f"v{ending}", np.moveaxis(channels, 0, -1), DIRECTIONS["oblique"], is_vector=True)
    series = save(tmp_path / f"t{ending}", channels, DIRECTIONS["oblique"])
    alone = [
        read_image(save(tmp_path / f"{number}{ending}", channels[number], DIRECTIONS["oblique"])) for number in (0, 1)
    ]
    for path in (vector, series):
        raw = read_raw(path)
        assert raw.n_channels == 2
        assert raw.geometry == alone[0][1]
        image, _ = read_image(path)
        assert np.array_equal(image, np.concatenate([one for one, _ in alone]))
        with pytest.raises(FormatError, match=rf"{path.name}: found 2 volumes in a label map, expected 1"):
            read_label(path)


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_2d_image_is_one_slice_and_comes_back_with_two_axes(ending: str, tmp_path: Path) -> None:
    voxels = make_voxels((4, 3))
    source = save(tmp_path / f"a{ending}", voxels)
    image, geometry = read_image(source)
    assert image.shape == (1, 1, 4, 3)
    assert geometry.spacing_mm == (1.0, 1.3, 0.7)
    assert np.array_equal(image[0, 0], voxels[::-1, ::-1])
    write_volume(tmp_path / f"b{ending}", image[0].astype(np.int16), geometry, like=source)
    written = sitk.ReadImage(str(tmp_path / f"b{ending}"))
    assert written.GetDimension() == 2
    assert np.array_equal(sitk.GetArrayFromImage(written), voxels)
    assert written.GetSpacing() == pytest.approx(SPACING_XYZ[:2])
    assert written.GetOrigin() == ORIGIN_XYZ[:2]


def test_sheared_directions_of_nrrd(tmp_path: Path) -> None:
    """A tilted gantry. The file is written by hand, in the space that most others do not use."""
    voxels = make_voxels()
    header = (
        "NRRD0004\ntype: short\ndimension: 3\nspace: right-anterior-superior\nsizes: 3 4 5\n"
        "space directions: (0.7,0,0) (0,1.3,0) (0,0.5,4)\nspace origin: (1,2,3)\nendian: little\nencoding: gzip\n\n"
    )
    (tmp_path / "a.nrrd").write_bytes(header.encode() + gzip.compress(voxels.tobytes()))
    image, geometry = read_image(tmp_path / "a.nrrd")
    assert np.array_equal(image[0], voxels)
    expected = np.array([[0.7, 0, 0, 1], [0, 1.3, 0.5, 2], [0, 0, 4, 3], [0, 0, 0, 1]])
    np.testing.assert_allclose(geometry.affine, expected, atol=1e-14)
    write_volume(tmp_path / "b.nrrd", image[0], geometry, like=tmp_path / "a.nrrd")
    np.testing.assert_allclose(read_geometry(tmp_path / "b.nrrd").affine, expected, atol=1e-14)


def test_complex_numbers_are_refused(tmp_path: Path) -> None:
    voxels = make_voxels().astype(np.complex64)
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(tmp_path / "a.nrrd"))
    with pytest.raises(FormatError, match=r"a\.nrrd: found voxels of type complex64, expected numbers"):
        read_image(tmp_path / "a.nrrd")


@pytest.mark.parametrize(("ending", "data"), [(".mhd", "a.zraw"), (".nhdr", "a.raw.gz")])
@pytest.mark.parametrize("what", ["missing", "cut", "end of zeros"])
def test_voxels_beside_their_header(
    what: str, ending: str, data: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, voxels = save(tmp_path / f"a{ending}", make_voxels()), tmp_path / data
    stored = voxels.read_bytes()
    if what == "missing":
        voxels.unlink()
    else:
        voxels.write_bytes(stored[:60] + (b"" if what == "cut" else bytes(len(stored) - 60)))
    with pytest.raises(FormatError, match=rf"^{path}: (its voxels )?cannot be read.* \([^0].*\); copy it again"):
        read_image(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_uncompressed_and_cut_off(ending: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"a{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(make_voxels()), str(path), useCompression=False)
    assert read_image(path)[0].shape == (1, *SHAPE_ZYX)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match=rf"^{path}: its voxels cannot be read"):
        read_image(path)
    assert capfd.readouterr() == ("", "")


def test_numbers_that_are_written_out(tmp_path: Path) -> None:
    """They take fewer bytes than in binary form, where they are small."""
    header = "ObjectType = Image\nNDims = 3\nDimSize = 3 2 2\nElementType = MET_FLOAT\nBinaryData = False\n"
    (tmp_path / "a.mha").write_text(f"{header}ElementDataFile = LOCAL\n{' '.join(map(str, range(12)))}\n")
    image, _ = read_image(tmp_path / "a.mha")
    assert sorted(image.ravel().tolist()) == list(range(12))


def test_spacing_of_zero_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mha", make_voxels())
    path.write_bytes(path.read_bytes().replace(b"4.0999999999999996", b"0"))
    with pytest.raises(FormatError, match=rf"^{path}: "):
        read_geometry(path)

"""What all formats share: names and endings, broken files, volumes that come back as they were."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from autoseg.core.errors import FormatError
from autoseg.core.geometry import Geometry, make_geometry
from autoseg.data.io import (
    READERS,
    WRITERS,
    case_name,
    file_ending,
    is_image,
    output_ending,
    read_geometry,
    read_image,
    read_label,
    read_raw,
    write_volume,
)

VOLUMES = (".nii.gz", ".nii", ".nrrd", ".mha", ".tif", ".tiff", ".ome.tif", ".ome.tiff")
PICTURES = (".png", ".bmp", ".gif")
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\n" * 20


def make_volume(n_slices: int = 4, dtype: type = np.uint8) -> tuple[np.ndarray, Geometry]:
    """A label map that lies as pictures do, and where it is."""
    affine = np.diag([-0.7, -1.3, 4.1, 1.0])
    geometry = make_geometry((3, 5, n_slices), affine, header_spacing_mm=(0.7, 1.3, 4.1))
    return np.random.default_rng(3).integers(0, 200, geometry.shape).astype(dtype), geometry


def save_noise(path: Path) -> Path:
    """An image that does not shrink when it is compressed, so that every cut goes through its voxels."""
    n_slices = 1 if path.suffix in (".png", ".bmp", ".gif", ".jpg", ".jpeg") else 6
    geometry = make_geometry((40, 30, n_slices), np.diag([-1.0, -1.0, 1.0, 1.0]), header_spacing_mm=(1, 1, 1))
    noise = np.random.default_rng(4).integers(0, 256, geometry.shape).astype(np.uint8)
    if path.suffix in (".jpg", ".jpeg"):
        from PIL import Image

        Image.fromarray(noise[0]).save(path)
    else:
        write_volume(path, noise, geometry)
    return path


def test_every_format_that_is_written_is_read() -> None:
    assert set(VOLUMES) | set(PICTURES) == set(WRITERS)
    assert set(WRITERS) < set(READERS)


@pytest.mark.parametrize("ending", WRITERS)
def test_voxels_come_back(ending: str, tmp_path: Path) -> None:
    label, geometry = make_volume(1 if ending in PICTURES else 4)
    path = tmp_path / f"deep/er/a{ending}"
    write_volume(path, label, geometry)
    read, other = read_label(path)
    assert read.dtype == np.uint8
    assert np.array_equal(read, label)
    assert np.array_equal(read_image(path)[0], label[None])
    assert read_image(path)[0].dtype == np.float32
    assert other == read_geometry(path)
    assert other.file_axcodes == ("L", "P", "S")
    if ending in VOLUMES:
        assert other.spacing_mm == pytest.approx((4.1, 1.3, 0.7))
    write_volume(path, 199 - label, other, like=path)
    assert np.array_equal(read_label(path)[0], 199 - label)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", [ending for ending in WRITERS if ending not in (".bmp", ".gif")])
def test_sixteen_bits_come_back(ending: str, tmp_path: Path) -> None:
    label, geometry = make_volume(1, np.uint16)
    write_volume(tmp_path / f"a{ending}", label + np.uint16(300), geometry)
    read, _ = read_label(tmp_path / f"a{ending}")
    assert read.dtype == np.uint16
    assert np.array_equal(read, label + 300)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint32, np.uint64, np.float32, np.bool_])
@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".tif"])
def test_types_of_volumes(ending: str, dtype: type, tmp_path: Path) -> None:
    label, geometry = make_volume()
    volume: np.ndarray = (label % 100).astype(dtype)
    write_volume(tmp_path / f"a{ending}", volume, geometry)
    assert np.array_equal(read_label(tmp_path / f"a{ending}")[0], volume)


@pytest.mark.parametrize("ending", VOLUMES)
def test_fractions(ending: str, tmp_path: Path) -> None:
    """NIfTI keeps integers and a scale, other formats the values themselves."""
    label, geometry = make_volume()
    path = tmp_path / f"a{ending}"
    write_volume(path, label, geometry, scale=1 / 255)
    read, _ = read_image(path)
    if ".nii" in ending:
        import nibabel

        assert np.array_equal(nibabel.load(path).dataobj.get_unscaled().T[:, ::-1, ::-1], label)
    np.testing.assert_allclose(read[0], label / 255, rtol=1e-6)


@pytest.mark.parametrize("ending", PICTURES)
def test_what_pictures_cannot_hold(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{ending}"
    label, geometry = make_volume(4)
    with pytest.raises(FormatError, match=r"found 4 slices, expected 1 in .*; write volumes as \.tif or \.nii\.gz"):
        write_volume(path, label, geometry)
    label, geometry = make_volume(1, np.int32)
    with pytest.raises(FormatError, match=r"found values from -\d+ to -\d+, expected 0 to"):
        write_volume(path, label - 250, geometry)
    with pytest.raises(FormatError, match=r"found values from \d+ to \d+, expected 0 to"):
        write_volume(path, (label + 1) * 70000, geometry)
    with pytest.raises(FormatError, match=r"found values of type float32, expected whole numbers"):
        write_volume(path, label, geometry, scale=0.5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", [".jpg", ".mhd", ".nhdr", ".dcm", ".txt", ""])
def test_what_is_not_written(ending: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"cannot be written, expected a name that ends in one of \.nii\.gz, \.nii"):
        write_volume(tmp_path / f"a{ending}", *make_volume())
    assert not list(tmp_path.iterdir())


CUTS: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda data: data[: len(data) // 2],
    "without its end": lambda data: data[:-64],
    "end of zeros": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "header": lambda data: data[:60],
    "first bytes": lambda data: data[:6],
    "empty": lambda data: b"",
    "text": lambda data: LFS_POINTER,
    "zeros": lambda data: bytes(len(data)),
}
# Without a checksum zeros are voxels, and nibabel and Pillow do not always come to the checksum at the end.
UNSEEN = {(ending, "end of zeros") for ending in (".nii.gz", ".nii", ".bmp", ".gif", ".jpg", ".jpeg")}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("ending", READERS)
def test_broken_files_are_named(
    ending: str, cut: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    twin = {".mhd": ".mha", ".nhdr": ".nrrd", ".dcm": ".mha"}.get(ending, ending)
    source = save_noise(tmp_path / f"a{twin}")
    path = source.rename(tmp_path / f"a{ending}")
    path.write_bytes(CUTS[cut](path.read_bytes()))
    if (ending, cut) not in UNSEEN:
        for read in (read_image, read_label):
            with pytest.raises(FormatError, match=f"^{path}: "):
                read(path)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_names_and_endings(tmp_path: Path) -> None:
    assert file_ending("x/CASE.NII.GZ") == ".nii.gz"
    assert file_ending("a.nii") == ".nii"
    assert file_ending("a.ome.tif") == ".ome.tif"
    assert file_ending("a.b.tif") == ".tif"
    assert file_ending("a.gz") is None
    assert case_name("x/a.b_0000.nii.gz") == "a.b_0000"
    assert case_name(Path("a.nii")) == "a"
    assert case_name("a.ome.tiff") == "a"
    assert case_name("notes.txt") == "notes"
    (tmp_path / "1.2.840").mkdir()
    assert case_name(tmp_path / "1.2.840") == "1.2.840"
    assert is_image(tmp_path / "a.png")
    assert not is_image(tmp_path / "a.txt")
    assert not is_image(tmp_path / "1.2.840")
    save_noise(tmp_path / "a.nii.gz").rename(tmp_path / "b.NII.GZ")
    assert read_label(tmp_path / "b.NII.GZ")[0].shape == (6, 30, 40)


def test_endings_of_label_maps(tmp_path: Path) -> None:
    expected = {ending: ending for ending in WRITERS}
    expected |= {".jpg": ".png", ".jpeg": ".png", ".nhdr": ".nrrd", ".mhd": ".mha", ".dcm": ".nii.gz"}
    assert {ending: output_ending(Path(f"a{ending.upper()}")) for ending in READERS} == expected
    assert output_ending(tmp_path) == ".nii.gz"
    with pytest.raises(FormatError, match=r"a\.txt: found an unknown file ending, expected one of \.nii\.gz, \.nii"):
        output_ending(Path("a.txt"))


def test_missing_file_folder_and_unknown_ending(tmp_path: Path) -> None:
    (tmp_path / "folder.nii.gz").mkdir()
    (tmp_path / "a.xyz").write_text("x")
    with pytest.raises(FormatError, match=r"missing\.nii\.gz: no such file"):
        read_image(tmp_path / "missing.nii.gz")
    with pytest.raises(FormatError, match=r"folder\.nii\.gz: no such file"):
        read_image(tmp_path / "folder.nii.gz")
    with pytest.raises(FormatError, match=r"a\.xyz: found an unknown file ending, expected one of \.nii\.gz, \.nii"):
        read_raw(tmp_path / "a.xyz")


def test_formats_are_imported_where_they_are_read() -> None:
    program = (
        "import sys, autoseg.data.io;"
        "print({'nibabel', 'SimpleITK', 'PIL', 'tifffile', 'torch'} & {name.split('.')[0] for name in sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"

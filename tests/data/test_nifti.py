"""NIfTI in and out: 48 orientations, exact affines, and files that are not what they say."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from autoseg.core.errors import FormatError
from autoseg.data.io import read_geometry, read_image, read_label, read_raw, write_volume

ORIENTATIONS = [
    "".join(letters)
    for axes in itertools.permutations(("RL", "AP", "SI"))
    for letters in itertools.product(*axes)  # one letter of each axis
]
CODES = {"sform": (2, 0), "qform": (0, 1), "both": (4, 1), "neither": (0, 0)}
SHAPE_IJK = (3, 4, 5)
SPACING_IJK = (0.7, 1.3, 4.1)


def make_affine(axcodes: str, *, oblique: bool = True) -> np.ndarray:
    """From file indices to RAS+ mm: the file's axes point to `axcodes`, then everything is turned by 15 degrees."""
    affine = np.eye(4)
    affine[:3, :3] = 0.0
    for file_axis, code in enumerate(axcodes):
        world = next(axis for axis, letters in enumerate(("RL", "AP", "SI")) if code in letters)
        affine[world, file_axis] = SPACING_IJK[file_axis] * (1 if code in "RAS" else -1)
    if oblique:
        x, y, z = np.array([1.0, -2.0, 3.0]) / np.sqrt(14.0)
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        angle = np.radians(15.0)
        affine[:3, :3] = (np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross) @ affine[:3, :3]
    affine[:3, 3] = (-31.51, 12.27, 701.3)
    return affine


def save(
    path: Path, voxels: np.ndarray, affine: np.ndarray | None = None, *, codes: str = "both", kind: type | None = None
) -> Path:
    """Writes a file in which only the form or forms of `codes` say where the voxels are."""
    affine = make_affine("LPS") if affine is None else affine
    image = (kind or nib.Nifti1Image)(voxels, affine)
    sform_code, qform_code = CODES[codes]
    image.set_qform(affine if qform_code else None, qform_code)
    image.set_sform(affine if sform_code else None, sform_code)
    if codes in ("qform", "neither"):
        image.header["srow_x"] = 99.0  # must not be used
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)
    return path


def make_label(dtype: type = np.uint8, shape: tuple[int, ...] = SHAPE_IJK) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 200, shape).astype(dtype)


def check_written(written: Path, source: Path, voxels: np.ndarray) -> None:
    """What was written has the voxels in the source's file order and the source's place, bit for bit."""
    one, other = nib.load(source), nib.load(written)
    assert other.shape == voxels.shape
    assert np.array_equal(np.asarray(other.dataobj), voxels)
    assert other.get_data_dtype().newbyteorder("=") == voxels.dtype
    assert np.array_equal(other.affine, one.affine)
    for form in ("get_sform", "get_qform"):
        (matrix, code), (expected, expected_code) = getattr(other, form)(coded=True), getattr(one, form)(coded=True)
        assert code == expected_code
        assert (matrix is None) == (expected is None)
        assert matrix is None or np.array_equal(matrix, expected)
    assert other.header.get_zooms() == one.header.get_zooms()[: other.ndim]
    assert other.header.get_xyzt_units() == one.header.get_xyzt_units()


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_label_round_trip_voxel_for_voxel_and_bit_for_bit(axcodes: str, codes: str, tmp_path: Path) -> None:
    ending = ".nii" if codes == "sform" else ".nii.gz"
    voxels = make_label()
    source = save(tmp_path / f"source{ending}", voxels, make_affine(axcodes), codes=codes)
    label, geometry = read_label(source)
    expected = nib.as_closest_canonical(nib.load(source))
    assert np.array_equal(label, np.asarray(expected.dataobj).T)
    assert label.flags.c_contiguous
    assert np.array_equal(geometry.affine, nib.load(source).affine)
    np.testing.assert_allclose(geometry.canonical_affine, expected.affine, atol=1e-4)
    if codes != "neither":
        assert geometry.file_axcodes == tuple(axcodes)
    image, image_geometry = read_image(source)
    assert image.dtype == np.float32
    assert image.flags.c_contiguous
    assert np.array_equal(image, label[None])
    assert image_geometry == geometry == read_geometry(source)
    write_volume(tmp_path / f"written{ending}", label, geometry, like=source)
    check_written(tmp_path / f"written{ending}", source, voxels)


def test_the_same_image_in_any_orientation_is_the_same_array(tmp_path: Path) -> None:
    base = nib.Nifti1Image(np.random.default_rng(1).normal(size=SHAPE_IJK).astype(np.float32), make_affine("RAS"))
    expected = np.asarray(base.dataobj).T[None]
    spacings = set()
    for axcodes in ORIENTATIONS:
        change = nib.orientations.ornt_transform(
            nib.io_orientation(base.affine), nib.orientations.axcodes2ornt(axcodes)
        )
        nib.save(base.as_reoriented(change), tmp_path / "a.nii")
        image, geometry = read_image(tmp_path / "a.nii")
        assert np.array_equal(image, expected)
        assert geometry.file_axcodes == tuple(axcodes)
        np.testing.assert_allclose(geometry.canonical_affine, base.affine, atol=1e-4)
        spacings.add(geometry.spacing_mm)
    assert spacings == {tuple(round(float(np.float32(spacing)), 7) for spacing in SPACING_IJK[::-1])}


def test_sform_wins_over_a_qform_that_says_something_else_and_both_are_kept(tmp_path: Path) -> None:
    voxels = make_label()
    image = nib.Nifti1Image(voxels, make_affine("LPS"))
    image.set_sform(make_affine("SRA"), 4)
    image.set_qform(make_affine("LPS"), 1)
    nib.save(image, tmp_path / "a.nii.gz")
    label, geometry = read_label(tmp_path / "a.nii.gz")
    assert geometry.file_axcodes == ("S", "R", "A")
    write_volume(tmp_path / "b.nii.gz", label, geometry, like=tmp_path / "a.nii.gz")
    check_written(tmp_path / "b.nii.gz", tmp_path / "a.nii.gz", voxels)


def test_sheared_affine_is_kept(tmp_path: Path) -> None:
    affine = make_affine("LPS")
    affine[:3, 2] += 0.4 * affine[:3, 1]  # a tilted gantry
    source = save(tmp_path / "a.nii.gz", make_label(), affine, codes="sform")
    label, geometry = read_label(source)
    write_volume(tmp_path / "b.nii.gz", label, geometry, like=source)
    check_written(tmp_path / "b.nii.gz", source, make_label())
    assert geometry.spacing_mm[0] == pytest.approx(np.linalg.norm(affine[:3, 2]))


def test_nifti2_and_its_double_precision_are_kept(tmp_path: Path) -> None:
    source = save(tmp_path / "a.nii.gz", make_label(np.int16), kind=nib.Nifti2Image)
    assert not np.array_equal(nib.load(source).affine, nib.load(source).affine.astype(np.float32))
    label, geometry = read_label(source)
    write_volume(tmp_path / "b.nii.gz", label, geometry, like=source)
    check_written(tmp_path / "b.nii.gz", source, make_label(np.int16))
    assert isinstance(nib.load(tmp_path / "b.nii.gz"), nib.Nifti2Image)


def test_big_endian_files(tmp_path: Path) -> None:
    source = save(tmp_path / "a.nii", make_label(np.int16))
    header = nib.load(source).header.as_byteswapped(">")
    header["vox_offset"] = 352
    source.write_bytes(header.binaryblock + bytes(4) + make_label(np.int16).astype(">i2").tobytes("F"))
    assert nib.load(tmp_path / "a.nii").get_data_dtype().byteorder == ">"
    label, geometry = read_label(tmp_path / "a.nii")
    assert label.dtype.isnative
    write_volume(tmp_path / "b.nii", label, geometry, like=tmp_path / "a.nii")
    check_written(tmp_path / "b.nii", tmp_path / "a.nii", make_label(np.int16))


def test_without_a_source_the_affine_is_written_as_both_forms(tmp_path: Path) -> None:
    source = save(tmp_path / "a.nii.gz", make_label(), make_affine("SLP"), codes="sform")
    label, geometry = read_label(source)
    write_volume(tmp_path / "b.nii.gz", label, geometry)
    written = nib.load(tmp_path / "b.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), make_label())
    assert np.array_equal(written.affine, nib.load(source).affine)
    np.testing.assert_allclose(written.get_qform(), written.affine, atol=1e-4)
    assert written.header["sform_code"] == written.header["qform_code"] == 1
    assert written.header.get_xyzt_units()[0] == "mm"


def test_the_header_of_the_image_does_not_colour_the_label_map(tmp_path: Path) -> None:
    image = nib.Nifti1Image(make_label(np.int16), make_affine("RAS"))
    image.header.set_slope_inter(0.5, -1024)
    image.header["cal_min"], image.header["cal_max"] = -1000, 3000
    image.header["descrip"] = b"name of a patient"
    image.header.set_intent("t test", (3,), name="t")
    nib.save(image, tmp_path / "a.nii.gz")
    label = make_label()
    write_volume(tmp_path / "b.nii.gz", label.T, read_geometry(tmp_path / "a.nii.gz"), like=tmp_path / "a.nii.gz")
    written = nib.load(tmp_path / "b.nii.gz")
    assert np.array_equal(written.get_fdata(), label)
    assert float(written.header["cal_min"]) == float(written.header["cal_max"]) == 0
    assert b"patient" not in written.header.binaryblock
    assert written.header.get_intent() == ("none", (), "")


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize(("unit", "per_mm"), [("micron", 1e3), ("meter", 1e-3), ("unknown", 1.0)])
def test_spacings_in_other_units_are_read_as_itk_reads_them(
    unit: str, per_mm: float, codes: str, tmp_path: Path
) -> None:
    affine = np.diag([per_mm] * 3 + [1.0]) @ make_affine("LPS", oblique=False)
    voxels = make_label()
    path = save(tmp_path / "image.nii.gz", voxels, affine, codes=codes)
    image = nib.load(path)
    image.header.set_xyzt_units(unit)
    nib.save(image, path)
    geometry = read_geometry(path)
    known = sitk.ReadImage(str(path))
    assert np.allclose(geometry.spacing_mm[::-1], known.GetSpacing(), rtol=1e-6)
    assert np.allclose(geometry.spacing_mm[::-1], SPACING_IJK, rtol=1e-6)
    label_map, _ = read_label(path)
    written = tmp_path / "label.nii.gz"
    write_volume(written, label_map, geometry, like=path)
    assert np.allclose(sitk.ReadImage(str(written)).GetSpacing(), known.GetSpacing(), rtol=1e-6)
    assert np.allclose(read_geometry(written).affine, geometry.affine, rtol=1e-6)
    label = nib.load(written)
    assert np.array_equal(np.asarray(label.dataobj), voxels)
    if codes != "neither":
        assert [int(label.header[name]) for name in ("sform_code", "qform_code")] == list(CODES[codes])


def test_slices_and_nifti2_in_other_units_stay_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "image.nii"
    image = nib.Nifti2Image(make_label(shape=(5, 6)), np.diag([250.0, 300.0, 1.0, 1.0]))
    image.header.set_xyzt_units("micron")
    nib.save(image, path)
    label_map, geometry = read_label(path)
    assert geometry.spacing_mm[1:] == (0.3, 0.25)
    write_volume(tmp_path / "label.nii", label_map, geometry, like=path)
    written = nib.load(tmp_path / "label.nii")
    assert isinstance(written, nib.Nifti2Image)
    assert written.shape == (5, 6)
    assert written.header.get_xyzt_units()[0] == "mm"


def test_writing_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    source = save(tmp_path / "a.nii.gz", make_label())
    label, geometry = read_label(source)
    write_volume(source, label + 1, geometry, like=source)
    assert np.array_equal(read_label(source)[0], label + 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.nii.gz"]


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "SRA"])
def test_2d_image_is_one_slice_and_comes_back_with_two_axes(axcodes: str, tmp_path: Path) -> None:
    voxels = make_label(shape=(3, 4))
    source = save(tmp_path / "a.nii.gz", voxels, make_affine(axcodes, oblique=False), codes="sform")
    assert nib.load(source).shape == (3, 4)
    image, geometry = read_image(source)
    label, _ = read_label(source)
    assert geometry.file_shape == (3, 4, 1)
    assert image.shape == (1, *geometry.shape)
    assert sorted(label.ravel()) == sorted(voxels.ravel())
    write_volume(tmp_path / "b.nii.gz", label, geometry, like=source)
    check_written(tmp_path / "b.nii.gz", source, voxels)


@pytest.mark.parametrize("shape", [(3, 4, 5, 2), (3, 4, 5, 1, 2)], ids=["4D", "5D"])
def test_several_channels_in_one_file(shape: tuple[int, ...], tmp_path: Path) -> None:
    voxels = np.arange(120, dtype=np.float32).reshape(shape)
    source = save(tmp_path / "a.nii.gz", voxels, make_affine("PIL"))
    raw = read_raw(source)
    image, geometry = read_image(source)
    assert raw.n_channels == 2
    assert image.shape == (2, *geometry.shape)
    for channel in range(2):
        alone = save(tmp_path / "c.nii.gz", voxels.reshape(3, 4, 5, 2)[..., channel], make_affine("PIL"))
        expected, other = read_image(alone)
        assert np.array_equal(image[channel], expected[0])
        assert other == geometry
    with pytest.raises(FormatError, match=r"a\.nii\.gz: found 2 volumes in a label map, expected 1"):
        read_label(source)
    label = (image[1] > 50).astype(np.uint8)
    write_volume(tmp_path / "b.nii.gz", label, geometry, like=source)
    written = nib.load(tmp_path / "b.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), voxels.reshape(3, 4, 5, 2)[..., 1] > 50)
    assert np.array_equal(written.affine, nib.load(source).affine)


def test_a_fourth_axis_of_one_is_no_second_channel(tmp_path: Path) -> None:
    source = save(tmp_path / "a.nii.gz", make_label(shape=(3, 4, 5, 1)))
    assert read_image(source)[0].shape == (1, 5, 4, 3)
    assert read_label(source)[0].shape == (5, 4, 3)


@pytest.mark.parametrize("shape", [(7,), (3, 4, 5, 2, 2), (3, 4, 5, 1, 2, 2)], ids=str)
def test_shapes_that_are_no_images(shape: tuple[int, ...], tmp_path: Path) -> None:
    source = save(tmp_path / "a.nii.gz", make_label(shape=shape), codes="sform")
    with pytest.raises(FormatError, match=r"a\.nii\.gz: found the shape .*, expected 2, 3 or 4 axes"):
        read_image(source)


def test_scaled_image(tmp_path: Path) -> None:
    image = nib.Nifti1Image(make_label(np.int16), make_affine("RAS"))
    image.header.set_slope_inter(0.5, -1024)
    image.to_filename(tmp_path / "a.nii.gz")
    stored = nib.load(tmp_path / "a.nii.gz").dataobj
    assert (stored.slope, stored.inter) == (0.5, -1024)
    read, _ = read_image(tmp_path / "a.nii.gz")
    assert np.array_equal(read[0].T, stored.get_unscaled() * np.float32(0.5) - 1024)
    assert read.min() < -900


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.int32, np.int64, np.uint64, np.float32])
def test_label_types(dtype: type, tmp_path: Path) -> None:
    voxels: np.ndarray = (make_label() % 100).astype(dtype)
    image = nib.Nifti1Image(voxels, make_affine("RAS"), dtype=dtype)
    nib.save(image, tmp_path / "a.nii.gz")
    label, _ = read_label(tmp_path / "a.nii.gz")
    assert np.issubdtype(label.dtype, np.integer)
    assert np.array_equal(label, voxels.T)
    np.bincount(label.ravel())  # refuses uint64


@pytest.mark.parametrize(
    ("value", "shown"), [(0.5, "0.5"), (np.nan, "nan"), (np.inf, "inf"), (1e12, "1e[+]12"), (1.00001, "1.00001")]
)
def test_labels_that_are_not_whole_numbers(value: float, shown: str, tmp_path: Path) -> None:
    voxels = make_label().astype(np.float64)
    voxels[1, 2, 3] = voxels[0, 0, 0] = value
    source = save(tmp_path / "a.nii.gz", voxels)
    with pytest.raises(FormatError, match=rf"a\.nii\.gz: found 2 voxels such as {shown}, expected whole numbers"):
        read_label(source)


def test_voxels_that_are_no_numbers(tmp_path: Path) -> None:
    colours = np.zeros(SHAPE_IJK, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    for name, voxels in {"rgb": colours, "complex": make_label().astype(np.complex64)}.items():
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / f"{name}.nii.gz")
        with pytest.raises(FormatError, match=rf"{name}\.nii\.gz: found voxels of type .*, expected numbers"):
            read_image(tmp_path / f"{name}.nii.gz")


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("a.nii.gz", cut),
        ("a.nii.gz", lambda data: data[:-64]),
        ("a.nii.gz", lambda data: data[:100]),
        ("a.nii", cut),
        ("a.nii", lambda data: data[:200]),
        ("a.nii.gz", lambda data: b""),
        ("a.nii", lambda data: b""),
        ("a.nii.gz", lambda data: b"version https://git-lfs.github.com/spec/v1\n" * 20),
        ("a.nii", lambda data: b"version https://git-lfs.github.com/spec/v1\n" * 20),
        ("a.nii.gz", lambda data: gzip.compress(b"text " * 200)),
        ("a.nii.gz", gzip.decompress),
    ],
    ids=[
        "gz cut in half",
        "gz without its end",
        "gz cut in the header",
        "nii cut in half",
        "nii cut in the header",
        "gz empty",
        "nii empty",
        "text as gz",
        "text as nii",
        "compressed text",
        "not compressed",
    ],
)
def test_broken_files_are_named(name: str, change, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    noise = np.random.default_rng(2).integers(0, 2**15, (20, 20, 20)).astype(np.int16)
    source = save(tmp_path / name, noise)
    assert read_image(source)[0].shape == (1, 20, 20, 20)
    source.write_bytes(change(source.read_bytes()))
    for read in (read_image, read_label):
        with pytest.raises(FormatError, match=f"^{source}: "):
            read(source)


def test_a_surface_file_is_no_volume(tmp_path: Path) -> None:
    axis = nib.cifti2.BrainModelAxis.from_mask(np.ones((2, 2, 2)), affine=np.eye(4), name="thalamus_left")
    header = nib.cifti2.Cifti2Header.from_axes((nib.cifti2.ScalarAxis(["a"]), axis))
    nib.save(nib.Cifti2Image(np.zeros((1, 8), np.float32), header), tmp_path / "a.dscalar.nii")
    with pytest.raises(FormatError, match=r"a\.dscalar\.nii: found a Cifti2Image, expected a NIfTI volume"):
        read_image(tmp_path / "a.dscalar.nii")


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_affines_that_say_nothing(value: float, tmp_path: Path) -> None:
    source = save(tmp_path / "a.nii", make_label(), codes="sform")
    data = bytearray(source.read_bytes())
    data[280:296] = np.full(4, value, np.float32).tobytes()  # srow_x
    source.write_bytes(data)
    with pytest.raises(FormatError, match=r"a\.nii: found the affine .*, expected a finite, invertible 4x4 matrix"):
        read_geometry(source)


def zero_spacing(source: Path) -> Path:
    data = bytearray(source.read_bytes())
    data[88:92] = bytes(4)  # pixdim of k
    source.write_bytes(data)
    return source


@pytest.mark.parametrize("codes", ["qform", "neither"])
def test_zero_spacing_is_refused_where_the_place_of_the_voxels_depends_on_it(codes: str, tmp_path: Path) -> None:
    source = zero_spacing(save(tmp_path / "a.nii", make_label(), codes=codes))
    with pytest.raises(FormatError, match=r"a\.nii: found the spacing \[0\.69.*, 0\.0\] .*, expected more than 0"):
        read_geometry(source)


def test_zero_spacing_beside_a_good_sform_is_no_harm(tmp_path: Path) -> None:
    source = zero_spacing(save(tmp_path / "a.nii", make_label(), codes="sform"))
    assert read_geometry(source).spacing_mm == pytest.approx(SPACING_IJK[::-1])


def test_a_single_slice_needs_no_thickness(tmp_path: Path) -> None:
    source = zero_spacing(save(tmp_path / "a.nii", make_label(shape=(3, 4, 1)), codes="qform"))
    assert read_geometry(source).file_shape == (3, 4, 1)

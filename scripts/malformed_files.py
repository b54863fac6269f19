"""Malformed datasets: files that are no images, and headers that cannot be right."""

from __future__ import annotations

import gzip
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from malformed_entry import ERROR, GRID, IMAGE, LABEL, NOTE, WARNING, add, malformed
from small_datasets import (
    AFFINE,
    SHAPE,
    change,
    decathlon,
    dicom,
    folders,
    make_image,
    make_label,
    nnunet,
    pictures,
    read_voxels,
    save_series,
    save_volume,
)

# -- files that are no images ------------------------------------------------------------------------------------------

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 34478\n"
HTML = "<!DOCTYPE html>\n<html><head><title>Please log in</title></head><body>Session expired.</body></html>\n"


def cut(path: Path, fraction: float = 0.5) -> None:
    """Leaves the first part of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])


def replace_with_folder(path: Path) -> None:
    """Leaves a folder with a file in it."""
    path.unlink()
    path.mkdir()
    (path / "readme.txt").write_text("unpacked")


def save_complex(path: Path) -> None:
    """Numbers with an imaginary part, as MR scanners reconstruct them."""
    save_volume(path, read_voxels(path).astype(np.complex64))


def save_rgb(path: Path) -> None:
    """A colour for each voxel, as programs write pictures of results."""
    colours = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    colours["R"] = np.clip(read_voxels(path), 0, 255)
    save_volume(path, colours)


def unpack(path: Path) -> None:
    """The name still says that it is compressed."""
    path.write_bytes(gzip.decompress(path.read_bytes()))


def damage_middle(path: Path) -> None:
    """Some bytes in the middle are others, as after a fault of a disk."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 40] = bytes(value ^ 0x5A for value in data[middle : middle + 40])
    path.write_bytes(data)


NO_IMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated": ("ends in the middle of its voxels", cut, ""),
    "truncated_header": ("ends within its header", lambda path: cut(path, 0.05), ""),
    "empty": ("has no byte", lambda path: path.write_bytes(b""), "empty"),
    "html": ("is a page of a download portal that asks for a password", lambda path: path.write_text(HTML), ""),
    "html_gz": ("is a web page in gzip", lambda path: path.write_bytes(gzip.compress(HTML.encode())), ""),
    "not_gzip": ("is called .nii.gz and not compressed", unpack, ""),
    "damaged": ("has other bytes in the middle than were written", damage_middle, ""),
    "lfs_pointer": ("is a pointer that git-lfs has not replaced", lambda p: p.write_text(LFS_POINTER), "git"),
    "folder": ("is a folder", replace_with_folder, ""),
    "complex": ("has complex numbers", save_complex, "complex"),
    "rgb": ("has a colour for each voxel", save_rgb, ""),
}


def _add_no_images() -> None:
    for name, (problem, spoil, word) in NO_IMAGES.items():
        for what, kind in (("image", IMAGE), ("label", LABEL)):

            def make(folder: Path, *, what: str = what, spoil: Callable[[Path], object] = spoil) -> None:
                tree = nnunet(folder)
                spoil(tree.image() if what == "image" else tree.label())

            said = "image" if what == "image" else "label map"
            add(
                make,
                name=f"{what}_{name}",
                problem=f"One {said} {problem}.",
                dataset="dataset",
                severity=ERROR,
                kind="" if name == "folder" else kind,
                words=("case_1", *([word] if word else [])),
                mendable=False,
            )


_add_no_images()


def header_bytes(path: Path) -> bytearray:
    """A NIfTI file without compression."""
    data = path.read_bytes()
    return bytearray(gzip.decompress(data) if path.name.endswith(".gz") else data)


def write_header(path: Path, data: bytes | bytearray) -> None:
    """Writes what `header_bytes` gave."""
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)


def patch_header(path: Path, offset: int, layout: str, *values: float) -> None:
    """Overwrites fields of a NIfTI-1 header, which nibabel would not write."""
    data = header_bytes(path)
    struct.pack_into(layout, data, offset, *values)
    write_header(path, data)


def claim_terabytes(path: Path) -> None:
    """Sizes of 32,767 voxels in double precision."""
    patch_header(path, 40, "<8h", 3, 32767, 32767, 32767, 1, 1, 1, 1)
    patch_header(path, 70, "<2h", 64, 64)


@malformed(ERROR, IMAGE, "case_1")
def image_claims_terabytes(folder: Path) -> None:
    """The header of an image claims 256 TiB of voxels, and the file has a few."""
    claim_terabytes(nnunet(folder, ending=".nii").image())


@malformed(ERROR, IMAGE, "case_1")
def image_claims_terabytes_gz(folder: Path) -> None:
    """The header of a compressed image claims 256 TiB of voxels, and the file has a few."""
    claim_terabytes(nnunet(folder).image())


@malformed(ERROR, LABEL, "case_1")
def label_claims_terabytes(folder: Path) -> None:
    """The header of a label map claims 256 TiB of voxels, and the file has a few."""
    claim_terabytes(nnunet(folder).label())


@malformed(ERROR, IMAGE, "case_1")
def image_negative_size(folder: Path) -> None:
    """The header of an image has a negative number of voxels."""
    patch_header(nnunet(folder).image(), 40, "<4h", 3, 16, -14, 12)


@malformed(ERROR, IMAGE, "case_1")
def image_mixed_endianness(folder: Path) -> None:
    """Half of an image's header is in the other byte order."""
    tree = nnunet(folder)
    data = header_bytes(tree.image())
    struct.pack_into(">8h", data, 40, 3, *SHAPE, 1, 1, 1, 1)
    write_header(tree.image(), data)


@malformed(ERROR, IMAGE, "case_1")
def image_unknown_type(folder: Path) -> None:
    """The header of an image has a type of voxels that NIfTI does not know."""
    patch_header(nnunet(folder).image(), 70, "<2h", 9999, 16)


@malformed(ERROR, IMAGE, "case_1")
def image_offset_beyond_end(folder: Path) -> None:
    """The header of an image says that its voxels begin after the end of the file."""
    patch_header(nnunet(folder, ending=".nii").image(), 108, "<f", 1e9)


@malformed(ERROR, IMAGE, "case_1")
def nrrd_without_its_data(folder: Path) -> None:
    """A .nhdr names a file of voxels that is not there."""
    tree = folders(folder, ending=".nhdr", label_ending=".nrrd")
    next(tree.image().parent.glob("case_1.raw*")).unlink()


@malformed(ERROR, IMAGE, "case_1")
def nrrd_truncated(folder: Path) -> None:
    """One NRRD image ends in the middle of its voxels."""
    cut(folders(folder, ending=".nrrd", label_ending=".nrrd").image())


@malformed(ERROR, IMAGE, "case_1", "outside")
def mhd_points_outside(folder: Path) -> None:
    """A .mhd takes its voxels from a file outside of the dataset."""
    tree = folders(folder, ending=".mhd", label_ending=".mha")
    (folder / "outside").mkdir()
    shutil.move(tree.image().with_suffix(".raw"), folder / "outside" / "case_1.raw")
    text = tree.image().read_text().replace("ElementDataFile = ", "ElementDataFile = ../../outside/")
    tree.image().write_text(text)


@malformed(ERROR, IMAGE, "case_1")
def mha_without_size(folder: Path) -> None:
    """The header of a .mha has no DimSize."""
    tree = folders(folder, ending=".mha", label_ending=".mha")
    tree.image().write_bytes(tree.image().read_bytes().replace(b"DimSize", b"DimSeiz"))


@malformed(ERROR, IMAGE, "case_1")
def tiff_with_unequal_pages(folder: Path) -> None:
    """The pages of a TIFF differ in size."""
    import tifffile

    tree = folders(folder, ending=".tif", label_ending=".tif")
    with tifffile.TiffWriter(tree.image()) as writer:
        for size in (14, 14, 20):
            writer.write(np.zeros((size, 16), np.int16), contiguous=False)


@malformed(ERROR, LABEL, "case_1")
def tiff_label_truncated(folder: Path) -> None:
    """One TIFF label map ends in the middle of its voxels."""
    cut(folders(folder, ending=".tif", label_ending=".tif").label())


@malformed(ERROR, IMAGE, "case_1")
def png_bomb(folder: Path) -> None:
    """A PNG of 70 bytes claims 100,000 x 100,000 pixels."""
    path = pictures(folder).image()
    data = bytearray(path.read_bytes()[:70])
    struct.pack_into(">2I", data, 16, 100_000, 100_000)
    path.write_bytes(data)


@malformed(ERROR, LABEL, "case_1", "colours")
def png_label_in_many_colours(folder: Path) -> None:
    """The mask of a picture has several colours."""
    from PIL import Image

    path = pictures(folder).label()
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 128]], np.uint8)
    Image.fromarray(colours[np.asarray(Image.open(path))]).save(path)


@malformed(ERROR, LABEL, "case_1", "JPEG")
def jpeg_label(folder: Path) -> None:
    """A mask has been saved as JPEG, which changes values."""
    from PIL import Image

    path = pictures(folder).label()
    Image.fromarray(np.asarray(Image.open(path)) * np.uint8(100)).save(path.with_suffix(".jpg"), quality=50)
    path.unlink()


@malformed(ERROR, IMAGE, "case_1", "2 series")
def dicom_mixed_series(folder: Path) -> None:
    """The folder of an image has the slices of two series."""
    save_series(dicom(folder).image(), make_image(7), series=7, prefix="b")


@malformed(ERROR, IMAGE, "case_1", "gaps")
def dicom_missing_slice(folder: Path) -> None:
    """A slice in the middle of a series is missing."""
    (dicom(folder).image() / "005.dcm").unlink()


@malformed(ERROR, IMAGE, "case_1", "005.dcm")
def dicom_truncated_slice(folder: Path) -> None:
    """A slice of a series ends in the middle of its pixels."""
    cut(dicom(folder).image() / "005.dcm", 0.8)


# -- geometry ----------------------------------------------------------------------------------------------------------


def move(path: Path, voxels: float) -> None:
    """Shifts the header along the first axis."""
    affine = AFFINE.copy()
    affine[0, 3] += voxels
    save_volume(path, read_voxels(path), affine)


@malformed(ERROR, GRID, "case_1", "shape")
def label_of_other_shape(folder: Path) -> None:
    """One label map has a slice less than its image."""
    change(nnunet(folder).label(), lambda voxels: voxels[..., :-1])


@malformed(ERROR, IMAGE, "case_1", "shape")
def channel_of_other_shape(folder: Path) -> None:
    """The second channel of a case has a slice less than the first."""
    change(nnunet(folder, channels=("T1", "T2")).image(channel=1), lambda voxels: voxels[..., :-1])


@malformed(ERROR, GRID, "case_1", "affine")
def label_moved(folder: Path) -> None:
    """The header of a label map puts it half a voxel from its image."""
    move(nnunet(folder).label(), 0.5)


@malformed(ERROR, IMAGE, "case_1", "affine", mendable=True)
def channel_moved(folder: Path) -> None:
    """The header of a channel puts it half a voxel from the first."""
    move(nnunet(folder, channels=("T1", "T2")).image(channel=1), 0.5)


@malformed(NOTE, "header of the label map a little off", "case_1", mendable=True)
def label_jitter(folder: Path) -> None:
    """The header of a label map puts it a twentieth of a voxel from its image."""
    move(nnunet(folder).label(), 0.05)


@malformed(NOTE, "", "case_1", mendable=True)
def channel_jitter(folder: Path) -> None:
    """The header of a channel puts it a twentieth of a voxel from the first."""
    move(nnunet(folder, channels=("T1", "T2")).image(channel=1), 0.05)


@malformed(ERROR, GRID, "case_1")
def label_flipped(folder: Path) -> None:
    """The header of a label map counts from left to right, that of the image from right to left."""
    save_volume((tree := nnunet(folder)).label(), read_voxels(tree.label()), np.diag([1.0, -1.0, 3.0, 1.0]))


@malformed(ERROR, GRID, "case_1", "shape")
def label_transposed(folder: Path) -> None:
    """Rows and columns of a label map are exchanged, and its header is the image's."""
    change(nnunet(folder).label(), lambda voxels: voxels.swapaxes(0, 1))


@malformed(ERROR, GRID, "case_1", "shape")
def label_in_array_order(folder: Path) -> None:
    """A label map was written as (z, y, x) with the identity as its affine, as it is forgotten in scripts."""
    path = nnunet(folder).label()
    save_volume(path, read_voxels(path).T, np.eye(4))


@malformed(ERROR, GRID, "case_1", "affine")
def label_of_another_patient(folder: Path) -> None:
    """A label map of the same shape is of another patient, and lies elsewhere."""
    affine = AFFINE.copy()
    affine[:3, 3] = (31.0, -12.0, 455.0)
    save_volume(nnunet(folder).label(), make_label(2), affine)


@malformed(ERROR, GRID, "case_1", "affine")
def label_without_spacing(folder: Path) -> None:
    """A label map was saved with voxels of 1 mm."""
    path = nnunet(folder).label()
    save_volume(path, read_voxels(path), np.diag([-1.0, -1.0, 1.0, 1.0]))


@malformed(ERROR, IMAGE, "case_1")
def channels_flipped(folder: Path) -> None:
    """The second channel of a case counts from left to right, the first from right to left."""
    path = nnunet(folder, channels=("T1", "T2")).image(channel=1)
    save_volume(path, read_voxels(path), np.diag([1.0, -1.0, 3.0, 1.0]))


def set_pixdim(path: Path, *spacing: float) -> None:
    """A spacing in the header, which its affine is then made from."""
    patch_header(path, 254, "<h", 0)  # no sform
    patch_header(path, 252, "<h", 1)
    patch_header(path, 80, "<3f", *spacing)


@malformed(ERROR, IMAGE, "case_1", "spacing")
def image_spacing_zero(folder: Path) -> None:
    """The header of an image says that its slices lie 0 mm apart."""
    set_pixdim(nnunet(folder).image(), 1, 1, 0)


@malformed(ERROR, LABEL, "case_1", "spacing")
def label_spacing_zero(folder: Path) -> None:
    """The header of a label map says that its slices lie 0 mm apart."""
    set_pixdim(nnunet(folder).label(), 1, 1, 0)


@malformed(ERROR, IMAGE, "case_1")
def image_spacing_negative(folder: Path) -> None:
    """The header of an image has a negative spacing, and no other place to tell it."""
    set_pixdim(nnunet(folder).image(), 1, 1, -3)


@malformed(ERROR, IMAGE, "case_1")
def image_spacing_nan(folder: Path) -> None:
    """The header of an image has a spacing that is no number."""
    set_pixdim(nnunet(folder).image(), 1, 1, float("nan"))


@malformed(ERROR, IMAGE, "case_1")
def image_affine_infinite(folder: Path) -> None:
    """The affine of an image has an infinite entry."""
    patch_header(nnunet(folder).image(), 280, "<f", float("inf"))


@malformed(ERROR, IMAGE, "case_1")
def image_affine_singular(folder: Path) -> None:
    """The affine of an image has two axes that are the same."""
    patch_header(nnunet(folder).image(), 280, "<4f", -1, -1, 0, 0)
    patch_header(folder / "dataset" / "imagesTr" / "case_1_0000.nii.gz", 296, "<4f", 0, 0, 0, 0)


def _with_spacing(folder: Path, factor: float) -> None:
    tree = nnunet(folder)
    for path in (tree.image(), tree.label()):
        save_volume(path, read_voxels(path), np.diag([-factor, -factor, 3 * factor, 1.0]))


@malformed(WARNING, "unusual spacing", "case_1")
def spacing_of_a_millionth(folder: Path) -> None:
    """Image and label map of a case have a spacing of 1e-6 mm, which only a microscope has, and the others of 1 mm."""
    _with_spacing(folder, 1e-6)


@malformed(ERROR, "impossible spacing", "case_1", "spacing")
def spacing_of_a_million(folder: Path) -> None:
    """Image and label map of a case have a spacing of 1e6 mm."""
    _with_spacing(folder, 1e6)


@malformed(WARNING, "a single slice among volumes", "case_1")
def one_slice_among_volumes(folder: Path) -> None:
    """One case has a single slice, the others twelve."""
    tree = nnunet(folder)
    change(tree.image(), lambda voxels: voxels[..., 5:6])
    change(tree.label(), lambda voxels: voxels[..., 5:6])


@malformed(WARNING, "a single slice among volumes", "case_1")
def picture_among_volumes(folder: Path) -> None:
    """One case has two axes, the others three."""
    tree = nnunet(folder)
    change(tree.image(), lambda voxels: voxels[..., 5])
    change(tree.label(), lambda voxels: voxels[..., 5])


@malformed(ERROR, IMAGE, "case_1", "channels")
def time_series(folder: Path) -> None:
    """One image has three time points, the others one."""
    change(nnunet(folder).image(), lambda voxels: np.stack([voxels, voxels + 1, voxels - 1], axis=-1))


@malformed(ERROR, LABEL, "case_1", "volumes")
def label_with_four_axes(folder: Path) -> None:
    """One label map has a volume for each label."""
    change(nnunet(folder).label(), lambda voxels: np.stack([voxels == 1, voxels == 2], axis=-1).astype(np.uint8))


@malformed(ERROR, IMAGE, "case_1", "channels")
def too_few_channels_in_one_file(folder: Path) -> None:
    """One image of the Decathlon has one channel, the list and the others two."""
    change(decathlon(folder, channels=("FLAIR", "T1")).image(), lambda voxels: voxels[..., 0])

"""Reading and writing images.

A format is an entry in `READERS`, and in `WRITERS` where label maps are written in it. What comes out is canonical
(Z, Y, X), what is written has the axes, the affine and the header of the image that it belongs to. Only the modules of
the formats know the files' (x, y, z) order.
"""

from __future__ import annotations

import glob
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoseg.core.errors import FormatError, list_some
from autoseg.core.geometry import Geometry
from autoseg.data.dicom import holds_dicom, read_dicom_file, read_dicom_folder
from autoseg.data.itk import read_itk, write_itk
from autoseg.data.nifti import read_nifti, write_nifti
from autoseg.data.pictures import read_picture, write_picture
from autoseg.data.raw import RawImage, Writer
from autoseg.data.soft_masks import halve, has_grey_borders
from autoseg.data.tiff import read_tiff, sidecars, write_tiff

__all__ = [
    "READERS",
    "WRITERS",
    "RawImage",
    "adopt_place",
    "case_name",
    "file_ending",
    "is_image",
    "output_ending",
    "parts_of",
    "read_geometry",
    "read_image",
    "read_label",
    "read_raw",
    "write_volume",
]

READERS: dict[str, Callable[[Path], RawImage]] = {
    ".nii.gz": read_nifti,
    ".nii": read_nifti,
    ".nrrd": read_itk,
    ".nhdr": read_itk,
    ".mha": read_itk,
    ".mhd": read_itk,
    ".dcm": read_dicom_file,
    ".ome.tiff": read_tiff,
    ".ome.tif": read_tiff,
    ".tiff": read_tiff,
    ".tif": read_tiff,
    ".png": read_picture,
    ".bmp": read_picture,
    ".gif": read_picture,
    ".jpeg": read_picture,
    ".jpg": read_picture,
}
WRITERS: dict[str, Writer] = {
    ".nii.gz": write_nifti,
    ".nii": write_nifti,
    ".nrrd": write_itk,
    ".mha": write_itk,
    ".ome.tiff": write_tiff,
    ".ome.tif": write_tiff,
    ".tiff": write_tiff,
    ".tif": write_tiff,
    ".png": write_picture,
    ".bmp": write_picture,
    ".gif": write_picture,
}

NEARLY_WHOLE = 0.01
"""Resampling, scaling by a header's slope and single precision leave so much beside a whole number, and little more."""

GIT_LFS = b"version https://git-lfs"

# Formats that label maps are not written in: JPEG changes values, the others are several files.
_WRITTEN_INSTEAD = {".jpg": ".png", ".jpeg": ".png", ".nhdr": ".nrrd", ".mhd": ".mha", ".dcm": ".nii.gz"}


def file_ending(path: Path | str) -> str | None:
    """The ending of a readable image, such as ".nii.gz", the longest that fits, or None for any other file."""
    name = str(path).lower()
    return max((ending for ending in READERS if name.endswith(ending)), key=len, default=None)


def is_image(path: Path) -> bool:
    """Whether this looks like an image: a file with a known ending, or a folder with DICOM files."""
    return holds_dicom(path) if path.is_dir() else file_ending(path) is not None


def case_name(path: Path | str) -> str:
    """The file's name without its image ending; the whole name of a folder."""
    name = Path(path).name
    ending = file_ending(name)
    if ending:
        return name[: -len(ending)]
    return name if Path(path).is_dir() else Path(name).stem


def parts_of(path: Path) -> list[Path]:
    """The files that an image is read from: in a folder all, the voxels beside a header, the spacing beside a TIFF."""
    if path.is_dir():
        return sorted(path.iterdir())
    ending = file_ending(path)
    if ending in (".mhd", ".nhdr"):
        return sorted({path, *path.parent.glob(f"{glob.escape(path.stem)}.*")})
    return [path, *sidecars(path)] if ending and READERS[ending] is read_tiff else [path]


def output_ending(image: Path) -> str:
    """The ending that the label map of an image gets: the image's own, or of a format that can hold label maps.

    Raises:
        FormatError: of a format that autoseg does not read.
    """
    if _is_folder(image):
        return ".nii.gz"
    ending = _known_ending(image)
    return _WRITTEN_INSTEAD.get(ending, ending)


def read_raw(path: Path) -> RawImage:
    """Opens an image without reading its voxels.

    Args:
        path: a file, or the folder of one DICOM series.

    Raises:
        FormatError: missing, unreadable, or of a format that autoseg does not read.
    """
    if _is_folder(path):
        return read_dicom_folder(path)
    ending = _known_ending(path)
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    _refuse_pointer(path)
    return READERS[ending](path)


def _refuse_pointer(path: Path) -> None:
    """A few lines that say where a file is, in place of the file."""
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(GIT_LFS)) == GIT_LFS
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error})") from error
    if is_pointer:
        raise FormatError(f"{path}: found a pointer of Git LFS in place of the file; 'git lfs pull' fetches it")


def _is_folder(path: Path) -> bool:
    return path.is_dir() and file_ending(path) in (None, ".dcm")


def _known_ending(path: Path) -> str:
    ending = file_ending(path)
    if ending is None:
        raise FormatError(f"{path}: found an unknown file ending, expected one of {', '.join(READERS)}")
    return ending


def read_geometry(path: Path) -> Geometry:
    """Where the voxels of an image are, from its header alone."""
    return read_raw(path).geometry


def read_image(path: Path) -> tuple[NDArray[np.float32], Geometry]:
    """Reads an image.

    Returns:
        (C, Z, Y, X) float32 in canonical orientation, contiguous, and its geometry.

    Raises:
        FormatError: missing, unreadable, or not numbers.
    """
    raw = read_raw(path)
    return raw.load_float(), raw.geometry


def read_label(path: Path, *, rounded: bool = False, halved: bool = False) -> tuple[NDArray, Geometry]:
    """Reads a label map.

    Args:
        path: of the file.
        rounded: values within `NEARLY_WHOLE` of a whole number are taken for it.
        halved: of a mask in black and white with grey borders, what is brighter than half is 255, the rest 0.

    Returns:
        (Z, Y, X) integers in canonical orientation, contiguous, and its geometry.

    Raises:
        FormatError: missing, unreadable, more than one volume, several colours, values that are not whole numbers, or
            that a compression has changed; or nothing that can be halved.
    """
    raw = read_raw(path)
    if raw.load_label is not None:
        label = np.ascontiguousarray(raw.load_label())
    elif raw.n_channels == 1:
        label = np.ascontiguousarray(raw.load()[0])
    else:
        raise FormatError(
            f"{path}: found {raw.n_channels} volumes in a label map, expected 1; save time points as cases of their own"
        )
    if not np.issubdtype(label.dtype, np.integer):
        # Infinity is as near to its rounded self, and beyond int32 the conversion would make up a value.
        nearest = np.rint(label)
        with np.errstate(invalid="ignore"):
            whole = (np.abs(label - nearest) <= (NEARLY_WHOLE if rounded else 0)) & (np.abs(label) < 2**31)
        if not whole.all():
            n_broken, example = label.size - int(np.count_nonzero(whole)), float(label[~whole].flat[0])
            raise FormatError(
                f"{path}: found {n_broken} voxels such as {example:.9g}, expected whole numbers in a label map"
            )
        label = nearest.astype(np.int32)
    if halved:
        if not has_grey_borders(label, n_shades=0):
            raise FormatError(f"{path}: found no mask in black and white, expected one with grey borders")
        label = halve(label)
    elif raw.is_lossy:
        _refuse_changed_values(path, label)
    if label.dtype == np.uint64:
        label = label.astype(np.int64)  # numpy counts and indexes with signed integers only
    return label.astype(label.dtype.newbyteorder("="), copy=False), raw.geometry


def _refuse_changed_values(path: Path, label: NDArray) -> None:
    """Refuses more values than a compression that changes them can have left alone."""
    values = np.unique(label)
    if len(values) > 2:
        advice = "save the original label map as PNG"
        if has_grey_borders(label, n_shades=0):
            advice = f"'autoseg plan --fix' takes what is brighter than half for the structure, or {advice}"
        raise FormatError(
            f"{path}: found {len(values)} values such as {list_some([str(value) for value in values])} in a label map, "
            f"expected at most 2 in a JPEG, because its compression changes values; {advice}"
        )


def adopt_place(geometry: Geometry, file: Path, image: Path) -> Geometry:
    """Where a label map is that does not say so: where its image is.

    Programs write masks as pictures, or as TIFF without the spacing that the image has.

    Args:
        geometry: of the label map.
        file: the label map.
        image: that it belongs to.

    Returns:
        The image's geometry where that is TIFF of the same shape and the label map is a picture or TIFF with voxels of
        1 mm, which is what pictures without a spacing have; else the label map's own.
    """
    readers = [READERS.get(file_ending(path) or "") for path in (file, image)]
    if readers[1] is not read_tiff or readers[0] not in (read_tiff, read_picture) or set(geometry.spacing_mm) != {1.0}:
        return geometry
    try:
        place = read_geometry(image)
    except FormatError:
        return geometry  # That is told where the image is read.
    return place if place.shape == geometry.shape else geometry


def write_volume(
    path: Path, volume: NDArray, geometry: Geometry, *, like: Path | None = None, scale: float = 1.0
) -> None:
    """Writes a label map, or any volume, with the file axes and the exact affine of its image, atomically.

    TIFF holds no more of the affine than the spacing, other pictures nothing of it.

    Args:
        path: its ending says the format, one of `WRITERS`.
        volume: canonical (Z, Y, X), of a type that the format has.
        geometry: of the image.
        like: the image; where it is of the same format, its header gives what an affine alone does not hold.
        scale: what the stored values are multiplied by, so that integers can stand for fractions. NIfTI keeps the
            integers and the scale, other formats get float32.

    Raises:
        FormatError: of a format that autoseg does not write, or one that cannot hold the volume.
    """
    ending = file_ending(path)
    if ending not in WRITERS:
        raise FormatError(f"{path}: cannot be written, expected a name that ends in one of {', '.join(WRITERS)}")
    WRITERS[ending](path, volume, geometry, like=like, scale=scale)

"""Reading and writing images. The only module that knows the files' (x, y, z) order.

A format is an entry in `READERS`. What comes out is canonical (Z, Y, X), what is written has the axes, the affine and
the header of the image that it belongs to.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.core.errors import FormatError, first_line
from autoseg.core.geometry import Geometry, from_canonical, make_geometry, to_canonical
from autoseg.core.serialize import atomic_path


@dataclass(frozen=True, kw_only=True)
class RawImage:
    """What a reader returns.

    Attributes:
        geometry: of the volume.
        n_channels: volumes stored in the file.
        load: reads the voxels as stored, canonical (C, Z, Y, X).
    """

    geometry: Geometry
    n_channels: int
    load: Callable[[], NDArray]


def file_ending(path: Path | str) -> str | None:
    """The ending of a readable image, such as ".nii.gz", or None for any other file."""
    name = str(path).lower()
    return next((ending for ending in READERS if name.endswith(ending)), None)


def case_name(path: Path | str) -> str:
    """The file's name without its image ending."""
    name = Path(path).name
    ending = file_ending(name)
    return name[: -len(ending)] if ending else Path(name).stem


def read_raw(path: Path) -> RawImage:
    """Opens an image without reading its voxels.

    Raises:
        FormatError: missing, unreadable, or of a format that autoseg does not read.
    """
    ending = file_ending(path)
    if ending is None:
        raise FormatError(f"{path}: found an unknown file ending, expected one of {', '.join(READERS)}")
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    return READERS[ending](path)


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
    return np.ascontiguousarray(raw.load(), dtype=np.float32), raw.geometry


def read_label(path: Path) -> tuple[NDArray, Geometry]:
    """Reads a label map.

    Returns:
        (Z, Y, X) integers in canonical orientation, contiguous, and its geometry.

    Raises:
        FormatError: missing, unreadable, more than one volume, or values that are not whole numbers.
    """
    raw = read_raw(path)
    if raw.n_channels != 1:
        raise FormatError(
            f"{path}: found {raw.n_channels} volumes in a label map, expected 1; save time points as cases of their own"
        )
    label = np.ascontiguousarray(raw.load()[0])
    if not np.issubdtype(label.dtype, np.integer):
        # Infinity equals its rounded self, and beyond int32 the conversion would make up a value.
        whole = (label == np.rint(label)) & (np.abs(label) < 2**31)
        if not whole.all():
            n_broken, example = label.size - int(np.count_nonzero(whole)), float(label[~whole].flat[0])
            raise FormatError(
                f"{path}: found {n_broken} voxels such as {example:.9g}, expected whole numbers in a label map"
            )
        label = label.astype(np.int32)
    if label.dtype == np.uint64:
        label = label.astype(np.int64)  # numpy counts and indexes with signed integers only
    return label.astype(label.dtype.newbyteorder("="), copy=False), raw.geometry


def write_volume(
    path: Path, volume: NDArray, geometry: Geometry, *, like: Path | None = None, scale: float = 1.0
) -> None:
    """Writes a label map, or any volume, with the file axes and the exact affine of its image, atomically.

    Args:
        path: ends in .nii.gz or .nii.
        volume: canonical (Z, Y, X), of a type that NIfTI has.
        geometry: of the image.
        like: the image; its header gives the codes, quaternion and units that an affine alone does not hold.
        scale: what readers multiply the stored values by, so that integers can stand for fractions.
    """
    import nibabel

    array = np.ascontiguousarray(from_canonical(volume, geometry.file_axcodes))
    affine = np.asarray(geometry.affine, np.float64)
    kind, header = nibabel.Nifti1Image, nibabel.Nifti1Header()
    if like is None:
        header.set_data_shape(array.shape)
        header.set_xyzt_units("mm")
        header.set_qform(affine, "scanner")
        header.set_sform(affine, "scanner")
    else:
        source = nibabel.load(like)
        # NIfTI-2 stays NIfTI-2: its affine is in double precision, which NIfTI-1 cannot hold.
        kind, header = type(source), source.header.copy()
        array = array[..., 0] if len(source.shape) == 2 else array
        header["cal_min"] = header["cal_max"] = 0
        header["intent_code"] = 0
        header["intent_name"] = b""
        header["descrip"] = b"autoseg"
    header.set_data_dtype(array.dtype)
    header.set_slope_inter(scale, 0)
    # nibabel divides what it is given by the slope.
    image = kind(array if scale == 1 else array * np.float32(scale), affine, header)
    with atomic_path(path) as temporary:
        nibabel.save(image, temporary)


def _read_nifti(path: Path) -> RawImage:
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    # What nibabel and the decompressors raise for files that are cut off or are something else.
    broken = (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, OverflowError, zlib.error)
    try:
        image: Any = nibabel.load(path)
        shape = image.shape
    except broken as error:
        raise FormatError(f"{path}: cannot be read as NIfTI ({first_line(error)})") from error
    if not isinstance(image, nibabel.Nifti1Image):
        raise FormatError(f"{path}: found a {type(image).__name__}, expected a NIfTI volume")
    if len(shape) == 5 and shape[3] == 1:
        shape = (*shape[:3], shape[4])
    if not 2 <= len(shape) <= 4 or 0 in shape:
        raise FormatError(f"{path}: found the shape {tuple(image.shape)}, expected 2, 3 or 4 axes that are not empty")
    volume_shape = (*shape[:3], 1)[:3]
    n_channels = shape[3] if len(shape) == 4 else 1
    _check_spacing(path, image, volume_shape)
    zooms = (*image.header.get_zooms()[:3], 1.0)[:3]
    try:
        geometry = make_geometry(volume_shape, image.affine, header_spacing_mm=zooms)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error

    def load() -> NDArray:
        try:
            voxels = np.asanyarray(image.dataobj)
        except broken as error:
            raise FormatError(f"{path}: its voxels cannot be read ({first_line(error)})") from error
        if voxels.dtype.kind not in "iuf":
            raise FormatError(f"{path}: found voxels of type {voxels.dtype}, expected numbers")
        channels = np.moveaxis(voxels.reshape(*volume_shape, n_channels), -1, 0)
        return to_canonical(channels, geometry.file_axcodes)

    return RawImage(geometry=geometry, n_channels=n_channels, load=load)


def _check_spacing(path: Path, image: Any, shape: tuple[int, ...]) -> None:
    """Refuses a spacing of zero that the affine is made from, which nibabel would silently take for 1 mm."""
    from nibabel.openers import ImageOpener

    if image.header["sform_code"] > 0:
        return
    with ImageOpener(path) as file:
        stored = type(image.header).from_fileobj(file, check=False)["pixdim"][1:4]
    if any(spacing == 0 and size > 1 for spacing, size in zip(stored, shape, strict=True)):
        raise FormatError(f"{path}: found the spacing {stored.tolist()} mm (i, j, k), expected more than 0")


READERS: dict[str, Callable[[Path], RawImage]] = {".nii.gz": _read_nifti, ".nii": _read_nifti}

"""NIfTI files, through nibabel."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.core.errors import FormatError, first_line
from autoseg.core.geometry import Geometry, from_canonical, to_canonical
from autoseg.core.serialize import atomic_path
from autoseg.data.raw import RawImage, locate

ENDINGS = (".nii.gz", ".nii")


def read_nifti(path: Path) -> RawImage:
    """Opens a NIfTI file; the voxels stay where they are.

    Raises:
        FormatError: unreadable, or no volume.
    """
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
    geometry = locate(path, volume_shape, image.affine, spacing_mm=zooms)

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


def write_nifti(path: Path, volume: NDArray, geometry: Geometry, *, like: Path | None, scale: float) -> None:
    """Writes a NIfTI file; codes, quaternion and units are those of `like` where that is NIfTI."""
    import nibabel

    array = np.ascontiguousarray(from_canonical(volume, geometry.file_axcodes))
    affine = np.asarray(geometry.affine, np.float64)
    kind, header = nibabel.Nifti1Image, nibabel.Nifti1Header()
    if like is None or not like.name.lower().endswith(ENDINGS):
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
    image = kind(array, affine, header)
    if scale != 1:
        # Here, because an image forgets the slope of the header that it is made with, and then nibabel chooses one.
        image.header.set_slope_inter(scale, 0)
    with atomic_path(path) as temporary:
        nibabel.save(image, temporary)

"""NIfTI files, through nibabel."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.core.errors import FormatError, first_line
from autoseg.core.geometry import Geometry, from_canonical, to_canonical
from autoseg.core.runtime import format_memory
from autoseg.core.serialize import atomic_path
from autoseg.data.raw import MOST_DEFLATED, RawImage, check_claim, check_memory, locate

ENDINGS = (".nii.gz", ".nii")

_MM_PER_UNIT = {1: 1e3, 3: 1e-3}
"""By the code of the header's spatial units: metres and micrometres. Files that name none are in millimetres."""

_N_HEADER_BYTES = 544
_MAX_OFFSET_BYTES = 64 * 2**20
"""Room for a header and its extensions: XML of surfaces, the tags of a DICOM series."""


def read_nifti(path: Path) -> RawImage:
    """Opens a NIfTI file; the voxels stay where they are.

    Raises:
        FormatError: unreadable, or no volume.
    """
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    # What nibabel and the decompressors raise for files that are cut off or are something else.
    broken = (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, OverflowError, TypeError, zlib.error)
    try:
        _check_header(path)
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
    scale = _mm_per_unit(image.header)
    zooms = [scale * float(size) for size in (*image.header.get_zooms()[:3], 1.0)[:3]]
    affine = image.affine * np.array([scale, scale, scale, 1.0])[:, None]
    geometry = locate(path, volume_shape, affine, spacing_mm=zooms)

    def load() -> NDArray:
        check_memory(path, math.prod(volume_shape) * n_channels)
        try:
            voxels = np.asanyarray(image.dataobj)
        except broken as error:
            raise FormatError(f"{path}: its voxels cannot be read ({first_line(error)})") from error
        if voxels.dtype.kind not in "iuf":
            raise FormatError(f"{path}: found voxels of type {voxels.dtype}, expected numbers")
        channels = np.moveaxis(voxels.reshape(*volume_shape, n_channels), -1, 0)
        return to_canonical(channels, geometry.file_axcodes)

    return RawImage(geometry=geometry, n_channels=n_channels, load=load)


def _mm_per_unit(header: Any) -> float:
    return _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)


def _check_header(path: Path) -> None:
    """Refuses a header that leads out of its file, before nibabel reads its extensions and allocates its voxels.

    What is no header at all is left to nibabel to name.

    Raises:
        FormatError: it claims more voxels, or extensions, than the file has or can have.
        HeaderDataError: a type that NIfTI does not know.
    """
    import nibabel
    from nibabel.openers import ImageOpener

    with ImageOpener(path) as file:
        block = file.read(_N_HEADER_BYTES)
        is_second = block[4:7] in (b"n+2", b"ni2")
        kind = nibabel.Nifti2Header if is_second else nibabel.Nifti1Header
        if not (is_second or block[344:347] in (b"n+1", b"ni1")) or len(block) < kind.sizeof_hdr:
            return
        header = kind(block[: kind.sizeof_hdr], check=False)
        _check_sizes(path, header)
        offset = int(header["vox_offset"])
        if block[kind.sizeof_hdr : kind.sizeof_hdr + 1].strip(b"\0"):
            _check_extensions(path, header, block + file.read(max(0, offset - len(block))))


def _check_sizes(path: Path, header: Any) -> None:
    n_axes = int(header["dim"][0])
    shape = [int(size) for size in header["dim"][1 : 1 + max(0, n_axes)]]
    offset = float(header["vox_offset"])
    if n_axes != len(shape) or not shape or min(shape) < 0:
        raise FormatError(f"{path}: found the shape {tuple(shape)}, expected 2, 3 or 4 axes that are not empty")
    is_compressed = path.name.lower().endswith(".gz")
    held, most = path.stat().st_size, MOST_DEFLATED if is_compressed else 1
    if not 0 <= offset <= held * most:
        raise FormatError(
            f"{path}: its header puts the voxels at byte {offset:g}, expected a place within the file, which has "
            f"{held} bytes; copy it again from where it came from"
        )
    if offset > _MAX_OFFSET_BYTES:
        raise FormatError(
            f"{path}: its header claims {format_memory(offset / 2**30)} of extensions before the voxels, expected at "
            f"most {format_memory(_MAX_OFFSET_BYTES / 2**30)}; save it anew without extensions"
        )
    try:
        n_bytes = math.prod(shape) * header.get_data_dtype().itemsize
    except KeyError as error:
        raise FormatError(f"{path}: found voxels of the unknown type {header['datatype']}, expected numbers") from error
    check_claim(path, n_bytes, held=held if is_compressed else max(0, held - int(offset)), most=most)


def _check_extensions(path: Path, header: Any, block: bytes) -> None:
    """Refuses extensions that do not end before the voxels: nibabel would read as much as there is.

    Args:
        path: for the message.
        header: of the file.
        block: the file up to its voxels.
    """
    place, end = header.sizeof_hdr + 4, int(header["vox_offset"])
    while place + 16 <= min(end, len(block)):
        size = int(np.frombuffer(block, f"{header.endianness}i4", 1, place)[0])
        if size < 8 or place + size > end:
            raise FormatError(
                f"{path}: its header claims an extension of {size} bytes, expected 8 to {end - place}; save it anew "
                "without extensions"
            )
        place += size


def _check_spacing(path: Path, image: Any, shape: tuple[int, ...]) -> None:
    """Refuses spacings that the affine is made from and that nibabel would silently mend: zero, and negative ones."""
    from nibabel.openers import ImageOpener

    if image.header["sform_code"] > 0:
        return
    with ImageOpener(path) as file:
        stored = type(image.header).from_fileobj(file, check=False)["pixdim"][1:4]
    if any(spacing < 0 or (spacing == 0 and size > 1) for spacing, size in zip(stored, shape, strict=True)):
        raise FormatError(
            f"{path}: found the spacing {stored.tolist()} (i, j, k), expected more than 0; correct the header"
        )


def write_nifti(path: Path, volume: NDArray, geometry: Geometry, *, like: Path | None, scale: float) -> None:
    """Writes a NIfTI file in millimetres; codes and quaternion are those of `like` where that is NIfTI."""
    import nibabel

    array = np.ascontiguousarray(from_canonical(volume, geometry.file_axcodes))
    affine = np.asarray(geometry.affine, np.float64)
    kind, header = nibabel.Nifti1Image, nibabel.Nifti1Header()
    source: Any = nibabel.load(like) if like is not None and like.name.lower().endswith(ENDINGS) else None
    if source is None:
        header.set_data_shape(array.shape)
        header.set_xyzt_units("mm")
        header.set_qform(affine, "scanner")
        header.set_sform(affine, "scanner")
    else:
        # NIfTI-2 stays NIfTI-2: its affine is in double precision, which NIfTI-1 cannot hold.
        kind, header = type(source), source.header.copy()
        if _mm_per_unit(header) != 1:
            header.set_xyzt_units("mm", header.get_xyzt_units()[1])
            header.set_qform(affine, int(header["qform_code"]))
            header.set_sform(affine, int(header["sform_code"]))
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

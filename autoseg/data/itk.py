"""NRRD and MetaImage files, through SimpleITK."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.core.errors import FormatError, first_line
from autoseg.core.geometry import Geometry, from_canonical, to_canonical
from autoseg.core.serialize import atomic_path
from autoseg.data.itk_headers import (
    META_ENDINGS,
    check_meta_data,
    check_nrrd_data,
    meta_files,
    nrrd_files,
    nrrd_header,
)
from autoseg.data.raw import (
    LPS_TO_RAS,
    RawImage,
    check_claim,
    check_memory,
    file_spacing_mm,
    locate,
    storable,
)

ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")

_ADVICE = "copy it again from where it came from, or export it anew"


@cache
def import_simpleitk() -> Any:
    """SimpleITK, with its warnings kept from the terminal: what matters comes as an error."""
    import SimpleITK

    SimpleITK.ProcessObject.GlobalWarningDisplayOff()
    return SimpleITK


def why(error: BaseException) -> str:
    """What SimpleITK says is wrong, in one line, without its own source files."""
    # The cause comes last; MetaImage adds what the system said of some other call.
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Reason:")]
    if not lines:
        return first_line(error)
    return re.sub(r"^(.*ERROR: *)?(\w+\(0x[0-9a-f]+\): *)?(\[nrrd\] *)?", "", lines[-1])


@dataclass(frozen=True, kw_only=True, eq=False)
class ItkHeader:
    """What ITK tells of a file without its voxels; x, y, z and LPS as ITK has them.

    Attributes:
        dimension: axes in the file, 2 to 4.
        size: voxels (x, y, z).
        n_repeats: along the fourth axis.
        n_components: of a voxel.
        n_bytes: of all voxels.
        spacing_mm: (x, y, z).
        origin_mm: (x, y, z).
        direction: 3x3, its columns are the directions of the axes.
        affine: 4x4, from indices to RAS+ millimetres.
        tags: metadata by key.
    """

    dimension: int
    size: tuple[int, int, int]
    n_repeats: int
    n_components: int
    n_bytes: int
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]
    direction: NDArray[np.float64]
    affine: NDArray[np.float64]
    tags: Mapping[str, str]


def make_affine(columns: NDArray, origin_mm: NDArray | tuple[float, ...]) -> NDArray[np.float64]:
    """4x4 to RAS+ millimetres from ITK's: 3x3 whose columns are one voxel's step each, and the first voxel's place."""
    affine = np.eye(4)
    affine[:3, :3] = columns
    affine[:3, 3] = origin_mm
    affine = LPS_TO_RAS @ affine
    return affine + 0.0  # no negative zeros


def read_header(path: Path, *, reader_name: str = "") -> ItkHeader:
    """Reads a file's header.

    Args:
        path: the file.
        reader_name: the name of ITK's reader; empty for the one that fits.

    Raises:
        RuntimeError: ITK cannot read it.
        FormatError: not 2 to 4 axes, or the fourth stands aslant in space.
    """
    reader = import_simpleitk().ImageFileReader()
    if reader_name:
        reader.SetImageIO(reader_name)
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    dimension, sizes = reader.GetDimension(), reader.GetSize()
    if not 2 <= dimension <= 4 or 0 in sizes:
        raise FormatError(f"{path}: found the shape {tuple(sizes)}, expected 2, 3 or 4 axes that are not empty")
    n_components = reader.GetNumberOfComponents()
    n_values = math.prod(sizes) * n_components
    stored = np.asarray(reader.GetDirection(), np.float64).reshape(dimension, dimension)
    if stored[3:, :3].any() or stored[:3, 3:].any():
        raise FormatError(f"{path}: found a fourth axis that is a direction in space, expected channels or time points")
    direction = np.eye(3)
    direction[: min(3, dimension), : min(3, dimension)] = stored[:3, :3]
    spacing = (*reader.GetSpacing()[:3], 1.0)[:3]
    origin = (*reader.GetOrigin()[:3], 0.0)[:3]
    return ItkHeader(
        dimension=dimension,
        size=(*sizes[:3], 1)[:3],
        n_repeats=sizes[3] if dimension == 4 else 1,
        n_components=n_components,
        n_bytes=n_values * _value_bytes(reader.GetPixelIDValue()),
        spacing_mm=spacing,
        origin_mm=origin,
        direction=direction,
        affine=make_affine(direction * spacing, origin),
        tags=_tags(reader),
    )


def _tags(reader: Any) -> dict[str, str]:
    tags = {}
    for key in reader.GetMetaDataKeys():
        # A key that is no text cannot be asked for.
        with suppress(TypeError):
            tags[key] = reader.GetMetaData(key).strip()
    return tags


def _value_bytes(pixel: int) -> int:
    """Size of one component of a pixel, which ITK tells in words, such as "vector of 16-bit signed integer"."""
    match = re.search(r"(\d+)-bit", import_simpleitk().GetPixelIDValueAsString(pixel))
    return int(match[1]) // 8 if match else 1


def read_voxels(path: Path, header: ItkHeader, *, reader_name: str = "") -> NDArray:
    """The voxels of a file.

    Returns:
        (C, x, y, z); channels are the steps of the fourth axis, and within them the components.

    Raises:
        RuntimeError: ITK cannot read it.
        FormatError: not real numbers.
    """
    sitk = import_simpleitk()
    image = sitk.ReadImage(str(path), imageIO=reader_name)
    voxels = sitk.GetArrayFromImage(image)
    if voxels.dtype.kind not in "iuf":
        raise FormatError(f"{path}: found voxels of type {voxels.dtype}, expected numbers")
    voxels = voxels.reshape(header.n_repeats, *header.size[::-1], header.n_components)
    return voxels.transpose(0, 4, 3, 2, 1).reshape(-1, *header.size)


def read_itk(path: Path) -> RawImage:
    """Opens an NRRD or MetaImage file. Vectors, and the steps of a fourth axis, are channels; a 2D image is one slice.

    Raises:
        FormatError: unreadable, or no volume.
    """
    is_meta = path.name.lower().endswith(META_ENDINGS)
    kind = "MetaImage" if is_meta else "NRRD"
    reader_name = "MetaImageIO" if is_meta else "NrrdImageIO"
    try:
        files, most = meta_files(path) if is_meta else nrrd_files(path)
        header = read_header(path, reader_name=reader_name)
        n_values = math.prod(header.size) * header.n_repeats * header.n_components
        most = most or header.n_bytes // n_values
        check_claim(path, header.n_bytes, held=sum(file.stat().st_size for file in files), most=most)
    except (RuntimeError, OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read as {kind} ({why(error)}); {_ADVICE}") from error
    geometry = locate(path, header.size, header.affine, spacing_mm=header.spacing_mm)

    def load() -> NDArray:
        check_memory(path, n_values)
        try:
            (check_meta_data if is_meta else check_nrrd_data)(path)
            voxels = read_voxels(path, header, reader_name=reader_name)
        except (RuntimeError, OSError, ValueError, zlib.error) as error:
            raise FormatError(f"{path}: its voxels cannot be read ({why(error)}); {_ADVICE}") from error
        return to_canonical(voxels, geometry.file_axcodes)

    return RawImage(geometry=geometry, n_channels=header.n_repeats * header.n_components, load=load)


def write_itk(path: Path, volume: NDArray, geometry: Geometry, *, like: Path | None, scale: float) -> None:
    """Writes an NRRD or MetaImage file, compressed.

    Spacing, origin and direction are those of `like`, to the last bit, where both are NRRD or both MetaImage.
    """
    sitk = import_simpleitk()
    affine = np.asarray(geometry.affine, np.float64)
    spacing = file_spacing_mm(geometry)
    in_lps = LPS_TO_RAS @ affine
    direction, origin = in_lps[:3, :3] / spacing, in_lps[:3, 3]
    is_flat, is_alike = False, False
    if like is not None and like.name.lower().endswith(ENDINGS):
        header = read_header(like)
        is_flat = header.dimension == 2
        if np.array_equal(header.affine, affine):
            is_alike = path.suffix.lower() == ".nrrd" and like.suffix.lower() in (".nrrd", ".nhdr")
            spacing, direction, origin = np.array(header.spacing_mm), header.direction, np.array(header.origin_mm)
    array = storable(volume, scale)
    voxels = np.ascontiguousarray(from_canonical(array, geometry.file_axcodes).T)
    n_axes = 2 if is_flat and voxels.shape[0] == 1 else 3
    image = sitk.GetImageFromArray(voxels[0] if n_axes == 2 else voxels)
    image.SetSpacing(spacing[:n_axes].tolist())
    image.SetOrigin(origin[:n_axes].tolist())
    image.SetDirection(direction[:n_axes, :n_axes].ravel().tolist())
    with atomic_path(path) as temporary:
        sitk.WriteImage(image, str(temporary), useCompression=True)
        if is_alike and like is not None:
            _copy_place(like, temporary)


def _copy_place(source: Path, target: Path) -> None:
    """Gives an NRRD file the words of another one's header for where it is.

    NRRD has spacing times direction in one number, and taking them apart to put them together changes its last bit.
    """
    known, written = nrrd_header(source)[0], nrrd_header(target)[0]
    # An axis of channels has no direction, and the label map no such axis.
    known["space directions"] = known.get("space directions", "").replace("none", "").strip()
    keys = ("space", "space directions", "space origin")
    if known["space directions"].count("(") != written.get("space directions", "").count("(") or not all(
        known.get(key) and key in written for key in keys
    ):
        return
    data = target.read_bytes()
    for key in keys:
        line = f"{key}: {written[key]}\n".encode("latin-1")
        data = data.replace(line, f"{key}: {known[key]}\n".encode("latin-1"), 1)
    target.write_bytes(data)

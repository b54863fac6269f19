"""NRRD and MetaImage files, through SimpleITK."""

from __future__ import annotations

import math
import os
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
from autoseg.core.text import shorten
from autoseg.data.raw import (
    LPS_TO_RAS,
    MOST_COMPRESSED,
    MOST_DEFLATED,
    RawImage,
    check_claim,
    check_memory,
    file_spacing_mm,
    locate,
    storable,
)

ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")

_META_ENDINGS = (".mha", ".mhd")
_META_KEYS = ("NDims", "DimSize", "ElementType", "ElementDataFile")
_META_INTEGERS = {"CHAR": 1, "SHORT": 2, "INT": 4, "LONG": 4, "LONG_LONG": 8}
_META_BYTES = {
    **{f"MET_{sign}{name}": size for name, size in _META_INTEGERS.items() for sign in ("", "U")},
    "MET_FLOAT": 4,
    "MET_DOUBLE": 8,
}
_MAX_HEADER_BYTES = 2**20
_MAX_FILES = 100_000
_MAX_SHOWN = 80
_PATTERN = re.compile(r"[^%]*%0?[0-9]{0,2}d[^%]*")
_MAX_META_KEY, _MAX_META_VALUE, _MAX_NRRD_LINE = 255, 2000, 800
# Zeros shrink to a thousandth of their size, so that this much can become 64 MiB.
_PIECE_BYTES = 2**16

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
    is_meta = path.name.lower().endswith(_META_ENDINGS)
    kind = "MetaImage" if is_meta else "NRRD"
    reader_name = "MetaImageIO" if is_meta else "NrrdImageIO"
    try:
        files, most = _meta_data(path) if is_meta else _nrrd_data(path)
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
            (_check_meta_data if is_meta else _check_nrrd_data)(path)
            voxels = read_voxels(path, header, reader_name=reader_name)
        except (RuntimeError, OSError, ValueError, zlib.error) as error:
            raise FormatError(f"{path}: its voxels cannot be read ({why(error)}); {_ADVICE}") from error
        return to_canonical(voxels, geometry.file_axcodes)

    return RawImage(geometry=geometry, n_channels=header.n_repeats * header.n_components, load=load)


def _meta_data(path: Path) -> tuple[list[Path], int]:
    """The files with the voxels of a MetaImage, and what one of their bytes can become; 0 where they are written out.

    Raises:
        FormatError: a file lies elsewhere.
        ValueError: the header is not complete.
    """
    fields, end = _meta_header(path)
    name = fields["ElementDataFile"]
    most = 1 if fields.get("BinaryData", "").lower() in ("true", "1") else 0
    most = MOST_DEFLATED if fields.get("CompressedData", "").lower() in ("true", "1") else most
    return [path] if name.upper() == "LOCAL" else _data_files(path, name, end), most


def _nrrd_data(path: Path) -> tuple[list[Path], int]:
    """The files with the voxels of an NRRD file, and what one of their bytes can become; 0 where they are written out.

    Raises:
        FormatError: a file lies elsewhere.
        ValueError: the header is too long.
    """
    fields, end = _nrrd_header(path)
    name = fields.get("data file", "")
    encoding = fields.get("encoding", "").lower()
    most = {"raw": 1, "hex": 1, "gzip": MOST_DEFLATED, "gz": MOST_DEFLATED, "txt": 0, "text": 0, "ascii": 0}
    return _data_files(path, name, end) if name else [path], most.get(encoding, MOST_COMPRESSED)


def _data_files(path: Path, value: str, end: int) -> list[Path]:
    """The files that a header tells its voxels are in.

    Args:
        path: of the header.
        value: the name of a file; or "LIST", and names follow, one per line; or a pattern with %d, and a first number,
            a last one and a step.
        end: of the header, where the names follow.

    Raises:
        FormatError: one of them lies elsewhere than beside or below the header.
        ValueError: a pattern that stands for too many files, or none.
    """
    words = value.split()
    if words and words[0].upper() == "LIST":
        with path.open("rb") as file:
            file.seek(end)
            lines = file.read(_MAX_HEADER_BYTES + 1)
        if len(lines) > _MAX_HEADER_BYTES:
            raise ValueError("its list of files is longer than 1 MiB")
        names = [line.strip() for line in lines.decode("latin-1").split("\n") if line.strip()]
    elif "%" in words[0] and (len(words) > 1 or path.name.lower().endswith(_META_ENDINGS)):
        # MetaIO hands it to C as it is, which would take a %s for the address of a text.
        if len(words) == 1 or not _PATTERN.fullmatch(words[0]):
            shown = shorten(value, _MAX_SHOWN)
            raise ValueError(f"its voxels are in '{shown}', expected a pattern with a single %d, and numbers")
        first, last, step = (int(word) for word in (*words[1:4], "1", "1")[:3])
        numbers = range(first, last + (1 if step > 0 else -1), step)
        if not 0 < len(numbers) <= _MAX_FILES:
            raise ValueError(f"its voxels are in {len(numbers)} files, expected 1 to {_MAX_FILES}")
        _check_beside(path, words[0])
        names = [words[0] % number for number in numbers]
    else:
        names = [value]
    if max(map(len, names), default=0) > _MAX_NRRD_LINE:
        raise ValueError(f"it has names of files of more than {_MAX_NRRD_LINE} characters")
    for name in names:
        _check_beside(path, name)
    return [path.parent / name for name in names]


def _check_beside(path: Path, name: str) -> None:
    """Refuses the name of a file elsewhere than beside or below a header, which may come from anyone."""
    folder = os.path.abspath(path.parent)
    target = os.path.abspath(os.path.join(folder, name.replace("\\", "/")))
    if os.path.commonpath([folder, target]) != folder or target == folder:
        raise FormatError(
            f"{path}: its header says that the voxels are in '{name}', expected a file beside it or in a folder "
            "below; put that file there, and its name alone into the header"
        )


def _meta_header(path: Path) -> tuple[dict[str, str], int]:
    """Keys and values of a MetaImage, and where they end.

    Read here first, because ITK writes what it finds amiss in a header to the terminal.

    Raises:
        ValueError: a key is missing that no image can do without.
    """
    with path.open("rb") as file:
        data = file.read(_MAX_HEADER_BYTES)
    fields: dict[str, str] = {}
    position = 0
    while "ElementDataFile" not in fields and position < len(data):
        end = data.find(b"\n", position)
        end = len(data) if end < 0 else end
        key, *value = re.split("[=:]", data[position:end].decode("latin-1"), maxsplit=1)
        fields[key.strip()] = "".join(value).strip()
        position = end + 1
    missing = [key for key in _META_KEYS if not fields.get(key)]
    if missing:
        raise ValueError(f"its header has no {', '.join(missing)}")
    # MetaIO believes what stands there: with more axes it writes beyond its arrays, and ends the process.
    if fields["NDims"] not in ("2", "3", "4"):
        raise ValueError(f"it has {fields['NDims'][:20]} axes, expected 2 to 4")
    if any(data.count(key.encode(), 0, position) != 1 for key in ("NDims", "ElementDataFile")):
        raise ValueError("its header tells twice how many axes it has, or where its voxels are")
    if any(len(key) > _MAX_META_KEY or len(value) > _MAX_META_VALUE for key, value in fields.items()):
        raise ValueError(f"its header has lines of more than {_MAX_META_VALUE} characters")
    return fields, position


def _check_meta_data(path: Path) -> None:
    """Refuses a file that is cut off or damaged, which ITK tells the terminal, or nobody, and fills up with zeros.

    Raises:
        ValueError: less data than the header says.
        zlib.error: damaged.
    """
    fields, offset = _meta_header(path)
    name = fields["ElementDataFile"]
    if name.upper() == "LOCAL":
        data = path
    elif name.upper().startswith("LIST") or "%" in name or "HeaderSize" in fields:
        return
    else:
        data, offset = path.parent / name, 0
    n_bytes = _META_BYTES.get(fields["ElementType"].removesuffix("_ARRAY"))
    if n_bytes is None:
        return
    sizes = [int(size) for size in fields["DimSize"].split()]
    expected = math.prod(sizes) * int(fields.get("ElementNumberOfChannels", "1")) * n_bytes
    if fields.get("CompressedData", "").lower() in ("true", "1"):
        found = _decompressed_size(data, offset)
    elif fields.get("BinaryData", "").lower() in ("true", "1"):
        found = data.stat().st_size - offset
    else:
        return  # Numbers that are written out take as many characters as they like.
    if found < expected:
        raise ValueError(f"found {found} bytes of voxels, expected {expected}")


def _check_nrrd_data(path: Path) -> None:
    """Refuses damaged gzip data, of which ITK checks the length alone.

    Raises:
        ValueError: cut off.
        zlib.error: damaged.
    """
    fields, offset = _nrrd_header(path)
    name = fields.get("data file", "")
    is_skipped = any(fields.get(key, "0") != "0" for key in ("byte skip", "byteskip", "line skip", "lineskip"))
    if fields.get("encoding", "").lower() not in ("gzip", "gz") or is_skipped:
        return
    if name.upper().startswith("LIST") or "%" in name:
        return
    _decompressed_size(path.parent / name if name else path, 0 if name else offset)


def _nrrd_header(path: Path) -> tuple[dict[str, str], int]:
    """Fields of an NRRD header in lower case, and where it ends, or the list of its files begins.

    Raises:
        ValueError: it is too long, or tells twice where the voxels are.
    """
    with path.open("rb") as file:
        text = file.read(_MAX_HEADER_BYTES + 1)
    # The header ends at the first empty line, or with the file where the data are elsewhere.
    fields: dict[str, str] = {}
    place = 0
    while place < len(text):
        end = text.find(b"\n", place)
        end = len(text) if end < 0 else end
        line, place = text[place:end].removesuffix(b"\r").decode("latin-1"), end + 1
        if not line:
            break
        key, _, value = line.partition(":")
        is_free = line.startswith("#") or value.startswith("=")
        # What NRRD's library does not understand it repeats in its message, whose length it does not watch.
        if len(line) > _MAX_NRRD_LINE and not (line.startswith("#") or (is_free and len(key) <= _MAX_NRRD_LINE)):
            raise ValueError(f"its header has a line of {len(line)} characters, expected at most {_MAX_NRRD_LINE}")
        key = key.strip().lower().replace("datafile", "data file")
        if is_free:
            continue
        if key == "data file" and key in fields:
            raise ValueError("it tells twice where its voxels are")
        fields[key] = value.strip()
        if key == "data file" and fields[key].upper().startswith("LIST"):
            break
    if place > _MAX_HEADER_BYTES:
        raise ValueError("its header is longer than 1 MiB")
    return fields, min(place, len(text))


def _decompressed_size(data: Path, offset: int) -> int:
    """Bytes that a zlib or gzip stream holds, once its checksum is found right."""
    size = 0
    stream = zlib.decompressobj(wbits=47)
    with data.open("rb") as file:
        file.seek(offset)
        while piece := file.read(_PIECE_BYTES):
            size += len(stream.decompress(piece))
    if not stream.eof:
        raise ValueError("its compressed data are cut off")
    return size


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
    known, written = _nrrd_header(source)[0], _nrrd_header(target)[0]
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

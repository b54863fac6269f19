"""A folder with one DICOM series, or a DICOM file that is an image by itself, through SimpleITK and GDCM."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoseg.core.errors import FormatError, list_some
from autoseg.core.geometry import Geometry, to_canonical
from autoseg.data.itk import ItkHeader, make_affine, read_header, read_voxels, why
from autoseg.data.raw import MOST_COMPRESSED, MOST_DEFLATED, RawImage, check_claim, check_memory, locate

_READER = "GDCMImageIO"
_SERIES, _SERIES_NUMBER, _DESCRIPTION = "0020|000e", "0020|0011", "0008|103e"
_MODALITY, _POSITION, _THICKNESS, _DISTANCE = "0008|0060", "0020|0032", "0018|0050", "0018|0088"
_SAMPLES, _BITS = "0028|0002", "0028|0100"
_PIXELS = b"\xe0\x7f\x10\x00"
_ITEMS, _PIXEL_GROUP, _UNKNOWN = 0xFFFE, 0x7FE0, 0xFFFFFFFF
# Values of these kinds have a length of 32 bits.
_LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
_SHORT = tuple(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
# What some programs write for "unknown".
_NO_KIND = (b"  ", b"??", b"--", b"\0\0")
# Transfer syntaxes, and what a byte of the file can become.
_IMPLICIT, _DEFLATED, _BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"
_MOST = {_IMPLICIT: 1, "1.2.840.10008.1.2.1": 1, _BIG_ENDIAN: 1, _DEFLATED: MOST_DEFLATED, "1.2.840.10008.1.2.5": 64}
_SLICED = ("CT", "MR", "PT")
_ENDINGS = (".dcm", ".dicom", ".ima")

# Objects that stand beside the slices of a series and are no images: directory, presentation states, waveforms, raw
# data, reports, documents, structures and plans of radiotherapy.
_NO_IMAGES = (
    "1.2.840.10008.1.3.10",
    "1.2.840.10008.5.1.4.1.1.11.",
    "1.2.840.10008.5.1.4.1.1.9.",
    "1.2.840.10008.5.1.4.1.1.66\0",
    "1.2.840.10008.5.1.4.1.1.88.",
    "1.2.840.10008.5.1.4.1.1.104.",
    "1.2.840.10008.5.1.4.1.1.481.3",
    "1.2.840.10008.5.1.4.1.1.481.5",
)

# Positions are stored with few digits; a slice that is missing moves others by half a step and more.
_MAX_OFFSET_STEPS = 0.1
_MAX_DIRECTION_DIFFERENCE = 1e-3
_MAX_SPACING_DIFFERENCE = 1e-3

N_LOOKED_AT = 50
"""Files that tell whether a folder holds DICOM; one of images in another format may have many thousands."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Slice:
    """One file of a series; `place_mm` is along the normal of the slice."""

    file: Path
    header: ItkHeader
    place_mm: float


def holds_dicom(folder: Path) -> bool:
    """Whether one of the first files in the folder begins as DICOM files do."""
    return any(_is_dicom(file) for file in _files(folder)[:N_LOOKED_AT])


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))


def _is_dicom(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _is_no_image(file: Path) -> bool:
    """Whether the beginning of a DICOM file says that it holds no pixels."""
    with file.open("rb") as stream:
        data = stream.read(1024)
    tag = data.find(b"\x02\x00\x02\x00UI")  # media storage SOP class
    if tag < 0:
        return False
    length = int.from_bytes(data[tag + 6 : tag + 8], "little")
    kind = data[tag + 8 : tag + 8 + length].decode("ascii", "replace").rstrip("\0 ") + "\0"
    return kind.startswith(_NO_IMAGES)


def read_dicom_file(path: Path) -> RawImage:
    """Opens a DICOM file that is an image by itself: several frames, or a picture such as a radiograph.

    Raises:
        FormatError: unreadable, or one slice of a series.
    """
    header = _read_one(path)
    modality = header.tags.get(_MODALITY, "")
    if header.size[2] == 1 and modality in _SLICED:
        raise FormatError(
            f"{path}: found one slice of a {modality} series, expected a whole series; put its files into a folder of "
            "their own and name that folder as the image"
        )
    return _open([path], [header], path)


def read_dicom_folder(folder: Path) -> RawImage:
    """Opens the DICOM series in a folder. Where its slices are says their position, not the names of the files.

    Raises:
        FormatError: no DICOM images or unreadable ones, several series, or slices that do not make an even volume.
    """
    found: list[tuple[Path, ItkHeader]] = []
    broken: list[str] = []
    for file in _files(folder):
        try:
            found.append((file, _read_header(file)))
        except (RuntimeError, OSError, ValueError):
            # Other files may lie beside the slices; a slice that cannot be read must not go unnoticed.
            if _is_dicom(file) or file.name.lower().endswith(_ENDINGS):
                broken += [] if _is_no_image(file) else [file.name]
    if broken:
        files = "1 DICOM file" if len(broken) == 1 else f"{len(broken)} DICOM files"
        raise FormatError(
            f"{folder}: found {files} that cannot be read ({list_some(broken)}), expected whole images; copy the "
            "series again from where it came from"
        )
    if not found:
        raise FormatError(f"{folder}: found no DICOM image in this folder, expected the slices of one series")
    _check_one_series(folder, [header for _, header in found])
    slices = _sort(folder, found)
    return _open([one.file for one in slices], [one.header for one in slices], folder)


def _read_one(path: Path) -> ItkHeader:
    try:
        return _read_header(path)
    except (RuntimeError, OSError, ValueError) as error:
        raise FormatError(
            f"{path}: cannot be read as DICOM ({why(error)}); copy it again from where it came from"
        ) from error


def _read_header(file: Path) -> ItkHeader:
    """A file's header.

    Raises:
        RuntimeError, OSError, ValueError: GDCM cannot read it, or it is cut off.
        FormatError: it tells of more pixels than the file can have.
    """
    syntax = _check_lengths(file)
    header = read_header(file, reader_name=_READER)
    samples, bits = (header.tags.get(key, "") for key in (_SAMPLES, _BITS))
    n_bytes = math.prod(header.size) * header.n_repeats
    if samples.isdecimal() and bits.isdecimal():
        n_bytes = n_bytes * int(samples) * int(bits) // 8
    check_claim(file, n_bytes, held=file.stat().st_size, most=_MOST.get(syntax, MOST_COMPRESSED))
    return header


def _check_lengths(file: Path) -> str:
    """Follows the elements of a file up to its pixels: GDCM allocates what an element says that it has.

    Where an element does not say what it is, the rest is left to GDCM.

    Returns:
        The transfer syntax; empty for what is no DICOM.

    Raises:
        ValueError: an element goes beyond the end of the file, or is none.
    """
    # Old files begin with their first element, of the group 2 or 8.
    with file.open("rb") as stream:
        head = stream.read(132)
    has_preamble = head[128:] == b"DICM"
    if not has_preamble and head[:2] not in (b"\x02\0", b"\x08\0"):
        return ""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        place, syntax, order = 132 if has_preamble else 0, "", "<"
        is_explicit = has_preamble or head[4:6].isalpha()
        while place + 12 <= len(data):
            if syntax and data[place : place + 2] != b"\x02\0":
                # What follows the first group is written as that says.
                order, is_explicit = ">" if syntax == _BIG_ENDIAN else "<", syntax != _IMPLICIT
                if syntax == _DEFLATED:
                    break
            group, number = struct.unpack_from(f"{order}HH", data, place)
            kind = data[place + 4 : place + 6] if is_explicit and group != _ITEMS else b""
            if kind in _NO_KIND:
                break
            if kind and kind not in (*_SHORT, *_LONG):
                # GDCM would go on with whatever follows as a length.
                raise ValueError(f"its element ({group:04x},{number:04x}) is of the unknown kind {kind!a}")
            is_short = bool(kind) and kind not in _LONG
            start = place + (12 if kind in _LONG else 8)
            (length,) = struct.unpack_from(f"{order}{'H' if is_short else 'I'}", data, start - (2 if is_short else 4))
            if group == _ITEMS or kind == b"SQ" or (length == _UNKNOWN and group != _PIXEL_GROUP):
                place = start  # its elements follow
                continue
            if start + length > len(data):
                if group == _PIXEL_GROUP:
                    break
                raise ValueError(
                    f"its element ({group:04x},{number:04x}) claims {length} bytes, the file has {len(data) - start}"
                )
            if (group, number) == (2, 16):
                syntax = data[start : start + length].decode("ascii", "replace").rstrip("\0 ")
            place = start + length
    return syntax


def _check_one_series(folder: Path, headers: Sequence[ItkHeader]) -> None:
    series: dict[str, list[ItkHeader]] = {}
    for header in headers:
        series.setdefault(header.tags.get(_SERIES, ""), []).append(header)
    if len(series) == 1:
        return
    shown = []
    for members in series.values():
        tags = members[0].tags
        name = tags.get(_DESCRIPTION) or "without description"
        number = f"number {tags[_SERIES_NUMBER]}, " if tags.get(_SERIES_NUMBER) else ""
        shown.append(f"'{name}' ({number}{len(members)} file{'s' if len(members) > 1 else ''})")
    raise FormatError(
        f"{folder}: found {len(series)} series, expected 1: {list_some(shown)}; move the files of each into a folder "
        "of its own"
    )


def _sort(folder: Path, found: Sequence[tuple[Path, ItkHeader]]) -> list[_Slice]:
    """The slices by position along their normal, evenly spaced."""
    first_file, first = found[0]
    if len(found) == 1:
        return [_Slice(file=first_file, header=first, place_mm=0.0)]
    normal = np.cross(first.direction[:, 0], first.direction[:, 1])
    slices = []
    for file, header in found:
        if header.size[2] != 1:
            raise FormatError(
                f"{folder}: found {file.name} with {header.size[2]} frames beside other files, expected one file with "
                "all frames, or files with one slice each; put each volume into a folder of its own"
            )
        if not header.tags.get(_POSITION):
            raise FormatError(
                f"{folder}: found {file.name} without the position of its slice (0020,0032), expected one in each; "
                "export the series anew with positions"
            )
        difference = _difference(first, header)
        if difference:
            raise FormatError(
                f"{folder}: found {difference[0]} in {file.name}, expected {difference[1]} as in {first_file.name}; "
                "remove slices of other scans, such as localizers"
            )
        slices.append(_Slice(file=file, header=header, place_mm=float(normal @ header.origin_mm)))
    slices.sort(key=lambda one: one.place_mm)
    _check_even(folder, slices)
    return slices


def _difference(first: ItkHeader, other: ItkHeader) -> tuple[str, str] | None:
    """What is found in a slice and expected from the first; None where they fit."""
    if other.size != first.size or other.n_components != first.n_components:
        return f"{_describe_size(other)}", f"{_describe_size(first)}"
    if not np.allclose(other.direction, first.direction, rtol=0, atol=_MAX_DIRECTION_DIFFERENCE):
        return (
            f"the orientation {other.direction[:, :2].T.round(3).tolist()}",
            str(first.direction[:, :2].T.round(3).tolist()),
        )
    if not np.allclose(other.spacing_mm[:2], first.spacing_mm[:2], rtol=_MAX_SPACING_DIFFERENCE, atol=0):
        return f"the pixel spacing {other.spacing_mm[:2]} mm", f"{first.spacing_mm[:2]} mm"
    return None


def _describe_size(header: ItkHeader) -> str:
    channels = f" in {header.n_components} colours" if header.n_components > 1 else ""
    return f"{header.size[0]} x {header.size[1]} pixels{channels}"


def _check_even(folder: Path, slices: Sequence[_Slice]) -> None:
    """Refuses slices at the same place, and steps between slices that differ."""
    origins = np.array([one.header.origin_mm for one in slices])
    step = (origins[-1] - origins[0]) / (len(slices) - 1)
    step_mm = float(np.linalg.norm(step))
    gaps_mm = np.diff([one.place_mm for one in slices])
    for index, gap_mm in enumerate(gaps_mm):
        if gap_mm <= 1e-3 * step_mm or step_mm == 0:
            place = f"{slices[index].place_mm:.2f} mm"
            raise FormatError(
                f"{folder}: found {slices[index].file.name} and {slices[index + 1].file.name} at the same place "
                f"({place}), expected one slice at each; if these are time points or echoes, put each volume into a "
                "folder of its own, and remove copies of slices"
            )
    even = origins[0] + step * np.arange(len(slices))[:, None]
    if np.linalg.norm(origins - even, axis=1).max() <= _MAX_OFFSET_STEPS * step_mm:
        return
    usual_mm = float(np.median(gaps_mm))
    if np.abs(gaps_mm - usual_mm).max() <= _MAX_OFFSET_STEPS * usual_mm:
        raise FormatError(
            f"{folder}: found slices that do not lie on a straight line, expected an even stack; resample the series "
            "to a regular grid"
        )
    wide = [index for index, gap_mm in enumerate(gaps_mm) if abs(gap_mm - usual_mm) > _MAX_OFFSET_STEPS * usual_mm]
    shown = [
        f"{gaps_mm[index]:.4g} mm between {slices[index].file.name} and {slices[index + 1].file.name} "
        f"(at {slices[index].place_mm:.2f} and {slices[index + 1].place_mm:.2f} mm)"
        for index in wide
    ]
    raise FormatError(
        f"{folder}: found uneven gaps between slices: {list_some(shown, most=3)}, expected {usual_mm:.4g} mm as "
        "between the others; add the slices that are missing, or resample the series to an even distance"
    )


def _open(files: Sequence[Path], headers: Sequence[ItkHeader], path: Path) -> RawImage:
    """An image of slices that are sorted and fit together, or of one file."""
    first = headers[0]
    shape = (first.size[0], first.size[1], len(files) if len(files) > 1 else first.size[2])
    geometry = _locate(path, headers, shape)

    def load() -> NDArray:
        check_memory(path, math.prod(shape) * first.n_components * first.n_repeats)
        # File by file, because each slice may have a slope of its own; ITK's series reader takes the first one's type.
        parts = []
        for file, header in zip(files, headers, strict=True):
            try:
                _check_whole(file, header)
                parts.append(read_voxels(file, header, reader_name=_READER))
            except (RuntimeError, OSError, ValueError) as error:
                raise FormatError(
                    f"{file}: its pixels cannot be read ({why(error)}); copy the series again from where it came from"
                ) from error
        voxels = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        return to_canonical(voxels, geometry.file_axcodes)

    return RawImage(geometry=geometry, n_channels=first.n_components * first.n_repeats, load=load)


def _check_whole(file: Path, header: ItkHeader) -> None:
    """Refuses uncompressed pixels that are cut off, which GDCM before SimpleITK 2.5.4 fills up with zeros.

    Raises:
        ValueError: the file ends before its pixels do.
    """
    samples, bits = (header.tags.get(key, "") for key in (_SAMPLES, _BITS))
    if not (samples.isdecimal() and bits.isdecimal()):
        return
    n_bytes = math.prod(header.size) * int(samples) * int(bits) // 8
    data = file.read_bytes()
    place = data.find(_PIXELS)
    while place >= 0:
        # The length stands after the tag, or after the tag and the type of the value; it is even.
        for start in (place + 4, place + 8):
            length = int.from_bytes(data[start : start + 4], "little")
            if length == n_bytes + n_bytes % 2:
                if start + 4 + n_bytes > len(data):
                    raise ValueError(f"found {len(data) - start - 4} bytes of pixels, expected {n_bytes}")
                return
        place = data.find(_PIXELS, place + 1)


def _locate(path: Path, headers: Sequence[ItkHeader], shape: tuple[int, int, int]) -> Geometry:
    first, last = headers[0], headers[-1]
    columns = first.direction * first.spacing_mm
    if len(headers) > 1:
        # From the places of the slices: right also where the gantry was tilted, and slices are shifted in their plane.
        columns[:, 2] = (np.array(last.origin_mm) - first.origin_mm) / (len(headers) - 1)
    elif shape[2] == 1:
        columns[:, 2] = first.direction[:, 2] * _thickness_mm(first)
    # Positions are rounded; where a rounded step says the same, that is what was meant.
    spacing = [first.spacing_mm[0], first.spacing_mm[1], round(float(np.linalg.norm(columns[:, 2])), 4)]
    return locate(path, shape, make_affine(columns, first.origin_mm), spacing_mm=spacing)


def _thickness_mm(header: ItkHeader) -> float:
    """Of a single slice; 1 where the file does not say."""
    for key in (_THICKNESS, _DISTANCE):
        try:
            thickness = float(header.tags.get(key, ""))
        except ValueError:
            continue
        if np.isfinite(thickness) and thickness > 0:
            return thickness
    return 1.0

"""TIFF: pictures and stacks, with ImageJ's and OME's axes and spacing, through tifffile.

Pages are slices, which lie as pictures do (see `pictures`). The spacing is that of a file CASE.json beside the image,
{"spacing": [z, y, x]} in millimetres as nnU-Net has it, or else of OME, of ImageJ, or of a resolution in centimetres;
dots per inch are about paper. A time axis is channels, as in other formats.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from autoseg.core.errors import FormatError, first_line
from autoseg.core.geometry import Geometry, Spacing3, from_canonical, to_canonical
from autoseg.core.serialize import atomic_path, read_json
from autoseg.data.pictures import import_pillow, locate_picture, one_number_per_pixel
from autoseg.data.raw import (
    MOST_COMPRESSED,
    MOST_DEFLATED,
    MOST_JPEG,
    RawImage,
    check_claim,
    check_memory,
    file_spacing_mm,
    storable,
)

_ADVICE = "copy it again from where it came from, or save it anew"
_SLICE_AXES, _CHANNEL_AXES = "ZIQ", "TCS"
_UNITS_MM = {
    "nm": 1e-6,
    "um": 1e-3,
    "\u00b5m": 1e-3,
    "\u03bcm": 1e-3,
    "\\u00b5m": 1e-3,
    "micron": 1e-3,
    "microns": 1e-3,
    "micrometer": 1e-3,
    "mm": 1.0,
    "millimeter": 1.0,
    "cm": 10.0,
    "centimeter": 10.0,
    "m": 1000.0,
    "inch": 25.4,
    "in": 25.4,
}
_MINISWHITE, _PALETTE, _CENTIMETER = 0, 3, 3
_ALPHA_SAMPLES = (1, 2)
# By the number of a compression (none, LZW, JPEG, deflate, packed bits), what one of its bytes can become. A code of
# LZW has 9 bits and more, and stands for 4095 bytes at most.
_MOST = {1: 1, 5: 3640, 6: MOST_JPEG, 7: MOST_JPEG, 8: MOST_DEFLATED, 32946: MOST_DEFLATED, 32773: 64}
_TAG_BYTES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Size of one value by the type of a tag, where it is not 1."""


@cache
def _import_tifffile() -> Any:
    """tifffile, without the notes it logs on files that are cut off: they come as errors."""
    import logging

    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    return tifffile


@dataclass(frozen=True, kw_only=True, eq=False)
class _Layout:
    """What the array of a file means.

    Attributes:
        kept: length of its axes, without those of length 1.
        order: of these axes as channels, slices, rows, columns.
        shape: slices, rows, columns.
        n_channels: that are read.
        has_samples: whether the channels are the colours of a pixel.
        bits: per sample.
        is_inverted: whether zero is white.
        palette: (3, colours) 16 bits, or None.
    """

    kept: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, int, int]
    n_channels: int
    has_samples: bool
    bits: int
    is_inverted: bool
    palette: NDArray[np.uint16] | None

    @property
    def has_inverted_numbers(self) -> bool:
        """Whether zero is shown white, and may be the background all the same; of a single bit, white is meant."""
        return self.is_inverted and self.bits > 1

    def invert(self, voxels: NDArray) -> NDArray:
        """From numbers as stored to those as shown, or back, where zero is white."""
        if voxels.dtype.kind != "u":
            return voxels
        inverted: NDArray = voxels.dtype.type(2**self.bits - 1) - voxels
        return inverted


def read_tiff(path: Path) -> RawImage:
    """Opens a TIFF file: a picture, or a stack of pages as a volume.

    Raises:
        FormatError: unreadable, several images, or axes that are not known.
    """
    with _opened(path) as tiff:
        _check_pages(path)
        _check_parts(path, tiff)
        layout = _describe(path, tiff)
        spacing = _sidecar_spacing(path) or _stored_spacing(tiff)
    geometry = locate_picture(path, layout.shape, spacing or (1.0, 1.0, 1.0))

    def stand(voxels: NDArray) -> NDArray:
        """From (C, slices, rows, columns) to canonical."""
        return to_canonical(voxels.transpose(0, 3, 2, 1), geometry.file_axcodes)

    def load() -> NDArray:
        check_memory(path, math.prod(layout.shape) * layout.n_channels)
        voxels = _read_voxels(path, layout)
        return stand(voxels if layout.palette is None else _apply_palette(voxels[0], layout.palette))

    def load_label() -> NDArray:
        check_memory(path, math.prod(layout.shape) * layout.n_channels)
        voxels = _read_voxels(path, layout)
        if layout.has_inverted_numbers:
            voxels = layout.invert(voxels)
        # The numbers of a palette are the labels, whatever colours it gives them.
        return stand((voxels[0] if len(voxels) == 1 else one_number_per_pixel(path, voxels))[None])[0]

    n_channels = layout.n_channels
    if layout.palette is not None:
        n_channels = 1 if _is_grey(layout.palette) else 3
    has_colours = layout.palette is not None or (layout.has_samples and n_channels == 3)
    tells_labels = has_colours or layout.has_inverted_numbers
    return RawImage(
        geometry=geometry, n_channels=n_channels, load=load, load_label=load_label if tells_labels else None
    )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    tifffile = _import_tifffile()
    # What tifffile and the decompressors raise for files that are cut off or are something else.
    kinds = (OSError, EOFError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError, RuntimeError)
    broken = (tifffile.TiffFileError, *kinds, struct.error, zlib.error)
    try:
        with tifffile.TiffFile(path) as tiff:
            yield tiff
    except broken as error:
        raise FormatError(f"{path}: cannot be read as TIFF ({first_line(error)}); {_ADVICE}") from error


def _check_pages(path: Path) -> None:
    """Follows the chain of pages and their tags; tifffile leaves out what lies after the place where a file is cut off.

    Raises:
        ValueError: the chain or a tag leads out of the file, or the chain in a circle.
    """
    n_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(16)
        endian = "<" if head[:2] == b"II" else ">"
        is_big = struct.unpack(f"{endian}H", head[2:4])[0] == 43
        # Number of tags in a page, one tag, and an offset, as in BigTIFF or else in TIFF.
        counted, tag, place = (
            struct.Struct(endian + kind) for kind in (("Q", "HHQQ", "Q") if is_big else ("H", "HHII", "I"))
        )
        (offset,) = place.unpack(head[8:16] if is_big else head[4:8])
        seen: set[int] = set()
        while offset:
            if offset in seen:
                raise ValueError("its pages lead in a circle")
            seen.add(offset)
            file.seek(offset)
            try:
                (n_tags,) = counted.unpack(file.read(counted.size))
                if n_tags * tag.size > n_bytes:
                    raise ValueError(f"its page {len(seen)} claims {n_tags} tags, more than the file can have")
                tags = list(tag.iter_unpack(file.read(n_tags * tag.size)))
                (offset,) = place.unpack(file.read(place.size))
            except struct.error as error:
                raise ValueError(f"it is cut off after {len(seen) - 1} pages") from error
            for code, kind, count, start in tags:
                size = count * _TAG_BYTES.get(kind, 1)
                if size > place.size and start + size > n_bytes:
                    raise ValueError(f"it is cut off before the tag {code} of page {len(seen)}")


def _check_parts(path: Path, tiff: Any) -> None:
    """Refuses OME's lists of files that lead elsewhere: tifffile reads what they name.

    Raises:
        FormatError: a file is not beside this one.
    """
    if not tiff.is_ome:
        return
    for name in re.findall(r"""FileName\s*=\s*["']([^"']*)""", tiff.ome_metadata or ""):
        if re.search(r"[/\\:&]", name) or name in (".", ".."):
            raise FormatError(
                f"{path}: says that a part of it is in '{name}', expected a file beside it; save the image in one file"
            )


def _describe(path: Path, tiff: Any) -> _Layout:
    if len(tiff.series) != 1:
        shapes = ", ".join(str(tuple(series.shape)) for series in tiff.series[:4])
        raise FormatError(
            f"{path}: found {len(tiff.series)} images of different size or kind ({shapes}), expected one picture or "
            "stack; save the one that is meant in a file of its own"
        )
    series, page = tiff.series[0], tiff.pages[0]
    kept = [(axis, size) for axis, size in zip(series.axes, series.shape, strict=True) if size != 1 or axis in "YX"]
    axes = "".join(axis for axis, _ in kept)
    slices = [axis for axis in axes if axis in _SLICE_AXES]
    channels = [axis for axis in _CHANNEL_AXES if axis in axes]
    if 0 in series.shape or len(slices) > 1 or set(axes) != {*channels, *slices, "Y", "X"}:
        raise FormatError(
            f"{path}: found the axes {series.axes} of {tuple(series.shape)}, expected rows and columns (YX), at most "
            "one axis of slices (Z) and one of channels (C); save one volume per file"
        )
    if series.dtype is None or series.dtype.kind not in "biuf":
        raise FormatError(f"{path}: found voxels of type {series.dtype}, expected numbers")
    size_of = dict(kept)
    # Of a stack in several files, those beside count as well.
    files = {path}
    if series.is_multifile:
        files |= {Path(known.parent.filehandle.path) for known in series.pages if known is not None}
    held = sum(file.stat().st_size for file in files)
    most = _MOST.get(int(page.compression), MOST_COMPRESSED)
    # Where samples have different numbers of bits, it is a tuple.
    n_bits = page.bitspersample if isinstance(page.bitspersample, int) else 8
    check_claim(path, math.prod(series.shape) * n_bits // 8, held=held, most=most)
    order = tuple(axes.index(axis) for axis in (*channels, *slices, "Y", "X"))
    n_samples = math.prod(size_of[axis] for axis in channels)
    has_samples = channels == ["S"]
    extra = tuple(page.extrasamples or ())
    n_alpha = len(extra) if has_samples and all(kind in _ALPHA_SAMPLES for kind in extra) else 0
    is_palette = page.photometric == _PALETTE and n_samples == 1 and page.colormap is not None
    return _Layout(
        kept=tuple(size for _, size in kept),
        order=order,
        shape=(math.prod(size_of[axis] for axis in slices), size_of["Y"], size_of["X"]),
        n_channels=n_samples - n_alpha,
        has_samples=has_samples,
        bits=int(page.bitspersample),
        is_inverted=page.photometric == _MINISWHITE,
        palette=page.colormap if is_palette else None,
    )


def _read_voxels(path: Path, layout: _Layout) -> NDArray:
    """(C, slices, rows, columns) as stored."""
    with _opened(path) as tiff:
        n_bytes = path.stat().st_size
        for number, page in enumerate(tiff.pages, start=1):
            ends = (start + size for start, size in zip(page.dataoffsets, page.databytecounts, strict=False))
            if max(ends, default=0) > n_bytes:
                raise ValueError(f"it is cut off in page {number}")
        series = tiff.series[0]
        try:
            voxels, is_inverted = series.asarray(), layout.is_inverted
        except ValueError as error:
            if not re.search("imagecodecs|not supported", str(error)):
                raise
            voxels, is_inverted = _read_with_pillow(path, series), False
        if voxels.size != math.prod(layout.kept):
            raise ValueError(f"found {voxels.size} pixels, expected {math.prod(layout.kept)}")
    if voxels.dtype == np.bool_:
        voxels = voxels.astype(np.uint8)
    if is_inverted:
        voxels = layout.invert(voxels)
    voxels = voxels.reshape(layout.kept).transpose(layout.order).reshape(-1, *layout.shape)
    for alpha in voxels[layout.n_channels :]:
        if alpha.min() != alpha.max():
            raise FormatError(
                f"{path}: found transparency between {alpha.min()} and {alpha.max()}, expected none or the same "
                "everywhere; flatten the picture onto the background that is meant"
            )
    return voxels[: layout.n_channels]


def _read_with_pillow(path: Path, series: Any) -> NDArray:
    """Voxels in a compression such as LZW or JPEG that tifffile alone does not read; zero is black already."""
    pillow = import_pillow()
    pages = []
    try:
        with pillow.open(path, formats=("TIFF",)) as picture:
            for number in range(len(series.pages)):
                picture.seek(number)
                pages.append(np.asarray(picture))
    except (pillow.DecompressionBombError, SyntaxError) as error:
        raise FormatError(f"{path}: {first_line(error)}; save it without compression") from error
    voxels = np.stack(pages)
    if voxels.size != math.prod(series.shape) or voxels.dtype.itemsize != series.dtype.itemsize:
        raise FormatError(
            f"{path}: found a compression that needs the package imagecodecs; install it with 'pip install "
            "imagecodecs', or save the image without compression"
        )
    return voxels


def _apply_palette(numbers: NDArray, palette: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """(...) numbers as (C, ...) grey or RGB of 8 bits."""
    colours = (palette >> 8).astype(np.uint8)
    return (colours[:1] if _is_grey(palette) else colours)[:, numbers]


def _is_grey(palette: NDArray[np.uint16]) -> bool:
    return bool((palette == palette[:1]).all())


def sidecars(path: Path) -> list[Path]:
    """CASE.json beside CASE.tif or CASE_0000.tif, where it is there."""
    name = re.sub(r"(\.ome)?\.tiff?$", "", path.name, flags=re.IGNORECASE)
    stems = dict.fromkeys((name, re.sub(r"_\d{4}$", "", name)))
    return [file for stem in stems if (file := path.with_name(f"{stem}.json")).is_file()]


def _sidecar_spacing(path: Path) -> Spacing3 | None:
    """Of the first sidecar that speaks of spacing; None where there is none."""
    for file in sidecars(path):
        content = read_json(file)
        if not isinstance(content, dict) or "spacing" not in content:
            continue
        spacing = content["spacing"]
        if not (isinstance(spacing, list) and len(spacing) == 3 and all(map(_is_length, spacing))):
            raise FormatError(
                f"{file}: found the spacing {spacing}, expected three lengths in mm [z, y, x]; correct the file"
            )
        return (float(spacing[0]), float(spacing[1]), float(spacing[2]))
    return None


def _is_length(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _stored_spacing(tiff: Any) -> Spacing3 | None:
    """What the file itself says, (z, y, x) in millimetres; None where it says nothing."""
    if tiff.is_ome:
        return _ome_spacing(tiff.ome_metadata or "")
    page = tiff.pages[0]
    density_x, density_y = (_density(page, name) for name in ("XResolution", "YResolution"))
    if tiff.is_imagej:
        metadata = tiff.imagej_metadata or {}
        unit_mm = _UNITS_MM.get(str(metadata.get("unit", "")).strip().lower())
        # ImageJ leaves out a distance of 1.
        depth = metadata.get("spacing", 1.0 if metadata.get("slices", 1) != 1 else None)
        depth = abs(depth) if isinstance(depth, (int, float)) else 0.0
    else:
        tag = page.tags.get("ResolutionUnit")
        unit_mm, depth = (10.0 if tag is not None and tag.value == _CENTIMETER else None), 0.0
    if unit_mm is None or density_x is None or density_y is None:
        return None
    y, x = (_shorten(unit_mm / density) for density in (density_y, density_x))
    # A picture's thickness does not matter, and pages without a distance lie 1 mm apart.
    z = _shorten(unit_mm * depth) if _is_length(depth) else 1.0
    return (z, y, x)


def _density(page: Any, name: str) -> float | None:
    """Pixels per unit."""
    tag = page.tags.get(name)
    if tag is None:
        return None
    numerator, denominator = tag.value
    return numerator / denominator if numerator and denominator else None


def _shorten(length_mm: float) -> float:
    """A length that a fraction of whole numbers stands for, without the digits that come from the division."""
    return float(f"{length_mm:.9g}")


def _ome_spacing(text: str) -> Spacing3 | None:
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return None
    pixels = next((element for element in root.iter() if element.tag.endswith("}Pixels")), None)
    if pixels is None:
        return None
    lengths: list[float | None] = []
    for axis in "ZYX":
        unit_mm = _UNITS_MM.get(pixels.get(f"PhysicalSize{axis}Unit", "\u00b5m").strip().lower())
        try:
            length = float(pixels.get(f"PhysicalSize{axis}", ""))
        except ValueError:
            length = 0.0
        # Multiplying by a thousandth leaves digits that nobody wrote.
        is_known = unit_mm is not None and _is_length(length)
        lengths.append(float(f"{length * (unit_mm or 0):.15g}") if is_known else None)
    z, y, x = lengths
    return None if y is None or x is None else (z or 1.0, y, x)


def write_tiff(path: Path, volume: NDArray, geometry: Geometry, *, like: Path | None, scale: float) -> None:
    """Writes a stack of pages with OME's spacing; of the affine, TIFF keeps nothing else.

    Raises:
        FormatError: values that TIFF cannot hold.
    """
    array = storable(volume, scale)
    if array.dtype.kind in "iu" and array.dtype.itemsize == 8:
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        if low < -(2**31) or high >= 2**31:
            raise FormatError(
                f"{path}: found values from {low} to {high}, expected at most 32 bits in TIFF; write them as .nii.gz"
            )
        array = array.astype(np.int32)
    pages = np.ascontiguousarray(from_canonical(array, geometry.file_axcodes).T)
    axes = "YX" if pages.shape[0] == 1 else "ZYX"
    x, y, z = file_spacing_mm(geometry).tolist()
    metadata: dict[str, Any] = {"axes": axes}
    for axis, length in zip("XYZ", (x, y, z), strict=True):
        metadata |= {f"PhysicalSize{axis}": length, f"PhysicalSize{axis}Unit": "mm"}
    with atomic_path(path) as temporary:
        _import_tifffile().imwrite(
            temporary,
            pages[0] if axes == "YX" else pages,
            ome=True,
            photometric="minisblack",
            compression="zlib",
            resolution=(10 / x, 10 / y),
            resolutionunit="CENTIMETER",
            metadata=metadata,
        )

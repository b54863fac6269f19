"""Pictures of one slice: PNG, BMP, GIF and JPEG, through Pillow.

A picture lies as radiologists look at a slice: its first row is the front, its first column the patient's right. So its
columns run to the left and its rows to the back (axcodes L, P, S), as in a MetaImage without directions, and canonical
arrays have both turned round. Writing turns them back, and the rows of a label map are those of its picture. Voxels
have 1 x 1 x 1 mm: what pictures say of dots per inch is about paper. They are taken as stored, whatever a camera noted
about how it was held.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from autoseg.core.errors import FormatError, first_line, list_some
from autoseg.core.geometry import Geometry, from_canonical, to_canonical
from autoseg.core.serialize import atomic_path
from autoseg.data.raw import MOST_DEFLATED, MOST_JPEG, RawImage, check_claim, check_memory, locate, storable

if TYPE_CHECKING:
    from PIL import Image

_FORMATS = ("PNG", "BMP", "GIF", "JPEG")
_GREY_MODES = ("1", "L", "I", "I;16", "I;16B", "I;16L")
_ALPHA_MODES = ("LA", "PA", "RGBA")
_COLOUR_MODES = ("P", "RGB")
_WRITTEN_AS = {".png": ("PNG", 2**16 - 1), ".bmp": ("BMP", 255), ".gif": ("GIF", 255)}
# What a byte of a picture can become: runs of BMP, codes of GIF.
_MOST = {"PNG": MOST_DEFLATED, "BMP": 128, "GIF": 3640, "JPEG": MOST_JPEG, "MPO": MOST_JPEG}
_ADVICE = "copy it again from where it came from, or save it anew as PNG"


def locate_picture(path: Path, shape: Sequence[int], spacing_mm: Sequence[float]) -> Geometry:
    """Geometry of a picture or of a stack of pictures.

    Args:
        path: for messages.
        shape: slices, rows, columns.
        spacing_mm: in the same order.
    """
    z, y, x = spacing_mm
    return locate(path, tuple(shape)[::-1], np.diag([-x, -y, z, 1.0]), spacing_mm=(x, y, z))


def one_number_per_pixel(path: Path, colours: NDArray) -> NDArray:
    """A coloured picture as a label map, where its colours leave no doubt which numbers they stand for.

    Args:
        path: for messages.
        colours: (3, ...) integers.

    Returns:
        (...): the grey value, the only channel that is not zero, or the brightest one of a single colour on black.

    Raises:
        FormatError: several colours.
    """
    if (colours[0] == colours[1]).all() and (colours[0] == colours[2]).all():
        return colours[0]
    used = [channel for channel in colours if channel.any()]
    if len(used) == 1:
        return used[0]
    red, green, blue = colours.astype(np.int64)
    codes = np.unique((red << 32) | (green << 16) | blue)
    if len(codes) <= 2 and codes[0] == 0:
        return colours.max(axis=0)
    shown = [str((int(code >> 32), int(code >> 16) & 0xFFFF, int(code) & 0xFFFF)) for code in codes[:4]]
    raise FormatError(
        f"{path}: found {len(codes)} colours such as {list_some(shown)} in a label map, expected one number per pixel; "
        "convert each colour to the number of its class and save that as a grey PNG"
    )


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What a picture's header says of its pixels."""

    format: str
    mode: str
    shape: tuple[int, int, int]
    is_grey: bool
    has_alpha: bool


def read_picture(path: Path) -> RawImage:
    """Opens a picture: grey is one channel, colours are three.

    Raises:
        FormatError: unreadable, moving, or of colours that a screen does not have.
    """
    with _opened(path) as picture:
        if picture.format == "PNG":
            _check_chunks(path)
        n_bits = _png_bits(path) if picture.format == "PNG" else 1 if picture.mode == "1" else 8
        n_values = picture.width * picture.height * len(picture.getbands())
        most = _MOST[str(picture.format)]
        check_claim(path, n_values * n_bits // 8, held=path.stat().st_size, most=most)
        # Of a palette, this reads the pixels.
        check_memory(path, n_values if picture.mode == "P" else 0)
        kind = _describe(path, picture)
    geometry = locate_picture(path, kind.shape, (1.0, 1.0, 1.0))

    def stand(pixels: NDArray) -> NDArray:
        """From (C, rows, columns) to canonical."""
        return to_canonical(pixels.swapaxes(1, 2)[..., None], geometry.file_axcodes)

    def load() -> NDArray:
        check_memory(path, n_values)
        with _opened(path) as picture:
            return stand(_image_pixels(path, picture, kind))

    def load_label() -> NDArray:
        check_memory(path, n_values)
        with _opened(path) as picture:
            return stand(_label_pixels(path, picture, kind)[None])[0]

    return RawImage(
        geometry=geometry,
        n_channels=1 if kind.is_grey else 3,
        load=load,
        load_label=load_label,
        is_lossy=kind.format in ("JPEG", "MPO"),
    )


@cache
def import_pillow() -> Any:
    """Pillow's images, without its warnings of large ones: what does not fit into memory comes as an error."""
    from PIL import Image

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    return Image


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    pillow = import_pillow()
    # What Pillow raises for files that are cut off or are something else; SyntaxError is what it calls a broken PNG.
    broken = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, struct.error, zlib.error)
    try:
        with pillow.open(path, formats=_FORMATS) as picture:
            yield picture
    except pillow.DecompressionBombError as error:
        raise FormatError(f"{path}: {first_line(error)}; save it as TIFF, or in pieces") from error
    except broken as error:
        raise FormatError(f"{path}: cannot be read as a picture ({first_line(error)}); {_ADVICE}") from error


def _describe(path: Path, picture: Image.Image) -> _Kind:
    mode = picture.mode
    if mode not in (*_GREY_MODES, *_ALPHA_MODES, *_COLOUR_MODES):
        raise FormatError(f"{path}: found pixels of the kind {mode}, expected grey or RGB; convert it to one of these")
    n_frames = getattr(picture, "n_frames", 1)
    if n_frames > 1 and picture.format in ("GIF", "PNG"):
        raise FormatError(f"{path}: found {n_frames} frames, expected one picture; save volumes as TIFF")
    if picture.format == "PNG" and mode not in _GREY_MODES and _png_bits(path) > 8:
        raise FormatError(f"{path}: found 16 bits per colour, expected 8; save colours of 16 bits as TIFF")
    is_grey = mode in (*_GREY_MODES, "LA") or (mode == "P" and _has_grey_palette(picture))
    return _Kind(
        format=str(picture.format),
        mode=mode,
        shape=(1, picture.height, picture.width),
        is_grey=is_grey,
        has_alpha=mode in _ALPHA_MODES or (mode in ("L", "P", "RGB") and "transparency" in picture.info),
    )


def _check_chunks(path: Path) -> None:
    """Refuses a PNG file with a chunk that goes beyond its end: Pillow allocates what that says that it has.

    Raises:
        ValueError: it does.
    """
    n_bytes = path.stat().st_size
    with path.open("rb") as file:
        place = 8
        while head := file.read(8) if file.seek(place) < n_bytes else b"":
            length = int.from_bytes(head[:4], "big")
            if place + 12 + length > n_bytes:
                raise ValueError(f"its chunk at byte {place} claims {length} bytes, the file has {n_bytes - place}")
            if head[4:] == b"IEND":
                break
            place += 12 + length


def _png_bits(path: Path) -> int:
    """Bits per sample, which Pillow does not tell where it takes the upper eight of sixteen."""
    with path.open("rb") as file:
        return file.read(25)[24]


def _has_grey_palette(picture: Image.Image) -> bool:
    palette = picture.getpalette("RGB") or []
    return palette[0::3] == palette[1::3] == palette[2::3]


def _image_pixels(path: Path, picture: Image.Image, kind: _Kind) -> NDArray:
    """(C, rows, columns)."""
    if kind.has_alpha:
        _check_alpha(path, picture)
    if kind.mode in _GREY_MODES:
        return _grey(picture, kind)[None]
    colours = np.moveaxis(np.asarray(picture.convert("RGB")), -1, 0)
    return colours[:1] if kind.is_grey else colours


def _label_pixels(path: Path, picture: Image.Image, kind: _Kind) -> NDArray:
    """(rows, columns) of numbers.

    The numbers of a palette are the labels, whatever colours it gives them. Only in GIF and BMP, which have no other
    way to store grey, the greys of a palette are the labels.
    """
    if kind.mode == "P":
        stands_for_grey = kind.is_grey and kind.format in ("GIF", "BMP")
        return np.asarray(picture.convert("RGB"))[..., 0] if stands_for_grey else np.asarray(picture)
    pixels = _image_pixels(path, picture, kind)
    return pixels[0] if len(pixels) == 1 else one_number_per_pixel(path, pixels)


def _grey(picture: Image.Image, kind: _Kind) -> NDArray:
    pixels = np.asarray(picture)
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8)
    # Older Pillow gives 16 bits as int32.
    return pixels.astype(np.uint16) if kind.mode not in ("1", "L") else pixels


def _check_alpha(path: Path, picture: Image.Image) -> None:
    """Refuses pictures that are transparent in places: what is seen there is not what is stored."""
    low, high = picture.convert("RGBA").getchannel("A").getextrema()
    if low != high:
        raise FormatError(
            f"{path}: found transparency between {low} and {high}, expected none or the same everywhere; flatten the "
            "picture onto the background that is meant"
        )


def write_picture(path: Path, volume: NDArray, geometry: Geometry, *, like: Path | None, scale: float) -> None:
    """Writes one slice as a grey PNG of 8 or 16 bits, or as a grey BMP or GIF of 8. Its affine is not kept.

    Raises:
        FormatError: several slices, or values that the format cannot hold.
    """
    from PIL import Image

    kind, most = _WRITTEN_AS[path.suffix.lower()]
    pixels = from_canonical(storable(volume, scale), geometry.file_axcodes)
    if pixels.shape[2] != 1:
        raise FormatError(
            f"{path}: found {pixels.shape[2]} slices, expected 1 in {kind}; write volumes as .tif or .nii.gz"
        )
    if not np.issubdtype(pixels.dtype, np.integer):
        raise FormatError(
            f"{path}: found values of type {pixels.dtype}, expected whole numbers in {kind}; "
            "write others as .tif or .nii.gz"
        )
    low, high = (int(pixels.min()), int(pixels.max())) if pixels.size else (0, 0)
    if low < 0 or high > most:
        raise FormatError(
            f"{path}: found values from {low} to {high}, expected 0 to {most} in {kind}; "
            "write others as .tif or .nii.gz"
        )
    is_wide = most > 255 and (high > 255 or pixels.dtype == np.uint16)
    rows = np.ascontiguousarray(pixels[..., 0].T, dtype=np.uint16 if is_wide else np.uint8)
    with atomic_path(path) as temporary:
        # A palette that Pillow makes smaller would give pixels other numbers.
        Image.fromarray(rows).save(temporary, format=kind, optimize=False)

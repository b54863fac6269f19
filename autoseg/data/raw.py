"""What every reader returns, and what readers and writers of several formats share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autoseg.core.errors import FormatError
from autoseg.core.geometry import Geometry, make_geometry
from autoseg.core.runtime import format_memory, machine_memory_gib

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""DICOM and ITK count from right to left and from front to back, affines in autoseg the other way round."""

MOST_DEFLATED = 1032
"""Bytes that one compressed byte of gzip, zip or PNG can become at most."""
MOST_JPEG = 2048
"""Likewise: a block of 8 x 8 pixels takes one bit at least."""
MOST_COMPRESSED = 100_000
"""Likewise, of compressions that are not looked into; bzip2 comes to 46,000, Zstandard to 33,000."""

PIECE_VOXELS = 2**20


@dataclass(frozen=True, kw_only=True)
class RawImage:
    """What a reader returns.

    Attributes:
        geometry: of the volume.
        n_channels: volumes stored in the file.
        load: reads the voxels as stored, canonical (C, Z, Y, X).
        load_label: reads the file as a label map, canonical (Z, Y, X), where a format can store one in another way than
            an image; None where a label map is an image of one channel.
        is_lossy: whether the compression has changed values.
    """

    geometry: Geometry
    n_channels: int
    load: Callable[[], NDArray]
    load_label: Callable[[], NDArray] | None = None
    is_lossy: bool = False

    def load_float(self) -> NDArray[np.float32]:
        """The voxels, (C, Z, Y, X), contiguous."""
        return np.ascontiguousarray(self.load(), dtype=np.float32)

    def load_shown(self) -> NDArray:
        """What a grey picture of it shows, (Z, Y, X): the first channel, or the mean of red, green and blue."""
        voxels = self.load()
        return voxels.astype(np.float32).mean(axis=0) if self.is_picture and self.n_channels == 3 else voxels[0]

    @property
    def is_picture(self) -> bool:
        """Whether three channels are colours: where a format stores label maps in a way of its own."""
        return self.load_label is not None


def in_pieces(array: NDArray) -> Iterator[NDArray]:
    """All values, a million at a time: to count them makes a copy of eight bytes for each."""
    flat = array.ravel()
    for start in range(0, flat.size, PIECE_VOXELS):
        yield flat[start : start + PIECE_VOXELS]


class Writer(Protocol):
    """What writes one format, atomically; see `autoseg.data.io.write_volume`."""

    def __call__(self, path: Path, volume: NDArray, geometry: Geometry, *, like: Path | None, scale: float) -> None: ...


def locate(path: Path, file_shape: Sequence[int], affine: NDArray, *, spacing_mm: Sequence[float]) -> Geometry:
    """Geometry of a file, see `make_geometry`; an error names the file."""
    try:
        return make_geometry(file_shape, affine, header_spacing_mm=spacing_mm)
    except FormatError as error:
        raise FormatError(f"{path}: {error}; correct the header, or convert the image anew") from error


def check_claim(path: Path, n_bytes: int, *, held: int, most: int = 1) -> None:
    """Refuses a header that tells of more voxels than there can be, before anything is allocated for them.

    Args:
        path: for the message.
        n_bytes: of all voxels, as the header tells.
        held: bytes that the file has, or the files that its voxels are in.
        most: what one of these bytes can become.

    Raises:
        FormatError: it claims more.
    """
    if n_bytes <= held * most:
        return
    compressed = "" if most == 1 else f", which can hold {_describe_bytes(held * most)}"
    raise FormatError(
        f"{path}: its header claims {_describe_bytes(n_bytes)} of voxels, the file has {_describe_bytes(held)}"
        f"{compressed}: it is cut off, or its header is damaged; copy it again from where it came from"
    )


def _describe_bytes(n: int) -> str:
    return f"{n} bytes" if n < 2**20 else format_memory(n / 2**30)


def check_memory(path: Path, n_voxels: int) -> None:
    """Refuses an image of which not even a copy in single precision fits into the memory of this machine.

    Args:
        path: for the message.
        n_voxels: of all channels.

    Raises:
        FormatError: it is larger.
    """
    needed_gib, most_gib = 4 * n_voxels / 2**30, machine_memory_gib()
    if needed_gib > most_gib:
        raise FormatError(
            f"{path}: its {n_voxels:,} voxels need {format_memory(needed_gib)} of memory, this machine may use "
            f"{format_memory(most_gib)}; crop or split the image, or use a machine with more memory"
        )


def file_spacing_mm(geometry: Geometry) -> NDArray[np.float64]:
    """Spacing along the file's (i, j, k), from its affine, without the last digit's noise of an oblique rotation."""
    return np.linalg.norm(np.asarray(geometry.affine, np.float64)[:3, :3], axis=0).round(12)


def storable(volume: NDArray, scale: float) -> NDArray:
    """A volume in the values that it stands for: float32 where it is scaled, and of a type that formats have."""
    if scale != 1:
        return volume.astype(np.float32) * np.float32(scale)
    if volume.dtype == np.bool_:
        return volume.astype(np.uint8)
    return volume.astype(np.float32) if volume.dtype == np.float16 else volume

"""Files that were made to do harm: headers that claim terabytes, bombs, paths that lead out, code, escape sequences."""

from __future__ import annotations

import ast
import gzip
import hashlib
import io
import json
import logging
import os
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fuzz
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image

from autoseg.core.errors import AutosegError, DatasetError, FormatError, Problem, TrainingError, WorkspaceError
from autoseg.core.runtime import peak_memory_gib
from autoseg.core.serialize import dump_json, holds_json, read_json, write_json
from autoseg.core.text import PrintableFormatter, printable, printable_json, spell_out
from autoseg.data.io import read_geometry, read_image, read_label, read_raw
from autoseg.data.layouts import open_dataset
from autoseg.reporting.text import format_table

Maker = Callable[[Path], Path]
MIB = 2**20


# -- images ------------------------------------------------------------------------------------------------------------


def nifti(
    *shape: int,
    data: bytes = bytes(1000),
    kind: int = 1,
    extension: bytes = bytes(4),
    offset: float = 0,
    **fields: object,
) -> bytes:
    """The bytes of a file whose header says what it is told to, of eight-bit voxels 1 mm apart."""
    header = (nibabel.Nifti1Header if kind == 1 else nibabel.Nifti2Header)()
    header["dim"][: len(shape) + 1] = (len(shape), *shape)
    header["datatype"], header["bitpix"] = 2, 8
    header["pixdim"][1:4] = 1
    header["sform_code"] = 1
    header["srow_x"], header["srow_y"], header["srow_z"] = np.eye(4)[:3]
    header["magic"] = b"n+1" if kind == 1 else b"n+2"
    header["vox_offset"] = offset or header.sizeof_hdr + len(extension)
    for name, value in fields.items():
        header[name] = value
    return bytes(header.binaryblock) + extension + data


def write(name: str, data: bytes) -> Maker:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".nii.gz") else data)
        return folder / name

    return make


def png(width: int, height: int, *, rows: bytes = b"") -> bytes:
    """A grey picture of 8 bits whose pixels are what `rows` says."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def changed_tiff(**tags: int) -> Maker:
    """A picture of which tags say something else."""

    def make(folder: Path) -> Path:
        path = folder / "a.tif"
        tifffile.imwrite(path, np.zeros((4, 4), np.uint8), metadata=None, photometric="minisblack", software=False)
        with tifffile.TiffFile(path, mode="r+") as tiff:
            for name, value in tags.items():
                tiff.pages.first.tags[name].overwrite(value)
        return path

    return make


def jpeg_of_many_pixels(folder: Path) -> Path:
    path = folder / "a.jpg"
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)
    data = path.read_bytes()
    place = data.index(b"\xff\xc0")
    path.write_bytes(data[: place + 5] + struct.pack(">HH", 9000, 9000) + data[place + 9 :])
    return path


def big_tiff_of_tags(folder: Path) -> Path:
    path = folder / "a.tif"
    path.write_bytes(b"II" + struct.pack("<HHHQQ", 43, 8, 0, 16, 2**59) + bytes(64))
    return path


def ome_elsewhere(folder: Path) -> Path:
    path = folder / "a.ome.tif"
    tifffile.imwrite(path, np.zeros((2, 4, 4), np.uint8), ome=True, photometric="minisblack", metadata={"axes": "ZYX"})
    data = path.read_bytes()
    with tifffile.TiffFile(path) as tiff:
        old = tiff.pages.first.tags["ImageDescription"]
        text = data[old.valueoffset : old.valueoffset + old.count]
    inside = b'<TiffData IFD="1" FirstZ="1"><UUID FileName="../../other.ome.tif">urn:uuid:1</UUID></TiffData></Pixels>'
    new = text.rstrip(b"\0").replace(b"</Pixels>", inside) + b"\0"
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages.first.tags["ImageDescription"].overwrite(new)
    return path


def itk(name: str, **fields: str) -> Maker:
    """An NRRD or MetaImage file of 4 x 4 x 4 voxels with some fields changed; `/` in a key stands for a space."""

    def make(folder: Path) -> Path:
        if name.endswith((".nrrd", ".nhdr")):
            known = {"type": "uint8", "dimension": "3", "sizes": "4 4 4", "encoding": "raw"}
            fields_ = {key.replace("_", " "): value for key, value in fields.items()}
            text = "NRRD0004\n" + "".join(f"{key}: {value}\n" for key, value in (known | fields_).items()) + "\n"
        else:
            known = {"ObjectType": "Image", "NDims": "3", "DimSize": "4 4 4", "ElementType": "MET_UCHAR"}
            known |= {"BinaryData": "True", "ElementDataFile": "LOCAL"} | fields
            known["ElementDataFile"] = known.pop("ElementDataFile")  # it comes last
            text = "".join(f"{key} = {value}\n" for key, value in known.items())
        inner = folder / "inner"
        inner.mkdir(exist_ok=True)
        # What must not be read, and would be enough.
        (folder / "secret.raw").write_bytes(bytes(64))
        (inner / name).write_bytes(text.encode() + bytes(64))
        return inner / name

    return make


def dicom(elements: dict[tuple[int, int], tuple[bytes, bytes, int | None]]) -> Maker:
    """A DICOM file of 4 x 4 pixels with elements changed; the last of each is the length that it claims."""

    def make(folder: Path) -> Path:
        known: dict[tuple[int, int], tuple[bytes, bytes, int | None]] = {
            (0x0008, 0x0016): (b"UI", b"1.2.840.10008.5.1.4.1.1.7\0", None),
            (0x0008, 0x0018): (b"UI", b"1.2.3.4\0", None),
            (0x0008, 0x0060): (b"CS", b"OT", None),
            (0x0028, 0x0002): (b"US", struct.pack("<H", 1), None),
            (0x0028, 0x0004): (b"CS", b"MONOCHROME2 ", None),
            (0x0028, 0x0010): (b"US", struct.pack("<H", 4), None),
            (0x0028, 0x0011): (b"US", struct.pack("<H", 4), None),
            (0x0028, 0x0100): (b"US", struct.pack("<H", 8), None),
            (0x0028, 0x0101): (b"US", struct.pack("<H", 8), None),
            (0x0028, 0x0102): (b"US", struct.pack("<H", 7), None),
            (0x0028, 0x0103): (b"US", struct.pack("<H", 0), None),
            (0x7FE0, 0x0010): (b"OB", bytes(16), None),
        }
        syntax = b"1.2.840.10008.1.2.1\0"
        data = struct.pack("<HH2sH", 2, 0x10, b"UI", len(syntax)) + syntax
        for (group, number), (kind, value, length) in sorted((known | elements).items()):
            length = len(value) if length is None else length
            head = struct.pack("<HH2s", group, number, kind)
            head += struct.pack("<HI", 0, length) if kind in (b"OB", b"UN", b"SQ") else struct.pack("<H", length)
            data += head + value
        path = folder / "a.dcm"
        path.write_bytes(bytes(128) + b"DICM" + data)
        return path

    return make


US_MOST = struct.pack("<H", 65535)
CLAIMS = "its header claims .* of voxels"
OUTSIDE = "its header says that the voxels are in '.*', expected a file beside it"

IMAGES: dict[str, tuple[Maker, str]] = {
    "terabytes": (write("a.nii", nifti(30000, 30000, 30000)), "claims 25,146 GiB of voxels, the file has 1000 bytes"),
    "terabytes, compressed": (
        write("a.nii.gz", nifti(30000, 30000, 30000)),
        "the file has [0-9]+ bytes, which can hold",
    ),
    "all axes": (write("a.nii", nifti(32767, 32767, 32767, 100)), CLAIMS),
    "all axes, compressed": (write("a.nii.gz", nifti(32767, 32767, 32767, 100)), CLAIMS),
    "seven axes": (write("a.nii.gz", nifti(*[32767] * 7)), CLAIMS),
    "NIfTI-2": (write("a.nii", nifti(2**62, 4, 4, kind=2)), CLAIMS),
    "NIfTI-2, compressed": (write("a.nii.gz", nifti(2**62, 2**62, 2**62, kind=2)), CLAIMS),
    "negative axes": (write("a.nii", nifti(-5, 4, 4)), r"found the shape \(-5, 4, 4\), expected"),
    "negative axes of NIfTI-2": (write("a.nii.gz", nifti(4, -(2**62), 4, kind=2)), "found the shape"),
    "a negative number of axes": (write("a.nii", nifti(4, 4, 4, dim=[-3] + [4] * 7)), r"found the shape \(\)"),
    "too many axes": (write("a.nii", nifti(4, 4, 4, dim=[30000] + [4] * 7)), "found the shape"),
    "voxels beyond the end": (write("a.nii", nifti(4, 4, 4, offset=1e12)), "puts the voxels at byte 1e.12, expected"),
    "voxels beyond the end, compressed": (write("a.nii.gz", nifti(4, 4, 4, offset=1e9)), "puts the voxels at byte"),
    "voxels before the file": (write("a.nii", nifti(4, 4, 4, offset=-1000)), "puts the voxels at byte -1000"),
    "voxels nowhere": (write("a.nii", nifti(4, 4, 4, offset=np.nan)), "puts the voxels at byte nan"),
    "voxels at infinity": (write("a.nii.gz", nifti(4, 4, 4, offset=np.inf)), "puts the voxels at byte inf"),
    "gigabytes of extensions": (
        write("a.nii.gz", nifti(4, 4, 4, data=bytes(200 * MIB), offset=150 * MIB)),
        "claims 150 MiB of extensions before the voxels",
    ),
    "an extension of two gigabytes": (
        write("a.nii.gz", nifti(4, 4, 4, extension=struct.pack("<4sii", b"\1\0\0\0", 2**31 - 16, 4) + bytes(96))),
        "claims an extension of 2147483632 bytes",
    ),
    "a negative extension": (
        write("a.nii", nifti(4, 4, 4, extension=struct.pack("<4sii", b"\1\0\0\0", -16, 4) + bytes(96))),
        "claims an extension of -16 bytes",
    ),
    "NaN in the affine": (write("a.nii", nifti(4, 4, 4, srow_y=[np.nan] * 4)), "expected a finite, invertible 4x4"),
    "infinite spacing": (
        write("a.nii", nifti(4, 4, 4, sform_code=0, pixdim=[1, np.inf, 1, 1, 0, 0, 0, 0])),
        "expected a finite, invertible 4x4|found the spacing",
    ),
    "NaN as spacing": (
        write("a.nii", nifti(4, 4, 4, sform_code=0, pixdim=[1, np.nan, 1, 1, 0, 0, 0, 0])),
        "expected a finite, invertible 4x4|found the spacing",
    ),
    "no spacing": (
        write("a.nii", nifti(4, 4, 4, sform_code=0, pixdim=[1, 0, 0, 0, 0, 0, 0, 0])),
        "found the spacing .*, expected more than 0",
    ),
    "an unknown type": (write("a.nii", nifti(4, 4, 4, datatype=12345)), "found voxels of the unknown type 12345"),
    "complex voxels": (
        write("a.nii.gz", nifti(4, 4, 4, datatype=1792, bitpix=128, data=bytes(1024))),
        "expected numbers",
    ),
    "an uncompressed bomb": (write("a.nii.gz", nifti(40, 40, 40)), "its voxels cannot be read"),
    "a sparse file": (
        lambda folder: sparse(folder / "a.nii", nifti(30000, 30000, 2000), 2 * 10**12),
        "voxels need .* of memory, this machine may use",
    ),
    "PNG": (write("a.png", png(2**31 - 1, 2**31 - 1)), "could be decompression bomb"),
    "PNG below Pillow's limit": (write("a.png", png(13000, 13000, rows=bytes(10**5))), CLAIMS),
    "PNG with a part of four gigabytes": (
        write("a.png", png(4, 4, rows=bytes(20))[:-12] + b"\xff\xff\xff\xf0IDATx"),
        "its chunk at byte [0-9]+ claims 4294967280 bytes, the file has 9",
    ),
    "PNG of text": (
        write("a.png", png(4, 4).replace(b"IEND", b"zTXt")[:-8] + struct.pack(">I", 10**9) + b"zTXt"),
        "cannot be read as a picture",
    ),
    "BMP": (
        write(
            "a.bmp", b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 12000, 12000, 1, 24, 0, 0, 0, 0, 0, 0)
        ),
        CLAIMS,
    ),
    "GIF": (write("a.gif", b"GIF89a" + struct.pack("<HHBBB", 12000, 12000, 0, 0, 0) + b",;"), f"{CLAIMS}|as a picture"),
    "TIFF": (changed_tiff(ImageWidth=2**31 - 1, ImageLength=2**31 - 1, RowsPerStrip=2**31 - 1), CLAIMS),
    "TIFF of deflated strips": (changed_tiff(ImageWidth=10**5, ImageLength=10**5, Compression=8), CLAIMS),
    "TIFF of an unknown compression": (changed_tiff(ImageWidth=2**30, Compression=13825), CLAIMS),
    "JPEG": (jpeg_of_many_pixels, CLAIMS),
    "BigTIFF of 2^59 tags": (big_tiff_of_tags, "cannot be read as TIFF"),
    "OME of files elsewhere": (ome_elsewhere, "says that a part of it is in '../../other.ome.tif'"),
    "NRRD": (itk("a.nrrd", sizes="30000 30000 30000"), CLAIMS),
    "NRRD, compressed": (itk("a.nrrd", sizes="30000 30000 30000", encoding="gzip"), CLAIMS),
    "NRRD, written out": (itk("a.nrrd", sizes="3000 3000 3000", encoding="ascii", type="double"), CLAIMS),
    "NRRD of more than there is": (
        itk("a.nrrd", sizes="99999999999 99999999999 99999999999"),
        "cannot be read as NRRD",
    ),
    "NRRD outside": (itk("a.nhdr", data_file="../secret.raw"), OUTSIDE),
    "NRRD outside by another name": (itk("a.nhdr", datafile="../secret.raw"), OUTSIDE),
    "NRRD outside and back": (itk("a.nhdr", data_file="b/../../secret.raw"), OUTSIDE),
    "NRRD absolute": (itk("a.nhdr", data_file="/etc/passwd"), OUTSIDE),
    "NRRD list": (itk("a.nhdr", data_file="LIST\n../secret.raw"), OUTSIDE),
    "NRRD pattern": (itk("a.nhdr", data_file="../secret%d.raw 1 4 1"), OUTSIDE),
    "NRRD pattern without end": (itk("a.nhdr", data_file="s%d.raw 1 999999999 1"), "in 999999999 files, expected 1 to"),
    "NRRD that says it twice": (itk("a.nhdr", data_file="../secret.raw\ndata file: a.raw"), "tells twice"),
    "NRRD with a hidden line": (
        itk("a.nhdr", data_file="../secret.raw\ncontent: a\x0bdata file: inner.raw"),
        OUTSIDE,
    ),
    "NRRD of a long line": (itk("a.nrrd", kinds="x" * 5000), "has a line of 5007 characters, expected at most 800"),
    "NRRD of a long line that is no field": (
        itk("a.nrrd", content="a\n" + "x" * 5000),
        "has a line of 5000 characters",
    ),
    "NRRD of a long name": (itk("a.nhdr", data_file="LIST\n" + "x" * 5000), "of more than 800 characters|longer than"),
    "NRRD of a long header": (
        itk("a.nhdr", content="a\n" + "# x\n" * (MIB // 4), data_file="../secret.raw"),
        "longer than 1 MiB",
    ),
    "MetaImage": (itk("a.mha", DimSize="30000 30000 30000"), CLAIMS),
    "MetaImage, compressed": (itk("a.mha", DimSize="30000 30000 30000", CompressedData="True"), CLAIMS),
    "MetaImage of many channels": (itk("a.mha", ElementNumberOfChannels="2000000000"), f"{CLAIMS}|as MetaImage"),
    "MetaImage of many axes": (itk("a.mha", NDims="32768"), "it has 32768 axes, expected 2 to 4"),
    "MetaImage of many axes, later": (itk("a.mha", Comment="a\nNDims = 3"), "tells twice how many axes"),
    "MetaImage of a hidden name": (itk("a.mha", Comment="a\0ElementDataFile = ../secret.raw"), "tells twice"),
    "MetaImage of a long line": (itk("a.mha", Comment="x" * 10_000), "has lines of more than 2000 characters"),
    "MetaImage outside": (itk("a.mhd", ElementDataFile="../secret.raw"), OUTSIDE),
    "MetaImage absolute": (itk("a.mhd", ElementDataFile="/etc/passwd"), OUTSIDE),
    "MetaImage with backslashes": (itk("a.mhd", ElementDataFile="..\\secret.raw"), OUTSIDE),
    "MetaImage list": (itk("a.mhd", ElementDataFile="LIST 2D\n../secret.raw"), OUTSIDE),
    "MetaImage pattern": (itk("a.mhd", ElementDataFile="../secret%02d.raw 1 4 1"), OUTSIDE),
    **{
        f"MetaImage pattern {name}": (itk("a.mhd", ElementDataFile=name), "expected a pattern with a single %d")
        for name in ("a%s.raw 1 4 1", "a%d%d.raw 1 4 1", "a%999999999d.raw 1 4 1", "a%s.raw", "a%d.raw")
    },
    "MetaImage of its own folder": (itk("a.mhd", ElementDataFile="."), OUTSIDE),
    "DICOM": (
        dicom({(0x28, 0x10): (b"US", US_MOST, None), (0x28, 0x11): (b"US", US_MOST, None)}),
        CLAIMS,
    ),
    "DICOM of many frames": (dicom({(0x28, 0x08): (b"IS", b"2000000000", None)}), f"{CLAIMS}|as DICOM"),
    "DICOM with an element that is none": (
        dicom({(0x09, 0x10): (b"U[", b"\xff" * 200, None)}),
        r"its element \(0009,0010\) is of the unknown kind b'U\['",
    ),
    "DICOM of old with an element of four gigabytes": (
        write("a.dcm", struct.pack("<HHI8sHHI", 8, 0x60, 8, b"OT      ", 9, 0x10, 0xFFFFFFF0) + bytes(200)),
        r"its element \(0009,0010\) claims 4294967280 bytes",
    ),
    "DICOM with an element of four gigabytes": (
        dicom({(0x09, 0x10): (b"UN", b"", 0xFFFFFFF0)}),
        r"its element \(0009,0010\) claims 4294967280 bytes, the file has",
    ),
}


def sparse(path: Path, head: bytes, n_bytes: int) -> Path:
    """A file that takes no more room than its head, and has a length of terabytes."""
    with path.open("wb") as file:
        file.write(head)
        file.truncate(n_bytes)
    return path


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_refused_in_words_before_anything_is_allocated(name: str, tmp_path: Path) -> None:
    make, message = IMAGES[name]
    path = make(tmp_path)
    tracemalloc.start()
    try:
        for read in (read_image, read_label):
            with pytest.raises(FormatError, match=f"^{re.escape(str(path))}: .*({message})"):
                read(path)
        assert tracemalloc.get_traced_memory()[1] < 80 * MIB
    finally:
        tracemalloc.stop()


LIMITED = """
import json, resource, sys
from pathlib import Path
import nibabel, SimpleITK, tifffile, PIL.Image
from autoseg.core.errors import AutosegError
from autoseg.data.io import read_image
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 512 * 2**20,) * 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kinds = []
for path in sys.stdin.read().splitlines():
    try:
        read_image(Path(path))
        kinds.append("read")
    except AutosegError as error:
        kinds.append(type(error).__name__)
print(json.dumps([kinds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux'")
def test_all_of_them_are_refused_by_a_process_that_gets_no_memory(tmp_path: Path) -> None:
    """What libraries in C allocate counts here, too."""
    files = []
    for number, (make, _) in enumerate(IMAGES.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        files.append(make(folder))
    # The limit is about address space: libraries that start threads reserve some for each.
    listed = "\n".join(map(str, files))
    done = subprocess.run([sys.executable, "-c", LIMITED], input=listed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kinds, grown_kib = json.loads(done.stdout.splitlines()[-1])
    assert kinds == ["FormatError"] * len(IMAGES)
    assert grown_kib < 150 * 1024
    assert "DecompressionBomb" not in done.stderr


def test_what_is_odd_but_whole_is_read(tmp_path: Path) -> None:
    """So that the tests above fail for the reason they name."""
    for name, shape in {
        "a.nii": nifti(4, 4, 4),
        "b.nii.gz": nifti(10, 10, 10),
        "c.nii": nifti(4, 4, 4, kind=2),
        "d.nii.gz": nifti(4, 4, 4, extension=struct.pack("<4sii", b"\1\0\0\0", 32, 4) + bytes(24)),
        "e.nii": nifti(4, 4, 4, scl_slope=np.nan),
        "f.nii": nifti(4, 4, 4, scl_slope=np.inf, scl_inter=np.nan),
        "g.nii": nifti(4, 4, 4, pixdim=[1, np.nan, 1e30, -2, 0, 0, 0, 0]),
        "h.nii": nifti(4, 4, 4, sizeof_hdr=349),
    }.items():
        path = write(name, shape)(tmp_path)
        assert not read_image(path)[0].any()
    # Zeros compress best of all.
    path = write("z.nii.gz", nifti(300, 300, 300, data=bytes(27 * 10**6)))(tmp_path)
    assert path.stat().st_size < 30_000
    assert read_raw(path).load().size == 27 * 10**6
    for make in (itk("a.nrrd"), itk("a.mha"), dicom({}), changed_tiff(), write("a.png", png(4, 4, rows=bytes(20)))):
        assert read_geometry(make(tmp_path)).shape[1:] == (4, 4)
        assert not read_image(make(tmp_path))[0].any()
    black = np.zeros((2000, 2000), np.uint8)
    for name, options in {"b.png": {}, "b.gif": {}, "b.bmp": {}, "b.tif": {"compression": "tiff_lzw"}}.items():
        Image.fromarray(black).save(tmp_path / name, **options)
        assert read_image(tmp_path / name)[0].shape == (1, 1, 2000, 2000)
    tifffile.imwrite(tmp_path / "c.tif", np.zeros((50, 500, 500), np.uint8), compression="zlib", metadata=None)
    assert read_image(tmp_path / "c.tif")[0].shape == (1, 50, 500, 500)
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((300, 300, 300), np.uint8)), tmp_path / "c.nrrd", True)
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((300, 300, 300), np.uint8)), tmp_path / "c.mha", True)
    for name in ("c.nrrd", "c.mha"):
        assert read_image(tmp_path / name)[0].shape == (1, 300, 300, 300)


def test_voxels_in_several_files_beside_are_read(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for number in range(4):
        (tmp_path / "below" / f"s{number}.raw").write_bytes(bytes([number]) * 16)
    nrrd = "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 4 4 4\nencoding: raw\n"
    meta = "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_UCHAR\nBinaryData = True\n"
    listed = "".join(f"below/s{number}.raw\n" for number in range(4))
    for name, text in {
        "a.nhdr": f"{nrrd}data file: LIST\n{listed}",
        "b.nhdr": f"{nrrd}data file: below/s%d.raw 0 3 1\n",
        "a.mhd": f"{meta}ElementDataFile = LIST\n{listed}",
        "b.mhd": f"{meta}ElementDataFile = below/s%d.raw 0 3 1\n",
        "c.nhdr": f"{nrrd}data file: {tmp_path}/below/all.raw\n",
    }.items():
        (tmp_path / "below" / "all.raw").write_bytes(bytes(48) + b"\3" * 16)
        (tmp_path / name).write_text(text)
        image, _ = read_image(tmp_path / name)
        assert image[0, -1].max() == image[0].max() == 3
        (tmp_path / name).write_text(text.replace("4 4 4", "4 4 5"))
        with pytest.raises(FormatError, match=r"claims 80 bytes of voxels, the file has 64 bytes|expected 5 filenames"):
            read_image(tmp_path / name)


# -- found by fuzzing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e-40])
def test_voxels_too_small_to_have_a_spacing(size: float, tmp_path: Path) -> None:
    """Their spacing was rounded to 0, and of the smallest ones the axes could not be found."""
    path = write("a.nii", nifti(4, 4, 4, srow_z=[0, 0, size, 0]))(tmp_path)
    with pytest.raises(FormatError, match=r"found the affine .*, expected voxels of 1e-07 mm and more|invertible"):
        read_geometry(path)


def test_voxels_too_large_for_any_number(tmp_path: Path) -> None:
    path = write("a.nii", nifti(4, 4, 4, kind=2, srow_z=[0, 0, 1e300, 0], srow_y=[0, 1e300, 0, 0]))(tmp_path)
    with pytest.raises(FormatError, match="expected a finite, invertible 4x4 matrix"):
        read_geometry(path)


def test_tiff_of_no_rows(tmp_path: Path) -> None:
    """tifffile divided by zero."""
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((3, 4, 5), np.uint8), photometric="minisblack")
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as tiff:
        tiff.pages.first.tags["ImageLength"].overwrite(0)
    with pytest.raises(FormatError, match="cannot be read as TIFF"):
        read_image(tmp_path / "a.tif")


NO_PIXELS = (
    "78daf3f4d462e0606060e067606064616004b258819811ca6601622646660666207d088899816c903848071b94cd04c47c8c4c0c5381f4"
    "09201604ea05a97f03c4a2a73e791682f401b1189299e250337f01b114232b58fc1f104b43d96c20e2403ddc7c0da85d206c08b48b076c"
    "27031434d47330542b15672416a42a5929441beb2898e82898c6d632a0011ba08e0820960143987930cc90999696969993aa575009555f"
    "3127392125292d3135f9f983278f9e3d7cfa585c4044888d81d58d613fc31c614151e1e913a64c9a3671eae4f08090a0b0c0d0607606d1"
    "ff4030e7f20546866b17af5e3637303132333435debe61cb2636063531e6fb00e2f73a7f"
)


def test_tiff_of_fewer_pixels_than_its_description_tells(tmp_path: Path) -> None:
    """The array that tifffile returned was empty, and could not be given its shape."""
    (tmp_path / "a.tif").write_bytes(zlib.decompress(bytes.fromhex(NO_PIXELS)))
    with pytest.raises(FormatError, match=r"a\.tif: cannot be read as TIFF"):
        read_image(tmp_path / "a.tif")


def test_tiff_of_samples_of_different_bits(tmp_path: Path) -> None:
    """Their numbers of bits are a tuple, which was repeated as often as the image has pixels."""
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 5, 3), np.uint8), photometric="rgb", metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as tiff:
        tiff.pages.first.tags["ImageWidth"].overwrite(2**28)
        tiff.pages.first.tags["BitsPerSample"].overwrite((8, 8, 4))
    with pytest.raises(FormatError, match=r"a\.tif: "):
        read_image(tmp_path / "a.tif")


def test_a_bmp_with_a_palette_takes_no_memory_before_it_is_checked(tmp_path: Path) -> None:
    """Pillow gave it room for 2 GiB of pixels to tell what its palette is."""
    head = struct.pack("<IHHIIiiHHIIiiII", 122, 0, 0, 122, 40, 40_000, 3_000, 1, 8, 0, 0, 0, 0, 17, 0)
    path = write("a.bmp", b"BM" + head + bytes(68))(tmp_path)
    before = peak_memory_gib()
    with pytest.raises(FormatError, match=CLAIMS):
        read_geometry(path)
    assert peak_memory_gib() - before < 0.1


def test_keys_of_an_nrrd_header_that_are_no_text(tmp_path: Path) -> None:
    """SimpleITK could not be asked for them."""
    path = itk("a.nrrd")(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"encoding: raw\n", b"encoding: raw\nk\xffey:=value\n"))
    assert read_image(path)[0].shape == (1, 4, 4, 4)


def test_a_model_of_a_dataset_whose_name_is_no_utf8(model: bytes, tmp_path: Path) -> None:
    """Its digest could not be made of it."""
    from autoseg.inference.model import read_model

    members = fuzz._members(model)
    members["plan.json"] = json.dumps(json.loads(members["plan.json"]) | {"dataset": "a\udc80"}).encode()
    size, digest = len(members["plan.json"]), hashlib.sha256(members["plan.json"]).hexdigest()
    manifest = json.loads(members["manifest.json"])
    manifest["members"]["plan.json"] = {"n_bytes": size, "sha256": digest}
    members["manifest.json"] = json.dumps(manifest).encode()
    (tmp_path / "m.autoseg").write_bytes(fuzz._pack(members, compression=0))
    assert read_model(tmp_path / "m.autoseg").plan.dataset == "a\udc80"
    assert len(read_model(tmp_path / "m.autoseg").digest()) == 64


# -- JSON --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Numbers:
    count: int = 0
    size: float = 0.0
    parts: tuple[int, ...] = ()


JSON: dict[str, tuple[bytes, str]] = {
    "deep lists": (b"[" * 10_000 + b"]" * 10_000, "nested more than 100 levels deep"),
    "deep objects": (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "nested more than 100 levels deep"),
    "deep beyond recursion": (b"[" * 10_000_000, "nested more than 100 levels deep"),
    "deep behind quotes": (b'["\\\\", "\\"", ' + b"[" * 200 + b"]" * 201, "nested more than 100 levels deep"),
    "NaN": (b'{"size": NaN}', "is not JSON .found NaN, expected a number, or null"),
    "infinity": (b'{"size": -Infinity}', "is not JSON .found -Infinity"),
    "an infinite number": (b'{"size": 1e999}', "size: found inf, expected a finite number"),
    "a long number": (b'{"size": 1' + b"0" * 400 + b"}", "size: found 1000.*, expected a finite number"),
    "a longer number": (b'{"count": ' + b"9" * 10_000 + b"}", "is not JSON .*4300 digits"),
    "more than 64 bits": (b'{"count": 9223372036854775808}', "count: found 9223372036854775808, expected .* 64 bits"),
    "a megabyte of text": (b'{"count": "' + b"x" * MIB + b'"}', "count: found 'xxx.*[.]{3}.*, expected a whole number"),
    "a megabyte of a key": (b'{"' + b"x" * MIB + b'": 1}', "unknown key 'xxx.*[.]{3}'; known are count, size"),
    "a long list": (b'{"count": [' + b"1," * 10**6 + b"1]}", "count: found .1, 1, .*, expected a whole number"),
    "no text": (b"\xff\xfe\x00", "cannot be read as text"),
    "nothing": (b"", "is not JSON"),
}


@pytest.mark.parametrize("name", JSON)
def test_json_that_is_refused(name: str, tmp_path: Path) -> None:
    content, message = JSON[name]
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(FormatError, match=f"^{file}: .*{message}") as caught:
        read_json(file, Numbers)
    assert len(str(caught.value)) < 400


def test_a_gigabyte_of_json_is_not_read(tmp_path: Path) -> None:
    file = sparse(tmp_path / "dataset.json", b"{", 2**30)
    tracemalloc.start()
    with pytest.raises(FormatError, match="has 1,024 MiB, expected JSON of at most 256 MiB; is it the right file"):
        read_json(file)
    with pytest.raises(DatasetError, match="has 1,024 MiB, expected JSON of at most 256 MiB"):
        open_dataset(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 10 * MIB
    tracemalloc.stop()


def test_json_is_read_of_files_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", Path("/dev/zero")):
        with pytest.raises(FormatError, match="is a device or a pipe, expected a file"):
            read_json(path)


def test_json_that_is_odd_but_right_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    # 100 levels, and brackets that are text.
    for value in (
        json.loads("[" * 100 + "]" * 100),
        ['[["\\' * 50, {"]": "}" * 500}],
        -(2**63),
    ):
        file.write_text(json.dumps(value))
        assert read_json(file) == value
    # A name that is no UTF-8, as file names of old archives are.
    write_json(file, {"\udc80": "b\udcff"})
    assert read_json(file) == {"\udc80": "b\udcff"}
    assert holds_json(file, {"\udc80": "b\udcff"})
    file.write_text('{"count": 3, "size": 1e308, "parts": [9223372036854775807]}')
    assert read_json(file, Numbers) == Numbers(count=3, size=1e308, parts=(2**63 - 1,))


# -- code --------------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
PICKLING = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "joblib", "dill", "cloudpickle", "jsonpickle", "yaml"}
RUNNING = {"eval", "exec", "compile", "__import__"}
UNSAFE = {"read_pickle", "to_pickle", "load_pickle", "write_pickle", "pickle_load", "unsafe_load"}
FOR_THE_PEER = {("scripts/gpu_peer.py", "write_pickle")}
"""What another program wants to read; it is written, never read, and the package has no part in it."""


def code_files() -> list[Path]:
    folders = (ROOT / "autoseg", ROOT / "scripts")
    files = {
        path for folder in folders for path in folder.rglob("*") if path.is_file() and "__pycache__" not in str(path)
    }
    return sorted(
        path for path in files if path.suffix == ".py" or path.read_bytes()[:40].startswith(b"#!/usr/bin/env python")
    )


def name_of(node: ast.expr) -> str:
    """A name with dots."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unsafe_things(tree: ast.AST) -> Iterator[str]:
    """What in a module can run code that a file brings along."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in PICKLING)
        elif isinstance(node, ast.ImportFrom):
            yield from [node.module or ""] if (node.module or "").split(".")[0] in PICKLING else []
            yield from (alias.name for alias in node.names if alias.name in UNSAFE)
        elif isinstance(node, ast.Call):
            called = name_of(node.func)
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            last = called.rpartition(".")[2]
            if called in RUNNING or last in UNSAFE:
                yield called
            elif last == "load" and called.partition(".")[0] == "torch" and options.get("weights_only") != "True":
                yield f"{called} without weights_only=True"
            elif called in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
                yield f"{called} with allow_pickle"
            elif called in ("np.load", "numpy.load", "np.save", "numpy.save") and "allow_pickle" not in options:
                yield f"{called} without allow_pickle=False"


def test_no_module_can_load_a_pickle() -> None:
    files = code_files()
    assert len(files) > 150
    found = {
        (str(file.relative_to(ROOT)), thing) for file in files for thing in unsafe_things(ast.parse(file.read_text()))
    }
    # numpy itself refuses pickles where it is not told otherwise; scripts may leave it at that.
    kept = {(name, thing) for name, thing in found if not (name.startswith("scripts/") and "without allow" in thing)}
    assert kept <= FOR_THE_PEER


def test_the_search_for_pickles_finds_them() -> None:
    code = """
import pickle, yaml, numpy as np
from joblib import load
from pandas import read_pickle
torch.load(file)
np.load(file, allow_pickle=True)
np.load(file)
eval(text)
torch.load(file, weights_only=True)
np.load(file, allow_pickle=False)
network.eval()
re.compile(text)
"""
    assert len(list(unsafe_things(ast.parse(code)))) == 8


class Payload:
    """A pickle of it writes a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.file, "done"))


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[tuple[Payload, Path]]:
    """Something whose pickle does harm, and the file that tells whether it has; it works."""
    file = tmp_path / "harm"
    pickle.loads(pickle.dumps(Payload(file)))
    assert file.read_text() == "done"
    file.unlink()
    yield Payload(file), file
    assert not file.exists(), "a pickle was loaded"


@pytest.mark.parametrize("name", ["image.npy", "label.npy", "foreground.npy", "occupied.npy", "case.json"])
def test_pickles_in_a_preprocessed_case(name: str, trap: tuple[Payload, Path], tmp_path: Path) -> None:
    from autoseg.preprocessing.store import PreprocessedCase

    folder = tmp_path / "case_1"
    make_case(folder)
    assert PreprocessedCase(folder).image.shape == (1, 4, 5, 6)
    if name.endswith(".npy"):
        np.save(folder / name, np.array([trap[0]], dtype=object), allow_pickle=True)
    else:
        (folder / name).write_bytes(pickle.dumps(trap[0]))
    with pytest.raises(WorkspaceError, match=r"case_1: .*'autoseg plan'"):
        PreprocessedCase(folder).load()
    # A pickle that numpy takes for one, without the mark of its own format.
    (folder / name).write_bytes(pickle.dumps(trap[0]))
    with pytest.raises(WorkspaceError, match=r"case_1: .*'autoseg plan'"):
        PreprocessedCase(folder).load()


def make_case(folder: Path) -> None:
    from tiny_cases import write_tiny_case

    image = np.ones((1, 4, 5, 6), np.float32)
    write_tiny_case(folder, image, np.ones((4, 5, 6), np.uint8), n_classes=2)


@pytest.mark.parametrize("make", ["pickle", "torch"])
def test_pickles_in_place_of_weights(make: str, trap: tuple[Payload, Path], tmp_path: Path) -> None:
    import torch

    from autoseg.training import checkpoint

    network = torch.nn.Conv3d(1, 2, 3)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for name in ("weights.safetensors", "checkpoint.safetensors"):
        file = tmp_path / name
        if make == "torch":
            torch.save({"network": network.state_dict(), "x": trap[0]}, file)
        else:
            file.write_bytes(pickle.dumps(trap[0]))
        for read in (
            lambda file=file: checkpoint.load_weights(file, network),
            lambda file=file: checkpoint.load_checkpoint(file, network, optimizer),
            lambda file=file: checkpoint.read_state(file),
            lambda file=file: checkpoint.read_network(file),
        ):
            with pytest.raises(TrainingError, match=f"{name}: .*(damaged|delete it)"):
                read()


def test_pickles_as_members_of_a_model(model: bytes, trap: tuple[Payload, Path], tmp_path: Path) -> None:
    """With the sizes and hashes that belong to them."""
    from autoseg.inference.model import read_model

    file = tmp_path / "a.autoseg"
    harm = pickle.dumps(trap[0])
    members = fuzz._members(model)
    for name in members:
        changed = members | {name: harm}
        if name != "manifest.json":
            manifest = json.loads(members["manifest.json"])
            manifest["members"][name] = {"n_bytes": len(harm), "sha256": hashlib.sha256(harm).hexdigest()}
            changed["manifest.json"] = json.dumps(manifest).encode()
        file.write_bytes(fuzz._pack(changed, compression=0))
        with pytest.raises(AutosegError, match=f"^{file}: "):
            read_all_of_a_model(file)
    file.write_bytes(harm)
    with pytest.raises(FormatError, match="is not an autoseg model"):
        read_model(file)
    file.write_bytes(model)
    read_all_of_a_model(file)


def read_all_of_a_model(file: Path) -> None:
    from autoseg.inference.model import read_model

    model = read_model(file)
    model.source.read_record(0)
    model.read_fold(0)


@pytest.mark.parametrize("name", ["dataset.json", "plan.json", "splits.json", "fingerprint.json"])
def test_pickles_in_place_of_the_json_of_a_work_folder(name: str, trap: tuple[Payload, Path], tmp_path: Path) -> None:
    from autoseg.pipeline import Workspace

    (tmp_path / name).write_bytes(pickle.dumps(trap[0]))
    workspace = Workspace(root=tmp_path)
    read = {"dataset.json": workspace.read_dataset, "plan.json": workspace.read_plan}
    read |= {"splits.json": workspace.read_splits, "fingerprint.json": workspace.read_fingerprint}
    with pytest.raises(FormatError, match=f"{name}: .*delete it"):
        read[name]()


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha", "a.tif", "a.png", "a.dcm"])
def test_pickles_in_place_of_images(name: str, trap: tuple[Payload, Path], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(trap[0]))
    with pytest.raises(FormatError, match=name):
        read_image(tmp_path / name)


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A one-file model."""
    return fuzz.model_seeds(tmp_path_factory.mktemp("model"))[0]


def test_a_plan_of_a_network_larger_than_its_weights_takes_no_memory(model: bytes, tmp_path: Path) -> None:
    """Of terabytes, in a file of kilobytes."""
    for change in ({"features": 60_000}, {"encoder_blocks": 100}, {"features": 2**40}, {"encoder_blocks": 10**9}):
        members = fuzz._members(model)
        plan = json.loads(members["plan.json"])
        (network,) = (configuration["network"] for configuration in plan["configurations"].values())
        for key, value in change.items():
            network[key] = [value] * len(network[key])
        members["plan.json"] = json.dumps(plan).encode()
        manifest = json.loads(members["manifest.json"])
        size, digest = len(members["plan.json"]), hashlib.sha256(members["plan.json"]).hexdigest()
        manifest["members"]["plan.json"] = {"n_bytes": size, "sha256": digest}
        members["manifest.json"] = json.dumps(manifest).encode()
        (tmp_path / "m.autoseg").write_bytes(fuzz._pack(members, compression=0))
        before = peak_memory_gib()
        with pytest.raises(AutosegError, match=r"m\.autoseg: .*(are of another network|at most \d+ (blocks|stages))"):
            read_all_of_a_model(tmp_path / "m.autoseg")
        assert peak_memory_gib() - before < 0.5


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "a/../../evil", "C:\\evil", "\x1b[31m"])
def test_predict_refuses_a_model_that_leads_elsewhere(
    name: str,
    model: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Through the command line, to the last line that a user sees."""
    from autoseg.cli import main

    members = fuzz._members(model) | {name: b"x"}
    (tmp_path / "m.autoseg").write_bytes(fuzz._pack(members, compression=0))
    (tmp_path / "in").mkdir()
    write("a.nii", nifti(4, 4, 4))(tmp_path / "in")
    before = sorted(tmp_path.rglob("*"))
    arguments = ["predict", tmp_path / "in", tmp_path / "out", "--model", tmp_path / "m.autoseg"]
    monkeypatch.setattr(sys, "argv", ["autoseg", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert "Error: " in said
    assert "m.autoseg: is" in said
    assert "\x1b" not in said
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "out") == before


# -- the terminal ------------------------------------------------------------------------------------------------------

EVIL = "\x1b]0;owned\x07\x1b[31m\r\x9b2J\u202egnp\u2066\x7f\udc80"
SHOWN = "\\x1b]0;owned\\x07\\x1b[31m\\r\\x9b2J\\u202egnp\\u2066\\x7f\\udc80"


def test_messages_keep_their_lines_and_nothing_else() -> None:
    assert printable(f"two\nlines\tof {EVIL}\n") == f"two\nlines\tof {SHOWN}\n"
    assert printable("Gefäße 心臓 \u00a0 café · ✓") == "Gefäße 心臓 \u00a0 café · ✓"
    assert spell_out("a\nb\tc") == "a\\nb\\tc"


def test_json_on_a_terminal_stays_json() -> None:
    value = {EVIL: [EVIL, "\n", "\U000e0001", "Gefäße", 1.5]}
    shown = printable_json(dump_json(value))
    assert json.loads(shown) == value
    assert shown.replace("\n", "").isprintable()
    assert "Gefäße" in shown


def test_errors_are_printed_without_control_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from autoseg.cli import main

    monkeypatch.setattr(sys, "argv", ["autoseg", "plan", str(tmp_path / f"{EVIL}.json"), "-w", str(tmp_path / "w")])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr()
    assert SHOWN in said.err
    assert printable(said.err + said.out) == said.err + said.out


def test_log_lines_are_printed_without_control_characters() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(PrintableFormatter("%(asctime)s %(message)s"))
    logger = logging.Logger("a")
    logger.addHandler(handler)
    logger.warning("%s, %s and %d: %s", f"{EVIL}\n12:00:00 done", Path("a\nb"), 3, ValueError("two\nlines"))
    logger.warning("%s", "a table\nof two lines")
    first, *others = stream.getvalue().splitlines()
    assert first.endswith(f"{SHOWN}\\n12:00:00 done, a\\nb and 3: two")
    assert others[0] == "lines"
    assert others[1].endswith("a table")
    assert others[2] == "of two lines"


def test_tables_stay_in_their_columns() -> None:
    table = format_table(("case", EVIL), [(f"{EVIL}\nfake  1.0", "0.5"), ("b", "0.75")])
    lines = table.splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert printable(table) == table


def test_progress_takes_no_name_for_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    from autoseg.core.runtime import track

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    logging.getLogger("autoseg.core.runtime").setLevel(logging.INFO)
    with track("segmenting [/red]", total=2) as advance:
        advance(1, note=f"[bold]{EVIL}[/nothing]")
        advance(1, note="[/]")
    said = terminal.getvalue()
    assert "segmenting [/red]" in said
    assert "\x07" not in said
    assert "\u202e" not in said


def test_all_that_the_command_line_prints_goes_through_one_door() -> None:
    """`say` spells out what a terminal would act on; only the version and JSON are printed as they are."""
    calls = []
    for file in sorted((ROOT / "autoseg" / "cli").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "typer.echo",
                "print",
                "typer.secho",
                "sys.stdout.write",
            ):
                calls.append((file.name, ast.unparse(node)))
    assert calls == [
        ("__init__.py", "typer.echo(__version__)"),
        ("options.py", "typer.echo(printable(message), err=err, nl=nl)"),
        ("options.py", "typer.echo(printable_json(dump_json(value)))"),
    ]


# -- pages -------------------------------------------------------------------------------------------------------------

MARKUP = "<script>alert(1)</script>\"'&</style></svg>--><img src=x onerror=alert(1)>" + EVIL


class Elements(HTMLParser):
    """The elements of a page with the names of their attributes, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.links: set[str] = set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))
        self.links |= {str(value) for name, value in attrs if name in ("href", "src")}


def test_no_element_and_no_attribute_of_a_page_comes_from_a_name(tiny_work: Path, tmp_path: Path) -> None:
    """With names that are markup a page has the very elements that it has with harmless ones."""
    from autoseg.pipeline import Workspace
    from autoseg.planning.estimates import estimate
    from autoseg.reporting.plan_page import write_plan_page
    from autoseg.reporting.predictions_page import PredictedCase, write_predictions_page

    work = Workspace(root=tiny_work)
    plan, fingerprint = work.read_plan(), work.read_fingerprint()
    seen = []
    for text in ("harmless", MARKUP):
        names = tuple(f"{text} {number}" for number in range(len(plan.labels.names)))
        renamed = replace(plan, dataset=text, labels=replace(plan.labels, names=names))
        problem = Problem(kind=text, case=text, file=text, found=text, expected=text, advice=text)
        estimates = replace(estimate(fingerprint, plan), warnings=(problem,))
        file = write_plan_page(tmp_path / "plan.html", renamed, fingerprint, estimates)
        seen.append(Elements(file.read_text()))
        cases = [
            PredictedCase(
                case=f"{text} {number}",
                volumes_ml=dict.fromkeys(names, 1.0 + number),
                warnings=(text,),
                error=text if number == 3 else None,
                estimated_dice=0.5,
                is_flagged=number == 1,
                seconds=1.0,
            )
            for number in range(4)
        ]

        def overlay(case: str) -> Any:
            raise FormatError(f"{case}: no such file")

        file = write_predictions_page(
            tmp_path / "report.html",
            text,
            [(text, text)],
            cases,
            overlay,
            values=plan.labels.values,
            names=names,
            structures=names,
        )
        seen.append(Elements(file.read_text()))
    assert seen[0].found == seen[2].found
    assert seen[1].found == seen[3].found
    for page in seen:
        assert len(page.found) > 50
        assert all(link.startswith(("#", "data:image/")) for link in page.links)


def test_text_becomes_markup_in_one_place() -> None:
    """`element` and `join` escape; nothing else makes `Html` of text."""
    makers = {
        str(file.relative_to(ROOT))
        for file in sorted((ROOT / "autoseg").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and name_of(node.func) == "Html"
    }
    assert makers == {"autoseg/reporting/html.py"}

"""What the headers of NRRD and MetaImage files claim, looked at before ITK reads the files.

ITK's libraries believe a header: they write beyond their arrays, fill up what is missing with zeros, and tell the
terminal of it. So files that claim more than they hold, or that name files elsewhere, are refused here.
"""

from __future__ import annotations

import math
import os
import re
import zlib
from pathlib import Path

from autoseg.core.errors import FormatError
from autoseg.core.text import shorten
from autoseg.data.raw import MOST_COMPRESSED, MOST_DEFLATED

META_ENDINGS = (".mha", ".mhd")
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


def meta_files(path: Path) -> tuple[list[Path], int]:
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


def nrrd_files(path: Path) -> tuple[list[Path], int]:
    """The files with the voxels of an NRRD file, and what one of their bytes can become; 0 where they are written out.

    Raises:
        FormatError: a file lies elsewhere.
        ValueError: the header is too long.
    """
    fields, end = nrrd_header(path)
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
    elif "%" in words[0] and (len(words) > 1 or path.name.lower().endswith(META_ENDINGS)):
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


def check_meta_data(path: Path) -> None:
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


def check_nrrd_data(path: Path) -> None:
    """Refuses damaged gzip data, of which ITK checks the length alone.

    Raises:
        ValueError: cut off.
        zlib.error: damaged.
    """
    fields, offset = nrrd_header(path)
    name = fields.get("data file", "")
    is_skipped = any(fields.get(key, "0") != "0" for key in ("byte skip", "byteskip", "line skip", "lineskip"))
    if fields.get("encoding", "").lower() not in ("gzip", "gz") or is_skipped:
        return
    if name.upper().startswith("LIST") or "%" in name:
        return
    _decompressed_size(path.parent / name if name else path, 0 if name else offset)


def nrrd_header(path: Path) -> tuple[dict[str, str], int]:
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

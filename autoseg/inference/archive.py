"""The one-file model: a zip whose manifest names, sizes and hashes every other member.

A file may come from anyone, so nothing in it is believed: its structure is checked before anything is read, every
member is checked against the manifest before it is parsed, and nothing is ever unpacked to disk. Members are stored as
they are, not compressed: weights would shrink by a few percent, and what is not compressed cannot grow.

The hashes find damage. They do not say who made the file: whoever changes a member can change the manifest too.
"""

from __future__ import annotations

import hashlib
import stat
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from autoseg.core.errors import AutosegError, FormatError
from autoseg.core.serialize import atomic_path, encode_json, from_plain, parse_json
from autoseg.training.checkpoint import Progress
from autoseg.training.folds import PLAN, TRAINING, WEIGHTS

SUFFIX = ".autoseg"
FORMAT = "autoseg model"
FORMAT_VERSION, OLDEST_FORMAT_VERSION = 4, 2
"""Counts up with each change of what the members hold, be it the manifest, the record of a fold, or the plan. What the
oldest of those that can be read lacks has a default."""
MANIFEST, POSTPROCESSING = "manifest.json", "postprocessing.json"
MAX_JSON_BYTES = 16 * 2**20
MAX_WEIGHTS_BYTES = 8 * 2**30

T = TypeVar("T")
# What zipfile raises for files that are not what they say: besides its own error, all that its parsing runs into.
_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, OverflowError, struct.error)


@dataclass(frozen=True, kw_only=True)
class Member:
    """What a member of the file must be.

    Attributes:
        n_bytes: its length.
        sha256: of its bytes, in hexadecimal.
    """

    n_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a one-file model holds.

    Attributes:
        format: `FORMAT`.
        version: of the format.
        autoseg: version that wrote the file.
        dataset: name of the one it was trained on.
        configuration: that was trained.
        folds: the folds; for those that are not trained to their end, how far they had come.
        members: all members but the manifest itself, by name.
    """

    format: str
    version: int
    autoseg: str
    dataset: str
    configuration: str
    folds: dict[int, Progress | None]
    members: dict[str, Member]

    def __post_init__(self) -> None:
        expected = {PLAN, *(name(fold) for fold in self.folds for name in (weights_member, training_member))}
        if not self.folds or min(self.folds) < 0 or self.members.keys() - {POSTPROCESSING} != expected:
            raise FormatError(f"found the members {_listed(self.members)} for the folds {_listed(self.folds)}")


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A one-file model whose structure is right. It is opened anew for every member that is read."""

    path: Path
    manifest: Manifest

    def read(self, name: str) -> bytes:
        """A member of the manifest.

        Raises:
            FormatError: it is damaged.
        """
        member = self.manifest.members[name]
        with _open(self.path) as file:
            data = _read_member(self.path, file, name)
        if len(data) != member.n_bytes or hashlib.sha256(data).hexdigest() != member.sha256:
            raise FormatError(f"{self.path}: is damaged: the hash of {name} differs; copy or export the model again")
        return data

    def read_json(self, name: str, cls: type[T]) -> T:
        """A member of the manifest that is JSON.

        Raises:
            FormatError: it is damaged, or does not fit `cls`.
        """
        return _parse(self.path, name, self.read(name), cls)


def weights_member(fold: int) -> str:
    """The name of a fold's weights."""
    return f"fold_{fold}/{WEIGHTS}"


def training_member(fold: int) -> str:
    """The name of the record of how a fold was trained."""
    return f"fold_{fold}/{TRAINING}"


def write_archive(
    path: Path, members: Iterator[tuple[str, bytes]], describe: Callable[[dict[str, Member]], Manifest]
) -> None:
    """Writes a one-file model atomically; equal members give equal bytes.

    Args:
        path: the file.
        members: names and bytes, one after the other, so that they are never all in memory.
        describe: makes the manifest when all members are written.

    Raises:
        FormatError: a member is larger than a reader would accept.
    """
    listed: dict[str, Member] = {}
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as file:
        for name, data in members:
            listed[name] = Member(n_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            _write_member(file, name, data)
        _write_member(file, MANIFEST, encode_json(describe(listed)))


def _write_member(file: zipfile.ZipFile, name: str, data: bytes) -> None:
    if len(data) > _max_bytes(name):
        raise FormatError(f"{name}: has {len(data)} bytes, expected at most {_max_bytes(name)}")
    # Neither the time nor the system that wrote it show.
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.create_system = 3
    info.external_attr = (stat.S_IFREG | 0o644) << 16
    file.writestr(info, data)


def read_archive(path: Path) -> Archive:
    """Opens a one-file model: checks its structure, and reads its manifest.

    Raises:
        FormatError: it is not one, is damaged, or was made by a newer autoseg.
    """
    with _open(path) as file:
        infos = file.infolist()
        for info in infos:
            if problem := _find_problem(info):
                raise _not_a_model(path, f"the member {info.orig_filename!a} {problem}")
        names = [info.filename for info in infos]
        if len(set(names)) != len(names):
            raise _not_a_model(path, "two members have the same name")
        # Not compressed, they are no larger than the file, unless they share their bytes.
        if sum(info.file_size for info in infos) > path.stat().st_size:
            raise _not_a_model(path, "its members are larger than the file")
        if MANIFEST not in names:
            raise _not_a_model(path, f"it has no {MANIFEST}")
        manifest = _parse_manifest(path, _read_member(path, file, MANIFEST))
        found = {info.filename: info.file_size for info in infos if info.filename != MANIFEST}
    expected = {name: member.n_bytes for name, member in manifest.members.items()}
    if found != expected:
        odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise FormatError(
            f"{path}: is damaged: what its manifest says of {_listed(odd)} is not so; copy or export the model again"
        )
    return Archive(path=path, manifest=manifest)


def _find_problem(info: zipfile.ZipInfo) -> str | None:
    """Why a member can be none of a model, whatever the manifest says."""
    name = info.orig_filename
    outside = name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/"))
    # zipfile itself changes names that have a zero, or where the system has other separators.
    if outside or any(sign in name for sign in "\\:") or info.filename != name:
        return "has a name that leads elsewhere"
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
        return "is a link or another special file"
    if info.flag_bits & 0x1:
        return "is encrypted"
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        return "is compressed"
    if info.file_size > _max_bytes(name):
        return f"has {info.file_size} bytes, expected at most {_max_bytes(name)}"
    return None


def _max_bytes(name: str) -> int:
    return MAX_WEIGHTS_BYTES if name.endswith(".safetensors") else MAX_JSON_BYTES


def _parse_manifest(path: Path, data: bytes) -> Manifest:
    content = _parse(path, MANIFEST, data, dict[str, Any])
    if content.get("format") != FORMAT:
        raise _not_a_model(path, f"its {MANIFEST} is of another kind of file")
    version = content.get("version")
    if not isinstance(version, int):
        raise _not_a_model(path, f"its {MANIFEST} has no version")
    if not OLDEST_FORMAT_VERSION <= version <= FORMAT_VERSION:
        kind, advice = ("newer", "update autoseg") if version > FORMAT_VERSION else ("older", "export the model again")
        raise FormatError(
            f"{path}: was made by a{'n' * (kind == 'older')} {kind} autoseg (format {version}, this one reads "
            f"{OLDEST_FORMAT_VERSION} to {FORMAT_VERSION}); {advice}"
        )
    return _parse(path, MANIFEST, data, Manifest)


def _parse(path: Path, name: str, data: bytes, cls: type[T]) -> T:
    try:
        return from_plain(cls, parse_json(data))
    except (AutosegError, ValueError) as error:
        raise _not_a_model(path, f"{name}: {error}") from error


def _read_member(path: Path, file: zipfile.ZipFile, name: str) -> bytes:
    try:
        info = file.getinfo(name)
        with file.open(info) as member:
            # One more than it should have: whatever the headers say, no more than that is read.
            return member.read(min(info.file_size, _max_bytes(name)) + 1)
    except KeyError as error:
        raise FormatError(f"{path}: was changed while it was read; start again") from error
    except (OSError, *_ZIP_ERRORS) as error:
        raise FormatError(f"{path}: is damaged: {name} cannot be read ({error}); copy or export it again") from error


@contextmanager
def _open(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with path.open("rb") as raw:
            begins_as_zip = raw.read(4) == b"PK\x03\x04"
        file = zipfile.ZipFile(path)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error})") from error
    except _ZIP_ERRORS as error:
        if begins_as_zip:
            raise FormatError(f"{path}: is damaged or cut off ({error}); copy or export the model again") from error
        raise _not_a_model(path, str(error)) from error
    with file:
        yield file


def _not_a_model(path: Path, why: str) -> FormatError:
    return FormatError(f"{path}: is not an autoseg model ({why})")


def _listed(values: Iterable[int | str]) -> str:
    shown = [ascii(value) for value in values]
    return ", ".join(shown[:6] + ["..."] * (len(shown) > 6)) or "none"

"""Preprocessed cases on disk: plain memory-mapped arrays, so that a patch is read without reading the volume.

A case is a folder with `image.npy` (float16, (C, Z, Y, X)), `label.npy` (uint8 or uint16, (Z, Y, X)), `foreground.npy`
(sampled voxels of each class), `occupied.npy` (one bit for each voxel of the cropped scan: whether it has content) and
`case.json`, which holds the hashes of all of them. Folders appear whole or not at all; what a disk does to them later,
`find_damage` finds, at the speed of `autoseg.core.checksums` per core.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from autoseg.core.checksums import hash_file
from autoseg.core.errors import FormatError, WorkspaceError
from autoseg.core.runtime import derive_seed, map_threads, n_cpus
from autoseg.core.serialize import atomic_path, digest, from_plain, read_json, to_plain, write_json
from autoseg.preprocessing.foreground import sample_foreground, sample_voxels
from autoseg.preprocessing.preprocess import CaseRecord

logger = logging.getLogger(__name__)

STORE_VERSION = 3
RECORD, ARRAYS = "case.json", ("image.npy", "label.npy", "foreground.npy", "occupied.npy")
PREVIOUS_RECORD, PREVIOUS_ARRAY = "previous.json", "previous.npy"
MAX_FLOAT16 = 65504.0
MIN_AGE_NS = 1_000_000_000
"""Of a file, to be told by its times from one that is changed now: some file systems tell them in steps."""


@dataclass(frozen=True, kw_only=True)
class StoredCase:
    """The content of `case.json`.

    Attributes:
        version: of the store's format.
        key: digest of everything the case was made of; it is rebuilt when that changes.
        record: how to get back to the scan.
        foreground_counts: rows of `foreground.npy` per foreground class, in order of the classes.
        n_annotated: rows after those: voxels that somebody has annotated; 0 where all are.
        known: which of the network's outputs were annotated in this case; None for all.
        absent: channels that are zero throughout: the case lacks them.
        hashes: of the arrays' files, by name, and of this record without its own.
    """

    version: int
    key: str
    record: CaseRecord
    foreground_counts: tuple[int, ...]
    n_annotated: int = 0
    known: tuple[bool, ...] | None = None
    absent: tuple[int, ...] = ()
    hashes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StoredPrevious:
    """The content of `previous.json`.

    Attributes:
        key: digest of everything that the array was made of.
        hashes: as in `StoredCase`.
    """

    key: str
    hashes: dict[str, str] = field(default_factory=dict)


R = TypeVar("R", StoredCase, StoredPrevious)


def write_case(
    folder: Path,
    image: NDArray,
    label: NDArray,
    *,
    key: str,
    record: CaseRecord,
    n_classes: int,
    occupied: NDArray[np.bool_] | None = None,
    known: tuple[bool, ...] | None = None,
) -> None:
    """Writes a preprocessed case atomically, in place of an older one.

    Args:
        folder: of the case.
        image: (C, Z, Y, X) float32 in the network's axes.
        label: (Z, Y, X) uint8 or uint16, same axes; `n_classes` where nobody has annotated anything.
        key: digest of what the case depends on.
        record: how to get back.
        n_classes: of the dataset, with the background.
        occupied: where the scan has content, see `autoseg.preprocessing.occupied.crop_occupied`; None for everywhere.
        known: see `StoredCase`.
    """
    seed = derive_seed("foreground", folder.name)
    counts, positions = sample_foreground(label, n_classes=n_classes, seed=seed)
    annotated = positions[:0]
    if (label == n_classes).any():
        annotated = sample_voxels(label != n_classes, np.random.default_rng(seed))
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        half = np.clip(image, -MAX_FLOAT16, MAX_FLOAT16).astype(np.float16)
        bits = np.packbits(np.ones(record.cropped_shape, bool) if occupied is None else occupied)
        contents = half, label, np.concatenate([positions, annotated]), bits
        for name, content in zip(ARRAYS, contents, strict=True):
            np.save(temporary / name, content, allow_pickle=False)
        stored = StoredCase(
            version=STORE_VERSION,
            key=key,
            record=record,
            foreground_counts=counts,
            n_annotated=len(annotated),
            known=known,
            absent=tuple(channel for channel, values in enumerate(image) if not values.any()),
        )
        write_json(temporary / RECORD, _sealed(stored, temporary, RECORD, ARRAYS))


def is_current(folder: Path, key: str) -> bool:
    """Whether the case in `folder` was made of exactly what `key` stands for; its arrays are not read."""
    try:
        stored = read_json(folder / RECORD)
    except FormatError:
        return False
    complete = all((folder / name).is_file() for name in ARRAYS)
    return complete and isinstance(stored, dict) and (stored.get("version"), stored.get("key")) == (STORE_VERSION, key)


def find_damage(folder: Path, key: str | None = None) -> Path | None:
    """The first file of a case that is missing, or is not as it was written; None where all of them are whole.

    Where there is no case, or one of another version of the store, there is no damage either. What is whole is not read
    again in this process while its files keep their sizes and times.

    Args:
        folder: of the case.
        key: the arrays are read only where the case was made of what this stands for; None reads them in any case.
    """
    return _find_damage(folder, StoredCase, RECORD, ARRAYS, key=key, version=STORE_VERSION)


def write_previous(folder: Path, classes: NDArray, *, key: str) -> None:
    """Writes what the first stage of a cascade has found in a case, atomically.

    Args:
        folder: for the case and the second stage.
        classes: (Z, Y, X) on the grid of the second stage.
        key: digest of what it depends on.
    """
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        np.save(temporary / PREVIOUS_ARRAY, classes, allow_pickle=False)
        stored = _sealed(StoredPrevious(key=key), temporary, PREVIOUS_RECORD, (PREVIOUS_ARRAY,))
        write_json(temporary / PREVIOUS_RECORD, stored)


def is_previous_current(folder: Path, key: str) -> bool:
    """Whether what is in `folder` depends on exactly what `key` stands for; the array is not read."""
    try:
        stored: StoredPrevious = read_json(folder / PREVIOUS_RECORD, StoredPrevious)
    except FormatError:
        return False
    return (folder / PREVIOUS_ARRAY).is_file() and stored.key == key


def find_previous_damage(folder: Path, key: str) -> Path | None:
    """As `find_damage`, of what `write_previous` has written."""
    return _find_damage(folder, StoredPrevious, PREVIOUS_RECORD, (PREVIOUS_ARRAY,), key=key)


def _sealed(stored: R, folder: Path, name: str, arrays: Sequence[str]) -> R:
    """The record with the hashes of the arrays' files, and then with its own."""
    # As it will be read: whole numbers that stand for others have become them then.
    stored = from_plain(type(stored), to_plain(stored))
    stored = replace(stored, hashes={array: hash_file(folder / array) for array in arrays})
    return replace(stored, hashes={**stored.hashes, name: digest(stored)})


# The files of cases that were found whole, by their folders. A training looks at its cases more than once.
_whole: dict[Path, list[tuple[int, ...]]] = {}


def _find_damage(
    folder: Path, kind: type[R], name: str, arrays: Sequence[str], *, key: str | None, version: int | None = None
) -> Path | None:
    """See `find_damage`.

    Args:
        folder: of the case.
        kind: of its record.
        name: of the record's file.
        arrays: names of the others.
        key: see `find_damage`.
        version: that the record has to be of; None where it has none.
    """
    try:
        content = read_json(folder / name)
        if not isinstance(content, dict) or content.get("version") != version:
            return None
        stored = from_plain(kind, content)
    except FormatError:
        return folder / name if folder.is_dir() else None
    hashes = {**stored.hashes}
    if hashes.pop(name, None) != digest(replace(stored, hashes=hashes)):
        return folder / name
    return _find_changed(folder, arrays, hashes) if key in (None, stored.key) else None


def _find_changed(folder: Path, arrays: Sequence[str], hashes: Mapping[str, str]) -> Path | None:
    """The first of these files that is missing or has another hash; what has not changed since is not read again."""
    seen: list[tuple[int, ...]] = []
    for array in arrays:
        try:
            stat = (folder / array).stat()
        except OSError:
            return folder / array
        seen.append((stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    if _whole.get(folder) == seen:
        return None
    for array in arrays:
        try:
            if hash_file(folder / array) != hashes.get(array):
                return folder / array
        except OSError:
            return folder / array
    if time.time_ns() - max(changed_ns for *_, changed_ns in seen) > MIN_AGE_NS:
        _whole[folder] = seen
    return None


class _ArrayFile:
    """An array on disk that is mapped anew at each use, until it is loaded.

    A map holds its file open, and with four for each of a few hundred cases a process comes to its limit of open files
    (256 on macOS, 1024 on most of Linux). Mapping takes some 40 microseconds.
    """

    def __init__(self, path: Path, *, record: str, file_hash: str) -> None:
        """Looks at a file.

        Args:
            path: of the array.
            record: the name of the file beside it that has its hash.
            file_hash: which is this.
        """
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        self._path, self._dtype, self._shape, self._offset = path, array.dtype, array.shape, array.offset
        self._version, self._record, self._hash = self._look(), path.with_name(record), file_hash
        self._order: Literal["C", "F"] = "C" if array.flags.c_contiguous else "F"
        self._loaded: NDArray | None = None
        self.n_bytes: int = array.nbytes

    def load(self) -> _ArrayFile:
        """The same array, read as a whole; read-only, as threads share it."""
        result = copy.copy(self)
        result._loaded = np.load(self._path, allow_pickle=False)
        self._check_version()
        result._loaded.flags.writeable = False
        return result

    def open(self) -> NDArray:
        """The array, read where it is indexed.

        Raises:
            WorkspaceError: the file has gone, or is of another array than the one that was opened first.
        """
        if self._loaded is not None:
            return self._loaded
        self._check_version()
        return np.memmap(self._path, self._dtype, "r", self._offset, self._shape, self._order)

    def _look(self) -> tuple[int, ...]:
        stat = self._path.stat()
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    def _check_version(self) -> None:
        """What was made anew of the same scan for the same plan is the same array, in another file."""
        try:
            found = self._look()
            if found == self._version:
                return
            is_same = read_json(self._record)["hashes"][self._path.name] == self._hash
        except (FileNotFoundError, FormatError, KeyError, TypeError):
            is_same = False
        if not is_same:
            raise WorkspaceError(
                f"{self._path.parent}: was made anew or deleted while it was in use, as 'autoseg plan' does where the "
                "plan changes; to train on two plans at a time, give each a work folder with -w"
            )
        self._version = found


class PreprocessedCase:
    """A preprocessed case, opened without reading its voxels. Safe to use from several threads.

    Attributes:
        id: of the case.
        stored: its record.
        key: digest of everything that it was made of.
        content: digest of what can be learned from it.
    """

    def __init__(self, folder: Path, *, previous: Path | None = None) -> None:
        """Opens a case.

        Args:
            folder: of the case.
            previous: the folder with what the first stage of a cascade has found in it, see `write_previous`.

        Raises:
            WorkspaceError: it is missing or not readable.
        """
        self.id = folder.name
        self._folder = folder
        self._previous: _ArrayFile | None = None
        try:
            self.stored: StoredCase = read_json(folder / RECORD, StoredCase)
            self.key = self.stored.key
            hashes = [self.stored.hashes[name] for name in ARRAYS]
            self._image, self._label, self._positions, self._occupied = (
                _ArrayFile(folder / name, record=RECORD, file_hash=file_hash)
                for name, file_hash in zip(ARRAYS, hashes, strict=True)
            )
            if previous is not None:
                found: StoredPrevious = read_json(previous / PREVIOUS_RECORD, StoredPrevious)
                file_hash = found.hashes[PREVIOUS_ARRAY]
                self._previous = _ArrayFile(previous / PREVIOUS_ARRAY, record=PREVIOUS_RECORD, file_hash=file_hash)
                self.key = digest((self.key, found.key))
                hashes.append(file_hash)
            self.content = digest((hashes, self.stored.known))
        except (OSError, ValueError, EOFError, KeyError, FormatError) as error:
            raise _unreadable(folder, error) from error

    def load(self) -> PreprocessedCase:
        """The same case with what is learned from in memory; of its files, only that of `occupied` is still needed.

        Raises:
            WorkspaceError: a file is not readable.
        """
        result = copy.copy(self)
        try:
            result._image, result._label, result._positions = (
                array.load() for array in (self._image, self._label, self._positions)
            )
            result._previous = None if self._previous is None else self._previous.load()
        except (OSError, ValueError, EOFError) as error:
            raise _unreadable(self._folder, error) from error
        return result

    @property
    def memory_gib(self) -> float:
        """What the arrays that are loaded take, known from their headers."""
        arrays = (self._image, self._label, self._positions, self._previous)
        return sum(array.n_bytes for array in arrays if array is not None) / 2**30

    @property
    def image(self) -> NDArray[np.float16]:
        """(C, Z, Y, X), memory-mapped or loaded; read-only."""
        return self._image.open()

    @property
    def label(self) -> NDArray:
        """(Z, Y, X) uint8 or uint16, memory-mapped or loaded; read-only."""
        return self._label.open()

    @property
    def previous(self) -> NDArray | None:
        """(Z, Y, X) classes that the first stage of a cascade has found, memory-mapped or loaded; read-only."""
        return None if self._previous is None else self._previous.open()

    @property
    def occupied(self) -> NDArray[np.bool_]:
        """`record.cropped_shape`: where the scan has content, see `autoseg.preprocessing.occupied.crop_occupied`."""
        shape = self.record.cropped_shape
        return np.unpackbits(self._occupied.open(), count=prod(shape)).view(bool).reshape(shape)

    @property
    def record(self) -> CaseRecord:
        """How to get back to the scan."""
        return self.stored.record

    @cached_property
    def classes(self) -> tuple[int, ...]:
        """Foreground classes that occur in this case."""
        return tuple(index + 1 for index, count in enumerate(self.stored.foreground_counts) if count)

    def foreground(self, class_index: int) -> NDArray[np.int32]:
        """Sampled voxels (n, 3) of a foreground class; n is 0 where the case has none of it."""
        counts = self.stored.foreground_counts
        start = sum(counts[: class_index - 1])
        return self._positions.open()[start : start + counts[class_index - 1]]

    @property
    def annotated(self) -> NDArray[np.int32]:
        """Sampled voxels (n, 3) that somebody has annotated, as whatever class; n is 0 where all are."""
        start = sum(self.stored.foreground_counts)
        return self._positions.open()[start : start + self.stored.n_annotated]


def _unreadable(folder: Path, error: Exception) -> WorkspaceError:
    return WorkspaceError(
        f"{folder}: the preprocessed case cannot be read ({error}); delete the folder and run 'autoseg plan'"
    )


def load_into_memory(cases: Sequence[PreprocessedCase], *, budget_gib: float) -> list[PreprocessedCase]:
    """Loads cases into memory, in order, each that still fits the budget; the others stay memory-mapped.

    Mapping a file and its page faults cost time even where it is in the page cache: on a local disk, two threads read
    large 3D patches 1.2 to 2 times as fast from memory, slices and small 3D patches 2 to 4 times. On a network file
    system it also saves asking the server at every patch, and other jobs cannot push the cases out of the page cache.

    Args:
        cases: opened; they stay as they are.
        budget_gib: for the arrays of all loaded cases together; 0 loads none.

    Returns:
        The same cases in the same order.

    Raises:
        WorkspaceError: a file is not readable.
    """
    fits, left_gib = [], budget_gib
    for case in cases:
        fits.append(case.memory_gib <= left_gib)
        left_gib -= case.memory_gib if fits[-1] else 0
    chosen = [case for case, fit in zip(cases, fits, strict=True) if fit]
    loaded = iter(
        map_threads(PreprocessedCase.load, chosen, n_threads=n_cpus(), description="loading") if chosen else []
    )
    logger.debug("%d of %d cases in memory, %.1f GiB", len(chosen), len(cases), budget_gib - left_gib)
    return [next(loaded) if fit else case for case, fit in zip(cases, fits, strict=True)]

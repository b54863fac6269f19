"""Frozen dataclasses to JSON and back, and files that are either whole or absent.

Everything autoseg keeps on disk apart from arrays, weights and pictures goes through here. Reading is strict: an
unknown or missing key or a value of the wrong type is an error that names the place in the file.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import os
import reprlib
import shutil
import stat
import sys
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from autoseg.core.errors import AutosegError, FormatError
from autoseg.core.faults import naming
from autoseg.core.leftovers import remove_leftovers, temporary_path
from autoseg.core.text import shorten

T = TypeVar("T")

_LATER = "later"

MAX_JSON_BYTES = 256 * 2**20
"""The index of 100,000 cases with four channels has about a third of it."""
MAX_JSON_DEPTH = 100
_PIECE_BYTES = 2**20
_MAX_SHOWN = 80
# Of a value that takes megabytes, a message shows the beginning.
_REPR = reprlib.Repr()
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 20
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 2 * _MAX_SHOWN


def later(default: Any) -> Any:
    """A field that a dataclass got later. With its default it is left out of files and digests, so older ones hold."""
    return dataclasses.field(default=default, metadata={_LATER: True})


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples, paths and numpy scalars as what JSON knows. NaN becomes null.

    Raises:
        TypeError: for a type that has no plain form.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {
            field.name: to_plain(item)
            for field, item in items
            if not (field.metadata.get(_LATER) and item == field.default)
        }
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return to_plain(value.tolist())
    if isinstance(value, np.generic):
        return to_plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"{type(value).__name__} has no plain form")


@cache
def _field_types(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def from_plain(cls: type[T], data: Any, *, where: str = "") -> T:
    """Builds `cls` from what `to_plain` made of it.

    Args:
        cls: a dataclass, a builtin scalar type, or a `tuple`, `list`, `dict` or `X | None` of these.
        data: the plain value.
        where: the place in the file, for messages.

    Raises:
        FormatError: an unknown or missing key, or a value of the wrong type.
    """
    return typing.cast(T, _build(cls, data, where))


def _build(kind: Any, data: Any, where: str) -> Any:
    if kind is Any:
        return data
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if data is None and type(None) in arguments:
            return None
        return _build(next(a for a in arguments if a is not type(None)), data, where)
    if origin is tuple:
        _expect(isinstance(data, list), "a list", data, where)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_build(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data))
        _expect(len(data) == len(arguments), f"a list of {len(arguments)}", data, where)
        return tuple(_build(a, item, f"{where}[{i}]") for i, (a, item) in enumerate(zip(arguments, data, strict=True)))
    if origin is list:
        _expect(isinstance(data, list), "a list", data, where)
        return [_build(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data)]
    if origin is dict:
        _expect(isinstance(data, dict), "an object", data, where)
        return {_build_key(arguments[0], k, where): _build(arguments[1], v, f"{where}.{k}") for k, v in data.items()}
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(typing.cast(type, kind), data, where)
    if kind is float:
        if data is None:
            return math.nan
        _expect(isinstance(data, (int, float)) and not isinstance(data, bool), "a number", data, where)
        _expect(abs(data) <= sys.float_info.max, "a finite number", data, where)
        return float(data)
    if kind is int:
        _expect(isinstance(data, int) and not isinstance(data, bool), "a whole number", data, where)
        _expect(-(2**63) <= data < 2**63, "a whole number of at most 64 bits", data, where)
        return data
    if kind is Path:
        _expect(isinstance(data, str), "a path", data, where)
        return Path(data)
    if kind in (str, bool):
        _expect(isinstance(data, kind), {str: "a text", bool: "true or false"}[kind], data, where)
        return data
    raise TypeError(f"cannot read a {kind}")


def _build_key(kind: Any, key: str, where: str) -> Any:
    try:
        return kind(key)
    except ValueError as error:
        raise FormatError(f"{where}: found the key '{shorten(key, _MAX_SHOWN)}', expected {kind.__name__}") from error


def _build_dataclass(kind: type, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), "an object", data, where)
    hints = _field_types(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in data:
        if key not in fields:
            shown = shorten(key, _MAX_SHOWN)
            close = difflib.get_close_matches(shown, fields, n=1)
            advice = f"; did you mean '{close[0]}'?" if close else f"; known are {', '.join(fields)}"
            raise FormatError(f"{where or kind.__name__}: unknown key '{shown}'{advice}")
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _build(hints[name], data[name], f"{where}.{name}" if where else name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise FormatError(f"{where or kind.__name__}: key '{name}' is missing")
    try:
        return kind(**values)
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        # Each number is one, but a check that needs them to fit together may stumble where they do not.
        raise FormatError(f"{where or kind.__name__}: its values do not go together ({error})") from error


def _expect(condition: bool, expected: str, data: Any, where: str) -> None:
    if not condition:
        found = f"found {shorten(_REPR.repr(data), _MAX_SHOWN)}, expected {expected}"
        raise FormatError(f"{where}: {found}" if where else found)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` when the block ends without an error.

    Works for files and for folders. The temporary name keeps the ending, because writers choose the format by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    temporary = temporary_path(path)
    try:
        with naming(path, temporary):
            yield temporary
            if temporary.is_dir() and path.is_dir():
                _replace_folder(temporary, path)
            else:
                os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            # On a disk that is read-only now, say, the error before this one is what to tell.
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk itself, where a machine that fails leaves them.

    Not every file system can do that for folders, which is passed over.
    """
    is_folder = path.is_dir()
    with suppress(OSError) if is_folder else nullcontext():
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace_folder(new: Path, path: Path) -> None:
    # Moved aside first: deleting takes time, and whoever looks or stops meanwhile must not find half a folder.
    old = path.with_name(f"{new.name}-old")
    os.replace(path, old)
    os.replace(new, path)
    if old.is_symlink():
        old.unlink()
    else:
        shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a dataclass or plain value atomically, indented so that a person can read it."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(encode_json(value))


def holds_json(path: Path, value: Any) -> bool:
    """Whether a file is just what `write_json` would make it."""
    return path.is_file() and path.read_bytes() == encode_json(value)


def encode_json(value: Any) -> bytes:
    """The bytes of a JSON file."""
    # A byte of a file name that is no UTF-8 is half of a surrogate pair in Python, and escaped in JSON.
    return f"{dump_json(value)}\n".encode("utf-8", "backslashreplace")


def dump_json(value: Any) -> str:
    """JSON text, indented, with lists of scalars on one line."""
    return _indent(to_plain(value), "")


def _indent(value: Any, margin: str) -> str:
    inner = margin + "  "
    if isinstance(value, dict) and value:
        items = (f"{inner}{json.dumps(k, ensure_ascii=False)}: {_indent(v, inner)}" for k, v in value.items())
        return "{\n" + ",\n".join(items) + "\n" + margin + "}"
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        flat = json.dumps(value, ensure_ascii=False)
        if len(flat) <= 100 and not any(isinstance(item, dict) for item in value):
            return flat
        return "[\n" + ",\n".join(inner + _indent(item, inner) for item in value) + "\n" + margin + "]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def read_json(path: Path, cls: type[T] | None = None) -> Any:
    """Reads a JSON file, as `cls` where one is given.

    Raises:
        FormatError: the file is missing, larger than `MAX_JSON_BYTES`, is not JSON, or does not fit `cls`.
        AutosegError: what `cls` itself finds wrong with its values, with the file's name before it.
    """
    try:
        data = parse_json(_read_bounded(path), strict=cls is not None)
    except FileNotFoundError as error:
        raise FormatError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read as text ({error})") from error
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error
    if cls is None:
        return data
    try:
        return from_plain(cls, data)
    except AutosegError as error:
        raise type(error)(f"{path}: {error}") from error


def _read_bounded(path: Path) -> bytes:
    """The bytes of a file that is no larger than JSON may be.

    Raises:
        OSError: it cannot be read.
        FormatError: it is larger, or no file.
    """
    with open(path, "rb", opener=_open_without_waiting) as file:
        known = os.fstat(file.fileno())
        if not stat.S_ISREG(known.st_mode):
            raise FormatError("is a device or a pipe, expected a file")
        if known.st_size > MAX_JSON_BYTES:
            raise FormatError(
                f"has {known.st_size / 2**20:,.0f} MiB, expected JSON of at most {MAX_JSON_BYTES // 2**20} MiB; is it "
                "the right file?"
            )
        # It may grow meanwhile.
        return file.read(MAX_JSON_BYTES)


def _open_without_waiting(path: str, flags: int) -> int:
    # A pipe would let its reader wait for somebody to write.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def parse_json(data: bytes, *, strict: bool = True) -> Any:
    """JSON in UTF-8, with or without a mark of its order of bytes.

    Args:
        data: the text.
        strict: NaN and Infinity are refused, which JSON does not know and other programs write all the same.

    Raises:
        UnicodeDecodeError: it is no text.
        FormatError: it is not JSON, or nested too deep.
    """
    text = data.decode("utf-8-sig")
    try:
        if _depth(data) > MAX_JSON_DEPTH:
            raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} levels deep")
        return json.loads(text, parse_constant=_refuse_constant if strict else None)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is not JSON ({error})") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"found {name}, expected a number, or null where there is none")


def _depth(data: bytes) -> int:
    """How deep lists and objects are nested, of JSON that is right; without recursion, and in little memory."""
    if data.count(b"[") + data.count(b"{") <= MAX_JSON_DEPTH:
        return 0
    # Without escaped characters each quote begins or ends a text.
    data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    deepest, depth, n_quotes = 0, 0, 0
    for start in range(0, len(data), _PIECE_BYTES):
        piece = np.frombuffer(data, np.uint8, min(_PIECE_BYTES, len(data) - start), start)
        quotes = n_quotes + np.cumsum(piece == ord('"'))
        step = ((piece == ord("[")) | (piece == ord("{"))).astype(np.int8)
        step -= (piece == ord("]")) | (piece == ord("}"))
        depths = depth + np.cumsum(np.where(quotes % 2 == 0, step, 0))
        deepest, depth, n_quotes = max(deepest, int(depths.max())), int(depths[-1]), int(quotes[-1])
    return deepest


def digest(value: Any) -> str:
    """A short hash of a dataclass or plain value: equal values, equal digests, on every machine."""
    text = json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]

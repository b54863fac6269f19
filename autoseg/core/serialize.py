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
import shutil
import types
import typing
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from autoseg.core.errors import AutosegError, FormatError

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples, paths and numpy scalars as what JSON knows. NaN becomes null.

    Raises:
        TypeError: for a type that has no plain form.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
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
        return float(data)
    if kind is int:
        _expect(isinstance(data, int) and not isinstance(data, bool), "a whole number", data, where)
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
        raise FormatError(f"{where}: found the key '{key}', expected {kind.__name__}") from error


def _build_dataclass(kind: type, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), "an object", data, where)
    hints = _field_types(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in data:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            advice = f"; did you mean '{close[0]}'?" if close else f"; known are {', '.join(fields)}"
            raise FormatError(f"{where or kind.__name__}: unknown key '{key}'{advice}")
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _build(hints[name], data[name], f"{where}.{name}" if where else name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise FormatError(f"{where or kind.__name__}: key '{name}' is missing")
    return kind(**values)


def _expect(condition: bool, expected: str, data: Any, where: str) -> None:
    if not condition:
        shown = repr(data)
        found = f"found {shown[:77] + '...' if len(shown) > 80 else shown}, expected {expected}"
        raise FormatError(f"{where}: {found}" if where else found)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` when the block ends without an error.

    Works for files and for folders. The temporary name keeps the ending, because writers choose the format by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}-{path.name}")
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            _replace_folder(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


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
        temporary.write_text(dump_json(value) + "\n", encoding="utf-8")


def holds_json(path: Path, value: Any) -> bool:
    """Whether a file is just what `write_json` would make it."""
    return path.is_file() and path.read_text(encoding="utf-8") == dump_json(value) + "\n"


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
        FormatError: the file is missing, is not JSON, or does not fit `cls`.
        AutosegError: what `cls` itself finds wrong with its values, with the file's name before it.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise FormatError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read as text ({error})") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: is not JSON ({error})") from error
    if cls is None:
        return data
    try:
        return from_plain(cls, data)
    except AutosegError as error:
        raise type(error)(f"{path}: {error}") from error


def digest(value: Any) -> str:
    """A short hash of a dataclass or plain value: equal values, equal digests, on every machine."""
    text = json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]

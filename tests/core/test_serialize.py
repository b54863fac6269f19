"""Dataclasses to JSON and back, strictly, and files that are whole or absent."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoseg.core.errors import DatasetError, FormatError
from autoseg.core.labels import LabelSpec
from autoseg.core.serialize import (
    atomic_path,
    digest,
    dump_json,
    from_plain,
    later,
    read_json,
    to_plain,
    write_json,
)


@dataclass(frozen=True, kw_only=True)
class Inner:
    spacing_mm: tuple[float, float, float]
    kernels: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    folder: Path
    inner: Inner
    parts: tuple[Inner, ...]
    by_name: dict[str, Inner]
    by_number: dict[int, list[float]]
    maybe: int | None
    maybe_inner: Inner | None = None
    flag: bool = False
    score: float = math.nan
    anything: Any = None


INNER = Inner(spacing_mm=(3.0, 0.7, 0.7000001), kernels=((1, 3, 3), (3, 3, 3)))
OUTER = Outer(
    name='Ä "quoted" \\ name\n',
    folder=Path("/data/Müller/x"),
    inner=INNER,
    parts=(INNER, Inner(spacing_mm=(1.0, 1.0, 1.0))),
    by_name={"2d": INNER},
    by_number={3: [1.0, 2.5]},
    maybe=None,
    maybe_inner=INNER,
    flag=True,
    score=0.1 + 0.2,
    anything=["a", {"b": 1}],
)
PLAIN_INNER = {"spacing_mm": [1, 2, 3], "kernels": [[1, 2]]}


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    write_json(tmp_path / "new folder" / "a.json", OUTER)
    again = read_json(tmp_path / "new folder" / "a.json", Outer)
    assert again == OUTER
    assert isinstance(again.folder, Path)
    assert isinstance(again.parts[1].spacing_mm, tuple)
    assert isinstance(again.inner.kernels[0], tuple)


def test_nan_and_infinity_become_null_and_come_back_as_nan(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Scores:
        values: tuple[float, ...]

    plain = to_plain(Scores(values=(math.nan, math.inf, 1.0)))
    assert plain == {"values": [None, None, 1.0]}
    write_json(tmp_path / "a.json", plain)
    json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert math.isnan(from_plain(tuple[float, ...], plain["values"])[0])


def test_a_field_that_came_later_changes_files_and_digests_only_where_it_says_something(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Before:
        edge_mm: float

    @dataclass(frozen=True, kw_only=True)
    class After:
        edge_mm: float
        smoothed: bool = later(False)

    assert digest(After(edge_mm=1.0)) == digest(Before(edge_mm=1.0)) != digest(After(edge_mm=1.0, smoothed=True))
    for value in (After(edge_mm=1.0), After(edge_mm=1.0, smoothed=True)):
        assert from_plain(After, to_plain(value)) == value


def test_to_plain_knows_numpy() -> None:
    plain = to_plain({"a": np.float32(0.5), "b": np.int64(3), "c": np.arange(3), 4: (np.bool_(True),)})
    assert plain == {"a": 0.5, "b": 3, "c": [0, 1, 2], "4": [True]}
    assert type(plain["b"]) is int


def test_to_plain_refuses_what_has_no_plain_form() -> None:
    with pytest.raises(TypeError, match="set has no plain form"):
        to_plain({"a": {1, 2}})


def test_whole_numbers_are_welcome_as_float_but_not_the_reverse() -> None:
    inner = from_plain(Inner, PLAIN_INNER)
    assert inner.spacing_mm == (1.0, 2.0, 3.0)
    assert type(inner.spacing_mm[0]) is float
    with pytest.raises(FormatError, match=r"kernels\[0\]\[1\]: found 2.5, expected a whole number"):
        from_plain(Inner, {"spacing_mm": [1, 2, 3], "kernels": [[1, 2.5]]})


def change(**values: Any) -> dict[str, Any]:
    return {**to_plain(OUTER), **values}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (change(maybee=1), "Outer: unknown key 'maybee'; did you mean 'maybe'?"),
        (change(zzz=1), "Outer: unknown key 'zzz'; known are name, folder"),
        (change(inner={"spacing": [1, 2, 3]}), "inner: unknown key 'spacing'; did you mean 'spacing_mm'?"),
        ({key: value for key, value in change().items() if key != "folder"}, "Outer: key 'folder' is missing"),
        (change(parts=[PLAIN_INNER, {}]), "parts[1]: key 'spacing_mm' is missing"),
        (change(name=3), "name: found 3, expected a text"),
        (change(flag=1), "flag: found 1, expected true or false"),
        (change(maybe=True), "maybe: found True, expected a whole number"),
        (change(maybe="7"), "maybe: found '7', expected a whole number"),
        (change(score="0.5"), "score: found '0.5', expected a number"),
        (change(score=False), "score: found False, expected a number"),
        (change(folder=None), "folder: found None, expected a path"),
        (change(inner=[1]), "inner: found [1], expected an object"),
        (change(inner={"spacing_mm": [1, 2]}), "inner.spacing_mm: found [1, 2], expected a list of 3"),
        (change(inner={"spacing_mm": "123"}), "inner.spacing_mm: found '123', expected a list"),
        (change(inner={"spacing_mm": [1, "x", 3]}), "inner.spacing_mm[1]: found 'x', expected a number"),
        (change(by_name={"2d": {**PLAIN_INNER, "kernels": [1]}}), "by_name.2d.kernels[0]: found 1, expected a list"),
        (change(by_name=[]), "by_name: found [], expected an object"),
        (change(by_number={"x": [1.0]}), "by_number: found the key 'x', expected int"),
        (change(by_number={"1": 5}), "by_number.1: found 5, expected a list"),
        (["x" * 200], "found ['xxx"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(data: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        from_plain(Outer, data)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 200
    (tmp_path / "a.json").write_text(json.dumps(data))
    with pytest.raises(FormatError) as caught:
        read_json(tmp_path / "a.json", Outer)
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'}: {message}")


def test_a_value_that_the_class_refuses_is_named_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"names": ["a"], "values": [0]}')
    with pytest.raises(DatasetError, match=r"a\.json: labels: found the values 0"):
        read_json(tmp_path / "a.json", LabelSpec)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b'{"a": 1,', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"1" * 5000, "is not JSON"),
        (b'{"a": "\xff"}', "cannot be read as text"),
    ],
    ids=["empty", "cut off", "too deep", "too long a number", "not UTF-8"],
)
def test_files_that_are_not_json(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        read_json(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in str(caught.value)


def test_missing_file_and_folder_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"a\.json: no such file"):
        read_json(tmp_path / "a.json")
    with pytest.raises(FormatError, match="cannot be read as text"):
        read_json(tmp_path)


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_dump_json_can_be_read_by_a_person() -> None:
    text = dump_json(
        {"ä": INNER, "empty": {}, "none": [], "cases": [{"id": "a", "shape": [1, 2, 3]}], "long": [[1.5] * 30] * 2}
    )
    assert text.splitlines() == [
        "{",
        '  "ä": {',
        '    "spacing_mm": [3.0, 0.7, 0.7000001],',
        '    "kernels": [[1, 3, 3], [3, 3, 3]]',
        "  },",
        '  "empty": {},',
        '  "none": [],',
        '  "cases": [',
        "    {",
        '      "id": "a",',
        '      "shape": [1, 2, 3]',
        "    }",
        "  ],",
        '  "long": [',
        f"    {[1.5] * 30},",
        f"    {[1.5] * 30}",
        "  ]",
        "}",
    ]
    assert json.loads(text)["long"][1] == [1.5] * 30


def test_digest_is_the_same_in_every_process_and_differs_with_the_value() -> None:
    assert digest(INNER) == digest(to_plain(INNER)) == digest(Inner(spacing_mm=INNER.spacing_mm, kernels=INNER.kernels))
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert len({digest(value) for value in (1, 1.5, "1", None, [1], [1, 2], [2, 1], {"a": 1}, INNER)}) == 9
    code = "from autoseg.core.serialize import digest; print(digest({'a': [1, 2.5, None], 'ä': 'x'}))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert answer.stdout.strip() == digest({"ä": "x", "a": (1, 2.5, None)})


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_atomic_path_shows_a_file_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.nii.gz"
    with atomic_path(path) as temporary:
        assert temporary.name.endswith("a.nii.gz"), "writers choose the format by the ending"
        assert temporary.parent == path.parent, "a rename across file systems is not atomic"
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert names_in(path.parent) == ["a.nii.gz"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_path_leaves_the_old_file_when_writing_fails(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]


def test_atomic_path_replaces_files_and_folders(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with atomic_path(tmp_path / "file") as temporary:
            temporary.write_text(content)
        with atomic_path(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert (tmp_path / "file").read_text() == "second"
    assert names_in(tmp_path / "folder") == ["second"], "nothing of the old folder may stay"
    assert names_in(tmp_path) == ["file", "folder"]


def test_atomic_path_leaves_the_old_folder_when_writing_fails(tmp_path: Path) -> None:
    (tmp_path / "case").mkdir()
    (tmp_path / "case" / "old").write_text("old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "case") as temporary:  # noqa: PT012
        temporary.mkdir()
        (temporary / "half").write_text("half")
        raise RuntimeError
    assert names_in(tmp_path / "case") == ["old"]
    assert names_in(tmp_path) == ["case"]


def test_atomic_path_never_shows_half_a_folder(tmp_path: Path) -> None:
    """While folders replace one another, whoever lists the one that is there sees all of its files."""
    folder, stop = tmp_path / "case", threading.Event()
    seen: set[int] = set()

    def look() -> None:
        while not stop.is_set():
            try:
                handle = os.open(folder, os.O_RDONLY)
            except FileNotFoundError:
                continue
            n_files = len(os.listdir(handle))
            # A folder that has left its place in the meantime may be emptied.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(folder), os.fstat(handle)):
                    seen.add(n_files)
            os.close(handle)

    watcher = threading.Thread(target=look)
    watcher.start()
    for _ in range(10):
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            for number in range(60):
                (temporary / str(number)).touch()
    stop.set()
    watcher.join()
    assert seen == {60}


def test_atomic_path_replaces_a_link_to_a_folder_and_not_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("mine")
    (tmp_path / "case").symlink_to(tmp_path / "elsewhere")
    with atomic_path(tmp_path / "case") as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("new")
    assert names_in(tmp_path / "case") == ["new"]
    assert names_in(tmp_path / "elsewhere") == ["mine"]
    assert names_in(tmp_path) == ["case", "elsewhere"]


def test_atomic_path_without_anything_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a"):
        pass
    assert names_in(tmp_path) == []

"""Preprocessed cases on disk: read in parts, whole or absent, rebuilt when what they are made of changes."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from autoseg.core.errors import WorkspaceError
from autoseg.core.geometry import Box, Geometry
from autoseg.preprocessing.preprocess import CaseRecord
from autoseg.preprocessing.store import (
    ARRAYS,
    RECORD,
    PreprocessedCase,
    find_damage,
    find_previous_damage,
    is_current,
    is_previous_current,
    load_into_memory,
    write_case,
    write_previous,
)

SHAPE = (12, 14, 16)
CASE_RECORD = CaseRecord(
    geometry=Geometry(
        shape=SHAPE,
        spacing_mm=(2.0, 1.0, 0.1),
        affine=((0.1, 0.0, 0.0, -3.3), (0.0, 1.0, 0.0, 1 / 3), (0.0, 0.0, 2.0, 0.0), (0.0, 0.0, 0.0, 1.0)),
        file_axcodes=("R", "A", "S"),
    ),
    crop=Box(start=(0, 0, 0), stop=SHAPE),
    axis_order=(0, 1, 2),
    shape=SHAPE,
    spacing_mm=(2.0, 1.0, 0.1),
    nearest_axis=None,
)


def write(folder: Path, *, key: str = "key", seed: int = 0, n_classes: int = 4) -> tuple[NDArray, NDArray]:
    """A case of two channels in which class 2 does not occur."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(2, *SHAPE)).astype(np.float32)
    label = rng.choice(np.array([0, 1, 3], np.uint8), SHAPE, p=[0.8, 0.15, 0.05])
    write_case(folder, image, label, key=key, record=CASE_RECORD, n_classes=n_classes)
    return image, label


def test_patch_read_from_disk_is_the_slice_of_the_array(tmp_path: Path) -> None:
    image, label = write(tmp_path / "case")
    case = PreprocessedCase(tmp_path / "case")
    place = (slice(3, 9), slice(0, 5), slice(7, 16))
    np.testing.assert_array_equal(case.image[(slice(None), *place)], image.astype(np.float16)[(slice(None), *place)])
    np.testing.assert_array_equal(case.label[place], label[place])
    assert case.image.dtype == np.float16
    assert case.label.dtype == label.dtype
    assert isinstance(case.image, np.memmap)
    assert case.id == "case"
    assert case.record == CASE_RECORD


def test_patch_of_an_array_in_fortran_order(tmp_path: Path) -> None:
    image = np.asfortranarray(np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32))
    label = np.asfortranarray(np.arange(60, dtype=np.uint8).reshape(3, 4, 5))
    write_case(tmp_path / "case", image, label, key="key", record=CASE_RECORD, n_classes=60)
    case = PreprocessedCase(tmp_path / "case")
    np.testing.assert_array_equal(case.image[1, 1:, 2], image.astype(np.float16)[1, 1:, 2])
    np.testing.assert_array_equal(case.label, label)
    assert case.foreground(59).tolist() == [[2, 3, 4]]


def test_float16_loses_little_and_does_not_overflow(tmp_path: Path) -> None:
    image = np.random.default_rng(0).normal(size=(1, *SHAPE)).astype(np.float32)
    image[0, 0, 0, :2] = 1e6, -1e6
    write_case(tmp_path / "case", image, np.zeros(SHAPE, np.uint8), key="key", record=CASE_RECORD, n_classes=2)
    stored = PreprocessedCase(tmp_path / "case").image.astype(np.float32)
    assert np.isfinite(stored).all()
    assert stored[0, 0, 0, 0] > 6e4
    assert stored[0, 0, 0, 1] < -6e4
    np.testing.assert_allclose(stored[0, 1:], image[0, 1:], rtol=5e-4, atol=1e-7)


def test_foreground_lists_every_voxel_of_each_class(tmp_path: Path) -> None:
    _, label = write(tmp_path / "case")
    case = PreprocessedCase(tmp_path / "case")
    assert case.classes == (1, 3)
    for value in (1, 2, 3):
        np.testing.assert_array_equal(np.unique(case.foreground(value), axis=0), np.argwhere(label == value))


def test_case_without_foreground(tmp_path: Path) -> None:
    label = np.zeros(SHAPE, np.uint8)
    write_case(tmp_path / "case", np.zeros((1, *SHAPE), np.float32), label, key="key", record=CASE_RECORD, n_classes=3)
    case = PreprocessedCase(tmp_path / "case")
    assert case.classes == ()
    assert case.foreground(1).shape == (0, 3)
    assert case.foreground(2).shape == (0, 3)


def test_failure_half_way_leaves_nothing(tmp_path: Path) -> None:
    image = np.zeros((1, *SHAPE), np.float32)
    broken = np.zeros(SHAPE, object)
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        write_case(tmp_path / "case", image, broken, key="key", record=CASE_RECORD, n_classes=2)
    assert list(tmp_path.iterdir()) == []
    assert not is_current(tmp_path / "case", "key")


def test_failure_half_way_leaves_the_case_that_was_there(tmp_path: Path) -> None:
    _, label = write(tmp_path / "case")
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        write_case(
            tmp_path / "case",
            np.zeros((1, *SHAPE), np.float32),
            np.zeros(SHAPE, object),
            key="other",
            record=CASE_RECORD,
            n_classes=2,
        )
    assert [file.name for file in tmp_path.iterdir()] == ["case"]
    assert is_current(tmp_path / "case", "key")
    np.testing.assert_array_equal(PreprocessedCase(tmp_path / "case").label, label)


def test_existing_case_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write(tmp_path / "case", key="old")
    (tmp_path / "case" / "leftover").write_text("x")
    _, label = write(tmp_path / "case", key="new", seed=1)
    assert is_current(tmp_path / "case", "new")
    assert not is_current(tmp_path / "case", "old")
    assert not (tmp_path / "case" / "leftover").exists()
    assert len(list(tmp_path.iterdir())) == 1
    np.testing.assert_array_equal(PreprocessedCase(tmp_path / "case").label, label)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"key": "key"}', '{"version": 0, "key": "key"}'])
def test_is_current_of_a_file_that_is_something_else(tmp_path: Path, content: str) -> None:
    write(tmp_path / "case")
    assert is_current(tmp_path / "case", "key")
    (tmp_path / "case" / "case.json").write_text(content)
    assert not is_current(tmp_path / "case", "key")
    assert not is_current(tmp_path / "missing", "key")


@pytest.mark.parametrize("name", ["case.json", "image.npy", "label.npy", "foreground.npy", "occupied.npy"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "garbage"])
def test_damaged_case_is_named(tmp_path: Path, name: str, damage: str) -> None:
    write(tmp_path / "case")
    file = tmp_path / "case" / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "garbage": b"\x00\xff" * 100}[damage])
    with pytest.raises(WorkspaceError, match=r"case: the preprocessed case cannot be read .* 'autoseg plan'"):
        PreprocessedCase(tmp_path / "case")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in /proc")
def test_open_cases_hold_no_files_open(tmp_path: Path) -> None:
    """A fold of a thousand cases would otherwise meet the limit of open files of a process."""
    write(tmp_path / "case")
    assert sys.platform == "linux"
    before = len(os.listdir("/proc/self/fd"))
    cases = [PreprocessedCase(tmp_path / "case") for _ in range(5)]
    total = sum(int(case.label[0, 0, 0]) + float(case.image[0, 0, 0, 0]) for case in cases)
    assert np.isfinite(total)
    assert len(os.listdir("/proc/self/fd")) == before


def in_memory(case: PreprocessedCase) -> bool:
    arrays = (case.image, case.label)
    mapped = [isinstance(array, np.memmap) for array in arrays]
    assert mapped[0] == mapped[1]
    return not mapped[0]


def write_sizes(folder: Path, n_slices: list[int]) -> list[PreprocessedCase]:
    """Cases of so many slices of 8 x 8 voxels, without foreground: 192 bytes a slice."""
    for index, n in enumerate(n_slices):
        image, label = np.full((1, n, 8, 8), index, np.float32), np.zeros((n, 8, 8), np.uint8)
        write_case(folder / str(index), image, label, key="key", record=CASE_RECORD, n_classes=2)
    return [PreprocessedCase(folder / str(index)) for index in range(len(n_slices))]


def test_memory_of_a_case_is_that_of_its_arrays(tmp_path: Path) -> None:
    image, label = write(tmp_path / "case")
    n_foreground = len(np.load(tmp_path / "case" / "foreground.npy"))
    expected = image.size * 2 + label.size + n_foreground * 3 * 4
    assert PreprocessedCase(tmp_path / "case").memory_gib == expected / 2**30


def test_loaded_case_is_the_same_and_needs_its_files_no_more(tmp_path: Path) -> None:
    image, label = write(tmp_path / "case")
    case = PreprocessedCase(tmp_path / "case")
    (loaded,) = load_into_memory([case], budget_gib=1)
    shutil.rmtree(tmp_path / "case")
    np.testing.assert_array_equal(loaded.image, image.astype(np.float16))
    np.testing.assert_array_equal(loaded.label, label)
    assert (loaded.image.dtype, loaded.label.dtype) == (np.float16, np.uint8)
    assert (loaded.id, loaded.stored, loaded.classes) == (case.id, case.stored, (1, 3))
    assert loaded.memory_gib == case.memory_gib
    for value in (1, 2, 3):
        np.testing.assert_array_equal(np.unique(loaded.foreground(value), axis=0), np.argwhere(label == value))
    # One copy for all threads, which none of them can change.
    assert loaded.image is loaded.image
    for array in (loaded.image, loaded.label, loaded.foreground(1)):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0


@pytest.mark.parametrize(
    ("n_slices_of_budget", "loaded"),
    [
        (0, [False, False, False, False]),
        (4, [False, False, False, True]),
        (5, [True, False, False, False]),
        (12, [True, False, True, False]),
        (29, [True, True, False, True]),
        (30, [True, True, False, True]),
        (36, [True, True, True, True]),
        (float("inf"), [True, True, True, True]),
    ],
)
def test_cases_are_loaded_in_order_as_far_as_they_fit(
    tmp_path: Path, n_slices_of_budget: float, loaded: list[bool]
) -> None:
    cases = write_sizes(tmp_path, [5, 20, 7, 4])
    result = load_into_memory(cases, budget_gib=n_slices_of_budget * 192 / 2**30)
    assert [in_memory(case) for case in result] == loaded
    assert not any(in_memory(case) for case in cases)
    assert [case.id for case in result] == ["0", "1", "2", "3"]
    assert [float(case.image[0, 0, 0, 0]) for case in result] == [0, 1, 2, 3]
    used = sum(case.memory_gib for case in result if in_memory(case))
    assert used <= n_slices_of_budget * 192 / 2**30


@pytest.mark.parametrize("name", ["image.npy", "label.npy", "foreground.npy"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "garbage"])
def test_case_that_is_damaged_after_it_was_opened_is_named(tmp_path: Path, name: str, damage: str) -> None:
    for case in ("first", "second"):
        write(tmp_path / case)
    cases = [PreprocessedCase(tmp_path / case) for case in ("first", "second")]
    file = tmp_path / "second" / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "garbage": b"\x00\xff" * 100}[damage])
    with pytest.raises(WorkspaceError, match=r"second: the preprocessed case cannot be read .* 'autoseg plan'"):
        load_into_memory(cases, budget_gib=1)
    assert in_memory(load_into_memory(cases[:1], budget_gib=1)[0])
    # What is not loaded is not read either.
    load_into_memory(cases, budget_gib=0)


def test_voxels_that_somebody_has_annotated_are_remembered(tmp_path: Path) -> None:
    """Background counts as annotated, what is ignored does not; where nothing is ignored there is nothing to know."""
    _, label = write(tmp_path / "all")
    assert PreprocessedCase(tmp_path / "all").annotated.shape == (0, 3)
    hidden = np.where(np.indices(SHAPE)[0] < 10, 4, label).astype(np.uint8)
    image = np.ones((1, *SHAPE), np.float32)
    write_case(tmp_path / "part", image, hidden, key="k", record=CASE_RECORD, n_classes=4)
    part = PreprocessedCase(tmp_path / "part")
    np.testing.assert_array_equal(part.annotated, np.argwhere(hidden != 4))
    assert part.classes == (1, 3)
    for class_index in (1, 2, 3):
        kept = np.unique(part.foreground(class_index), axis=0)
        np.testing.assert_array_equal(kept, np.argwhere(hidden == class_index))
    loaded = part.load()
    np.testing.assert_array_equal(loaded.annotated, part.annotated)


def test_a_case_that_is_made_anew_while_it_is_in_use_is_told_and_not_read_as_another(tmp_path: Path) -> None:
    image, label = write(tmp_path / "case")
    case, whole = PreprocessedCase(tmp_path / "case"), PreprocessedCase(tmp_path / "case").load()
    write(tmp_path / "case", key="later")
    np.testing.assert_array_equal(case.label, label, err_msg="another file of the same array")
    write(tmp_path / "case", seed=1)
    for read in (lambda: case.image, lambda: case.label, lambda: case.foreground(1), case.load):
        with pytest.raises(WorkspaceError, match=r"case: was made anew or deleted while it was in use.*-w"):
            read()
    np.testing.assert_array_equal(whole.label, label)
    assert PreprocessedCase(tmp_path / "case").image.shape == image.shape


def test_what_a_first_stage_has_found_belongs_to_the_case(tmp_path: Path) -> None:
    _, label = write(tmp_path / "case")
    found = np.roll(label, 1, axis=0)
    assert not is_previous_current(tmp_path / "second", "first")
    write_previous(tmp_path / "second", found, key="first")
    assert is_previous_current(tmp_path / "second", "first")
    assert not is_previous_current(tmp_path / "second", "other")
    alone = PreprocessedCase(tmp_path / "case")
    case = PreprocessedCase(tmp_path / "case", previous=tmp_path / "second")
    assert alone.previous is None
    assert case.previous is not None
    np.testing.assert_array_equal(case.previous, found)
    loaded = case.load().previous
    assert loaded is not None
    np.testing.assert_array_equal(loaded, found)
    assert case.memory_gib - alone.memory_gib == pytest.approx(found.nbytes / 2**30)
    assert case.content != alone.content
    write_previous(tmp_path / "second", label, key="later")
    assert PreprocessedCase(tmp_path / "case", previous=tmp_path / "second").content not in (
        case.content,
        alone.content,
    )
    np.testing.assert_array_equal(np.load(tmp_path / "second" / "previous.npy"), label)


def test_a_first_stage_that_has_not_looked_at_a_case_is_named(tmp_path: Path) -> None:
    write(tmp_path / "case")
    with pytest.raises(WorkspaceError, match=r"previous\.json: no such file"):
        PreprocessedCase(tmp_path / "case", previous=tmp_path / "nowhere")


Damage = Callable[[bytes], bytes | None]
DAMAGES: dict[str, Damage] = {
    "a bit": lambda content: content[:-7] + bytes([content[-7] ^ 4]) + content[-6:],
    "the first bit": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "cut": lambda content: content[:-3],
    "longer": lambda content: content + b"\0",
    "zeros": lambda content: content[:80] + bytes(len(content) - 80),
    "empty": lambda content: b"",
    "missing": lambda content: None,
}


def damage_file(file: Path, damage: Damage) -> None:
    content = damage(file.read_bytes())
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", [RECORD, *ARRAYS])
def test_whatever_happens_to_a_file_is_found(tmp_path: Path, name: str, damage: Damage) -> None:
    write(tmp_path / "case")
    assert find_damage(tmp_path / "case", "key") is None
    damage_file(tmp_path / "case" / name, damage)
    assert find_damage(tmp_path / "case", "key") == tmp_path / "case" / name
    assert find_damage(tmp_path / "case") == tmp_path / "case" / name
    write(tmp_path / "case")
    assert find_damage(tmp_path / "case", "key") is None


def test_a_change_that_keeps_size_and_time_of_a_file_is_found_by_another_process(tmp_path: Path) -> None:
    """In this one, the file is read again all the same: the system notes the time at which its own notes changed."""
    write(tmp_path / "case")
    assert find_damage(tmp_path / "case", "key") is None
    file = tmp_path / "case" / "image.npy"
    before = file.stat()
    damage_file(file, DAMAGES["a bit"])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert find_damage(tmp_path / "case", "key") == file


@pytest.mark.parametrize("position", range(0, 1200, 13))
def test_a_changed_byte_anywhere_in_the_record_never_passes_for_the_case(tmp_path: Path, position: int) -> None:
    write(tmp_path / "case")
    file = tmp_path / "case" / RECORD
    content = bytearray(file.read_bytes())
    before = PreprocessedCase(tmp_path / "case").stored
    content[position % len(content)] ^= 2
    file.write_bytes(content)
    if find_damage(tmp_path / "case", "key") is None and is_current(tmp_path / "case", "key"):
        # Blank space between the words of JSON.
        assert PreprocessedCase(tmp_path / "case").stored == before


def test_no_case_and_a_case_of_something_else_are_not_damaged(tmp_path: Path) -> None:
    assert find_damage(tmp_path / "nowhere", "key") is None
    write(tmp_path / "case", key="older")
    damage_file(tmp_path / "case" / "image.npy", DAMAGES["cut"])
    assert find_damage(tmp_path / "case", "key") is None, "it is made anew without being read"
    (tmp_path / "case" / RECORD).write_text('{"version": 1, "key": "key"}')
    assert find_damage(tmp_path / "case", "key") is None, "it is of another version"


def test_a_record_with_whole_numbers_for_others_is_whole(tmp_path: Path) -> None:
    record = dataclasses.replace(CASE_RECORD, spacing_mm=(2, 1, 1))
    image, label = np.zeros((1, *SHAPE), np.float32), np.zeros(SHAPE, np.uint8)
    write_case(tmp_path / "case", image, label, key="key", record=record, n_classes=2, known=(True, False))
    assert find_damage(tmp_path / "case", "key") is None


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["previous.json", "previous.npy"])
def test_damage_to_what_a_first_stage_has_found(tmp_path: Path, name: str, damage: Damage) -> None:
    write_previous(tmp_path / "case", np.ones(SHAPE, np.uint8), key="key")
    assert find_previous_damage(tmp_path / "case", "key") is None
    damage_file(tmp_path / "case" / name, damage)
    assert find_previous_damage(tmp_path / "case", "key") == tmp_path / "case" / name
    assert find_previous_damage(tmp_path / "nowhere", "key") is None
    (tmp_path / "case" / "previous.json").write_text('"key"')
    assert find_previous_damage(tmp_path / "case", "key") is None, "it is of an earlier version"
    assert not is_previous_current(tmp_path / "case", "key")

"""Locks between real processes, also where the file system knows none."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from autoseg.core import locks
from autoseg.core.locks import Holder, LockFile, SystemLock, is_free, locked

HOLD = """
import os, sys
from pathlib import Path
from autoseg.core import locks
lock = getattr(locks, sys.argv[1])(Path(sys.argv[2]))
assert lock.acquire(0)
print("held", flush=True)
sys.stdin.readline()
if sys.argv[3] == "releases":
    lock.release()
os._exit(1)
"""


@contextmanager
def holder(kind: str, file: Path, ends: str = "dies") -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a lock until it is written to or the block ends, and then dies or releases it."""
    command = [sys.executable, "-c", HOLD, kind, str(file), ends]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


def end(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=60)


def test_a_second_process_waits_and_says_for_what(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "PATIENCE_S", 0.1)
    file = tmp_path / "folder" / ".lock"
    file.parent.mkdir()
    caplog.set_level(logging.INFO)
    with holder("SystemLock", file) as process:
        assert not is_free(file)
        told = threading.Event()

        def end_then() -> None:
            told.set()
            end(process)

        timer = threading.Timer(1.0, end_then)
        timer.start()
        with locked(file, waiting_for="plans"):
            assert told.is_set(), "it was held before the other process was to end"
        timer.join()
    assert caplog.messages == ["waiting for another process, which plans"]
    assert is_free(file)


def test_a_lock_that_nobody_has_made_is_free_and_is_not_made(tmp_path: Path) -> None:
    assert is_free(tmp_path / "nowhere" / ".lock")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [SystemLock, LockFile])
def test_the_thread_that_holds_a_lock_may_enter_again_and_others_may_not(
    tmp_path: Path, kind: type[SystemLock | LockFile]
) -> None:
    file = tmp_path / ".lock"
    first, again = kind(file), kind(file)
    assert first.acquire(0)
    assert again.acquire(0)
    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(lambda: kind(file).acquire(0)).result()
        again.release()
        assert not pool.submit(lambda: kind(file).acquire(0)).result()
        first.release()
        assert pool.submit(lambda: kind(file).acquire(0)).result()


def test_a_lock_file_of_a_process_that_runs_holds_and_one_that_has_died_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / ".lock.soft"
    mine = LockFile(file)
    with holder("LockFile", file) as process:
        assert not mine.acquire(0.3)
        assert mine.advice().startswith(f"; if process {process.pid} on ")
        assert mine.advice().endswith(f"does not run any more, delete {file}")
        end(process)
    assert file.exists()
    assert mine.acquire(5)
    assert "was left by a process that has ended" in caplog.text
    mine.release()
    assert not file.exists()


def test_a_lock_file_goes_with_its_holder(tmp_path: Path) -> None:
    with holder("LockFile", tmp_path / ".lock.soft", "releases") as process:
        end(process)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell when a process began")
def test_whose_lock_files_count(tmp_path: Path) -> None:
    """A number that another process has now is not that of its holder; of other machines, nobody can tell."""
    file = tmp_path / ".lock.soft"
    mine = LockFile(file)
    assert mine.acquire(0)
    me = Holder(**json.loads(file.read_text()))
    mine.release()
    assert not me.has_ended
    for left, counts in [
        (replace(me, began="1"), False),
        (replace(me, machine="elsewhere", host="node7", pid=2**22 + 1), True),
    ]:
        file.write_text(json.dumps(asdict(left)))
        assert mine.acquire(0.25) != counts
        if counts:
            assert mine.advice() == f"; if process {left.pid} on node7 does not run any more, delete {file}"
        else:
            mine.release()
    file.write_text("")
    assert not mine.acquire(0)
    assert mine.advice() == f"; if that does not run any more, delete {file}"

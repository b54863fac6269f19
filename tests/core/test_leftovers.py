"""Temporary files of killed processes are removed, those of running ones are not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from autoseg.core.leftovers import ABANDONED_AFTER_S, remove_leftovers, temporary_path
from autoseg.core.serialize import atomic_path, write_json

LEAVE = """
import os, signal, sys
from pathlib import Path
from autoseg.core.serialize import atomic_path
folder = Path(sys.argv[1])
with atomic_path(folder / "whole.json") as file, atomic_path(folder / "case") as case:
    file.write_text("half")
    case.mkdir()
    (case / "image.npy").write_text("half")
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_has_left_goes_with_the_next_write(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", LEAVE, tmp_path, "killed"], check=False)
    assert len(list(tmp_path.iterdir())) == 2
    write_json(tmp_path / "other.json", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


def test_what_a_running_process_writes_stays(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEAVE, str(tmp_path), "running"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        remove_leftovers(tmp_path)
        assert len(list(tmp_path.iterdir())) == 2
        process.communicate("")
    assert {path.name for path in tmp_path.iterdir()} == {"whole.json", "case"}


def test_another_machine_is_given_a_week(tmp_path: Path) -> None:
    name = temporary_path(tmp_path / "case.json").name
    elsewhere = f".{'0' * 8}{name[9:]}"
    for folder, age_s in ((tmp_path / "new", 3600), (tmp_path / "old", ABANDONED_AFTER_S + 3600)):
        folder.mkdir()
        (folder / elsewhere).touch()
        # The clock of whoever looks may be wrong by years: both times are those of the disk.
        os.utime(folder / elsewhere, (1e9, 1e9))
        os.utime(folder, (1e9 + age_s, 1e9 + age_s))
        remove_leftovers(folder)
    assert (tmp_path / "new" / elsewhere).exists()
    assert not (tmp_path / "old" / elsewhere).exists()


def test_only_names_of_ours_are_removed(tmp_path: Path) -> None:
    names = {".hidden", ".0123456789ab-notes.txt", "0123456789abcdef012345-x", ".gitignore"}
    for name in names:
        (tmp_path / name).touch()
    with atomic_path(tmp_path / "a.json") as file:
        file.touch()
    assert {path.name for path in tmp_path.iterdir()} == names | {"a.json"}

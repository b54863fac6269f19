"""Names of temporary files that say whose they are, and removing those that a killed process has left."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from contextlib import suppress
from functools import cache
from pathlib import Path

from autoseg.core.machine import is_running, machine_name

ABANDONED_AFTER_S = 7 * 24 * 3600.0
"""Nobody writes one file for a week: what is older is of a process that has ended, on whatever machine that was.

By the time of the last change in its folder, which the same clock has set: that of the machine here may be wrong."""

_NAME = re.compile(r"\.([0-9a-f]{8})([0-9a-f]{8})([0-9a-f]{6})-.+")
_looked_at: set[tuple[int, Path]] = set()


def temporary_path(path: Path) -> Path:
    """A new name beside `path`, of this process, with the same ending."""
    return path.with_name(f".{_machine()}{os.getpid():08x}{uuid.uuid4().hex[:6]}-{path.name}")


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files and folders of processes that have ended; a process looks into each folder once.

    What a process on another machine has left is only removed after a week, since nothing here tells whether it runs.
    """
    # With the process: one that was forked has not looked yet.
    key = os.getpid(), folder
    if key in _looked_at:
        return
    _looked_at.add(key)
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.stat(follow_symlinks=False).st_mtime) for entry in entries if _is_ours(entry)]
        changed_s = folder.stat().st_mtime
    except OSError:
        return  # There is no such folder yet, or it changes meanwhile.
    for name, modified_s in found:
        if _is_abandoned(name, changed_s - modified_s):
            left = folder / name
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                # What stays takes some room, and does nothing else.
                with suppress(OSError):
                    left.unlink(missing_ok=True)


def _is_ours(entry: os.DirEntry[str]) -> bool:
    return _NAME.fullmatch(entry.name) is not None


def _is_abandoned(name: str, age_s: float) -> bool:
    match = _NAME.fullmatch(name)
    assert match is not None
    if match[1] == _machine():
        return not is_running(int(match[2], 16))
    return age_s > ABANDONED_AFTER_S


@cache
def _machine() -> str:
    return hashlib.sha256(machine_name().encode()).hexdigest()[:8]

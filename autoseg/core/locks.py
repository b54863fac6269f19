"""Locks between processes, on whatever file system the work folder is."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

PATIENCE_S = 1.0


@contextmanager
def locked(file: Path, *, waiting_for: str) -> Iterator[None]:
    """While the block runs, no other process is in a block with this lock; the same process may enter again.

    Args:
        file: the lock; its folder is made where it is missing.
        waiting_for: said where it takes a while: "waiting for another process, which ...".
    """
    from filelock import FileLock, SoftFileLock, Timeout

    file.parent.mkdir(parents=True, exist_ok=True)
    lock: FileLock | SoftFileLock = FileLock(file, is_singleton=True)
    try:
        try:
            lock.acquire(timeout=PATIENCE_S)
        except NotImplementedError:
            # Some file systems of clusters know no locks; there, the file itself is one.
            lock = SoftFileLock(file.with_name(f"{file.name}.soft"), is_singleton=True)
            lock.acquire(timeout=PATIENCE_S)
    except Timeout:
        logger.info("waiting for another process, which %s", waiting_for)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()

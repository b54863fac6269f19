"""Locks between processes, on whatever file system the work folder is.

Where the system knows locks, it gives one back when its holder ends, however that ends. Some file systems of clusters
know none: there, a file that says who holds it is the lock. One that a process of this machine has left behind does not
count. Of a process on another machine nobody here can tell whether it runs: a person has to delete its file.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from autoseg.core.machine import is_running, machine_name

logger = logging.getLogger(__name__)

PATIENCE_S = 1.0
POLL_INTERVAL_S = 0.1
_NO_LOCKS_HERE = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})


@contextmanager
def locked(file: Path, *, waiting_for: str) -> Iterator[None]:
    """While the block runs, no other process is in a block with this lock; the same process may enter again.

    Args:
        file: the lock; its folder is made where it is missing.
        waiting_for: said where it takes a while: "waiting for another process, which ...".
    """
    lock = _open_lock(file)
    if not lock.acquire(PATIENCE_S):
        logger.info("waiting for another process, which %s%s", waiting_for, lock.advice())
        lock.acquire(None)
    try:
        yield
    finally:
        lock.release()


def is_free(file: Path) -> bool:
    """Whether nobody else holds a lock at this moment."""
    if not file.parent.is_dir():
        return True
    lock = _open_lock(file)
    if not lock.acquire(0):
        return False
    lock.release()
    return True


def _open_lock(file: Path) -> SystemLock | LockFile:
    file.parent.mkdir(parents=True, exist_ok=True)
    return SystemLock(file) if _knows_locks(file) else LockFile(file.with_name(f"{file.name}.soft"))


def _knows_locks(file: Path) -> bool:
    """Whether the file system knows locks."""
    try:
        import fcntl
    except ImportError:  # Windows has locks of its own.
        return True
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        return True  # The lock itself says so, too.
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            return False
        raise
    finally:
        os.close(descriptor)
    return True


class SystemLock:
    """A lock that the system knows."""

    def __init__(self, file: Path) -> None:
        from filelock import FileLock

        self._lock = FileLock(file, is_singleton=True)

    def acquire(self, timeout_s: float | None) -> bool:
        """Waits at most so long, or for ever; says whether it is held."""
        from filelock import Timeout

        try:
            self._lock.acquire(timeout=-1 if timeout_s is None else timeout_s)
        except Timeout:
            return False
        return True

    def release(self) -> None:
        """Once for each time it was acquired."""
        self._lock.release()

    def advice(self) -> str:
        """What to do where it is held for ever: nothing, it never is."""
        return ""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a lock, as its file says.

    Attributes:
        host: name of the machine.
        machine: tells machines apart, and containers on them: numbers of processes are unique in it.
        pid: number of the process.
        began: when it began, as the system counts; empty where that is not known. Numbers of processes come again.
    """

    host: str
    machine: str
    pid: int
    began: str

    @property
    def has_ended(self) -> bool:
        """Whether it is known that it does not run any more."""
        return self.machine == machine_name() and (not is_running(self.pid) or _began(self.pid) != self.began)


class LockFile:
    """A file that is there while a process holds the lock."""

    # The lock may be entered again by the thread that holds it: how often it has been, by file and thread.
    _entered: dict[tuple[str, int], int] = {}  # noqa: RUF012

    def __init__(self, file: Path) -> None:
        self._file = file.absolute()

    def acquire(self, timeout_s: float | None) -> bool:
        """Waits at most so long, or for ever; says whether it is held."""
        key = str(self._file), threading.get_ident()
        started = time.monotonic()
        while key not in self._entered and not self._try():
            if timeout_s is not None and time.monotonic() - started >= timeout_s:
                return False
            time.sleep(POLL_INTERVAL_S)
        self._entered[key] = self._entered.get(key, 0) + 1
        return True

    def release(self) -> None:
        """Once for each time it was acquired."""
        key = str(self._file), threading.get_ident()
        self._entered[key] -= 1
        if not self._entered[key]:
            del self._entered[key]
            self._file.unlink(missing_ok=True)

    def advice(self) -> str:
        """What to do where it is held for ever."""
        holder = self._read_holder()
        who = "that" if holder is None else f"process {holder.pid} on {holder.host}"
        return f"; if {who} does not run any more, delete {self._file}"

    def _try(self) -> bool:
        try:
            descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            self._remove_where_abandoned()
            return False
        try:
            with os.fdopen(descriptor, "w") as file:
                me = Holder(host=platform.node(), machine=machine_name(), pid=os.getpid(), began=_began(os.getpid()))
                json.dump(asdict(me), file)
        except BaseException:
            # Nobody could tell whose it is.
            self._file.unlink(missing_ok=True)
            raise
        return True

    def _remove_where_abandoned(self) -> None:
        holder = self._read_holder()
        if holder is None or not holder.has_ended:
            return
        # Only processes of the same machine can tell, and they do it one after the other, in a folder of that machine:
        # none of them deletes what another one has made since.
        user = getattr(os, "getuid", lambda: 0)()
        name = f"autoseg-{user}-{sha256(str(self._file).encode()).hexdigest()[:16]}.lock"
        guard = SystemLock(Path(tempfile.gettempdir()) / name)
        if guard.acquire(PATIENCE_S):
            try:
                if self._read_holder() == holder:
                    self._file.unlink(missing_ok=True)
                    logger.warning("%s: was left by a process that has ended, and is removed", self._file)
            finally:
                guard.release()

    def _read_holder(self) -> Holder | None:
        """Who holds it; None where the file has gone, or its holder has not come to write into it."""
        try:
            content = json.loads(self._file.read_text())
            return Holder(**content)
        except (OSError, ValueError, TypeError):
            return None


def _began(pid: int) -> str:
    """When a process began, in ticks since the machine did; empty where the system does not tell."""
    try:
        # The name of the program, which may hold anything, ends with the last bracket.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError, UnicodeDecodeError):
        return ""

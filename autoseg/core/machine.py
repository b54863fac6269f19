"""Which machine this is, and which processes run on it."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from functools import cache
from pathlib import Path


@cache
def machine_name() -> str:
    """Tells machines apart, and containers on them: numbers of processes mean something within one of them only."""
    known = [platform.node()]
    with suppress(OSError):
        known.append(Path("/etc/machine-id").read_text().strip())
    with suppress(OSError):
        known.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(known)


def processor_name() -> str:
    """The model of the processor where the system tells it, or else its architecture."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def is_running(pid: int, *, word: str = "") -> bool:
    """Whether a process of that number runs on this machine; true where nobody can tell.

    Args:
        pid: its number, which the system gives to another process some time after it has ended.
        word: in its command, so that it is not another one.
    """
    if os.name != "posix":
        return True  # Signal 0 ends a process on Windows.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # It is somebody else's.
    try:
        return word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True

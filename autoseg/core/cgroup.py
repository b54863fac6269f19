"""What control groups grant this process: by them Linux limits containers and the jobs of clusters.

A process is a member of a group, and what any of the groups above that one is granted limits it too. Within a container
the folders of the groups above are often not there; the container's own is then the root.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

MEMBERSHIP = Path("/proc/self/cgroup")
ROOT = Path("/sys/fs/cgroup")


def cpu_quota(*, membership: Path = MEMBERSHIP, root: Path = ROOT) -> float:
    """Processors this process may keep busy on average, 1.5 for one and a half; infinite where nothing limits them."""
    quotas = [math.inf]
    for folder in _find_groups("cpu", membership, root):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal():  # else it says "max", or -1
            quotas.append(int(quota) / int(period))
    return min(quotas)


def memory_limit_gib(*, membership: Path = MEMBERSHIP, root: Path = ROOT) -> float:
    """Memory that this process, with all others of its groups, may use; infinite where nothing limits it.

    It may be more than the machine has: version 1 says "no limit" with a number of eight billion GiB.
    """
    limits = [math.inf]
    for folder in _find_groups("memory", membership, root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _read(folder / name)
            if limit.isdecimal():  # else it says "max", or is not there
                limits.append(int(limit) / 2**30)
    return min(limits)


def _find_groups(controller: str, membership: Path, root: Path) -> Iterator[Path]:
    """Folders of the groups in which this process is and which may limit it, from its own up to the root.

    Each line of `membership` is "0::/path" of version 2, or "4:cpu,cpuacct:/path" of version 1. Not all of the folders
    need to be there.
    """
    for line in _read(membership).splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if not controllers:
            mounts = [root, root / "unified"]  # the latter where both versions are in use
        elif controller in controllers.split(","):
            mounts = [root / controllers, root / controller]
        else:
            continue
        parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
        for mount in mounts:
            for depth in range(len(parts), -1, -1):
                yield mount.joinpath(*parts[:depth])


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""

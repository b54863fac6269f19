"""What control groups grant: files as kernels, Docker, Kubernetes and Slurm lay them out, and a real group."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from autoseg.core.cgroup import ROOT, cpu_quota, memory_limit_gib

GIB = 2**30
UNLIMITED_V1 = "9223372036854771712"


def lay_out(folder: Path, membership: str, files: dict[str, str]) -> tuple[float, float]:
    """The quota and the limit that are read from such files below the root, for a process in those groups."""
    (folder / "cgroup").write_text(membership)
    for name, text in files.items():
        file = folder / "root" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    places = {"membership": folder / "cgroup", "root": folder / "root"}
    return cpu_quota(**places), memory_limit_gib(**places)


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        pytest.param("", {}, (math.inf, math.inf), id="no control groups"),
        pytest.param(
            "0::/\n",
            {"cgroup.controllers": "cpuset cpu io memory pids"},
            (math.inf, math.inf),
            id="version 2, the root",
        ),
        pytest.param(
            "0::/\n", {"cpu.max": "150000 100000", "memory.max": f"{4 * GIB}"}, (1.5, 4), id="version 2, in a container"
        ),
        pytest.param(
            "0::/user.slice/session-1.scope\n",
            {"user.slice/cpu.max": "max 100000", "user.slice/session-1.scope/memory.max": "max"},
            (math.inf, math.inf),
            id="version 2, without limits",
        ),
        pytest.param(
            "0::/system.slice/slurmstepd.scope/job_7/step_batch/user/task_0\n",
            {
                "system.slice/cpu.max": "max 100000",
                "system.slice/memory.max": f"{64 * GIB}",
                "system.slice/slurmstepd.scope/job_7/memory.max": f"{8 * GIB}",
                "system.slice/slurmstepd.scope/job_7/cpu.max": "400000 100000",
                "system.slice/slurmstepd.scope/job_7/step_batch/user/memory.max": f"{16 * GIB}",
                "system.slice/slurmstepd.scope/job_7/step_batch/user/task_0/memory.max": "max",
                "system.slice/slurmstepd.scope/job_8/memory.max": f"{1 * GIB}",
            },
            (4, 8),
            id="version 2, a group above is stricter, a neighbour does not count",
        ),
        pytest.param(
            "0::/../../kubepods/pod1\n", {"cpu.max": "50000 100000", "memory.max": "max"}, (0.5, math.inf), id="beyond"
        ),
        pytest.param(
            "12:memory:/docker/1f\n4:cpu,cpuacct:/docker/1f\n1:name=systemd:/docker/1f\n",
            {
                "cpu,cpuacct/cpu.cfs_quota_us": "250000",
                "cpu,cpuacct/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": f"{2 * GIB}",
            },
            (2.5, 2),
            id="version 1, a container sees its own group as the root",
        ),
        pytest.param(
            "9:memory:/slurm/uid_0/job_7/step_0\n8:cpuset:/slurm/uid_0/job_7\n3:cpuacct,cpu:/a/b\n0::/\n",
            {
                "cpu/a/b/cpu.cfs_quota_us": "-1",
                "cpu/a/b/cpu.cfs_period_us": "100000",
                "cpu/a/cpu.cfs_quota_us": "300000",
                "cpu/a/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": UNLIMITED_V1,
                "memory/slurm/uid_0/memory.limit_in_bytes": UNLIMITED_V1,
                "memory/slurm/uid_0/job_7/memory.limit_in_bytes": f"{3 * GIB}",
                "memory/slurm/uid_0/job_7/step_0/memory.limit_in_bytes": f"{5 * GIB}",
                "unified/cgroup.controllers": "",
            },
            (3, 3),
            id="both versions, a job of Slurm",
        ),
    ],
)
def test_the_strictest_group_counts(
    tmp_path: Path, membership: str, files: dict[str, str], expected: tuple[float, float]
) -> None:
    assert lay_out(tmp_path, membership, files) == expected


def test_no_limit_of_version_1_is_more_than_any_machine_has(tmp_path: Path) -> None:
    quota, limit_gib = lay_out(
        tmp_path,
        "2:memory:/\n1:cpu:/\n",
        {"memory/memory.limit_in_bytes": UNLIMITED_V1, "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
    )
    assert quota == math.inf
    assert limit_gib > 2**30


def test_files_that_are_not_there(tmp_path: Path) -> None:
    nowhere = {"membership": tmp_path / "cgroup", "root": tmp_path / "root"}
    assert (cpu_quota(**nowhere), memory_limit_gib(**nowhere)) == (math.inf, math.inf)


@contextmanager
def real_group(limits: dict[str, dict[str, str]]) -> Iterator[list[Path]]:
    """Groups of the kernel with these limits: those of version 2 where it has them, else of version 1."""
    name = f"autoseg-test-{os.getpid()}"
    if (ROOT / "cgroup.controllers").exists():
        wanted = {ROOT / name: limits["2"]}
    else:
        wanted = {ROOT / "cpu" / name: {}, ROOT / "memory" / name: {}}
        for file, text in limits["1"].items():
            wanted[ROOT / file.split(".")[0] / name][file] = text
    made: list[Path] = []
    try:
        try:
            if ROOT / name in wanted:
                (ROOT / "cgroup.subtree_control").write_text("+cpu +memory")
            for folder, files in wanted.items():
                folder.mkdir()
                made.append(folder)
                for file, text in files.items():
                    (folder / file).write_text(text)
        except OSError as error:
            pytest.skip(f"cannot make a control group: {error}")
        yield made
    finally:
        for folder in made:
            folder.rmdir()


ASK = """
import os, sys
for folder in sys.argv[1:]:
    open(folder + "/cgroup.procs", "w").write(str(os.getpid()))
import torch
from autoseg.core.runtime import computing, machine_memory_gib, n_cpus
with computing(torch.device("cpu"), deterministic=False):
    print(n_cpus(), machine_memory_gib(), torch.get_num_threads())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_a_process_in_a_real_group() -> None:
    """Torch by itself knows of no quota and starts as many threads as the machine has processors."""
    limits = {
        "2": {"cpu.max": "90000 100000", "memory.max": f"{3 * GIB}"},
        "1": {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "90000", "memory.limit_in_bytes": f"{3 * GIB}"},
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMP_"))}
    with real_group(limits) as folders:
        command = [sys.executable, "-c", ASK, *map(str, folders)]
        run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert run.stdout.split() == ["1", "3.0", "1"]

"""The Slurm for tests: that it ends, and all its jobs, with whoever asked for it."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "slurm-test-node"
LONGEST_S = 30

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        shutil.which("slurmctld") is None or os.geteuid() != 0,
        reason="no Slurm here: scripts/slurm-test-node install puts one on Debian, and root starts it",
    ),
]


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a short path, for Slurm's sockets."""
    return tmp_path_factory.mktemp("node")


def is_locked(file: Path) -> bool:
    with file.open() as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def wait_until_locked(file: Path, expected: bool) -> None:
    deadline = time.monotonic() + LONGEST_S
    while is_locked(file) != expected:
        assert time.monotonic() < deadline, f"{file} is {'not ' if expected else ''}locked after {LONGEST_S} s"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, None], ids=["SIGKILL", "SIGTERM", "end of input"])
def test_a_job_does_not_outlive_who_started_its_slurm(folder: Path, number: signal.Signals | None) -> None:
    lock = folder / "lock"
    lock.touch()
    pipe = subprocess.PIPE
    with subprocess.Popen([SCRIPT, "run", folder], stdin=pipe, stdout=pipe, text=True) as node:
        assert node.stdout is not None
        configuration = node.stdout.readline().strip().removeprefix("export SLURM_CONF=")
        job = f"trap '' TERM; flock --exclusive {lock} sleep 600"
        subprocess.run(
            ["sbatch", "--output=/dev/null", f"--wrap={job}"],
            check=True,
            capture_output=True,
            env=os.environ | {"SLURM_CONF": configuration},
        )
        wait_until_locked(lock, True)
        if number:
            node.send_signal(number)
    wait_until_locked(lock, False)


def test_the_exit_code_is_that_of_the_command(folder: Path) -> None:
    ask = ["bash", "-c", "sinfo --noheader --Node --partition=debug --format='%N %T' && exit 7"]
    run = subprocess.run([SCRIPT, "run", folder, "--", *ask], stdout=subprocess.PIPE, text=True)
    assert run.returncode == 7
    assert run.stdout.splitlines() == ["node1 idle", "node2 idle"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "in which folder"),
        (("a", "b"), "one folder, and the command after --"),
        (("a", "--max-minutes", "0"), "no whole number of minutes"),
        (("a b",), "the path must be of letters"),
        (("a" * 80,), "75 characters at most"),
    ],
)
def test_what_it_refuses(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    run = subprocess.run([SCRIPT, "run", *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1
    assert message in run.stderr
    assert not list(tmp_path.iterdir())

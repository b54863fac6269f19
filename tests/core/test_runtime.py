"""Threads, seeds, devices, durations."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from autoseg.core import runtime
from autoseg.core.errors import AutosegError
from autoseg.core.runtime import (
    MemoryShares,
    autocast_dtype,
    derive_seed,
    format_duration,
    machine_memory_gib,
    map_threads,
    n_cpus,
    resolve_device,
    track,
)


def test_derive_seed_is_the_same_everywhere_and_different_for_different_parts() -> None:
    assert derive_seed("patches", 0, 17) == 7643069237669247388
    seeds = [derive_seed(purpose, seed, number) for purpose in "ab" for seed in range(30) for number in range(30)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)


@pytest.mark.parametrize(("needed", "n_at_once"), [(0.6, 1), (0.4, 2), (0.0, 4), (5.0, 1)])
def test_map_threads_works_on_what_fits_the_memory(
    monkeypatch: pytest.MonkeyPatch, needed: float, n_at_once: int
) -> None:
    """Parts of what may be used; what takes more than there is runs alone."""
    monkeypatch.setattr(runtime, "machine_memory_gib", lambda: 10 / runtime.MAX_MEMORY_FRACTION)
    changed, running, most = threading.Condition(), 0, 0

    def work(item: int) -> int:
        nonlocal running, most
        with changed:
            running += 1
            most = max(most, running)
            changed.notify_all()
            assert changed.wait_for(lambda: most >= n_at_once, timeout=10)
            # Time for one too many to come.
            changed.wait_for(lambda: most > n_at_once, timeout=0.1)
            running -= 1
        if item == 7:
            raise ValueError("seven")
        return item

    def gib(item: int) -> float:
        return 10 * needed

    found = map_threads(work, range(7), n_threads=4, description="fitting", needed_gib=gib)
    assert found == list(range(7))
    assert most == n_at_once
    # What one that failed has held is given back: nobody waits for it.
    with pytest.raises(ValueError, match="seven"):
        map_threads(work, range(20), n_threads=4, description="failing", needed_gib=gib)


def test_one_alone_does_not_wait_for_memory_whatever_others_have_held_before() -> None:
    memory = MemoryShares(1.0)
    first, second = memory.hold(0.1), memory.hold(0.2)
    for part in (first, second):
        part.__enter__()
    for part in (first, second):
        part.__exit__(None, None, None)
    entered = threading.Event()

    def enter() -> None:
        with memory.hold(5.0):
            entered.set()

    threading.Thread(target=enter, daemon=True).start()
    assert entered.wait(10)


def test_map_threads_keeps_the_order_and_uses_the_threads() -> None:
    threads = set()
    both = threading.Barrier(2, timeout=10)

    def work(item: int) -> int:
        threads.add(threading.get_ident())
        if item < 2:
            both.wait()  # passes only if two items run side by side
        time.sleep(0.002 * (20 - item))
        return item * item

    assert map_threads(work, iter(range(20)), n_threads=2, description="squares") == [i * i for i in range(20)]
    assert len(threads) == 2
    assert map_threads(work, [], n_threads=2, description="nothing") == []
    assert map_threads(lambda item: item, [5], n_threads=0, description="at least one thread") == [5]


def test_an_error_surfaces_as_it_is_and_stops_the_rest() -> None:
    error, ran = AutosegError("case 1 is broken"), []

    def work(item: int) -> int:
        if item == 0:
            time.sleep(0.6)  # an earlier item that is still running must not keep the queue alive
        elif item == 1:
            raise error
        else:
            ran.append(item)
            time.sleep(0.01)
        return item

    with pytest.raises(AutosegError) as caught:
        map_threads(work, range(300), n_threads=2, description="failing")
    assert caught.value is error
    assert len(ran) < 30
    n_ran = len(ran)
    time.sleep(0.05)
    assert len(ran) == n_ran, "no thread may go on after the error has surfaced"


def test_progress_without_a_terminal_is_a_log_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "PLAIN_PROGRESS_INTERVAL_S", 0.0)
    with caplog.at_level(logging.INFO), track("reading", total=3) as advance:
        advance(1)
        advance(2, "case 7")
    assert [record.getMessage() for record in caplog.records] == ["reading: 33%", "reading: 100%, case 7"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (0.84, "0.8 s"),
        (42.4, "42 s"),
        (59.6, "1 min 0 s"),
        (185, "3 min 5 s"),
        (3599.7, "1 h 0 min"),
        (7800, "2 h 10 min"),
        (100 * 3600, "100 h 0 min"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


SLURM_GRANTS = ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU")


@pytest.fixture
def no_job(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As outside of a Slurm job."""
    for name in SLURM_GRANTS:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_n_cpus_is_the_least_that_was_granted(no_job: pytest.MonkeyPatch) -> None:
    here = n_cpus()
    assert 1 <= here <= len(os.sched_getaffinity(0))
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        no_job.setenv(name, "1")
        assert n_cpus() == 1
        for more_or_nonsense in ("10000", "", "0", "x", "²"):
            no_job.setenv(name, more_or_nonsense)
            assert n_cpus() == here


def test_machine_memory_is_the_least_that_was_granted(no_job: pytest.MonkeyPatch) -> None:
    here = machine_memory_gib()
    assert 0 < here <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    no_job.setenv("SLURM_MEM_PER_NODE", "512")
    assert machine_memory_gib() == 0.5
    no_job.setenv("SLURM_MEM_PER_NODE", "0")  # all of the node's
    assert machine_memory_gib() == here
    no_job.setenv("SLURM_MEM_PER_CPU", "128")
    assert machine_memory_gib() == here, "of an unknown number of processors"
    no_job.setenv("SLURM_CPUS_ON_NODE", "2")
    assert machine_memory_gib() == 0.25


def run_python(code: str, **environment: str) -> list[str]:
    """The words that a process of its own writes, in which the number of processors may be changed."""
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | environment
    ).stdout.split()


LIMIT_CPUS = """
import os
from autoseg.core.runtime import limit_cpus, n_cpus, use_granted_cpus
here = n_cpus()
limit_cpus(10000)
print(n_cpus() == here)
limit_cpus(0)
print(n_cpus())
import torch
torch.set_num_threads(3)
use_granted_cpus()
print(torch.get_num_threads())
limit_cpus(10000)
torch.set_num_threads(3)
limit_cpus(1)
print(n_cpus(), torch.get_num_threads())
"""


def test_a_worker_limits_its_processors_and_torch_with_it() -> None:
    assert run_python(LIMIT_CPUS) == ["True", "1", "1", "1", "1"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_n_cpus_knows_the_affinity() -> None:
    code = "import os; from autoseg.core.runtime import n_cpus; os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})"
    assert run_python(f"{code}; print(n_cpus())") == ["1"]


@pytest.mark.slurm
def test_a_job_knows_what_slurm_granted(slurm: dict[str, str], tmp_path: Path) -> None:
    """The nodes of the test promise more processors than there are, and limit nothing: the job has to know."""
    asks = tmp_path / "job.sh"
    code = "from autoseg.core.runtime import machine_memory_gib, n_cpus; print(n_cpus(), machine_memory_gib())"
    asks.write_text(f"#!/bin/sh\n{sys.executable} -c '{code}'\n")
    for options in (["--cpus-per-task=1", "--mem=1500M"], ["--ntasks=1", "--mem-per-cpu=1500M"]):
        answer = tmp_path / "answer"
        subprocess.run(
            ["sbatch", "--wait", *options, f"--output={answer}", asks], check=True, capture_output=True, env=slurm
        )
        assert answer.read_text().split() == ["1", str(1500 / 1024)]


def test_resolve_device() -> None:
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "device 'gpu' is unknown; use auto, cpu"),
        ("", "device '' is unknown"),
        ("cuda:x", "device 'cuda:x' is unknown"),
        ("meta", "device 'meta' is not supported"),
        ("cuda:99", "device 'cuda:99' is not there: this machine has .* use --device auto or cpu"),
    ],
)
def test_devices_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(AutosegError, match=message):
        resolve_device(name)


def test_a_machine_without_the_accelerator_says_so() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        with pytest.raises(AutosegError, match="no CUDA device"):
            resolve_device("cuda")
    if not torch.backends.mps.is_available():
        with pytest.raises(AutosegError, match="no Apple GPU"):
            resolve_device("mps")


def test_autocast_never_chooses_half_precision_on_a_cpu() -> None:
    torch = pytest.importorskip("torch")
    assert autocast_dtype(torch.device("cpu")) in (None, torch.bfloat16)


COUNT_FAULTS = """
import ctypes, resource
from autoseg.core.runtime import keeping_freed_memory

library, size = ctypes.CDLL(None), 64 * 2**20
library.malloc.restype = ctypes.c_void_p
library.malloc.argtypes = [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]

def count_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        block = library.malloc(size)
        ctypes.memset(block, 1, size)
        library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usually = count_faults()
with keeping_freed_memory():
    count_faults()
    kept = count_faults()
print(usually, kept, count_faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc's memory")
def test_memory_that_was_freed_is_used_again_without_asking_the_kernel() -> None:
    """Each page that the kernel gives is a fault. In a process of its own: where memory ran out once, glibc puts large
    blocks elsewhere."""
    output = subprocess.run([sys.executable, "-c", COUNT_FAULTS], check=True, capture_output=True, text=True).stdout
    usually, kept, afterwards = map(int, output.split())
    if usually < 100:
        pytest.skip("this C library keeps large blocks anyway")
    assert kept < usually / 10
    assert afterwards > usually / 2, "and then all is as before"

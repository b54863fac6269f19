"""The running process: progress, threads, seeds, devices, memory, and how times and sizes are written."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from autoseg.core.cgroup import cpu_quota, memory_limit_gib
from autoseg.core.errors import AutosegError
from autoseg.core.text import spell_out

if TYPE_CHECKING:
    import torch

S = TypeVar("S")
T = TypeVar("T")

logger = logging.getLogger(__name__)

PLAIN_PROGRESS_INTERVAL_S = 10.0
N_TIMED_CONVOLUTIONS = 5
MAX_MEMORY_FRACTION = 0.7
"""Of what the machine has, for what threads are told to take; the rest is for what they are not told of."""

# Of glibc's malloc.h and mallopt(3): the number of an option, its value while freed memory is kept, and its value
# afterwards, which is the default or what it becomes in a process that has freed something large.
_M_MMAP_MAX = (-4, 0, 65536)
_M_MMAP_THRESHOLD = (-3, 32 * 2**20, 32 * 2**20)
_M_TRIM_THRESHOLD = (-1, 2**31 - 1, 64 * 2**20)
_M_TOP_PAD = (-2, 128 * 2**20, 128 * 2**10)

_most_cpus: float = math.inf  # of limit_cpus


def never() -> bool:
    """Where nobody asks to stop."""
    return False


def n_cpus() -> int:
    """Processors this process may use: what it was granted, not what the machine has. A fraction of one counts as one.

    The least counts of what the kernel lets it run on, the quotas of its control groups, its Slurm job, and
    `limit_cpus`.
    """
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    slurm = min(_granted_by_slurm("SLURM_CPUS_PER_TASK"), _granted_by_slurm("SLURM_CPUS_ON_NODE"))
    return max(1, math.ceil(min(here, cpu_quota(), slurm, _most_cpus)))


def limit_cpus(n: int) -> None:
    """From now on this process uses at most `n` processors, and at least one: for workers that share a machine."""
    global _most_cpus
    _most_cpus = n
    if "torch" in sys.modules:
        use_granted_cpus()


def use_granted_cpus() -> None:
    """Torch computes on no more threads than `n_cpus()` from now on.

    By itself it knows of the processors that the kernel lets it run on, but not of a quota: in a container that was
    granted 4 of 64 processors it starts 64 threads, of which 60 wait.
    """
    import torch

    if torch.get_num_threads() > n_cpus():
        torch.set_num_threads(n_cpus())


def _granted_by_slurm(name: str) -> float:
    """The number in that variable of a Slurm job; infinite outside of one, and where it says 0, which is "all"."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() and int(text) > 0 else math.inf


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any parts, equal on every machine and different for different parts."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


class MemoryShares:
    """Memory that threads share: one that needs more than is left waits for others; one alone never does."""

    def __init__(self, limit_gib: float) -> None:
        """All of it is left."""
        self._limit_gib, self._held_gib, self._n_holding = limit_gib, 0.0, 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, gib: float) -> Iterator[None]:
        """Has so much while the block runs."""
        with self._changed:
            # Sums of what was held and given back need not be exactly 0.
            self._changed.wait_for(lambda: not self._n_holding or self._held_gib + gib <= self._limit_gib)
            self._held_gib += gib
            self._n_holding += 1
        try:
            yield
        finally:
            with self._changed:
                self._held_gib -= gib
                self._n_holding -= 1
                self._changed.notify_all()


def map_threads(
    function: Callable[[S], T],
    items: Iterable[S],
    *,
    n_threads: int,
    description: str,
    needed_gib: Callable[[S], float] = lambda item: 0.0,
) -> list[T]:
    """Applies `function` to every item in threads, shows progress, keeps the order.

    The first error stops the rest and surfaces as it is. So many items are worked on at a time as threads and the
    memory of the machine allow, where `needed_gib` tells what an item takes.
    """
    todo = list(items)
    memory = MemoryShares(MAX_MEMORY_FRACTION * machine_memory_gib())
    with track(description, total=len(todo)) as advance, ThreadPoolExecutor(max(1, n_threads)) as pool:

        def run(item: S) -> T:
            with memory.hold(needed_gib(item)):
                result = function(item)
            advance(1)
            return result

        futures = [pool.submit(run, item) for item in todo]
        try:
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            # The failed one before any other: waiting for an earlier one would let the queue go on in the meantime.
            for future in futures:
                if future in finished:
                    future.result()
            return [future.result() for future in futures]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def run_ahead(
    function: Callable[[S], T], items: Iterable[S], *, n_threads: int = 1, depth: int
) -> Generator[T, None, None]:
    """Applies `function` to items in threads, in order, at most `depth` ahead of the one that is worked on.

    An error surfaces where its result would have come; what is waiting then is dropped, as when the generator is
    closed.
    """
    with ThreadPoolExecutor(n_threads, thread_name_prefix="ahead") as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def track(description: str, *, total: int) -> Iterator[Callable[..., None]]:
    """Progress of `total` steps: a bar on a terminal, a log line now and then elsewhere.

    Yields:
        `advance(n, note="")`, which may be called from any thread.
    """
    if sys.stderr.isatty() and logger.isEnabledFor(logging.INFO):
        with _bar(description, total) as advance:
            yield advance
    else:
        yield _plain(description, total)


@contextmanager
def _bar(description: str, total: int) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        # Names are no markup, whatever brackets they have.
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(spell_out(description), total=total, note="")

        def advance(n: int = 1, note: str = "") -> None:
            progress.update(task, advance=n, note=spell_out(note))

        yield advance


def _plain(description: str, total: int) -> Callable[..., None]:
    state = {"done": 0, "said": time.monotonic()}

    def advance(n: int = 1, note: str = "") -> None:
        state["done"] += n
        now = time.monotonic()
        if now - state["said"] >= PLAIN_PROGRESS_INTERVAL_S:
            state["said"] = now
            percent = 100 * state["done"] / total
            logger.info("%s: %.0f%%%s", description, percent, f", {note}" if note else "")

    return advance


def format_duration(seconds: float) -> str:
    """Seconds in words that suit their size: "0.8 s", "42 s", "3 min 5 s", "2 h 10 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def format_memory(gib: float) -> str:
    """Two or three digits: "36 MiB", "1.4 GiB", "120 GiB"."""
    if gib < 1:
        return f"{max(gib * 1024, 1):.0f} MiB"
    return f"{gib:.1f} GiB" if gib < 10 else f"{gib:,.0f} GiB"


def machine_memory_gib() -> float:
    """Memory this process may use at most, be it free or not; infinite where the system does not tell.

    The least counts of what the machine has, what its control groups are granted, and its Slurm job.
    """
    try:
        here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        here = math.inf
    per_node_mib = _granted_by_slurm("SLURM_MEM_PER_NODE")
    per_cpu_mib = _granted_by_slurm("SLURM_MEM_PER_CPU") * _granted_by_slurm("SLURM_CPUS_ON_NODE")
    return min(here, memory_limit_gib(), per_node_mib / 1024, per_cpu_mib / 1024)


def peak_memory_gib() -> float:
    """The most memory that this process has held so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / 2**30 if sys.platform == "darwin" else largest / 2**20


def resolve_device(name: str) -> torch.device:
    """The device of that name: "auto", "cpu", "cuda", "cuda:1" or "mps".

    Raises:
        AutosegError: the name is unknown, or this machine has no such device.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise AutosegError(f"device '{name}' is unknown; use auto, cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda":
        n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= n_gpus:
            found = f"{n_gpus} CUDA device{'s' if n_gpus > 1 else ''}" if n_gpus else "no CUDA device"
            raise AutosegError(f"device '{name}' is not there: this machine has {found}; use --device auto or cpu")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise AutosegError("device 'mps' is not there: this machine has no Apple GPU; use --device auto or cpu")
    elif device.type not in ("cpu", "mps"):
        raise AutosegError(f"device '{name}' is not supported; use auto, cpu, cuda, cuda:1 or mps")
    return device


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on another device; a CUDA device gets it while it computes.

    Apple's devices may read memory then that has been given to others.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The reduced precision that is worth using on a device; None where float32 is better."""
    import torch

    if device.type == "cuda":
        return torch.bfloat16 if can_compute(device, "bfloat16") else torch.float16
    return torch.bfloat16 if device.type == "cpu" and _cpu_gains_from_bfloat16() else None


def can_compute(device: torch.device, precision: str) -> bool:
    """Whether a device has a precision; older NVIDIA GPUs emulate "bfloat16", many times slower."""
    import torch

    return device.type != "cuda" or precision != "bfloat16" or torch.cuda.get_device_properties(device).major >= 8


@cache
def _cpu_gains_from_bfloat16() -> bool:
    """Whether a convolution, which is what networks spend their time in, is faster than in float32: it is timed.

    Processors without the instructions emulate them and are slower; some that have them gain nothing.
    """
    import torch

    if not getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        return False
    volume = torch.ones(1, 32, 16, 24, 24).to(memory_format=torch.channels_last_3d)
    weight = torch.ones(32, 32, 3, 3, 3)
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    with torch.inference_mode():
        for _ in range(N_TIMED_CONVOLUTIONS):
            for dtype in seconds:
                x, w = volume.to(dtype), weight.to(dtype)
                started = time.perf_counter()
                torch.nn.functional.conv3d(x, w, padding=1)
                seconds[dtype] = min(seconds[dtype], time.perf_counter() - started)
    return seconds[torch.bfloat16] < seconds[torch.float32]


@contextmanager
def computing(device: torch.device, *, deterministic: bool) -> Iterator[None]:
    """While the block runs, torch repeats its results bit for bit, or else picks the fastest kernels by trying them.

    An operation that can't be repeated on this device then raises torch's own error. On a CPU all are repeated anyway,
    with the same number of threads, and freed memory stays with the process. From then on torch uses the processors
    that were granted: see `use_granted_cpus`. Of several GPUs, what names none means this one.
    """
    import torch

    use_granted_cpus()
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    # cuBLAS reads it once, when it is first used, which may be in a training before the one that needs it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    try:
        with ExitStack() as stack:
            if device.type == "cpu":
                stack.enter_context(keeping_freed_memory())
            elif device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """While the block runs, memory that is freed stays with the process, where the C library is glibc.

    It gives each large tensor back to the kernel otherwise, which then has to clear every page of the next one: a fifth
    of the time of a training step on a CPU.
    """
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"):
        yield
        return
    library = ctypes.CDLL(None)
    options = (_M_MMAP_MAX, _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_TOP_PAD)
    for option, keeping, _ in options:
        library.mallopt(option, keeping)
    try:
        yield
    finally:
        for option, _, usual in options:
            library.mallopt(option, usual)
        library.malloc_trim(0)

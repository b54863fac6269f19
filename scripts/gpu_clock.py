"""Clocks for the jobs of `gpu_suite.py`: steps per second, how busy the GPU is meanwhile, and its memory."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch

RESULT = "RESULT "
GIB = 2**30
UTILIZATION_INTERVAL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long is measured.

    Attributes:
        n_warm_up: steps before.
        max_warm_up_s: fewer steps before where these take longer.
        n_least: steps that are timed at the least, unless they take four times `time_s`.
        n_most: steps that are timed at the most.
        time_s: steps are timed for so long.
    """

    n_warm_up: int = 10
    max_warm_up_s: float = 15.0
    n_least: int = 10
    n_most: int = 1000
    time_s: float = 4.0


class Utilization:
    """Per cent of the time that the GPU is busy, as its driver tells, from `start` to `stop`.

    Asked through torch where it can, otherwise by `nvidia-smi`; unknown where neither works.
    """

    def __init__(self, device: torch.device) -> None:
        self.source = self._find_source() if device.type == "cuda" else None
        self.percent: float | None = None
        self._values: list[float] = []
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None

    @staticmethod
    def _find_source() -> str | None:
        try:
            torch.cuda.utilization()
            return "torch"
        except Exception:  # no pynvml, or one of the errors of its own
            pass
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["nvidia-smi"], check=True, capture_output=True, timeout=20)
            return "nvidia-smi"
        return None

    def start(self) -> None:
        """Begins to ask."""
        if self.source == "torch":
            self._thread = threading.Thread(target=self._ask_torch, daemon=True)
            self._thread.start()
        elif self.source == "nvidia-smi":
            command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "500"]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def stop(self) -> None:
        """Ends asking; `percent` is the mean then."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._process is not None:
            self._process.terminate()
            lines = self._process.communicate()[0].splitlines()
            self._values = [float(line) for line in lines if line.strip().isdecimal()]
        self.percent = round(sum(self._values) / len(self._values), 1) if self._values else None

    def _ask_torch(self) -> None:
        while not self._ended.wait(UTILIZATION_INTERVAL_S):
            self._values.append(float(torch.cuda.utilization()))


class StepClock:
    """Times steps once they have warmed up, and watches the GPU meanwhile.

    Attributes:
        steps_per_s: of the timed steps, when `tick` has said that they are enough.
    """

    def __init__(self, timing: Timing, device: torch.device) -> None:
        self.steps_per_s = math.nan
        self._timing, self._device = timing, device
        self._n_steps = 0
        self._began = time.monotonic()
        self._timed_from: tuple[int, float] | None = None
        self._utilization = Utilization(device)

    def tick(self) -> bool:
        """To be called after each step; whether enough are timed."""
        self._n_steps += 1
        timing = self._timing
        if self._timed_from is None:
            if self._n_steps == 1:
                # The first one chooses kernels, starts threads and fills what is read ahead.
                self._began = time.monotonic()
            if self._n_steps >= timing.n_warm_up or time.monotonic() - self._began > timing.max_warm_up_s:
                synchronize(self._device)
                self._timed_from = self._n_steps, time.monotonic()
                self._utilization.start()
            return False
        n_timed, spent_s = self._n_steps - self._timed_from[0], time.monotonic() - self._timed_from[1]
        enough = spent_s >= timing.time_s and n_timed >= timing.n_least
        if not enough and n_timed < timing.n_most and spent_s < 4 * timing.time_s:
            return False
        synchronize(self._device)
        self.steps_per_s = n_timed / (time.monotonic() - self._timed_from[1])
        self._utilization.stop()
        return True

    def figures(self) -> dict[str, Any]:
        """What was measured, with the peak of the memory since `forget_memory`."""
        return {
            "steps_per_s": round(self.steps_per_s, 3),
            "utilization": self._utilization.percent,
            "utilization_source": self._utilization.source,
        } | peak_memory(self._device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_memory(device: torch.device) -> None:
    """Gives back what nobody refers to, and begins a new peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, float | None]:
    """GiB that tensors took, and that torch had reserved for them, at most."""
    if device.type != "cuda":
        return {"allocated_gib": None, "reserved_gib": None}
    return {
        "allocated_gib": round(torch.cuda.max_memory_allocated(device) / GIB, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved(device) / GIB, 2),
    }


def emit(**values: Any) -> None:
    """Gives a result to the process that started this one."""
    print("\n" + RESULT + json.dumps(values), flush=True)

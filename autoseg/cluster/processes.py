"""A group of processes on this machine that do one piece of work, each with a log of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_INTERVAL_S = 0.1
GRACE_S = 15.0
"""Between asking the rest of a group to stop, one of which has failed, and killing it: it may hang, waiting for it."""
MAX_LINE_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a group of processes has ended.

    Attributes:
        exit_code: 0, or that of the first process that failed; minus the number of the signal that killed it.
        reason: the last line that it has written, or which signal killed it; empty where all is well.
    """

    exit_code: int
    reason: str = ""

    @property
    def is_stopped(self) -> bool:
        """Whether it ended because it was asked to, with its state saved, or before there was any."""
        asked = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
        return self.exit_code in {code for number in asked for code in (128 + number, -number)}


class ProcessGroup:
    """Processes that belong together: where one fails, the others have nothing to wait for and are ended, too."""

    def __init__(self, commands: Sequence[Sequence[str]], *, log: Path) -> None:
        """Starts the processes.

        Args:
            commands: one for each.
            log: of the first one, which is appended to; the others write beside it, with their number in the name.

        Raises:
            OSError: one cannot be started; then none runs.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        self._logs = [log if number == 0 else _numbered(log, number) for number in range(len(commands))]
        self._asked_at: float | None = None
        self._first_failure: Ending | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for command, file in zip(commands, self._logs, strict=True):
                self._processes.append(_start(command, file))
        except OSError:
            self.signal(signal.SIGKILL)
            raise

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the processes, whether they still run or not."""
        return tuple(process.pid for process in self._processes)

    def signal(self, number: int) -> None:
        """Sends a signal to those that still run."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def poll(self) -> Ending | None:
        """How the group has ended; None while one of its processes runs."""
        codes = [process.poll() for process in self._processes]
        if self._first_failure is None:
            # Whoever was killed, which is a negative code, is why the others have failed.
            failed = [(code, log) for code, log in zip(codes, self._logs, strict=True) if code]
            if failed:
                code, log = next((known for known in failed if known[0] < 0), failed[0])
                self._first_failure = Ending(exit_code=code, reason=_why(code, log))
        if None not in codes:
            return self._first_failure or Ending(exit_code=0)
        if self._first_failure is not None:
            self._end_the_rest()
        return None

    def _end_the_rest(self) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            self.signal(signal.SIGTERM)
        elif now - self._asked_at > GRACE_S:
            self.signal(signal.SIGKILL)


def _start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as stream:
        # A session of its own: Ctrl-C on the terminal reaches it through us alone, and once. What it says last is why
        # it failed, so nothing that it printed before may come later.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )


def _numbered(log: Path, number: int) -> Path:
    return log.with_name(f"{log.stem}.{number}{log.suffix}")


def _why(code: int, log: Path) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        advice = ", as the system does where memory runs out" if -code == signal.SIGKILL else ""
        return f"killed by {name}{advice}"
    return last_line(log) or f"exit code {code}"


def last_line(log: Path) -> str:
    """The last line of a log that is not blank; empty where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - MAX_LINE_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


class LogFollower:
    """Reads what is added to a log, which may not be there yet."""

    def __init__(self, log: Path, *, from_end: bool = False) -> None:
        """Begins at the beginning, or at the end as it is now."""
        self._log = log
        self._position = log.stat().st_size if from_end and log.exists() else 0

    def read_new(self) -> str:
        """Whole lines that have come since the last time."""
        if not self._log.exists():
            return ""
        with self._log.open("rb") as file:
            file.seek(self._position)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._position += len(whole)
        return whole.decode(errors="replace")

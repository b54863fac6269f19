"""Looking after a job while it runs: its processes, its state, and another try where it fails."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from autoseg.cluster.processes import Ending, ProcessGroup
from autoseg.core.runtime import n_cpus
from autoseg.pipeline.jobs.batch import DONE, FAILED, RUNNING, STOPPED, BatchFolder, Failure, Job, JobState, now

MAX_FAILURES_IN_ALL = 10
FIRST_WAIT_S = 2.0
"""Before a job begins again that has failed; three times as long after each further failure."""
MAX_WAIT_S = 60.0


class Supervisor:
    """Runs a job in processes of its own, and tries again where it fails, from what it has saved.

    A job that has failed `max_failures` times for the same reason is given up, whatever number of machines and
    beginnings it took; so is one that has failed `MAX_FAILURES_IN_ALL` times. What ends because it is asked to has not
    failed.
    """

    def __init__(
        self, folder: BatchFolder, job: Job, *, devices: Sequence[str], n_cpus: int | None = None, max_failures: int = 1
    ) -> None:
        """Starts nothing yet.

        Args:
            folder: of the batch.
            job: of it.
            devices: one for each process of the job, such as "cuda:1".
            n_cpus: that the job may use; None for all that this process may.
            max_failures: for the same reason, until it is given up.
        """
        self.job = job
        self._folder, self._devices, self._n_cpus, self._max_failures = folder, devices, n_cpus, max_failures
        self._group: ProcessGroup | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._is_asked_to_stop, self._begins_again_at = False, 0.0
        self.state = folder.read_state(job.name) or JobState(status=STOPPED, host=socket.gethostname())

    def begin(self, *, kills: Sequence[str] = ()) -> bool:
        """Starts the job, unless it is done, or has failed too often already.

        Args:
            kills: how this job was killed before, each time that it could not be noted.

        Returns:
            Whether it was started.
        """
        for reason in kills:
            self.note_failure(reason)
        if self.has_failed_too_often():
            self._change(FAILED)
        if self.state.status in (DONE, FAILED):
            return False
        self._start()
        return True

    def ask_to_stop(self) -> None:
        """Lets the job save and end; it is not tried again."""
        if not self._is_asked_to_stop and self._group is not None:
            self._group.signal(signal.SIGTERM)
        self._is_asked_to_stop = True

    def poll(self) -> Ending | None:
        """How the job has ended for good; None while it runs, or is tried again."""
        if self._begins_again_at:
            return self._wait_to_begin_again()
        assert self._group is not None
        ending = self._group.poll()
        if ending is None:
            return None
        self._clean_up()
        if ending.exit_code == 0:
            self._change(DONE)
            return ending
        if self._is_asked_to_stop or ending.is_stopped:
            self._change(STOPPED)
            return ending
        self.note_failure(ending.reason)
        if self.has_failed_too_often():
            self._change(FAILED)
            return ending
        # What is wrong may pass, such as a file server that does not answer for a while.
        wait_s = min(MAX_WAIT_S, FIRST_WAIT_S * 3 ** (len(self.state.failures) - 1))
        self._begins_again_at = time.monotonic() + wait_s
        return None

    def note_results(self, results: str) -> bool:
        """Writes down what there is of results.

        Returns:
            Whether it differs from the last time.
        """
        has_grown = results != self.state.results
        self.state = dataclasses.replace(self.state, results=results)
        self._change(self.state.status)
        return has_grown

    def note_failure(self, reason: str) -> None:
        """Counts a failure, and writes it down."""
        failure = Failure(at=now(), host=socket.gethostname(), reason=reason)
        self.state = dataclasses.replace(self.state, failures=(*self.state.failures, failure))
        self._change(self.state.status)

    def has_failed_too_often(self) -> bool:
        """Whether it is time to give up."""
        kinds = Counter(kind_of(failure.reason) for failure in self.state.failures)
        return max(kinds.values(), default=0) >= self._max_failures or kinds.total() >= MAX_FAILURES_IN_ALL

    def give_up(self) -> None:
        """Writes down that the job has failed."""
        self._change(FAILED)

    def _wait_to_begin_again(self) -> Ending | None:
        if self._is_asked_to_stop:
            self._change(STOPPED)
            return Ending(exit_code=128 + signal.SIGTERM)
        if time.monotonic() >= self._begins_again_at:
            self._begins_again_at = 0.0
            self._start()
        return None

    def _start(self) -> None:
        n_attempts = self.state.n_attempts + 1
        n = self.job.n_processes
        self._scratch = tempfile.TemporaryDirectory(prefix="autoseg-")
        rendezvous = Path(self._scratch.name) / "rendezvous"
        commands = []
        for rank, device in zip(range(n), self._devices, strict=True):
            command = [sys.executable, "-m", "autoseg", "run-job", str(self._folder.root), self.job.name]
            command += ["--device", device, "--attempt", str(n_attempts), "--parent", str(os.getpid())]
            if self._n_cpus is not None or n > 1:
                command += ["--cpus", str(self._cpus_of_each(n))]
            if n > 1:
                command += ["--rank", str(rank), "--rendezvous", str(rendezvous)]
            commands.append(command)
        self._group = ProcessGroup(commands, log=self._folder.log(self.job.name))
        self.state = dataclasses.replace(
            self.state, host=socket.gethostname(), pids=self._group.pids, began=now(), n_attempts=n_attempts
        )
        self._change(RUNNING)

    def _cpus_of_each(self, n_processes: int) -> int:
        return max(1, (self._n_cpus or n_cpus()) // n_processes)

    def _change(self, status: str) -> None:
        self.state = dataclasses.replace(self.state, status=status, changed=now())
        self._folder.write_state(self.job.name, self.state)

    def _clean_up(self) -> None:
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None


def kind_of(reason: str) -> str:
    """A reason without what differs from time to time: folders, random names, steps, addresses, times."""
    return re.sub(r"\S*/|0x[0-9a-f]+|[0-9a-f]{8,}|autoseg-\w+|\d+", "#", reason)

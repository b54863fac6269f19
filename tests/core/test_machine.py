"""Which processes run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from autoseg.core.machine import is_running

WORD = "a-word-in-no-other-command"


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="the system does not tell commands")
def test_a_process_is_known_by_its_number_and_a_word_of_its_command() -> None:
    command = [sys.executable, "-c", "print(flush=True); input()", WORD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # Until it runs, the system may tell the command of this process.
        assert is_running(process.pid)
        assert is_running(process.pid, word=WORD)
        assert not is_running(process.pid, word=f"{WORD}-either")
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
        assert not is_running(process.pid)
        assert not is_running(process.pid, word=WORD)

"""Parsing and printing of the command line; what it does is tested in test_end_to_end."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from autoseg import __version__
from autoseg.cli import app, parse_duration
from autoseg.core.errors import AutosegError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("15m", 900), ("90s", 90), ("90", 90), ("1h30m", 5400), ("2h", 7200), ("1.5m", 90), (" 10 MIN ", 600)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text.replace(" M", "m")) == seconds


@pytest.mark.parametrize("text", ["", "soon", "m", "-5m", "0s", "5 days"])
def test_impossible_durations_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(AutosegError, match="15m"):
        parse_duration(text)


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.strip() == __version__


@pytest.mark.parametrize("command", ["plan", "train", "predict", "export", "evaluate", "demo"])
def test_every_command_explains_its_options(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    for option in re.findall(r"^\W*(--[a-z-]+)", plain, re.MULTILINE):
        line = next(line for line in plain.splitlines() if option in line)
        assert len(line.split()) > 3, f"{option} has no help"

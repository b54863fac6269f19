"""Which image files belong to which case: names with and without a channel's four digits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from autoseg.core.errors import DatasetError, Problem, describe_problems
from autoseg.data.io import case_name, file_ending

_CHANNEL_SUFFIX = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")


def split_channel(file: Path) -> tuple[str, str] | None:
    """CASE_0001.nii.gz as ("CASE", "0001"); None for a name without a channel."""
    match = _CHANNEL_SUFFIX.match(case_name(file))
    return (match["case"], match["channel"]) if match else None


def list_images(folder: Path) -> list[Path]:
    """The images in a folder, sorted; hidden files are no images."""
    return sorted(file for file in folder.iterdir() if file_ending(file) and not file.name.startswith("."))


def group_channels(files: Sequence[Path], *, folder: Path) -> dict[str, list[Path]]:
    """CASE_0000, CASE_0001, ... by case, in order of the channel."""
    cases: dict[str, list[Path]] = {}
    problems = []
    for file in sorted(files):
        parts = split_channel(file)
        if parts is None:
            expected = "a name such as CASE_0000.nii.gz with the channel's four digits"
            problems.append(Problem(kind="image name without a channel", file=str(file), expected=expected))
            continue
        cases.setdefault(parts[0], []).append(file)
    if problems:
        raise DatasetError(describe_problems(f"{folder}: images whose channel is not known.", problems))
    return cases


def by_name(files: Sequence[Path]) -> dict[str, Path]:
    """Files by case; a case that is there with two endings is an error, not a choice."""
    named = {case_name(file): file for file in files}
    problems = [
        Problem(
            kind="two files of one case",
            case=case_name(file),
            file=str(file),
            found=f"{named[case_name(file)].name} beside it",
            advice="remove one of them",
        )
        for file in files
        if named[case_name(file)] != file
    ]
    if problems:
        raise DatasetError(describe_problems(f"{files[0].parent}: files with the same name.", problems))
    return named


def channel_problems(case: str, files: Sequence[Path], *, n_channels: int) -> list[Problem]:
    """What is wrong with the channel files of a case, if they are not exactly 0000, 0001, ... of `n_channels`."""
    wanted = [f"{channel:04d}" for channel in range(n_channels)]
    if [case_name(file)[-4:] for file in files] == wanted:
        return []
    return [
        Problem(
            kind="wrong number of channels",
            case=case,
            found=", ".join(file.name for file in files),
            expected=f"one file per channel: {', '.join(f'{case}_{channel}' for channel in wanted)}",
            advice="add the missing channel, remove what is too much, or correct the list of channels",
        )
    ]

"""Errors that a user can act on: what, where, found, expected, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from autoseg.core.text import spell_out

MAX_SHOWN_PER_KIND = 20

E = TypeVar("E", bound="AutosegError")

ERROR, WARNING, NOTE = SEVERITIES = ("error", "warning", "note")
"""With an error nothing can be done; a warning deserves a look; a note says what was mended or taken as it is."""


class AutosegError(Exception):
    """Anything a user can mend. The command line prints its message and exits with `exit_code`.

    Attributes:
        problems: what it lists, one by one; empty for an error about one thing, which its message tells.
    """

    exit_code = 2
    problems: tuple[Problem, ...] = ()

    @classmethod
    def listing(cls: type[E], headline: str, problems: Sequence[Problem]) -> E:
        """An error about many things, whose message lists them all below a first line."""
        error = cls(describe_problems(headline, problems))
        error.problems = tuple(problems)
        return error


class DatasetError(AutosegError):
    """The dataset cannot be used as it is."""


class PlanError(AutosegError):
    """No plan can be made, or a plan file is not valid."""


class WorkspaceError(AutosegError):
    """The work folder lacks something, or holds something of another kind."""


class TrainingError(AutosegError):
    """Training cannot start or cannot go on."""


class TrainingInterrupted(TrainingError):
    """It was asked to stop; what there is is saved, and the same command goes on from there."""


class PredictionError(AutosegError):
    """One or more images could not be segmented."""


class ImageTooLargeError(PredictionError):
    """An image needs more memory than may be taken."""


class FormatError(AutosegError):
    """A file is not what its name or its header says."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with one case.

    Attributes:
        kind: a short name that groups equal problems, such as "label value not in the list".
        case: the case it was found in; empty where it concerns the whole dataset.
        file: the file it was found in; empty where no single file is to blame.
        text: what is wrong, where it is not told as found and expected.
        found: what is there.
        expected: what should be there.
        advice: what to do about it.
        severity: an error, a warning or a note, see `SEVERITIES`.
    """

    kind: str
    case: str = ""
    file: str = ""
    text: str = ""
    found: str = ""
    expected: str = ""
    advice: str = ""
    severity: str = ERROR

    def describe(self) -> str:
        """The problem without its kind and advice, on one line."""
        where = ": ".join(spell_out(part) for part in (self.case, self.file) if part)
        # Further lines are set in, so that no name in them begins a line of its own.
        facts = [self.text.replace("\n", "\n    ")] if self.text else []
        facts += [f"found {spell_out(self.found)}"] if self.found else []
        facts += [f"expected {spell_out(self.expected)}"] if self.expected else []
        return ": ".join(part for part in (where, ", ".join(facts)) if part)


def group_problems(problems: Sequence[Problem]) -> dict[tuple[str, str], list[Problem]]:
    """Problems by kind and advice, in the order in which they first occur."""
    groups: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((problem.kind, problem.advice), []).append(problem)
    return groups


def describe_problems(headline: str, problems: Sequence[Problem]) -> str:
    """One message for many problems: equal kinds together, each with its cases and its advice once.

    Args:
        headline: the first line of the message.
        problems: what was found, in any order.

    Returns:
        The message. At most `MAX_SHOWN_PER_KIND` cases of a kind are spelled out; the rest are counted.
    """
    lines = [headline]
    for (kind, advice), members in group_problems(problems).items():
        lines.append(f"\n{kind} ({len(members)})")
        lines += [f"  - {member.describe()}" for member in members[:MAX_SHOWN_PER_KIND] if member.describe()]
        if len(members) > MAX_SHOWN_PER_KIND:
            lines.append(f"  - ... and {len(members) - MAX_SHOWN_PER_KIND} more")
        if advice:
            lines.append(f"  What to do: {advice}")
    return "\n".join(lines)


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def list_some(names: Sequence[str], *, most: int = 6) -> str:
    """Names with commas; of many, the first few and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"

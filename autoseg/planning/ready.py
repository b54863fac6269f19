"""Ready-made plans of well-known datasets, and reading a plan that another dataset is to take over."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from autoseg.core.errors import FormatError
from autoseg.core.serialize import read_json
from autoseg.planning.fingerprint import Fingerprint
from autoseg.planning.plan import Plan


@dataclass(frozen=True, kw_only=True)
class ReadyPlan:
    """The plan of a well-known dataset, with what it was made from.

    Attributes:
        title: of the dataset, for people.
        source: where its figures were published.
        note: which figures are published, and which are estimated or drawn.
        fingerprint: what its scans are like.
        plan: made from the fingerprint.
    """

    title: str
    source: str
    note: str
    fingerprint: Fingerprint
    plan: Plan


def read_source_plan(path: Path) -> Plan:
    """Reads the plan that another dataset is to take over.

    Args:
        path: a ready-made plan, or the `plan.json` of a work folder.

    Returns:
        The plan.

    Raises:
        FormatError: there is no such file, with the names of those there are; or it is not a plan.
        PlanError: the plan holds something that is not valid.
    """
    if path.is_dir() or not path.exists():
        raise FormatError(_explain_missing(path))
    content = read_json(path)
    if not isinstance(content, dict):
        raise FormatError(f"{path}: found a {type(content).__name__}, expected a ready-made plan or a plan.json")
    if content.keys() & {"plan", "fingerprint"}:
        ready: ReadyPlan = read_json(path, ReadyPlan)
        return ready.plan
    plan: Plan = read_json(path, Plan)
    return plan


def _explain_missing(path: Path) -> str:
    folder, trouble = (path, "is a folder, expected a file") if path.is_dir() else (path.parent, "no such file")
    names = sorted(file.name for file in folder.glob("*.json"))
    if not names:
        return f"{path}: {trouble}, and there are no .json files in {folder.absolute()}"
    known = f"{folder} has {', '.join(names)}"
    close = difflib.get_close_matches(path.stem, [Path(name).stem for name in names], n=1)
    advice = f"did you mean '{close[0]}.json'? " if close else ""
    return f"{path}: {trouble}; {advice}{known}"

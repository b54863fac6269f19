"""Checking a dataset and looking at its scans, each file read once."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from autoseg import __version__
from autoseg.core.errors import ERROR, AutosegError, DatasetError, FormatError, Problem, WorkspaceError
from autoseg.core.locks import locked
from autoseg.core.runtime import n_cpus
from autoseg.core.serialize import digest, read_json, write_json
from autoseg.data.check import CheckResult, discover_labels, refuse_errors, scan_dataset
from autoseg.data.compare import compare_cases, find_leaks, find_test_folder
from autoseg.data.dataset import Dataset
from autoseg.data.files import list_images
from autoseg.data.io import parts_of
from autoseg.data.layouts import open_dataset
from autoseg.pipeline.workspace import DEFAULT_WORK, Workspace
from autoseg.planning.estimates import find_spacing_outliers
from autoseg.planning.fingerprint import Fingerprint, intensities_per_case, measure_case, summarise

logger = logging.getLogger(__name__)


def check(
    dataset: Path | str,
    work: Path | str = DEFAULT_WORK,
    *,
    fix: bool = False,
    test_folder: Path | str | None = None,
    allow_outside: bool = False,
) -> CheckResult:
    """Checks a dataset: everything that is wrong with any of its cases, or deserves a look.

    Example:
        >>> import autoseg
        >>> [problem.kind for problem in autoseg.check("dataset").problems]
        []

    Args:
        dataset: a folder or manifest in one of the known layouts; only read.
        work: the work folder, which keeps the result in `check.json`, and what `plan` then need not read again. Where
            it belongs to another dataset, nothing is kept.
        fix: mend what is safe to mend, see `plan`.
        test_folder: images to test on, which must not be among those to train on; None for `imagesTs` and the like
            beside them.
        allow_outside: a manifest may name files outside of its folder.

    Returns:
        What was found. It may hold errors: then no plan can be made.
    """
    workspace, path = Workspace(root=Path(work)), Path(dataset)
    try:
        index = dataclasses.replace(open_dataset(path, allow_outside=allow_outside), fix=fix)
    except (DatasetError, FormatError) as error:
        unread = Problem(
            kind="the files do not make a dataset",
            text=str(error),
            advice="correct what the message names, then check again",
        )
        result = CheckResult(dataset=str(path), n_cases=0, problems=error.problems or (unread,), key="")
        # What is there may be of another dataset, or be the user's own.
        if not workspace.dataset_file.exists():
            _write_result(workspace, result)
        return result
    try:
        refuse_foreign_folder(workspace, index.name)
        workspace.root.mkdir(parents=True, exist_ok=True)
    except (WorkspaceError, OSError) as error:
        logger.warning("%s. What is found is not kept.", error)
        return _examine(index, _test_folder(path, test_folder))[2]
    return _look_or_remember(index, workspace, _test_folder(path, test_folder))[2]


def look_at(index: Dataset, workspace: Workspace, folder: Path) -> tuple[Dataset, Fingerprint, CheckResult]:
    """Checks and fingerprints the cases, or finds what an earlier look has found where no file has changed since.

    Args:
        index: the dataset.
        workspace: keeps what is found.
        folder: of the dataset, that may have images to test on as well.

    Returns:
        The dataset with its labels and with how each case is read, the fingerprint, and what was found.

    Raises:
        DatasetError: one error that lists everything that is wrong with any case.
    """
    index, fingerprint, result = _look_or_remember(index, workspace, find_test_folder(folder))
    refuse_errors(index.name, result.problems, n_cases=len(index.cases))
    assert fingerprint is not None
    return index, fingerprint, result


def refuse_foreign_folder(workspace: Workspace, name: str) -> None:
    """A work folder belongs to one dataset, and is not the folder of somebody's dataset itself.

    Raises:
        WorkspaceError: it belongs to another.
    """
    if not workspace.dataset_file.exists():
        return
    try:
        known = workspace.read_dataset().name
    except AutosegError as error:
        if workspace.check_file.exists():
            return  # It is one of ours that has been damaged, and is made again.
        raise WorkspaceError(
            f"{workspace.root}: holds a dataset.json that autoseg has not written; name another work folder with -w"
        ) from error
    if known != name:
        raise WorkspaceError(
            f"{workspace.root}: holds the dataset '{known}', not '{name}'; name another work folder with -w"
        )


def file_identity(file: Path) -> tuple[str, int, int]:
    """Name, size and time of change of an image; where it is several files, of all of them together."""
    try:
        stats = [part.stat() for part in parts_of(file)]
    except OSError as error:
        raise WorkspaceError(f"{file}: the file has gone since 'autoseg plan'; restore it, or plan again") from error
    return str(file), sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)


def _test_folder(dataset: Path, given: Path | str | None) -> Path | None:
    if given is None:
        return find_test_folder(dataset if dataset.is_dir() else dataset.parent)
    if not Path(given).is_dir():
        raise DatasetError(f"{given}: no such folder; name the one with the images to test on")
    return Path(given)


def _identify_tests(folder: Path | None) -> list[tuple[str, int, int]]:
    """The images to test on, as they are now; what cannot be found behind a link is told when it is read."""
    found = []
    for file in [] if folder is None else list_images(folder.absolute()):
        try:
            found.append(file_identity(file))
        except WorkspaceError:
            found.append((str(file), 0, 0))
    return found


def _look_or_remember(
    index: Dataset, workspace: Workspace, test_folder: Path | None
) -> tuple[Dataset, Fingerprint | None, CheckResult]:
    logger.info("%s: layout %s, number of cases %d", index.name, index.layout, len(index.cases))
    files = [file_identity(file) for case in index.cases for file in case.files]
    # Groups and attributes sort the cases; no scan is read for them.
    cases = tuple(dataclasses.replace(case, group="", attributes={}) for case in index.cases)
    key = digest((__version__, dataclasses.replace(index, cases=cases), files, _identify_tests(test_folder)))
    with locked(workspace.root / ".check.lock", waiting_for=f"checks {index.name}"):
        remembered = _remember(index, workspace, key)
        if remembered is not None:
            return remembered
        index, fingerprint, result = _examine(index, test_folder)
        if fingerprint is not None:
            write_json(workspace.dataset_file, index)
            write_json(workspace.fingerprint_file, fingerprint)
            # Last, because its key says that the two others are right.
            result = dataclasses.replace(result, key=key)
        _write_result(workspace, result)
    return index, fingerprint, result


def _remember(index: Dataset, workspace: Workspace, key: str) -> tuple[Dataset, Fingerprint, CheckResult] | None:
    """What an earlier look has found, where no file has changed since."""
    try:
        result: CheckResult = read_json(workspace.check_file, CheckResult)
        known, fingerprint = workspace.read_dataset(), workspace.read_fingerprint()
    except AutosegError:
        return None  # There was no earlier look, or it was that of another version.
    names = [case.id for case in index.cases]
    if result.key != key or not names == [case.id for case in known.cases] == [case.case for case in fingerprint.cases]:
        return None
    logger.info("no file has changed since the last time: the fingerprint is still right")
    pairs = zip(known.cases, index.cases, strict=True)
    cases = tuple(dataclasses.replace(case, group=now.group, attributes=now.attributes) for case, now in pairs)
    known = dataclasses.replace(known, cases=cases)
    write_json(workspace.dataset_file, known)
    return known, fingerprint, result


def _examine(index: Dataset, test_folder: Path | None) -> tuple[Dataset, Fingerprint | None, CheckResult]:
    """Reads all cases. There is no fingerprint where there are errors."""
    empty = CheckResult(dataset=index.name, n_cases=len(index.cases), problems=(), key="")
    try:
        labels = index.labels or discover_labels(index, n_threads=n_cpus())
    except DatasetError as error:
        unknown = Problem(kind="labels cannot be told", text=str(error), advice="list them in a dataset.json")
        return index, None, dataclasses.replace(empty, problems=error.problems or (unknown,))
    index = dataclasses.replace(index, labels=labels)
    n_intensities = intensities_per_case(len(index.cases))
    scan = scan_dataset(
        index, labels, lambda case: measure_case(case, labels, n_intensities=n_intensities), n_threads=n_cpus()
    )
    problems = scan.problems + compare_cases(scan.looks, channels=index.channels, labels=labels)
    problems += find_spacing_outliers([measured.fingerprint for measured in scan.measured])
    if test_folder is not None:
        problems += find_leaks(scan.looks, test_folder, n_threads=n_cpus())
    fingerprint = None
    if not any(problem.severity == ERROR for problem in problems):
        try:
            fingerprint = summarise(scan.measured, index.channels)
        except DatasetError as error:
            advice = "correct the label maps, or remove the label"
            problems.append(Problem(kind="nothing is labelled", text=str(error), advice=advice))
    index = dataclasses.replace(index, cases=scan.cases) if fingerprint else index
    return index, fingerprint, dataclasses.replace(empty, problems=tuple(problems))


def _write_result(workspace: Workspace, result: CheckResult) -> None:
    try:
        write_json(workspace.check_file, result)
    except OSError as error:
        logger.warning("%s: cannot be written (%s); what is found is told here only", workspace.check_file, error)

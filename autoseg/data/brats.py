"""Folders of the BraTS challenges: one for each case, with a file for each channel and one for the label map."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autoseg.core.errors import DatasetError, Problem, list_some
from autoseg.core.labels import LabelSpec, Region
from autoseg.data.dataset import Case, Dataset
from autoseg.data.files import by_name, list_case_folders, list_images
from autoseg.data.io import case_name

logger = logging.getLogger(__name__)

_LABEL = "seg"
# BraTS-GLI-01234-001 is of patient 01234 at a second time, Brats18_TCIA01_131_1 of TCIA01_131.
_TIME_POINT = re.compile(r"(brats-[a-z]+-\d+)-(\d+)|(brats1\d_.+)_\d+", re.IGNORECASE)
_TASKS_WITH_REGIONS = ("GLI", "GOAT", "MEN", "MET", "SSA")
_FIRST_POST_TREATMENT = 100


@dataclass(frozen=True, kw_only=True)
class _Generation:
    """How files are named, which also says what their values mean.

    Attributes:
        years: of the challenges.
        joint: between the case and the channel.
        channels: in order.
        enhancing: the value of enhancing tumour.
    """

    years: str
    joint: str
    channels: tuple[str, ...]
    enhancing: int


_GENERATIONS = (
    _Generation(years="2017 to 2021", joint="_", channels=("flair", "t1", "t1ce", "t2"), enhancing=4),
    _Generation(years="2023 and later", joint="-", channels=("t1c", "t1n", "t2f", "t2w"), enhancing=3),
)


@dataclass(frozen=True, kw_only=True)
class _CaseFolder:
    """What is in the folder of a case.

    Attributes:
        folder: its name is the case's.
        generation: of its names.
        files: by channel, the label map as `seg`.
        others: images with other names.
    """

    folder: Path
    generation: _Generation
    files: dict[str, Path]
    others: tuple[str, ...]

    @property
    def cohort(self) -> tuple[Path, bool]:
        """Which cases are published together: those of one folder, validation data apart."""
        return self.folder.parent, "validation" in self.folder.name.lower()


def open_brats(path: Path) -> Dataset | None:
    if not path.is_dir():
        return None
    found = [case for folder in list_case_folders(path) if (case := _read_folder(folder)) is not None]
    if not found:
        return None
    generation = _common_generation(found, where=path)
    found = _leave_out_unlabelled(found, where=path)
    channels = _choose_channels(found, generation, where=path)
    _refuse_incomplete(found, channels, where=path)
    return Dataset(
        name=path.name,
        layout=f"BraTS, {generation.years}",
        channels=channels,
        labels=_choose_labels(generation, [case.folder.name for case in found], where=path),
        cases=tuple(
            Case(
                id=case.folder.name,
                group=_patient(case.folder.name),
                images=tuple(case.files.get(channel) for channel in channels),
                label=case.files[_LABEL],
            )
            for case in sorted(found, key=lambda case: case.folder.name)
        ),
    )


def _read_folder(folder: Path) -> _CaseFolder | None:
    if not folder.name.lower().startswith("brats"):
        return None
    images = list_images(folder)
    for generation in _GENERATIONS:
        prefix = f"{folder.name}{generation.joint}".lower()
        kinds = {f"{prefix}{kind}": kind for kind in (*generation.channels, _LABEL)}
        own = by_name([file for file in images if case_name(file).lower() in kinds])
        if own:
            return _CaseFolder(
                folder=folder,
                generation=generation,
                files={kinds[name.lower()]: file for name, file in own.items()},
                others=tuple(file.name for file in images if file not in own.values()),
            )
    return None


def _common_generation(found: Sequence[_CaseFolder], *, where: Path) -> _Generation:
    examples = {case.generation: case.folder.name for case in found}
    if len(examples) > 1:
        listed = " and ".join(f"{name} of {generation.years}" for generation, name in examples.items())
        raise DatasetError(
            f"{where}: found {listed}, expected cases of one generation, because their values mean different things; "
            "plan each by itself, or convert the label maps and list the files in a manifest"
        )
    return next(iter(examples))


def _leave_out_unlabelled(found: Sequence[_CaseFolder], *, where: Path) -> list[_CaseFolder]:
    """Without validation data: cases that lie together, or are called so, of which none has a label map."""
    labelled = {case.cohort for case in found if _LABEL in case.files}
    if not labelled:
        case = found[0]
        raise DatasetError(
            f"{where}: found {len(found)} BraTS cases without a label map, expected "
            f"{case.folder.name}{case.generation.joint}{_LABEL}.nii.gz beside the images of {case.folder.name}, and so "
            "on; download the training data, or add the label maps"
        )
    unlabelled = Counter(case.cohort for case in found if case.cohort not in labelled)
    for (folder, _), n_cases in unlabelled.items():
        logger.info("%s: %d cases are left out as validation data: none has a label map", folder, n_cases)
    return [case for case in found if case.cohort in labelled]


def _choose_channels(found: Sequence[_CaseFolder], generation: _Generation, *, where: Path) -> tuple[str, ...]:
    """Those that at least half of the cases have, in the generation's order."""
    n_cases = {channel: sum(channel in case.files for case in found) for channel in generation.channels}
    channels = tuple(channel for channel, n in n_cases.items() if 2 * n >= len(found))
    for channel, n in n_cases.items():
        if channel not in channels:
            logger.warning("%s: only %d of %d cases have %s, which is left out", where, n, len(found), channel)
        elif n < len(found):
            lacking = sorted(case.folder.name for case in found if channel not in case.files)
            logger.warning("%s: %s is missing in %d cases: %s", where, channel, len(lacking), list_some(lacking))
    if not channels:
        expected = ", ".join(f"CASE{generation.joint}{channel}.nii.gz" for channel in generation.channels)
        raise DatasetError(
            f"{where}: found no channel that at least half of the {len(found)} cases have, expected {expected}; add "
            "the missing images"
        )
    return channels


def _refuse_incomplete(found: Sequence[_CaseFolder], channels: Sequence[str], *, where: Path) -> None:
    problems = []
    for case in found:
        prefix = f"{case.folder.name}{case.generation.joint}"
        if _LABEL not in case.files:
            kind, expected = "case without label map", f"{prefix}{_LABEL}.nii.gz"
            advice = "add the label map or give it this name, or move the case elsewhere"
        elif not case.files.keys() & set(channels):
            kind, expected = "case without image", " or ".join(f"{prefix}{channel}.nii.gz" for channel in channels)
            advice = "add the images, or move the case elsewhere"
        else:
            continue
        where_found, others = str(case.folder), ", ".join(case.others)
        problems.append(Problem(kind=kind, file=where_found, found=others, expected=expected, advice=advice))
    if problems:
        raise DatasetError.listing(f"{where}: some BraTS cases are not complete.", problems)


def _patient(case: str) -> str:
    match = _TIME_POINT.fullmatch(case)
    return (match[1] or match[3]) if match else case


def _choose_labels(generation: _Generation, cases: Sequence[str], *, where: Path) -> LabelSpec | None:
    """The regions; None for tasks whose values mean something else."""
    if generation.joint == "-":
        tasks = {case.split("-")[1].upper() for case in cases if "-" in case}
        others = sorted(tasks - set(_TASKS_WITH_REGIONS))
        if others:
            logger.info("%s: the labels are the values found, because those of %s differ", where, ", ".join(others))
            return None
    return _region_labels(generation.enhancing, with_cavity=any(_is_post_treatment(case) for case in cases))


def _is_post_treatment(case: str) -> bool:
    """Whether it is of a glioma after treatment (2024 and later), whose time points begin at 100."""
    match = _TIME_POINT.fullmatch(case)
    return bool(match and match[2] and "-gli-" in case.lower() and int(match[2]) >= _FIRST_POST_TREATMENT)


def _region_labels(enhancing: int, *, with_cavity: bool) -> LabelSpec:
    names: tuple[str, ...] = ("necrosis", "edema", "enhancing tumour")
    values: tuple[int, ...] = (1, 2, enhancing)
    regions: tuple[Region, ...] = (
        Region(name="whole tumour", values=values, written=2),
        Region(name="tumour core", values=(1, enhancing), written=1),
        Region(name="enhancing tumour", values=(enhancing,), written=enhancing),
    )
    if with_cavity:
        names, values = (*names, "resection cavity"), (*values, 4)
        regions = (*regions, Region(name="resection cavity", values=(4,), written=4))
    return LabelSpec(names=names, values=values, regions=regions)

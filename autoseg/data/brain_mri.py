"""Slices as pictures, in a folder for each patient, every one with its mask beside it: the LGG set of brain MRI."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from autoseg.data.dataset import Dataset
from autoseg.data.files import by_name, channel_names, list_case_folders, list_images, match_labels
from autoseg.data.io import case_name

_MASK = "_mask"


def open_brain_mri(path: Path) -> Dataset | None:
    if not path.is_dir():
        return None
    files = [file for folder in list_case_folders(path) for file in _list_slices(folder)]
    slices = [file for file in files if not _is_mask(file)]
    masks = [file for file in files if _is_mask(file)]
    if not slices or not masks:
        return None
    images = {case: [file] for case, file in by_name(slices).items()}
    labels = {case[: -len(_MASK)]: file for case, file in by_name(masks).items()}
    cases = match_labels(images, labels, n_channels=1, where=path)
    return Dataset(
        name=path.name,
        layout="a folder of slices for each patient",
        channels=channel_names(slices[0]),
        labels=None,
        cases=tuple(replace(case, group=labels[case.id].parent.name) for case in cases),
    )


def _list_slices(folder: Path) -> list[Path]:
    """NAME_1.tif and NAME_1_mask.tif in the folder NAME."""
    expression = re.compile(rf"{re.escape(folder.name)}_\d+({_MASK})?", re.IGNORECASE)
    return [file for file in list_images(folder) if expression.fullmatch(case_name(file))]


def _is_mask(file: Path) -> bool:
    return case_name(file).lower().endswith(_MASK)

"""Datasets as they come.

The layout is recognised, not configured. Each entry of `LAYOUTS` either recognises a path and lists its cases, or
leaves it to the next. Nothing is copied; a `Dataset` holds absolute paths to the user's files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from autoseg.core.errors import DatasetError, Problem
from autoseg.data.bids import open_bids
from autoseg.data.brain_mri import open_brain_mri
from autoseg.data.brats import open_brats
from autoseg.data.dataset import Dataset
from autoseg.data.folder_layouts import open_folders
from autoseg.data.io import READERS
from autoseg.data.json_layouts import open_decathlon, open_nnunet
from autoseg.data.manifests import open_csv_manifest, open_json_manifest
from autoseg.data.patients import group_by_name

MAX_NAME_BYTES = 200
"""Names of files may have 255 bytes, and need room for an ending and for what marks a file that is being written."""

KNOWN_LAYOUTS = """\
  - Medical Segmentation Decathlon: dataset.json with a "training" list
  - nnU-Net raw: dataset.json with "channel_names", imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz
  - BraTS: CASE/CASE_flair.nii.gz and CASE/CASE_seg.nii.gz, or CASE/CASE-t2f.nii.gz and CASE/CASE-seg.nii.gz, and so on
  - a folder of slices for each patient: NAME/NAME_1.tif and NAME/NAME_1_mask.tif
  - a pair of folders: images/ and labels/ or masks/, imgs/ and masks/, train/ and train_masks/, also below data/ or
    train/, with the same file names, or "_mask" and the like after those of the masks
  - BIDS: sub-01/anat/sub-01_T1w.nii.gz and derivatives/labels/sub-01/anat/sub-01_T1w_dseg.nii.gz
  - a manifest: a .csv with the columns image (or one image_<channel> per channel) and label, optionally case and group,
    or a .json with "channels", "labels" and "cases\""""


def open_dataset(path: Path, *, allow_outside: bool = False) -> Dataset:
    """Recognises the layout of a dataset and lists its cases. At most, headers of one case are read.

    Args:
        path: a folder, or a manifest file.
        allow_outside: files that a manifest or `dataset.json` names may lie outside of its folder. Links within the
            folder may always lead out of it.

    Raises:
        DatasetError: no known layout, or files that are missing, or lie outside, all of them listed.
    """
    path = Path(path).absolute()
    if not path.exists():
        raise DatasetError(f"{path}: no such file or folder")
    for recognise in LAYOUTS:
        dataset = recognise(path)
        if dataset is not None:
            _check_index(dataset, path, allow_outside=allow_outside)
            return replace(dataset, cases=group_by_name(dataset.cases))
    shown = sorted(entry.name for entry in path.iterdir())[:8] if path.is_dir() else [path.name]
    raise DatasetError(
        f"{path}: the layout is not known.\nFound: {', '.join(shown) or 'an empty folder'}\n"
        f"Expected one of\n{KNOWN_LAYOUTS}\nImages end in {', '.join(READERS)}."
    )


def _check_index(dataset: Dataset, path: Path, *, allow_outside: bool) -> None:
    problems = []
    folder = path if path.is_dir() else path.parent
    seen: set[str] = set()
    for case in dataset.cases:
        if case.id in seen:
            advice = "rename the files, or name the cases in a manifest"
            first = str(case.label_files[0])
            problems.append(Problem(kind="two cases of one name", case=case.id, file=first, advice=advice))
        seen.add(case.id)
        if not _is_usable_name(case.id):
            advice = "give the case a name that can be the name of a folder"
            expected = f"letters, digits and signs that can be printed, at most {MAX_NAME_BYTES} bytes of them"
            problems.append(Problem(kind="unusable case name", case=repr(case.id), expected=expected, advice=advice))
        for file in case.files:
            if not allow_outside and not _is_inside(file, folder):
                advice = "move the file, or allow what lies elsewhere with --allow-outside, if you trust the list"
                problems.append(
                    Problem(
                        kind="file outside of the dataset",
                        case=case.id,
                        file=str(file),
                        expected=f"a file below {folder}",
                        advice=advice,
                    )
                )
            elif not file.exists():
                advice = "restore the file, or remove the case"
                problems.append(Problem(kind="missing file", case=case.id, file=str(file), advice=advice))
    if problems:
        raise DatasetError.listing(f"{path}: the dataset is not complete.", problems)
    if not dataset.cases:
        raise DatasetError(f"{path}: found no case in the layout '{dataset.layout}', expected images with label maps")


def _is_usable_name(name: str) -> bool:
    try:
        n_bytes = len(name.encode())
    except UnicodeEncodeError:
        return False  # It has bytes that are no text.
    return bool(name.strip(". ")) and not re.search(r"[/\\]", name) and name.isprintable() and n_bytes <= MAX_NAME_BYTES


def _is_inside(file: Path, folder: Path) -> bool:
    """Whether a path leads into a folder, by its names alone: where links lead is for whoever has made them."""
    return Path(os.path.normpath(file)).is_relative_to(os.path.normpath(folder))


LAYOUTS: tuple[Callable[[Path], Dataset | None], ...] = (
    open_csv_manifest,
    open_json_manifest,
    open_decathlon,
    open_nnunet,
    open_brats,
    open_brain_mri,
    open_folders,
    open_bids,
)

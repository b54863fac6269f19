"""Folders that nothing describes: the names of files and folders tell what they are."""

from __future__ import annotations

import logging
from pathlib import Path

from autoseg.core.errors import list_some
from autoseg.data.dataset import Dataset
from autoseg.data.files import (
    by_name,
    channel_names,
    group_channels,
    list_folders,
    list_images,
    match_labels,
    name_after_images,
    split_channel,
)
from autoseg.data.io import case_name, file_ending

logger = logging.getLogger(__name__)

_PAIRS = (
    ("images", "labels"),
    ("imagesTr", "labelsTr"),
    ("images", "masks"),
    ("imgs", "masks"),
    ("image", "mask"),
    ("train", "train_masks"),
    ("train_images", "train_masks"),
)
_BELOW = ("data", "train")
_NIFTI = (".nii", ".nii.gz")


def open_folders(path: Path) -> Dataset | None:
    pair = _find_pair(path)
    if pair is None:
        return None
    images, labels = (list_images(folder) for folder in pair)
    known = {case_name(file) for file in images}
    known |= {parts[0] for file in images if (parts := split_channel(file))}
    named = name_after_images(by_name(labels), known)
    if (
        images
        and all(split_channel(file) for file in images)
        and not named.keys() & {case_name(file) for file in images}
    ):
        grouped = group_channels(images, folder=pair[0])
    else:
        grouped = {case: [file] for case, file in by_name(images).items()}
    n_channels = max((len(files) for files in grouped.values()), default=1)
    channels = tuple(f"image {channel}" for channel in range(n_channels)) if n_channels > 1 else ("image",)
    # The fourth axis of a NIfTI file is time as often as channels, so it has to be listed.
    if n_channels == 1 and images and file_ending(images[0]) not in _NIFTI:
        channels = channel_names(images[0])
    return Dataset(
        name=path.name,
        layout="a pair of folders",
        channels=channels,
        labels=None,
        cases=tuple(match_labels(grouped, named, n_channels=n_channels, where=path)),
    )


def _find_pair(path: Path) -> tuple[Path, Path] | None:
    """The folders of images and of masks, in the dataset or below a folder for training data."""
    if not path.is_dir():
        return None
    for folder in (path, *(path / name for name in _BELOW)):
        if not folder.is_dir():
            continue
        for images, labels in _PAIRS:
            if (folder / images).is_dir() and (folder / labels).is_dir():
                others = [other.name for other in list_folders(path) if folder not in (path, other)]
                if others:
                    logger.info("%s is read; beside it are %s", folder, list_some(others))
                return folder / images, folder / labels
    return None

"""Folders with a `dataset.json`: of the Medical Segmentation Decathlon, and of nnU-Net."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from autoseg.core.errors import DatasetError
from autoseg.data.dataset import Case, Dataset
from autoseg.data.files import bad_entry, by_name, group_channels, list_images, match_labels
from autoseg.data.io import READERS, case_name, file_ending
from autoseg.data.listings import index_file, labels_of, parse_channels, read_index, require


def open_decathlon(path: Path) -> Dataset | None:
    content = read_index(path)
    if content is None or not isinstance(content.get("training"), list):
        return None
    where = index_file(path)
    channels = parse_channels(require(content, "modality", "channel_names", where=where), where=where)
    cases, problems = [], []
    for number, entry in enumerate(content["training"]):
        if not isinstance(entry, Mapping) or not all(isinstance(entry.get(key), str) for key in ("image", "label")):
            problems.append(bad_entry(f"training[{number}]", entry))
            continue
        label = where.parent / entry["label"]
        images = _decathlon_images(where.parent / entry["image"], n_channels=len(channels))
        cases.append(Case(id=case_name(label), group=case_name(label), images=images, label=label))
    if problems:
        raise DatasetError.listing(f"{where}: some entries cannot be read.", problems)
    return Dataset(
        name=str(content.get("name") or where.parent.name),
        layout="Medical Segmentation Decathlon",
        channels=channels,
        labels=labels_of(content, where=where),
        cases=tuple(sorted(cases, key=lambda case: case.id)),
    )


def _decathlon_images(image: Path, *, n_channels: int) -> tuple[Path, ...]:
    """The listed file, or its channel files where the list leaves out the suffix, as some converters write it."""
    ending = file_ending(image)
    if not image.exists() and ending:
        files = [image.with_name(f"{case_name(image)}_{channel:04d}{ending}") for channel in range(n_channels)]
        if files[0].exists():
            return tuple(files)
    return (image,)


def open_nnunet(path: Path) -> Dataset | None:
    content = read_index(path)
    folder = path if path.is_dir() else path.parent
    if content is None or "cases" in content or not (folder / "imagesTr").is_dir():
        return None
    where = index_file(path)
    channels = parse_channels(require(content, "channel_names", "modality", where=where), where=where)
    ending = str(content.get("file_ending", ".nii.gz"))
    if file_ending("x" + ending) is None:
        raise DatasetError(f"{where}: found file_ending '{ending}', expected one of {', '.join(READERS)}")
    if not (folder / "labelsTr").is_dir():
        raise DatasetError(f"{folder}: found imagesTr without labelsTr, expected a label map for every image")
    images = [file for file in list_images(folder / "imagesTr") if file.name.lower().endswith(ending.lower())]
    labels = [file for file in list_images(folder / "labelsTr") if file.name.lower().endswith(ending.lower())]
    grouped = group_channels(images, folder=folder / "imagesTr")
    return Dataset(
        name=str(content.get("name") or folder.name),
        layout="nnU-Net raw",
        channels=channels,
        labels=labels_of(content, where=where),
        cases=tuple(match_labels(grouped, by_name(labels), n_channels=len(channels), where=folder)),
    )

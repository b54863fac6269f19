"""Datasets as they come: which cases there are, with which channels, labels and files.

The layout is recognised, not configured. Each entry of `LAYOUTS` either recognises a path and lists its cases, or
leaves it to the next. Nothing is copied; a `Dataset` holds absolute paths to the user's files.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoseg.core.errors import DatasetError, FormatError, Problem, describe_problems
from autoseg.core.labels import LabelSpec
from autoseg.core.serialize import read_json
from autoseg.data.files import by_name, channel_problems, group_channels, list_images, split_channel
from autoseg.data.io import READERS, case_name, file_ending

KNOWN_LAYOUTS = """\
  - Medical Segmentation Decathlon: dataset.json with a "training" list
  - nnU-Net raw: dataset.json with "channel_names", imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz
  - a pair of folders: images/ and labels/ with the same file names
  - a manifest: a .csv with the columns image (or one image_<channel> per channel) and label, optionally case and group,
    or a .json with "channels", "labels" and "cases\""""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One examination.

    Attributes:
        id: unique within the dataset; names every file that is made of it.
        group: cases of one group never straddle folds; the case's own id where nothing else is known.
        images: files with one channel each, or one file with all of them.
        label: the label map.
    """

    id: str
    group: str
    images: tuple[Path, ...]
    label: Path


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """An index of the user's files.

    Attributes:
        name: of the dataset.
        layout: how it was recognised.
        channels: names, in order.
        labels: the classes; None where the layout does not say and the label maps have to be asked.
        cases: sorted by id.
    """

    name: str
    layout: str
    channels: tuple[str, ...]
    labels: LabelSpec | None
    cases: tuple[Case, ...]


def open_dataset(path: Path) -> Dataset:
    """Recognises the layout of a dataset and lists its cases, without opening any image.

    Args:
        path: a folder, or a manifest file.

    Raises:
        DatasetError: no known layout, or files that are missing, all of them listed.
    """
    path = Path(path).absolute()
    if not path.exists():
        raise DatasetError(f"{path}: no such file or folder")
    for recognise in LAYOUTS:
        dataset = recognise(path)
        if dataset is not None:
            _check_index(dataset, path)
            return dataset
    shown = sorted(entry.name for entry in path.iterdir())[:8] if path.is_dir() else [path.name]
    raise DatasetError(
        f"{path}: the layout is not known.\nFound: {', '.join(shown) or 'an empty folder'}\n"
        f"Expected one of\n{KNOWN_LAYOUTS}\nImages end in {', '.join(READERS)}."
    )


def _check_index(dataset: Dataset, path: Path) -> None:
    problems = []
    seen: set[str] = set()
    for case in dataset.cases:
        if case.id in seen:
            advice = "rename the files, or name the cases in a manifest"
            problems.append(Problem(kind="two cases of one name", case=case.id, file=str(case.label), advice=advice))
        seen.add(case.id)
        if not case.id.strip(". ") or re.search(r"[/\\\x00-\x1f]", case.id):
            advice = "give the case a name that can be the name of a folder"
            problems.append(Problem(kind="unusable case name", case=repr(case.id), advice=advice))
        for file in (*case.images, case.label):
            if not file.is_file():
                advice = "restore the file, or remove the case"
                problems.append(Problem(kind="missing file", case=case.id, file=str(file), advice=advice))
    if problems:
        raise DatasetError(describe_problems(f"{path}: the dataset is not complete.", problems))
    if not dataset.cases:
        raise DatasetError(f"{path}: found no case in the layout '{dataset.layout}', expected images with label maps")


def parse_labels(entries: Any, *, where: Path) -> LabelSpec:
    """The classes from a "labels" object, written value to name (MSD) or name to value (nnU-Net).

    Raises:
        DatasetError: names and values that cannot be told apart, no foreground, or a kind of label not supported.
    """
    if not isinstance(entries, Mapping):
        raise DatasetError(
            f"{where}: found the labels {entries!r}, expected for instance {{'background': 0, 'liver': 1}}"
        )
    pairs: list[tuple[str, int]] = []
    for key, item in entries.items():
        if isinstance(item, (list, dict)):
            raise DatasetError(
                f"{where}: label '{key}' is a region of several values {item}; this version trains on labels of one "
                "value each. List the plain labels instead."
            )
        if _is_whole(item):
            pairs.append((str(key), int(item)))
        elif _is_whole(key):
            pairs.append((str(item), int(key)))
        else:
            raise DatasetError(f"{where}: found the label '{key}': {item!r}, expected a name and a whole number")
    foreground = sorted(((value, name) for name, value in pairs if value != 0))
    if any(name == "ignore" for _, name in foreground):
        raise DatasetError(f"{where}: this version has no ignore label; remove 'ignore' from the labels")
    if not foreground:
        raise DatasetError(f"{where}: found no label besides the background, expected at least one")
    try:
        return LabelSpec(names=tuple(name for _, name in foreground), values=tuple(value for value, _ in foreground))
    except DatasetError as error:
        raise DatasetError(f"{where}: {error}") from error


def _is_whole(item: Any) -> bool:
    return not isinstance(item, bool) and (
        isinstance(item, int) or (isinstance(item, str) and item.strip().isdecimal())
    )


def _read_index(path: Path) -> dict[str, Any] | None:
    """The content of `dataset.json` in a folder, or of the file itself; None where there is none."""
    file = path / "dataset.json" if path.is_dir() else path
    if file.suffix.lower() != ".json" or not file.is_file():
        return None
    try:
        content = read_json(file)
    except FormatError as error:
        raise DatasetError(str(error)) from error
    if not isinstance(content, dict):
        raise DatasetError(f"{file}: found a {type(content).__name__}, expected an object with labels and channels")
    return content


def _require(content: Mapping[str, Any], *keys: str, where: Path) -> Any:
    for key in keys:
        if key in content:
            return content[key]
    raise DatasetError(f"{where}: the key '{keys[0]}' is missing")


def parse_channels(names: Any, *, where: Path) -> tuple[str, ...]:
    """Channel names from {"0": "T1", "1": "T2"} or ["T1", "T2"]."""
    if isinstance(names, Mapping) and all(_is_whole(key) for key in names):
        return tuple(str(names[key]) for key in sorted(names, key=int))
    if isinstance(names, list):
        return tuple(str(name) for name in names)
    raise DatasetError(f"{where}: found the channels {names!r}, expected {{'0': 'T1', '1': 'T2'}} or ['T1', 'T2']")


def _match_labels(
    images: Mapping[str, Sequence[Path]], labels: Mapping[str, Path], *, n_channels: int, where: Path
) -> list[Case]:
    """Cases that have images and a label map; all that do not fit together are listed in one error.

    Where an image's name is not the case's own, its last four digits are the channel.
    """
    problems = []
    for case, files in images.items():
        if case not in labels:
            advice = "add the label map, or move images to segment elsewhere (imagesTs)"
            problems.append(Problem(kind="image without label map", case=case, file=str(files[0]), advice=advice))
        elif case_name(files[0]) != case:
            problems += channel_problems(case, files, n_channels=n_channels)
    for case, label in labels.items():
        if case not in images:
            advice = "add the image, or remove the label map"
            problems.append(Problem(kind="label map without image", case=case, file=str(label), advice=advice))
    if problems:
        raise DatasetError(describe_problems(f"{where}: images and label maps do not match.", problems))
    return [Case(id=case, group=case, images=tuple(images[case]), label=labels[case]) for case in sorted(images)]


def _open_decathlon(path: Path) -> Dataset | None:
    content = _read_index(path)
    if content is None or not isinstance(content.get("training"), list):
        return None
    where = path / "dataset.json" if path.is_dir() else path
    channels = parse_channels(_require(content, "modality", "channel_names", where=where), where=where)
    cases, problems = [], []
    for number, entry in enumerate(content["training"]):
        if not isinstance(entry, Mapping) or not all(isinstance(entry.get(key), str) for key in ("image", "label")):
            problems.append(_bad_entry(f"training[{number}]", entry))
            continue
        label = where.parent / entry["label"]
        images = _decathlon_images(where.parent / entry["image"], n_channels=len(channels))
        cases.append(Case(id=case_name(label), group=case_name(label), images=images, label=label))
    if problems:
        raise DatasetError(describe_problems(f"{where}: some entries cannot be read.", problems))
    return Dataset(
        name=str(content.get("name") or where.parent.name),
        layout="Medical Segmentation Decathlon",
        channels=channels,
        labels=parse_labels(_require(content, "labels", where=where), where=where),
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


def _open_nnunet(path: Path) -> Dataset | None:
    content = _read_index(path)
    folder = path if path.is_dir() else path.parent
    if content is None or "cases" in content or not (folder / "imagesTr").is_dir():
        return None
    where = path / "dataset.json" if path.is_dir() else path
    channels = parse_channels(_require(content, "channel_names", "modality", where=where), where=where)
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
        labels=parse_labels(_require(content, "labels", where=where), where=where),
        cases=tuple(_match_labels(grouped, by_name(labels), n_channels=len(channels), where=folder)),
    )


def _open_folders(path: Path) -> Dataset | None:
    pairs = [(path / images, path / labels) for images, labels in (("images", "labels"), ("imagesTr", "labelsTr"))]
    pair = next(((images, labels) for images, labels in pairs if images.is_dir() and labels.is_dir()), None)
    if pair is None:
        return None
    images, labels = (list_images(folder) for folder in pair)
    named = by_name(labels)
    if (
        images
        and all(split_channel(file) for file in images)
        and not named.keys() & {case_name(file) for file in images}
    ):
        grouped: dict[str, list[Path]] = group_channels(images, folder=pair[0])
        n_channels = max(len(files) for files in grouped.values())
    else:
        grouped, n_channels = {case: [file] for case, file in by_name(images).items()}, 1
    return Dataset(
        name=path.name,
        layout="a pair of folders",
        channels=("image",) if n_channels == 1 else tuple(f"image {channel}" for channel in range(n_channels)),
        labels=None,
        cases=tuple(_match_labels(grouped, named, n_channels=n_channels, where=path)),
    )


def _open_csv_manifest(path: Path) -> Dataset | None:
    if not path.is_file() or path.suffix.lower() != ".csv":
        return None
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path}: cannot be read as a CSV file in UTF-8 ({error})") from error
    image_columns = [column for column in columns if column == "image" or column.startswith("image_")]
    if not image_columns or "label" not in columns:
        expected = "image (or image_<channel> for each channel) and label, optionally case and group"
        raise DatasetError(f"{path}: found the columns {', '.join(columns)}, expected {expected}")
    entries = [
        {
            "images": [row[column] for column in image_columns],
            "label": row["label"],
            "id": row.get("case"),
            "group": row.get("group"),
        }
        for row in rows
    ]
    return Dataset(
        name=path.stem,
        layout="CSV manifest",
        channels=tuple(column.removeprefix("image_") for column in image_columns),
        labels=None,
        cases=_manifest_cases(entries, where=path),
    )


def _open_json_manifest(path: Path) -> Dataset | None:
    content = _read_index(path)
    if content is None or "cases" not in content:
        return None
    where = path / "dataset.json" if path.is_dir() else path
    if not isinstance(content["cases"], list):
        raise DatasetError(f"{where}: 'cases' is {content['cases']!r}, expected a list")
    return Dataset(
        name=str(content.get("name") or where.stem),
        layout="JSON manifest",
        channels=parse_channels(_require(content, "channels", "channel_names", where=where), where=where),
        labels=parse_labels(content["labels"], where=where) if "labels" in content else None,
        cases=_manifest_cases(content["cases"], where=where),
    )


def _manifest_cases(entries: Sequence[Any], *, where: Path) -> tuple[Case, ...]:
    cases, problems = [], []
    for number, entry in enumerate(entries):
        fields = entry if isinstance(entry, Mapping) else {}
        images = fields.get("images", fields.get("image"))
        images = images if isinstance(images, list) else [images]
        if not images or not all(isinstance(file, str) and file for file in (*images, fields.get("label"))):
            problems.append(_bad_entry(f"case {number + 1}", entry))
            continue
        # Joining leaves absolute paths as they are and reads relative ones from the manifest's folder.
        label = where.parent / fields["label"]
        case = _given(fields.get("id")) or case_name(label)
        files = tuple(where.parent / file for file in images)
        cases.append(Case(id=case, group=_given(fields.get("group")) or case, images=files, label=label))
    if problems:
        raise DatasetError(describe_problems(f"{where}: some entries cannot be read.", problems))
    return tuple(sorted(cases, key=lambda case: case.id))


def _given(value: Any) -> str:
    """An optional entry as text, empty where there is none. The number 0 is a name like any other."""
    return "" if value is None else str(value)


def _bad_entry(place: str, entry: Any) -> Problem:
    expected = "the paths of an image and a label map"
    return Problem(kind="entry without image or label map", case=place, found=repr(entry), expected=expected)


LAYOUTS: tuple[Callable[[Path], Dataset | None], ...] = (
    _open_csv_manifest,
    _open_json_manifest,
    _open_decathlon,
    _open_nnunet,
    _open_folders,
)
